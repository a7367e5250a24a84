#!/usr/sbin/dtrace -s
/*
 * What happens at the TCP listen queues of an illumos or Solaris 11 host, counted in the kernel.
 *
 * Runs by hand as it is in the global zone, for every listener of every zone; dtrace-exporter fills
 * in the numbers below and leaves out, from "begin X" to "end X" and lines marked "only X", the
 * optional parts that a kernel cannot do.
 *
 * One row a tick for each listening socket and kind of event since the set was last emptied:
 *
 *   row SET SOCKET WHO ADDRESS-HIGH ADDRESS-LOW LIMITS COUNT SUM LAST
 *
 * WHO is 32 bits of zone, 16 of port, 16 of WHAT; LIMITS 32 of Q0max, 32 of Qmax. For DTrace 2 on
 * Linux makes all keys as long as the longest, and takes its time for each word of them.
 *
 *   WHAT      COUNT                                              SUM
 *   0-11      SYNs: tenths of Q/Qmax, rounded up; 11 for more than Qmax   of Q at each
 *   128       handshakes completed, connection put into Q
 *   131       observations of other kinds: listen() was called, a connection left Q0 or Q by itself
 *   132       sockets that stopped listening
 *   133, 134  SYNs of those above that were dropped: Q full, Q0 full
 *   135       half-open connections thrown out for a SYN
 *   144-157   accepts: by time in Q, up to 4^5, 4^6, ... 4^17 ns, more   of ns in Q
 *   158       accepts of a connection whose time in Q is not known
 *   256-8447  observations once a second of the listener whose SYNs may go the short way: 256 + TERM
 *
 * LAST is the newest observation of the queues: when, then 17 bits of Q0, then 17 bits of Q, all ones
 * where the number does not fit or the socket no longer listens.
 *
 * The short way: the SYNs of one listener at a time, whose queues are far from full, are counted by
 * no more than is needed, one row for each Q that they found:
 *
 *   calm HOW COUNT
 *
 * HOW is the term, whose row of 256 + TERM tells which listener that is and its Qmax, then 9 bits of
 * Q. A term ends when the listener loses the short way, or may have got another Qmax.
 *
 * Two sets of aggregations take turns; only the set at rest is emptied, half a generation after it
 * was last used. That of the short way is at rest in a generation after many terms.
 */
#pragma D option quiet
#pragma D option switchrate=10hz
#pragma D option aggrate=10hz
#pragma D option aggsize=8m
#pragma D option dynvarsize=8m
#pragma D option strsize=64

/* Which ports; how many ticks a set is in use, and the clock of LAST, 2^CLOCK ns, to fit in that. */
inline int FIRST_PORT = 0;
inline int LAST_PORT = 65535;
inline int TICKS = 60;
inline int CLOCK = 9;

/* After how many terms what they counted is thrown away. */
inline int MOST_TERMS = 32;

/* -3 in inet/tcp.h, as 32 bits: DTrace 2.0.7 on Linux does not find an int of -3 equal to -3. */
inline int64_t TCPS_LISTEN = 0xfffffffd;

/*
 * What a thread is doing, by the address of the thread: kernel threads come and go, but their
 * memory is used again, so these arrays do not grow as thread-local variables would.
 */
uint64_t listening[uint64_t];
uint64_t moving[uint64_t];
uint64_t moved[uint64_t];
uint64_t taking[uint64_t];
uint64_t opening[uint64_t];

/* When a connection was put into Q, by its tcp_t. */
uint64_t start[uint64_t];

/* In which generation the name of a zone was told last. */
uint64_t named[int];

/*
 * The listener whose SYNs go the short way, all of it in one word, for it changes while others read
 * it: its address, but for the 16 bits that a kernel's addresses have in common and the 6 that are
 * zero; 13 bits of its term; in how many bits Q and Q0 have to fit, 3 and 5 bits, for there to be no
 * doubt that a SYN is taken. Q0 and Q are read together, queues bytes behind the conn_t, whose tcp_t
 * is allocated with it; the bit between those two says that this is a little-endian machine, where Q
 * is in the high half.
 *
 * One that had the short way until now, one that may be the next; how many listeners have gone; how
 * many terms since what they counted was last thrown away, and that it is at rest for that.
 */
uint64_t calm;
uint64_t left;
uint64_t next;
uint64_t used;
uint64_t closes;
uint64_t queues;
uint64_t term;
uint64_t terms;
uint64_t rests;

