/*
 * FreeBSD's socket layer as far as listening goes, and TCP's methods below it.
 * Facts: sys/kern/uipc_socket.c, uipc_syscalls.c, sys/netinet/tcp_usrreq.c, tcp_subr.c, in_pcb.c.
 */
#include <linux/errno.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "model.h"
#include "words.h"

struct kmem_cache *socket_cache, *inpcb_cache;
#if FREEBSD == 13
struct pr_usrreqs {
	void *pru_abort;
} usrreqs;
#define USRREQS .pr_usrreqs = &usrreqs
#else
#define USRREQS .pr_unused = 0
#endif
struct protosw tcp_protosw = { .pr_protocol = IPPROTO_TCP, USRREQS };
struct protosw local_protosw = { .pr_protocol = 0, USRREQS };
atomic_t failing_allocations;
atomic_t eagers;

int solisten_dequeue(struct socket *head, struct socket **ret, int flags);
int soaccept(struct socket *so, struct sockaddr **nam);
void solisten_proto(struct socket *so, int backlog);
void tcp_usr_abort(struct socket *so);
void tcp_usr_detach(struct socket *so);
static void sorele_locked(struct socket *so);

static void sock_lock(struct socket *so)
{
	spin_lock(&so->so_lock.lock);
}

static void sock_unlock(struct socket *so)
{
	spin_unlock(&so->so_lock.lock);
}

void inp_wlock(struct inpcb *inp)
{
	spin_lock(&inp->inp_lock.lock);
}

void inp_wunlock(struct inpcb *inp)
{
	spin_unlock(&inp->inp_lock.lock);
}

/* Queues. */

static void start_queue(struct accept_queue *queue)
{
	queue->tqh_first = NULL;
	queue->tqh_last = &queue->tqh_first;
}

static void insert_tail(struct accept_queue *queue, struct socket *so)
{
	so->so_list.tqe_next = NULL;
	so->so_list.tqe_prev = queue->tqh_last;
	*queue->tqh_last = so;
	queue->tqh_last = &so->so_list.tqe_next;
}

static void take_off(struct accept_queue *queue, struct socket *so)
{
	if (so->so_list.tqe_next)
		so->so_list.tqe_next->so_list.tqe_prev = so->so_list.tqe_prev;
	else
		queue->tqh_last = so->so_list.tqe_prev;
	*so->so_list.tqe_prev = so->so_list.tqe_next;
}

/* The head is locked. */
static void put_into_q(struct socket *head, struct socket *so)
{
	struct record *record = socket_of(head)->record;

	insert_tail(&head->sol_comp, so);
	head->sol_qlen++;
	so->so_qstate = SQ_COMP;
	socket_of(so)->queued_ns = ktime_get_ns();
	if (!record)
		return;
	COUNT(record, established);
	COUNT(record, q);
	COUNT(record, q_changes);
}

/* Memory. */

static bool can_allocate(void)
{
	return atomic_dec_if_positive(&failing_allocations) < 0;
}

static struct socket *soalloc(struct vnet *vnet)
{
	struct model_socket *made;

	if (!can_allocate())
		return NULL;
	made = kmem_cache_zalloc(socket_cache, GFP_ATOMIC);
	if (!made)
		return NULL;
	spin_lock_init(&made->so.so_lock.lock);
	made->so.so_vnet = vnet;
	return &made->so;
}

void sodealloc(struct socket *so)
{
	kmem_cache_free(socket_cache, socket_of(so));
}

/* A connection ends, or TCP's half of a listener does. */
TRACED void tcp_usr_detach(struct socket *so)
{
	struct inpcb *inp = sotoinpcb(so);

	if (SOLISTENING(so) && socket_of(so)->record)
		socket_of(so)->record->gone = true;
	inp_wlock(inp);
	inp->inp_flags |= INP_DROPPED;
	inp->inp_socket = NULL;
	so->so_pcb = NULL;
	inp_wunlock(inp);
	in_pcbrele(inp);
}

