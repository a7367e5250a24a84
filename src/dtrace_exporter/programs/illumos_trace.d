#!/usr/sbin/dtrace -s
/*
 * A line for each SYN that reaches a TCP listener of an illumos or Solaris 11 host, and for what
 * became of it.
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

/* As in illumos.d: what a thread is doing, by the address of the thread. */
uint64_t listening[uint64_t];
uint64_t packet[uint64_t];
uint64_t header[uint64_t];

this conn_t *conn;
this conn_t *peer;
this tcp_t *tcp;
this tcp_t *eager;
this mblk_t *mp;
this unsigned char *ip;
this uint16_t *ports;
this uint32_t *words;
this uint32_t *address;
this uint64_t me;
this uint64_t high;
this uint64_t low;
this int length;
this int port;
this int v4;

BEGIN
{
	printf("TS,Date,Action,Source IP,Source Port,Dest Port,Q0,Q,Qmax\n");
}

/* A segment that reached a listener: tcp_input_listener(connp, mp, squeue, ira). */
fbt:ip:tcp_input_listener:entry
{
	this->me = (uint64_t)curthread;
	this->conn = (conn_t *)arg0;
	this->port = ntohs(this->conn->u_port.connu_ports.connu_lport);
	this->mp = (mblk_t *)arg1;
	this->length = ((ip_recv_attr_t *)arg3)->ira_ip_hdr_length;
	this->conn = *(uint8_t *)(this->mp->b_rptr + this->length + 13) & 2 &&
	    this->port >= FIRST_PORT && this->port <= LAST_PORT ? this->conn : NULL;
	listening[this->me] = (uint64_t)this->conn;
	packet[this->me] = this->conn != NULL ? (uint64_t)this->mp->b_rptr : 0;
	header[this->me] = this->conn != NULL ? this->length : 0;
}

fbt:ip:tcp_input_listener:entry,
mib:::tcpListenDrop,
mib:::tcpListenDropQ0,
mib:::tcpHalfOpenDrop
{
	this->me = (uint64_t)curthread;
	this->conn = (conn_t *)listening[this->me];
	this->ip = (unsigned char *)packet[this->me];
	this->length = header[this->me];
}

/* The source address of IPv4 lies at byte 12, of IPv6 at byte 8, as words in network order. */
fbt:ip:tcp_input_listener:entry,
mib:::tcpListenDrop,
mib:::tcpListenDropQ0,
mib:::tcpHalfOpenDrop
/ this->conn != NULL /
{
	this->tcp = this->conn->conn_proto_priv.cp_tcp;
	this->port = ntohs(this->conn->u_port.connu_ports.connu_lport);
	this->ports = (uint16_t *)(this->ip + this->length);
	this->words = (uint32_t *)this->ip;
	this->v4 = *(uint8_t *)this->ip >> 4 == 4;
	this->high = this->v4 ? 0 : (uint64_t)ntohl(this->words[2]) << 32 | ntohl(this->words[3]);
	this->low = this->v4 ? 0xffff00000000 | ntohl(this->words[3]) :
	    (uint64_t)ntohl(this->words[4]) << 32 | ntohl(this->words[5]);
}

fbt:ip:tcp_input_listener:entry
/ this->conn != NULL /
{
	printf("%d,%Y,syn,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high, this->low,
	    ntohs(this->ports[0]), this->port, this->tcp->tcp_conn_req_cnt_q0,
	    this->tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_max);
}

mib:::tcpListenDrop
/ this->conn != NULL /
{
	printf("%d,%Y,drop:q_full,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, ntohs(this->ports[0]), this->port, this->tcp->tcp_conn_req_cnt_q0,
	    this->tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_max);
}

mib:::tcpListenDropQ0
/ this->conn != NULL /
{
	printf("%d,%Y,drop:q0_full,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, ntohs(this->ports[0]), this->port, this->tcp->tcp_conn_req_cnt_q0,
	    this->tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_max);
}

