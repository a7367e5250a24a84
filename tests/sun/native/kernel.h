/*
 * What the model takes from Linux, for a process: it stands in for every linux/ header.
 *
 * Threads are simulated, one runs at a time: see library.py. So nothing here is atomic, and what
 * waits lets another thread run.
 */
#ifndef NATIVE_KERNEL_H
#define NATIVE_KERNEL_H

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef long long s64;
#define U16_MAX UINT16_MAX
#define U32_MAX UINT32_MAX
#define U64_MAX UINT64_MAX

/* Functions with probes lie together, so that their names are found in the symbol table. */
#define TRACED __attribute__((noinline, noclone, used, section("traced")))
#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#define __aligned(n) __attribute__((aligned(n)))
#define static_assert(condition) _Static_assert(condition, #condition)
#define ARRAY_SIZE(array) (sizeof(array) / sizeof(*(array)))
#define container_of(pointer, type, member) \
	((type *)((char *)(pointer)-offsetof(type, member)))
#define clamp(value, least, most) \
	((value) < (least) ? (least) : (value) > (most) ? (most) : (value))
#define READ_ONCE(from) (*(volatile __typeof__(from) *)&(from))
#define WRITE_ONCE(to, value) (*(volatile __typeof__(to) *)&(to) = (value))
#define barrier() __asm__ volatile("" ::: "memory")
#ifndef htons
#define htons(number) __builtin_bswap16(number)
#define htonl(number) __builtin_bswap32(number)
#endif
#define div64_s64(number, by) ((number) / (by))

/* linux/atomic.h */
typedef struct {
	int counter;
} atomic_t;
typedef struct {
	s64 counter;
} atomic64_t;
#define atomic_read(v) ((v)->counter)
#define atomic_set(v, value) ((v)->counter = (value))
#define atomic_inc(v) ((v)->counter++)
#define atomic_dec(v) ((v)->counter--)
#define atomic_inc_return(v) (++(v)->counter)
#define atomic_dec_and_test(v) (!--(v)->counter)
#define atomic_sub_and_test(n, v) (!((v)->counter -= (n)))
#define atomic_dec_if_positive(v) ((v)->counter > 0 ? --(v)->counter : (v)->counter - 1)
#define atomic64_read(v) ((v)->counter)
#define atomic64_inc(v) ((v)->counter++)
#define atomic64_dec(v) ((v)->counter--)
#define atomic64_add(n, v) ((v)->counter += (n))
#define atomic64_fetch_inc(v) ((v)->counter++)
#define atomic64_dec_if_positive(v) atomic_dec_if_positive(v)

/* linux/list.h */
struct list_head {
	struct list_head *next, *prev;
};
#define LIST_HEAD(name) struct list_head name = { &(name), &(name) }
#define INIT_LIST_HEAD(head) ((head)->next = (head)->prev = (head))
#define list_empty_careful(head) ((head)->next == (head))
#define list_entry(at, type, member) container_of(at, type, member)
#define list_first_entry_or_null(head, type, member) \
	(list_empty_careful(head) ? NULL : list_entry((head)->next, type, member))
#define list_step(at, way, member) list_entry((at)->member.way, __typeof__(*(at)), member)
#define list_for_each_entry(at, head, member)                         \
	for ((at) = list_entry((head)->next, __typeof__(*(at)), member); \
	     &(at)->member != (head); (at) = list_step(at, next, member))
#define list_for_each_entry_reverse(at, head, member)                 \
	for ((at) = list_entry((head)->prev, __typeof__(*(at)), member); \
	     &(at)->member != (head); (at) = list_step(at, prev, member))
#define list_for_each_entry_safe(at, after, head, member)             \
	for ((at) = list_entry((head)->next, __typeof__(*(at)), member), \
	    (after) = list_step(at, next, member);                      \
	     &(at)->member != (head); (at) = (after), (after) = list_step(at, next, member))

static inline void list_add_tail(struct list_head *entry, struct list_head *head)
{
	entry->prev = head->prev;
	entry->next = head;
	head->prev->next = entry;
	head->prev = entry;
}

static inline void list_del(struct list_head *entry)
{
	entry->prev->next = entry->next;
	entry->next->prev = entry->prev;
}

/* linux/slab.h: memory that is given back is the next to be handed out, as in the model's caches */
#define GFP_KERNEL 0
#define GFP_ATOMIC 0
#define __GFP_NOFAIL 0
struct kmem_cache;
void *kzalloc(size_t size, int flags);
void kfree(const void *memory);
struct kmem_cache *kmem_cache_create(const char *name, size_t size, size_t align, int flags,
				     void *constructor);
void *kmem_cache_zalloc(struct kmem_cache *cache, int flags);
void kmem_cache_free(struct kmem_cache *cache, void *memory);
void kmem_cache_destroy(struct kmem_cache *cache);

/* linux/spinlock.h, linux/rwsem.h: model_lock is for CPUs that are truly at once */
typedef struct {
	u32 owner;
} spinlock_t;
struct rw_semaphore {
	int unused;
};
#define DECLARE_RWSEM(name) struct rw_semaphore name
#define spin_lock_init(lock) ((lock)->owner = 0)
#define spin_trylock(lock) (!(lock)->owner && (spin_lock(lock), true))
#define down_read(semaphore) ((void)(semaphore))
#define down_write(semaphore) ((void)(semaphore))
#define up_read(semaphore) ((void)(semaphore))
#define up_write(semaphore) ((void)(semaphore))
void spin_lock(spinlock_t *lock);
void spin_unlock(spinlock_t *lock);

/* linux/sched.h, linux/ktime.h */
#define current NULL
#define task_tgid_nr(task) 4711
#define signal_pending(task) false
void cond_resched(void);
u64 ktime_get_ns(void);

/* linux/kstrtox.h, linux/inet.h, linux/kernel.h; of %pI only what the model prints */
int kstrtou64(const char *text, unsigned int base, u64 *number);
int kstrtou32(const char *text, unsigned int base, u32 *number);
int kstrtoint(const char *text, unsigned int base, int *number);
int kstrtobool(const char *text, bool *on);
int in4_pton(const char *text, int size, u8 *to, int delimiter, const char **end);
int in6_pton(const char *text, int size, u8 *to, int delimiter, const char **end);

#define snprintf(text, size, format, address) show_ip(text, size, format, address)
int show_ip(char *text, size_t size, const char *format, const void *address);
#define strscpy(to, from, size) ((void)memcpy(to, from, strnlen(from, (size)-1) + 1))

/* linux/seq_file.h */
struct seq_file {
	char *text;
	size_t size;
	size_t at;
};
void seq_printf(struct seq_file *seq, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
#define seq_puts(seq, text) seq_printf(seq, "%s", text)

/* What a model needs in a process only. */
bool lock_owned(const spinlock_t *lock);
bool any_lock_owned(void);
u32 thread_number(void);
void wait_for_others(const char *reason);
void fail(const char *what, const char *more);
/* Lines that the thread is in, one in another. */
void push_line(void);
void pop_line(void);
bool is_nested(void);

#endif