/* Every event has to set conn, what, sum, and by how much more its queues hold than is read. */
this conn_t *conn;
this tcp_t *tcp;
this tcp_t *eager;
this mblk_t *mp;
this zone_t *zone;
this uint32_t *address;
this uint64_t me;
this int port;
this int zoneid;
this uint64_t what;
this uint64_t sum;
this int64_t more0;
this int64_t more;
this int64_t q0;
this int64_t q;
this int64_t qmax;
this int64_t q0max;
this int64_t tenths;
this uint64_t calm;
this uint64_t room;
this uint64_t room0;
this uint64_t both;
this uint64_t fits;
this uint64_t gone;
this int brief;
this int odd;
this uint64_t since;
this uint64_t high;
this uint64_t low;
this uint64_t who;
this uint64_t limits;
this uint64_t last;
this int64_t when;

BEGIN
{
	generation = 0;
	ticks = 0;
	start0 = timestamp;
	start1 = timestamp;
	little = ntohl(1) != 1;
	printf("\nready 3 0\n");	/* place zone */
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
	this->conn = (conn_t *)this->me;
	this->conn = this->conn != NULL &&
	    (this->conn->conn_proto_priv.cp_tcp->tcp_state & 0xffffffff) == TCPS_LISTEN ? this->conn : NULL;
	this->what = 131;
	this->sum = 0;
	this->more0 = 0;
	this->more = 0;
}

/*
 * A segment that reached a listener, IPv4 or IPv6: tcp_input_listener(connp, mp, squeue, ira). Only
 * one with the SYN bit is a SYN. The short way.
 */
fbt:ip:tcp_input_listener:entry
/ (this->brief = ((this->calm = calm) ^ (this->me = arg0) << 16) >> 22 == 0 &&
    *(uint8_t *)(((mblk_t *)arg1)->b_rptr + ((ip_recv_attr_t *)arg3)->ira_ip_hdr_length + 13) & 2 &&
    ((this->both = *(uint64_t *)(this->me + queues)) >> (~this->calm & 32) & 0xffffffff) >>
    (this->calm & 31) == 0 &&
    (this->q = this->both >> (this->calm & 32) & 0xffffffff) >> (this->calm >> 6 & 7) == 0) /
{
	used = 1;
	@calm[this->calm & 0x3ffe00 | this->q] = count();
}

/*
 * All others, in the even set and the odd one; one that is late finds a listener that is no more. A
 * SYN will be taken if there is room, and then Q0 is one more when this function returns; where that
 * is not certain a drop has to know the listener, or that it is one of another port. Who the listener
 * is and the count stand here, not only where all events meet, for each clause of this probe costs
 * every SYN some time.
 */
fbt:ip:tcp_input_listener:entry
/ (this->conn = !(this->odd = generation & 1) && !this->brief &&
    *(uint8_t *)(((mblk_t *)arg1)->b_rptr + ((ip_recv_attr_t *)arg3)->ira_ip_hdr_length + 13) & 2 &&
    (((conn_t *)arg0)->conn_proto_priv.cp_tcp->tcp_state & 0xffffffff) == TCPS_LISTEN &&
    ((this->port = ntohs(((conn_t *)arg0)->u_port.connu_ports.connu_lport)) >= FIRST_PORT &&
    this->port <= LAST_PORT
    || (listening[(uint64_t)curthread] = 0) != 0		/* only syn_drops */
    ) ? (conn_t *)arg0 : NULL) != NULL /
{
	this->address = (uint32_t *)&this->conn->connua_v6addr.connua_laddr;
	this->high = (uint64_t)ntohl(this->address[0]) << 32 | ntohl(this->address[1]);
	this->low = (uint64_t)ntohl(this->address[2]) << 32 | ntohl(this->address[3]);
	this->zone = this->conn->conn_cred->cr_zone;
	this->zoneid = this->zone->zone_id;
	this->tcp = this->conn->conn_proto_priv.cp_tcp;
	this->q0 = this->tcp->tcp_conn_req_cnt_q0;
	this->q = this->tcp->tcp_conn_req_cnt_q;
	this->qmax = this->tcp->tcp_conn_req_max;
	this->q0max = 0;
	/* begin q0_limit */
	this->q0max = this->qmax +
	    this->tcp->tcp_tcps->tcps_propinfo_tbl[2].u.mpi_uval.mod_propval_ucur;
	/* end q0_limit */
	this->sum = this->q;
	this->tenths = (10 * this->q + this->qmax - 1) / (this->qmax ? this->qmax : 1);
	this->what = this->tenths < 11 ? this->tenths : 11;
	this->more0 = this->q < this->qmax && (this->q0max == 0 || this->q0 < this->q0max) ? 1 : 0;
	/* begin syn_drops */
	this->me = (2 * this->q + 64 >= this->qmax || 2 * this->q0 + 64 >= this->q0max) ?
	    (listening[(uint64_t)curthread] = arg0) : 0;
	/* end syn_drops */
	next = arg0;	/* only open_close */
	this->who = (uint64_t)this->zoneid << 32 | (uint64_t)this->port << 16 | this->what;
	this->limits = this->q0max << 32 | this->qmax;
	this->last = (uint64_t)(this->q0 + this->more0 < 0x1ffff ? this->q0 + this->more0 : 0x1ffff) << 17 |
	    (uint64_t)(this->q < 0x1ffff ? this->q : 0x1ffff);
	this->when = (int64_t)(timestamp - start0) >> CLOCK;
	this->when = this->when < 0 ? 0 : this->when < 0x1fffffff ? this->when : 0x1fffffff;
	@events0[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] = count();
	@sums0[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] = sum(this->sum);
	@last0[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] =
	    max(this->when << 34 | this->last);
}

