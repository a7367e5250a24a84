#!/usr/sbin/dtrace -s
/*
 * illumos_trace.d - a line for each SYN that reaches a TCP listener, and for what became of it.
 *
 * USAGE: dtrace -s illumos_trace.d	# in the global zone, every listener; Ctrl-C ends it
 *
 *   TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax
 *
 * Action is syn, drop:REASON, established or accept. Q0, Q and Qmax of a SYN are those that it found;
 * those of an established connection include it; those of an accept are from before it. A
 * drop:q0_evicted is about another connection, but has the source of the SYN that it was evicted for.
 * This is for watching single connections: in a burst lines are lost, and dtrace(1) says how many.
 *
 * A fault ends only one clause, and the next clauses of the event still run. So a clause clears a
 * pointer before what can fault and sets it after it. A line is printed if the pointer is set.
 * TESTED: see docs/install-solaris.md.
 */
#pragma D option quiet
#pragma D option switchrate=10hz
#pragma D option bufsize=1m
#pragma D option strsize=64

inline int PORT = 0;		/* the port to watch; 0: all */
inline int SYN_FLAG = 2;		/* TH_SYN of netinet/tcp.h; in tcp.d too */
inline int O_T_CONN_RES = 1;
inline int T_CONN_RES = 28;

self conn_t *listener;
self tcp_t *eager, *into, *deferring;
self uchar_t *ip;
self uint16_t *ports;
this tcp_t *eager, *tcp, **eagers;
this conn_t *peer;
this mblk_t *mp;
this int moving;
uint64_t pending[tcp_t *];	/* 1: the return of a function decides whether a connection is in Q; 2: it is */

BEGIN { this->moving = 0; printf("TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax\n"); }

/* A SYN: tcp_input_listener(listener, packet, squeue, attributes). */
fbt:ip:tcp_input_listener:entry { self->listener = NULL; }
fbt:ip:tcp_input_listener:entry
/ (PORT == 0 || ntohs(((conn_t *)arg0)->u_port.connu_ports.connu_lport) == PORT) &&
    *(((mblk_t *)arg1)->b_rptr + ((ip_recv_attr_t *)arg3)->ira_ip_hdr_length + 13) & SYN_FLAG /
{
	self->ip = ((mblk_t *)arg1)->b_rptr;
	self->ports = (uint16_t *)(self->ip + ((ip_recv_attr_t *)arg3)->ira_ip_hdr_length);
	self->listener = (conn_t *)arg0;
}
/* Its line, and those of drops in the same function. The high half of the first byte is IP's version. */
mib:::tcpListenDrop, mib:::tcpListenDropQ0, mib:::tcpHalfOpenDrop,	/* only syn_drops */
fbt:ip:tcp_input_listener:entry
/ self->listener != NULL /
{
	this->tcp = self->listener->conn_proto_priv.cp_tcp;
	printf("%d,%Y,%s,%s,%d,%d,%d,%d,%d\n", timestamp, walltimestamp,
	    probename == "entry" ? "syn" : probename == "tcpListenDrop" ? "drop:q_full" :
	    probename == "tcpListenDropQ0" ? "drop:q0_full" : "drop:q0_evicted",
	    *self->ip >> 4 == 4 ? inet_ntoa((ipaddr_t *)(self->ip + 12)) :
	    inet_ntoa6((in6_addr_t *)(self->ip + 8)), ntohs(*self->ports),
	    ntohs(self->listener->u_port.connu_ports.connu_lport), this->tcp->tcp_conn_req_cnt_q0,
	    this->tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_max);
}
fbt:ip:tcp_input_listener:return
{
	self->listener = NULL;
	self->ip = NULL;
	self->ports = NULL;
}

