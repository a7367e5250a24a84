/*
 * The script's commands: each line one event.
 */
#include <linux/errno.h>
#include <linux/inet.h>
#include <linux/kernel.h>
#include <linux/kstrtox.h>
#include <linux/limits.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "model.h"
#include "words.h"

static struct place *find_place(const char *id)
{
	struct place *place;
	int number;

	if (!id || kstrtoint(id, 10, &number))
		return NULL;
	list_for_each_entry(place, &places, link)
		if (place->id == number)
			return place;
	return NULL;
}

static struct listener *find_listener(const char *name)
{
	struct record *record;

	if (!name)
		return NULL;
	list_for_each_entry_reverse(record, &records, link)
		if (record->listener && !strcmp(record->name, name))
			return record->listener;
	return NULL;
}

/* The listener that the next word names; it stays until the line is done. */
static struct listener *take_listener(struct words *words)
{
	struct listener *listener = find_listener(next_word(words));

	if (!listener)
		return NULL;
	atomic_inc((atomic_t *)&listener->users);
	words->listener = listener;
	return begin_line(words) ? listener : NULL;
}

/* Drop references to a listener, which is forgotten with the last one. */
void let_go(struct listener *listener, int references)
{
	if (!atomic_sub_and_test(references, (atomic_t *)&listener->users))
		return;
	listener->record->freed = true;
	in_pcbrele(listener->inp);
	kfree(listener);
}

/* zone ID NAME [exclusive]: a jail, by the word that all models have for it */
static int run_zone(struct words *words)
{
	bool exclusive = take_flag(words, "exclusive");
	char *id = next_word(words);
	char *name = next_word(words);
	struct place *place;
	int number;

	if (!id || !name || next_word(words) || kstrtoint(id, 10, &number) || find_place(id) ||
	    strlen(name) >= sizeof(place->prison.pr_name))
		return -EINVAL;
	place = kzalloc(sizeof(*place), GFP_KERNEL);
	if (!place)
		return -ENOMEM;
	if (exclusive) {
		place->stack = kzalloc(sizeof(*place->stack), GFP_KERNEL);
		if (!place->stack) {
			kfree(place);
			return -ENOMEM;
		}
		INIT_LIST_HEAD(&place->stack->sch_bucket);
		place->stack->bucket_limit = 30;
		place->stack->owner = place;
	} else {
		place->stack = find_place("0")->stack;
	}
	place->id = number;
	strscpy(place->prison.pr_name, name, sizeof(place->prison.pr_name));
	place->cred.cr_ref = 1;
	place->cred.cr_prison = &place->prison;
	list_add_tail(&place->link, &places);
	return 0;
}

/* bucketlimit ZONE N: so many half-open connections are in its stack's syncache */
static int run_bucketlimit(struct words *words)
{
	struct place *place = find_place(next_word(words));
	char *value = next_word(words);
	u32 limit;

	if (!place || !value || next_word(words) || kstrtou32(value, 10, &limit) || !limit)
		return -EINVAL;
	place->stack->bucket_limit = limit;
	return 0;
}

/* alloc_fail N: so many allocations fail from now on */
static int run_alloc_fail(struct words *words)
{
	char *value = next_word(words);
	u32 count;

	if (!value || next_word(words) || kstrtou32(value, 10, &count) || count > INT_MAX)
		return -EINVAL;
	atomic_set(&failing_allocations, count);
	return 0;
}

static int read_address(const char *text, union in_dependaddr *address, bool *v4)
{
	memset(address, 0, sizeof(*address));
	*v4 = !strchr(text, ':');
	if (*v4)
		return in4_pton(text, -1, (u8 *)&address->id46_addr.ia46_addr4, -1, NULL) ?
			       0 : -EINVAL;
	return in6_pton(text, -1, address->id6_addr.__u6_addr.__u6_addr8, -1, NULL) ? 0 : -EINVAL;
}

static void show_address(char *text, size_t size, const union in_dependaddr *address, bool v4)
{
	if (v4)
		snprintf(text, size, "%pI4", &address->id46_addr.ia46_addr4);
	else
		snprintf(text, size, "%pI6c", &address->id6_addr);
}

/*
 * listen L zone Z address A|* port P backlog B [family 4|6] [v6only] [filter]
 * A socket of IPv6 that is bound to any address takes IPv4 too, unless told.
 */
