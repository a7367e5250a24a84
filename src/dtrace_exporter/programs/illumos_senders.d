#!/usr/sbin/dtrace -s
/*
 * illumos_senders.d - who sends SYNs to TCP listeners, and whose are dropped, counted in the kernel.
 *
 * USAGE: dtrace -s illumos_senders.d	# in the global zone, every listener; Ctrl-C ends it
 *   syn 0 0 ffffc0a80102 5
 *   syn 1 0 0 12
 *   drop 0 0 ffffc0a80102 q_full 2
 *   tick 4150079441297
 *
 * syn OTHERS HIGH LOW EVENTS: SYNs of the last second, including those that were dropped or sent again.
 *	HIGH and LOW are the halves of the sender's IPv6 address in hexadecimal; with NETS, those of
 *	its network, /48, or /24 for IPv4. OTHERS is 1 in the row of all senders that have no row of
 *	their own.
 * drop OTHERS HIGH LOW REASON EVENTS: those of them that were dropped; REASON is q_full or q0_full
 * tick TIME: the heartbeat, after all rows of counts
 *
 * At most 1,024 senders have a row of their own in a turn, which is a second. The hash of a sender selects
 * a slot, which belongs to the first one until the next turn. So a flood has few rows, and all of its SYNs
 * are in them or in the row of the others. Statements that can fault come before those that count.
 * TESTED: see docs/install-solaris.md.
 */
#pragma D option quiet
#pragma D option switchrate=2hz
#pragma D option aggrate=1hz
#pragma D option aggsize=512k
#pragma D option bufsize=256k
#pragma D option strsize=16

inline int PORT = 0;		/* the port to watch; 0: all */
inline int NETS = 0;		/* 1: by network; 0: by address */
inline int SYN_FLAG = 2;		/* TH_SYN of netinet/tcp.h; in tcp.d too */

uint64_t turn;
uint64_t owner[uint64_t];	/* by slot: its sender, and in the last byte the turn; 0 if it is free */
self int version, others;	/* the SYN's version of IP, and whether it counts as others */
self uint64_t high, low;
this uint32_t *ip;
this uint64_t print, mark, slot, now;
this int version;

BEGIN { turn = 0; }

/* A SYN: tcp_input_listener(listener, packet, squeue, attributes). */
fbt:ip:tcp_input_listener:entry { self->version = 0; this->version = 0; }
fbt:ip:tcp_input_listener:entry
/ (PORT == 0 || ntohs(((conn_t *)arg0)->u_port.connu_ports.connu_lport) == PORT) &&
    *(((mblk_t *)arg1)->b_rptr + ((ip_recv_attr_t *)arg3)->ira_ip_hdr_length + 13) & SYN_FLAG /
{
	this->ip = (uint32_t *)((mblk_t *)arg1)->b_rptr;
	this->version = *(uchar_t *)this->ip >> 4;
}
fbt:ip:tcp_input_listener:entry
/ this->version == 4 /
{
	self->high = 0;
	self->low = 0xffff00000000 | ntohl(this->ip[3]);
	self->low = NETS ? self->low & 0xffffffffff00 : self->low;
	self->version = 4;
}
fbt:ip:tcp_input_listener:entry
/ this->version == 6 /
{
	self->high = (uint64_t)ntohl(this->ip[2]) << 32 | ntohl(this->ip[3]);
	self->low = (uint64_t)ntohl(this->ip[4]) << 32 | ntohl(this->ip[5]);
	self->high = NETS ? self->high & 0xffffffffffff0000 : self->high;
	self->low = NETS ? 0 : self->low;
	self->version = 6;
}
/* In this turn the slot is free, or belongs to the sender or to another one. */
fbt:ip:tcp_input_listener:entry
/ self->version /
{
	this->print = (self->high * 0x9e3779b97f4a7c15 ^ self->low) * 0x61c8864680b583eb;
	this->slot = this->print >> 54;
	this->mark = this->print & 0xffffffffffffff00 | 0x80 | turn & 0x7f;
	this->now = owner[this->slot];
	self->others = this->now != this->mark && (this->now & 0xff) == (this->mark & 0xff);
	owner[this->slot] = self->others ? this->now : this->mark;
	self->high = self->others ? 0 : self->high;
	self->low = self->others ? 0 : self->low;
	@syn[self->others, self->high, self->low] = count();
}
/* begin syn_drops */
mib:::tcpListenDrop, mib:::tcpListenDropQ0
/ self->version /
{
	@drop[self->others, self->high, self->low,
	    probename == "tcpListenDrop" ? "q_full" : "q0_full"] = count();
}
/* end syn_drops */
fbt:ip:tcp_input_listener:return
{
	self->version = 0;
	self->others = 0;
	self->high = 0;
	self->low = 0;
}

/* trunc() in printa()'s clause empties dtrace(1)'s copy, and loses nothing. */
tick-1s, END
{
	turn++;
	printa("syn %d %x %x %@d\n", @syn); trunc(@syn);
	printa("drop %d %x %x %s %@d\n", @drop); trunc(@drop);		/* only syn_drops */
	printf("tick %d\n", timestamp);
}
