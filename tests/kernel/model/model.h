/*
 * What holds the model's TCP and its script together: endpoints, totals, the stand-in for squeues.
 */
#ifndef MODEL_MODEL_H
#define MODEL_MODEL_H

#include <linux/container_of.h>
#include <linux/ktime.h>
#include <linux/list.h>

#include "types.h"

enum kind { SOCKET, STREAMS, TLI };

/*
 * The witness: what happened, counted where it is decided and not read from tcp_t.
 * q_sum is the sum of Q over the SYNs, wait_ns the sum of the times from Q to accept.
 */
#define TOTALS(X)                                                                          \
	X(syns)		 /* SYNs that reached a listening endpoint */                      \
	X(segments)	 /* other segments for it */                                       \
	X(not_listening) /* SYNs that reached one that does not listen any more */         \
	X(reclaim)	 /* SYNs dropped for want of memory in the system */               \
	X(q_full)	 /* SYNs dropped, Q at its limit */                                \
	X(q0_full)	 /* SYNs dropped, Q0 at its limit */                               \
	X(q0_evicted)	 /* half-open ones thrown out for a new one */                     \
	X(limit)	 /* SYNs dropped at the listener's own limit of connections */     \
	X(alloc)	 /* SYNs dropped because an allocation failed */                   \
	X(created)	 /* SYNs that made a half-open connection */                       \
	X(established)	 /* connections put into Q */                                      \
	X(deferred)	 /* completed ones left in Q0 as Q was full (STREAMS) */           \
	X(refused)	 /* put into Q, then refused by the socket layer and closed */     \
	X(accepts)	 /* connections that the application took */                       \
	X(accepts_dead)	 /* of these, the ones that their client had reset */              \
	X(aborts_q0)	 /* half-open ones that their client reset */                      \
	X(aborts_deferred) /* deferred ones that their client reset */                     \
	X(aborts_q)	 /* ones in Q that their client reset */                           \
	X(killed)	 /* ones that went with their listener */                          \
	X(q0)		 /* now in Q0, deferred ones included */                           \
	X(waiting)	 /* of these, the deferred ones */                                 \
	X(q)		 /* now in Q */                                                    \
	X(q_sum)                                                                           \
	X(unsure)	 /* SYNs during which Q changed: to which Q they count is open */          \
	X(wait_ns)

/* SYNs by Q/Qmax: 0, up to 0.1, up to 0.2, ..., up to 1, more. */
#define SATURATION_BUCKETS 12

#define TOTAL(name) atomic64_t name;
struct totals {
	TOTALS(TOTAL)
	atomic64_t saturation[SATURATION_BUCKETS];
	atomic64_t q_changes;
};

/* A zone; those that are not exclusive share one stack. */
struct place {
	struct list_head link;
	zone_t zone;
	cred_t cred;
	char name[64];
	tcp_stack_t *stack;
	bool exclusive;
};

/* A process, which accepts; its program's name may have any bytes. */
struct process {
	struct list_head link;
	char name[32];
	char comm[COMM_MOST + 1];
	pid_t pid;
	proc_t proc;
	struct service service;
};

struct listener;

/* What stays of a listener when it is closed. */
struct record {
	struct list_head link;
	struct listener *listener;
	struct place *place;
	char name[32];
	char address[48];
	in_port_t port;
	enum kind kind;
	/* So is the listener's memory. */
	bool freed;
	struct totals totals;
};

struct listener {
	conn_t conn;
	tcp_t tcp;
	struct record *record;
	enum kind kind;
	/* The socket layer's limit, set when it starts to listen, and its own count. */
	int so_backlog;
	atomic_t so_acceptq_len;
	/* Clients so far, accepted connections that are still there. */
	atomic64_t clients;
	atomic64_t open;
	/* Work for squeues that the running function is not in; under tcp_eager_lock. */
	struct list_head evicted;
	mblk_t *undeferred;
	squeue_t squeue;
	/* The application's calls that are going on, -1 for one that wants to be alone. */
	int calls;
	bool closing;
};

struct eager {
	conn_t conn;
	tcp_t tcp;
	struct list_head evicted;
	/* How many events have it in hand; under its listener's tcp_eager_lock. */
	int claims;
	/* One of them has only to return. */
	bool returning;
	/* Its client has reset it. */
	bool dead;
	/* The socket layer shall refuse it. */
	bool refuse;
	u64 queued_ns;
	mblk_t conn_ind;
	dblk_t conn_ind_data;
	struct {
		struct T_conn_ind head;
		uint8_t rest[sizeof(sin6_t) + sizeof(tcp_t *)];
	} tpi __aligned(8);
};

static inline struct listener *listener_of(tcp_t *tcp)
{
	return container_of(tcp, struct listener, tcp);
}

static inline struct eager *eager_of(tcp_t *tcp)
{
	return container_of(tcp, struct eager, tcp);
}

#define COUNT(listener, total) atomic64_inc(&listener_of(listener)->record->totals.total)
#define UNCOUNT(listener, total) atomic64_dec(&listener_of(listener)->record->totals.total)

/* services.c: what the rest of Solaris does for TCP */
struct eager *tcp_get_conn(void);
bool so_newconn(tcp_t *listener, tcp_t *eager);
void release(struct listener *listener, struct eager *eager);
static inline void freemsg(mblk_t *mp)
{
}
static inline void putnext(queue_t *queue, mblk_t *mp)
{
}

/* queues.c: the same in both generations */
void tcp_eager_unlink(tcp_t *tcp);
void tcp_send_conn_ind(void *arg, mblk_t *mp, void *arg2);
void tcp_send_pending(void *arg, mblk_t *mp, void *arg2 IRA_PARAMETER);
void tcp_accept_swap(tcp_t *listener, tcp_t *acceptor, tcp_t *eager);
void tcp_eager_kill(void *arg, mblk_t *mp, void *arg2 IRA_PARAMETER);
void tcp_closei_local(tcp_t *tcp);
void start_queues(tcp_t *listener);
void link_to_q0(tcp_t *listener, tcp_t *eager);
void move_to_q(tcp_t *listener, tcp_t *eager);
void make_conn_ind(tcp_t *listener, tcp_t *eager, bool v6_address);
void accept_tpi(queue_t *q, mblk_t *mp);
void accept_tli(tcp_t *listener, mblk_t *mp);

/* tcp.c of each generation: what model.c calls there */
tcp_stack_t *make_stack(netstackid_t id);
void free_stack(tcp_stack_t *stack);
uint32_t q0_limit(tcp_stack_t *stack);
void set_q0_limit(tcp_stack_t *stack, uint32_t limit);
int set_reclaim(tcp_stack_t *stack, bool on);
int set_listen_limit(tcp_t *listener, uint32_t limit);
void forget_connection(tcp_t *listener);
int serve(struct process *process, const char *fmri);
void init_endpoint(conn_t *connp, tcp_t *tcp, struct place *place, enum kind kind, bool v6,
		   pid_t pid);
void bind_to(conn_t *connp, tcp_t *tcp, const in6_addr_t *address, in_port_t port);
int listen_on(struct listener *listener, int backlog);
int unlisten(struct listener *listener);
bool can_receive(uint8_t flags);
void receive(struct listener *listener, mblk_t *mp, uint16_t ip_header, bool v4, bool options);
void handshake_done(struct listener *listener, struct eager *eager);
void clean_death(tcp_t *eager);
void time_out(tcp_t *listener, tcp_t *eager);
int accept_eager(struct listener *listener, struct eager *eager, queue_t *q, mblk_t *mp);

#endif
