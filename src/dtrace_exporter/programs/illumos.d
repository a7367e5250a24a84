#!/usr/sbin/dtrace -s
/*
 * illumos.d - what becomes of incoming connections at each TCP listener, counted in the kernel.
 *
 * USAGE: dtrace -s illumos.d	# in the global zone; Ctrl-C ends it
 * A backlog of 2, five clients, two accepts:
 *   ready 5 global
 *   listener ff01d3b2ac800002 1000300000020 global 192.0.2.1 8080 0 0 2 0 1026
 *   syn ff01d3b2ac800002 2 2
 *   syn ff01d3b2ac800002 0 3
 *   drop ff01d3b2ac800002 1 2
 *   opened ff01d3b2ac800002 3
 *   established ff01d3b2ac800002 2
 *   left ff01d3b2ac800002 8 265010000001
 *   left ff01d3b2ac800002 10 3445010000001
 *   tick 1001000000000
 *
 * listener ID TIME ZONE ADDRESS PORT Q0 Q QMAX SYN Q0MAX: the listener ID, and its queues at TIME, ns
 *	since boot. Once a second the next event prints it again, with another number at the end of
 *	ID; so do listen(), and a new listener in the same memory. SYN is 1 if its first SYN, which
 *	no row below counts, has caused this row. QMAX is 0 if it has closed meanwhile.
 * syn ID Q EVENTS: SYNs that found Q connections in Q; those with number 0 in ID are counted above.
 *	Segments without SYN have a Q of -1.
 * drop ID REASON EVENTS: SYNs that were dropped because Q (1) or Q0 (2) was full; half-open
 *	connections that were evicted for a SYN (3)
 * opened ID EVENTS: connections put into Q0
 * established ID EVENTS: connections moved from Q0 to Q
 * left ID HOW US+EVENTS: connections that accept() took out of Q, within 4^5, ... 4^17 ns for HOW 0 to
 *	12, later for 13, unknown for 14; those that left Q (15) or Q0 (16) without it. US+EVENTS is
 *	10,000,000 times the microseconds that they were in Q, plus their number.
 * closed SOCKET TIME: the listener whose conn_t has this address has stopped listening
 * tick TIME: the heartbeat, after all rows of counts
 *
 * Q0 and Q are those in the listener's row, plus what has entered since, minus what has left. trunc() in
 * printa()'s clause empties dtrace(1)'s copy, and loses nothing. No event prints anything: if the buffer
 * for the output were full, the event would not be counted either.
 * TESTED: see docs/install-solaris.md.
 */
#pragma D option quiet
#pragma D option switchrate=2hz
#pragma D option aggrate=1hz
#pragma D option aggsize=512k
#pragma D option bufsize=256k
#pragma D option dynvarsize=2m
#pragma D option strsize=64
inline int PORT = 0;		/* the port to watch; 0: all */
inline int SYN_FLAG = 2;		/* TH_SYN of netinet/tcp.h; in tcp.d too */
inline int NOBODY = 65536;	/* an ID of number 0 */
int port;			/* PORT in network byte order */
inline int STATE_LISTEN = -3;
uint64_t second, tellings;	/* seconds since boot, << 16; the number of listener rows */
uint64_t life[conn_t *];	/* the second of a listener's last row, and the number in its ID */
uint64_t syn[kthread_t *];	/* the ID of the listener whose SYN a thread handles */
/* When a connection entered Q. Odd: its thread will know whether it has; 1: it waits in Q0. */
uint64_t start[tcp_t *];
self conn_t *conn, *opening, *closing;
self tcp_t *eager, *deferring;
self int taking;
this conn_t *listener;
this tcp_t *tcp, *eager;
this struct T_conn_ind *ind;
this uint64_t life, told, who, since, ns;	/* ns: the time in Q, minus one */
this int syn, qmax, q0max, room, waits;