/* The source is that of the SYN for which another connection is thrown out. */
mib:::tcpHalfOpenDrop
/ this->conn != NULL /
{
	printf("%d,%Y,drop:q0_evicted,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, ntohs(this->ports[0]), this->port, this->tcp->tcp_conn_req_cnt_q0,
	    this->tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_max);
}

fbt:ip:tcp_input_listener:return
{
	this->me = (uint64_t)curthread;
	listening[this->me] = 0;
	packet[this->me] = 0;
	header[this->me] = 0;
}

/* Into Q: tcp_newconn_notify(eager, ira), or tcp_send_conn_ind(listener, T_CONN_IND, squeue). */
fbt:ip:tcp_newconn_notify:entry
{
	this->eager = (tcp_t *)arg0;
}

fbt:ip:tcp_send_conn_ind:entry
{
	this->mp = (mblk_t *)arg1;
	this->eager = *(tcp_t **)(this->mp->b_rptr +
	    ((struct T_conn_ind *)this->mp->b_rptr)->OPT_offset);
}

/* Out of Q: tcp_accept(listener, eager, ...), tcp_tpi_accept(queue, T_CONN_RES), tcp_accept_swap. */
fbt:ip:tcp_accept:entry
{
	this->eager = ((conn_t *)arg1)->conn_proto_priv.cp_tcp;
}

fbt:ip:tcp_tpi_accept:entry
{
	this->mp = (mblk_t *)arg1;
	this->eager = *(tcp_t **)(this->mp->b_rptr +
	    ((struct T_conn_res *)this->mp->b_rptr)->OPT_offset);
}

fbt:ip:tcp_accept_swap:entry
{
	this->eager = (tcp_t *)arg2;
}

fbt:ip:tcp_newconn_notify:entry,
fbt:ip:tcp_send_conn_ind:entry,
fbt:ip:tcp_accept:entry,
fbt:ip:tcp_tpi_accept:entry,
fbt:ip:tcp_accept_swap:entry
{
	this->tcp = this->eager->tcp_listener;
	this->conn = this->tcp->tcp_connp;
	this->peer = this->eager->tcp_connp;
	this->port = ntohs(this->conn->u_port.connu_ports.connu_lport);
	this->address = (uint32_t *)&this->peer->connua_v6addr.connua_faddr;
	this->high = (uint64_t)ntohl(this->address[0]) << 32 | ntohl(this->address[1]);
	this->low = (uint64_t)ntohl(this->address[2]) << 32 | ntohl(this->address[3]);
}

fbt:ip:tcp_newconn_notify:entry,
fbt:ip:tcp_send_conn_ind:entry
/ this->port >= FIRST_PORT && this->port <= LAST_PORT /
{
	printf("%d,%Y,established,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, ntohs(this->peer->u_port.connu_ports.connu_fport), this->port,
	    this->tcp->tcp_conn_req_cnt_q0, this->tcp->tcp_conn_req_cnt_q,
	    this->tcp->tcp_conn_req_max);
}

fbt:ip:tcp_accept:entry,
fbt:ip:tcp_tpi_accept:entry,
fbt:ip:tcp_accept_swap:entry
/ this->port >= FIRST_PORT && this->port <= LAST_PORT /
{
	printf("%d,%Y,accept,%x:%x,%d,%d,%d,%d,%d\n", timestamp, walltimestamp, this->high,
	    this->low, ntohs(this->peer->u_port.connu_ports.connu_fport), this->port,
	    this->tcp->tcp_conn_req_cnt_q0, this->tcp->tcp_conn_req_cnt_q,
	    this->tcp->tcp_conn_req_max);
}

/*
 * Only who prints learns that nobody reads any more: without this a dtrace(1) at the far end of an
 * ssh that has ended would stay until the next event. The exporter leaves the empty line out.
 */
tick-5s
{
	printf("\n");
}
