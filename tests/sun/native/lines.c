/*
 * What library.py calls.
 */
#include "words.h"

int model_run(char *line);
long model_totals(char *text, size_t size);
int model_eagers(void);

int model_run(char *line)
{
	int error;

	push_line();
	error = run_line(line);
	pop_line();
	return error;
}

/* Returns how long the text is, which may be more than there is room for. */
long model_totals(char *text, size_t size)
{
	struct seq_file seq = { .text = text, .size = size };

	totals_show(&seq, NULL);
	return seq.at;
}

int model_eagers(void)
{
	return atomic_read(&eagers);
}
