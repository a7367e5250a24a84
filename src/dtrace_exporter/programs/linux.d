#!/usr/sbin/dtrace -s
/*
 * linux.d - what becomes of incoming connections at each TCP listener, counted in the kernel.
 *
 * USAGE: dtrace -s linux.d	# Ctrl-C ends it. Backlog 3, five clients, two accepts; some rows:
 *   ready 5 4026531840
 *   listener ffc72647b0d68001 4149095541188 10 4026531840 1 127.0.0.1 7001 0 0 3
 *   tick 4150079441297
 *   set 4149083708239
 *   count ffc72647b0d68001 10 3 10 30000001
 *   count ffc72647b0d68001 31 0 3 1520000004
 *   count ffc72647b0d68001 40 0 9 2650110000001
 *   q ffc72647b0d68001 3 3590244510000002
 *   q0 ffc72647b0d68001 1981563960000000
 *
 * listener ID TIME STATE NETNS COOKIE ADDRESS PORT Q0 Q QMAX: the listener ID, and its queues at TIME,
 *	ns since boot; STATE 10 is LISTEN. Each listen() makes a new ID, because memory is reused.
 * tick TIME, set BEGAN: the heartbeat; the next rows have the counts since BEGAN
 * count ID WHAT QMAX PART VALUE+EVENTS: SYNs that were taken or answered by a cookie (10), dropped as
 *	Q (11) or Q0 (12) was full, or otherwise (13); VALUE is the Q that they found, PART the tenths
 *	of Q/QMAX, rounded up, 11 if more. Final ACKs dropped as Q was full (21) or otherwise (23).
 *	SYN-ACKs sent again (50). Put into Q (30), and if measured VALUE us after the SYN-ACK (31).
 *	Accepted (40) after VALUE us in Q. PART is 0 to 12 up to 4^5, ... 4^17 ns, 13 if more.
 * q ID QMAX NS+Q, q0 ID NS+Q0: the newest length, and how long after BEGAN it was observed
 * A+B is A times 10,000,000 plus B: sum() and max() keep two numbers at the price of one.
 * Two sets of aggregations take turns: one at rest is printed for a while and then emptied; in use it
 * would lose counts. DTrace 2 skips a probe, without a report, while another one of the same consumer
 * runs on the CPU. So these run with softirqs off, others are in linux_calls.d: docs/how-it-works.md.
 * TESTED: DTrace 2.0.7 on Linux 6.12 and 6.1, x86-64. Not exact with PREEMPT_RT.
 */
#pragma D option quiet
#pragma D option switchrate=10hz
#pragma D option aggsize=8m
#pragma D option dynvarsize=4m

inline int PORT = 0;			/* the port to watch; 0: all */
inline int64_t TURN = 30000000000;	/* ns; a set is in use for two turns, and at rest for two */
inline int LISTENOVERFLOWS = 19;	/* enum LINUX_MIB_* in include/uapi/linux/snmp.h */
inline int LISTENDROPS = 20;

/* By ten bits of a socket's hash: its listen()s, and the last row; by its address: its last row. */
uint64_t listens[1024], seen[1024], told[uint64_t];
uint64_t parents[uint64_t];	/* by connection: the ID of its listener */
/* An ID is bits 6 to 56 of the address, the only ones that differ, and 13 bits of its listen()s. */
/* Per CPU: what the entry of a function stores here is there at its return. */
this struct sock *sk, *child;
this struct net *net, *known;
this uint64_t *mib, offset, drops, overflows, slot, id, mark, found, added, qs, q0, what;
this uint64_t qmax, part, value;
this int64_t now, ns, over;
inline int POWER =			/* of 4, which this->ns is up to: 0 is 5 */
    this->ns <= 1024 ? 0 : this->ns <= 4096 ? 1 : this->ns <= 16384 ? 2 : this->ns <= 65536 ? 3 :
    this->ns <= 262144 ? 4 : this->ns <= 1048576 ? 5 : this->ns <= 4194304 ? 6 :
    this->ns <= 16777216 ? 7 : this->ns <= 67108864 ? 8 : this->ns <= 268435456 ? 9 :
    this->ns <= 1073741824 ? 10 : this->ns <= 4294967296 ? 11 : this->ns <= 17179869184 ? 12 : 13;
