/*
 * A model of the Solaris and illumos kernels' TCP listeners: the script that drives it, its totals.
 *
 * Files, in debugfs under solaris/:
 *   script       events to happen, a line each, in the writer's context; see commands[]
 *   totals       a line of JSON for each listener that there was
 *   nanoseconds  how long the last `burst` took
 *   eagers       how many connections are in memory
 *
 * A line that cannot be (no such listener, nothing there to accept) makes write(2) fail with EINVAL
 * and does nothing; lines before it in the same write have been done.
 */
#include <linux/debugfs.h>
#include <linux/inet.h>
#include <linux/math64.h>
#include <linux/module.h>
#include <linux/rwsem.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

#include "model.h"

#define SCRIPT_MOST (1 << 20)
#define WORDS_MOST 32
#define IP_OPTIONS_MOST 40
#define EXTENSION_MOST 1024

static DECLARE_RWSEM(model_lock);
static LIST_HEAD(places);
static LIST_HEAD(records);
static tcp_stack_t *shared_stack;
static struct kmem_cache *eager_cache;
static struct dentry *directory;
static atomic_t failing_allocations;
static atomic_t eagers;
static u64 burst_ns;

/* The mib provider's stand-ins. */
#define MIB_DEFINE(name)                                                                   \
	TRACED void mib_##name(int increment, void *counter)                               \
	{                                                                                  \
		barrier();                                                                 \
	}
MIB_PROBES(MIB_DEFINE)

/* What the rest of Solaris does for TCP. */

struct eager *tcp_get_conn(void)
{
	struct eager *eager;

	if (atomic_dec_if_positive(&failing_allocations) >= 0)
		return NULL;
	eager = kmem_cache_zalloc(eager_cache, GFP_KERNEL);
	if (eager)
		atomic_inc(&eagers);
	return eager;
}

static void free_conn(struct eager *eager)
{
	kmem_cache_free(eager_cache, eager);
	atomic_dec(&eagers);
}

bool so_newconn(tcp_t *listener, tcp_t *eager)
{
	struct listener *of = listener_of(listener);

	if (eager_of(eager)->refuse)
		return false;
	if (atomic_inc_return(&of->so_acceptq_len) <= of->so_backlog)
		return true;
	atomic_dec(&of->so_acceptq_len);
	return false;
}

/* Squeues: work that waits until the function which made it has returned. */

static struct eager *next_evicted(struct listener *listener)
{
	struct eager *eager;

	kmutex_enter(&listener->tcp.tcp_eager_lock);
	eager = list_first_entry_or_null(&listener->evicted, struct eager, evicted);
	if (eager)
		list_del(&eager->evicted);
	kmutex_exit(&listener->tcp.tcp_eager_lock);
	return eager;
}

static void bury_evicted(struct listener *listener)
{
	struct eager *eager;

	while (!list_empty_careful(&listener->evicted) && (eager = next_evicted(listener))) {
		if (eager->tcp.tcp_state > TCPS_BOUND)
			clean_death(&eager->tcp);
		free_conn(eager);
	}
}

static void send_undeferred(struct listener *listener)
{
	mblk_t *mp;

	kmutex_enter(&listener->tcp.tcp_eager_lock);
	mp = listener->undeferred;
	listener->undeferred = NULL;
	kmutex_exit(&listener->tcp.tcp_eager_lock);
	while (mp) {
		mblk_t *next = mp->b_next;

		mp->b_next = NULL;
		tcp_send_pending(&listener->conn, mp, NULL IRA_NONE);
		mp = next;
	}
}

/* Take an eager in hand, so that nobody else does. */

static bool can_claim(tcp_t *eager, bool deferred)
{
	return !eager_of(eager)->claimed && !eager_of(eager)->dead &&
	       !!eager->tcp_conn_def_q0 == deferred;
}

