#!/usr/sbin/dtrace -s
/*
 * solaris10_trace.d - a line for each SYN that reaches a TCP listener, and for what became of it.
 *
 * USAGE: dtrace -s solaris10_trace.d	# in the global zone, every listener; Ctrl-C ends it
 *
 *   TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax
 *
 * Action is syn, drop:REASON, established or accept. Source IP is an IPv6 address; IPv4's a.b.c.d is
 * 0:0:0:0:0:ffff:XXXX:XXXX, which dtrace-exporter writes as usual. Q0, Q and Qmax of a SYN are those that
 * it found; those of an established connection include it; those of an accept are from before it. A
 * drop:q0_evicted is about another connection, but has the source of the SYN that it was evicted for.
 * This is for watching single connections: in a burst lines are lost, and dtrace(1) says how many.
 *
 * With struct ip of netinet/ip.h, D would read the destination as the source, because its compiler
 * rounds bit-fields up to bytes. So packets are read by bytes, at most four in a statement, because the
 * first DTrace needs a register for each. A fault ends only one clause, and the next clauses of the event
 * still run. So a line is printed only if a pointer is set, which a clause sets after what can fault.
 * TESTED: see docs/install-solaris.md.
 */
#pragma D option quiet
#pragma D option switchrate=10hz
#pragma D option bufsize=1m
#pragma D option strsize=64

inline int PORT = 0;		/* the port to watch; 0: all */
/* Offsets of tcp_t and port in conn_t; the port is 18 bytes after its peer's address: see solaris10.d. */
inline int CONN_TCP = 0x28;
inline int CONN_LPORT = 0x10a;
inline int O_T_CONN_RES = 1;
inline int T_CONN_RES = 28;

self tcp_t *listener, *eager, *into, *accepting;
self uint8_t *ip, *ports;
self int port;
uint64_t pending[tcp_t *];	/* 1: the return of a function decides where a connection is; 2: it waits in Q0 */
this tcp_t *eager, *tcp, **eagers;
this uint8_t *from, *at;
this mblk_t *mp;
this int port, moving;

BEGIN { this->moving = 0; printf("TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax\n"); }

/* A SYN: tcp_conn_request(listener, packet, squeue). */
fbt:ip:tcp_conn_request:entry
{
	self->listener = NULL;
	this->at = (uint8_t *)(arg0 + CONN_LPORT);
	self->port = 256 * this->at[0] + this->at[1];
	self->ip = (uint8_t *)((mblk_t *)arg1)->b_rptr;
	self->ports = self->ip[0] >> 4 == 4 ? self->ip + 4 * (self->ip[0] & 15) : self->ip + 40;
	self->listener = PORT == 0 || self->port == PORT ? *(tcp_t **)(arg0 + CONN_TCP) : NULL;
}
/* Its line, and those of drops in the same function, for IPv4. */
mib:::tcpListenDrop, mib:::tcpListenDropQ0, mib:::tcpHalfOpenDrop,	/* only syn_drops */
fbt:ip:tcp_conn_request:entry
/ self->listener != NULL && self->ip[0] >> 4 == 4 /
{
	printf("%d,%Y,%s,0:0:0:0:0:ffff:%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp,
	    probename == "entry" ? "syn" : probename == "tcpListenDrop" ? "drop:q_full" :
	    probename == "tcpListenDropQ0" ? "drop:q0_full" : "drop:q0_evicted",
	    256 * self->ip[12] + self->ip[13], 256 * self->ip[14] + self->ip[15],
	    256 * self->ports[0] + self->ports[1], self->port, self->listener->tcp_conn_req_cnt_q0,
	    self->listener->tcp_conn_req_cnt_q, self->listener->tcp_conn_req_max);
}
/* For IPv6. After extension headers the port is not looked for: it is 0. */
mib:::tcpListenDrop, mib:::tcpListenDropQ0, mib:::tcpHalfOpenDrop,	/* only syn_drops */
fbt:ip:tcp_conn_request:entry
/ self->listener != NULL && self->ip[0] >> 4 == 6 /
{
	this->from = self->ip + 8;
	printf("%d,%Y,%s,%x:%x:%x:%x:%x:%x:%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp,
	    probename == "entry" ? "syn" : probename == "tcpListenDrop" ? "drop:q_full" :
	    probename == "tcpListenDropQ0" ? "drop:q0_full" : "drop:q0_evicted",
	    256 * this->from[0] + this->from[1], 256 * this->from[2] + this->from[3],
	    256 * this->from[4] + this->from[5], 256 * this->from[6] + this->from[7],
	    256 * this->from[8] + this->from[9], 256 * this->from[10] + this->from[11],
	    256 * this->from[12] + this->from[13], 256 * this->from[14] + this->from[15],
	    self->ip[6] == 6 ? 256 * self->ports[0] + self->ports[1] : 0,
	    self->port, self->listener->tcp_conn_req_cnt_q0, self->listener->tcp_conn_req_cnt_q,
	    self->listener->tcp_conn_req_max);
}
fbt:ip:tcp_conn_request:return
{
	self->listener = NULL;
	self->ip = NULL;
	self->ports = NULL;
	self->port = 0;
}

