/*
 * The library's own half: memory, simulated threads, and the probes.
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "kernel.h"

void fail(const char *what, const char *more)
{
	fprintf(stderr, "the model: %s%s\n", what, more);
	abort();
}

/* Memory */

#define CHUNK (1UL << 20)
/* Pieces are multiples of this; a listener and a connection take as many. */
#define UNIT 256
#define CLASSES 64
#define HEADER 64

/* Before each piece, so that its own bytes stay as they were when it is given back. */
struct piece {
	struct piece *next;
	u32 class;
};

struct chunk {
	struct chunk *next;
};

static struct piece *given_back[CLASSES];
static struct chunk *chunks;
static char *chunk_at, *chunk_end;

static struct piece *take_piece(u32 class)
{
	size_t size = HEADER + UNIT * class;
	struct piece *piece = given_back[class];

	if (piece) {
		given_back[class] = piece->next;
		return piece;
	}
	if ((size_t)(chunk_end - chunk_at) < size) {
		struct chunk *chunk = mmap(NULL, CHUNK, PROT_READ | PROT_WRITE,
					   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (chunk == MAP_FAILED)
			return NULL;
		chunk->next = chunks;
		chunks = chunk;
		chunk_at = (char *)chunk + HEADER;
		chunk_end = (char *)chunk + CHUNK;
	}
	piece = (struct piece *)chunk_at;
	chunk_at += size;
	return piece;
}

void *kzalloc(size_t size, int flags)
{
	u32 class = (size + UNIT - 1) / UNIT;
	struct piece *piece = class < CLASSES ? take_piece(class) : NULL;

	if (!piece)
		return NULL;
	piece->class = class;
	return memset((char *)piece + HEADER, 0, UNIT * class);
}

void kfree(const void *memory)
{
	struct piece *piece = (struct piece *)((char *)memory - HEADER);

	if (!memory)
		return;
	piece->next = given_back[piece->class];
	given_back[piece->class] = piece;
}

void free_memory(void)
{
	while (chunks) {
		struct chunk *chunk = chunks;

		chunks = chunk->next;
		munmap(chunk, CHUNK);
	}
}

struct kmem_cache {
	size_t size;
};

struct kmem_cache *kmem_cache_create(const char *name, size_t size, size_t align, int flags,
				     void *constructor)
{
	struct kmem_cache *cache = kzalloc(sizeof(*cache), flags);

	if (cache)
		cache->size = size;
	return cache;
}

void *kmem_cache_zalloc(struct kmem_cache *cache, int flags)
{
	return kzalloc(cache->size, flags);
}

void kmem_cache_free(struct kmem_cache *cache, void *memory)
{
	kfree(memory);
}

void kmem_cache_destroy(struct kmem_cache *cache)
{
	kfree(cache);
}

/* Read memory that may not be there. Returns 0, or -EFAULT. */
int model_read(u64 address, void *to, size_t size)
{
	struct iovec here = { to, size };
	struct iovec there = { (void *)address, size };
	ssize_t got = process_vm_readv(getpid(), &here, 1, &there, 1, 0);

	return got == (ssize_t)size ? 0 : -EFAULT;
}

/* Threads: the number of the one that runs, and what to call to let another run. */

static __thread u32 thread = 1;
static __thread int locks;
static __thread int depth;
static __thread void (*yielder)(const char *reason);

void model_thread(u32 number, void (*yield)(const char *reason))
{
	thread = number;
	yielder = yield;
}

void wait_for_others(const char *reason)
{
	if (!yielder)
		fail("waits for ever for ", reason);
	yielder(reason);
}

void cond_resched(void)
{
	if (yielder)
		yielder(NULL);
}

void spin_lock(spinlock_t *lock)
{
	if (lock->owner == thread)
		fail("takes a lock that it has", "");
	while (lock->owner)
		wait_for_others("a lock");
	lock->owner = thread;
	locks++;
}

void spin_unlock(spinlock_t *lock)
{
	lock->owner = 0;
	locks--;
}

bool lock_owned(const spinlock_t *lock)
{
	return lock->owner == thread;
}

bool any_lock_owned(void)
{
	return locks > 0;
}

u32 thread_number(void)
{
	return thread;
}

bool is_nested(void)
{
	return depth > 1;
}

void push_line(void)
{
	depth++;
}

void pop_line(void)
{
	depth--;
}

/* Time stands still until someone sets it. */
u64 model_time = 1000000000000;

u64 ktime_get_ns(void)
{
	return model_time;
}

/* Text */

int kstrtou64(const char *text, unsigned int base, u64 *number)
{
	u64 value = 0;

	if (!*text)
		return -EINVAL;
	for (; *text; text++) {
		if (*text < '0' || *text > '9' || value > U64_MAX / 10 - 1)
			return -EINVAL;
		value = value * 10 + (*text - '0');
	}
	*number = value;
	return 0;
}

int kstrtou32(const char *text, unsigned int base, u32 *number)
{
	u64 value;

	if (kstrtou64(text, base, &value) || value > U32_MAX)
		return -EINVAL;
	*number = value;
	return 0;
}

int kstrtoint(const char *text, unsigned int base, int *number)
{
	bool negative = *text == '-';
	u64 value;

	if (kstrtou64(text + negative, base, &value) || value > INT_MAX)
		return -EINVAL;
	*number = negative ? -(int)value : (int)value;
	return 0;
}

int kstrtobool(const char *text, bool *on)
{
	*on = *text == '1';
	return *text == '0' || *text == '1' ? 0 : -EINVAL;
}

int in4_pton(const char *text, int size, u8 *to, int delimiter, const char **end)
{
	return inet_pton(AF_INET, text, to) == 1;
}

int in6_pton(const char *text, int size, u8 *to, int delimiter, const char **end)
{
	return inet_pton(AF_INET6, text, to) == 1;
}

int show_ip(char *text, size_t size, const char *format, const void *address)
{
	return !!inet_ntop(strcmp(format, "%pI4") ? AF_INET6 : AF_INET, address, text, size);
}

void seq_printf(struct seq_file *seq, const char *format, ...)
{
	size_t room = seq->at < seq->size ? seq->size - seq->at : 0;
	va_list arguments;

	va_start(arguments, format);
	seq->at += vsnprintf(room ? seq->text + seq->at : NULL, room, format, arguments);
	va_end(arguments);
}

/* Probes: see fentry.S. */

#define PROBES 256
#define RETURNS_MOST 256

struct probe {
	u64 site;
	int entry;
	int on_return;
};

#define HIDDEN __attribute__((visibility("hidden")))

HIDDEN int armed;
static struct probe probes[PROBES];
static void (*hook)(int id, const u64 arguments[6]);

static __thread struct {
	u64 address;
	int id;
} returns[RETURNS_MOST];
static __thread int returns_count;

extern HIDDEN char return_trampoline[];

static struct probe *find_probe(u64 site)
{
	u32 at = (u32)(site >> 4) * 0x9e3779b1u >> 24;