fbt:ip:tcp_input_listener:entry
/ this->odd && (this->conn = !this->brief &&
    *(uint8_t *)(((mblk_t *)arg1)->b_rptr + ((ip_recv_attr_t *)arg3)->ira_ip_hdr_length + 13) & 2 &&
    (((conn_t *)arg0)->conn_proto_priv.cp_tcp->tcp_state & 0xffffffff) == TCPS_LISTEN &&
    ((this->port = ntohs(((conn_t *)arg0)->u_port.connu_ports.connu_lport)) >= FIRST_PORT &&
    this->port <= LAST_PORT
    || (listening[(uint64_t)curthread] = 0) != 0		/* only syn_drops */
    ) ? (conn_t *)arg0 : NULL) != NULL /
{
	this->address = (uint32_t *)&this->conn->connua_v6addr.connua_laddr;
	this->high = (uint64_t)ntohl(this->address[0]) << 32 | ntohl(this->address[1]);
	this->low = (uint64_t)ntohl(this->address[2]) << 32 | ntohl(this->address[3]);
	this->zone = this->conn->conn_cred->cr_zone;
	this->zoneid = this->zone->zone_id;
	this->tcp = this->conn->conn_proto_priv.cp_tcp;
	this->q0 = this->tcp->tcp_conn_req_cnt_q0;
	this->q = this->tcp->tcp_conn_req_cnt_q;
	this->qmax = this->tcp->tcp_conn_req_max;
	this->q0max = 0;
	/* begin q0_limit */
	this->q0max = this->qmax +
	    this->tcp->tcp_tcps->tcps_propinfo_tbl[2].u.mpi_uval.mod_propval_ucur;
	/* end q0_limit */
	this->sum = this->q;
	this->tenths = (10 * this->q + this->qmax - 1) / (this->qmax ? this->qmax : 1);
	this->what = this->tenths < 11 ? this->tenths : 11;
	this->more0 = this->q < this->qmax && (this->q0max == 0 || this->q0 < this->q0max) ? 1 : 0;
	/* begin syn_drops */
	this->me = (2 * this->q + 64 >= this->qmax || 2 * this->q0 + 64 >= this->q0max) ?
	    (listening[(uint64_t)curthread] = arg0) : 0;
	/* end syn_drops */
	next = arg0;	/* only open_close */
	this->who = (uint64_t)this->zoneid << 32 | (uint64_t)this->port << 16 | this->what;
	this->limits = this->q0max << 32 | this->qmax;
	this->last = (uint64_t)(this->q0 + this->more0 < 0x1ffff ? this->q0 + this->more0 : 0x1ffff) << 17 |
	    (uint64_t)(this->q < 0x1ffff ? this->q : 0x1ffff);
	this->when = (int64_t)(timestamp - start1) >> CLOCK;
	this->when = this->when < 0 ? 0 : this->when < 0x1fffffff ? this->when : 0x1fffffff;
	@events1[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] = count();
	@sums1[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] = sum(this->sum);
	@last1[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] =
	    max(this->when << 34 | this->last);
}

