#!/usr/sbin/dtrace -s
/*
 * Bytes that programs read and write, by file system: for illumos and Solaris, which have fsinfo.
 */
#pragma D option quiet

fsinfo:::read,
fsinfo:::write
{
	@bytes[probename, args[0]->fi_mount] = sum(arg1);
	@size[probename] = lquantize(arg1, 0, 131072, 8192);
}
