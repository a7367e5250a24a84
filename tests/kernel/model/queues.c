/*
 * Q0 and Q of a listener, and how an eager (a connection that nobody has accepted) moves and
 * leaves.
 *
 * Q0 is a ring headed by the listener, its newest at next_q0, its oldest at prev_q0; completed
 * connections that wait for room in Q are its oldest end. Q is a list, oldest first.
 * Facts: tcp_input.c, tcp_tpi.c and tcp.c of illumos, tcp.c of the OpenSolaris of 2006.
 */
#include "model.h"

static void leave_q0(tcp_t *listener, tcp_t *eager)
{
	eager->tcp_eager_next_q0->tcp_eager_prev_q0 = eager->tcp_eager_prev_q0;
	eager->tcp_eager_prev_q0->tcp_eager_next_q0 = eager->tcp_eager_next_q0;
	eager->tcp_eager_next_q0 = NULL;
	eager->tcp_eager_prev_q0 = NULL;
	listener->tcp_conn_req_cnt_q0--;
	UNCOUNT(listener, q0);
	if (eager->tcp_conn_def_q0) {
		eager->tcp_conn_def_q0 = B_FALSE;
		UNCOUNT(listener, waiting);
	}
	if (eager->tcp_syn_rcvd_timeout) {
		eager->tcp_syn_rcvd_timeout = 0;
		listener->tcp_syn_rcvd_timeout--;
	}
}

/* Head the queues of a new listener. */
void start_queues(tcp_t *listener)
{
	listener->tcp_eager_next_q0 = listener;
	listener->tcp_eager_prev_q0 = listener;
	listener->tcp_eager_next_q = NULL;
	listener->tcp_eager_last_q = NULL;
}

/* Put a new eager into Q0, as its newest. */
void link_to_q0(tcp_t *listener, tcp_t *eager)
{
	listener->tcp_eager_next_q0->tcp_eager_prev_q0 = eager;
	eager->tcp_eager_next_q0 = listener->tcp_eager_next_q0;
	listener->tcp_eager_next_q0 = eager;
	eager->tcp_eager_prev_q0 = listener;
	eager->tcp_listener = listener;
	eager->tcp_conn_req_seqnum = listener->tcp_conn_req_seqnum;
	listener->tcp_conn_req_cnt_q0++;
	/* TPI has a meaning of its own for -1. */
	if (++listener->tcp_conn_req_seqnum == -1)
		++listener->tcp_conn_req_seqnum;
	COUNT(listener, created);
	COUNT(listener, q0);
}

/* Move an eager from Q0 to the end of Q. */
void move_to_q(tcp_t *listener, tcp_t *eager)
{
	tcp_t *tail = listener->tcp_eager_last_q;

	leave_q0(listener, eager);
	listener->tcp_conn_req_cnt_q++;
	COUNT(listener, established);
	COUNT(listener, q);
	COUNT(listener, q_changes);
	eager_of(eager)->queued_ns = ktime_get_ns();
	if (tail)
		tail->tcp_eager_next_q = eager;
	else
		listener->tcp_eager_next_q = eager;
	listener->tcp_eager_last_q = eager;
	eager->tcp_eager_next_q = NULL;
}

/* Take an eager off its listener's queue; the caller holds tcp_eager_lock. */
TRACED void tcp_eager_unlink(tcp_t *tcp)
{
	tcp_t *listener = tcp->tcp_listener;

	if (tcp->tcp_eager_next_q0) {
		leave_q0(listener, tcp);
		make_undroppable(tcp);
	} else {
		tcp_t **link = &listener->tcp_eager_next_q;
		tcp_t *before = NULL;

		for (; *link; before = *link, link = &(*link)->tcp_eager_next_q) {
			if (*link != tcp)
				continue;
			if (listener->tcp_eager_last_q == tcp)
				listener->tcp_eager_last_q = before;
			*link = tcp->tcp_eager_next_q;
			tcp->tcp_eager_next_q = NULL;
			tcp->tcp_eager_last_q = NULL;
			listener->tcp_conn_req_cnt_q--;
			UNCOUNT(listener, q);
			COUNT(listener, q_changes);
			break;
		}
	}
	tcp->tcp_listener = NULL;
}

/* Move the first of the deferred to Q; the caller has the lock and knows that there is one. */
GET_DEF_CONN_IND mblk_t *tcp_get_def_conn_ind(tcp_t *listener)
{
	tcp_t *tcp = listener->tcp_eager_prev_q0;
	mblk_t *conn_ind;

	while (tcp->tcp_eager_prev_q0 != listener && tcp->tcp_eager_prev_q0->tcp_conn_def_q0)
		tcp = tcp->tcp_eager_prev_q0;
	conn_ind = tcp->tcp_conn.tcp_eager_conn_ind;
	tcp->tcp_conn.tcp_eager_conn_ind = NULL;
	move_to_q(listener, tcp);
	return conn_ind;
}

