/*
 * Words of a script's line, and what a model has for it.
 */
#ifndef MODEL_WORDS_H
#define MODEL_WORDS_H

#include <linux/atomic.h>
#include <linux/rwsem.h>
#include <linux/types.h>

/* Words of a line, in which the command, its arguments, then names with their values. */
#define WORDS_MOST 32
struct command;
struct listener;
struct words {
	char *word[WORDS_MOST];
	int count;
	int next;
	const struct command *command;
	/* Held until the line is done. */
	struct listener *listener;
	bool in_call;
};
int split(char *line, struct words *words);
char *next_word(struct words *words);
bool take_flag(struct words *words, const char *flag);
char *take(struct words *words, const char *name);
int take_number(struct words *words, const char *name, u64 most, u64 *number);

/* script.c of each family; the last command has no name */
struct command {
	const char *name;
	int (*run)(struct words *words);
	/* It changes which zones and listeners there are. */
	bool alone;
	/* It is a call of the listener's application, or for the listener's squeue. */
	bool call;
	bool squeue;
};
extern const struct command commands[];
int run_line(char *line);
void let_go(struct listener *listener, int references);

/* model.c of each family */
struct seq_file;
/* Who changes which zones and listeners there are holds it alone. */
extern struct rw_semaphore model_lock;
/* Connections in memory that nobody has accepted. */
extern atomic_t eagers;
int start_model(void);
void stop_model(void);
int totals_show(struct seq_file *seq, void *data);

/*
 * In a process one line can be inside another or between another's steps, so each may have to wait
 * or cannot be: see tests/sun/native. In the kernel model_lock is enough.
 */
#ifdef __KERNEL__
static inline bool is_nested(void)
{
	return false;
}
static inline bool begin_line(struct words *words)
{
	return true;
}
static inline void end_line(struct words *words)
{
}
#else
bool begin_line(struct words *words);
void end_line(struct words *words);
#endif

#endif
