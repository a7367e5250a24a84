#!/usr/sbin/dtrace -s
/*
 * solaris10.d - what becomes of incoming connections at each TCP listener, counted in the kernel.
 *
 * USAGE: dtrace -s solaris10.d	# in the global zone; Ctrl-C ends it
 * listener ID TIME ZONE ADDRESS PORT Q0 Q QMAX Q0MAX: who ID is, and its queues at TIME, ns since
 *	boot. Once a second the next event tells it anew, before it is counted, with another number
 *	at ID's end; listen() does so too, and whoever uses the listener's memory after it.
 * syn ID Q EVENTS: SYNs that found so many connections in Q
 * drop ID REASON EVENTS: those of them that were dropped as Q was full (1), or Q0 (2); half-open
 *	connections thrown out for a SYN (3)
 * opened ID EVENTS: connections put into Q0
 * established ID EVENTS: out of Q0 into Q
 * accept ID PART US+EVENTS: taken out of Q by accept(), within 4^5, ... 4^17 ns for PART 0 to 12,
 *	13 more, 14 not known. US+EVENTS is 10,000,000 times their microseconds, plus their number.
 * left ID QUEUE EVENTS: out of Q (1) or Q0 (0) in another way
 * closed SOCKET TIME: the tcp_t whose address this is listens no more
 * tick TIME: the heartbeat, when all that was counted has been printed
 *
 * Q0 and Q are what was told, and what has come since, less what went. Each count is printed once:
 * dtrace(1) adds the kernel's counts to its own copy and empties the kernel's; trunc() is for the
 * copy. So nothing is lost between them, if they stand in one clause. What is printed per event
 * would be: where the buffer for it is full, nothing is counted either.
 * Written for the first DTrace, which has no ntohs() and no inet_ntoa(): bytes are put together.
 * TESTED: docs/install-solaris.md tells on what.
 */
#pragma D option quiet
#pragma D option switchrate=2hz
#pragma D option aggrate=1hz
#pragma D option aggsize=512k
#pragma D option bufsize=256k
#pragma D option dynvarsize=2m
#pragma D option strsize=64

inline int PORT = 0;		/* the only one to watch; 0: all */
/* Where a conn_t has its tcp_t, and its port, 34 bytes behind its address. 0x20, 0x102 before U9. */
inline int CONN_TCP = 0x28;
inline int CONN_LPORT = 0x10a;
inline int TCPS_LISTEN = -3;
inline int O_T_CONN_RES = 1;
inline int T_CONN_RES = 28;

uint64_t second, tellings;
uint64_t life[tcp_t *];		/* in which second a listener was told, << 16, and its number then */
uint64_t syn[kthread_t *];	/* the ID of the listener whose SYN a thread has in hand */
uint64_t start[tcp_t *];	/* when a connection came into Q; 1: it waits in Q0 for room */
self tcp_t *opening, *closing, *eager, *accepting, *taken;
this tcp_t *listener, *eager, **eagers, *up;
this mblk_t *mp;
this uint8_t *at;
this uint64_t life, told, who, ns;
this int taken;

BEGIN { second = timestamp / 1000000000; printf("\nready 5 global\n"); }

/* A SYN: tcp_conn_request(listener, packet, squeue). */
fbt:ip:tcp_conn_request:entry
{
	this->at = (uint8_t *)(arg0 + CONN_LPORT);
	this->listener = PORT == 0 || 256 * this->at[0] + this->at[1] == PORT ?
	    *(tcp_t **)(arg0 + CONN_TCP) : (tcp_t *)(syn[curthread] = 0);
}

/* begin established */
/* Into Q: tcp_send_conn_ind(listener, T_CONN_IND, squeue). A fault ends one clause, not the others. */
fbt:ip:tcp_send_conn_ind:entry
{
	this->listener = NULL;
	this->mp = (mblk_t *)arg1;
	this->eagers = (tcp_t **)alloca(sizeof (tcp_t *));
	self->eager = NULL;
	bcopy(this->mp->b_rptr + ((struct T_conn_ind *)this->mp->b_rptr)->OPT_offset,
	    this->eagers, sizeof (tcp_t *));
	self->eager = *this->eagers;
	this->listener = self->eager->tcp_listener;
}
/* If Q is full it stays in Q0, until an accept has room for it. */
fbt:ip:tcp_send_conn_ind:return
{
	this->listener = NULL;
	this->eager = self->eager;
	self->eager = NULL;
	this->up = this->eager->tcp_eager_next_q0 == NULL ? this->eager : NULL;
	start[this->eager] = this->up == NULL;
	this->listener = this->eager->tcp_listener;
	this->life = life[this->listener];
}
/* end established */

