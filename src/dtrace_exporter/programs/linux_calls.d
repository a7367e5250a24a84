#!/usr/sbin/dtrace -s
/*
 * linux_calls.d - what processes do to TCP listeners of a Linux host: listen() again, and close. And
 *	SYNs that come where nobody listens.
 *
 * USAGE: dtrace -s linux_calls.d	# Ctrl-C ends it
 *
 *   ready 5 4026531840
 *   tick 604107327768568
 *   limit ffff8adaf26fe880 604107924061158 4096 65535
 *   closed ffff8adaf26fe880 604107931061158
 *   tick 604108327768568
 *   set 604105327768568
 *   refused 8080 3
 *   refused other 12
 *
 * limit SOCKET TIME QMAX BACKLOG: listen() was called, perhaps again; QMAX is what the kernel made of
 *	BACKLOG, at most net.core.somaxconn. BACKLOG is missing if it was not seen, for example because
 *	the kernel itself listens. TIME is in ns since boot.
 * closed SOCKET TIME: the socket has stopped listening, and its Q is gone; it may listen again
 * tick TIME: at the start, from when on all closes are seen, and once a second
 * set BEGAN: rows follow of what was counted since then
 * refused PORT SYNS: SYNs to a port of the host's own network namespace that were answered by RST as
 *	nobody listened. Each of the first PORTS such ports has a row; all others, as of a scan, share
 *	the row `other`.
 *
 * This is not in linux.d because the kernel calls these functions with softirqs on. A packet can
 * interrupt such a probe, and DTrace 2 then skips all probes of the same consumer for this packet. So
 * a refused SYN is missed if it interrupts, on its CPU, a probe of a listen(), of a close, or of an
 * RST that a process sends; each takes a microsecond. The rows of listen() and close are observations
 * with their time. They miss nothing, because no process interrupts the handling of a packet.
 *
 * TESTED: DTrace 2.0.7 on Linux 6.12 and 6.1, x86-64.
 */
#pragma D option quiet
#pragma D option switchrate=10hz

inline int PORTS = 100;		/* so many are told by number */
inline int OUTRSTS = 14;	/* enum TCP_MIB_* in include/uapi/linux/snmp.h */

self struct sock *sk;
self int asked, backlog;
this uint8_t *tcp;		/* a CPU's own: what the entry leaves here is there at the return */
this uint64_t *mib, resets;
this int syn, port;
int named[int], ports;		/* by port: whether it is told by number; and how many are */

BEGIN
{
	began = timestamp;
	printf("\nready 5 %d\ntick %d\n", ((struct net *)&`init_net)->ns.inum, timestamp);
}

/* listen(2): (fd, backlog), or the function inside of it: (socket, backlog); before somaxconn cuts it. */
fbt::__sys_listen*:entry
{
	self->asked = 1;
	self->backlog = (int)arg1;
}
fbt::__sys_listen*:return
{
	self->asked = 0;
	self->backlog = 0;
}

/* The listen() of TCP, by its struct socket. */
fbt::inet_listen:entry
{
	self->sk = ((struct socket *)arg0)->sk;
}

fbt::inet_listen:return
/ self->sk != NULL && (int)arg1 == 0 && self->sk->sk_protocol == 6 && self->asked /
{
	printf("limit %x %d %d %d\n", (uint64_t)self->sk, timestamp, self->sk->sk_max_ack_backlog,
	    self->backlog);
}

fbt::inet_listen:return
/ self->sk != NULL && (int)arg1 == 0 && self->sk->sk_protocol == 6 && !self->asked /
{
	printf("limit %x %d %d\n", (uint64_t)self->sk, timestamp, self->sk->sk_max_ack_backlog);
}

fbt::inet_listen:return
{
	self->sk = NULL;
}

/* close(2), shutdown(2), SOCK_DESTROY, or the end of the process: (sk). Its state has changed by now. */
fbt::inet_csk_listen_stop:entry
{
	printf("closed %x %d\n", arg0, timestamp);
}

/*
 * An RST for what has no socket: (NULL, skb). If it goes out, and not for a broadcast or the like, the
 * kernel counts it for this CPU before it returns. Such a segment is never left to a process, so
 * nothing comes in between.
 */
fbt::tcp_v*_send_reset:entry
/ arg0 == 0 && ((struct sk_buff *)arg1)->dev->nd_net.net == (struct net *)&`init_net /
{
	this->tcp = (uint8_t *)((struct sk_buff *)arg1)->head +
	    ((struct sk_buff *)arg1)->transport_header;
	this->syn = (this->tcp[13] & 0x12) == 2;	/* and no ACK */
	this->port = this->tcp[2] << 8 | this->tcp[3];
	this->mib = (uint64_t *)((uint64_t)((struct net *)&`init_net)->mib.tcp_statistics +
	    *((uint64_t *)&`__per_cpu_offset + cpu));
	this->resets = this->mib[OUTRSTS];
}
fbt::tcp_v*_send_reset:return
/ this->syn && this->mib[OUTRSTS] != this->resets && (named[this->port] || ports < PORTS) /
{
	ports += !named[this->port];
	named[this->port] = 1;
	@refused[this->port] = count();
	this->syn = 0;
}
fbt::tcp_v*_send_reset:return
/ this->syn && this->mib[OUTRSTS] != this->resets /
{
	@others = count();
}
fbt::tcp_v*_send_reset:return
{
	this->syn = 0;
}

tick-1s, END
{
	printf("tick %d\n", timestamp);
	printf("set %d\n", began);			/* only refused */
	printa("refused %d %@d\n", @refused);		/* only refused */
	printa("refused other %@d\n", @others);		/* only refused */
}