/* The oldest one; deferred ones lie oldest first between the half-open ones and the ring's end. */
static struct eager *claim_q0(struct listener *listener, bool deferred)
{
	tcp_t *head = &listener->tcp;
	struct eager *found = NULL;
	tcp_t *tcp = head;

	kmutex_enter(&head->tcp_eager_lock);
	while (!found) {
		tcp = deferred ? tcp->tcp_eager_next_q0 : tcp->tcp_eager_prev_q0;
		if (tcp == head)
			break;
		if (can_claim(tcp, deferred))
			found = eager_of(tcp);
	}
	if (found) {
		found->claimed = true;
		make_undroppable(&found->tcp);
	}
	kmutex_exit(&head->tcp_eager_lock);
	return found;
}

static struct eager *claim_q(struct listener *listener, bool living)
{
	tcp_t *head = &listener->tcp;
	struct eager *found = NULL;
	tcp_t *tcp;

	kmutex_enter(&head->tcp_eager_lock);
	for (tcp = head->tcp_eager_next_q; tcp; tcp = tcp->tcp_eager_next_q) {
		struct eager *eager = eager_of(tcp);

		if (eager->claimed || (living && eager->dead))
			continue;
		eager->claimed = true;
		found = eager;
		break;
	}
	kmutex_exit(&head->tcp_eager_lock);
	return found;
}

/* Done with a claimed eager: free it if it has left its listener. */
static void release(struct listener *listener, struct eager *eager)
{
	bool gone;

	kmutex_enter(&listener->tcp.tcp_eager_lock);
	gone = !eager->tcp.tcp_listener;
	eager->claimed = false;
	kmutex_exit(&listener->tcp.tcp_eager_lock);
	if (gone)
		free_conn(eager);
}

/* How many eagers claim_q0 or claim_q could find. */
static u64 count_q0(struct listener *listener, bool deferred)
{
	tcp_t *head = &listener->tcp;
	tcp_t *tcp;
	u64 count = 0;

	kmutex_enter(&head->tcp_eager_lock);
	for (tcp = head->tcp_eager_prev_q0; tcp != head; tcp = tcp->tcp_eager_prev_q0)
		count += can_claim(tcp, deferred);
	kmutex_exit(&head->tcp_eager_lock);
	return count;
}

static u64 count_q(struct listener *listener, bool living)
{
	tcp_t *head = &listener->tcp;
	tcp_t *tcp;
	u64 count = 0;

	kmutex_enter(&head->tcp_eager_lock);
	for (tcp = head->tcp_eager_next_q; tcp; tcp = tcp->tcp_eager_next_q)
		count += !eager_of(tcp)->claimed && !(living && eager_of(tcp)->dead);
	kmutex_exit(&head->tcp_eager_lock);
	return count;
}

/* Packets. */

struct packet {
	mblk_t mb;
	dblk_t db;
	bool v4;
	bool options;
	uint16_t ip_header;
	__aligned(8) uchar_t bytes[sizeof(ip6_t) + EXTENSION_MOST + sizeof(tcpha_t)];
};

static tcpha_t *tcp_header(struct packet *packet)
{
	return (tcpha_t *)&packet->bytes[packet->ip_header];
}

/* An IPv6 extension header: next header, length in units of 8 bytes without the first, padding. */
static void put_extension(uchar_t *at, uint8_t next, int length)
{
	at[0] = next;
	at[1] = length / 8 - 1;
	/* One PadN option over all the rest. */
	at[2] = 1;
	at[3] = length - 4;
}

static void put_ip4(struct packet *packet, ipaddr_t destination, int options)
{
	ipha_t *ipha = (ipha_t *)packet->bytes;

	packet->ip_header = sizeof(*ipha) + options;
	ipha->ipha_version_and_hdr_length = 0x40 | packet->ip_header / 4;
	ipha->ipha_length = htons(packet->ip_header + sizeof(tcpha_t));
	ipha->ipha_ttl = 64;
	ipha->ipha_protocol = SOLARIS_IPPROTO_TCP;
	ipha->ipha_dst = destination;
	/* No-operation options. */
	memset(ipha + 1, 1, options);
}

