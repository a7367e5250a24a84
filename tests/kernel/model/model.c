/*
 * A model of the Solaris and illumos kernels' TCP listeners: the script that drives it, its totals.
 *
 * Files, in debugfs under solaris/:
 *   script       events to happen, a line each, in the writer's context; see commands[] in script.c
 *   totals       a line of JSON for each listener that there was
 *   nanoseconds  how long the last `burst` took
 *   eagers       how many connections are in memory
 *
 * A line that cannot be (no such listener, nothing there to accept) makes write(2) fail with EINVAL
 * and does nothing; lines before it in the same write have been done.
 */
#include <linux/debugfs.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

#include "driver.h"

#define SCRIPT_MOST (1 << 20)

DECLARE_RWSEM(model_lock);
LIST_HEAD(places);
LIST_HEAD(records);
tcp_stack_t *shared_stack;
u64 burst_ns;

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

static void show_record(struct seq_file *seq, struct record *record)
{
	static const char *const kinds[] = { "socket", "streams", "tli" };
	struct listener *listener = record->listener;
	struct totals *totals = &record->totals;

	seq_printf(seq,
		   "{\"name\": \"%s\", \"zone\": %d, \"zone_name\": \"%s\", \"address\": \"%s\", "
		   "\"port\": %u, \"kind\": \"%s\", \"closed\": %s",
		   record->name, record->place->zone.zone_id, record->place->name, record->address,
		   record->port, kinds[record->kind], listener ? "false" : "true");
	if (listener) {
		tcp_t *tcp = &listener->tcp;
		u32 q0max = q0_limit(record->place->stack);

		seq_printf(seq,
			   ", \"qmax\": %d, \"q0max\": %d, \"tcp_q0\": %d, \"tcp_q\": %d, "
			   "\"state\": %d",
			   tcp->tcp_conn_req_max, tcp->tcp_conn_req_max + q0max,
			   tcp->tcp_conn_req_cnt_q0, tcp->tcp_conn_req_cnt_q, tcp->tcp_state);
	}
#define SHOW_TOTAL(name) seq_printf(seq, ", \"" #name "\": %lld", atomic64_read(&totals->name));
	TOTALS(SHOW_TOTAL)
	seq_puts(seq, ", \"saturation\": [");
	for (int i = 0; i < SATURATION_BUCKETS; i++)
		seq_printf(seq, "%s%lld", i ? ", " : "", atomic64_read(&totals->saturation[i]));
	seq_puts(seq, "]}\n");
}

static int totals_show(struct seq_file *seq, void *data)
{
	struct record *record;

	down_read(&model_lock);
	list_for_each_entry(record, &records, link)
		show_record(seq, record);
	up_read(&model_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(totals);

static int __init model_init(void)
{
	static char global_line[] = "zone 0 global";

	eager_cache = kmem_cache_create("solaris_eager", sizeof(struct eager), 0, 0, NULL);
	shared_stack = make_stack(0);
	if (!eager_cache || !shared_stack || run_line(global_line)) {
		kmem_cache_destroy(eager_cache);
		free_stack(shared_stack);
		return -ENOMEM;
	}
	directory = debugfs_create_dir("solaris", NULL);
	debugfs_create_file("script", 0200, directory, NULL, &script_operations);
	debugfs_create_file("totals", 0400, directory, NULL, &totals_fops);
	debugfs_create_u64("nanoseconds", 0400, directory, &burst_ns);
	debugfs_create_atomic_t("eagers", 0400, directory, &eagers);
	return 0;
}

static void __exit model_exit(void)
{
	struct record *record, *next_record;
	struct place *place, *next_place;

	debugfs_remove(directory);
	list_for_each_entry_safe(record, next_record, &records, link) {
		if (record->listener)
			close_listener(record->listener);
		kfree(record);
	}
	list_for_each_entry_safe(place, next_place, &places, link) {
		if (place->stack != shared_stack)
			free_stack(place->stack);
		kfree(place);
	}
	free_stack(shared_stack);
	kmem_cache_destroy(eager_cache);
}

module_init(model_init);
module_exit(model_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A model of TCP listeners as the " GENERATION " kernel has them");