static int run_listen(struct words *words)
{
	bool filter = take_flag(words, "filter"), only = take_flag(words, "v6only"), v4 = false;
	u64 backlog = U64_MAX, family = 0, port = 0;
	char *name = next_word(words);
	struct place *place = find_place(take(words, "zone"));
	char *address_word = take(words, "address");
	union in_dependaddr address = {};
	struct listener *listener;
	struct record *record;
	struct inpcb *inp;
	bool any;

	if (take_number(words, "port", U16_MAX, &port) ||
	    take_number(words, "backlog", INT_MAX, &backlog) ||
	    take_number(words, "family", 6, &family))
		return -EINVAL;
	if (!name || !place || !address_word || !port || backlog == U64_MAX || next_word(words) ||
	    strlen(name) >= sizeof(record->name) || find_listener(name))
		return -EINVAL;
	any = !strcmp(address_word, "*");
	if (!any && read_address(address_word, &address, &v4))
		return -EINVAL;
	if (!family)
		family = v4 ? 4 : 6;
	if ((family != 4 && family != 6) || (family == 4 && (only || (!any && !v4))))
		return -EINVAL;

	listener = kzalloc(sizeof(*listener), GFP_KERNEL);
	record = kzalloc(sizeof(*record), GFP_KERNEL);
	if (listener && record)
		listener->so = socreate(place, &tcp_protosw);
	if (!listener || !record || !listener->so) {
		kfree(listener);
		kfree(record);
		return -EINVAL;
	}
	socket_of(listener->so)->record = record;
	inp = listener->inp = sotoinpcb(listener->so);
	in_pcbref(inp);
	inp->inp_vflag = family == 4 ? INP_IPV4 : INP_IPV6PROTO;
	if (family == 6)
		inp->inp_vflag |= v4 ? INP_IPV4 : any && !only ? INP_IPV4 | INP_IPV6 : INP_IPV6;
	/* A socket of IPv6 has an address of IPv4 as IPv6 writes it. */
	if (family == 6 && v4)
		address.id46_addr.ia46_pad32[2] = htonl(0xffff);
	inp->inp_inc.inc_ie.ie_dependladdr = address;
	inp->inp_inc.inc_ie.ie_lport = htons(port);
	record->listener = listener;
	record->place = place;
	record->port = port;
	record->filters = filter;
	strscpy(record->name, name, sizeof(record->name));
	strscpy(record->address, "*", sizeof(record->address));
	if (!any)
		show_address(record->address, sizeof(record->address), &address, v4);
	listener->record = record;
	listener->users = 1;
	list_add_tail(&record->link, &records);
	tcp_usr_listen(listener->so, backlog, NULL);
	if (filter) {
		listener->so->sol_accept_filter = (struct accept_filter *)record;
		listener->so->so_options |= SO_ACCEPTFILTER;
	}
	return 0;
}

/* backlog L B: listen(2) again, with another backlog; a negative one is the most that there is */
static int run_backlog(struct words *words)
{
	struct listener *listener = take_listener(words);
	char *value = next_word(words);
	int backlog;

	if (!listener || !value || next_word(words) || kstrtoint(value, 10, &backlog))
		return -EINVAL;
	return tcp_usr_listen(listener->so, backlog, NULL);
}

void close_listener(struct listener *listener)
{
	listener->closing = true;
	listener->record->closing = true;
	soclose(listener->so);
	listener->record->listener = NULL;
	let_go(listener, 1);
}

/* watch: from now on whoever watches has heard of no listener, until something happens to it */
static int run_watch(struct words *words)
{
	struct record *record;

	if (next_word(words))
		return -EINVAL;
	list_for_each_entry(record, &records, link)
		record->heard_of = false;
	return 0;
}

/* close L: its memory is freed */
static int run_close(struct words *words)
{
	struct listener *listener = take_listener(words);

	if (!listener || next_word(words))
		return -EINVAL;
	close_listener(listener);
	return 0;
}

/* forget: the totals of closed listeners of which nothing is half-open */
static int run_forget(struct words *words)
{
	struct record *record, *next;

	if (next_word(words))
		return -EINVAL;
	list_for_each_entry_safe(record, next, &records, link) {
		if (!record->freed || count_entries(record))
			continue;
		list_del(&record->link);
		kfree(record);
	}
	return 0;
}