int in_pcballoc(struct socket *so)
{
	struct inpcb *inp;

	if (!can_allocate())
		return ENOBUFS;
	inp = kmem_cache_zalloc(inpcb_cache, GFP_ATOMIC);
	if (!inp)
		return ENOBUFS;
	spin_lock_init(&inp->inp_lock.lock);
	inp->inp_refcount = 1;
	inp->inp_socket = so;
	inp->inp_cred = so->so_cred;
	inp->inp_ip_p = IPPROTO_TCP;
	so->so_pcb = inp;
	return 0;
}

void in_pcbref(struct inpcb *inp)
{
	atomic_inc((atomic_t *)&inp->inp_refcount);
}

void in_pcbrele(struct inpcb *inp)
{
	if (atomic_dec_and_test((atomic_t *)&inp->inp_refcount))
		kmem_cache_free(inpcb_cache, inp);
}

static void soref(struct socket *so)
{
	atomic_inc((atomic_t *)&so->so_count);
}

/* Nobody knows it any more; it is locked. */
static void sofree(struct socket *so)
{
	sock_unlock(so);
	if (so->so_pcb)
		tcp_usr_detach(so);
	sodealloc(so);
}

static void sorele_locked(struct socket *so)
{
	if (atomic_dec_and_test((atomic_t *)&so->so_count))
		sofree(so);
	else
		sock_unlock(so);
}

struct socket *socreate(struct place *place, struct protosw *protosw)
{
	struct socket *so = soalloc(place->stack);

	if (!so)
		return NULL;
	so->so_cred = &place->cred;
	so->so_proto = protosw;
	if (protosw == &tcp_protosw && in_pcballoc(so)) {
		sodealloc(so);
		return NULL;
	}
	so->so_count = 1;
	return so;
}

/* A connection's socket, unless Q is over its capacity or there is no memory. */
static struct socket *clone_head(struct socket *head, bool attach)
{
	struct record *record = socket_of(head)->record;
	struct socket *so;
	bool over;

	if (record)
		record->heard_of = true;
	sock_lock(head);
	over = head->sol_qlen > 3 * head->sol_qlimit / 2;
	if (over)
		head->sol_overcount++;
	sock_unlock(head);
	if (over) {
		if (record)
			COUNT(record, q_full_ack);
		return NULL;
	}
	so = soalloc(head->so_vnet);
	if (!so)
		goto fail;
	so->so_listen = head;
	so->so_options = head->so_options & ~SO_ACCEPTCONN;
	so->so_state = head->so_state;
	so->so_proto = head->so_proto;
	so->so_cred = head->so_cred;
	socket_of(so)->record = record;
	if (attach && in_pcballoc(so)) {
		sodealloc(so);
		goto fail;
	}
	atomic_inc(&eagers);
	return so;
fail:
	if (record)
		COUNT(record, no_memory);
	return NULL;
}

/* Put a clone into a queue of its head. Returns whether that is Q. */
static bool enqueue(struct socket *so, int connstatus)
{
	struct socket *head = so->so_listen;
	struct record *record = socket_of(head)->record;

	so->so_count = 1;
	sock_lock(head);
	if (head->sol_accept_filter)
		connstatus = 0;
	so->so_state |= connstatus;
	soref(head);
	if (connstatus) {
		put_into_q(head, so);
		sock_unlock(head);
		return true;
	}
	while (head->sol_incqlen > head->sol_qlimit) {
		struct socket *sp = head->sol_incomp.tqh_first;

		take_off(&head->sol_incomp, sp);
		head->sol_incqlen--;
		sock_lock(sp);
		sp->so_qstate = SQ_NONE;
		sp->so_listen = NULL;
		sock_unlock(sp);
		if (record) {
			COUNT(record, overflown);
			UNCOUNT(record, waiting);
		}
		sorele_locked(head);
		soabort(sp);
		sock_lock(head);
	}
	insert_tail(&head->sol_incomp, so);
	so->so_qstate = SQ_INCOMP;
	head->sol_incqlen++;
	if (record) {
		COUNT(record, incomplete);
		COUNT(record, waiting);
	}
	sock_unlock(head);
	return false;
}

#if FREEBSD == 13

