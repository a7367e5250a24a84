#!/usr/sbin/dtrace -s
/*
 * freebsd.d - what becomes of incoming connections at each TCP listener, counted in the kernel.
 *
 * USAGE: dtrace -s freebsd.d	# as root of the host, not of a jail; Ctrl-C ends it
 * A backlog of 1, so that Q holds 2; four clients, two accepts:
 *   ready 5 0
 *   listener f80003a1c0000002 1000300000020 0 192.0.2.1 8080 - 0 1 0
 *   limit fffff80003a1c000 1000300000020 1 1
 *   syn f80003a1c0000002 2 1
 *   syn f80003a1c0000002 0 3
 *   drop f80003a1c0000002 4 1
 *   established f80003a1c0000002 2
 *   left f80003a1c0000002 8 265010000001
 *   left f80003a1c0000002 10 3445010000001
 *   tick 1001000000000
 *
 * listener ID TIME JAIL ADDRESS PORT - Q LIMIT SYN: the listener ID, and its Q at TIME, ns since boot.
 *	Once a second the next event prints it again, with another number at the end of ID; so do
 *	listen(), and a new listener in the same memory. JAIL is 0 for the host. A listener has no Q0: the
 *	syncache is that of its stack. LIMIT is what listen() was granted: Q holds 3 * LIMIT / 2 + 1. SYN
 *	is 1 if its first SYN, which no row below counts, has caused this row.
 * limit SOCKET TIME LIMIT BACKLOG: listen() asked for BACKLOG and was granted LIMIT
 * syn ID Q EVENTS: SYNs that found Q connections in Q, including those that were sent again
 * drop ID REASON EVENTS: final ACKs refused because Q was full (4), or because there was no memory, and
 *	connections in an accept filter that were evicted for another one (5)
 * evicted JAIL ADDRESS PORT EVENTS: half-open connections of the listeners there, evicted from the
 *	syncache for a SYN of any listener
 * established ID EVENTS: connections put into Q; with an accept filter, when it lets them in
 * left ID HOW US+EVENTS: connections that accept() took out of Q, within 4^5, ... 4^17 ns for HOW 0 to
 *	12, later for 13, unknown for 14. US+EVENTS is 10,000,000 times their us in Q plus their number.
 * closed SOCKET TIME: the struct socket at this address has stopped listening
 * tick TIME: the heartbeat, after all rows of counts
 *
 * Q is that in the listener's row, plus what has entered since, minus what has left by accept() or with
 * its listener. trunc() in printa()'s clause empties dtrace(1)'s copy, and loses nothing. No event prints
 * anything: if the buffer for the output were full, the event would not be counted either. Functions
 * other than syncache_drop() are called from other files or by pointer, so no compiler inlines them.
 * TESTED: not on FreeBSD yet, but on a model of 13 and 14: docs/install-freebsd.md.
 */
#pragma D option quiet
#pragma D option switchrate=2hz
#pragma D option aggrate=1hz
#pragma D option aggsize=512k
#pragma D option bufsize=512k
#pragma D option dynvarsize=4m
#pragma D option strsize=64
inline int PORT = 0;		/* the port to watch; 0: all */
inline int PROTO_TCP = 6;	/* IPPROTO_TCP of netinet/in.h */
inline int VERSION_4 = 1;	/* INP_IPV4 of netinet/in_pcb.h */
inline int VERSION_6 = 2;	/* INP_IPV6, and INC_ISIPV6 is 1 */
inline int IN_INCOMP = 0x0800;	/* SQ_INCOMP of sys/socketvar.h */
inline int IN_COMP = 0x1000;	/* SQ_COMP */
uint64_t second, tellings;	/* seconds since boot, << 16; the number of listener rows */
uint64_t life[struct socket *];	/* the second of a listener's last row, and the number in its ID */
/* When a connection entered Q, and its listener. Odd: its thread will know whether it has. */
uint64_t start[struct socket *];
struct socket *head[struct socket *];
int bound[struct prison *, int, string];	/* the number of sockets with a row, not closed */	/* only evictions */
struct prison *jails[struct socket *]; string addresses[struct socket *]; int ports[struct socket *];	/* only evictions */
self struct socket *filling, *child, *into, *accepting, *opening;
self int over, adding, asked;
this struct socket *listener, *child;
this struct inpcb *inp;
this struct in_endpoints *ends;
this struct syncache *half;	/* only evictions */
this struct prison *jail;	/* only evictions */
this uint64_t life, told, who, since, ns;
this int port, asked, is_v6, both, new;
this string address;
inline string IPV4 = inet_ntoa(&this->ends->ie_dependladdr.id46_addr.ia46_addr4.s_addr);
inline string IPV6 = inet_ntoa6(&this->ends->ie_dependladdr.id6_addr);
inline string ADDRESS = this->is_v6 ? IPV6 : IPV4;	/* the local one, of this->ends */