/* begin established */
/* Into Q: tcp_newconn_notify(connection, attributes); at its return the accept may be over. */
fbt:ip:tcp_newconn_notify:entry { this->moving = 1; this->eager = (tcp_t *)arg0; }
/* end established */
/* begin streams */
/* With STREAMS by tcp_send_conn_ind(listener, T_CONN_IND, squeue), if Q has room; else see its return. */
fbt:ip:tcp_send_conn_ind:entry
{
	this->eager = NULL;
	self->eager = NULL;
	self->into = NULL;
	this->moving = 1;
	this->mp = (mblk_t *)arg1;
	this->eagers = (tcp_t **)alloca(sizeof (tcp_t *));
	bcopy(this->mp->b_rptr + ((struct T_conn_ind *)this->mp->b_rptr)->OPT_offset,
	    this->eagers, sizeof (tcp_t *));
	this->tcp = *this->eagers;
	self->into = ((conn_t *)arg0)->conn_proto_priv.cp_tcp;
	self->eager = self->into->tcp_conn_req_cnt_q < self->into->tcp_conn_req_max ? NULL : this->tcp;
	pending[this->tcp] = self->eager != NULL;
	this->eager = self->eager == NULL ? this->tcp : NULL;
}
fbt:ip:tcp_send_conn_ind:return
{
	this->eager = NULL;
	this->tcp = self->eager;
	self->eager = NULL;
	this->moving = 0;
	this->eager = this->tcp != NULL && this->tcp->tcp_eager_next_q0 == NULL && pending[this->tcp] ?
	    this->tcp : NULL;
	pending[this->tcp] = this->eager != NULL && this->eager->tcp_listener != NULL ? 2 : 0;
}
/* Or it waits until an accept makes room: tcp_get_def_conn_ind(listener) appends it to Q. */
fbt:ip:tcp_get_def_conn_ind:entry { self->deferring = (tcp_t *)arg0; }
fbt:ip:tcp_get_def_conn_ind:return
{
	this->eager = NULL;
	this->tcp = self->deferring;
	self->deferring = NULL;
	this->moving = 0;
	this->tcp = this->tcp->tcp_eager_last_q;
	this->eager = pending[this->tcp] ? NULL : this->tcp;
}
/* end streams */
/* begin departures */
/* A connection that is reset in Q0 meanwhile never enters Q. */
fbt:ip:tcp_eager_unlink:entry
/ pending[(tcp_t *)arg0] == 2 || (pending[(tcp_t *)arg0] == 1 &&
    ((tcp_t *)arg0)->tcp_eager_next_q0 != NULL) /
{
	pending[(tcp_t *)arg0] = 0;
}
/* end departures */

/* begin accepts */
/* Out of Q: tcp_accept(listener, connection, ...), */
fbt:ip:tcp_accept:entry
{
	this->eager = NULL;
	this->moving = 0;
	this->eager = ((conn_t *)arg1)->conn_proto_priv.cp_tcp;
}
/* end accepts */
/* begin tli_accepts */
/* tcp_accept_swap(listener, acceptor, connection), */
fbt:ip:tcp_accept_swap:entry { this->moving = 0; this->eager = (tcp_t *)arg2; }
/* end tli_accepts */
/* begin streams_accepts */
/* tcp_tpi_accept(queue, T_CONN_RES). */
fbt:ip:tcp_tpi_accept:entry { this->eager = NULL; this->moving = 0; }
fbt:ip:tcp_tpi_accept:entry
/ ((struct T_conn_res *)((mblk_t *)arg1)->b_rptr)->PRIM_type == T_CONN_RES ||
    ((struct T_conn_res *)((mblk_t *)arg1)->b_rptr)->PRIM_type == O_T_CONN_RES /
{
	this->mp = (mblk_t *)arg1;
	this->eagers = (tcp_t **)alloca(sizeof (tcp_t *));
	bcopy(this->mp->b_rptr + ((struct T_conn_res *)this->mp->b_rptr)->OPT_offset,
	    this->eagers, sizeof (tcp_t *));
	this->eager = *this->eagers;
}
/* end streams_accepts */

fbt:ip:tcp_send_conn_ind:entry, fbt:ip:tcp_send_conn_ind:return,		/* only streams */
fbt:ip:tcp_get_def_conn_ind:return,					/* only streams */
fbt:ip:tcp_newconn_notify:entry,					/* only established */
fbt:ip:tcp_accept:entry,						/* only accepts */
fbt:ip:tcp_accept_swap:entry,						/* only tli_accepts */
fbt:ip:tcp_tpi_accept:entry,						/* only streams_accepts */
BEGIN			/* ends the list, whatever is left out; it prints nothing */
/ this->eager != NULL && (this->tcp =
    probefunc == "tcp_send_conn_ind" ? self->into :			/* only streams */
    this->eager->tcp_listener) != NULL && (PORT == 0 ||
    ntohs(this->eager->tcp_connp->u_port.connu_ports.connu_lport) == PORT) /
{
	this->peer = this->eager->tcp_connp;
	printf("%d,%Y,%s,%s,%d,%d,%d,%d,%d\n", timestamp, walltimestamp,
	    probefunc == "tcp_accept" || probefunc == "tcp_accept_swap" || probefunc == "tcp_tpi_accept" ?
	    "accept" : "established",
	    inet_ntoa6(&this->peer->connua_v6addr.connua_faddr),
	    ntohs(this->peer->u_port.connu_ports.connu_fport),
	    ntohs(this->peer->u_port.connu_ports.connu_lport),
	    this->tcp->tcp_conn_req_cnt_q0 - this->moving, this->tcp->tcp_conn_req_cnt_q + this->moving,
	    this->tcp->tcp_conn_req_max);
}
fbt:ip:tcp_send_conn_ind:return { self->into = NULL; }			/* only streams */

/* Without output dtrace(1) would not notice that its reader has gone, such as the ssh to this host. */
tick-5s { printf("\n"); }
