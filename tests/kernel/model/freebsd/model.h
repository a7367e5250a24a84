/*
 * What holds the model's sockets, its syncache and its script together, and the witness' totals.
 */
#ifndef MODEL_MODEL_H
#define MODEL_MODEL_H

#include <linux/container_of.h>
#include <linux/ktime.h>
#include <linux/list.h>

#include "types.h"

/*
 * The witness: what happened, counted where it is decided and not read from struct socket.
 * q_sum is the sum of Q over the SYNs, wait_ns the sum of the times from Q to accept.
 */
#define TOTALS(X)                                                                          \
	X(syns)		 /* SYNs that reached a listening socket */                        \
	X(not_listening) /* SYNs and ACKs for one that is closed meanwhile */              \
	X(duplicates)	 /* of the SYNs, those of connections that are half-open already */ \
	X(created)	 /* SYNs that made a half-open connection */                       \
	X(zone_fail)	 /* SYNs for which not even an eviction gave memory */             \
	X(q0_evicted)	 /* half-open ones thrown out for a new one, of whomever */        \
	X(unsure_evicted) /* of these and of nobody's, ones that may be taken for another's */ \
	X(forgotten)	 /* half-open ones that their client reset, or nobody heard of */  \
	X(q_full_ack)	 /* final ACKs refused, Q at its capacity */                       \
	X(no_memory)	 /* final ACKs refused as an allocation failed */                  \
	X(no_inpcb)	 /* of these, ones that had a socket already, on 14 */             \
	X(overflown)	 /* thrown out of the incomplete ones for a new one */             \
	X(established)	 /* connections put into Q */                                      \
	X(incomplete)	 /* completed ones that did not come into Q at once */             \
	X(accepts)	 /* connections that the application took */                       \
	X(accepts_dead)	 /* of these, the ones that their client had reset */              \
	X(killed)	 /* ones that went with their listener */                          \
	X(half_open)	 /* now in the syncache */                                         \
	X(waiting)	 /* now incomplete */                                              \
	X(q)		 /* now in Q */                                                    \
	X(q_sum)                                                                           \
	X(unsure)	 /* SYNs during which Q changed: to which Q they count is open */  \
	X(wait_ns)

/* SYNs by Q/limit: 0, up to 0.1, up to 0.2, ..., up to 1, more. */
#define SATURATION_BUCKETS 12

#define TOTAL(name) atomic64_t name;
struct totals {
	TOTALS(TOTAL)
	atomic64_t saturation[SATURATION_BUCKETS];
	atomic64_t q_changes;
};

/* A network stack; its syncache is one bucket. */
struct vnet {
	spinlock_t sch_mtx;
	struct list_head sch_bucket;
	u32 sch_length;
	u32 bucket_limit;
	/* Whose it is. */
	struct place *owner;
};

/* A jail; those without a stack of their own share the host's. */
struct place {
	struct list_head link;
	int id;
	struct prison prison;
	struct ucred cred;
	struct vnet *stack;
};

struct listener;

/* What stays of a listener when it is closed. */
struct record {
	struct list_head link;
	struct listener *listener;
	struct place *place;
	char name[32];
	char address[48];
	u16 port;
	bool filters;
	/* For whoever began to watch: whether anything has happened to it since. */
	bool heard_of;
	/* Its close() has begun; and nothing of it is left. */
	bool closing;
	bool gone;
	/* The backlog of its last listen(), and how many there were. */
	int asked;
	int asked_times;
	/* So is all that knows it. */
	bool freed;
	/* Of q_changes, when the SYN that has the listener's inpcb came. */
	u64 changes_seen;
	struct totals totals;
};

/* An application's socket that listens, and who has it in hand. */
struct listener {
	struct record *record;
	struct socket *so;
	struct inpcb *inp;
	/* Clients so far. */
	atomic64_t clients;
	int users;
	/* The application's calls that are going on, -1 for one that wants to be alone. */
	int calls;
	bool closing;
};

/* Every socket of the model; a listening one and a connection are of the same size. */
struct model_socket {
	struct socket so;
	struct record *record;
	u64 queued_ns;
	bool dead;
	bool has_data;
};

/* An entry of the syncache, and whose SYN has made it. */
struct model_syncache {
	struct syncache sc;
	struct record *record;
};

static inline struct model_socket *socket_of(struct socket *so)
{
	return container_of(so, struct model_socket, so);
}

static inline struct model_syncache *entry_of(struct syncache *sc)
{
	return container_of(sc, struct model_syncache, sc);
}

#define COUNT(record, total) atomic64_inc(&(record)->totals.total)
#define UNCOUNT(record, total) atomic64_dec(&(record)->totals.total)

static inline struct inpcb *sotoinpcb(struct socket *so)
{
	return so->so_pcb;
}

/* In a process others go on here, though an inpcb is locked. In Linux they do so on another CPU. */
#ifdef __KERNEL__
static inline void let_others_go(void)
{
}
#else
#define let_others_go cond_resched
#endif

/* socket.c: sys/kern/uipc_socket.c, and what TCP does for it */
extern struct kmem_cache *socket_cache, *inpcb_cache;
extern struct protosw tcp_protosw, local_protosw;
extern atomic_t failing_allocations;
#define SOLISTENING(so) (((so)->so_options & SO_ACCEPTCONN) != 0)
struct socket *socreate(struct place *place, struct protosw *protosw);
struct socket *sonewconn(struct socket *head, int connstatus);
#if FREEBSD >= 14
struct socket *solisten_clone(struct socket *head);
bool solisten_enqueue(struct socket *so, int connstatus);
#endif
void sodealloc(struct socket *so);
int in_pcballoc(struct socket *so);
void inp_wlock(struct inpcb *inp);
void inp_wunlock(struct inpcb *inp);
void in_pcbref(struct inpcb *inp);
void in_pcbrele(struct inpcb *inp);
void soisconnected(struct socket *so);
bool receive_data(struct socket *head);
bool reset_in_q(struct socket *head);
int tcp_usr_listen(struct socket *so, int backlog, struct thread *td);
int kern_accept(struct socket *head);
int soclose(struct socket *so);
void soabort(struct socket *so);

/* syncache.c: sys/netinet/tcp_syncache.c, and what tcp_input.c does before and behind it */
extern struct kmem_cache *syncache_cache;
int syncache_add(struct in_conninfo *inc, struct tcpopt *to, struct tcphdr *th, struct inpcb *inp,
		 void *so, struct mbuf *m, void *tod, void *todctx, uint8_t iptos, uint16_t port);
void receive_syn(struct listener *listener, struct in_conninfo *inc);
void receive_ack(struct listener *listener, struct in_conninfo *inc, bool cookie);
bool reaches(struct listener *listener, const struct in_conninfo *inc);
bool oldest_inc(struct record *record, struct in_conninfo *inc);
u64 count_entries(struct record *record);
void forget_oldest(struct record *record);
void flush_syncache(struct vnet *stack);

/* script.c */
extern struct list_head places;
extern struct list_head records;
void close_listener(struct listener *listener);

#endif
