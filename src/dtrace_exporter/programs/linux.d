#!/usr/sbin/dtrace -s
/*
 * What happens at the TCP listen queues of a Linux host, counted in the kernel.
 *
 * Needs DTrace 2.x on a kernel with BTF. Runs by hand as it is, for every listener of the host;
 * dtrace-exporter fills in the numbers below and leaves out, from "begin X" to "end X" and lines
 * marked "only X", the optional parts that a kernel cannot do.
 *
 * One row a tick for each listening socket and kind of event since the set was last emptied:
 *
 *   row SET SOCKET WHO ADDRESS-HIGH ADDRESS-LOW QMAX COUNT SUM LAST
 *
 * WHO is 32 bits of network namespace, 16 of port, 16 of WHAT: DTrace 2 makes all keys as long as the
 * longest, and takes its time for each word of them.
 *
 *   WHAT      COUNT                                              SUM
 *   0-63      SYNs: 16 * outcome + tenths of Q/Qmax, rounded up   of Q at each
 *             (outcome 0 taken, 1 Q full, 2 Q0 full, 3 other; 11 tenths are more than Qmax)
 *   128       handshakes completed, connection put into Q
 *   129, 130  final ACKs dropped: Q full, other reason
 *   131       observations of other kinds: listen() was called, a half-open one is gone
 *   132       sockets that stopped listening
 *   144-157   accepts: by time in Q, up to 4^5, 4^6, ... 4^17 ns, more   of ns in Q
 *   158       accepts of a connection whose time in Q is not looked at
 *   256-8447  observations once a second of the listener whose SYNs may go the short way: 256 + TERM
 *
 * LAST is the newest observation of the queues: when, then 17 bits of Q0, then 17 bits of Q, all ones
 * where the number does not fit or the socket no longer listens.
 *
 * The short way: the SYNs of one listener at a time are counted by no more than is needed if they are
 * not dropped, one row for each Q that they found:
 *
 *   calm HOW COUNT
 *
 * HOW is the term, whose row of 256 + TERM tells which listener that is and its Qmax, then 9 bits of
 * Q. A term ends when the listener loses the short way, or has another Qmax.
 *
 * Two sets of aggregations take turns. Taking a key out of one that is in use would lose what was
 * counted meanwhile, so only the set at rest is emptied, half a generation after it was last used.
 * That of the short way is at rest in a generation after many terms.
 */
#pragma D option quiet
#pragma D option switchrate=10hz
#pragma D option aggsize=8m
#pragma D option dynvarsize=1m

/*
 * Which ports; how many ticks a set is in use, and the clock of LAST, 2^CLOCK ns, to fit in that.
 * Inlines are numbers only: on one that refers to a variable DTrace 2.0.7 corrupts its own memory.
 */
inline int FIRST_PORT = 0;
inline int LAST_PORT = 65535;
inline int TICKS = 60;
inline int CLOCK = 9;

/* After how many terms what they counted is thrown away. */
inline int MOST_TERMS = 32;

/*
 * Where the kernel counts its own drops (enum LINUX_MIB_*). It does so with softirqs off between
 * the entry and the return of the functions below, on the CPU that runs them, so a counter whose
 * last bit has changed was moved by that very call.
 */
inline int LISTENOVERFLOWS = 19;
inline int LISTENDROPS = 20;
inline int TCPREQQFULLDROP = 75;

/*
 * By CPU: the listener that a function was entered with, and those bits in its low ones. Of an
 * associative array each use is two look-ups, in memory that others may have used up; so the one for
 * SYNs is none. A CPU beyond its end is a fault at each SYN. With more than 32 KB of global variables
 * DTrace 2.0.7 mistakes one for another.
 */
uint64_t syn[3072];
uint64_t ack[int];
uint64_t est[int];
inline uint64_t NOBODY = 1;

/*
 * The listener whose SYNs go the short way: its address, but for the 16 bits that a kernel's addresses
 * have in common and the 6 that are zero, then 13 bits of its term; and apart its Qmax, which a SYN
 * has to find. One that had the short way until now, one that may be the next; how many listeners have
 * gone; how many terms since what they counted was last thrown away, and that it is at rest for that.
 */
