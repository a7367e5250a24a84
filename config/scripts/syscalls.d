#!/usr/sbin/dtrace -s
/*
 * System calls by program, and those that failed by program and error.
 */
#pragma D option quiet

syscall:::entry
{
	@calls[execname] = count();
}

syscall:::return
/errno != 0/
{
	@errors[execname, errno] = count();
}