/* begin established */
/*
 * Into Q: tcp_send_conn_ind(listener, T_CONN_IND, squeue), if Q has room; at its return the accept may be
 * over. If Q has no room, the result is known at the return.
 */
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
	self->into = *(tcp_t **)(arg0 + CONN_TCP);
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
	pending[this->tcp] = this->eager == NULL && pending[this->tcp] ? 2 : 0;
}
/* Later an accept lets it in: tcp_send_pending(listener, T_CONN_IND, squeue), */
fbt:ip:tcp_send_pending:entry
{
	this->eager = NULL;
	this->mp = (mblk_t *)arg1;
	this->eagers = (tcp_t **)alloca(sizeof (tcp_t *));
	bcopy(this->mp->b_rptr + ((struct T_conn_ind *)this->mp->b_rptr)->OPT_offset,
	    this->eagers, sizeof (tcp_t *));
	this->tcp = *this->eagers;
	this->moving = 0;
	this->eager = pending[this->tcp] ? this->tcp : NULL;
	pending[this->tcp] = 0;
}
/* end established */
/* begin departures */
/* A connection that was reset in Q0 meanwhile never enters Q. */
fbt:ip:tcp_eager_unlink:entry
/ pending[(tcp_t *)arg0] && ((tcp_t *)arg0)->tcp_eager_next_q0 != NULL /
{
	pending[(tcp_t *)arg0] = 0;
}
/* end departures */
/* begin tli_accepts */
/* or TLI's tcp_accept(listener, T_CONN_RES) appends it to Q. */
fbt:ip:tcp_accept:entry { self->accepting = (tcp_t *)arg0; }
fbt:ip:tcp_accept:return
{
	this->eager = NULL;
	this->tcp = self->accepting->tcp_eager_last_q;
	self->accepting = NULL;
	this->moving = 0;
	this->eager = pending[this->tcp] == 2 ? this->tcp : NULL;
	pending[this->tcp] = 0;
}
/* Out of Q: tcp_accept_swap(listener, acceptor, connection), */
fbt:ip:tcp_accept_swap:entry { this->moving = 0; this->eager = (tcp_t *)arg2; }
/* end tli_accepts */
/* begin accepts */
/* tcp_wput_accept(queue, T_CONN_RES). */
fbt:ip:tcp_wput_accept:entry { this->eager = NULL; this->moving = 0; }
fbt:ip:tcp_wput_accept:entry
/ ((struct T_conn_res *)((mblk_t *)arg1)->b_rptr)->PRIM_type == T_CONN_RES ||
    ((struct T_conn_res *)((mblk_t *)arg1)->b_rptr)->PRIM_type == O_T_CONN_RES /
{
	this->mp = (mblk_t *)arg1;
	this->eagers = (tcp_t **)alloca(sizeof (tcp_t *));
	bcopy(this->mp->b_rptr + ((struct T_conn_res *)this->mp->b_rptr)->OPT_offset,
	    this->eagers, sizeof (tcp_t *));
	this->eager = *this->eagers;
}
/* end accepts */

fbt:ip:tcp_send_conn_ind:entry, fbt:ip:tcp_send_conn_ind:return,		/* only established */
fbt:ip:tcp_send_pending:entry,						/* only established */
fbt:ip:tcp_accept:return, fbt:ip:tcp_accept_swap:entry,			/* only tli_accepts */
fbt:ip:tcp_wput_accept:entry,						/* only accepts */
BEGIN			/* ends the list, whatever is left out; it prints nothing */
{
	this->from = NULL;
	this->tcp = this->eager == NULL ? NULL :
	    probefunc == "tcp_send_conn_ind" ? self->into :			/* only established */
	    this->eager->tcp_listener;
	this->at = this->tcp != NULL ? (uint8_t *)this->eager->tcp_connp + CONN_LPORT - 18 : NULL;
	this->port = this->at != NULL ? 256 * this->at[18] + this->at[19] : 0;
	this->from = this->at;
}
fbt:ip:tcp_send_conn_ind:entry, fbt:ip:tcp_send_conn_ind:return,		/* only established */
fbt:ip:tcp_send_pending:entry,						/* only established */
fbt:ip:tcp_accept:return, fbt:ip:tcp_accept_swap:entry,			/* only tli_accepts */
fbt:ip:tcp_wput_accept:entry,						/* only accepts */
BEGIN			/* ends the list, whatever is left out; it prints nothing */
/ this->from != NULL && (PORT == 0 || this->port == PORT) /
{
	printf("%d,%Y,%s,%x:%x:%x:%x:%x:%x:%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp,
	    probefunc == "tcp_wput_accept" || probefunc == "tcp_accept_swap" ? "accept" : "established",
	    256 * this->from[0] + this->from[1], 256 * this->from[2] + this->from[3],
	    256 * this->from[4] + this->from[5], 256 * this->from[6] + this->from[7],
	    256 * this->from[8] + this->from[9], 256 * this->from[10] + this->from[11],
	    256 * this->from[12] + this->from[13], 256 * this->from[14] + this->from[15],
	    256 * this->from[16] + this->from[17], this->port,
	    this->tcp->tcp_conn_req_cnt_q0 - this->moving, this->tcp->tcp_conn_req_cnt_q + this->moving,
	    this->tcp->tcp_conn_req_max);
}
fbt:ip:tcp_send_conn_ind:return { self->into = NULL; }			/* only established */

/* Without output dtrace(1) would not notice that its reader has gone, such as the ssh to this host. */
tick-5s { printf("\n"); }