/* begin syn_drops */
/*
 * Probes between the entry and the return of the same function: Q full, Q0 full, and Q0 full but one
 * of it thrown out.
 */
mib:::tcpListenDrop
{
	this->conn = (conn_t *)listening[(uint64_t)curthread];
	this->what = 133;
	this->sum = 0;
	this->more0 = 0;
	this->more = 0;
}

mib:::tcpListenDropQ0
{
	this->conn = (conn_t *)listening[(uint64_t)curthread];
	this->what = 134;
	this->sum = 0;
	this->more0 = 0;
	this->more = 0;
}

mib:::tcpHalfOpenDrop
{
	this->conn = (conn_t *)listening[(uint64_t)curthread];
	this->what = 135;
	this->sum = 0;
	this->more0 = 0;
	this->more = 0;
}
/* end syn_drops */

/* begin established */
/* A connection goes from Q0 into Q, whatever Qmax is: tcp_newconn_notify(eager, ira). */
fbt:ip:tcp_newconn_notify:entry
{
	start[arg0] = timestamp;	/* only accept_wait */
	moving[(uint64_t)curthread] = (uint64_t)((tcp_t *)arg0)->tcp_listener->tcp_connp;
}

fbt:ip:tcp_newconn_notify:return
{
	this->me = (uint64_t)curthread;
	this->conn = (conn_t *)moving[this->me];
	moving[this->me] = 0;
	this->what = 128;
	this->sum = 0;
	this->more0 = 0;
	this->more = 0;
}

/*
 * With a STREAMS listener, where its T_CONN_IND names the eager: tcp_send_conn_ind(listener, mp,
 * squeue). While Q is full the eager stays in Q0, the last of it.
 */
fbt:ip:tcp_send_conn_ind:entry
{
	this->mp = (mblk_t *)arg1;
	this->me = *(uint64_t *)(this->mp->b_rptr +
	    ((struct T_conn_ind *)this->mp->b_rptr)->OPT_offset);
	start[this->me] = timestamp;	/* only accept_wait */
	moved[(uint64_t)curthread] = this->me;
	moving[(uint64_t)curthread] = arg0;
}

fbt:ip:tcp_send_conn_ind:return
{
	this->me = (uint64_t)curthread;
	this->eager = (tcp_t *)moved[this->me];
	this->conn = (conn_t *)moving[this->me];
	this->conn = this->eager != NULL && this->eager->tcp_eager_next_q0 == NULL ?
	    this->conn : NULL;
	moved[this->me] = 0;
	moving[this->me] = 0;
	this->what = 128;
	this->sum = 0;
	this->more0 = 0;
	this->more = 0;
}

/* An accept makes room for such a one, which becomes the last of Q: tcp_get_def_conn_ind(listener). */
fbt:ip:tcp_get_def_conn_ind:entry
{
	moving[(uint64_t)curthread] = arg0;
}

fbt:ip:tcp_get_def_conn_ind:return
{
	this->me = (uint64_t)curthread;
	this->tcp = (tcp_t *)moving[this->me];
	moving[this->me] = 0;
	this->conn = this->tcp != NULL ? this->tcp->tcp_connp : NULL;
	this->me = this->tcp != NULL ? (uint64_t)this->tcp->tcp_eager_last_q : 0;	/* only accept_wait */
	start[this->me] = this->me ? timestamp : 0;	/* only accept_wait */
	this->what = 128;
	this->sum = 0;
	this->more0 = 0;
	this->more = 0;
}
/* end established */

/* begin accepts */
/*
 * A connection leaves Q0 or Q, with the listener's lock held: tcp_eager_unlink(eager). It does so for
 * an accept if one has named it before: tcp_accept(listener, eager, ...) for a socket,
 * tcp_tpi_accept(queue, T_CONN_RES) for one of STREAMS, tcp_accept_swap(listener, acceptor, eager)
 * for TLI.
 */
fbt:ip:tcp_accept:entry
{
	taking[(uint64_t)curthread] = (uint64_t)((conn_t *)arg1)->conn_proto_priv.cp_tcp;
}