/* The message that tells a STREAMS listener of an eager: the eager's address is its option. */
void make_conn_ind(tcp_t *listener, tcp_t *tcp, bool v6_address)
{
	struct eager *eager = eager_of(tcp);
	struct T_conn_ind *head = &eager->tpi.head;
	mblk_t *mp = &eager->conn_ind;

	head->PRIM_type = T_CONN_IND;
	head->SRC_length = v6_address ? sizeof(sin6_t) : sizeof(sin_t);
	head->SRC_offset = sizeof(*head);
	head->OPT_length = sizeof(tcp);
	head->OPT_offset = head->SRC_offset + head->SRC_length;
	head->SEQ_number = listener->tcp_conn_req_seqnum;
	eager->conn_ind_data.db_base = (uchar_t *)&eager->tpi;
	eager->conn_ind_data.db_lim = (uchar_t *)(&eager->tpi + 1);
	eager->conn_ind_data.db_ref = 1;
	mp->b_datap = &eager->conn_ind_data;
	mp->b_rptr = eager->conn_ind_data.db_base;
	mp->b_wptr = mp->b_rptr + head->OPT_offset + head->OPT_length;
	memcpy(mp->b_rptr + head->OPT_offset, &tcp, sizeof(tcp));
	tcp->tcp_conn.tcp_eager_conn_ind = mp;
}

/* The third segment has come for an eager of a STREAMS listener. */
TRACED void tcp_send_conn_ind(void *arg, mblk_t *mp, void *arg2)
{
	conn_t *lconnp = arg;
	tcp_t *listener = lconnp->conn_tcp;
	struct T_conn_ind *conn_ind = (struct T_conn_ind *)mp->b_rptr;
	boolean_t send = B_FALSE;
	tcp_t *tcp;

	memcpy(&tcp, mp->b_rptr + conn_ind->OPT_offset, sizeof(tcp));
	if (!listener->tcp_issocket) {
		/* It would be no option to TLI. */
		conn_ind->OPT_length = 0;
		conn_ind->OPT_offset = 0;
	}
	if (listener->tcp_state != TCPS_LISTEN) {
		freemsg(mp);
		return;
	}
	kmutex_enter(&listener->tcp_eager_lock);
	make_undroppable(tcp);
	if (listener->tcp_conn_req_cnt_q < listener->tcp_conn_req_max) {
		move_to_q(listener, tcp);
		send = B_TRUE;
	} else {
		/* To the oldest end of Q0, until an accept makes room. */
		tcp->tcp_eager_prev_q0->tcp_eager_next_q0 = tcp->tcp_eager_next_q0;
		tcp->tcp_eager_next_q0->tcp_eager_prev_q0 = tcp->tcp_eager_prev_q0;
		tcp->tcp_eager_prev_q0 = listener->tcp_eager_prev_q0;
		tcp->tcp_eager_next_q0 = listener;
		listener->tcp_eager_prev_q0->tcp_eager_next_q0 = tcp;
		listener->tcp_eager_prev_q0 = tcp;
		tcp->tcp_conn.tcp_eager_conn_ind = mp;
		tcp->tcp_conn_def_q0 = B_TRUE;
		if (tcp->tcp_syn_rcvd_timeout) {
			tcp->tcp_syn_rcvd_timeout = 0;
			listener->tcp_syn_rcvd_timeout--;
		}
		COUNT(listener, deferred);
		COUNT(listener, waiting);
	}
	/* What happens to it now does not wait for the return. */
	eager_of(tcp)->returning = true;
	kmutex_exit(&listener->tcp_eager_lock);
	if (send)
		putnext(lconnp->conn_rq, mp);
	cond_resched();
}

/* In the listener's squeue: tell the application of one that was deferred. */
TRACED void tcp_send_pending(void *arg, mblk_t *mp, void *arg2 IRA_PARAMETER)
{
	conn_t *lconnp = arg;

	if (lconnp->conn_tcp->tcp_state != TCPS_LISTEN) {
		freemsg(mp);
		return;
	}
	putnext(lconnp->conn_rq, mp);
}

