/*
 * A model of another kernel's TCP listeners: the kernel module.
 *
 * Files, in debugfs under listeners/:
 *   script  events to happen, a line each, in the writer's context; see commands[] in script.c
 *   totals  a line of JSON for each listener that there was
 *   eagers  how many connections are in memory
 *
 * A line that cannot be (no such listener, nothing there to accept) makes write(2) fail with EINVAL
 * and does nothing; lines before it in the same write have been done.
 */
#include <linux/debugfs.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

#include "types.h"
#include "words.h"

#define SCRIPT_MOST (1 << 20)

static struct dentry *directory;

static ssize_t write_script(struct file *file, const char __user *from, size_t size, loff_t *at)
{
	char *text, *rest, *line;
	int error = 0;

	if (size > SCRIPT_MOST)
		return -EINVAL;
	text = memdup_user_nul(from, size);
	if (IS_ERR(text))
		return PTR_ERR(text);
	rest = text;
	while (!error && (line = strsep(&rest, "\n")))
		error = run_line(line);
	kfree(text);
	return error ? error : size;
}

static const struct file_operations script_operations = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = write_script,
};

DEFINE_SHOW_ATTRIBUTE(totals);

static int __init model_init(void)
{
	int error = start_model();

	if (error)
		return error;
	directory = debugfs_create_dir("listeners", NULL);
	debugfs_create_file("script", 0200, directory, NULL, &script_operations);
	debugfs_create_file("totals", 0400, directory, NULL, &totals_fops);
	debugfs_create_atomic_t("eagers", 0400, directory, &eagers);
	return 0;
}

static void __exit model_exit(void)
{
	debugfs_remove(directory);
	stop_model();
}

module_init(model_init);
module_exit(model_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A model of TCP listeners as the " GENERATION " kernel has them");