BEGIN { port = htons(PORT); second = timestamp / 1000000000 << 16; printf("\nready 5 global\n"); }
/* A fault ends only its clause. The next ones of this event must not use values of an earlier event. */
ERROR { syn[curthread] = NOBODY; this->listener = NULL; this->life = this->ns = 0; }

/* A SYN: tcp_input_listener(listener, packet, squeue, attributes). syn[] has its ID for the probes in */
/* this function. The first SYN of a listener without a row is counted by its row. */
fbt:ip:tcp_input_listener:entry
/ PORT ? ((conn_t *)arg0)->u_port.connu_ports.connu_lport ^ port ?		/* only one_port */
    /* only one_port */ (syn[curthread] = NOBODY, this->life = second, 0) : 1 : 1 /
{
	@syn[syn[curthread] =
	    arg0 << 16 | (this->life = life[this->listener = (conn_t *)arg0]) & 0xffff,
	    ((mblk_t *)arg1)->b_rptr[((ip_recv_attr_t *)arg3)->ira_ip_hdr_length + 13] & SYN_FLAG ?
	    this->listener->conn_proto_priv.cp_tcp->tcp_conn_req_cnt_q : -1] = count();
}
mib:::tcpListenDrop { @drop[syn[curthread], 1] = count(); }	/* only syn_drops */
mib:::tcpListenDropQ0 { @drop[syn[curthread], 2] = count(); }	/* only syn_drops */
mib:::tcpHalfOpenDrop { @drop[syn[curthread], 3] = count(); }	/* only syn_drops */
mib:::tcpPassiveOpens { @opened[syn[curthread]] = count(); }	/* only half_open */
/* begin established */
/* Into Q: tcp_newconn_notify(connection, attributes). */
fbt:ip:tcp_newconn_notify:entry
{
	start[(tcp_t *)arg0] = timestamp & -2,					/* only accept_wait */
	    this->life = life[this->listener = ((tcp_t *)arg0)->tcp_listener->tcp_connp];
}
/* end established */
/* begin streams */
/* With STREAMS by tcp_send_conn_ind(listener, T_CONN_IND, squeue), if Q has room: in the squeue nothing */
/* else adds to Q. If it has none, the result is known at the return, or later. */
fbt:ip:tcp_send_conn_ind:entry
{
	this->ind = (struct T_conn_ind *)((mblk_t *)arg1)->b_rptr;
	this->eager = *(tcp_t **)((char *)this->ind + this->ind->OPT_offset);
	this->tcp = ((conn_t *)arg0)->conn_proto_priv.cp_tcp;
	this->room = this->tcp->tcp_conn_req_cnt_q < this->tcp->tcp_conn_req_max;
	start[this->eager] = this->room ? timestamp & -2 : timestamp | 1;
	this->listener = (conn_t *)arg0;
	this->life = life[this->listener];
}
fbt:ip:tcp_send_conn_ind:entry
/ this->listener != NULL && !this->room /
{ self->conn = this->listener; self->eager = this->eager; }
/* end streams */

/* tcp_accept(), TLI's tcp_accept_swap() and STREAMS' tcp_tpi_accept() unlink what they accept. */
fbt:ip:tcp_tpi_accept:entry,						/* only streams_accepts */
fbt:ip:tcp_accept_swap:entry,						/* only tli_accepts */
fbt:ip:tcp_accept:entry { self->taking = 1; }				/* only accepts */
fbt:ip:tcp_tpi_accept:return,						/* only streams_accepts */
fbt:ip:tcp_accept_swap:return,						/* only tli_accepts */
fbt:ip:tcp_accept:return { self->taking = 0; }				/* only accepts */
/* begin departures */
/* Out of Q or Q0, for any reason: tcp_eager_unlink(connection). It also counts missed entries into Q. */
fbt:ip:tcp_eager_unlink:entry
/ this->eager = (tcp_t *)arg0,
    start[this->eager] = (this->since = start[this->eager]) & 1 ?
    (this->since > 1 && this->eager->tcp_eager_next_q0 == NULL ? this->since : 0) : 0,
    this->ns = this->since >> 1 ? timestamp - this->since - 1 : 0,	/* only accept_wait */
    this->life = life[this->listener = this->eager->tcp_listener->tcp_connp],
    this->since & 1 ? this->since == 1 && this->life && this->eager->tcp_eager_next_q0 == NULL : 0 /
{
	@established[(uint64_t)this->listener << 16 | this->life & 0xffff] = count();	/* only established */
}
/* end departures */