uint64_t calm;
uint64_t calmmax;
uint64_t left;
uint64_t used;
uint64_t next;
uint64_t closes;
uint64_t term;
uint64_t terms;
uint64_t rests;

/*
 * A this-variable keeps what an earlier event left in it: every event has to set this->sk. Without
 * a declaration it would have the type of what the program's first assignment puts into it.
 */
this struct sock *sk;
this struct net *net;
this uint64_t *mib;
this uint64_t was;
this uint64_t now;
this uint64_t what;
this uint64_t sum;
this uint64_t q0;
this uint64_t q;
this uint64_t qmax;
this uint64_t tenths;
this uint64_t since;
this int64_t wait;
this uint64_t inum;
this int port;
this int v6;
this uint64_t calm;
this uint64_t fits;
this uint64_t gone;
this uint64_t me;
this int brief;
this int odd;
this uint64_t high;
this uint64_t low;
this uint64_t who;
this uint64_t last;
this int64_t when;
self struct sock *listener;
self struct sock *opening;

BEGIN
{
	generation = 0;
	ticks = 0;
	start0 = timestamp;
	start1 = timestamp;
	printf("\nready 3 %d\n", ((struct net *)&`init_net)->ns.inum);	/* place netns */
}

/* A generation begins. Every tick looks at the queues of the listener of the short way. */
tick-1s
/ ticks == TICKS /
{
	start0 = generation & 1 ? timestamp : start0;
	start1 = generation & 1 ? start1 : timestamp;
	generation++;
	ticks = 0;
	rests = terms >= MOST_TERMS;
	terms = rests ? 0 : terms;
}

tick-1s
{
	ticks++;
	this->when = timestamp;	/* this event's, before its state is read: a close is newer */
	this->gone = closes;
	this->calm = calm;
	this->me = this->calm ? (uint64_t)((int64_t)this->calm >> 22 << 6) : left ? left : next;
	this->sk = (struct sock *)this->me;
	this->sk = this->sk != NULL && this->sk->__sk_common.skc_state == 10 ? this->sk : NULL;
	this->what = 131;
	this->sum = 0;
}

/* A SYN that reached a listener, IPv4 or IPv6: tcp_conn_request(rsk_ops, af_ops, sk, skb). */
fbt::tcp_conn_request:entry
{
	this->sk = (struct sock *)arg2;
	this->port = this->sk->__sk_common.skc_num;
	this->was = this->port >= FIRST_PORT && this->port <= LAST_PORT ? arg2 : NOBODY;
	/* begin syn_drops */
	this->mib = this->was == NOBODY ? NULL : (uint64_t *)((uint64_t)
	    this->sk->__sk_common.skc_net.net->mib.net_statistics +
	    *((uint64_t *)&`__per_cpu_offset + cpu));
	this->was |= this->mib == NULL ? 0 : (this->mib[LISTENDROPS] & 1) |
	    (this->mib[LISTENOVERFLOWS] & 1) << 1 | (this->mib[TCPREQQFULLDROP] & 1) << 2;
	/* end syn_drops */
	syn[cpu] = this->was;
}

