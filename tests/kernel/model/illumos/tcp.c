/*
 * What illumos does in its own way: SYNs, completed handshakes, a socket's accept, listen.
 * Facts: tcp_input.c, tcp_socket.c, tcp_tpi.c and tcp.c of illumos-gate.
 */
#include <linux/errno.h>
#include <linux/minmax.h>
#include <linux/slab.h>

#include "model.h"

void tcp_input_listener(void *arg, mblk_t *mp, void *arg2, ip_recv_attr_t *ira);
void tcp_input_listener_unbound(void *arg, mblk_t *mp, void *arg2, ip_recv_attr_t *ira);
int tcp_newconn_notify(tcp_t *tcp, ip_recv_attr_t *ira);
int tcp_accept(sock_lower_handle_t lproto_handle, sock_lower_handle_t eproto_handle,
	       sock_upper_handle_t sock_handle, cred_t *cr);
void tcp_tpi_accept(queue_t *q, mblk_t *mp);
void tcp_tli_accept(tcp_t *listener, mblk_t *mp);
int tcp_do_listen(conn_t *connp, struct sockaddr *sa, socklen_t len, int backlog, cred_t *cr,
		  boolean_t bind_to_req_port_only);
int tcp_do_unbind(conn_t *connp);

/* Throw out the half-open connection that is droppable longest; it leaves Q0 in its own squeue. */
static boolean_t tcp_drop_q0(tcp_t *tcp)
{
	tcp_t *eager = tcp->tcp_eager_prev_drop_q0;

	if (eager == tcp)
		return B_FALSE;
	make_undroppable(eager);
	eager_of(eager)->claims++;
	list_add_tail(&eager_of(eager)->evicted, &listener_of(tcp)->evicted);
	COUNT(tcp, q0_evicted);
	BUMP_MIB(&tcp->tcp_tcps->mib, tcpHalfOpenDrop);
	return B_TRUE;
}

TRACED void tcp_input_listener(void *arg, mblk_t *mp, void *arg2, ip_recv_attr_t *ira)
{
	conn_t *lconnp = arg;
	tcp_t *listener = lconnp->conn_tcp;
	tcp_stack_t *tcps = listener->tcp_tcps;
	tcpha_t *tcpha = (tcpha_t *)&mp->b_rptr[ira->ira_ip_hdr_length];
	tcp_listen_cnt_t *tlc = listener->tcp_listen_cnt;
	bool v6_socket = lconnp->conn_family == SOLARIS_AF_INET6;
	struct eager *eager;
	conn_t *econnp;

	if (!(tcpha->tha_flags & TH_SYN)) {
		/* The reset that answers TH_ACK is beyond the model. */
		COUNT(listener, segments);
		goto drop;
	}
	if (listener->tcp_state != TCPS_LISTEN) {
		COUNT(listener, not_listening);
		goto drop;
	}
	COUNT(listener, syns);

	kmutex_enter(&listener->tcp_eager_lock);
	if (tcps->tcps_reclaim &&
	    (listener->tcp_conn_req_cnt_q > 0 || listener->tcp_conn_req_cnt_q0 > 0)) {
		kmutex_exit(&listener->tcp_eager_lock);
		COUNT(listener, reclaim);
		goto drop;
	}
	if (listener->tcp_conn_req_cnt_q >= listener->tcp_conn_req_max) {
		kmutex_exit(&listener->tcp_eager_lock);
		COUNT(listener, q_full);
		BUMP_MIB(&tcps->mib, tcpListenDrop);
		goto drop;
	}
	if (listener->tcp_conn_req_cnt_q0 >= listener->tcp_conn_req_max + (int)q0_limit(tcps)) {
		listener->tcp_last_rcv_lbolt = ktime_get_ns();
		if (!tcp_drop_q0(listener)) {
			kmutex_exit(&listener->tcp_eager_lock);
			COUNT(listener, q0_full);
			BUMP_MIB(&tcps->mib, tcpListenDropQ0);
			goto drop;
		}
	}
	/* The listener itself is one of tlc_cnt. */
	if (tlc && atomic_inc_return((atomic_t *)&tlc->tlc_cnt) > tlc->tlc_max + 1) {
		kmutex_exit(&listener->tcp_eager_lock);
		atomic_dec((atomic_t *)&tlc->tlc_cnt);
		tlc->tlc_drop++;
		COUNT(listener, limit);
		goto drop;
	}
	kmutex_exit(&listener->tcp_eager_lock);

	eager = tcp_get_conn();
	if (!eager) {
		COUNT(listener, alloc);
		if (tlc)
			atomic_dec((atomic_t *)&tlc->tlc_cnt);
		goto drop;
	}
	econnp = &eager->conn;
	init_endpoint(econnp, &eager->tcp, listener_of(listener)->record->place,
		      listener_of(listener)->kind, v6_socket, lconnp->conn_cpid);
	econnp->conn_fport = tcpha->tha_lport;
	econnp->conn_lport = tcpha->tha_fport;
	if (ira->ira_flags & IRAF_IS_IPV4) {
		ipha_t *ipha = (ipha_t *)mp->b_rptr;

		econnp->conn_ipversion = IPV4_VERSION;
		econnp->connua_v6addr.connua_laddr = v4_mapped(ipha->ipha_dst);
		econnp->connua_v6addr.connua_faddr = v4_mapped(ipha->ipha_src);
	} else {
		ip6_t *ip6h = (ip6_t *)mp->b_rptr;

		econnp->conn_ipversion = IPV6_VERSION;
		econnp->connua_v6addr.connua_laddr = ip6h->ip6_dst;
		econnp->connua_v6addr.connua_faddr = ip6h->ip6_src;
	}
	econnp->conn_saddr_v6 = econnp->connua_v6addr.connua_laddr;
	eager->tcp.tcp_detached = B_TRUE;
	eager->tcp.tcp_issocket = listener->tcp_issocket;

	kmutex_enter(&listener->tcp_eager_lock);
	make_conn_ind(listener, &eager->tcp, v6_socket);
	eager->tcp.tcp_saved_listener = listener;
	eager->tcp.tcp_listen_cnt = tlc;
	link_to_q0(listener, &eager->tcp);
	/* Nobody answers it before its SYN-ACK. */
	eager->claims++;
	kmutex_exit(&listener->tcp_eager_lock);
	BUMP_MIB(&tcps->mib, tcpPassiveOpens);
	eager->tcp.tcp_state = TCPS_SYN_RCVD;
	release(listener_of(listener), eager);
drop:
	freemsg(mp);
}