/* begin accepts */
/* accept() says which it will take: tcp_wput_accept(queue, T_CONN_RES), */
fbt:ip:tcp_wput_accept:entry
/ (this->mp = (mblk_t *)arg1) != NULL &&
    (((struct T_conn_res *)this->mp->b_rptr)->PRIM_type == T_CONN_RES ||
    ((struct T_conn_res *)this->mp->b_rptr)->PRIM_type == O_T_CONN_RES) /
{
	this->eagers = (tcp_t **)alloca(sizeof (tcp_t *));
	bcopy(this->mp->b_rptr + ((struct T_conn_res *)this->mp->b_rptr)->OPT_offset,
	    this->eagers, sizeof (tcp_t *));
	self->taken = *this->eagers;
}
/* end accepts */
/* begin tli_accepts */
/* TLI's tcp_accept_swap(listener, acceptor, connection), in tcp_accept(listener, T_CONN_RES). */
fbt:ip:tcp_accept_swap:entry { self->taken = (tcp_t *)arg2; }
fbt:ip:tcp_accept:entry { self->accepting = (tcp_t *)arg0; }
fbt:ip:tcp_accept:return
{
	this->listener = NULL;
	this->up = self->accepting->tcp_eager_last_q;
	this->up = start[this->up] == 1 ? this->up : NULL;
	this->listener = self->accepting;
	this->life = life[this->listener];
	self->accepting = NULL;
}
/* end tli_accepts */
/* begin departures */
/* Out of Q or Q0, why ever: tcp_eager_unlink(connection). Its accept may have let the last one in. */
fbt:ip:tcp_eager_unlink:entry
{
	this->listener = this->up = NULL;
	this->eager = (tcp_t *)arg0;
	this->taken = 0;
	this->taken = self->taken == this->eager;	/* only accepts */
	this->up = this->taken ? this->eager->tcp_listener->tcp_eager_last_q : NULL;
	this->up = this->up != NULL && start[this->up] == 1 ? this->up : NULL;
	this->listener = this->eager->tcp_listener;
}
/* end departures */

/* begin open_close */
/* listen(), perhaps once more: tcp_bind(listener, T_BIND_REQ). */
fbt:ip:tcp_bind:entry { self->opening = (tcp_t *)arg0; }
fbt:ip:tcp_bind:return
{
	this->listener = self->opening;
	self->opening = NULL;
	life[this->listener] &= 0xffff;
}
/* tcp_closei_local(tcp), tcp_unbind(tcp, T_UNBIND_REQ); what came while they ran may have told it anew. */
fbt:ip:tcp_closei_local:entry, fbt:ip:tcp_unbind:entry { this->listener = (tcp_t *)arg0; }
fbt:ip:tcp_closei_local:return, fbt:ip:tcp_unbind:return
{
	this->listener = self->closing;
	self->closing = NULL;
}
fbt:ip:tcp_closei_local:entry, fbt:ip:tcp_unbind:entry,
fbt:ip:tcp_closei_local:return, fbt:ip:tcp_unbind:return
/ this->listener != NULL && life[this->listener] /
{
	printf("closed %x %d\n", (uint64_t)this->listener, timestamp);
	life[this->listener] = 0;
	self->closing = probename == "entry" ? this->listener : NULL;
}
/* end open_close */