fbt:ip:tcp_tpi_accept:entry
{
	this->mp = (mblk_t *)arg1;
	taking[(uint64_t)curthread] = *(uint64_t *)(this->mp->b_rptr +
	    ((struct T_conn_res *)this->mp->b_rptr)->OPT_offset);
}

fbt:ip:tcp_accept_swap:entry
{
	taking[(uint64_t)curthread] = arg2;
}

fbt:ip:tcp_eager_unlink:entry
{
	this->eager = (tcp_t *)arg0;
	this->me = (uint64_t)curthread;
	this->what = taking[this->me] == arg0 ? 158 : 131;
	taking[this->me] = this->what == 158 ? 0 : taking[this->me];
	this->tcp = this->eager->tcp_listener;
	this->conn = (this->tcp->tcp_state & 0xffffffff) == TCPS_LISTEN ? this->tcp->tcp_connp : NULL;
	this->sum = 0;
	this->more0 = this->eager->tcp_eager_next_q0 != NULL ? -1 : 0;
	this->more = -1 - this->more0;
}
/* end accepts */

/* begin accept_wait */
/* accept_wait needs established, accepts */
fbt:ip:tcp_eager_unlink:entry
{
	this->since = start[arg0];
	start[arg0] = 0;
}

fbt:ip:tcp_eager_unlink:entry
/ this->what == 158 && this->since != 0 /
{
	this->sum = timestamp - this->since;
	this->what = 144 + (
	    this->sum <= 0x400 ? 0 : this->sum <= 0x1000 ? 1 : this->sum <= 0x4000 ? 2 :
	    this->sum <= 0x10000 ? 3 : this->sum <= 0x40000 ? 4 : this->sum <= 0x100000 ? 5 :
	    this->sum <= 0x400000 ? 6 : this->sum <= 0x1000000 ? 7 : this->sum <= 0x4000000 ? 8 :
	    this->sum <= 0x10000000 ? 9 : this->sum <= 0x40000000 ? 10 :
	    this->sum <= 0x100000000 ? 11 : this->sum <= 0x400000000 ? 12 : 13);
}
/* end accept_wait */

/* begin open_close */
/* tcp_do_listen(connp, ...), tcp_closei_local(tcp), tcp_do_unbind(connp). */
fbt:ip:tcp_do_listen:entry
{
	opening[(uint64_t)curthread] = arg0;
}

fbt:ip:tcp_do_listen:return
{
	this->me = (uint64_t)curthread;
	this->conn = arg1 == 0 ? (conn_t *)opening[this->me] : NULL;
	opening[this->me] = 0;
	left = (calm ^ (uint64_t)this->conn << 16) >> 22 ? left : (uint64_t)this->conn;
	calm = (calm ^ (uint64_t)this->conn << 16) >> 22 ? calm : 0;	/* Qmax may be another */
	this->what = 131;
	this->sum = 0;
	this->more0 = 0;
	this->more = 0;
}

fbt:ip:tcp_closei_local:entry
{
	this->tcp = (tcp_t *)arg0;
	this->conn = (this->tcp->tcp_state & 0xffffffff) == TCPS_LISTEN ? this->tcp->tcp_connp : NULL;
	closes += this->conn != NULL;
	calm = (calm ^ (uint64_t)this->conn << 16) >> 22 ? calm : 0;
	next = next == (uint64_t)this->conn ? 0 : next;
	this->what = 132;
	this->sum = 0;
	this->more0 = 0;
	this->more = 0;
}

fbt:ip:tcp_do_unbind:entry
{
	this->conn = (conn_t *)arg0;
	this->conn = (this->conn->conn_proto_priv.cp_tcp->tcp_state & 0xffffffff) == TCPS_LISTEN ?
	    this->conn : NULL;
	closes += this->conn != NULL;
	calm = (calm ^ (uint64_t)this->conn << 16) >> 22 ? calm : 0;
	next = next == (uint64_t)this->conn ? 0 : next;
	this->what = 132;
	this->sum = 0;
	this->more0 = 0;
	this->more = 0;
}
/* end open_close */

/*
 * Every event that found its listener: who that is, and its queues now. A zone with an IP stack of
 * its own has zone 0 in conn_zoneid, so whose listener it is comes from its credentials.
 */
