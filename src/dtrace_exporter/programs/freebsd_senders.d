#!/usr/sbin/dtrace -s
/*
 * freebsd_senders.d - who sends SYNs to TCP listeners, counted in the kernel.
 *
 * USAGE: dtrace -s freebsd_senders.d	# as root of the host, every listener; Ctrl-C ends it
 *   syn 0 0 ffffc0a80102 5
 *   syn 1 0 0 12
 *   tick 4150079441297
 *
 * syn OTHERS HIGH LOW EVENTS: SYNs of the last second, including those that were sent again.
 *	HIGH and LOW are the halves of the sender's IPv6 address in hexadecimal; with NETS, those of
 *	its network, /48, or /24 for IPv4. OTHERS is 1 in the row of all senders that have no row of
 *	their own.
 * tick TIME: the heartbeat, after all rows of counts
 *
 * There are no drops: when Q is full, FreeBSD drops the final ACK, not the SYN.
 *
 * At most 1,024 senders have a row of their own in a turn, which is a second. The hash of a sender selects
 * a slot, which belongs to the first one until the next turn. So a flood has few rows, and all of its SYNs
 * are in them or in the row of the others. Statements that can fault come before those that count.
 * TESTED: on a model of FreeBSD 13 and 14, not on FreeBSD yet: see docs/install-freebsd.md.
 */
#pragma D option quiet
#pragma D option switchrate=2hz
#pragma D option aggrate=1hz
#pragma D option aggsize=512k
#pragma D option bufsize=256k
#pragma D option strsize=16

inline int PORT = 0;		/* the port to watch; 0: all */
inline int NETS = 0;		/* 1: by network; 0: by address */

uint64_t turn;
uint64_t owner[uint64_t];	/* by slot: its sender, and in the last byte the turn; 0 if it is free */
this struct in_conninfo *ends;
this uint32_t *ip;
this uint64_t high, low, print, mark, slot, now;
this int version, others;

BEGIN { turn = 0; }

/* A SYN: syncache_add(ends, options, header, inpcb, ...); INC_ISIPV6 is 1, netinet/in_pcb.h. */
fbt:kernel:syncache_add:entry { this->version = 0; }
fbt:kernel:syncache_add:entry
/ PORT == 0 || ntohs(((struct in_conninfo *)arg0)->inc_ie.ie_lport) == PORT /
{
	this->ends = (struct in_conninfo *)arg0;
	this->ip = (uint32_t *)&this->ends->inc_ie.ie_dependfaddr;
	this->high = (uint64_t)ntohl(this->ip[0]) << 32 | ntohl(this->ip[1]);
	this->low = (uint64_t)ntohl(this->ip[2]) << 32 | ntohl(this->ip[3]);
	this->version = this->ends->inc_flags & 1 ? 6 : 4;
}
fbt:kernel:syncache_add:entry
/ this->version == 4 /
{
	this->high = 0;
	this->low = 0xffff00000000 | this->low & (NETS ? 0xffffff00 : 0xffffffff);
}
fbt:kernel:syncache_add:entry
/ this->version == 6 /
{
	this->high = NETS ? this->high & 0xffffffffffff0000 : this->high;
	this->low = NETS ? 0 : this->low;
}
/* In this turn the slot is free, or belongs to the sender or to another one. */
fbt:kernel:syncache_add:entry
/ this->version /
{
	this->print = (this->high * 0x9e3779b97f4a7c15 ^ this->low) * 0x61c8864680b583eb;
	this->slot = this->print >> 54;
	this->mark = this->print & 0xffffffffffffff00 | 0x80 | turn & 0x7f;
	this->now = owner[this->slot];
	this->others = this->now != this->mark && (this->now & 0xff) == (this->mark & 0xff);
	owner[this->slot] = this->others ? this->now : this->mark;
	@syn[this->others, this->others ? 0 : this->high, this->others ? 0 : this->low] = count();
}

/* trunc() empties dtrace(1)'s copy, in printa()'s clause, and loses nothing. */
tick-1s, END
{
	turn++;
	printa("syn %d %x %x %@d\n", @syn); trunc(@syn);
	printf("tick %d\n", timestamp);
}
