/*
 * What the rest of Solaris does for TCP: memory, the socket layer, squeues.
 */
#include <linux/sched.h>
#include <linux/slab.h>

#include "driver.h"

struct kmem_cache *eager_cache;
atomic_t failing_allocations;
atomic_t eagers;

/* The mib provider's stand-ins. */
#define MIB_DEFINE(name)                                                                   \
	TRACED void mib_##name(int increment, void *counter)                               \
	{                                                                                  \
		barrier();                                                                 \
	}
MIB_PROBES(MIB_DEFINE)

struct eager *tcp_get_conn(void)
{
	struct eager *eager;

	if (atomic_dec_if_positive(&failing_allocations) >= 0)
		return NULL;
	eager = kmem_cache_zalloc(eager_cache, GFP_KERNEL);
	if (eager)
		atomic_inc(&eagers);
	return eager;
}

static void free_conn(struct eager *eager)
{
	kmem_cache_free(eager_cache, eager);
	atomic_dec(&eagers);
}

bool so_newconn(tcp_t *listener, tcp_t *eager)
{
	struct listener *of = listener_of(listener);

	if (eager_of(eager)->refuse)
		return false;
	if (atomic_inc_return(&of->so_acceptq_len) <= of->so_backlog)
		return true;
	atomic_dec(&of->so_acceptq_len);
	return false;
}

/* Done with a claimed eager: the last one to be that frees it, if it has left its listener. */
void release(struct listener *listener, struct eager *eager)
{
	bool gone;

	kmutex_enter(&listener->tcp.tcp_eager_lock);
	gone = !--eager->claims && !eager->tcp.tcp_listener;
	kmutex_exit(&listener->tcp.tcp_eager_lock);
	if (gone)
		free_conn(eager);
}

/* Squeues: work that waits until the function which made it has returned. */

static struct eager *next_evicted(struct listener *listener)
{
	struct eager *eager;

	kmutex_enter(&listener->tcp.tcp_eager_lock);
	eager = list_first_entry_or_null(&listener->evicted, struct eager, evicted);
	if (eager)
		list_del(&eager->evicted);
	kmutex_exit(&listener->tcp.tcp_eager_lock);
	return eager;
}

void bury_evicted(struct listener *listener)
{
	struct eager *eager;

	while (!list_empty_careful(&listener->evicted) && (eager = next_evicted(listener))) {
		if (eager->tcp.tcp_state > TCPS_BOUND)
			clean_death(&eager->tcp);
		release(listener, eager);
	}
}

void send_undeferred(struct listener *listener)
{
	mblk_t *mp;

	kmutex_enter(&listener->tcp.tcp_eager_lock);
	mp = listener->undeferred;
	listener->undeferred = NULL;
	kmutex_exit(&listener->tcp.tcp_eager_lock);
	while (mp) {
		mblk_t *next = mp->b_next;

		mp->b_next = NULL;
		squeue_enter(&listener->squeue);
		tcp_send_pending(&listener->conn, mp, &listener->squeue IRA_NONE);
		squeue_exit(&listener->squeue);
		release(listener, container_of(mp, struct eager, conn_ind));
		mp = next;
	}
}

/* Take an eager in hand, so that nobody else does. */

static bool is_claimed(struct eager *eager)
{
	return eager->claims > eager->returning;
}

static bool can_claim(tcp_t *eager, bool deferred)
{
	if (is_claimed(eager_of(eager)) || eager_of(eager)->dead)
		return false;
	/* One that completed while its listener closed is neither. */
	return deferred ? eager->tcp_conn_def_q0 :
			  !eager->tcp_conn_def_q0 && eager->tcp_state == TCPS_SYN_RCVD;
}

/* The oldest one; deferred ones lie oldest first between the half-open ones and the ring's end. */
struct eager *claim_q0(struct listener *listener, bool deferred)
{
	tcp_t *head = &listener->tcp;
	struct eager *found = NULL;
	tcp_t *tcp = head;

	kmutex_enter(&head->tcp_eager_lock);
	while (!found) {
		tcp = deferred ? tcp->tcp_eager_next_q0 : tcp->tcp_eager_prev_q0;
		if (tcp == head)
			break;
		if (can_claim(tcp, deferred))
			found = eager_of(tcp);
	}
	if (found) {
		found->claims++;
		make_undroppable(&found->tcp);
	}
	kmutex_exit(&head->tcp_eager_lock);
	return found;
}

struct eager *claim_q(struct listener *listener, bool living)
{
	tcp_t *head = &listener->tcp;
	struct eager *found = NULL;
	tcp_t *tcp;

	kmutex_enter(&head->tcp_eager_lock);
	for (tcp = head->tcp_eager_next_q; tcp; tcp = tcp->tcp_eager_next_q) {
		struct eager *eager = eager_of(tcp);

		if (is_claimed(eager) || (living && eager->dead))
			continue;
		eager->claims++;
		found = eager;
		break;
	}
	kmutex_exit(&head->tcp_eager_lock);
	return found;
}

/* How many eagers claim_q0 or claim_q could find. */
u64 count_q0(struct listener *listener, bool deferred)
{
	tcp_t *head = &listener->tcp;
	tcp_t *tcp;
	u64 count = 0;

	kmutex_enter(&head->tcp_eager_lock);
	for (tcp = head->tcp_eager_prev_q0; tcp != head; tcp = tcp->tcp_eager_prev_q0)
		count += can_claim(tcp, deferred);
	kmutex_exit(&head->tcp_eager_lock);
	return count;
}

u64 count_q(struct listener *listener, bool living)
{
	tcp_t *head = &listener->tcp;
	tcp_t *tcp;
	u64 count = 0;

	kmutex_enter(&head->tcp_eager_lock);
	for (tcp = head->tcp_eager_next_q; tcp; tcp = tcp->tcp_eager_next_q)
		count += !is_claimed(eager_of(tcp)) && !(living && eager_of(tcp)->dead);
	kmutex_exit(&head->tcp_eager_lock);
	return count;
}

/* Have all that nobody has accepted go. */
void kill_eagers(struct listener *listener)
{
	struct eager *eager;

	do {
		while ((eager = claim_q(listener, false)) || (eager = claim_q0(listener, false)) ||
		       (eager = claim_q0(listener, true))) {
			tcp_eager_kill(&eager->conn, NULL, NULL IRA_NONE);
			release(listener, eager);
			cond_resched();
		}
	} while (wait_for_claims(listener));
	/* Those that nothing else can happen to are left. */
	while (listener->tcp.tcp_eager_prev_q0 != &listener->tcp) {
		eager = eager_of(listener->tcp.tcp_eager_prev_q0);
		eager->claims++;
		tcp_eager_kill(&eager->conn, NULL, NULL IRA_NONE);
		release(listener, eager);
	}
	atomic_set(&listener->so_acceptq_len, 0);
}
