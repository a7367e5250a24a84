#!/usr/sbin/dtrace -s
/*
 * linux_unix.d - connect()s that a UNIX socket of a Linux host refuses because its queue is full,
 *	counted in the kernel.
 *
 * USAGE: dtrace -s linux_unix.d	# Ctrl-C ends it
 *
 *   ready 5 4026531840
 *   tick 329627848893
 *   set 323660367618
 *   more 157 1 7979...7979 20
 *   more 157 2 7979...0000 20
 *   unix 1 157 106 01002f746d702f7979...7979 20
 *   unix 1 1969 14 01002f746d702f782e736f636b00...00 10
 *   unix 0 0 0 00...00 1
 *
 * unix COOKIE INODE LENGTH NAME EVENTS: refusals of the listener whose socket has this inode, in the
 *	network namespace with this cookie. NAME is the first 40 bytes, in hexadecimal, of the struct
 *	sockaddr_un that it was bound to, of which the first LENGTH bytes count: two of the family, and
 *	sun_path. If all of these are 0: refusals of a listener that has closed meanwhile, so that it
 *	is not known which one it was.
 * more INODE PART BYTES EVENTS: the 48 bytes of NAME after the 40th (PART 1), or after the 88th (2)
 * set BEGAN: the next rows have the counts since BEGAN; they are printed again each second
 * tick TIME: the heartbeat
 *
 * A refusal is what net/unix/af_unix.c, unix_stream_connect(), answers with EAGAIN: the listener, a
 * SOCK_STREAM or SOCK_SEQPACKET, has more in its queue than its backlog, and the client must not wait,
 * or SO_SNDTIMEO is over. A connect() that waits and then succeeds, fails for another reason, or is
 * interrupted is none. What io_uring tries by itself, before it waits, is none either.
 *
 * All of it happens in processes, and no packet: no probe interrupts another one. The kernel does not
 * sleep between the two functions' returns. So what the first one leaves is there at the second one,
 * unless the kernel preempts processes; then some refusals are not seen, or not known whose.
 * Two sets of aggregations take turns; the head of linux.d says why.
 * TESTED: DTrace 2.0.7 on Linux 6.12 and 6.1, x86-64. Not exact with preempt=full or PREEMPT_RT.
 */
#pragma D option quiet
#pragma D option switchrate=10hz
#pragma D option aggsize=1m

inline int64_t TURN = 30000000000;	/* ns; a set is in use for two turns, and at rest for two */
inline int REFUSED = -11;		/* -EAGAIN */
inline uint64_t ERRORS = 0xfffffffffffff001;	/* from here on a pointer is an error, IS_ERR() */

self int ring;	/* whether it is within io_connect() */
/* Per CPU: what the return of unix_find_other() leaves here is there at that of unix_stream_connect(). */
this struct sock *other;
this uint64_t thread, later;
this int refused, length;
this struct unix_address *address;	/* only unix_drops */
this uint64_t *word;
this uint64_t cookie, inode;
this uint64_t w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13;
this int64_t over;