/* begin open_close */
/* listen(), perhaps again: tcp_do_listen(listener, ...). */
fbt:ip:tcp_do_listen:entry { self->opening = (conn_t *)arg0; }
fbt:ip:tcp_do_listen:return
{
	this->listener = self->opening;
	self->opening = NULL;
	this->life = life[this->listener] &= 0xffff;
}
/* Close: tcp_closei_local(tcp), tcp_do_unbind(listener). Until the return it may get another row. */
fbt:ip:tcp_closei_local:entry { this->listener = ((tcp_t *)arg0)->tcp_connp; }
fbt:ip:tcp_do_unbind:entry { this->listener = (conn_t *)arg0; }
fbt:ip:tcp_closei_local:return, fbt:ip:tcp_do_unbind:return
{ this->listener = self->closing; self->closing = NULL; }
fbt:ip:tcp_closei_local:entry, fbt:ip:tcp_do_unbind:entry,
fbt:ip:tcp_closei_local:return, fbt:ip:tcp_do_unbind:return
/ this->listener != NULL && life[this->listener] /
{
	printf("closed %x %d\n", (uint64_t)this->listener, timestamp);
	life[this->listener] = 0;
	self->closing = probename == "entry" ? this->listener : NULL;
}
/* end open_close */

/* The listener's row, with its queues before the current event is counted. */
fbt:ip:tcp_newconn_notify:entry,				/* only established */
fbt:ip:tcp_send_conn_ind:entry,					/* only streams */
fbt:ip:tcp_eager_unlink:entry,					/* only departures */
fbt:ip:tcp_do_listen:return,					/* only open_close */
fbt:ip:tcp_input_listener:entry
/ (this->life ^ second) >> 16 && (this->listener != NULL &&
    this->listener->conn_proto_priv.cp_tcp->tcp_state == STATE_LISTEN &&
    (PORT == 0 || ntohs(this->listener->u_port.connu_ports.connu_lport) == PORT)) /
{
	this->tcp = this->listener->conn_proto_priv.cp_tcp;
	this->told = second | ++tellings % 65535 + 1;
	this->who = (uint64_t)this->listener << 16 | this->told & 0xffff;
	this->syn = this->life == 0 && probefunc == "tcp_input_listener" && ((mblk_t *)arg1)->
	    b_rptr[((ip_recv_attr_t *)arg3)->ira_ip_hdr_length + 13] & SYN_FLAG;
	printf("listener %x %d ", this->who, timestamp);
	printf("%s", stringof(this->listener->conn_cred->cr_zone->zone_name));	/* only zones */
	printf(" %s %d %d %d", inet_ntoa6(&this->listener->connua_v6addr.connua_laddr),
	    ntohs(this->listener->u_port.connu_ports.connu_lport),
	    this->tcp->tcp_conn_req_cnt_q0, this->tcp->tcp_conn_req_cnt_q);
	this->qmax = this->tcp->tcp_conn_req_max;
	this->q0max = this->qmax +						/* only q0_limit */
	    this->tcp->tcp_tcps->tcps_propinfo_tbl[2].u.mpi_uval.mod_propval_ucur;	/* only q0_limit */
	/* Either the close sees that it has a row, or this clause sees that it has closed. */
	life[this->listener] = this->life = this->told,
	    this->tcp->tcp_state == STATE_LISTEN || (life[this->listener] = this->qmax = this->life = 0);
	printf(" %d %d", this->qmax, this->syn);
	printf(" %d", this->q0max);						/* only q0_limit */
	printf("\n");
	syn[curthread] = probefunc == "tcp_input_listener" ? this->who : syn[curthread];
}

