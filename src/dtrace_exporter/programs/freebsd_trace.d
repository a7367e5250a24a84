#!/usr/sbin/dtrace -s
/*
 * freebsd_trace.d - a line for each SYN that reaches a TCP listener, and for what became of it.
 *
 * USAGE: dtrace -s freebsd_trace.d	# as root of the host, every listener; Ctrl-C ends it
 *
 *   TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax
 *
 * Action is syn, drop:REASON, established or accept. Q and Qmax, the limit, of a SYN and of a refused
 * final ACK are those that it found; those of an established connection include it; those of an accept
 * are from before it. Q0 is - because a listener has none. A drop:q0_evicted is about the half-open
 * connection that was evicted; its Q is not known here, nor that of an accept that was already waiting
 * when this began. This is for watching single connections: in a burst lines are lost, and dtrace(1) says
 * how many.
 *
 * A fault ends only one clause, and the next clauses of the event still run. So a clause clears a
 * pointer before what can fault and sets it after it. A line is printed if the pointer is set.
 * TESTED: on a model of FreeBSD 13 and 14, not on FreeBSD yet: see docs/install-freebsd.md.
 */
#pragma D option quiet
#pragma D option switchrate=10hz
#pragma D option bufsize=1m
#pragma D option strsize=64

inline int PORT = 0;		/* the port to watch; 0: all */
inline int PROTO_TCP = 6;	/* IPPROTO_TCP of netinet/in.h */
inline int VERSION_6 = 2;	/* INP_IPV6 of netinet/in_pcb.h; INC_ISIPV6 is 1 */
inline int IN_INCOMP = 0x0800;	/* SQ_INCOMP of sys/socketvar.h */
inline int SYN = 0;
inline int Q_FULL_ACK = 1;
inline int NO_MEMORY = 2;
inline int EVICTED = 3;
inline int ESTABLISHED = 4;
inline int ACCEPTED = 5;
inline int UNKNOWN = -1;

self struct in_conninfo *inc;
self struct socket *head, *child, *accepting;
self int over, adding, q, limit;
this struct socket *head, *child;
this struct in_endpoints *ends;
this int is_v6, action, q, limit;

BEGIN { this->ends = NULL; printf("TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax\n"); }

