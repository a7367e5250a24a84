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

	if (any_lock_owned() || lock_owned(&listener->tcp.tcp_eager_lock.lock))
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

bool squeue_free(const struct squeue_s *squeue)
{
	return !squeue->sq_run;
}

static kthread_t *this_thread(void)
{
	return (kthread_t *)(uintptr_t)thread_number();
}

void squeue_enter(struct squeue_s *squeue)
{
	if (squeue->sq_run == this_thread())
		fail("enters a squeue that it is in", "");
	while (squeue->sq_run)
		wait_for_others("a squeue");
	squeue->sq_run = this_thread();
}

void squeue_exit(struct squeue_s *squeue)
{
	squeue->sq_run = NULL;
}

static __thread struct process *running;

struct process *run_as(struct process *process)
{
	struct process *before = running;

	running = process;
	return before;
}

int model_process(char comm[COMM_MOST + 1]);
/* As what the thread runs. Returns its process's number, 0 for the kernel's own. */
int model_process(char comm[COMM_MOST + 1])
{
	strscpy(comm, running ? running->comm : "sched", COMM_MOST + 1);
	return running ? running->pid : 0;
}

struct thread {
	struct thread *next;
	u64 number;
	kthread_t thread;
};

u64 model_kthread(u64 number);
/* The kthread_t of a thread by its number, for what runs now; 0 as long as there are no processes. */
u64 model_kthread(u64 number)
{
	static struct thread *threads;
	static proc_t p0;
	struct thread *thread = threads;

	if (list_empty_careful(&processes))
		return 0;
	while (thread && thread->number != number)
		thread = thread->next;
	if (!thread) {
		thread = kzalloc(sizeof(*thread), GFP_KERNEL);
		thread->number = number;
		thread->next = threads;
		threads = thread;
	}
	set_process(&thread->thread, running ? &running->proc : &p0);
	return (u64)&thread->thread;
}
