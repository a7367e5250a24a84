/*
 * What drives the model: its memory, its packets and its script.
 */
#ifndef MODEL_DRIVER_H
#define MODEL_DRIVER_H

#include "model.h"
#include "words.h"

extern struct list_head places;
extern struct list_head records;
extern struct list_head processes;
extern tcp_stack_t *shared_stack;

/* services.c: connections, and the work of squeues */
extern struct kmem_cache *eager_cache;
extern atomic_t failing_allocations;
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

int read_address(const char *text, in6_addr_t *address, bool *v4);

/* script.c */
void close_listener(struct listener *listener);

/* In a process events of others can have a connection in hand: see tests/sun/native/solaris.c. */
#ifdef __KERNEL__
static inline bool wait_for_claims(struct listener *listener)
{
	return false;
}
/* The module's calls are those of the process that writes the script. */
static inline struct process *run_as(struct process *process)
{
	return NULL;
}
#else
bool wait_for_claims(struct listener *listener);
/* Let this thread be a process's, NULL for the kernel's own. Returns whose it was. */
struct process *run_as(struct process *process);
#endif

#endif