static void put_ip6(struct packet *packet, in6_addr_t destination, int extension)
{
	ip6_t *ip6h = (ip6_t *)packet->bytes;
	uchar_t *at = (uchar_t *)(ip6h + 1);

	packet->ip_header = sizeof(*ip6h) + extension;
	ip6h->ip6_ctlun.ip6_un1.ip6_un1_flow = htonl(0x60000000);
	ip6h->ip6_ctlun.ip6_un1.ip6_un1_plen = htons(extension + sizeof(tcpha_t));
	ip6h->ip6_ctlun.ip6_un1.ip6_un1_hlim = 64;
	ip6h->ip6_dst = destination;
	/* Hop-by-hop options (0), then destination options (60) for what is more than 8 bytes. */
	ip6h->ip6_ctlun.ip6_un1.ip6_un1_nxt = extension ? 0 : SOLARIS_IPPROTO_TCP;
	if (extension)
		put_extension(at, extension > 8 ? 60 : SOLARIS_IPPROTO_TCP, 8);
	if (extension > 8)
		put_extension(at + 8, SOLARIS_IPPROTO_TCP, extension - 8);
}

static void set_client(struct packet *packet, const in6_addr_t *address, in_port_t port)
{
	if (packet->v4)
		((ipha_t *)packet->bytes)->ipha_src = address->_S6_un._S6_u32[3];
	else
		((ip6_t *)packet->bytes)->ip6_src = *address;
	tcp_header(packet)->tha_lport = port;
}

/* The n-th client of a listener, of a net for benchmarks or for documentation. */
static in6_addr_t nth_client(bool v4, u64 n)
{
	in6_addr_t address = { ._S6_un._S6_u8 = { 0x20, 0x01, 0x0d, 0xb8 } };

	if (v4)
		return v4_mapped(htonl(0xc6120000 + (n & 0x1ffff)));
	address._S6_un._S6_u32[3] = htonl(n + 1);
	return address;
}

static in_port_t nth_port(u64 n)
{
	return htons(1024 + n % 64000);
}

/* Words of a line: the command, its arguments, then pairs of a name and a value. */

struct words {
	char *word[WORDS_MOST];
	int count;
	int next;
};

static int split(char *line, struct words *words)
{
	char *word;

	memset(words, 0, sizeof(*words));
	while ((word = strsep(&line, " "))) {
		if (!*word)
			continue;
		if (words->count == WORDS_MOST)
			return -EINVAL;
		words->word[words->count++] = word;
	}
	return 0;
}

/* Return the next word, NULL when there is none. */
static char *next_word(struct words *words)
{
	while (words->next < words->count) {
		char *word = words->word[words->next++];

		if (word)
			return word;
	}
	return NULL;
}

/* Take a word that stands alone. */
static bool take_flag(struct words *words, const char *flag)
{
	for (int i = words->next; i < words->count; i++) {
		if (words->word[i] && !strcmp(words->word[i], flag)) {
			words->word[i] = NULL;
			return true;
		}
	}
	return false;
}

/* Take the value behind a name, NULL when the name is not there. */
static char *take(struct words *words, const char *name)
{
	for (int i = words->next; i + 1 < words->count; i++) {
		char *value = words->word[i + 1];

		if (!words->word[i] || !value || strcmp(words->word[i], name))
			continue;
		words->word[i] = NULL;
		words->word[i + 1] = NULL;
		return value;
	}
	return NULL;
}

static int take_number(struct words *words, const char *name, u64 most, u64 *number)
{
	char *value = take(words, name);

	if (!value)
		return 0;
	return kstrtou64(value, 10, number) || *number > most ? -EINVAL : 0;
}

