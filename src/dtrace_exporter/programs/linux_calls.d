#!/usr/sbin/dtrace -s
/*
 * linux_calls.d - what processes do to TCP listeners of a Linux host: listen() again, and close.
 *
 * USAGE: dtrace -s linux_calls.d	# a row when it happens; Ctrl-C ends it
 *
 *   ready 5 4026531840
 *   limit ffff8adaf26fe880 604107924061158 11
 *   closed ffff8adaf26fe880 604107931061158
 *   tick 604108327768568
 *
 * limit SOCKET TIME QMAX: listen() has been called for a socket that listens already, or that begins
 *	to; QMAX is what the kernel has made of the backlog. TIME in nanoseconds since boot.
 * closed SOCKET TIME: the socket listens no more, and what was in Q is gone; it may listen again
 * tick TIME: once a second
 *
 * This is beside linux.d and not in it because the kernel calls these functions with softirqs on. A
 * packet that comes meanwhile is handled on top of such a probe, and DTrace 2 skips the probes of the
 * same consumer that it meets. Nothing here counts: each row is an observation with its time.
 *
 * TESTED: DTrace 2.0.7 on Linux 6.12 and 6.1, x86-64.
 */
#pragma D option quiet
#pragma D option switchrate=10hz

self struct sock *sk;

BEGIN
{
	printf("\nready 5 %d\n", ((struct net *)&`init_net)->ns.inum);
}

/* listen(2), by its struct socket. */
fbt::inet_listen:entry
{
	self->sk = ((struct socket *)arg0)->sk;
}

fbt::inet_listen:return
/ self->sk != NULL && (int)arg1 == 0 && self->sk->sk_protocol == 6 /
{
	printf("limit %x %d %d\n", (uint64_t)self->sk, timestamp, self->sk->sk_max_ack_backlog);
}

fbt::inet_listen:return
{
	self->sk = NULL;
}

/* close(2), shutdown(2), SOCK_DESTROY, an end of the process: (sk). The state is another by now. */
fbt::inet_csk_listen_stop:entry
{
	printf("closed %x %d\n", arg0, timestamp);
}

tick-1s
{
	printf("tick %d\n", timestamp);
}