/* Gets a listener's first segment, to choose a squeue for it. */
TRACED void tcp_input_listener_unbound(void *arg, mblk_t *mp, void *arg2, ip_recv_attr_t *ira)
{
	conn_t *connp = arg;

	WRITE_ONCE(connp->conn_recv, tcp_input_listener);
	tcp_input_listener(arg, mp, arg2, ira);
}

/* A plain socket's handshake is complete. Returns whether the socket layer takes it. */
TRACED int tcp_newconn_notify(tcp_t *tcp, ip_recv_attr_t *ira)
{
	tcp_t *listener = tcp->tcp_listener;

	kmutex_enter(&listener->tcp_eager_lock);
	make_undroppable(tcp);
	move_to_q(listener, tcp);
	kmutex_exit(&listener->tcp_eager_lock);

	if (!so_newconn(listener, tcp))
		return B_FALSE;
	tcp->tcp_detached = B_FALSE;
	tcp->tcp_tconnind_started = 1;
	return B_TRUE;
}

TRACED int tcp_accept(sock_lower_handle_t lproto_handle, sock_lower_handle_t eproto_handle,
		      sock_upper_handle_t sock_handle, cred_t *cr)
{
	conn_t *econnp = (conn_t *)eproto_handle;
	tcp_t *eager = econnp->conn_tcp;
	tcp_t *listener = eager->tcp_listener;

	econnp->conn_upper_handle = sock_handle;
	kmutex_enter(&listener->tcp_eager_lock);
	tcp_eager_unlink(eager);
	kmutex_exit(&listener->tcp_eager_lock);
	return eager->tcp_state < TCPS_ESTABLISHED ? ECONNABORTED : 0;
}

TRACED void tcp_tpi_accept(queue_t *q, mblk_t *mp)
{
	accept_tpi(q, mp);
}

TRACED void tcp_tli_accept(tcp_t *listener, mblk_t *mp)
{
	accept_tli(listener, mp);
}

TRACED int tcp_do_listen(conn_t *connp, struct sockaddr *sa, socklen_t len, int backlog,
			 cred_t *cr, boolean_t bind_to_req_port_only)
{
	tcp_t *tcp = connp->conn_tcp;
	mod_prop_info_t *properties = tcp->tcp_tcps->tcps_propinfo_tbl;
	int least = properties[TCPS_CONN_REQ_MIN].u.mpi_uval.mod_propval_ucur;
	int most = properties[TCPS_CONN_REQ_MAX_Q].u.mpi_uval.mod_propval_ucur;

	if (tcp->tcp_state != TCPS_LISTEN && tcp->tcp_state != TCPS_BOUND &&
	    tcp->tcp_state != TCPS_IDLE)
		return -TOUTSTATE;
	tcp->tcp_conn_req_max = clamp(backlog, least, most);
	if (tcp->tcp_state != TCPS_LISTEN) {
		tcp->tcp_state = TCPS_LISTEN;
		start_queues(tcp);
		tcp->tcp_eager_next_drop_q0 = tcp;
		tcp->tcp_eager_prev_drop_q0 = tcp;
	}
	connp->conn_recv = tcp_input_listener_unbound;
	return 0;
}