static int read_address(const char *text, in6_addr_t *address, bool *v4)
{
	ipaddr_t address4;

	*v4 = !strchr(text, ':');
	if (*v4) {
		if (!in4_pton(text, -1, (u8 *)&address4, -1, NULL))
			return -EINVAL;
		*address = v4_mapped(address4);
		return 0;
	}
	return in6_pton(text, -1, address->_S6_un._S6_u8, -1, NULL) ? 0 : -EINVAL;
}

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

/* Commands. */

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
	struct listener *listener = find_listener(next_word(words));
	char *value = next_word(words);
	int backlog;

	if (!listener || !value || next_word(words) || kstrtoint(value, 10, &backlog) || backlog < 1)
		return -EINVAL;
	return listen_on(listener, backlog);
}

static void kill_eagers(struct listener *listener)
{
	struct eager *eager;

	while ((eager = claim_q(listener, false)) || (eager = claim_q0(listener, false)) ||
	       (eager = claim_q0(listener, true))) {
		tcp_eager_kill(&eager->conn, NULL, NULL IRA_NONE);
		release(listener, eager);
		cond_resched();
	}
	/* Deferred ones whose client has reset them are left. */
	while (listener->tcp.tcp_eager_prev_q0 != &listener->tcp) {
		eager = eager_of(listener->tcp.tcp_eager_prev_q0);
		tcp_eager_kill(&eager->conn, NULL, NULL IRA_NONE);
		release(listener, eager);
	}
	atomic_set(&listener->so_acceptq_len, 0);
}

/* unlisten L: the endpoint stays, without its name; connections not accepted go */
static int run_unlisten(struct words *words)
{
	struct listener *listener = find_listener(next_word(words));
	int error;

	if (!listener || next_word(words) || listener->tcp.tcp_state != TCPS_LISTEN)
		return -EINVAL;
	error = unlisten(listener);
	if (!error)
		kill_eagers(listener);
	return error;
}

static void close_listener(struct listener *listener)
{
	bool started = listener->tcp.tcp_eager_next_q0;

	while (atomic64_dec_if_positive(&listener->open) >= 0)
		forget_connection(&listener->tcp);
	/* The eagers go in their own squeues, when the listener's has come to its end. */
	tcp_closei_local(&listener->tcp);
	if (started)
		kill_eagers(listener);
	listener->record->listener = NULL;
	kfree(listener);
}

