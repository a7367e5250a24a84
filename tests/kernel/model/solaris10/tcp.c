/*
 * What Solaris 10 does in its own way: SYNs, completed handshakes, accept, listen.
 * Facts: tcp.c of the OpenSolaris of October 2006, the nearest public relative.
 */
#include <linux/errno.h>
#include <linux/minmax.h>
#include <linux/slab.h>

#include "model.h"

void tcp_conn_request(void *arg, mblk_t *mp, void *arg2);
void tcp_conn_request_unbound(void *arg, mblk_t *mp, void *arg2);
void tcp_wput_accept(queue_t *q, mblk_t *mp);
void tcp_accept(tcp_t *listener, mblk_t *mp);
void tcp_bind(tcp_t *tcp, mblk_t *mp);
void tcp_unbind(tcp_t *tcp, mblk_t *mp);

/* A D program learns the byte order from its first byte. */
int hz = 100;

mib2_tcp_t tcp_mib;

/* Q's limit is 128 there. An administrator may raise it; here a script's backlog shall stand. */
tcpparam_t tcp_param_arr[TCP_PARAMS] = {
	{ 1000, 600000, 60000, "tcp_time_wait_interval" },
	{ 1, UINT_MAX, 1 << 20, "tcp_conn_req_max_q" },
	{ 0, UINT_MAX, 1024, "tcp_conn_req_max_q0" },
	{ 1, 1024, 1, "tcp_conn_req_min" },
};

/*
 * Throw out the oldest half-open connection, if its SYN-ACK has been sent again. It leaves Q0 at
 * once, without the lock meanwhile.
 */
static boolean_t tcp_drop_q0(tcp_t *tcp)
{
	tcp_t *eager = tcp->tcp_eager_prev_q0;

	while (eager != tcp && (eager->tcp_conn_def_q0 || eager_of(eager)->claims))
		eager = eager->tcp_eager_prev_q0;
	if (eager == tcp || !eager->tcp_syn_rcvd_timeout)
		return B_FALSE;
	eager_of(eager)->claims++;
	COUNT(tcp, q0_evicted);
	BUMP_MIB(&tcp_mib, tcpHalfOpenDrop);
	kmutex_exit(&tcp->tcp_eager_lock);
	clean_death(eager);
	kmutex_enter(&tcp->tcp_eager_lock);
	/* Its memory goes when the SYN is done with. */
	list_add_tail(&eager_of(eager)->evicted, &listener_of(tcp)->evicted);
	return B_TRUE;
}

/* Where TCP's header lies, past IPv6's extension headers, of which each tells its length. */
static uint16_t ip_hdr_length(mblk_t *mp)
{
	uint8_t next = mp->b_rptr[6];
	uint16_t length = sizeof(ip6_t);

	if (mp->b_rptr[0] >> 4 == IPV4_VERSION)
		return (mp->b_rptr[0] & 0xf) << 2;
	while (next != SOLARIS_IPPROTO_TCP) {
		next = mp->b_rptr[length];
		length += 8 * (mp->b_rptr[length + 1] + 1);
	}
	return length;
}