/* begin established */
fbt:ip:tcp_newconn_notify:entry
/ this->life /
{ @established[(uint64_t)this->listener << 16 | this->life & 0xffff] = count(); }
/* end established */
/* begin streams */
fbt:ip:tcp_send_conn_ind:entry
/ this->room && this->life /
{ @established[(uint64_t)this->listener << 16 | this->life & 0xffff] = count(); }
/* If Q had no room: there is room by now, or it waits in Q0, or an accept has let it in, perhaps taken */
/* it. If start is still odd, count it here, in one expression, as accepts run on other CPUs. */
fbt:ip:tcp_send_conn_ind:return
/ self->eager != NULL && (
    this->waits = self->eager->tcp_eager_next_q0 != NULL,
    this->since = start[self->eager],
    this->since & 1 && (start[self->eager] =
    this->waits ? 1 : self->eager->tcp_listener == NULL ? 0 : this->since & -2),
    this->since & 1 && !this->waits && (this->life = life[self->conn])) /
{
	@established[(uint64_t)self->conn << 16 | this->life & 0xffff] = count();
}
fbt:ip:tcp_send_conn_ind:return { self->conn = NULL; self->eager = NULL; }
/* Or it waits until an accept calls tcp_get_def_conn_ind(listener), which appends it to Q. */
fbt:ip:tcp_get_def_conn_ind:entry { self->deferring = (tcp_t *)arg0; }
fbt:ip:tcp_get_def_conn_ind:return
/ self->deferring != NULL && (
    this->listener = self->deferring->tcp_connp,
    this->eager = self->deferring->tcp_eager_last_q,
    start[this->eager] <= 1 &&
    (start[this->eager] = timestamp & -2, this->life = life[this->listener])) /
{
	@established[(uint64_t)this->listener << 16 | this->life & 0xffff] = count();
}
fbt:ip:tcp_get_def_conn_ind:return { self->deferring = NULL; }
/* end streams */
/* begin departures */
fbt:ip:tcp_eager_unlink:entry
/ this->life /
{
	@left[(uint64_t)this->listener << 16 | this->life & 0xffff,
	    self->taking ? (this->ns >> 16 ? (this->ns >> 24 ? (this->ns >> 30 ?	/* only accepts */
	    (this->ns >> 34 ? 13 : this->ns >> 32 ? 12 : 11) :			/* only accepts */
	    this->ns >> 28 ? 10 : this->ns >> 26 ? 9 : 8) :			/* only accepts */
	    this->ns >> 22 ? 7 : this->ns >> 20 ? 6 : this->ns >> 18 ? 5 : 4) :	/* only accepts */
	    this->ns >> 10 ? (this->ns >> 14 ? 3 : this->ns >> 12 ? 2 : 1) :	/* only accepts */
	    this->ns ? 0 : 14) :						/* only accepts */
	    this->eager->tcp_eager_next_q0 == NULL ? 15 : 16] =
	    sum(10000000 * ((this->ns + 1) / 1000) + 1);
}
/* end departures */

tick-1s, END
{
	second = timestamp / 1000000000 << 16;
	printa("syn %x %d %@d\n", @syn); trunc(@syn);
	printa("drop %x %d %@d\n", @drop); trunc(@drop);		/* only syn_drops */
	printa("opened %x %@d\n", @opened); trunc(@opened);		/* only half_open */
	printa("established %x %@d\n", @established); trunc(@established);	/* only established */
	printa("left %x %d %@d\n", @left); trunc(@left);		/* only departures */
	printf("tick %d\n", timestamp);
}
