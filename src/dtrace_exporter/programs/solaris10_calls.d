#!/usr/sbin/dtrace -s
/*
 * solaris10_calls.d - whose TCP listeners are: the programs that accept connections.
 *
 * USAGE: dtrace -s solaris10_calls.d	# in the global zone; Ctrl-C ends it
 *   ready 5 global
 *   program ffffff01d3b2ac80 1000300000120 sshd\0\0\0...
 *   tick 1001000000000
 *
 * program SOCKET TIME NAME: a process of this name has accepted at the listener whose conn_t has the
 *	address SOCKET, at TIME, ns since boot
 * tick TIME: the heartbeat, when all has been printed
 *
 * Names are escaped, as anybody may have made them up, and filled up with \0. Nothing here counts: a
 * process is told at its first accept of a minute at a listener, and again if another one takes its
 * place in seen[]. All other accepts cost a look there. TLI accepts in any thread, and is not told.
 * TESTED: docs/install-solaris.md tells on what.
 */
#pragma D option quiet
#pragma D option switchrate=2hz
#pragma D option aggrate=1hz
#pragma D option aggsize=256k
#pragma D option bufsize=64k
#pragma D option dynvarsize=256k
#pragma D option strsize=128
inline int OLD_CONN_RES = 1;	/* O_T_CONN_RES of sys/tihdr.h */
inline int CONN_RES = 28;	/* T_CONN_RES */
uint64_t minute;		/* since boot */
uint64_t seen[uint64_t];	/* in 1,024 places: which process has been told, of which listener and minute */
this conn_t *conn;
this tcp_t *listener;
this tcp_t **eager;
this struct T_conn_res *response;
this uint64_t mark;
this int is_new;

BEGIN { minute = timestamp / 60000000000; printf("\nready 5 global\n"); }

/* begin owners */
/* accept(): tcp_wput_accept(queue, T_CONN_RES), in the process: nothing is between a socket and TCP */
/* that would put messages off. The option is the connection's address, in no alignment. */
fbt:ip:tcp_wput_accept:entry
/ this->listener = NULL,
    this->response = (struct T_conn_res *)((mblk_t *)arg1)->b_rptr,
    this->response->PRIM_type == CONN_RES || this->response->PRIM_type == OLD_CONN_RES /
{
	this->eager = (tcp_t **)alloca(sizeof (tcp_t *));
	bcopy((char *)this->response + this->response->OPT_offset, this->eager, sizeof (tcp_t *));
	this->listener = (*this->eager)->tcp_listener;
}
fbt:ip:tcp_wput_accept:entry
/ this->listener != NULL && (
    this->conn = this->listener->tcp_connp,
    this->mark = ((uint64_t)this->conn ^ (uint64_t)pid << 32 ^ minute) * 0x9e3779b97f4a7c15,
    seen[this->mark >> 54] != this->mark) /
{
	seen[this->mark >> 54] = this->mark;
	@program[(uint64_t)this->conn, execname] = max(timestamp);
}
/* end owners */

/* trunc() empties dtrace(1)'s copy, in printa()'s clause, and loses nothing. */
tick-1s, END
{
	minute = timestamp / 60000000000;
	printa("program %x %@d %S\n", @program); trunc(@program);	/* only owners */
	printf("tick %d\n", timestamp);
}
