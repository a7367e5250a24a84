/*
 * Lines inside others, and between others' steps: what FreeBSD's locks and references keep apart.
 *
 * A line inside another of its thread stands for what interrupts it. FreeBSD would put off what
 * finds a lock taken; here such a line cannot be, nor can one that the outer line has to wait for.
 */
#include "model.h"
#include "words.h"

bool begin_line(struct words *words)
{
	struct listener *listener = words->listener;
	const struct command *command = words->command;

	if (is_nested() && (any_lock_owned() || (command->call && listener->calls) ||
			    (command->alone && listener->users > 2)))
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