BEGIN
{
	turn = 0; turned = began0 = timestamp; began1 = began0 + 1;
	printf("\nready 5 %d\n", ((struct net *)&`init_net)->ns.inum);
}

/* The socket that a name leads to; after a wait, and for datagrams, too. */
fbt::unix_find_other:return
{
	this->other = (struct sock *)arg1;
	this->thread = (uint64_t)curthread;
}

fbt::io_connect:entry
{
	self->ring = 1;
	this->later = 0;
}

/* Not a failure to find the socket, which may have the same number. */
fbt::unix_stream_connect:return
/ (int)arg1 == REFUSED &&
    (this->thread != (uint64_t)curthread || (uint64_t)this->other < ERRORS) /
{
	this->refused = 1;
	this->later = self->ring ? (uint64_t)curthread : 0;
	this->inode = this->cookie = this->length = 0;
	this->w0 = this->w1 = this->w2 = this->w3 = this->w4 = 0;
}
/*
 * Its reference is gone by now. Only a listener that is still open keeps its name, which never changes;
 * so it has to be open before the name is read, and after that.
 */
fbt::unix_stream_connect:return
/ this->refused && this->thread == (uint64_t)curthread && this->other->sk_socket != NULL /
{
	this->address = ((struct unix_sock *)this->other)->addr;
	this->length = this->address->len;
	this->word = (uint64_t *)(this->address + 1);
	this->w0 = ntohll(this->word[0]);
	this->w1 = this->length > 8 ? ntohll(this->word[1]) : 0;
	this->w2 = this->length > 16 ? ntohll(this->word[2]) : 0;
	this->w3 = this->length > 24 ? ntohll(this->word[3]) : 0;
	this->w4 = this->length > 32 ? ntohll(this->word[4]) : 0;
	this->w5 = this->length > 40 ? ntohll(this->word[5]) : 0;
	this->w6 = this->length > 48 ? ntohll(this->word[6]) : 0;
	this->w7 = this->length > 56 ? ntohll(this->word[7]) : 0;
	this->w8 = this->length > 64 ? ntohll(this->word[8]) : 0;
	this->w9 = this->length > 72 ? ntohll(this->word[9]) : 0;
	this->w10 = this->length > 80 ? ntohll(this->word[10]) : 0;
	this->w11 = this->length > 88 ? ntohll(this->word[11]) : 0;
	this->w12 = this->length > 96 ? ntohll(this->word[12]) : 0;
	this->w13 = this->length > 104 ? ntohll(this->word[13]) : 0;
	this->cookie = this->other->__sk_common.skc_net.net->net_cookie;
	this->inode = this->other->sk_socket == NULL ? 0 :
	    ((struct socket_alloc *)this->other->sk_socket)->vfs_inode.i_ino;
}
fbt::unix_stream_connect:return
/ this->refused && this->inode == 0 /
{
	this->cookie = this->length = 0;
	this->w0 = this->w1 = this->w2 = this->w3 = this->w4 = 0;
}

/* If io_uring returns EAGAIN itself, it tries again; else the process gets what it was told. */
fbt::io_connect:return
{
	this->refused = this->later == (uint64_t)curthread && (int)arg1 != REFUSED;
	this->later = 0;
	self->ring = 0;
}

/* Count in the set in use. */
fbt::unix_stream_connect:return, fbt::io_connect:return
/ this->refused && this->later == 0 && this->length > 40 /
{
	@more0[this->inode, 1, this->w5, this->w6, this->w7, this->w8, this->w9, this->w10] =
	    sum(turn & 2 ? 0 : 1);
	@more1[this->inode, 1, this->w5, this->w6, this->w7, this->w8, this->w9, this->w10] =
	    sum(turn & 2 ? 1 : 0);
}
fbt::unix_stream_connect:return, fbt::io_connect:return
/ this->refused && this->later == 0 && this->length > 88 /
{
	@more0[this->inode, 2, this->w11, this->w12, this->w13, 0, 0, 0] = sum(turn & 2 ? 0 : 1);
	@more1[this->inode, 2, this->w11, this->w12, this->w13, 0, 0, 0] = sum(turn & 2 ? 1 : 0);
}
fbt::unix_stream_connect:return, fbt::io_connect:return
/ this->refused && this->later == 0 /
{
	@unix0[this->cookie, this->inode, this->length, this->w0, this->w1, this->w2, this->w3,
	    this->w4] = sum(turn & 2 ? 0 : 1);
	@unix1[this->cookie, this->inode, this->length, this->w0, this->w1, this->w2, this->w3,
	    this->w4] = sum(turn & 2 ? 1 : 0);
}
fbt::unix_stream_connect:return, fbt::io_connect:return
{
	this->thread = this->refused = 0;
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
	printf("tick %d\nset %d\n", timestamp, began0);
	printa("more %d %d %016x%016x%016x%016x%016x%016x %@d\n", @more0);	/* only unix_drops */
	printa("unix %d %d %d %016x%016x%016x%016x%016x %@d\n", @unix0);	/* only unix_drops */
	printf("set %d\n", began1);
	printa("more %d %d %016x%016x%016x%016x%016x%016x %@d\n", @more1);	/* only unix_drops */
	printa("unix %d %d %d %016x%016x%016x%016x%016x %@d\n", @unix1);	/* only unix_drops */
}
tick-1s / this->over && turn % 4 == 1 / { trunc(@more1); trunc(@unix1); }	/* only unix_drops */
tick-1s / this->over && turn % 4 == 3 / { trunc(@more0); trunc(@unix0); }	/* only unix_drops */