	while (probes[at].site && probes[at].site != site)
		at = (at + 1) % PROBES;
	return &probes[at];
}

/* Where a function goes on after its call of __fentry__, which the linker may have changed. */
static u64 site_of(u64 function)
{
	const u8 *code = (const u8 *)function;

	if (code[0] == 0xe8)
		return function + 5;
	if ((code[0] == 0xff && code[1] == 0x15) || (code[0] == 0x67 && code[1] == 0xe8))
		return function + 6;
	fail("a function does not begin with a call of __fentry__", "");
	return 0;
}

/* Have a function's entry and return reported under these numbers; -1 is not at all. */
void model_probe(u64 function, int entry, int on_return)
{
	struct probe *probe = find_probe(site_of(function));

	if (armed == PROBES / 2)
		fail("has too many probes", "");
	probe->site = site_of(function);
	probe->entry = entry;
	probe->on_return = on_return;
	armed++;
}

void model_hook(void (*function)(int id, const u64 arguments[6]))
{
	memset(probes, 0, sizeof(probes));
	armed = 0;
	hook = function;
}

HIDDEN void on_entry(const u64 *arguments, u64 site, u64 *return_address);
void on_entry(const u64 *arguments, u64 site, u64 *return_address)
{
	const struct probe *probe = find_probe(site);
	int on_return;

	if (!probe->site)
		return;
	on_return = probe->on_return;
	if (probe->entry >= 0)
		hook(probe->entry, arguments);
	if (on_return < 0)
		return;
	if (returns_count == RETURNS_MOST)
		fail("is too deep in probed functions", "");
	returns[returns_count].address = *return_address;
	returns[returns_count++].id = on_return;
	*return_address = (u64)return_trampoline;
}

HIDDEN u64 on_return(u64 value);
u64 on_return(u64 value)
{
	/* arg0 is where in the function it returned; nobody knows here. */
	u64 arguments[6] = { 0, value };

	u64 address = returns[--returns_count].address;

	hook(returns[returns_count].id, arguments);
	return address;
}