/* What segments have in common: [from A] [port P] [to A] [count N] */
struct segments {
	struct in_conninfo inc;
	bool v4;
	bool any_from;
	u64 port;
	u64 count;
};

static int read_segments(struct words *words, struct listener *listener, struct segments *segments)
{
	struct inpcb *inp = listener->inp;
	struct in_endpoints *ends = &segments->inc.inc_ie;
	const union in_dependaddr *bound = &inp->inp_inc.inc_ie.ie_dependladdr;
	char *from = take(words, "from");
	char *to_word = take(words, "to");
	static const char any4[] = "192.0.2.1", any6[] = "2001:db8::1:1";
	bool is_any, v4_to;

	segments->any_from = !from;
	segments->count = 1;
	if (take_number(words, "count", U32_MAX, &segments->count) ||
	    take_number(words, "port", U16_MAX, &segments->port) || next_word(words))
		return -EINVAL;
	segments->v4 = inp->inp_vflag & INP_IPV4;
	if (from && read_address(from, &ends->ie_dependfaddr, &segments->v4))
		return -EINVAL;
	if (!(inp->inp_vflag & (segments->v4 ? INP_IPV4 : INP_IPV6)))
		return -EINVAL;
	is_any = !bound->id46_addr.ia46_addr4.s_addr && !bound->id46_addr.ia46_pad32[0];
	if (to_word) {
		if (read_address(to_word, &ends->ie_dependladdr, &v4_to) || v4_to != segments->v4)
			return -EINVAL;
	} else if (is_any) {
		read_address(segments->v4 ? any4 : any6, &ends->ie_dependladdr, &v4_to);
	} else {
		ends->ie_dependladdr = *bound;
		if (segments->v4)
			memset(ends->ie_dependladdr.id46_addr.ia46_pad32, 0, 12);
	}
	if (to_word && !is_any &&
	    ends->ie_dependladdr.id46_addr.ia46_addr4.s_addr != bound->id46_addr.ia46_addr4.s_addr)
		return -EINVAL;
	segments->inc.inc_flags = segments->v4 ? 0 : INC_ISIPV6;
	ends->ie_lport = inp->inp_inc.inc_ie.ie_lport;
	return reaches(listener, &segments->inc) ? 0 : -EINVAL;
}

/* The next client of a listener, of a net for benchmarks or for documentation. */
static void next_client(struct listener *listener, struct segments *segments)
{
	u64 n = atomic64_fetch_inc(&listener->clients);
	union in_dependaddr *from = &segments->inc.inc_ie.ie_dependfaddr;

	segments->inc.inc_ie.ie_fport =
		segments->port ? htons(segments->port) : htons(1024 + n % 64000);
	if (!segments->any_from)
		return;
	memset(from, 0, sizeof(*from));
	if (segments->v4) {
		from->id46_addr.ia46_addr4.s_addr = htonl(0xc6120000 + (n & 0x1ffff));
	} else {
		from->id6_addr.__u6_addr.__u6_addr32[0] = htonl(0x20010db8);
		from->id6_addr.__u6_addr.__u6_addr32[3] = htonl(n + 1);
	}
}

/* syn L [count N] [from A] [port P] [to A] */
static int run_syn(struct words *words)
{
	struct listener *listener = take_listener(words);
	struct segments segments = {};

	if (!listener || read_segments(words, listener, &segments))
		return -EINVAL;
	for (u64 i = 0; i < segments.count; i++) {
		next_client(listener, &segments);
		receive_syn(listener, &segments.inc);
		cond_resched();
	}
	return 0;
}

/* cookie L [count N] ...: ACKs of clients of whom nothing is half-open, each with a cookie */
static int run_cookie(struct words *words)
{
	struct listener *listener = take_listener(words);
	struct segments segments = {};

	if (!listener || read_segments(words, listener, &segments))
		return -EINVAL;
	for (u64 i = 0; i < segments.count; i++) {
		next_client(listener, &segments);
		receive_ack(listener, &segments.inc, true);
		cond_resched();
	}
	return 0;
}

static int read_count(struct words *words, u64 *count)
{
	*count = 1;
	return take_number(words, "count", U32_MAX, count) || next_word(words) ? -EINVAL : 0;
}

