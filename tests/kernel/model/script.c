/*
 * The script's commands: each line one event.
 */
#include <linux/kstrtox.h>
#include <linux/math64.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "driver.h"

static struct place *find_place(const char *id)
{
	struct place *place;
	int number;

	if (!id || kstrtoint(id, 10, &number))
		return NULL;
	list_for_each_entry(place, &places, link)
		if (place->zone.zone_id == number)
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
	atomic_inc((atomic_t *)&listener->conn.conn_ref);
	words->listener = listener;
	return begin_line(words) ? listener : NULL;
}

/* Drop references to a listener, which is freed with the last one. */
void let_go(struct listener *listener, int references)
{
	if (!atomic_sub_and_test(references, (atomic_t *)&listener->conn.conn_ref))
		return;
	listener->record->freed = true;
	kfree(listener);
}

/* zone ID NAME [exclusive] */
static int run_zone(struct words *words)
{
	bool exclusive = take_flag(words, "exclusive");
	char *id = next_word(words);
	char *name = next_word(words);
	struct place *place;
	int number;

	if (!id || !name || next_word(words) || kstrtoint(id, 10, &number) || find_place(id) ||
	    strlen(name) >= sizeof(place->name))
		return -EINVAL;
	place = kzalloc(sizeof(*place), GFP_KERNEL);
	if (!place)
		return -ENOMEM;
	place->stack = exclusive ? make_stack(number) : shared_stack;
	if (!place->stack) {
		kfree(place);
		return -ENOMEM;
	}
	place->exclusive = exclusive;
	strscpy(place->name, name, sizeof(place->name));
	place->zone.zone_name = place->name;
	place->zone.zone_id = number;
	place->cred.cr_ref = 1;
	place->cred.cr_zone = &place->zone;
	list_add_tail(&place->link, &places);
	return 0;
}

static struct process *find_process(const char *name)
{
	struct process *process;

	list_for_each_entry(process, &processes, link)
		if (!strcmp(process->name, name))
			return process;
	return NULL;
}

/* Copy a word, in which %hh is a byte. Returns 0, or -EINVAL where it is none, or too long. */
static int read_bytes(const char *word, char *to, size_t size)
{
	static const char digits[] = "0123456789abcdef";

	for (; *word; word++, to++) {
		const char *high, *low;

		if (!--size)
			return -EINVAL;
		*to = *word;
		if (*word != '%')
			continue;
		high = word[1] ? strchr(digits, word[1]) : NULL;
		low = high && word[2] ? strchr(digits, word[2]) : NULL;
		if (!low)
			return -EINVAL;
		*to = (high - digits) << 4 | (low - digits);
		word += 2;
	}
	*to = 0;
	return 0;
}

/* process P COMM pid N [contract] [fmri F]: of no contract, of one without a service, of one with */
static int run_process(struct words *words)
{
	bool contract = take_flag(words, "contract");
	char *service = take(words, "fmri");
	char fmri[FMRI_MOST + 1] = "";
	struct process *process;
	char *name, *comm;
	u64 pid = 0;
	int error;

	if (take_number(words, "pid", INT_MAX, &pid) || !pid)
		return -EINVAL;
	name = next_word(words);
	comm = next_word(words);
	if (!name || !comm || next_word(words) || strlen(name) >= sizeof(process->name) ||
	    find_process(name) || (service && read_bytes(service, fmri, sizeof(fmri))))
		return -EINVAL;
	process = kzalloc(sizeof(*process), GFP_KERNEL);
	if (!process)
		return -ENOMEM;
	strscpy(process->name, name, sizeof(process->name));
	process->pid = pid;
	error = read_bytes(comm, process->comm, sizeof(process->comm));
	if (!error && (contract || service))
		error = serve(process, fmri);
	if (error) {
		kfree(process);
		return error;
	}
	list_add_tail(&process->link, &processes);
	return 0;
}

/* q0max ZONE N */
static int run_q0max(struct words *words)
{
	struct place *place = find_place(next_word(words));
	char *value = next_word(words);
	u32 limit;

	if (!place || !value || next_word(words) || kstrtou32(value, 10, &limit) ||
	    limit > 1 << 24)
		return -EINVAL;
	set_q0_limit(place->stack, limit);
	return 0;
}