TRACED void tcp_conn_request(void *arg, mblk_t *mp, void *arg2)
{
	conn_t *connp = arg;
	tcp_t *tcp = connp->conn_tcp;
	bool v6_socket = tcp->tcp_family == SOLARIS_AF_INET6;
	struct eager *eager;
	conn_t *econnp;
	tcph_t *tcph;

	if (tcp->tcp_state != TCPS_LISTEN) {
		COUNT(tcp, not_listening);
		goto drop;
	}
	COUNT(tcp, syns);

	kmutex_enter(&tcp->tcp_eager_lock);
	if (tcp->tcp_conn_req_cnt_q >= tcp->tcp_conn_req_max) {
		kmutex_exit(&tcp->tcp_eager_lock);
		COUNT(tcp, q_full);
		BUMP_MIB(&tcp_mib, tcpListenDrop);
		goto drop;
	}
	if (tcp->tcp_conn_req_cnt_q0 >= tcp->tcp_conn_req_max + (int)q0_limit(NULL)) {
		tcp->tcp_last_rcv_lbolt = ktime_get_ns();
		if (!tcp_drop_q0(tcp)) {
			kmutex_exit(&tcp->tcp_eager_lock);
			COUNT(tcp, q0_full);
			BUMP_MIB(&tcp_mib, tcpListenDropQ0);
			goto drop;
		}
	}
	kmutex_exit(&tcp->tcp_eager_lock);

	eager = tcp_get_conn();
	if (!eager) {
		COUNT(tcp, alloc);
		goto drop;
	}
	econnp = &eager->conn;
	init_endpoint(econnp, &eager->tcp, listener_of(tcp)->record->place,
		      listener_of(tcp)->kind, v6_socket, tcp->tcp_cpid);
	tcph = (tcph_t *)&mp->b_rptr[ip_hdr_length(mp)];
	memcpy(&econnp->conn_fport, tcph->th_lport, sizeof(in_port_t));
	memcpy(&econnp->conn_lport, tcph->th_fport, sizeof(in_port_t));
	if (mp->b_rptr[0] >> 4 == IPV4_VERSION) {
		ipha_t *ipha = (ipha_t *)mp->b_rptr;

		eager->tcp.tcp_ipversion = IPV4_VERSION;
		econnp->connua_v6addr.connua_laddr = v4_mapped(ipha->ipha_dst);
		econnp->connua_v6addr.connua_faddr = v4_mapped(ipha->ipha_src);
	} else {
		ip6_t *ip6h = (ip6_t *)mp->b_rptr;

		eager->tcp.tcp_ipversion = IPV6_VERSION;
		econnp->connua_v6addr.connua_laddr = ip6h->ip6_dst;
		econnp->connua_v6addr.connua_faddr = ip6h->ip6_src;
	}
	eager->tcp.tcp_detached = B_TRUE;
	eager->tcp.tcp_issocket = tcp->tcp_issocket;

	kmutex_enter(&tcp->tcp_eager_lock);
	make_conn_ind(tcp, &eager->tcp, v6_socket);
	link_to_q0(tcp, &eager->tcp);
	/* Nobody answers it before its SYN-ACK. */
	eager->claims++;
	kmutex_exit(&tcp->tcp_eager_lock);
	BUMP_MIB(&tcp_mib, tcpPassiveOpens);
	eager->tcp.tcp_state = TCPS_SYN_RCVD;
	release(listener_of(tcp), eager);
drop:
	freemsg(mp);
}

/* Gets a listener's first SYN, to choose a squeue for it. */
TRACED void tcp_conn_request_unbound(void *arg, mblk_t *mp, void *arg2)
{
	conn_t *connp = arg;

	WRITE_ONCE(connp->conn_recv, tcp_conn_request);
	tcp_conn_request(arg, mp, arg2);
}

/* A socket's accept. */
TRACED void tcp_wput_accept(queue_t *q, mblk_t *mp)
{
	accept_tpi(q, mp);
}

/* TLI's accept; illumos has another function of this name. */
TRACED void tcp_accept(tcp_t *listener, mblk_t *mp)
{
	accept_tli(listener, mp);
}

/* bind(3) and then listen(3), which alone has a backlog. */
TRACED void tcp_bind(tcp_t *tcp, mblk_t *mp)
{
	struct T_bind_req *bind_req = (struct T_bind_req *)mp->b_rptr;
	uint32_t backlog = bind_req->CONIND_number;

	if (tcp->tcp_state >= TCPS_BOUND &&
	    (tcp->tcp_state > TCPS_LISTEN || !backlog || tcp->tcp_conn_req_max == backlog))
		return;
	if (tcp->tcp_state < TCPS_BOUND)
		tcp->tcp_state = TCPS_BOUND;
	tcp->tcp_conn_req_max = backlog;
	if (backlog) {
		tcp->tcp_conn_req_max =
			clamp(backlog, tcp_param_arr[TCP_CONN_REQ_MIN].tcp_param_val,
			      tcp_param_arr[TCP_CONN_REQ_MAX_Q].tcp_param_val);
		if (tcp->tcp_state != TCPS_LISTEN) {
			tcp->tcp_state = TCPS_LISTEN;
			start_queues(tcp);
		}
		tcp->tcp_connp->conn_recv = tcp_conn_request_unbound;
	}
	putnext(tcp->tcp_rq, mp);
}

TRACED void tcp_unbind(tcp_t *tcp, mblk_t *mp)
{
	tcp->tcp_state = TCPS_IDLE;
	putnext(tcp->tcp_rq, mp);
}

/* What model.c calls. */

tcp_stack_t *make_stack(netstackid_t id)
{
	return kzalloc(sizeof(tcp_stack_t), GFP_KERNEL);
}

void free_stack(tcp_stack_t *stack)
{
	kfree(stack);
}

uint32_t q0_limit(tcp_stack_t *stack)
{
	return tcp_param_arr[TCP_CONN_REQ_MAX_Q0].tcp_param_val;
}

void set_q0_limit(tcp_stack_t *stack, uint32_t limit)
{
	tcp_param_arr[TCP_CONN_REQ_MAX_Q0].tcp_param_val = limit;
}