/* A STREAMS socket's T_CONN_RES on the acceptor's stream. */
void accept_tpi(queue_t *q, mblk_t *mp)
{
	struct T_conn_res *conn_res = (struct T_conn_res *)mp->b_rptr;
	queue_t *rq = RD(q);
	tcp_t *listener;
	tcp_t *eager;

	memcpy(&eager, mp->b_rptr + conn_res->OPT_offset, sizeof(eager));
	rq->q_ptr = eager->tcp_connp;
	q->q_ptr = eager->tcp_connp;
	eager->tcp_connp->conn_rq = rq;
	eager->tcp_connp->conn_wq = q;
	eager->tcp_issocket = B_TRUE;
	listener = eager->tcp_listener;
	kmutex_enter(&listener->tcp_eager_lock);
	if (listener->tcp_eager_prev_q0->tcp_conn_def_q0) {
		mblk_t *conn_ind = tcp_get_def_conn_ind(listener);

		/* Nobody shall take it before its message has gone up: they share their memory. */
		container_of(conn_ind, struct eager, conn_ind)->claims++;
		conn_ind->b_next = listener_of(listener)->undeferred;
		listener_of(listener)->undeferred = conn_ind;
	}
	tcp_eager_unlink(eager);
	kmutex_exit(&listener->tcp_eager_lock);
	putnext(rq, mp);
}

/* TLI only: the eager takes the place of the endpoint on which it is accepted. */
TRACED void tcp_accept_swap(tcp_t *listener, tcp_t *acceptor, tcp_t *eager)
{
	conn_t *econnp = eager->tcp_connp;
	conn_t *aconnp = acceptor->tcp_connp;

	acceptor->tcp_detached = B_TRUE;
	eager->tcp_acceptor_id = acceptor->tcp_acceptor_id;
	kmutex_enter(&listener->tcp_eager_lock);
	tcp_eager_unlink(eager);
	kmutex_exit(&listener->tcp_eager_lock);
	econnp->conn_rq = aconnp->conn_rq;
	econnp->conn_wq = aconnp->conn_wq;
	eager->tcp_detached = B_FALSE;
	econnp->conn_cred = aconnp->conn_cred;
	econnp->conn_zoneid = aconnp->conn_zoneid;
}

/* TLI's T_CONN_RES on the listener's stream; it names the connection by its sequence number. */
void accept_tli(tcp_t *listener, mblk_t *mp)
{
	struct T_conn_res *conn_res = (struct T_conn_res *)mp->b_rptr;
	/* Solaris looks ACCEPTOR_id up in a hash; here the message leads to it. */
	conn_t *aconnp = mp->b_queue->q_ptr;
	mblk_t *conn_ind = NULL;
	tcp_t *eager = listener;

	kmutex_enter(&listener->tcp_eager_lock);
	do
		eager = eager->tcp_eager_next_q;
	while (eager && eager->tcp_conn_req_seqnum != conn_res->SEQ_number);
	kmutex_exit(&listener->tcp_eager_lock);
	if (!eager)
		return;

	tcp_accept_swap(listener, aconnp->conn_tcp, eager);

	kmutex_enter(&listener->tcp_eager_lock);
	if (listener->tcp_eager_prev_q0->tcp_conn_def_q0)
		conn_ind = tcp_get_def_conn_ind(listener);
	kmutex_exit(&listener->tcp_eager_lock);
	if (conn_ind)
		putnext(listener->tcp_connp->conn_rq, conn_ind);
}

/*
 * Close an endpoint. An eager of which the application knows stays in its queue, closed, until
 * the application takes it or closes the listener.
 */
TRACED void tcp_closei_local(tcp_t *tcp)
{
	tcp_t *listener = tcp->tcp_listener;

	if (listener) {
		kmutex_enter(&listener->tcp_eager_lock);
		if (!conn_ind_gone_up(tcp))
			tcp_eager_unlink(tcp);
		kmutex_exit(&listener->tcp_eager_lock);
	}
	leave_listen_cnt(tcp);
	tcp->tcp_state = TCPS_CLOSED;
}

/* In the eager's squeue: its listener wants it gone. */
TRACED void tcp_eager_kill(void *arg, mblk_t *mp, void *arg2 IRA_PARAMETER)
{
	conn_t *econnp = arg;
	tcp_t *eager = econnp->conn_tcp;
	tcp_t *listener = eager->tcp_listener;

	econnp->conn_rq = NULL;
	econnp->conn_wq = NULL;
	if (listener) {
		kmutex_enter(&listener->tcp_eager_lock);
		tcp_eager_unlink(eager);
		kmutex_exit(&listener->tcp_eager_lock);
		COUNT(listener, killed);
	}
	if (eager->tcp_state != TCPS_CLOSED)
		tcp_closei_local(eager);
}