/* reclaim ZONE 0|1 */
static int run_reclaim(struct words *words)
{
	struct place *place = find_place(next_word(words));
	char *value = next_word(words);
	bool on;

	if (!place || !value || next_word(words) || kstrtobool(value, &on))
		return -EINVAL;
	return set_reclaim(place->stack, on);
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

static void show_address(char *text, size_t size, const in6_addr_t *address, bool v4)
{
	if (v4)
		snprintf(text, size, "%pI4", &address->_S6_un._S6_u32[3]);
	else
		snprintf(text, size, "%pI6c", address);
}

/* listen L zone Z address A|* port P backlog B [family 4|6] [pid N] [streams|tli] [limit N] */
static int run_listen(struct words *words)
{
	u64 backlog = 0, family = 0, limit = U64_MAX, pid = task_tgid_nr(current), port = 0;
	bool streams = take_flag(words, "streams");
	bool tli = take_flag(words, "tli");
	char *name = next_word(words);
	struct place *place = find_place(take(words, "zone"));
	char *address_word = take(words, "address");
	in6_addr_t address = {};
	struct listener *listener;
	struct record *record;
	bool v4 = false;
	int error;

	if (take_number(words, "port", U16_MAX, &port) ||
	    take_number(words, "backlog", INT_MAX, &backlog) ||
	    take_number(words, "family", 6, &family) || take_number(words, "pid", INT_MAX, &pid) ||
	    take_number(words, "limit", U32_MAX / 2, &limit))
		return -EINVAL;
	if (!name || !place || !address_word || !port || !backlog || (streams && tli) ||
	    next_word(words) || strlen(name) >= sizeof(record->name) || find_listener(name))
		return -EINVAL;
	if (strcmp(address_word, "*")) {
		if (read_address(address_word, &address, &v4))
			return -EINVAL;
	} else if (family == 4) {
		address = v4_mapped(0);
	}
	if (!family)
		family = v4 ? 4 : 6;
	/* A socket of IPv4 has no IPv6 address; the other way round it has it mapped. */
	if ((family != 4 && family != 6) || (family == 4 && !v4 && strcmp(address_word, "*")))
		return -EINVAL;

	listener = kzalloc(sizeof(*listener), GFP_KERNEL);
	record = kzalloc(sizeof(*record), GFP_KERNEL);
	error = -ENOMEM;
	if (!listener || !record)
		goto fail;
	record->listener = listener;
	record->place = place;
	strscpy(record->name, name, sizeof(record->name));
	strscpy(record->address, "*", sizeof(record->address));
	if (strcmp(address_word, "*"))
		show_address(record->address, sizeof(record->address), &address, v4);
	record->port = port;
	record->kind = tli ? TLI : streams ? STREAMS : PLAIN_SOCKET;
	listener->record = record;
	listener->kind = record->kind;
	INIT_LIST_HEAD(&listener->evicted);
	init_endpoint(&listener->conn, &listener->tcp, place, record->kind, family == 6, pid);
	bind_to(&listener->conn, &listener->tcp, &address, htons(port));
	if (limit != U64_MAX) {
		error = set_listen_limit(&listener->tcp, limit);
		if (error)
			goto fail;
	}
	error = listen_on(listener, backlog);
	if (error)
		goto fail;
	list_add_tail(&record->link, &records);
	return 0;
fail:
	kfree(listener);
	kfree(record);
	return error;
}

/* backlog L B: listen(3) again, with another backlog */
static int run_backlog(struct words *words)
{
	struct listener *listener = take_listener(words);
	char *value = next_word(words);
	int backlog;

	if (!listener || !value || next_word(words) || kstrtoint(value, 10, &backlog) || backlog < 1)
		return -EINVAL;
	return listen_on(listener, backlog);
}

/* unlisten L: the endpoint stays, without its name; connections not accepted go */
static int run_unlisten(struct words *words)
{
	struct listener *listener = take_listener(words);
	int error;

	if (!listener || next_word(words) || listener->tcp.tcp_state != TCPS_LISTEN)
		return -EINVAL;
	error = unlisten(listener);
	if (!error)
		kill_eagers(listener);
	return error;
}

void close_listener(struct listener *listener)
{
	bool started = listener->tcp.tcp_eager_next_q0;

	listener->closing = true;
	while (atomic64_dec_if_positive(&listener->open) >= 0)
		forget_connection(&listener->tcp);
	/* The eagers go in their own squeues, when the listener's has come to its end. */
	squeue_enter(&listener->squeue);
	tcp_closei_local(&listener->tcp);
	squeue_exit(&listener->squeue);
	listener->record->listener = NULL;
	if (started)
		kill_eagers(listener);
	let_go(listener, 2);
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

/* forget: the totals of closed listeners */
static int run_forget(struct words *words)
{
	struct record *record, *next;

	if (next_word(words))
		return -EINVAL;
	list_for_each_entry_safe(record, next, &records, link) {
		if (!record->freed)
			continue;
		list_del(&record->link);
		kfree(record);
	}
	return 0;
}

/*
 * What `syn`, `segment` and `burst` have in common:
 * [from A] [port P] [to A] [options BYTES] [extension BYTES] [count N]
 */
struct segments {
	struct packet *packet;
	in6_addr_t from;
	bool any_from;
	u64 port;
	u64 count;
	u8 flags;
};

static int read_segments(struct words *words, struct listener *listener, struct segments *segments)
{
	const in6_addr_t *bound = &listener->conn.connua_v6addr.connua_laddr;
	char *from = take(words, "from");
	char *to_word = take(words, "to");
	u64 options = 0, extension = 0;
	in6_addr_t to = *bound;
	struct packet *packet;
	bool v4, v4_to;

	segments->any_from = !from;
	segments->count = 1;
	if (take_number(words, "count", U32_MAX, &segments->count) ||
	    take_number(words, "port", U16_MAX, &segments->port) ||
	    take_number(words, "options", IP_OPTIONS_MOST, &options) ||
	    take_number(words, "extension", EXTENSION_MOST, &extension) || next_word(words))
		return -EINVAL;
	v4 = is_wildcard(bound) || is_mapped(bound);
	if (to_word) {
		if (read_address(to_word, &to, &v4_to))
			return -EINVAL;
		v4 = v4_to;
	}
	if (from && read_address(from, &segments->from, &v4))
		return -EINVAL;
	if (to_word && v4 != v4_to)
		return -EINVAL;
	if (is_wildcard(bound)) {
		/* IPv4's own wildcard is mapped. */
		if (is_mapped(bound) && !v4)
			return -EINVAL;
		if (!to_word && v4)
			to = v4_mapped(htonl(0xc0000201));
		else if (!to_word)
			read_address("2001:db8::1:1", &to, &v4_to);
	} else if (memcmp(&to, bound, sizeof(to)) || v4 != is_mapped(bound)) {
		return -EINVAL;
	}
	if (options % 4 || extension % 8 || (options && !v4) || (extension && v4))
		return -EINVAL;

	packet = make_packet(&to, listener->conn.conn_lport, v4, options, extension,
			     segments->flags);
	if (!packet)
		return -ENOMEM;
	segments->packet = packet;
	return 0;
}

/* Q and Qmax as a SYN finds them. */
static void observe(struct listener *listener)
{
	struct totals *totals = &listener->record->totals;
	s64 q = atomic64_read(&totals->q);
	s64 most = listener->tcp.tcp_conn_req_max;
	int bucket = SATURATION_BUCKETS - 1;

	if (q <= most)
		bucket = q > 0 ? div64_s64(q * 10 + most - 1, most) : 0;
	atomic64_inc(&totals->saturation[bucket]);
	atomic64_add(q, &totals->q_sum);
}

static void arrive(struct listener *listener, struct segments *segments)
{
	struct totals *totals = &listener->record->totals;
	struct packet *packet = segments->packet;
	u64 changes;

	if (!can_receive(segments->flags)) {
		COUNT(&listener->tcp, segments);
		return;
	}
	squeue_enter(&listener->squeue);
	changes = atomic64_read(&totals->q_changes);
	if (segments->flags & TH_SYN && listener->tcp.tcp_state == TCPS_LISTEN)
		observe(listener);
	receive(listener, &packet->mb, packet->ip_header, packet->v4, packet->options);
	/* Another CPU was at work. */
	if (atomic64_read(&totals->q_changes) != changes)
		atomic64_inc(&totals->unsure);
	squeue_exit(&listener->squeue);
	bury_evicted(listener);
}

static int send_segments(struct listener *listener, struct segments *segments)
{
	for (u64 i = 0; i < segments->count; i++) {
		u64 n = atomic64_fetch_inc(&listener->clients);

		if (segments->any_from)
			segments->from = nth_client(segments->packet->v4, n);
		set_client(segments->packet, &segments->from,
			   segments->port ? htons(segments->port) : nth_port(n));
		arrive(listener, segments);
		if (i % 256 == 255) {
			if (signal_pending(current))
				return -EINTR;
			cond_resched();
		}
	}
	return 0;
}

/* syn L [count N] [from A] [port P] [to A] [options BYTES] [extension BYTES] */
static int run_syn(struct words *words)
{
	struct listener *listener = take_listener(words);
	struct segments segments = { .flags = TH_SYN };
	int error;

	if (!listener)
		return -EINVAL;
	error = read_segments(words, listener, &segments);
	if (error)
		return error;
	error = send_segments(listener, &segments);
	kfree(segments.packet);
	return error;
}

/* segment L FLAGS ...: flags by their first letters, as `a` or `sa` or `pau`; then as `syn` */
static int run_segment(struct words *words)
{
	struct listener *listener = take_listener(words);
	static const char letters[] = "fsrpau";
	char *flags = next_word(words);
	struct segments segments = {};
	int error;

	if (!listener || !flags)
		return -EINVAL;
	for (; *flags; flags++) {
		const char *letter = strchr(letters, *flags);

		if (!letter)
			return -EINVAL;
		segments.flags |= 1 << (letter - letters);
	}
	error = read_segments(words, listener, &segments);
	if (error)
		return error;
	error = send_segments(listener, &segments);
	kfree(segments.packet);
	return error;
}

/* burst L N: one SYN N times over, as fast as can be */
static int run_burst(struct words *words)
{
	struct listener *listener = take_listener(words);
	struct segments segments = { .flags = TH_SYN };
	char *value = next_word(words);
	u32 count;
	int error;

	if (!listener || !value || kstrtou32(value, 10, &count))
		return -EINVAL;
	error = read_segments(words, listener, &segments);
	if (error)
		return error;
	segments.from = nth_client(segments.packet->v4, 0);
	set_client(segments.packet, &segments.from, nth_port(0));
	for (u32 i = 0; i < count; i++) {
		arrive(listener, &segments);
		if (i % 1024 == 1023)
			cond_resched();
	}
	kfree(segments.packet);
	return 0;
}

static int read_count(struct words *words, u64 *count)
{
	*count = 1;
	return take_number(words, "count", U32_MAX, count) || next_word(words) ? -EINVAL : 0;
}

/* ack L [count N] [refused]: third segments, for the half-open ones that are oldest */
static int run_ack(struct words *words)
{
	bool refused = take_flag(words, "refused");
	struct listener *listener = take_listener(words);
	struct eager *eager;
	u64 count;

	if (!listener || read_count(words, &count) || (refused && listener->kind != SOCKET) ||
	    listener->tcp.tcp_state != TCPS_LISTEN || count_q0(listener, false) < count)
		return -EINVAL;
	while (count--) {
		eager = claim_q0(listener, false);
		if (!eager)
			return -EINVAL;
		eager->refuse = refused;
		handshake_done(listener, eager);
		if (listener->kind == SOCKET && !eager->tcp.tcp_listener)
			COUNT(&listener->tcp, refused);
		kmutex_enter(&listener->tcp.tcp_eager_lock);
		eager->returning = false;
		kmutex_exit(&listener->tcp.tcp_eager_lock);
		release(listener, eager);
		cond_resched();
	}
	return 0;
}

static void accept_one(struct listener *listener, struct eager *eager)
{
	struct {
		struct T_conn_res head;
		uint8_t option[sizeof(tcp_t *)];
	} message __aligned(8) = {
		.head = {
			.PRIM_type = T_CONN_RES,
			.OPT_length = sizeof(tcp_t *),
			.OPT_offset = sizeof(struct T_conn_res),
			.SEQ_number = eager->tcp.tcp_conn_req_seqnum,
		},
	};
	queue_t queues[2] = {};
	mblk_t mp = {
		.b_rptr = (uchar_t *)&message,
		.b_wptr = (uchar_t *)(&message + 1),
		.b_queue = &queues[1],
	};
	struct totals *totals = &listener->record->totals;
	struct eager *acceptor = NULL;
	tcp_t *tcp = &eager->tcp;

	if (listener->kind == TLI) {
		acceptor = kmem_cache_zalloc(eager_cache, GFP_KERNEL | __GFP_NOFAIL);
		init_endpoint(&acceptor->conn, &acceptor->tcp, listener->record->place, TLI,
			      false, task_tgid_nr(current));
		queues[1].q_ptr = &acceptor->conn;
	}
	memcpy(message.option, &tcp, sizeof(tcp));
	atomic64_inc(&totals->accepts);
	if (eager->dead)
		atomic64_inc(&totals->accepts_dead);
	atomic64_add(ktime_get_ns() - eager->queued_ns, &totals->wait_ns);
	if (!accept_eager(listener, eager, &queues[1], &mp))
		atomic64_inc(&listener->open);
	if (listener->kind == SOCKET)
		atomic_dec(&listener->so_acceptq_len);
	send_undeferred(listener);
	if (acceptor)
		kmem_cache_free(eager_cache, acceptor);
}

/* accept L [count N] [by P]: the oldest of Q, by a process or by the kernel itself */
static int run_accept(struct words *words)
{
	struct listener *listener = take_listener(words);
	struct process *process = NULL, *before;
	char *name = take(words, "by");
	struct totals *totals;
	struct eager *eager;
	u64 count;

	if (name && !(process = find_process(name)))
		return -EINVAL;
	if (!listener || read_count(words, &count) || listener->tcp.tcp_state != TCPS_LISTEN)
		return -EINVAL;
	totals = &listener->record->totals;
	if (atomic64_read(&totals->q) + atomic64_read(&totals->waiting) < count)
		return -EINVAL;
	while (count--) {
		/* The other CPU may have the last one in hand, with another behind it. */
		while (!(eager = claim_q(listener, false))) {
			if (!atomic64_read(&totals->q) || is_nested())
				return -EINVAL;
			cond_resched();
		}
		before = run_as(process);
		accept_one(listener, eager);
		run_as(before);
		release(listener, eager);
		cond_resched();
	}
	return 0;
}

/* finish L [count N]: accepted connections end; they count for the listener's limit until then */
static int run_finish(struct words *words)
{
	struct listener *listener = take_listener(words);
	u64 count;

	if (!listener || read_count(words, &count) || atomic64_read(&listener->open) < count)
		return -EINVAL;
	while (count--) {
		atomic64_dec(&listener->open);
		forget_connection(&listener->tcp);
	}
	return 0;
}

/* abort L q0|deferred|q [count N]: their clients reset the oldest */
static int run_abort(struct words *words)
{
	struct listener *listener = take_listener(words);
	char *where = next_word(words);
	struct totals *totals;
	u64 count, there;

	if (!listener || !where || read_count(words, &count) ||
	    listener->tcp.tcp_state != TCPS_LISTEN)
		return -EINVAL;
	totals = &listener->record->totals;
	if (!strcmp(where, "q0"))
		there = count_q0(listener, false);
	else if (!strcmp(where, "deferred"))
		there = count_q0(listener, true);
	else if (!strcmp(where, "q"))
		there = count_q(listener, true);
	else
		return -EINVAL;
	if (there < count)
		return -EINVAL;
	while (count--) {
		struct eager *eager;

		if (!strcmp(where, "q"))
			eager = claim_q(listener, true);
		else
			eager = claim_q0(listener, !strcmp(where, "deferred"));
		if (!eager)
			return -EINVAL;
		atomic64_inc(!strcmp(where, "q")  ? &totals->aborts_q :
			     !strcmp(where, "q0") ? &totals->aborts_q0 :
						    &totals->aborts_deferred);
		eager->dead = true;
		clean_death(&eager->tcp);
		release(listener, eager);
		cond_resched();
	}
	return 0;
}

/* timeout L [count N]: SYN-ACKs are sent again, of so many half-open ones or of all */
static int run_timeout(struct words *words)
{
	struct listener *listener = take_listener(words);
	tcp_t *head, *tcp;
	u64 count = U64_MAX;

	if (!listener || take_number(words, "count", U32_MAX, &count) || next_word(words) ||
	    listener->tcp.tcp_state != TCPS_LISTEN)
		return -EINVAL;
	if (count != U64_MAX && count_q0(listener, false) < count)
		return -EINVAL;
	head = &listener->tcp;
	kmutex_enter(&head->tcp_eager_lock);
	for (tcp = head->tcp_eager_prev_q0; tcp != head && count; tcp = tcp->tcp_eager_prev_q0) {
		if (eager_of(tcp)->claims || tcp->tcp_conn_def_q0)
			continue;
		time_out(head, tcp);
		count--;
	}
	kmutex_exit(&head->tcp_eager_lock);
	return 0;
}

const struct command commands[] = {
	{ "zone", run_zone, .alone = true },
	{ "process", run_process, .alone = true },
	{ "q0max", run_q0max, .alone = true },
	{ "reclaim", run_reclaim, .alone = true },
	{ "alloc_fail", run_alloc_fail, .alone = true },
	{ "listen", run_listen, .alone = true },
	{ "backlog", run_backlog, .alone = true, .call = true, .squeue = true },
	{ "unlisten", run_unlisten, .alone = true, .call = true, .squeue = true },
	{ "close", run_close, .alone = true, .call = true, .squeue = true },
	{ "forget", run_forget, .alone = true },
	{ "syn", run_syn, .squeue = true },
	{ "segment", run_segment, .squeue = true },
	{ "burst", run_burst, .squeue = true },
	{ "ack", run_ack },
	{ "accept", run_accept, .call = true },
	{ "finish", run_finish, .call = true },
	{ "abort", run_abort },
	{ "timeout", run_timeout },
	{},
};
