#!/usr/sbin/dtrace -s
/*
 * A line for each SYN that reaches a TCP listener of a Solaris 10 host, and for what became of it.
 *
 *   TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax
 *
 * Action is syn, drop:REASON, established or accept. Source IP is HIGH:LOW, the halves of an IPv6
 * address in hexadecimal, which dtrace-exporter turns into text. A line for each event is for
 * looking on: in a burst lines get lost, and dtrace(1) says how many.
 *
 * A struct ip compiled from netinet/ip.h would give the destination for the source: D's compiler
 * rounds each of its bit-fields up to a byte. So the packet is read by bytes, which fits either byte
 * order as well.
 */
#pragma D option quiet
#pragma D option switchrate=10hz
#pragma D option bufsize=4m

inline int FIRST_PORT = 0;
inline int LAST_PORT = 65535;

/* As in solaris10.d. */
inline int CONN_TCP = 0x28;
inline int CONN_LPORT = 0x10a;

/* What a thread is doing, by the address of the thread. */
uint64_t listening[uint64_t];
uint64_t packet[uint64_t];

this tcp_t *tcp;
this tcp_t *eager;
this mblk_t *mp;
this uint8_t *lport;
this uint8_t *ip;
this uint8_t *from;
this uint8_t *source;
this uint64_t me;
this uint64_t high;
this uint64_t low;
this int length;
this int port;
this int sport;
this int v4;

BEGIN
{
	printf("TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax\n");
}

/* A SYN that reached a listener: tcp_conn_request(connp, mp, squeue). */
fbt:ip:tcp_conn_request:entry
{
	this->me = (uint64_t)curthread;
	this->tcp = *(tcp_t **)((char *)arg0 + CONN_TCP);
	this->lport = (uint8_t *)this->tcp->tcp_connp + CONN_LPORT;
	this->port = this->lport[0] << 8 | this->lport[1];
	this->tcp = this->port >= FIRST_PORT && this->port <= LAST_PORT ? this->tcp : NULL;
	listening[this->me] = (uint64_t)this->tcp;
	packet[this->me] = this->tcp != NULL ? (uint64_t)((mblk_t *)arg1)->b_rptr : 0;
}

/*
 * IPv4: the header has as many words as its low nibble says, the source address at byte 12. IPv6:
 * the header has 40 bytes, the source address at byte 8; behind extension headers the port is not
 * looked for and given as 0. Neither: the packet came by IPsec, and its headers are elsewhere.
 */
fbt:ip:tcp_conn_request:entry,
mib:::tcpListenDrop,
mib:::tcpListenDropQ0,
mib:::tcpHalfOpenDrop
{
	this->me = (uint64_t)curthread;
	this->tcp = (tcp_t *)listening[this->me];
	this->ip = (uint8_t *)packet[this->me];
}

fbt:ip:tcp_conn_request:entry,
mib:::tcpListenDrop,
mib:::tcpListenDropQ0,
mib:::tcpHalfOpenDrop
/ this->tcp != NULL /
{
	this->lport = (uint8_t *)this->tcp->tcp_connp + CONN_LPORT;
	this->port = this->lport[0] << 8 | this->lport[1];
	this->v4 = this->ip[0] >> 4 == 4;
	this->length = this->v4 ? (this->ip[0] & 15) << 2 :
	    this->ip[0] >> 4 == 6 && this->ip[6] == 6 ? 40 : 0;
	this->source = this->ip + this->length;
	this->from = this->ip + (this->v4 ? 12 : 8);
	this->high = this->v4 ? 0xffff00000000 : (uint64_t)this->from[0] << 56 |
	    (uint64_t)this->from[1] << 48 | (uint64_t)this->from[2] << 40 |
	    (uint64_t)this->from[3] << 32 | (uint64_t)this->from[4] << 24 |
	    (uint64_t)this->from[5] << 16 | (uint64_t)this->from[6] << 8 | this->from[7];
	this->from += this->v4 ? 0 : 8;
	this->low = (uint64_t)this->from[0] << 24 | (uint64_t)this->from[1] << 16 |
	    (uint64_t)this->from[2] << 8 | this->from[3];
	this->low = this->v4 ? this->high | this->low : this->low << 32 |
	    (uint64_t)this->from[4] << 24 | (uint64_t)this->from[5] << 16 |
	    (uint64_t)this->from[6] << 8 | this->from[7];
	this->high = this->v4 ? 0 : this->high;
	this->sport = this->length ? this->source[0] << 8 | this->source[1] : 0;
}