TRACED struct socket *sonewconn(struct socket *head, int connstatus)
{
	struct socket *so = clone_head(head, head->so_proto == &tcp_protosw);

	if (so)
		enqueue(so, connstatus);
	return so;
}

#else

TRACED struct socket *solisten_clone(struct socket *head)
{
	return clone_head(head, false);
}

TRACED bool solisten_enqueue(struct socket *so, int connstatus)
{
	return enqueue(so, connstatus);
}

/* For UNIX sockets; TCP has the parts of it. */
TRACED struct socket *sonewconn(struct socket *head, int connstatus)
{
	struct socket *so = solisten_clone(head);

	if (so)
		solisten_enqueue(so, connstatus);
	return so;
}

#endif

/* What an accept filter does: it waits for data. */
static int accf_callback(struct socket *so)
{
	return socket_of(so)->has_data ? SU_ISCONNECTED : SU_OK;
}

/* The caller has the connection's inpcb. */
TRACED void soisconnected(struct socket *so)
{
	struct socket *head;

	sock_lock(so);
	so->so_state |= SS_ISCONNECTED;
	if (so->so_qstate != SQ_INCOMP) {
		sock_unlock(so);
		return;
	}
	head = so->so_listen;
	if (!spin_trylock(&head->so_lock.lock)) {
		soref(head);
		sock_unlock(so);
		sock_lock(head);
		sock_lock(so);
		if (head != so->so_listen) {
			sock_unlock(so);
			sorele_locked(head);
			return;
		}
		atomic_dec((atomic_t *)&head->so_count);
	}
	if (so->so_options & SO_ACCEPTFILTER) {
		so->so_options &= ~SO_ACCEPTFILTER;
		if (accf_callback(so) != SU_ISCONNECTED) {
			sock_unlock(so);
			sock_unlock(head);
			return;
		}
	}
	take_off(&head->sol_incomp, so);
	head->sol_incqlen--;
	if (socket_of(head)->record)
		UNCOUNT(socket_of(head)->record, waiting);
	put_into_q(head, so);
	sock_unlock(so);
	sock_unlock(head);
	let_others_go();
}

/* A segment with data comes for the first incomplete connection that has none yet. */
bool receive_data(struct socket *head)
{
	struct socket *so;
	struct inpcb *inp;

	soref(head);
	sock_lock(head);
	for (so = head->sol_incomp.tqh_first; so; so = so->so_list.tqe_next)
		if (!socket_of(so)->has_data && !(so->so_options & SO_ACCEPTFILTER))
			break;
	if (!so) {
		sorele_locked(head);
		return false;
	}
	socket_of(so)->has_data = true;
	soref(so);
	inp = sotoinpcb(so);
	in_pcbref(inp);
	sock_unlock(head);
	inp_wlock(inp);
	/* The filter, which is an upcall of the receive buffer now. */
	if (accf_callback(so) == SU_ISCONNECTED)
		soisconnected(so);
	inp_wunlock(inp);
	in_pcbrele(inp);
	sock_lock(so);
	sorele_locked(so);
	sock_lock(head);
	sorele_locked(head);
	return true;
}

/* The client of the oldest in Q resets it: it stays there. */
bool reset_in_q(struct socket *head)
{
	struct socket *so;

	soref(head);
	sock_lock(head);
	for (so = head->sol_comp.tqh_first; so && socket_of(so)->dead;)
		so = so->so_list.tqe_next;
	if (so)
		socket_of(so)->dead = true;
	sorele_locked(head);
	return so;
}

/* The caller has locked it. */
TRACED void solisten_proto(struct socket *so, int backlog)
{
	if (!SOLISTENING(so)) {
		so->sol_qlen = so->sol_incqlen = 0;
		start_queue(&so->sol_incomp);
		start_queue(&so->sol_comp);
		so->sol_accept_filter = NULL;
		so->so_options |= SO_ACCEPTCONN;
	}
	if (backlog < 0 || backlog > SOMAXCONN_DEFAULT)
		backlog = SOMAXCONN_DEFAULT;
	so->sol_qlimit = backlog;
}