/* The short way: a SYN that is not dropped. */
fbt::tcp_conn_request:return
/ (this->brief = ((this->calm = calm) ^ (this->was = syn[cpu]) << 16) >> 22 == 0 &&
    (this->sk = (struct sock *)(this->was & ~7)) != NULL &&
    (this->mib = (uint64_t *)((uint64_t)			/* only syn_drops */
    this->sk->__sk_common.skc_net.net->mib.net_statistics +	/* only syn_drops */
    *((uint64_t *)&`__per_cpu_offset + cpu))) != NULL &&	/* only syn_drops */
    ((this->mib[LISTENDROPS] ^ this->was) & 1) == 0 &&		/* only syn_drops */
    (this->q = this->sk->sk_ack_backlog) < 512 &&
    this->sk->sk_max_ack_backlog == calmmax) /
{
	used = 1;
	@calm[this->calm & 0x3ffe00 | this->q] = count();
}

/* All others. */
fbt::tcp_conn_request:return
/ (this->sk = this->brief ? NULL : (struct sock *)(this->was & ~7)) != NULL /
{
	next = (uint64_t)this->sk;	/* only open_close */
	this->what = 0;
	/* begin syn_drops */
	/*
	 * Dropped? Q full? Q0 full, or so full that without SYN cookies what is left is kept for
	 * peers known to be good?
	 */
	this->net = this->sk->__sk_common.skc_net.net;
	this->mib = (uint64_t *)((uint64_t)this->net->mib.net_statistics +
	    *((uint64_t *)&`__per_cpu_offset + cpu));
	this->now = (this->mib[LISTENDROPS] & 1) |
	    (this->mib[LISTENOVERFLOWS] & 1) << 1 | (this->mib[TCPREQQFULLDROP] & 1) << 2;
	this->was = (this->was ^ this->now) & 7;
	this->q0 = ((struct inet_connection_sock *)this->sk)->icsk_accept_queue.qlen.counter;
	this->what = 16 * (!(this->was & 1) ? 0 : this->was & 2 ? 1 : this->was & 4 ||
	    this->net->ipv4.sysctl_tcp_syncookies == 0 &&
	    this->q0 > this->net->ipv4.sysctl_max_syn_backlog -
	    (this->net->ipv4.sysctl_max_syn_backlog >> 2) ? 2 : 3);
	/* end syn_drops */
	this->sum = this->sk->sk_ack_backlog;
	this->qmax = this->sk->sk_max_ack_backlog;
	this->qmax = this->qmax ? this->qmax : 1;
	this->tenths = (10 * this->sum + this->qmax - 1) / this->qmax;
	this->what += this->tenths < 11 ? this->tenths : 11;
}

/* begin ack_drops */
/* The final ACK, where the child is made: tcp_v4_syn_recv_sock(sk, ...), called by v6 if mapped. */
fbt::tcp_v4_syn_recv_sock:entry,
fbt::tcp_v6_syn_recv_sock:entry
{
	this->sk = (struct sock *)arg0;
	this->net = this->sk->__sk_common.skc_net.net;
	this->mib = (uint64_t *)((uint64_t)this->net->mib.net_statistics +
	    *((uint64_t *)&`__per_cpu_offset + cpu));
	this->now = (this->mib[LISTENDROPS] & 1) |
	    (this->mib[LISTENOVERFLOWS] & 1) << 1 | (this->mib[TCPREQQFULLDROP] & 1) << 2;
	ack[cpu] = this->sk->__sk_common.skc_num >= FIRST_PORT &&
	    this->sk->__sk_common.skc_num <= LAST_PORT ? arg0 | this->now : NOBODY;
}

fbt::tcp_v4_syn_recv_sock:return,
fbt::tcp_v6_syn_recv_sock:return
{
	this->was = ack[cpu];
	this->sk = (struct sock *)(this->was & ~7);
	ack[cpu] = NOBODY;
}

fbt::tcp_v4_syn_recv_sock:return,
fbt::tcp_v6_syn_recv_sock:return
/ this->sk != NULL /
{
	this->net = this->sk->__sk_common.skc_net.net;
	this->mib = (uint64_t *)((uint64_t)this->net->mib.net_statistics +
	    *((uint64_t *)&`__per_cpu_offset + cpu));
	this->now = (this->mib[LISTENDROPS] & 1) |
	    (this->mib[LISTENOVERFLOWS] & 1) << 1 | (this->mib[TCPREQQFULLDROP] & 1) << 2;
	this->was = (this->was ^ this->now) & 7;
	this->sk = this->was & 1 ? this->sk : NULL;
	this->what = this->was & 2 ? 129 : 130;
	this->sum = 0;
}
/* end ack_drops */

/* begin established */
/*
 * The child goes into Q: inet_csk_complete_hashdance(sk, child, req, own_req), or for SYN cookies
 * and TCP Fast Open inet_csk_reqsk_queue_add(sk, req, child) itself. Should one kernel's compiler
 * not have inlined the latter into the former, the inner return counts and the outer one does not.
 */
fbt::inet_csk_complete_hashdance:entry
{
	this->sk = (struct sock *)arg0;
	est[cpu] = arg3 & 1 && this->sk->__sk_common.skc_num >= FIRST_PORT &&
	    this->sk->__sk_common.skc_num <= LAST_PORT ? arg0 : NOBODY;
}

fbt::inet_csk_reqsk_queue_add:entry
{
	this->sk = (struct sock *)arg0;
	est[cpu] = this->sk->__sk_common.skc_num >= FIRST_PORT &&
	    this->sk->__sk_common.skc_num <= LAST_PORT ? arg0 : NOBODY;
}

fbt::inet_csk_complete_hashdance:return,
fbt::inet_csk_reqsk_queue_add:return
{
	this->was = est[cpu];
	this->sk = arg1 ? (struct sock *)(this->was & ~7) : NULL;
	est[cpu] = NOBODY;
	this->what = 128;
	this->sum = 0;
}
/* end established */

/* begin accepts */
/* accept(2) and its kin: inet_csk_accept(sk, ...) returns the child, or NULL. */
fbt::inet_csk_accept:entry
{
	this->sk = (struct sock *)arg0;
	self->listener = this->sk->__sk_common.skc_num >= FIRST_PORT &&
	    this->sk->__sk_common.skc_num <= LAST_PORT ? this->sk : NULL;
}

fbt::inet_csk_accept:return
{
	this->sk = arg1 ? self->listener : NULL;
	self->listener = NULL;
	this->what = 158;
	this->sum = 0;
}
/* end accepts */

/* begin accept_wait */
/* accept_wait needs accepts */
/*
 * tcp_init_transfer() stamps the child in rcvq_space.time, microseconds of the same clock, when the
 * handshake ends, and nothing changes it until the application reads. It is 0 when accept() was
 * quicker than that.
 */
fbt::inet_csk_accept:return
/ this->sk != NULL /
{
	this->since = ((struct tcp_sock *)arg1)->rcvq_space.time * 1000;
	this->wait = this->since ? (int64_t)(timestamp - this->since) : 0;
	this->sum = this->wait > 0 ? this->wait : 0;
	this->what = 144 + (
	    this->sum <= 0x400 ? 0 : this->sum <= 0x1000 ? 1 : this->sum <= 0x4000 ? 2 :
	    this->sum <= 0x10000 ? 3 : this->sum <= 0x40000 ? 4 : this->sum <= 0x100000 ? 5 :
	    this->sum <= 0x400000 ? 6 : this->sum <= 0x1000000 ? 7 : this->sum <= 0x4000000 ? 8 :
	    this->sum <= 0x10000000 ? 9 : this->sum <= 0x40000000 ? 10 :
	    this->sum <= 0x100000000 ? 11 : this->sum <= 0x400000000 ? 12 : 13);
}
/* end accept_wait */

/* begin half_open_end */
/*
 * A request is freed that never became a connection: Q0 is one less, if it was in there. One made for
 * a SYN cookie was not, nor for the final ACK that brings it back: these have no listener. Nor was
 * one of a SYN that was dropped: no SYN-ACK was made for it.
 */
fbt::tcp_v4_reqsk_destructor:entry,
fbt::tcp_v6_reqsk_destructor:entry
{
	this->sk = ((struct request_sock *)arg0)->__req_common.skc_listener;
	this->sk = this->sk != NULL && ((struct request_sock *)arg0)->sk == NULL &&
	    ((struct tcp_request_sock *)arg0)->snt_synack != 0 &&
	    (this->port = this->sk->__sk_common.skc_num) >= FIRST_PORT &&
	    this->port <= LAST_PORT && this->sk->__sk_common.skc_state == 10 ? this->sk : NULL;
	this->what = 131;
	this->sum = 0;
}
/* end half_open_end */

/* begin open_close */
/* inet_csk_listen_start(sk); inet_csk_listen_stop(sk), when the port may be given back already. */
fbt::inet_csk_listen_start:entry
{
	self->opening = (struct sock *)arg0;
}

fbt::inet_csk_listen_start:return
{
	this->sk = self->opening;
	self->opening = NULL;
	this->sk = arg1 == 0 && this->sk != NULL &&
	    this->sk->__sk_common.skc_num >= FIRST_PORT &&
	    this->sk->__sk_common.skc_num <= LAST_PORT ? this->sk : NULL;
	this->what = 131;
	this->sum = 0;
}

fbt::inet_csk_listen_stop:entry
{
	this->sk = (struct sock *)arg0;
	closes++;
	calm = (calm ^ (uint64_t)arg0 << 16) >> 22 ? calm : 0;
	next = next == arg0 ? 0 : next;
	this->what = 132;
	this->sum = 0;
}
/* end open_close */

/* Every event that found its listener: who that is, and its queues now. */
fbt::tcp_v4_syn_recv_sock:return,               /* only ack_drops */
fbt::tcp_v6_syn_recv_sock:return,               /* only ack_drops */
fbt::inet_csk_complete_hashdance:return,        /* only established */
fbt::inet_csk_reqsk_queue_add:return,           /* only established */
fbt::inet_csk_accept:return,                    /* only accepts */
fbt::tcp_v4_reqsk_destructor:entry,             /* only half_open_end */
fbt::tcp_v6_reqsk_destructor:entry,             /* only half_open_end */
fbt::inet_csk_listen_start:return,              /* only open_close */
fbt::inet_csk_listen_stop:entry,                /* only open_close */
tick-1s,
fbt::tcp_conn_request:return
/ this->sk != NULL /
{
	this->net = this->sk->__sk_common.skc_net.net;
	this->inum = this->net->ns.inum;
	this->port = this->sk->__sk_common.skc_num;
	this->v6 = this->sk->__sk_common.skc_family == 10;
	this->high = !this->v6 ? 0 :
	    ntohll(*(uint64_t *)&this->sk->__sk_common.skc_v6_rcv_saddr);
	this->low = !this->v6 ? 0xffff00000000 | ntohl(this->sk->__sk_common.skc_rcv_saddr) :
	    ntohll(*((uint64_t *)&this->sk->__sk_common.skc_v6_rcv_saddr + 1));
	this->qmax = this->sk->sk_max_ack_backlog;
	this->q = this->sk->sk_ack_backlog;
	this->q0 = ((struct inet_connection_sock *)this->sk)->icsk_accept_queue.qlen.counter;
	this->who = this->inum << 32 | (uint64_t)this->port << 16 | this->what;
	this->odd = generation & 1;
	this->last = this->what == 132 ? 0x3ffffffff :
	    (this->q0 < 0x1ffff ? this->q0 : 0x1ffff) << 17 | (this->q < 0x1ffff ? this->q : 0x1ffff);
}

/*
 * Which listener goes the short way for the next second: the one that did, if it had SYNs, or else the
 * next. One that does so no more is looked at once again, as a SYN may have been on its way.
 */
tick-1s
/ this->sk != NULL /
{
	this->me = (uint64_t)this->sk << 16;
	this->fits = (this->calm ? used && this->qmax == calmmax : left == 0 && terms < MOST_TERMS) &&
	    ((int64_t)this->me >> 22 << 6) == (int64_t)this->sk && closes == this->gone && !rests;
	terms += this->fits && this->calm == 0;
	term = this->fits && this->calm == 0 ? term + 1 & 0x1fff : term;
	this->who = this->fits ? this->who - 131 + 256 + term : this->who;
	left = this->calm && !this->fits ? (uint64_t)this->sk : 0;
	calm = this->fits ? calm : 0;	/* before calmmax is another */
	calmmax = this->qmax;
	calm = this->fits ? this->me | term << 9 : 0;
	next = 0;
	used = 0;
}

tick-1s
/ this->sk == NULL /
{
	calm = 0;
	left = 0;
	next = 0;
}

/* The set in use, the even one and the odd one. */
fbt::tcp_v4_syn_recv_sock:return,               /* only ack_drops */
fbt::tcp_v6_syn_recv_sock:return,               /* only ack_drops */
fbt::inet_csk_complete_hashdance:return,        /* only established */
fbt::inet_csk_reqsk_queue_add:return,           /* only established */
fbt::inet_csk_accept:return,                    /* only accepts */
fbt::tcp_v4_reqsk_destructor:entry,             /* only half_open_end */
fbt::tcp_v6_reqsk_destructor:entry,             /* only half_open_end */
fbt::inet_csk_listen_start:return,              /* only open_close */
fbt::inet_csk_listen_stop:entry,                /* only open_close */
tick-1s,
fbt::tcp_conn_request:return
/ this->sk != NULL && !this->odd /
{
	this->when = (int64_t)(timestamp - start0) >> CLOCK;
	this->when = this->when < 0 ? 0 : this->when < 0x1fffffff ? this->when : 0x1fffffff;
	@events0[(uint64_t)this->sk, this->who, this->high, this->low, this->qmax] = count();
	@sums0[(uint64_t)this->sk, this->who, this->high, this->low, this->qmax] = sum(this->sum);
	@last0[(uint64_t)this->sk, this->who, this->high, this->low, this->qmax] =
	    max(this->when << 34 | this->last);
}

fbt::tcp_v4_syn_recv_sock:return,               /* only ack_drops */
fbt::tcp_v6_syn_recv_sock:return,               /* only ack_drops */
fbt::inet_csk_complete_hashdance:return,        /* only established */
fbt::inet_csk_reqsk_queue_add:return,           /* only established */
fbt::inet_csk_accept:return,                    /* only accepts */
fbt::tcp_v4_reqsk_destructor:entry,             /* only half_open_end */
fbt::tcp_v6_reqsk_destructor:entry,             /* only half_open_end */
fbt::inet_csk_listen_start:return,              /* only open_close */
fbt::inet_csk_listen_stop:entry,                /* only open_close */
tick-1s,
fbt::tcp_conn_request:return
/ this->sk != NULL && this->odd /
{
	this->when = (int64_t)(timestamp - start1) >> CLOCK;
	this->when = this->when < 0 ? 0 : this->when < 0x1fffffff ? this->when : 0x1fffffff;
	@events1[(uint64_t)this->sk, this->who, this->high, this->low, this->qmax] = count();
	@sums1[(uint64_t)this->sk, this->who, this->high, this->low, this->qmax] = sum(this->sum);
	@last1[(uint64_t)this->sk, this->who, this->high, this->low, this->qmax] =
	    max(this->when << 34 | this->last);
}

/* The set in use and, once more when it has come to rest, the other, each behind its generation. */
tick-1s
/ !(generation & 1) || ticks <= 2 /
{
	printf("tick %d %d\n", generation & 1 ? generation - 1 : generation, timestamp);
	printa("row 0 %x %x %x %x %x %@d %@d %@d\n", @events0, @sums0, @last0);
}

tick-1s
/ generation & 1 || ticks <= 2 && generation > 0 /
{
	printf("tick %d %d\n", generation & 1 ? generation : generation - 1, timestamp);
	printa("row 1 %x %x %x %x %x %@d %@d %@d\n", @events1, @sums1, @last1);
}

tick-1s
{
	printa("calm %x %@d\n", @calm);
}

tick-1s
/ ticks == TICKS / 2 && rests /
{
	trunc(@calm);
}

tick-1s
/ ticks == TICKS / 2 && generation & 1 /
{
	trunc(@events0);
	trunc(@sums0);
	trunc(@last0);
}

tick-1s
/ ticks == TICKS / 2 && !(generation & 1) /
{
	trunc(@events1);
	trunc(@sums1);
	trunc(@last1);
}

END
{
	printf("tick %d %d\n", generation & 1 ? generation - 1 : generation, timestamp);
	printa("row 0 %x %x %x %x %x %@d %@d %@d\n", @events0, @sums0, @last0);
}

END
/ generation > 0 /
{
	printf("tick %d %d\n", generation & 1 ? generation : generation - 1, timestamp);
	printa("row 1 %x %x %x %x %x %@d %@d %@d\n", @events1, @sums1, @last1);
}

END
{
	printa("calm %x %@d\n", @calm);
}