fbt:ip:tcp_conn_request:entry
/ this->tcp != NULL /
{
	printf("%d,%Y,syn,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high, this->low,
	    this->sport, this->port, this->tcp->tcp_conn_req_cnt_q0,
	    this->tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_max);
}

mib:::tcpListenDrop
/ this->tcp != NULL /
{
	printf("%d,%Y,drop:q_full,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, this->sport, this->port, this->tcp->tcp_conn_req_cnt_q0,
	    this->tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_max);
}

mib:::tcpListenDropQ0
/ this->tcp != NULL /
{
	printf("%d,%Y,drop:q0_full,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, this->sport, this->port, this->tcp->tcp_conn_req_cnt_q0,
	    this->tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_max);
}

/* The source is that of the SYN for which another connection is thrown out. */
mib:::tcpHalfOpenDrop
/ this->tcp != NULL /
{
	printf("%d,%Y,drop:q0_evicted,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, this->sport, this->port, this->tcp->tcp_conn_req_cnt_q0,
	    this->tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_max);
}

fbt:ip:tcp_conn_request:return
{
	listening[(uint64_t)curthread] = 0;
	packet[(uint64_t)curthread] = 0;
}

/*
 * Into Q: tcp_send_conn_ind(listener, T_CONN_IND, squeue). Out of Q: tcp_wput_accept(queue,
 * T_CONN_RES), tcp_accept_swap(listener, acceptor, eager).
 */
fbt:ip:tcp_send_conn_ind:entry
{
	this->mp = (mblk_t *)arg1;
	this->eager = *(tcp_t **)(this->mp->b_rptr +
	    ((struct T_conn_ind *)this->mp->b_rptr)->OPT_offset);
}

fbt:ip:tcp_wput_accept:entry
{
	this->mp = (mblk_t *)arg1;
	this->eager = *(tcp_t **)(this->mp->b_rptr +
	    ((struct T_conn_res *)this->mp->b_rptr)->OPT_offset);
}

fbt:ip:tcp_accept_swap:entry
{
	this->eager = (tcp_t *)arg2;
}

/* The peer's address and port lie before the local port. */
fbt:ip:tcp_send_conn_ind:entry,
fbt:ip:tcp_wput_accept:entry,
fbt:ip:tcp_accept_swap:entry
{
	this->tcp = this->eager->tcp_listener;
	this->lport = (uint8_t *)this->tcp->tcp_connp + CONN_LPORT;
	this->port = this->lport[0] << 8 | this->lport[1];
	this->from = (uint8_t *)this->eager->tcp_connp + CONN_LPORT - 0x12;
	this->high = (uint64_t)this->from[0] << 56 | (uint64_t)this->from[1] << 48 |
	    (uint64_t)this->from[2] << 40 | (uint64_t)this->from[3] << 32 |
	    (uint64_t)this->from[4] << 24 | (uint64_t)this->from[5] << 16 |
	    (uint64_t)this->from[6] << 8 | this->from[7];
	this->low = (uint64_t)this->from[8] << 56 | (uint64_t)this->from[9] << 48 |
	    (uint64_t)this->from[10] << 40 | (uint64_t)this->from[11] << 32 |
	    (uint64_t)this->from[12] << 24 | (uint64_t)this->from[13] << 16 |
	    (uint64_t)this->from[14] << 8 | this->from[15];
	this->sport = this->from[16] << 8 | this->from[17];
}

fbt:ip:tcp_send_conn_ind:entry
/ this->port >= FIRST_PORT && this->port <= LAST_PORT /
{
	printf("%d,%Y,established,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, this->sport, this->port, this->tcp->tcp_conn_req_cnt_q0,
	    this->tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_max);
}

fbt:ip:tcp_wput_accept:entry,
fbt:ip:tcp_accept_swap:entry
/ this->port >= FIRST_PORT && this->port <= LAST_PORT /
{
	printf("%d,%Y,accept,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, this->sport, this->port, this->tcp->tcp_conn_req_cnt_q0,
	    this->tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_max);
}

/*
 * Only who prints learns that nobody reads any more: without this a dtrace(1) at the far end of an
 * ssh that has ended would stay until the next event. The exporter leaves the empty line out.
 */
tick-5s
{
	printf("\n");
}