/* close L: its memory is freed */
static int run_close(struct words *words)
{
	struct listener *listener = find_listener(next_word(words));

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
		if (record->listener)
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

static bool is_wildcard(const in6_addr_t *address)
{
	const u32 *words = address->_S6_un._S6_u32;

	return !words[0] && !words[1] && !words[3] && (!words[2] || words[2] == htonl(0xffff));
}

static bool is_mapped(const in6_addr_t *address)
{
	const u32 *words = address->_S6_un._S6_u32;

	return !words[0] && !words[1] && words[2] == htonl(0xffff);
}

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

	packet = kzalloc(sizeof(*packet), GFP_KERNEL);
	if (!packet)
		return -ENOMEM;
	packet->v4 = v4;
	packet->options = options;
	if (v4)
		put_ip4(packet, to._S6_un._S6_u32[3], options);
	else
		put_ip6(packet, to, extension);
	tcp_header(packet)->tha_fport = listener->conn.conn_lport;
	tcp_header(packet)->tha_offset_and_reserved = sizeof(tcpha_t) / 4 << 4;
	tcp_header(packet)->tha_flags = segments->flags;
	packet->db.db_base = packet->bytes;
	packet->db.db_lim = packet->bytes + sizeof(packet->bytes);
	packet->db.db_ref = 1;
	packet->mb.b_datap = &packet->db;
	packet->mb.b_rptr = packet->bytes;
	packet->mb.b_wptr = packet->bytes + packet->ip_header + sizeof(tcpha_t);
	set_client(packet, &segments->from, htons(segments->port));
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
	struct packet *packet = segments->packet;

	if (!can_receive(segments->flags)) {
		COUNT(&listener->tcp, segments);
		return;
	}
	if (segments->flags & TH_SYN && listener->tcp.tcp_state == TCPS_LISTEN)
		observe(listener);
	receive(listener, &packet->mb, packet->ip_header, packet->v4, packet->options);
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
	struct listener *listener = find_listener(next_word(words));
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
	struct listener *listener = find_listener(next_word(words));
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

/* burst L N: one SYN N times over, as fast as can be; see `nanoseconds` */
static int run_burst(struct words *words)
{
	struct listener *listener = find_listener(next_word(words));
	struct segments segments = { .flags = TH_SYN };
	char *value = next_word(words);
	u64 began;
	u32 count;
	int error;

	if (!listener || !value || kstrtou32(value, 10, &count))
		return -EINVAL;
	error = read_segments(words, listener, &segments);
	if (error)
		return error;
	segments.from = nth_client(segments.packet->v4, 0);
	set_client(segments.packet, &segments.from, nth_port(0));
	began = ktime_get_ns();
	for (u32 i = 0; i < count; i++) {
		arrive(listener, &segments);
		if (i % 1024 == 1023)
			cond_resched();
	}
	burst_ns = ktime_get_ns() - began;
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
	struct listener *listener = find_listener(next_word(words));
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
		if (!eager->tcp.tcp_listener)
			COUNT(&listener->tcp, refused);
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
	} message = {
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

/* accept L [count N]: the oldest of Q */
static int run_accept(struct words *words)
{
	struct listener *listener = find_listener(next_word(words));
	struct eager *eager;
	u64 count;

	if (!listener || read_count(words, &count) || listener->tcp.tcp_state != TCPS_LISTEN ||
	    count_q(listener, false) + count_q0(listener, true) < count)
		return -EINVAL;
	while (count--) {
		eager = claim_q(listener, false);
		if (!eager)
			return -EINVAL;
		accept_one(listener, eager);
		release(listener, eager);
		cond_resched();
	}
	return 0;
}

/* finish L [count N]: accepted connections end; they count for the listener's limit until then */
static int run_finish(struct words *words)
{
	struct listener *listener = find_listener(next_word(words));
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
	struct listener *listener = find_listener(next_word(words));
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

/* timeout L [count N]: SYN-ACKs are sent again, of so many of the oldest, or of all half-open ones */
static int run_timeout(struct words *words)
{
	struct listener *listener = find_listener(next_word(words));
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
		if (eager_of(tcp)->claimed || tcp->tcp_conn_def_q0)
			continue;
		time_out(head, tcp);
		count--;
	}
	kmutex_exit(&head->tcp_eager_lock);
	return 0;
}

static const struct command {
	const char *name;
	int (*run)(struct words *words);
	/* It changes which zones and listeners there are. */
	bool alone;
} commands[] = {
	{ "zone", run_zone, true },
	{ "q0max", run_q0max, true },
	{ "reclaim", run_reclaim, true },
	{ "alloc_fail", run_alloc_fail, true },
	{ "listen", run_listen, true },
	{ "backlog", run_backlog, true },
	{ "unlisten", run_unlisten, true },
	{ "close", run_close, true },
	{ "forget", run_forget, true },
	{ "syn", run_syn, false },
	{ "segment", run_segment, false },
	{ "burst", run_burst, false },
	{ "ack", run_ack, false },
	{ "accept", run_accept, false },
	{ "finish", run_finish, false },
	{ "abort", run_abort, false },
	{ "timeout", run_timeout, false },
};

static int run_line(char *line)
{
	struct words words;
	char *name;
	int error;

	if (split(line, &words))
		return -EINVAL;
	name = next_word(&words);
	if (!name)
		return 0;
	for (int i = 0; i < ARRAY_SIZE(commands); i++) {
		const struct command *command = &commands[i];

		if (strcmp(command->name, name))
			continue;
		if (command->alone)
			down_write(&model_lock);
		else
			down_read(&model_lock);
		error = command->run(&words);
		if (command->alone)
			up_write(&model_lock);
		else
			up_read(&model_lock);
		return error;
	}
	return -EINVAL;
}

static ssize_t write_script(struct file *file, const char __user *from, size_t size, loff_t *at)
{
	char *text, *rest, *line;
	int error = 0;

	if (size > SCRIPT_MOST)
		return -EINVAL;
	text = memdup_user_nul(from, size);
	if (IS_ERR(text))
		return PTR_ERR(text);
	rest = text;
	while (!error && (line = strsep(&rest, "\n")))
		error = run_line(line);
	kfree(text);
	return error ? error : size;
}

static const struct file_operations script_operations = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = write_script,
};

static void show_record(struct seq_file *seq, struct record *record)
{
	static const char *const kinds[] = { "socket", "streams", "tli" };
	struct listener *listener = record->listener;
	struct totals *totals = &record->totals;

	seq_printf(seq,
		   "{\"name\": \"%s\", \"zone\": %d, \"zone_name\": \"%s\", \"address\": \"%s\", "
		   "\"port\": %u, \"kind\": \"%s\", \"closed\": %s",
		   record->name, record->place->zone.zone_id, record->place->name, record->address,
		   record->port, kinds[record->kind], listener ? "false" : "true");
	if (listener) {
		tcp_t *tcp = &listener->tcp;
		u32 q0max = q0_limit(record->place->stack);

		seq_printf(seq,
			   ", \"qmax\": %d, \"q0max\": %d, \"tcp_q0\": %d, \"tcp_q\": %d, "
			   "\"state\": %d",
			   tcp->tcp_conn_req_max, tcp->tcp_conn_req_max + q0max,
			   tcp->tcp_conn_req_cnt_q0, tcp->tcp_conn_req_cnt_q, tcp->tcp_state);
	}
#define SHOW_TOTAL(name) seq_printf(seq, ", \"" #name "\": %lld", atomic64_read(&totals->name));
	TOTALS(SHOW_TOTAL)
	seq_puts(seq, ", \"saturation\": [");
	for (int i = 0; i < SATURATION_BUCKETS; i++)
		seq_printf(seq, "%s%lld", i ? ", " : "", atomic64_read(&totals->saturation[i]));
	seq_puts(seq, "]}\n");
}

static int totals_show(struct seq_file *seq, void *data)
{
	struct record *record;

	down_read(&model_lock);
	list_for_each_entry(record, &records, link)
		show_record(seq, record);
	up_read(&model_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(totals);

static int __init model_init(void)
{
	static char global_line[] = "zone 0 global";

	eager_cache = kmem_cache_create("solaris_eager", sizeof(struct eager), 0, 0, NULL);
	shared_stack = make_stack(0);
	if (!eager_cache || !shared_stack || run_line(global_line)) {
		kmem_cache_destroy(eager_cache);
		free_stack(shared_stack);
		return -ENOMEM;
	}
	directory = debugfs_create_dir("solaris", NULL);
	debugfs_create_file("script", 0200, directory, NULL, &script_operations);
	debugfs_create_file("totals", 0400, directory, NULL, &totals_fops);
	debugfs_create_u64("nanoseconds", 0400, directory, &burst_ns);
	debugfs_create_atomic_t("eagers", 0400, directory, &eagers);
	return 0;
}

static void __exit model_exit(void)
{
	struct record *record, *next_record;
	struct place *place, *next_place;

	debugfs_remove(directory);
	list_for_each_entry_safe(record, next_record, &records, link) {
		if (record->listener)
			close_listener(record->listener);
		kfree(record);
	}
	list_for_each_entry_safe(place, next_place, &places, link) {
		if (place->stack != shared_stack)
			free_stack(place->stack);
		kfree(place);
	}
	free_stack(shared_stack);
	kmem_cache_destroy(eager_cache);
}

module_init(model_init);
module_exit(model_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A model of TCP listeners as the " GENERATION " kernel has them");
