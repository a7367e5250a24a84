/*
 * Lines inside others, and between others' steps: what Solaris' squeues and references keep apart.
 *
 * A line inside another of its thread stands for what interrupts it. Solaris would put off what
 * finds its squeue busy; here such a line cannot be, nor can one that the outer line has to wait
 * for.
 */
#include "driver.h"

/* Whether a line of this thread, in which another is, leaves the listener to it. */
static bool nests(const struct words *words)
{
	struct listener *listener = words->listener;
	const struct command *command = words->command;

	if (any_mutex_owned() || mutex_owned(&listener->tcp.tcp_eager_lock))
		return false;
	if ((command->squeue || listener->kind != SOCKET) && !squeue_free(&listener->squeue))
		return false;
	if (command->call && listener->calls)
		return false;
	/* What closes waits for all else. */
	return !command->alone || listener->conn.conn_ref == 3;
}

bool begin_line(struct words *words)
{
	struct listener *listener = words->listener;
	const struct command *command = words->command;

	if (is_nested() && !nests(words))
		return false;
	if (!command->call)
		return true;
	while (!listener->closing && (command->alone ? listener->calls : listener->calls < 0))
		wait_for_others("the application's other calls");
	if (listener->closing)
		return false;
	listener->calls = command->alone ? -1 : listener->calls + 1;
	words->in_call = true;
	return true;
}

void end_line(struct words *words)
{
	if (words->in_call)
		words->listener->calls = words->command->alone ? 0 : words->listener->calls - 1;
}

static bool in_hand(struct listener *listener)
{
	tcp_t *head = &listener->tcp;
	bool found = false;
	tcp_t *tcp;

	for (tcp = head->tcp_eager_prev_q0; tcp != head; tcp = tcp->tcp_eager_prev_q0)
		found |= eager_of(tcp)->claims;
	for (tcp = head->tcp_eager_next_q; tcp; tcp = tcp->tcp_eager_next_q)
		found |= eager_of(tcp)->claims;
	return found;
}

/* Have others finish with a listener's connections. Returns whether to look again. */
bool wait_for_claims(struct listener *listener)
{
	if (!in_hand(listener))
		return false;
	wait_for_others("connections in hand");
	return true;
}

/* What library.py calls. */

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
	return eagers.counter;
}