int set_reclaim(tcp_stack_t *stack, bool on)
{
	return -EINVAL;
}

int set_listen_limit(tcp_t *listener, uint32_t limit)
{
	return -EINVAL;
}

int serve(struct process *process, const char *fmri)
{
	return -EINVAL;
}

void forget_connection(tcp_t *listener)
{
}

void init_endpoint(conn_t *connp, tcp_t *tcp, struct place *place, enum kind kind, bool v6,
		   pid_t pid)
{
	connp->conn_tcp = tcp;
	connp->conn_ulp = SOLARIS_IPPROTO_TCP;
	connp->conn_ref = 2;
	connp->conn_cred = &place->cred;
	connp->conn_zoneid = place->zone.zone_id;
	kmutex_init(&connp->conn_lock);
	tcp->tcp_connp = connp;
	tcp->tcp_cred = &place->cred;
	tcp->tcp_cpid = pid;
	tcp->tcp_family = v6 ? SOLARIS_AF_INET6 : SOLARIS_AF_INET;
	tcp->tcp_ipversion = v6 ? IPV6_VERSION : IPV4_VERSION;
	tcp->tcp_state = TCPS_IDLE;
	tcp->tcp_issocket = kind != TLI;
	kmutex_init(&tcp->tcp_eager_lock);
}

static void request_bind(tcp_t *tcp, uint32_t backlog)
{
	struct T_bind_req bind_req = { .PRIM_type = T_BIND_REQ, .CONIND_number = backlog };
	mblk_t mp = { .b_rptr = (uchar_t *)&bind_req, .b_wptr = (uchar_t *)(&bind_req + 1) };

	tcp_bind(tcp, &mp);
}

void bind_to(conn_t *connp, tcp_t *tcp, const in6_addr_t *address, in_port_t port)
{
	connp->conn_bound_source_v6 = *address;
	connp->connua_v6addr.connua_laddr = *address;
	connp->conn_lport = port;
	request_bind(tcp, 0);
}

int listen_on(struct listener *listener, int backlog)
{
	squeue_enter(&listener->squeue);
	if (listener->tcp.tcp_state == TCPS_IDLE)
		request_bind(&listener->tcp, 0);
	request_bind(&listener->tcp, backlog);
	squeue_exit(&listener->squeue);
	return 0;
}

int unlisten(struct listener *listener)
{
	mblk_t mp = {};

	squeue_enter(&listener->squeue);
	tcp_unbind(&listener->tcp, &mp);
	squeue_exit(&listener->squeue);
	return 0;
}

/* IP keeps all else from a listener. */
bool can_receive(uint8_t flags)
{
	return (flags & (TH_SYN | TH_ACK | TH_RST | TH_URG)) == TH_SYN;
}

void receive(struct listener *listener, mblk_t *mp, uint16_t ip_header, bool v4, bool options)
{
	READ_ONCE(listener->conn.conn_recv)(&listener->conn, mp, &listener->squeue);
}

/* An eager's third segment, in its own squeue. */
void handshake_done(struct listener *listener, struct eager *eager)
{
	tcp_t *tcp = &eager->tcp;
	mblk_t *conn_ind = tcp->tcp_conn.tcp_eager_conn_ind;

	tcp->tcp_conn.tcp_eager_conn_ind = NULL;
	tcp->tcp_state = TCPS_ESTABLISHED;
	squeue_enter(&listener->squeue);
	tcp_send_conn_ind(&listener->conn, conn_ind, &listener->squeue);
	squeue_exit(&listener->squeue);
}

/* An eager's end, by a reset from its client or because its time is up. */
void clean_death(tcp_t *eager)
{
	tcp_closei_local(eager);
	if (eager->tcp_listener)
		eager->tcp_state = TCPS_BOUND;
}

/* An eager's SYN-ACK had to be sent again; the caller holds tcp_eager_lock. */
void time_out(tcp_t *listener, tcp_t *eager)
{
	if (eager->tcp_syn_rcvd_timeout)
		return;
	eager->tcp_syn_rcvd_timeout = 1;
	listener->tcp_syn_rcvd_timeout++;
}

int accept_eager(struct listener *listener, struct eager *eager, queue_t *q, mblk_t *mp)
{
	if (listener->kind == TLI) {
		squeue_enter(&listener->squeue);
		tcp_accept(&listener->tcp, mp);
		squeue_exit(&listener->squeue);
	} else {
		tcp_wput_accept(q, mp);
	}
	return eager->tcp.tcp_state < TCPS_ESTABLISHED ? ECONNABORTED : 0;
}
