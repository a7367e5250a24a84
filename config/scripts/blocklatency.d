#!/usr/sbin/dtrace -s
/*
 * How long block devices take for a request, in nanoseconds, and how much they move: by device.
 */
#pragma D option quiet

io:::start
{
	began[arg0] = timestamp;
}

io:::done
/began[arg0]/
{
	@seconds[args[1]->dev_statname] = quantize(timestamp - began[arg0]);
	@bytes[args[1]->dev_statname] = sum(args[0]->b_bcount);
	began[arg0] = 0;
}