int tcp_usr_listen(struct socket *so, int backlog, struct thread *td)
{
	struct record *record = socket_of(so)->record;
	struct inpcb *inp = sotoinpcb(so);

	if (inp)
		inp_wlock(inp);
	sock_lock(so);
	solisten_proto(so, backlog);
	sock_unlock(so);
	if (inp)
		inp_wunlock(inp);
	if (record) {
		record->heard_of = true;
		record->asked = backlog;
		record->asked_times++;
	}
	return 0;
}

/* The head is locked, and unlocked when it returns; it never waits here. */
TRACED int solisten_dequeue(struct socket *head, struct socket **ret, int flags)
{
	struct record *record = socket_of(head)->record;
	struct socket *so = head->sol_comp.tqh_first;

	if (record)
		record->heard_of = true;
	if (!so) {
		sock_unlock(head);
		return EWOULDBLOCK;
	}
	sock_lock(so);
	head->sol_qlen--;
	so->so_qstate = SQ_NONE;
	so->so_listen = NULL;
	take_off(&head->sol_comp, so);
	if (record) {
		UNCOUNT(record, q);
		COUNT(record, q_changes);
		COUNT(record, accepts);
		if (socket_of(so)->dead)
			COUNT(record, accepts_dead);
		atomic64_add(ktime_get_ns() - socket_of(so)->queued_ns, &record->totals.wait_ns);
	}
	sock_unlock(so);
	sorele_locked(head);
	atomic_dec(&eagers);
	*ret = so;
	return 0;
}

TRACED int soaccept(struct socket *so, struct sockaddr **nam)
{
	struct inpcb *inp = sotoinpcb(so);
	int error;

	if (!inp)
		return 0;
	inp_wlock(inp);
	error = socket_of(so)->dead ? ECONNABORTED : 0;
	inp_wunlock(inp);
	return error;
}

/* accept(2): what is taken is closed at once, so that its memory is used again. */
int kern_accept(struct socket *head)
{
	struct socket *so;
	int error;

	sock_lock(head);
	error = solisten_dequeue(head, &so, 0);
	if (error)
		return error;
	cond_resched();
	soaccept(so, NULL);
	cond_resched();
	soclose(so);
	return 0;
}

/* pr_abort of TCP. */
TRACED void tcp_usr_abort(struct socket *so)
{
	struct inpcb *inp = sotoinpcb(so);

	inp_wlock(inp);
	inp->inp_flags |= INP_DROPPED;
	inp_wunlock(inp);
}

void soabort(struct socket *so)
{
	if (so->so_pcb)
		tcp_usr_abort(so);
	atomic_dec(&eagers);
	sock_lock(so);
	sorele_locked(so);
}

/* pr_close of TCP: nothing finds the inpcb any more. */
static void tcp_usr_close(struct socket *so)
{
	struct inpcb *inp = sotoinpcb(so);

	inp_wlock(inp);
	inp->inp_flags |= INP_DROPPED;
	inp_wunlock(inp);
}

TRACED int soclose(struct socket *so)
{
	struct record *record = socket_of(so)->record;
	struct socket *sp, *next, *all = NULL;

	if (so->so_pcb)
		tcp_usr_close(so);
	cond_resched();
	sock_lock(so);
	if (SOLISTENING(so)) {
		*so->sol_incomp.tqh_last = so->sol_comp.tqh_first;
		all = so->sol_incomp.tqh_first;
		start_queue(&so->sol_incomp);
		start_queue(&so->sol_comp);
		if (record) {
			atomic64_add(so->sol_qlen + so->sol_incqlen, &record->totals.killed);
			atomic64_add(-(s64)so->sol_qlen, &record->totals.q);
			atomic64_add(-(s64)so->sol_incqlen, &record->totals.waiting);
		}
		so->sol_qlen = so->sol_incqlen = 0;
		for (sp = all; sp; sp = sp->so_list.tqe_next) {
			sock_lock(sp);
			sp->so_qstate = SQ_NONE;
			sp->so_listen = NULL;
			sock_unlock(sp);
			atomic_dec((atomic_t *)&so->so_count);
		}
	}
	sorele_locked(so);
	for (sp = all; sp; sp = next) {
		next = sp->so_list.tqe_next;
		soabort(sp);
	}
	return 0;
}