/* A SYN: syncache_add(ends, options, header, inpcb, ...). A final ACK: syncache_expand(ends, ...). */
fbt:kernel:syncache_expand:entry { self->inc = (struct in_conninfo *)arg0; }
fbt:kernel:syncache_add:entry
{
	this->ends = NULL;
	self->inc = (struct in_conninfo *)arg0;
	this->action = SYN;
	this->is_v6 = self->inc->inc_flags & 1;
	this->head = ((struct inpcb *)arg3)->inp_socket;
	this->q = this->head->sol_qlen;
	this->limit = this->head->sol_qlimit;
	this->ends = &self->inc->inc_ie;
}
/* begin evictions */
/* Evicted for a SYN: syncache_drop(entry, ...), called inside of syncache_add(). */
fbt:kernel:syncache_add:entry { self->adding = 1; }
fbt:kernel:syncache_add:return { self->adding = 0; }
fbt:kernel:syncache_drop:entry { this->ends = NULL; }
fbt:kernel:syncache_drop:entry
/ self->adding /
{
	this->action = EVICTED;
	this->is_v6 = ((struct syncache *)arg0)->sc_inc.inc_flags & 1;
	this->q = UNKNOWN;
	this->ends = &((struct syncache *)arg0)->sc_inc.inc_ie;
}
/* end evictions */
/* No socket for a final ACK: solisten_clone(listener), sonewconn(listener, state). */
fbt:kernel:solisten_clone:entry,						/* only enqueue */
fbt:kernel:sonewconn:entry
/ self->head = NULL,
    ((struct socket *)arg0)->so_proto->pr_usrreqs != NULL &&			/* only newconn */
    ((struct socket *)arg0)->so_proto->pr_protocol == PROTO_TCP /
{
	self->over = ((struct socket *)arg0)->sol_qlen > 3 * ((struct socket *)arg0)->sol_qlimit / 2;
	self->head = (struct socket *)arg0;
}
fbt:kernel:solisten_clone:return,						/* only enqueue */
fbt:kernel:sonewconn:return
/ this->ends = NULL, this->head = self->head, self->head = NULL, arg1 == 0 && this->head != NULL /
{
	this->action = self->over ? Q_FULL_ACK : NO_MEMORY;
	this->is_v6 = self->inc->inc_flags & 1;
	this->q = this->head->sol_qlen;
	this->limit = this->head->sol_qlimit;
	this->ends = &self->inc->inc_ie;
}
/* begin enqueue */
/* Into Q: from 14 on by solisten_enqueue(connection, state), if no accept filter holds it; */
fbt:kernel:solisten_enqueue:entry { this->ends = NULL; this->child = (struct socket *)arg0; }
fbt:kernel:solisten_enqueue:entry
/ arg1 && this->child->so_listen->sol_accept_filter == NULL &&
    this->child->so_proto->pr_protocol == PROTO_TCP /
{
	this->action = ESTABLISHED;
	this->is_v6 = ((struct inpcb *)this->child->so_pcb)->inp_vflag & VERSION_6;
	this->q = this->child->so_listen->sol_qlen + 1;
	this->limit = this->child->so_listen->sol_qlimit;
	this->ends = &((struct inpcb *)this->child->so_pcb)->inp_inc.inc_ie;
}
/* end enqueue */
/* begin established */
/* else by soisconnected(connection), if no filter holds it then; at its return the accept may be over. */
fbt:kernel:soisconnected:entry
/ self->child = NULL, this->child = (struct socket *)arg0, this->child->so_qstate == IN_INCOMP &&
    (this->head = this->child->so_listen) != NULL &&
    this->head->so_proto->pr_protocol == PROTO_TCP /
{
	self->q = this->head->sol_qlen + 1;
	self->limit = this->head->sol_qlimit;
	self->child = this->child;
}
fbt:kernel:soisconnected:return
/ this->ends = NULL, this->child = self->child, self->child = NULL, this->child != NULL /
{
	this->action = this->child->so_qstate == IN_INCOMP ? 0 : ESTABLISHED;
	this->is_v6 = ((struct inpcb *)this->child->so_pcb)->inp_vflag & VERSION_6;
	this->q = self->q;
	this->limit = self->limit;
	this->ends = this->action ? &((struct inpcb *)this->child->so_pcb)->inp_inc.inc_ie : NULL;
}
/* end established */
/* begin accepts */
/* Out of Q: solisten_dequeue(listener, ...), in which it may wait, then soaccept(connection, ...). */
fbt:kernel:solisten_dequeue:entry { self->accepting = (struct socket *)arg0; }
fbt:kernel:soaccept:entry
{
	this->ends = NULL;
	this->child = (struct socket *)arg0;
	this->head = self->accepting;
	self->accepting = NULL;
}
fbt:kernel:soaccept:entry
/ this->child->so_proto->pr_protocol == PROTO_TCP /
{
	this->action = ACCEPTED;
	this->is_v6 = ((struct inpcb *)this->child->so_pcb)->inp_vflag & VERSION_6;
	this->q = this->head != NULL ? this->head->sol_qlen + 1 : UNKNOWN;
	this->limit = this->head != NULL ? this->head->sol_qlimit : UNKNOWN;
	this->ends = &((struct inpcb *)this->child->so_pcb)->inp_inc.inc_ie;
}
/* end accepts */

fbt:kernel:solisten_clone:return,					/* only enqueue */
fbt:kernel:sonewconn:return,
fbt:kernel:solisten_enqueue:entry,					/* only enqueue */
fbt:kernel:soisconnected:return,					/* only established */
fbt:kernel:soaccept:entry,						/* only accepts */
fbt:kernel:syncache_add:entry
/ this->ends != NULL && this->q != UNKNOWN && (PORT == 0 || ntohs(this->ends->ie_lport) == PORT) /
{
	printf("%d,%Y,%s,%s,%d,%d,-,%d,%d\n", timestamp, walltimestamp, this->action == SYN ? "syn" :
	    this->action == Q_FULL_ACK ? "drop:q_full_ack" : this->action == NO_MEMORY ? "drop:other" :
	    this->action == ESTABLISHED ? "established" : "accept",
	    this->is_v6 ? inet_ntoa6(&this->ends->ie_dependfaddr.id6_addr) :
	    inet_ntoa(&this->ends->ie_dependfaddr.id46_addr.ia46_addr4.s_addr),
	    ntohs(this->ends->ie_fport), ntohs(this->ends->ie_lport), this->q, this->limit);
}
fbt:kernel:syncache_drop:entry,						/* only evictions */
fbt:kernel:soaccept:entry,						/* only accepts */
BEGIN			/* ends the list, whatever is left out; it prints nothing */
/ this->ends != NULL && this->q == UNKNOWN && (PORT == 0 || ntohs(this->ends->ie_lport) == PORT) /
{
	printf("%d,%Y,%s,%s,%d,%d,-,-,-\n", timestamp, walltimestamp,
	    this->action == EVICTED ? "drop:q0_evicted" : "accept",
	    this->is_v6 ? inet_ntoa6(&this->ends->ie_dependfaddr.id6_addr) :
	    inet_ntoa(&this->ends->ie_dependfaddr.id46_addr.ia46_addr4.s_addr),
	    ntohs(this->ends->ie_fport), ntohs(this->ends->ie_lport));
}

/* Without output dtrace(1) would not notice that its reader has gone, such as the ssh to this host. */
tick-5s { printf("\n"); }