mib:::tcpListenDrop,                            /* only syn_drops */
mib:::tcpListenDropQ0,                          /* only syn_drops */
mib:::tcpHalfOpenDrop,                          /* only syn_drops */
fbt:ip:tcp_newconn_notify:return,               /* only established */
fbt:ip:tcp_send_conn_ind:return,                /* only established */
fbt:ip:tcp_get_def_conn_ind:return,             /* only established */
fbt:ip:tcp_eager_unlink:entry,                  /* only accepts */
fbt:ip:tcp_do_listen:return,                    /* only open_close */
fbt:ip:tcp_closei_local:entry,                  /* only open_close */
fbt:ip:tcp_do_unbind:entry,                     /* only open_close */
tick-1s
/ this->conn != NULL /
{
	this->port = ntohs(this->conn->u_port.connu_ports.connu_lport);
	this->address = (uint32_t *)&this->conn->connua_v6addr.connua_laddr;
	this->high = (uint64_t)ntohl(this->address[0]) << 32 | ntohl(this->address[1]);
	this->low = (uint64_t)ntohl(this->address[2]) << 32 | ntohl(this->address[3]);
	this->zone = this->conn->conn_cred->cr_zone;
	this->zoneid = this->zone->zone_id;
	this->tcp = this->conn->conn_proto_priv.cp_tcp;
	this->q0 = this->tcp->tcp_conn_req_cnt_q0;
	this->q = this->tcp->tcp_conn_req_cnt_q;
	this->qmax = this->tcp->tcp_conn_req_max;
	this->q0max = 0;
	/* begin q0_limit */
	this->q0max = this->qmax +
	    this->tcp->tcp_tcps->tcps_propinfo_tbl[2].u.mpi_uval.mod_propval_ucur;
	/* end q0_limit */
	this->who = (uint64_t)this->zoneid << 32 | (uint64_t)this->port << 16 | this->what;
	this->limits = this->q0max << 32 | this->qmax;
	this->odd = generation & 1;
	this->last = this->what == 132 ? 0x3ffffffff :
	    (uint64_t)(this->q0 + this->more0 < 0x1ffff ? this->q0 + this->more0 : 0x1ffff) << 17 |
	    (uint64_t)(this->q + this->more < 0x1ffff ? this->q + this->more : 0x1ffff);
	this->conn = this->port >= FIRST_PORT && this->port <= LAST_PORT ? this->conn : NULL;
}

/*
 * Which listener goes the short way for the next second: the one that did, if it had SYNs, or else the
 * next. One that does so no more is looked at once again, as a SYN may have been on its way.
 */
tick-1s
/ this->conn != NULL /
{
	this->both = (uint64_t)&this->tcp->tcp_conn_req_cnt_q0 - (uint64_t)this->conn;
	queues = queues ? queues : this->both;
	this->me = (uint64_t)this->conn << 16;
	this->room = (this->qmax - 64) / 2;
	this->room = this->qmax < 66 ? 8 : this->room < 2 ? 0 : this->room < 4 ? 1 : this->room < 8 ? 2 :
	    this->room < 16 ? 3 : this->room < 32 ? 4 : this->room < 64 ? 5 : this->room < 128 ? 6 : 7;
	this->room0 = (this->q0max - 64) / 2;
	this->room0 = this->q0max < 66 + 2 * 64 ? 32 : this->room0 < 128 ? 6 : this->room0 < 256 ? 7 :
	    this->room0 < 512 ? 8 : this->room0 < 1024 ? 9 : this->room0 < 2048 ? 10 :
	    this->room0 < 4096 ? 11 : this->room0 < 8192 ? 12 : this->room0 < 16384 ? 13 :
	    this->room0 < 32768 ? 14 : this->room0 < 65536 ? 15 : 16;
	this->fits = (this->calm ? used : left == 0 && terms < MOST_TERMS) && !rests &&
	    this->room < 8 && this->room0 < 32 && queues == this->both && closes == this->gone &&
	    ((int64_t)this->me >> 22 << 6) == (int64_t)this->conn &&
	    (uint64_t)&this->tcp->tcp_conn_req_cnt_q - (uint64_t)&this->tcp->tcp_conn_req_cnt_q0 == 4 &&
	    (little || ((uint64_t)&this->tcp->tcp_conn_req_cnt_q0 & 7) == 0);
	terms += this->fits && this->calm == 0;
	term = this->fits && this->calm == 0 ? term + 1 & 0x1fff : term;
	this->who = this->fits ? this->who - 131 + 256 + term : this->who;
	left = this->calm && !this->fits ? (uint64_t)this->conn : 0;
	calm = this->fits ? this->me | term << 9 | this->room << 6 | little << 5 | this->room0 : 0;
	next = 0;
	used = 0;
}

