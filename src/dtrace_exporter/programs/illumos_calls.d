#!/usr/sbin/dtrace -s
/*
 * illumos_calls.d - whose TCP listeners are: the programs and services that accept connections.
 *
 * USAGE: dtrace -s illumos_calls.d	# in the global zone; Ctrl-C ends it
 *   ready 5 global
 *   program ffffff01d3b2ac80 1000300000100 sshd\0\0\0...
 *   fmri ffffff01d3b2ac80 1000300000100 svc:/network/ssh:default\0\0\0...
 *   tick 1001000000000
 *
 * program SOCKET TIME NAME: a process of this name has accepted at the listener whose conn_t has the
 *	address SOCKET, at TIME, ns since boot
 * fmri SOCKET TIME NAME: a process of this service has
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
uint64_t minute;		/* since boot */
uint64_t seen[uint64_t];	/* in 1,024 places: which process has been told, of which listener and minute */
this conn_t *conn;
this uint64_t mark;
this int is_new;
this struct cont_process *contract;					/* only fmri */

BEGIN { minute = timestamp / 60000000000; printf("\nready 5 global\n"); }

/* begin owners */
/* accept(): tcp_accept(listener, connection, ...), in the process; KSSL may have moved its listener. */
fbt:ip:tcp_accept:entry
/ this->is_new = 0,
    this->conn = ((conn_t *)arg1)->conn_proto_priv.cp_tcp->tcp_listener->tcp_connp,
    this->mark = ((uint64_t)this->conn ^ (uint64_t)pid << 32 ^ minute) * 0x9e3779b97f4a7c15,
    this->is_new = seen[this->mark >> 54] != this->mark /
{
	seen[this->mark >> 54] = this->mark;
	@program[(uint64_t)this->conn, execname] = max(timestamp);
}
/* end owners */
/* begin fmri */
/* A thread of the kernel's own has no contract. */
fbt:ip:tcp_accept:entry
/ this->is_new && (this->contract = curthread->t_procp->p_ct_process) != NULL &&
    this->contract->conp_svc_fmri != NULL /
{
	@fmri[(uint64_t)this->conn, stringof(this->contract->conp_svc_fmri->rs_string)] =
	    max(timestamp);
}
/* end fmri */

/* trunc() empties dtrace(1)'s copy, in printa()'s clause, and loses nothing. */
tick-1s, END
{
	minute = timestamp / 60000000000;
	printa("program %x %@d %S\n", @program); trunc(@program);	/* only owners */
	printa("fmri %x %@d %S\n", @fmri); trunc(@fmri);		/* only fmri */
	printf("tick %d\n", timestamp);
}