BEGIN
{
	turn = 0; turned = began0 = timestamp; began1 = began0 + 1;
	printf("\nready 5 %d\n", ((struct net *)&`init_net)->ns.inum);
}
/* Declares what is printed even if no part fills it: the first use of an aggregation sets its types. */
BEGIN / 0 / { @q0[this->id, this->qs] = max(this->now); @half0[this->id] = max(this->now); }
BEGIN / 0 / { @q1[this->id, this->qs] = max(this->now); @half1[this->id] = max(this->now); }

/* A SYN: (rsk_ops, af_ops, sk, skb). One read gets Q and Qmax, which are side by side. */
fbt::tcp_conn_request:entry
{
	this->sk = (struct sock *)arg2;
	this->found = *(uint64_t *)&this->sk->sk_ack_backlog;
}
/* A final ACK: (sk, ...). A connection for Q: (sk, ...). A half-open one is dropped: (sk, req). */
fbt::tcp_v*_syn_recv_sock:entry, fbt::inet_csk_reqsk_queue_add:entry,
fbt::inet_csk_reqsk_queue_drop:entry
{ this->sk = (struct sock *)arg0; this->added = 0; }
/* The timer of a half-open one, a second after its SYN and later: (timer). */
fbt::reqsk_timer_handler:entry
{
	this->sk = ((struct request_sock *)(arg0 - offsetof(struct request_sock, rsk_timer)))->
	    __req_common.skc_listener;
}
/* A SYN-ACK is sent again: (sk, req). Of Fast Open sk is the child. */
fbt::tcp_rtx_synack:entry
{ this->sk = ((struct request_sock *)arg1)->__req_common.skc_listener; }
/* accept(): (child, socket). Of MPTCP the child is the first subflow. */
fbt::security_sock_graft:entry
{
	this->child = (struct sock *)arg0;
	this->id = parents[arg0];
	this->child = this->id == 0 && this->child->sk_protocol == 262 ?	/* only mptcp */
	    ((struct mptcp_sock *)arg0)->first : this->child;			/* only mptcp */
	this->id = this->id ? this->id : parents[(uint64_t)this->child];	/* only mptcp */
	this->sk = this->id && (PORT == 0 || this->child->__sk_common.skc_num == PORT) ?
	    (struct sock *)(this->id >> 13 << 6 | 0xfe00000000000000) : NULL;
}
/* listen(), and bind(): (bucket, sk). */
fbt::inet_csk_update_fastreuse:entry
{
	this->sk = ((struct sock *)arg1)->__sk_common.skc_state == 10 ? (struct sock *)arg1 : NULL;
	listens[(uint64_t)arg1 * 0x61c8864680b583eb >> 54] += this->sk != NULL;
}

/* The listener's row, if it is watched; printed again in each turn, as a row may get lost. */
fbt::tcp_conn_request:entry, fbt::tcp_v*_syn_recv_sock:entry, fbt::reqsk_timer_handler:entry,
fbt::inet_csk_reqsk_queue_add:entry, fbt::inet_csk_reqsk_queue_drop:entry,
fbt::inet_csk_update_fastreuse:entry, fbt::tcp_rtx_synack:entry
/ this->sk != NULL &&
    seen[this->slot = (uint64_t)this->sk * 0x61c8864680b583eb >> 54] != (this->mark = turn +
    (this->id = (uint64_t)this->sk << 7 | listens[this->slot] & 0x1fff)) &&
    (PORT == 0 || this->sk->__sk_common.skc_num == PORT || (this->sk = NULL) != NULL) &&
    (seen[this->slot] = this->mark) != told[(uint64_t)this->sk] /
{
	told[(uint64_t)this->sk] = this->mark;
	this->net = this->sk->__sk_common.skc_net.net;
	printf("listener %x %d %d %d %d %s %d %d %d %d\n", this->id, timestamp,
	    this->sk->__sk_common.skc_state, this->net->ns.inum, this->net->net_cookie,
	    this->sk->__sk_common.skc_family == AF_INET6 ?
	    inet_ntoa6(&this->sk->__sk_common.skc_v6_rcv_saddr) :
	    inet_ntoa(&this->sk->__sk_common.skc_rcv_saddr), this->sk->__sk_common.skc_num,
	    ((struct inet_connection_sock *)this->sk)->icsk_accept_queue.qlen.counter,
	    this->sk->sk_ack_backlog, this->sk->sk_max_ack_backlog);
}
/* The kernel counts their drops, on this CPU, before they return. */
fbt::tcp_conn_request:entry, fbt::tcp_v*_syn_recv_sock:entry
/ this->sk != NULL /
{
	this->net = this->sk->__sk_common.skc_net.net;
	this->offset = this->offset ? this->offset : *((uint64_t *)&`__per_cpu_offset + cpu);
	this->mib = this->net == this->known ? this->mib :
	    (uint64_t *)(this->offset + (uint64_t)this->net->mib.net_statistics);
	this->known = this->net;
	this->drops = this->mib[LISTENDROPS];
	this->overflows = this->mib[LISTENOVERFLOWS];
}

fbt::tcp_conn_request:return / this->sk != NULL /
{
	this->value = this->found & 0xffffffff;
	this->qmax = this->found >> 32 ? this->found >> 32 : 1;
	this->part = (10 * this->value + this->qmax - 1) / this->qmax;
	this->part = this->part < 11 ? this->part : 11;
	this->what = this->mib[LISTENDROPS] == this->drops ? 10 :
	    this->mib[LISTENOVERFLOWS] != this->overflows ? 11 :
	    this->net->ipv4.sysctl_tcp_syncookies == 0 && ((this->q0 =
	    ((struct inet_connection_sock *)this->sk)->icsk_accept_queue.qlen.counter) >=
	    this->qmax || this->q0 > this->net->ipv4.sysctl_max_syn_backlog / 4 * 3) ? 12 : 13;
}
fbt::tcp_v*_syn_recv_sock:return
/ this->sk != NULL && arg1 == 0 && this->mib[LISTENDROPS] != this->drops /
{
	this->what = this->mib[LISTENOVERFLOWS] != this->overflows ? 21 : 23;
	this->drops = this->mib[LISTENDROPS];	/* with Fast Open, this is within a SYN */
	@count0[this->id, this->what, 0, 0] = sum(turn & 2 ? 0 : 1);
	@count1[this->id, this->what, 0, 0] = sum(turn & 2 ? 1 : 0);
}
fbt::tcp_rtx_synack:return / this->sk != NULL && (int)arg1 == 0 /
{
	@count0[this->id, 50, 0, 0] = sum(turn & 2 ? 0 : 1);
	@count1[this->id, 50, 0, 0] = sum(turn & 2 ? 1 : 0);
}
/* The child is in Q. If one of these calls the other, the inner one counts. */
fbt::inet_csk_complete_hashdance:return, fbt::inet_csk_reqsk_queue_add:return
/ this->sk != NULL && (this->what = arg1 != this->added ? 30 : 0) /
{
	this->added = arg1; parents[arg1] = this->id;
	this->value = this->part = 0;
	this->now = timestamp;	/* before it looks, so that the newest has seen the last */
	this->qs = *(uint64_t *)&this->sk->sk_ack_backlog;
	this->q0 = ((struct inet_connection_sock *)this->sk)->icsk_accept_queue.qlen.counter;
	/* begin handshake */
	/* In 1/8 us, and not 0, if tcp_synack_rtt_meas() took it. A new child is in SYN_RECV. */
	this->ns = ((struct tcp_sock *)arg1)->srtt_us;
	this->what += this->ns && ((struct sock *)arg1)->__sk_common.skc_state == 3;
	this->ns = this->what == 31 ? this->ns / 8 * 1000 : 0;
	this->part = this->what == 31 ? POWER : 0;
	this->value = this->ns / 1000;
	/* end handshake */
}
fbt::security_sock_graft:entry / this->sk != NULL /
{
	this->what = 40; this->value = 0; this->part = 14;	/* not measured */
	this->now = timestamp;
	this->qs = *(uint64_t *)&this->sk->sk_ack_backlog;
	/* begin accept_wait */
	/* tcp_init_transfer() has set this time, in microseconds, unless accept() was quicker. */
	this->ns = ((struct tcp_sock *)this->child)->rcvq_space.time * 1000;
	this->ns = this->ns && this->now > this->ns ? this->now - this->ns : 0;
	this->part = POWER;
	this->value = this->ns / 1000;
	/* end accept_wait */
}

/* Count in the set in use. */
fbt::tcp_conn_request:return / this->sk != NULL && !(turn & 2) /
{ @count0[this->id, this->what, this->qmax, this->part] = sum(10000000 * this->value + 1); }
fbt::tcp_conn_request:return / this->sk != NULL && turn & 2 /
{ @count1[this->id, this->what, this->qmax, this->part] = sum(10000000 * this->value + 1); }
fbt::inet_csk_complete_hashdance:return, fbt::inet_csk_reqsk_queue_add:return
/ this->sk != NULL && this->what && !(turn & 2) /
{
	@count0[this->id, this->what, 0, this->part] = sum(10000000 * this->value + 1);
	@q0[this->id, this->qs >> 32] = max(10000000 * (this->now - began0) + (uint32_t)this->qs);
	@half0[this->id] = max(10000000 * (this->now - began0) + this->q0);
}
fbt::inet_csk_complete_hashdance:return, fbt::inet_csk_reqsk_queue_add:return
/ this->sk != NULL && this->what && turn & 2 /
{
	@count1[this->id, this->what, 0, this->part] = sum(10000000 * this->value + 1);
	@q1[this->id, this->qs >> 32] = max(10000000 * (this->now - began1) + (uint32_t)this->qs);
	@half1[this->id] = max(10000000 * (this->now - began1) + this->q0);
}
fbt::security_sock_graft:entry / this->sk != NULL && !(turn & 2) /
{
	@count0[this->id, this->what, 0, this->part] = sum(10000000 * this->value + 1);
	@q0[this->id, this->qs >> 32] = max(10000000 * (this->now - began0) + (uint32_t)this->qs);
}
fbt::security_sock_graft:entry / this->sk != NULL && turn & 2 /
{
	@count1[this->id, this->what, 0, this->part] = sum(10000000 * this->value + 1);
	@q1[this->id, this->qs >> 32] = max(10000000 * (this->now - began1) + (uint32_t)this->qs);
}
fbt::inet_csk_reqsk_queue_drop:return, fbt::reqsk_timer_handler:return
/ this->sk != NULL /
{
	this->now = timestamp;
	this->q0 = ((struct inet_connection_sock *)this->sk)->icsk_accept_queue.qlen.counter;
	@half0[this->id] = max(turn & 2 ? 0 : 10000000 * (this->now - began0) + this->q0);
	@half1[this->id] = max(turn & 2 ? 10000000 * (this->now - began1) + this->q0 : 0);
}

tick-1s
/ (this->over = timestamp - turned > TURN) /
{
	turned = timestamp; turn++;
	began0 = turn % 4 == 0 ? turned : began0;
	began1 = turn % 4 == 2 ? turned : began1;
}
tick-1s, END
{
	printf("tick %d\nset %d\n", timestamp, began0);
	printa("count %x %d %d %d %@d\n", @count0);
	printa("q %x %d %@d\n", @q0);
	printa("q0 %x %@d\n", @half0);
	printf("set %d\n", began1);
	printa("count %x %d %d %d %@d\n", @count1);
	printa("q %x %d %@d\n", @q1);
	printa("q0 %x %@d\n", @half1);
}
tick-1s / this->over && turn % 4 == 1 / { trunc(@count1); trunc(@q1); trunc(@half1); }
tick-1s / this->over && turn % 4 == 3 / { trunc(@count0); trunc(@q0); trunc(@half0); }
