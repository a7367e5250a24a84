#!/usr/sbin/dtrace -s
/*
 * linux_trace.d - a line for each SYN that reaches a TCP listener, and for what became of it.
 *
 * USAGE: dtrace -s linux_trace.d	# every listener of the host; Ctrl-C ends it
 *
 *   TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax
 *
 * Action is syn, drop:REASON, established or accept. Source IP is HIGH:LOW, the halves of an IPv6
 * address in hexadecimal, which dtrace-exporter writes as usual. Q0, Q and Qmax of a SYN are those that
 * it found. This is for watching single connections: in a burst lines are lost, and dtrace(1) says how
 * many. All probes run with softirqs off; the head of linux.d says why.
 *
 * TESTED: DTrace 2.0.7 on Linux 6.12 and 6.1, x86-64.
 */
#pragma D option quiet
#pragma D option switchrate=10hz
#pragma D option bufsize=4m

inline int PORT = 0;			/* the port to watch; 0: all */
inline int LISTENOVERFLOWS = 19;	/* enum LINUX_MIB_* in include/uapi/linux/snmp.h */
inline int LISTENDROPS = 20;
inline int TCPREQQFULLDROP = 75;

struct sock *parents[uint64_t];		/* by connection: its listener */

this struct sock *sk, *child;
this struct sk_buff *skb;
this uint64_t *mib;
this uint16_t *ports;
this unsigned char *ip;
this uint64_t drops, overflows, full, high, low, q0, q, qmax;
this int v4;

BEGIN
{
	printf("TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax\n");
}

/* A SYN: (rsk_ops, af_ops, sk, skb). */
fbt::tcp_conn_request:entry
{
	this->sk = (struct sock *)arg2;
	this->sk = PORT == 0 || this->sk->__sk_common.skc_num == PORT ? this->sk : NULL;
}

fbt::tcp_conn_request:entry
/ this->sk != NULL /
{
	this->skb = (struct sk_buff *)arg3;
	this->mib = (uint64_t *)((uint64_t)this->sk->__sk_common.skc_net.net->mib.net_statistics +
	    *((uint64_t *)&`__per_cpu_offset + cpu));
	this->drops = this->mib[LISTENDROPS];
	this->overflows = this->mib[LISTENOVERFLOWS];
	this->full = this->mib[TCPREQQFULLDROP];
	this->q0 = ((struct inet_connection_sock *)this->sk)->icsk_accept_queue.qlen.counter;
	this->q = this->sk->sk_ack_backlog;
	this->qmax = this->sk->sk_max_ack_backlog;
	this->ip = this->skb->head + this->skb->network_header;
	this->ports = (uint16_t *)(this->skb->head + this->skb->transport_header);
	this->v4 = *(uint8_t *)this->ip >> 4 == 4;
	this->high = this->v4 ? 0 : ntohll(*(uint64_t *)(this->ip + 8));
	this->low = this->v4 ? 0xffff00000000 | ntohl(*(uint32_t *)(this->ip + 12)) :
	    ntohll(*(uint64_t *)(this->ip + 16));
	printf("%d,%Y,syn,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high, this->low,
	    ntohs(this->ports[0]), this->sk->__sk_common.skc_num, this->q0, this->q, this->qmax);
}

fbt::tcp_conn_request:return
/ this->sk != NULL && this->mib[LISTENDROPS] != this->drops /
{
	printf("%d,%Y,drop:%s,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp,
	    this->mib[LISTENOVERFLOWS] != this->overflows ? "q_full" :
	    this->mib[TCPREQQFULLDROP] != this->full ? "q0_full" : "other", this->high, this->low,
	    ntohs(this->ports[0]), this->sk->__sk_common.skc_num, this->q0, this->q, this->qmax);
}

/*
 * Into Q: inet_csk_complete_hashdance(sk, child, req, own_req), or for SYN cookies and TCP Fast Open
 * inet_csk_reqsk_queue_add(sk, req, child), which the former may call. Out of it: (child, socket).
 */
fbt::inet_csk_complete_hashdance:entry
{
	this->sk = arg3 & 1 ? (struct sock *)arg0 : NULL;
	this->child = (struct sock *)arg1;
}

fbt::inet_csk_reqsk_queue_add:entry
{
	this->sk = arg2 == (uint64_t)this->child ? NULL : (struct sock *)arg0;
	this->child = (struct sock *)arg2;
}

fbt::security_sock_graft:entry
{
	this->sk = parents[arg0];
	this->child = (struct sock *)arg0;
}

fbt::inet_csk_complete_hashdance:entry, fbt::inet_csk_reqsk_queue_add:entry,
fbt::security_sock_graft:entry
/ this->sk != NULL && (PORT == 0 || this->sk->__sk_common.skc_num == PORT) /
{
	this->v4 = this->child->__sk_common.skc_family == 2;
	this->high = this->v4 ? 0 :
	    ntohll(*(uint64_t *)&this->child->__sk_common.skc_v6_daddr);
	this->low = this->v4 ? 0xffff00000000 | ntohl(this->child->__sk_common.skc_daddr) :
	    ntohll(*((uint64_t *)&this->child->__sk_common.skc_v6_daddr + 1));
	this->q0 = ((struct inet_connection_sock *)this->sk)->icsk_accept_queue.qlen.counter;
	this->q = this->sk->sk_ack_backlog;
	this->qmax = this->sk->sk_max_ack_backlog;
}

fbt::inet_csk_complete_hashdance:entry, fbt::inet_csk_reqsk_queue_add:entry
/ this->sk != NULL && (PORT == 0 || this->sk->__sk_common.skc_num == PORT) /
{
	parents[(uint64_t)this->child] = this->sk;
	printf("%d,%Y,established,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, ntohs(this->child->__sk_common.skc_dport), this->sk->__sk_common.skc_num,
	    this->q0, this->q, this->qmax);
}

fbt::security_sock_graft:entry
/ this->sk != NULL && (PORT == 0 || this->sk->__sk_common.skc_num == PORT) /
{
	printf("%d,%Y,accept,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, ntohs(this->child->__sk_common.skc_dport), this->sk->__sk_common.skc_num,
	    this->q0, this->q, this->qmax);
}

fbt::inet_csk_complete_hashdance:return
{
	this->child = NULL;
}

/*
 * Without output dtrace(1) would not notice that its reader has gone: it would stay on a remote host
 * until the next event after the ssh has ended. The exporter ignores the empty line.
 */
tick-5s
{
	printf("\n");
}