TRACED int tcp_do_unbind(conn_t *connp)
{
	tcp_t *tcp = connp->conn_tcp;

	if (tcp->tcp_state != TCPS_LISTEN && tcp->tcp_state != TCPS_BOUND)
		return -TOUTSTATE;
	tcp->tcp_state = TCPS_IDLE;
	return 0;
}

void leave_listen_cnt(tcp_t *tcp)
{
	tcp_listen_cnt_t *tlc = tcp->tcp_listen_cnt;

	if (!tlc)
		return;
	tcp->tcp_listen_cnt = NULL;
	if (atomic_dec_and_test((atomic_t *)&tlc->tlc_cnt))
		kfree(tlc);
}

/* What model.c calls. */

tcp_stack_t *make_stack(netstackid_t id)
{
	tcp_stack_t *stack = kzalloc(sizeof(*stack), GFP_KERNEL);
	mod_prop_info_t *properties;

	if (!stack)
		return NULL;
	properties = stack->properties;
	stack->netstack.netstack_stackid = id;
	stack->tcps_netstack = &stack->netstack;
	stack->tcps_propinfo_tbl = properties;
	properties[TCPS_CONN_REQ_MAX_Q].mpi_name = "_conn_req_max_q";
	/* An administrator may raise it from 128; here a script's backlog shall stand as it is. */
	properties[TCPS_CONN_REQ_MAX_Q].u.mpi_uval.mod_propval_ucur = 1 << 20;
	properties[TCPS_CONN_REQ_MAX_Q0].mpi_name = "_conn_req_max_q0";
	properties[TCPS_CONN_REQ_MAX_Q0].u.mpi_uval.mod_propval_ucur = 1024;
	properties[TCPS_CONN_REQ_MIN].mpi_name = "_conn_req_min";
	properties[TCPS_CONN_REQ_MIN].u.mpi_uval.mod_propval_ucur = 1;
	return stack;
}

void free_stack(tcp_stack_t *stack)
{
	kfree(stack);
}

uint32_t q0_limit(tcp_stack_t *stack)
{
	return stack->tcps_propinfo_tbl[TCPS_CONN_REQ_MAX_Q0].u.mpi_uval.mod_propval_ucur;
}

void set_q0_limit(tcp_stack_t *stack, uint32_t limit)
{
	stack->tcps_propinfo_tbl[TCPS_CONN_REQ_MAX_Q0].u.mpi_uval.mod_propval_ucur = limit;
}

int set_reclaim(tcp_stack_t *stack, bool on)
{
	stack->tcps_reclaim = on;
	return 0;
}

int set_listen_limit(tcp_t *listener, uint32_t limit)
{
	tcp_listen_cnt_t *tlc = kzalloc(sizeof(*tlc), GFP_KERNEL);

	if (!tlc)
		return -ENOMEM;
	tlc->tlc_max = limit;
	tlc->tlc_cnt = 1;
	listener->tcp_listen_cnt = tlc;
	return 0;
}

int serve(struct process *process, const char *fmri)
{
	struct service *service = &process->service;

	process->proc.p_ct_process = &service->contract;
	if (!*fmri)
		return 0;
	service->contract.conp_svc_fmri = &service->fmri;
	service->fmri.rs_size = offsetof(refstr_t, rs_string) + strlen(fmri) + 1;
	service->fmri.rs_refcnt = 1;
	memcpy(service->bytes + offsetof(refstr_t, rs_string), fmri, strlen(fmri) + 1);
	return 0;
}

void forget_connection(tcp_t *listener)
{
	if (listener->tcp_listen_cnt)
		atomic_dec((atomic_t *)&listener->tcp_listen_cnt->tlc_cnt);
}

