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
extern u64 burst_ns;

/* services.c: connections, and the work of squeues */
extern struct kmem_cache *eager_cache;
extern atomic_t failing_allocations;
extern atomic_t eagers;
void bury_evicted(struct listener *listener);
void send_undeferred(struct listener *listener);
struct eager *claim_q0(struct listener *listener, bool deferred);
struct eager *claim_q(struct listener *listener, bool living);
void release(struct listener *listener, struct eager *eager);
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
struct words {
	char *word[WORDS_MOST];
	int count;
	int next;
};
int split(char *line, struct words *words);
char *next_word(struct words *words);
bool take_flag(struct words *words, const char *flag);
char *take(struct words *words, const char *name);
int take_number(struct words *words, const char *name, u64 most, u64 *number);
int read_address(const char *text, in6_addr_t *address, bool *v4);

/* script.c */
int run_line(char *line);
void close_listener(struct listener *listener);

#endif
