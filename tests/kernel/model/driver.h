/*
 * What drives the model: its memory, its packets and its script.
 */
#ifndef MODEL_DRIVER_H
#define MODEL_DRIVER_H

#include <linux/rwsem.h>

#include "model.h"

/* Who changes which zones and listeners there are holds it alone. */
extern struct rw_semaphore model_lock;
extern struct list_head places;
extern struct list_head records;
extern tcp_stack_t *shared_stack;

/* services.c: connections, and the work of squeues */
extern struct kmem_cache *eager_cache;
extern atomic_t failing_allocations;
extern atomic_t eagers;
void bury_evicted(struct listener *listener);
void send_undeferred(struct listener *listener);
struct eager *claim_q0(struct listener *listener, bool deferred);
struct eager *claim_q(struct listener *listener, bool living);
u64 count_q0(struct listener *listener, bool deferred);
u64 count_q(struct listener *listener, bool living);
void kill_eagers(struct listener *listener);

/* packet.c */
#define IP_OPTIONS_MOST 40
#define EXTENSION_MOST 1024
struct packet {
	mblk_t mb;
	dblk_t db;
	bool v4;
	bool options;
	uint16_t ip_header;
	__aligned(8) uchar_t bytes[sizeof(ip6_t) + EXTENSION_MOST + sizeof(tcpha_t)];
};
struct packet *make_packet(const in6_addr_t *to, in_port_t port, bool v4, int options,
			   int extension, uint8_t flags);
void set_client(struct packet *packet, const in6_addr_t *address, in_port_t port);
in6_addr_t nth_client(bool v4, u64 n);
in_port_t nth_port(u64 n);
bool is_wildcard(const in6_addr_t *address);
bool is_mapped(const in6_addr_t *address);

/* words.c: words of a line, in which the command, its arguments, then names with their values */
#define WORDS_MOST 32
struct command;
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
int read_address(const char *text, in6_addr_t *address, bool *v4);

/* script.c */
struct command {
	const char *name;
	int (*run)(struct words *words);
	/* It changes which zones and listeners there are. */
	bool alone;
	/* It is a call of the listener's application, or for the listener's squeue. */
	bool call;
	bool squeue;
};
int run_line(char *line);
void close_listener(struct listener *listener);
void let_go(struct listener *listener, int references);

/* model.c */
struct seq_file;
int start_model(void);
void stop_model(void);
int totals_show(struct seq_file *seq, void *data);

/*
 * In a process one line can be inside another or between another's steps, so each may have to wait
 * or cannot be: see tests/sun/native/lines.c. In the kernel model_lock is enough.
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
static inline bool wait_for_claims(struct listener *listener)
{
	return false;
}
#else
bool begin_line(struct words *words);
void end_line(struct words *words);
bool wait_for_claims(struct listener *listener);
#endif

#endif