void init_endpoint(conn_t *connp, tcp_t *tcp, struct place *place, enum kind kind, bool v6,
		   pid_t pid)
{
	connp->conn_tcp = tcp;
	connp->conn_proto = SOLARIS_IPPROTO_TCP;
	connp->conn_ref = 2;
	connp->conn_flags = kind == SOCKET ? IPCL_NONSTR : 0;
	connp->conn_cred = &place->cred;
	connp->conn_cpid = pid;
	/* A zone with a stack of its own is its stack's global zone. */
	connp->conn_zoneid = place->exclusive ? 0 : place->zone.zone_id;
	connp->conn_netstack = place->stack->tcps_netstack;
	connp->conn_family = v6 ? SOLARIS_AF_INET6 : SOLARIS_AF_INET;
	connp->conn_ipversion = v6 ? IPV6_VERSION : IPV4_VERSION;
	kmutex_init(&connp->conn_lock);
	tcp->tcp_connp = connp;
	tcp->tcp_tcps = place->stack;
	tcp->tcp_state = TCPS_IDLE;
	tcp->tcp_issocket = kind != TLI;
	kmutex_init(&tcp->tcp_eager_lock);
}

void bind_to(conn_t *connp, tcp_t *tcp, const in6_addr_t *address, in_port_t port)
{
	connp->conn_bound_addr_v6 = *address;
	connp->conn_saddr_v6 = *address;
	connp->connua_v6addr.connua_laddr = *address;
	connp->conn_lport = port;
	tcp->tcp_state = TCPS_BOUND;
}

int listen_on(struct listener *listener, int backlog)
{
	tcp_t *tcp = &listener->tcp;

	int error;

	squeue_enter(&listener->squeue);
	error = tcp_do_listen(&listener->conn, NULL, 0, backlog, listener->conn.conn_cred, B_FALSE);
	squeue_exit(&listener->squeue);
	if (error)
		return -EINVAL;
	listener->so_backlog = tcp->tcp_conn_req_max + q0_limit(tcp->tcp_tcps);
	return 0;
}

int unlisten(struct listener *listener)
{
	int error;

	squeue_enter(&listener->squeue);
	error = tcp_do_unbind(&listener->conn);
	squeue_exit(&listener->squeue);
	return error ? -EINVAL : 0;
}

bool can_receive(uint8_t flags)
{
	return true;
}

void receive(struct listener *listener, mblk_t *mp, uint16_t ip_header, bool v4, bool options)
{
	ip_recv_attr_t ira = {
		.ira_sqp = &listener->squeue,
		.ira_flags = v4 ? IRAF_IS_IPV4 | (options ? IRAF_IPV4_OPTIONS : 0) : 0,
		.ira_zoneid = listener->conn.conn_zoneid,
		.ira_pktlen = mp->b_wptr - mp->b_rptr,
		.ira_ip_hdr_length = ip_header,
		.ira_protocol = SOLARIS_IPPROTO_TCP,
	};

	READ_ONCE(listener->conn.conn_recv)(&listener->conn, mp, &listener->squeue, &ira);
}

/* An eager's third segment, in its own squeue. */
void handshake_done(struct listener *listener, struct eager *eager)
{
	tcp_t *tcp = &eager->tcp;
	mblk_t *conn_ind = tcp->tcp_conn.tcp_eager_conn_ind;
	ip_recv_attr_t ira = {};

	tcp->tcp_conn.tcp_eager_conn_ind = NULL;
	tcp->tcp_state = TCPS_ESTABLISHED;
	if (listener->kind == SOCKET) {
		if (!tcp_newconn_notify(tcp, &ira)) {
			tcp->tcp_state = TCPS_SYN_RCVD;
			tcp_closei_local(tcp);
		}
		return;
	}
	tcp->tcp_tconnind_started = 1;
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
	listener->tcp_eager_next_drop_q0->tcp_eager_prev_drop_q0 = eager;
	eager->tcp_eager_prev_drop_q0 = listener;
	eager->tcp_eager_next_drop_q0 = listener->tcp_eager_next_drop_q0;
	listener->tcp_eager_next_drop_q0 = eager;
}

int accept_eager(struct listener *listener, struct eager *eager, queue_t *q, mblk_t *mp)
{
	switch (listener->kind) {
	case SOCKET:
		return tcp_accept((sock_lower_handle_t)&listener->conn,
				  (sock_lower_handle_t)&eager->conn, (sock_upper_handle_t)q,
				  listener->conn.conn_cred);
	case STREAMS:
		tcp_tpi_accept(q, mp);
		break;
	case TLI:
		squeue_enter(&listener->squeue);
		tcp_tli_accept(&listener->tcp, mp);
		squeue_exit(&listener->squeue);
		break;
	}
	return eager->tcp.tcp_state < TCPS_ESTABLISHED ? ECONNABORTED : 0;
}
