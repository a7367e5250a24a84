#!/usr/sbin/dtrace -s
/*
 * linux_senders.d - who sends SYNs to TCP listeners, and whose are dropped, counted in the kernel.
 *
 * USAGE: dtrace -s linux_senders.d	# every listener of the host; Ctrl-C ends it
 *   set 4149083708239
 *   syn 0 0 ffffc0a80102 5
 *   syn 1 0 0 12
 *   drop 0 0 ffffc0a80102 q_full 2
 *   set 4149083708240
 *   tick 4150079441297
 *
 * syn OTHERS HIGH LOW EVENTS: SYNs, including those that were dropped or sent again. HIGH and LOW are
 *	the halves of the sender's IPv6 address in hexadecimal; with NETS, those of its network, /48,
 *	or /24 for IPv4. OTHERS is 1 in the row of all senders that have no row of their own.
 * drop OTHERS HIGH LOW REASON EVENTS: those of them that were dropped; REASON is q_full, q0_full or other
 * set BEGAN: the next rows have the counts since BEGAN; they are printed again each second
 * tick TIME: the heartbeat, after all rows of counts
 *
 * At most 1,024 senders have a row of their own in a turn. The hash of a sender selects a slot, which
 * belongs to the first one until the next turn. So a flood has few rows, and all of its SYNs are in them
 * or in the row of the others. Two sets of aggregations take turns, and all probes run with softirqs off;
 * the head of linux.d says why.
 * TESTED: DTrace 2.0.7 on Linux 6.12 and 6.1, x86-64. Not exact with PREEMPT_RT.
 */
#pragma D option quiet
#pragma D option switchrate=10hz
#pragma D option aggsize=8m

inline int PORT = 0;			/* the port to watch; 0: all */
inline int NETS = 0;			/* 1: by network; 0: by address */
inline int64_t TURN = 30000000000;	/* ns; a set is in use for two turns, and at rest for two */
inline int LISTENOVERFLOWS = 19;	/* enum LINUX_MIB_* in include/uapi/linux/snmp.h */
inline int LISTENDROPS = 20;
inline int TCPREQQFULLDROP = 75;

uint64_t owner[1024];	/* by slot: its sender, and in the last byte the turn; 0 if it is free */

this struct sock *sk;
this struct sk_buff *skb;
this uint64_t *mib;
this unsigned char *ip;
this uint64_t drops, overflows, full, high, low, print, slot, mark, set;
this int v4, others;
this int64_t over;

BEGIN { turn = 0; turned = began0 = timestamp; began1 = began0 + 1; }

/* A SYN: (rsk_ops, af_ops, sk, skb). The kernel counts a drop on this CPU before it returns. */
fbt::tcp_conn_request:entry
{
	this->sk = (struct sock *)arg2;
	this->sk = PORT == 0 || this->sk->__sk_common.skc_num == PORT ? this->sk : NULL;
}
fbt::tcp_conn_request:entry
/ this->sk != NULL /
{
	this->mib = (uint64_t *)((uint64_t)this->sk->__sk_common.skc_net.net->mib.net_statistics +
	    *((uint64_t *)&`__per_cpu_offset + cpu));
	this->drops = this->mib[LISTENDROPS];
	this->overflows = this->mib[LISTENOVERFLOWS];
	this->full = this->mib[TCPREQQFULLDROP];
	this->skb = (struct sk_buff *)arg3;
	this->ip = this->skb->head + this->skb->network_header;
	this->v4 = *(uint8_t *)this->ip >> 4 == 4;
	this->high = this->v4 ? 0 : ntohll(*(uint64_t *)(this->ip + 8));
	this->low = this->v4 ? 0xffff00000000 | ntohl(*(uint32_t *)(this->ip + 12)) :
	    ntohll(*(uint64_t *)(this->ip + 16));
	this->high = NETS ? this->high & 0xffffffffffff0000 : this->high;
	this->low = NETS ? (this->v4 ? this->low & 0xffffffffff00 : 0) : this->low;
	this->set = turn & 2;
	/* In this turn the slot is free, or belongs to the sender or to another one. */
	this->print = (this->high * 0x9e3779b97f4a7c15 ^ this->low) * 0x61c8864680b583eb;
	this->slot = this->print >> 54;
	this->mark = this->print & 0xffffffffffffff00 | 0x80 | turn & 0x7f;
	this->others = owner[this->slot] != this->mark &&
	    (owner[this->slot] & 0xff) == (this->mark & 0xff);
	owner[this->slot] = this->others ? owner[this->slot] : this->mark;
	this->high = this->others ? 0 : this->high;
	this->low = this->others ? 0 : this->low;
}

/* Count in the set that was in use at the entry. */
fbt::tcp_conn_request:return
/ this->sk != NULL && this->set == 0 /
{ @syn0[this->others, this->high, this->low] = sum(1); }
fbt::tcp_conn_request:return
/ this->sk != NULL && this->set != 0 /
{ @syn1[this->others, this->high, this->low] = sum(1); }
fbt::tcp_conn_request:return
/ this->sk != NULL && this->mib[LISTENDROPS] != this->drops && this->set == 0 /
{
	@drop0[this->others, this->high, this->low,
	    this->mib[LISTENOVERFLOWS] != this->overflows ? "q_full" :
	    this->mib[TCPREQQFULLDROP] != this->full ? "q0_full" : "other"] = sum(1);
}
fbt::tcp_conn_request:return
/ this->sk != NULL && this->mib[LISTENDROPS] != this->drops && this->set != 0 /
{
	@drop1[this->others, this->high, this->low,
	    this->mib[LISTENOVERFLOWS] != this->overflows ? "q_full" :
	    this->mib[TCPREQQFULLDROP] != this->full ? "q0_full" : "other"] = sum(1);
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
	printf("set %d\n", began0);
	printa("syn %d %x %x %@d\n", @syn0);
	printa("drop %d %x %x %s %@d\n", @drop0);
	printf("set %d\n", began1);
	printa("syn %d %x %x %@d\n", @syn1);
	printa("drop %d %x %x %s %@d\n", @drop1);
	printf("tick %d\n", timestamp);
}
tick-1s
/ this->over && turn % 4 == 1 / { trunc(@syn1); trunc(@drop1); }
tick-1s
/ this->over && turn % 4 == 3 / { trunc(@syn0); trunc(@drop0); }