BEGIN { second = timestamp / 1000000000 << 16; printf("\nready 5 0\n"); }
/* A SYN: syncache_add(ends, options, header, inpcb, ...). The first one is counted by its listener's row. */
fbt:kernel:syncache_add:entry
/
    (PORT == 0 || (this->life = second,						/* only one_port */
    ntohs(((struct inpcb *)arg3)->inp_inc.inc_ie.ie_lport) == PORT)) &&		/* only one_port */
    (this->life = second, this->listener = ((struct inpcb *)arg3)->inp_socket,
    this->life = life[this->listener], 1) /
{ @syn[(uint64_t)this->listener << 16 | this->life & 0xffff, this->listener->sol_qlen] = count(); }
/* A final ACK: its connection gets a socket, unless Q is full or there is no memory. Until 13 this */
/* also puts it into a queue. UNIX sockets come here as well. */
fbt:kernel:solisten_clone:entry,						/* only enqueue */
fbt:kernel:sonewconn:entry
/ this->life = second, self->filling = NULL,
    ((struct socket *)arg0)->so_proto->pr_usrreqs != NULL &&			/* only newconn */
    ((struct socket *)arg0)->so_proto->pr_protocol == PROTO_TCP /
{
	self->filling = this->listener = (struct socket *)arg0, this->life = life[this->listener],
	    self->over = this->listener->sol_qlen > 3 * this->listener->sol_qlimit / 2;
}
/* begin enqueue */
/* From 14 on into Q: solisten_enqueue(connection, state), if no accept filter holds it. */
fbt:kernel:solisten_enqueue:entry
/ self->filling = NULL, this->child = (struct socket *)arg0, this->listener = this->child->so_listen,
    this->listener->so_proto->pr_protocol == PROTO_TCP && (self->filling = this->listener,
    arg1 && this->listener->sol_accept_filter == NULL && (this->life = life[this->listener])) /
{
	start[this->child] = timestamp & -2, head[this->child] = this->listener;	/* only accepts */
	@established[(uint64_t)this->listener << 16 | this->life & 0xffff] = count();	/* only established */
}
fbt:kernel:solisten_enqueue:return { self->filling = NULL; }
/* end enqueue */
/* begin established */
/* Else perhaps by soisconnected(connection): known at its return, or in an accept before that. */
fbt:kernel:soisconnected:entry
/ self->child = NULL, this->child = (struct socket *)arg0, this->child->so_qstate == IN_INCOMP &&
    (this->listener = this->child->so_listen) != NULL && life[this->listener] /
{
	start[this->child] = timestamp | 1, head[this->child] = this->listener;	/* only accepts */
	self->into = this->listener, self->child = this->child;
}
fbt:kernel:soisconnected:return
/ self->child != NULL && (this->child = self->child, self->child = NULL, this->since = 1,
    this->since = start[this->child], start[this->child] = !(this->since & 1) ? this->since :	/* only accepts */
    this->child->so_qstate == IN_COMP ? this->since & -2 :			/* only accepts */
    this->child->so_qstate == IN_INCOMP ? 0 : this->since,			/* only accepts */
    this->since & 1 && this->child->so_qstate == IN_COMP && (this->life = life[self->into])) /
{ @established[(uint64_t)self->into << 16 | this->life & 0xffff] = count(); }
/* end established */
/* begin accepts */
/* accept(): solisten_dequeue(listener, ...), which may wait for long; then soaccept(connection, ...). */
fbt:kernel:solisten_dequeue:entry
/ this->life = second, self->accepting = NULL,
    ((struct socket *)arg0)->so_proto->pr_protocol == PROTO_TCP /
{ self->accepting = this->listener = (struct socket *)arg0, this->life = life[this->listener]; }
fbt:kernel:solisten_dequeue:return / (int)arg1 != 0 / { self->accepting = NULL; }
/* end accepts */
/* begin open_close */
/* listen(), perhaps again: solisten_proto(socket, backlog). */
fbt:kernel:solisten_proto:entry
/ self->opening = NULL, ((struct socket *)arg0)->so_proto->pr_protocol == PROTO_TCP /
{ self->opening = (struct socket *)arg0, self->asked = (int)arg1; }
fbt:kernel:solisten_proto:return
/ this->life = second, (this->listener = self->opening) != NULL /
{ this->life = life[this->listener] &= 0xffff; }
/* end open_close */
/* The listener's row, with its Q before the current event is counted. Each event keeps it from closing. */
fbt:kernel:solisten_clone:entry,					/* only enqueue */
fbt:kernel:sonewconn:entry,
fbt:kernel:solisten_dequeue:entry,					/* only accepts */
fbt:kernel:solisten_proto:return,					/* only open_close */
fbt:kernel:syncache_add:entry
/ this->life < second && (this->inp = (struct inpcb *)this->listener->so_pcb,
    this->ends = &this->inp->inp_inc.inc_ie, this->port = ntohs(this->ends->ie_lport),
    PORT == 0 || this->port == PORT) /
{
	this->told = second | ++tellings % 65535 + 1;
	this->who = (uint64_t)this->listener << 16 | this->told & 0xffff;
	this->is_v6 = this->inp->inp_vflag & VERSION_6, this->address = ADDRESS;
	printf("listener %x %d ", this->who, timestamp);
	printf("%s", stringof(this->listener->so_cred->cr_prison->pr_name));	/* only jails */
	printf(" %s %d - %d %d %d\n", this->address, this->port, this->listener->sol_qlen,
	    this->listener->sol_qlimit, this->life == 0 && probefunc == "syncache_add");
/* begin evictions */
	/* If two CPUs come here at once, one can lose its count: the next row makes up for that. */
	this->jail = this->listener->so_cred->cr_prison, this->both = this->is_v6 && this->inp->inp_vflag & VERSION_4;
	jails[this->listener] = this->jail, addresses[this->listener] = this->address,
	    ports[this->listener] = this->both << 16 | this->port;
	this->new = life[this->listener] == 0, life[this->listener] = this->told;
	bound[this->jail, this->port, this->address] += this->new || !bound[this->jail, this->port, this->address];
	bound[this->jail, this->port, "0.0.0.0"] += this->both &&
	    (this->new || !bound[this->jail, this->port, "0.0.0.0"]);
/* end evictions */
	life[this->listener] = this->life = this->told;
}
/* begin open_close */
fbt:kernel:solisten_proto:return
/ this->listener = self->opening, self->opening = NULL, this->asked = self->asked, self->asked = 0,
    this->listener != NULL && life[this->listener] > 0xffff /
{ printf("limit %x %d %d %d\n", (uint64_t)this->listener, timestamp, this->listener->sol_qlimit, this->asked); }
/* end open_close */
fbt:kernel:solisten_clone:return,						/* only enqueue */
fbt:kernel:sonewconn:return
/ this->listener = self->filling, self->filling = NULL,
    arg1 == 0 && this->listener != NULL && (this->life = life[this->listener]) /
{
	@drop[(uint64_t)this->listener << 16 | this->life & 0xffff, self->over ||	/* only ack_drops */
	    this->listener->sol_qlen > 3 * this->listener->sol_qlimit / 2 ? 4 : 5] = count();	/* only ack_drops */
}
/* begin ack_drops */
/* tcp_usr_abort(connection): evicted for another one, or closed with its listener. */
fbt:kernel:tcp_usr_abort:entry
/
    start[(struct socket *)arg0] = 0, head[(struct socket *)arg0] = NULL,	/* only accepts */
    self->filling != NULL && (this->life = life[self->filling]) /
{ @drop[(uint64_t)self->filling << 16 | this->life & 0xffff, 5] = count(); }
/* end ack_drops */
/* begin accepts */
fbt:kernel:soaccept:entry
/ this->life = this->ns = 0, this->child = (struct socket *)arg0, this->since = start[this->child],
    this->ns = this->since > 1 ? timestamp - (this->since & -2) : 0,		/* only accept_wait */
    this->listener = self->accepting != NULL ? self->accepting : head[this->child],
    self->accepting = NULL, head[this->child] = NULL, start[this->child] = 0,
    this->life = life[this->listener], this->life && this->since & 1 /
{
	@established[(uint64_t)this->listener << 16 | this->life & 0xffff] = count();	/* only established */
}
fbt:kernel:soaccept:entry
/ this->life /
{
	@left[(uint64_t)this->listener << 16 | this->life & 0xffff,
	    this->ns <= 1 << 16 ? (this->ns == 0 ? 14 :
	    this->ns <= 1 << 10 ? 0 : this->ns <= 1 << 12 ? 1 : this->ns <= 1 << 14 ? 2 : 3) :
	    this->ns <= 1 << 24 ? (this->ns <= 1 << 18 ? 4 : this->ns <= 1 << 20 ? 5 :
	    this->ns <= 1 << 22 ? 6 : 7) : (this->ns <= 1 << 26 ? 8 : this->ns <= 1 << 28 ? 9 :
	    this->ns <= 1 << 30 ? 10 : this->ns <= 1L << 32 ? 11 : this->ns <= 1L << 34 ? 12 : 13)] =
	    sum(10000000 * (this->ns / 1000) + 1);
}
/* end accepts */
/* begin evictions */
/* For a SYN if the syncache is full: syncache_drop(the oldest, ...), of any listener. */
fbt:kernel:syncache_add:entry { self->adding = 1; }
fbt:kernel:syncache_add:return { self->adding = 0; }
fbt:kernel:syncache_drop:entry
/ self->adding && (this->half = (struct syncache *)arg0, this->ends = &this->half->sc_inc.inc_ie,
    this->jail = this->half->sc_cred->cr_prison, this->port = ntohs(this->ends->ie_lport),
    this->is_v6 = this->half->sc_inc.inc_flags & 1, this->address = ADDRESS,
    this->address = bound[this->jail, this->port, this->address] ? this->address :
    this->is_v6 ? "::" : "0.0.0.0", bound[this->jail, this->port, this->address]) /
{ @evicted[stringof(this->jail->pr_name), this->address, this->port] = count(); }
/* end evictions */
/* begin open_close */
/* Close: tcp_usr_detach(socket). Nothing finds the socket any more. */
fbt:kernel:tcp_usr_detach:entry
/ life[this->listener = (struct socket *)arg0] /
{
	printf("closed %x %d\n", (uint64_t)arg0, timestamp);
	life[this->listener] = 0;
	this->jail = jails[this->listener], this->address = addresses[this->listener],	/* only evictions */
	    this->port = ports[this->listener] & 0xffff, this->both = ports[this->listener] >> 16;	/* only evictions */
	jails[this->listener] = NULL, ports[this->listener] = 0, addresses[this->listener] = 0;	/* only evictions */
	bound[this->jail, this->port, this->address] -= bound[this->jail, this->port, this->address] > 0;	/* only evictions */
	bound[this->jail, this->port, "0.0.0.0"] -= this->both && bound[this->jail, this->port, "0.0.0.0"] > 0;	/* only evictions */
}
/* end open_close */
tick-1s, END
{
	second = timestamp / 1000000000 << 16;
	printa("syn %x %d %@d\n", @syn); trunc(@syn);
	printa("drop %x %d %@d\n", @drop); trunc(@drop);		/* only ack_drops */
	printa("evicted %s %s %d %@d\n", @evicted); trunc(@evicted);	/* only evictions */
	printa("established %x %@d\n", @established); trunc(@established);	/* only established */
	printa("left %x %d %@d\n", @left); trunc(@left);		/* only accepts */
	printf("tick %d\n", timestamp);
}