/* Who it is, and its queues, before what happens now is counted. */
fbt:ip:tcp_send_conn_ind:entry,				/* only established */
fbt:ip:tcp_eager_unlink:entry,				/* only departures */
fbt:ip:tcp_bind:return,					/* only open_close */
fbt:ip:tcp_conn_request:entry
/ this->listener != NULL && (this->life = life[this->listener]) >> 16 != second &&
    this->listener->tcp_state == TCPS_LISTEN &&
    (this->at = (uint8_t *)this->listener->tcp_connp + CONN_LPORT - 34) != NULL &&
    (PORT == 0 || 256 * this->at[34] + this->at[35] == PORT) /
{
	this->told = second << 16 | ++tellings % 65535 + 1;
	printf("listener %x %d ", (uint64_t)this->listener << 16 | this->told & 0xffff, timestamp);
	printf("%s", stringof(this->listener->tcp_cred->cr_zone->zone_name));	/* only zones */
	printf(" %x:%x:%x:%x:%x:%x:%x:%x %d %d %d %d",
	    256 * this->at[0] + this->at[1], 256 * this->at[2] + this->at[3],
	    256 * this->at[4] + this->at[5], 256 * this->at[6] + this->at[7],
	    256 * this->at[8] + this->at[9], 256 * this->at[10] + this->at[11],
	    256 * this->at[12] + this->at[13], 256 * this->at[14] + this->at[15],
	    256 * this->at[34] + this->at[35], this->listener->tcp_conn_req_cnt_q0,
	    this->listener->tcp_conn_req_cnt_q, this->listener->tcp_conn_req_max);
	/* begin q0_limit */
	printf(" %d", this->listener->tcp_conn_req_max +
	    ((tcpparam_t *)&`tcp_param_arr)[2].tcp_param_val);
	/* end q0_limit */
	printf("\n");
	life[this->listener] = this->life = this->told;
}

/* A SYN; the probes behind it in the same function know by the thread whose it is. */
fbt:ip:tcp_conn_request:entry
/ this->listener != NULL /
{
	this->who = syn[curthread] =
	    this->life ? (uint64_t)this->listener << 16 | this->life & 0xffff : 0;
	@syn[this->who, this->listener->tcp_conn_req_cnt_q] = count();
}
mib:::tcpListenDrop { @drop[syn[curthread], 1] = count(); }	/* only syn_drops */
mib:::tcpListenDropQ0 { @drop[syn[curthread], 2] = count(); }	/* only syn_drops */
mib:::tcpHalfOpenDrop { @drop[syn[curthread], 3] = count(); }	/* only syn_drops */
mib:::tcpPassiveOpens { @opened[syn[curthread]] = count(); }	/* only half_open */

fbt:ip:tcp_eager_unlink:entry,						/* only departures */
fbt:ip:tcp_accept:return,						/* only tli_accepts */
fbt:ip:tcp_send_conn_ind:return						/* only established */
/ this->listener != NULL && this->life && this->up != NULL /
{
	start[this->up] = timestamp;
	@established[(uint64_t)this->listener << 16 | this->life & 0xffff] = count();
}
/* begin accepts */
fbt:ip:tcp_eager_unlink:entry
/ this->listener != NULL && this->life && this->taken /
{
	this->ns = 0;
	this->ns = (this->ns = start[this->eager]) > 1 ? timestamp - this->ns : 0;	/* only accept_wait */
	@accept[(uint64_t)this->listener << 16 | this->life & 0xffff, this->ns == 0 ? 14 :
	    this->ns <= 1 << 10 ? 0 : this->ns <= 1 << 12 ? 1 : this->ns <= 1 << 14 ? 2 :
	    this->ns <= 1 << 16 ? 3 : this->ns <= 1 << 18 ? 4 : this->ns <= 1 << 20 ? 5 :
	    this->ns <= 1 << 22 ? 6 : this->ns <= 1 << 24 ? 7 : this->ns <= 1 << 26 ? 8 :
	    this->ns <= 1 << 28 ? 9 : this->ns <= 1 << 30 ? 10 : this->ns <= 1L << 32 ? 11 :
	    this->ns <= 1L << 34 ? 12 : 13] = sum(10000000 * (this->ns / 1000) + 1);
	self->taken = NULL;
}
/* An accept that took nothing. */
fbt:ip:tcp_accept_swap:return,						/* only tli_accepts */
fbt:ip:tcp_wput_accept:return { self->taken = NULL; }
/* end accepts */
/* begin departures */
fbt:ip:tcp_eager_unlink:entry
/ this->listener != NULL && this->life && !this->taken /
{
	@left[(uint64_t)this->listener << 16 | this->life & 0xffff,
	    this->eager->tcp_eager_next_q0 == NULL] = count();
}
fbt:ip:tcp_eager_unlink:entry { start[(tcp_t *)arg0] = 0; }
/* end departures */

tick-1s, END
{
	second = timestamp / 1000000000;
	printa("syn %x %d %@d\n", @syn); trunc(@syn);
	printa("drop %x %d %@d\n", @drop); trunc(@drop);		/* only syn_drops */
	printa("opened %x %@d\n", @opened); trunc(@opened);		/* only half_open */
	printa("established %x %@d\n", @established); trunc(@established);	/* only established */
	printa("accept %x %d %@d\n", @accept); trunc(@accept);		/* only accepts */
	printa("left %x %d %@d\n", @left); trunc(@left);		/* only departures */
	printf("tick %d\n", timestamp);
}