/* again L [count N]: SYNs of the client whose connection has been half-open for longest */
static int run_again(struct words *words)
{
	struct listener *listener = take_listener(words);
	struct in_conninfo inc;
	u64 count;

	if (!listener || read_count(words, &count) || !oldest_inc(listener->record, &inc) ||
	    !reaches(listener, &inc))
		return -EINVAL;
	while (count--)
		receive_syn(listener, &inc);
	return 0;
}

/* ack L [count N]: final ACKs, for the half-open ones that are oldest */
static int run_ack(struct words *words)
{
	struct listener *listener = take_listener(words);
	struct in_conninfo inc;
	u64 count;

	if (!listener || read_count(words, &count) || count_entries(listener->record) < count)
		return -EINVAL;
	while (count-- && oldest_inc(listener->record, &inc) && reaches(listener, &inc)) {
		receive_ack(listener, &inc, false);
		cond_resched();
	}
	return 0;
}

/* data L [count N]: the first data of incomplete connections, for which the filter waits */
static int run_data(struct words *words)
{
	struct listener *listener = take_listener(words);
	u64 count;

	if (!listener || read_count(words, &count) || listener->closing ||
	    !listener->record->filters || listener->so->sol_incqlen < count)
		return -EINVAL;
	while (count-- && !listener->closing && receive_data(listener->so))
		cond_resched();
	return 0;
}

/* accept L [count N]: the oldest of Q */
static int run_accept(struct words *words)
{
	struct listener *listener = take_listener(words);
	u64 count;

	if (!listener || read_count(words, &count) || listener->so->sol_qlen < count)
		return -EINVAL;
	while (count-- && !kern_accept(listener->so))
		cond_resched();
	return 0;
}

/* poll L: an accept that finds nothing and does not wait */
static int run_poll(struct words *words)
{
	struct listener *listener = take_listener(words);

	if (!listener || next_word(words) || listener->so->sol_qlen)
		return -EINVAL;
	kern_accept(listener->so);
	return 0;
}

/* abort L q0|q [count N]: their clients reset the oldest */
static int run_abort(struct words *words)
{
	struct listener *listener = take_listener(words);
	char *where = next_word(words);
	bool q0;
	u64 count;

	if (!listener || !where || read_count(words, &count) || listener->closing)
		return -EINVAL;
	q0 = !strcmp(where, "q0");
	if (!q0 && strcmp(where, "q"))
		return -EINVAL;
	if (q0 ? count_entries(listener->record) < count : listener->so->sol_qlen < count)
		return -EINVAL;
	while (count--) {
		if (q0)
			forget_oldest(listener->record);
		else if (!listener->closing)
			reset_in_q(listener->so);
	}
	return 0;
}

/* timeout L: what is half-open has been so for too long */
static int run_timeout(struct words *words)
{
	struct listener *listener = take_listener(words);
	u64 count;

	if (!listener || next_word(words))
		return -EINVAL;
	for (count = count_entries(listener->record); count; count--)
		forget_oldest(listener->record);
	return 0;
}

/* local N: a UNIX socket listens, N clients connect, one is taken, and it closes */
static int run_local(struct words *words)
{
	char *value = next_word(words);
	struct socket *head, *so;
	u32 count;

	if (!value || next_word(words) || kstrtou32(value, 10, &count) || count > 1000)
		return -EINVAL;
	head = socreate(find_place("0"), &local_protosw);
	if (!head)
		return -EINVAL;
	tcp_usr_listen(head, 2, NULL);
	while (count--) {
		so = sonewconn(head, 0);
		if (so)
			soisconnected(so);
	}
	kern_accept(head);
	soclose(head);
	return 0;
}

const struct command commands[] = {
	{ "zone", run_zone, .alone = true },
	{ "bucketlimit", run_bucketlimit, .alone = true },
	{ "alloc_fail", run_alloc_fail, .alone = true },
	{ "listen", run_listen, .alone = true },
	{ "backlog", run_backlog, .alone = true, .call = true },
	{ "close", run_close, .alone = true, .call = true },
	{ "forget", run_forget, .alone = true },
	{ "watch", run_watch, .alone = true },
	{ "local", run_local, .alone = true },
	{ "syn", run_syn },
	{ "again", run_again },
	{ "ack", run_ack },
	{ "cookie", run_cookie },
	{ "data", run_data },
	{ "accept", run_accept, .call = true },
	{ "poll", run_poll, .call = true },
	{ "abort", run_abort },
	{ "timeout", run_timeout },
	{},
};