tick-1s
/ this->conn == NULL /
{
	calm = 0;
	left = 0;
	next = 0;
}

/* The name of a zone other than the global one, once in a generation. */
mib:::tcpListenDrop,                            /* only syn_drops */
mib:::tcpListenDropQ0,                          /* only syn_drops */
mib:::tcpHalfOpenDrop,                          /* only syn_drops */
fbt:ip:tcp_newconn_notify:return,               /* only established */
fbt:ip:tcp_send_conn_ind:return,                /* only established */
fbt:ip:tcp_get_def_conn_ind:return,             /* only established */
fbt:ip:tcp_eager_unlink:entry,                  /* only accepts */
fbt:ip:tcp_do_listen:return,                    /* only open_close */
fbt:ip:tcp_closei_local:entry,                  /* only open_close */
fbt:ip:tcp_do_unbind:entry,                     /* only open_close */
tick-1s,
fbt:ip:tcp_input_listener:entry
/ this->conn != NULL && this->zoneid != 0 && named[this->zoneid] != generation + 1 /
{
	named[this->zoneid] = generation + 1;
	printf("place %d %s\n", this->zoneid, stringof(this->zone->zone_name));
}

/* The set in use, the even one and the odd one. */
mib:::tcpListenDrop,                            /* only syn_drops */
mib:::tcpListenDropQ0,                          /* only syn_drops */
mib:::tcpHalfOpenDrop,                          /* only syn_drops */
fbt:ip:tcp_newconn_notify:return,               /* only established */
fbt:ip:tcp_send_conn_ind:return,                /* only established */
fbt:ip:tcp_get_def_conn_ind:return,             /* only established */
fbt:ip:tcp_eager_unlink:entry,                  /* only accepts */
fbt:ip:tcp_do_listen:return,                    /* only open_close */
fbt:ip:tcp_closei_local:entry,                  /* only open_close */
fbt:ip:tcp_do_unbind:entry,                     /* only open_close */
tick-1s
/ this->conn != NULL && !this->odd /
{
	this->when = (int64_t)(timestamp - start0) >> CLOCK;
	this->when = this->when < 0 ? 0 : this->when < 0x1fffffff ? this->when : 0x1fffffff;
	@events0[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] = count();
	@sums0[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] = sum(this->sum);
	@last0[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] =
	    max(this->when << 34 | this->last);
}

mib:::tcpListenDrop,                            /* only syn_drops */
mib:::tcpListenDropQ0,                          /* only syn_drops */
mib:::tcpHalfOpenDrop,                          /* only syn_drops */
fbt:ip:tcp_newconn_notify:return,               /* only established */
fbt:ip:tcp_send_conn_ind:return,                /* only established */
fbt:ip:tcp_get_def_conn_ind:return,             /* only established */
fbt:ip:tcp_eager_unlink:entry,                  /* only accepts */
fbt:ip:tcp_do_listen:return,                    /* only open_close */
fbt:ip:tcp_closei_local:entry,                  /* only open_close */
fbt:ip:tcp_do_unbind:entry,                     /* only open_close */
tick-1s
/ this->conn != NULL && this->odd /
{
	this->when = (int64_t)(timestamp - start1) >> CLOCK;
	this->when = this->when < 0 ? 0 : this->when < 0x1fffffff ? this->when : 0x1fffffff;
	@events1[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] = count();
	@sums1[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] = sum(this->sum);
	@last1[(uint64_t)this->conn, this->who, this->high, this->low, this->limits] =
	    max(this->when << 34 | this->last);
}

/*
 * The set in use and the other, when it has come to rest, each behind its generation. What is printed
 * may be a tenth of a second old, so the set at rest comes twice.
 */
tick-1s
/ !(generation & 1) || ticks <= 3 /
{
	printf("tick %d %d\n", generation & 1 ? generation - 1 : generation, timestamp);
	printa("row 0 %x %x %x %x %x %@d %@d %@d\n", @events0, @sums0, @last0);
}

tick-1s
/ generation & 1 || ticks <= 3 && generation > 0 /
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
