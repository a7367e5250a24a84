#!/usr/sbin/dtrace -s
/*
 * A line for each SYN that reaches a TCP listener of a Linux host, and for what became of it.
 *
 *   TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax
 *
 * Action is syn, drop:REASON, established or accept. Source IP is HIGH:LOW, the halves of an IPv6
 * address in hexadecimal, which dtrace-exporter turns into text. A line for each event is for
 * looking on: in a burst lines get lost, and dtrace(1) says how many.
 */
#pragma D option quiet
#pragma D option switchrate=10hz
#pragma D option bufsize=4m

inline int FIRST_PORT = 0;
inline int LAST_PORT = 65535;

/* As in linux.d: the kernel's own drop counters, whose last bits tell what a call did. */
inline int LISTENOVERFLOWS = 19;
inline int LISTENDROPS = 20;
inline int TCPREQQFULLDROP = 75;

uint64_t syn[int];
uint64_t packet[int];
uint64_t before[int];
inline uint64_t NOBODY = 8;

this struct sock *sk;
this struct sock *child;
this struct sk_buff *skb;
this uint64_t *mib;
this uint16_t *ports;
this unsigned char *ip;
this uint64_t was;
this uint64_t high;
this uint64_t low;
this uint64_t q0;
this int v4;
self struct sock *listener;

BEGIN
{
	printf("TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax\n");
}

fbt::tcp_conn_request:entry
{
	this->sk = (struct sock *)arg2;
	this->mib = (uint64_t *)((uint64_t)this->sk->__sk_common.skc_net.net->mib.net_statistics +
	    *((uint64_t *)&`__per_cpu_offset + cpu));
	packet[cpu] = arg3;
	before[cpu] = ((struct inet_connection_sock *)this->sk)->icsk_accept_queue.qlen.counter;
	syn[cpu] = this->sk->__sk_common.skc_num >= FIRST_PORT &&
	    this->sk->__sk_common.skc_num <= LAST_PORT ? arg2 | (this->mib[LISTENDROPS] & 1) |
	    (this->mib[LISTENOVERFLOWS] & 1) << 1 | (this->mib[TCPREQQFULLDROP] & 1) << 2 : NOBODY;
}

fbt::tcp_conn_request:return
/ (this->was = syn[cpu]) > NOBODY /
{
	this->sk = (struct sock *)(this->was & ~7);
	this->mib = (uint64_t *)((uint64_t)this->sk->__sk_common.skc_net.net->mib.net_statistics +
	    *((uint64_t *)&`__per_cpu_offset + cpu));
	this->was = (this->was ^ ((this->mib[LISTENDROPS] & 1) |
	    (this->mib[LISTENOVERFLOWS] & 1) << 1 | (this->mib[TCPREQQFULLDROP] & 1) << 2)) & 7;
	this->skb = (struct sk_buff *)packet[cpu];
	this->ip = this->skb->head + this->skb->network_header;
	this->ports = (uint16_t *)(this->skb->head + this->skb->transport_header);
	this->v4 = *(uint8_t *)this->ip >> 4 == 4;
	this->high = this->v4 ? 0 : ntohll(*(uint64_t *)(this->ip + 8));
	this->low = this->v4 ? 0xffff00000000 | ntohl(*(uint32_t *)(this->ip + 12)) :
	    ntohll(*(uint64_t *)(this->ip + 16));
	this->q0 = before[cpu];
	printf("%d,%Y,syn,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high, this->low,
	    ntohs(this->ports[0]), this->sk->__sk_common.skc_num,
	    this->q0, this->sk->sk_ack_backlog, this->sk->sk_max_ack_backlog);
}

fbt::tcp_conn_request:return
/ this->was > 0 && this->was < NOBODY && this->was & 1 && syn[cpu] > NOBODY /
{
	printf("%d,%Y,drop:%s,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp,
	    this->was & 2 ? "q_full" : this->was & 4 ? "q0_full" : "other", this->high, this->low,
	    ntohs(this->ports[0]), this->sk->__sk_common.skc_num,
	    this->q0, this->sk->sk_ack_backlog, this->sk->sk_max_ack_backlog);
}

fbt::inet_csk_complete_hashdance:entry
/ arg3 & 1 && (this->sk = (struct sock *)arg0)->__sk_common.skc_num >= FIRST_PORT &&
    this->sk->__sk_common.skc_num <= LAST_PORT /
{
	this->child = (struct sock *)arg1;
	this->v4 = this->child->__sk_common.skc_family == 2;
	this->high = this->v4 ? 0 :
	    ntohll(*(uint64_t *)&this->child->__sk_common.skc_v6_daddr);
	this->low = this->v4 ? 0xffff00000000 | ntohl(this->child->__sk_common.skc_daddr) :
	    ntohll(*((uint64_t *)&this->child->__sk_common.skc_v6_daddr + 1));
	printf("%d,%Y,established,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, ntohs(this->child->__sk_common.skc_dport), this->sk->__sk_common.skc_num,
	    ((struct inet_connection_sock *)this->sk)->icsk_accept_queue.qlen.counter,
	    this->sk->sk_ack_backlog, this->sk->sk_max_ack_backlog);
}

fbt::inet_csk_accept:entry
{
	this->sk = (struct sock *)arg0;
	self->listener = this->sk->__sk_common.skc_num >= FIRST_PORT &&
	    this->sk->__sk_common.skc_num <= LAST_PORT ? this->sk : NULL;
}

fbt::inet_csk_accept:return
/ self->listener != NULL && arg1 != 0 /
{
	this->sk = self->listener;
	this->child = (struct sock *)arg1;
	this->v4 = this->child->__sk_common.skc_family == 2;
	this->high = this->v4 ? 0 :
	    ntohll(*(uint64_t *)&this->child->__sk_common.skc_v6_daddr);
	this->low = this->v4 ? 0xffff00000000 | ntohl(this->child->__sk_common.skc_daddr) :
	    ntohll(*((uint64_t *)&this->child->__sk_common.skc_v6_daddr + 1));
	printf("%d,%Y,accept,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, ntohs(this->child->__sk_common.skc_dport), this->sk->__sk_common.skc_num,
	    ((struct inet_connection_sock *)this->sk)->icsk_accept_queue.qlen.counter,
	    this->sk->sk_ack_backlog, this->sk->sk_max_ack_backlog);
}

fbt::inet_csk_accept:return
{
	self->listener = NULL;
}

/*
 * Only who prints learns that nobody reads any more: without this a dtrace(1) at the far end of an
 * ssh that has ended would stay until the next event. The exporter leaves the empty line out.
 */
tick-5s
{
	printf("\n");
}
