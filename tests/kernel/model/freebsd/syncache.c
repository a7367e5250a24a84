/*
 * FreeBSD's syncache, which has the half-open connections of a stack, and what leads into it.
 * Facts: sys/netinet/tcp_syncache.c, tcp_input.c, in_pcb.c.
 */
#include <linux/math64.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "model.h"
#include "words.h"

struct kmem_cache *syncache_cache;

int syncache_expand(struct in_conninfo *inc, struct tcpopt *to, struct tcphdr *th,
		    struct socket **lsop, struct mbuf *m, uint16_t port);
void syncache_drop(struct syncache *sc, struct vnet *stack);

static struct syncache *alloc_entry(void)
{
	struct model_syncache *made;

	if (atomic_dec_if_positive(&failing_allocations) >= 0)
		return NULL;
	made = kmem_cache_zalloc(syncache_cache, GFP_ATOMIC);
	return made ? &made->sc : NULL;
}

static struct syncache *find_entry(struct vnet *stack, const struct in_conninfo *inc)
{
	struct syncache *sc;

	list_for_each_entry(sc, &stack->sch_bucket, sc_hash)
		if (!memcmp(&sc->sc_inc, inc, sizeof(*inc)))
			return sc;
	return NULL;
}

static void take_entry(struct syncache *sc, struct vnet *stack)
{
	list_del(&sc->sc_hash);
	stack->sch_length--;
	UNCOUNT(entry_of(sc)->record, half_open);
}

/* Static in FreeBSD: whether it is a function of its own is the compiler's decision there. */
TRACED void syncache_drop(struct syncache *sc, struct vnet *stack)
{
	take_entry(sc, stack);
	kmem_cache_free(syncache_cache, entry_of(sc));
}

static bool is_any(const struct in6_addr *address)
{
	const uint32_t *words = address->__u6_addr.__u6_addr32;

	return !words[0] && !words[1] && !words[2] && !words[3];
}

/* How well a listener fits what is half-open, as for its final ACK: 0 is not at all. */
static int fit(struct inpcb *inp, const struct in_conninfo *inc)
{
	const struct in_endpoints *ours = &inp->inp_inc.inc_ie, *theirs = &inc->inc_ie;
	bool v6 = inc->inc_flags & INC_ISIPV6;
	u32 bound = ours->ie_dependladdr.id46_addr.ia46_addr4.s_addr;

	if (ours->ie_lport != theirs->ie_lport ||
	    !(inp->inp_vflag & (v6 ? INP_IPV6 : INP_IPV4)))
		return 0;
	if (v6 ? is_any(&ours->ie_dependladdr.id6_addr) : !bound)
		return !v6 && inp->inp_vflag & INP_IPV6 ? 1 : 2;
	if (v6)
		return 3 * !memcmp(&ours->ie_dependladdr, &theirs->ie_dependladdr, 16);
	return 3 * (bound == theirs->ie_dependladdr.id46_addr.ia46_addr4.s_addr);
}

/* Whether what comes to these addresses comes to a listener: no other one fits better. */
bool reaches(struct listener *listener, const struct in_conninfo *inc)
{
	int own = fit(listener->inp, inc);
	struct record *record;

	list_for_each_entry(record, &records, link)
		if (record->listener && record->place == listener->record->place &&
		    fit(record->listener->inp, inc) > own)
			return false;
	return own;
}

/*
 * Throw out the oldest half-open connection for a new one. The listener of its jail to which its
 * final ACK would come counts it. Who only sees what happens to listeners may be wrong about that:
 * nothing has happened yet to one of these, or one is just closing.
 */
static void evict(struct vnet *stack)
{
	struct syncache *sc = list_entry(stack->sch_bucket.prev, struct syncache, sc_hash);
	struct record *record, *unsure = NULL, *found = NULL;
	int best = 0, how;

	list_for_each_entry(record, &records, link) {
		if (record->port == ntohs(sc->sc_inc.inc_ie.ie_lport) &&
		    &record->place->cred == sc->sc_cred &&
		    (record->listener ? !record->heard_of || record->closing :
					record->closing && !record->gone))
			unsure = record;
		if (!record->listener || &record->place->cred != sc->sc_cred ||
		    record->listener->inp->inp_flags & INP_DROPPED)
			continue;
		how = fit(record->listener->inp, &sc->sc_inc);
		if (how > best) {
			best = how;
			found = record;
		}
	}
	if (found)
		COUNT(found, q0_evicted);
	if (unsure)
		COUNT(unsure, unsure_evicted);
	syncache_drop(sc, stack);
}

/* The caller has the listener's inpcb, which is given back here. */
TRACED int syncache_add(struct in_conninfo *inc, struct tcpopt *to, struct tcphdr *th,
			struct inpcb *inp, void *so, struct mbuf *m, void *tod, void *todctx,
			uint8_t iptos, uint16_t port)
{
	struct socket *listening = FREEBSD == 13 ? *(struct socket **)so : so;
	struct record *record = socket_of(listening)->record;
	struct vnet *stack = listening->so_vnet;
	struct ucred *cred = listening->so_cred;
	struct syncache *sc;

	record->heard_of = true;
	/* Another CPU was at work before this was entered. */
	if (atomic64_read(&record->totals.q_changes) != record->changes_seen)
		COUNT(record, unsure);
	inp_wunlock(inp);
	spin_lock(&stack->sch_mtx);
	if (find_entry(stack, inc)) {
		COUNT(record, duplicates);
		spin_unlock(&stack->sch_mtx);
		return 0;
	}
	sc = alloc_entry();
	if (!sc) {
		if (stack->sch_length)
			evict(stack);
		sc = alloc_entry();
	}
	if (!sc) {
		COUNT(record, zone_fail);
		spin_unlock(&stack->sch_mtx);
		return 0;
	}
	sc->sc_inc = *inc;
	sc->sc_cred = cred;
	entry_of(sc)->record = record;
	spin_unlock(&stack->sch_mtx);
	/* The SYN-ACK goes out. */
	cond_resched();
	spin_lock(&stack->sch_mtx);
	if (stack->sch_length >= stack->bucket_limit)
		evict(stack);
	sc->sc_hash.next = stack->sch_bucket.next;
	sc->sc_hash.prev = &stack->sch_bucket;
	sc->sc_hash.next->prev = &sc->sc_hash;
	stack->sch_bucket.next = &sc->sc_hash;
	stack->sch_length++;
	COUNT(record, created);
	COUNT(record, half_open);
	spin_unlock(&stack->sch_mtx);
	return 0;
}

/* A connection's socket, with its inpcb locked; NULL if it cannot be. */
static struct socket *syncache_socket(const struct in_conninfo *inc, struct socket *head,
				      bool *incomplete)
{
	struct socket *so;
	struct inpcb *inp;

#if FREEBSD == 13
	so = sonewconn(head, 0);
	if (!so)
		return NULL;
	inp_wlock(sotoinpcb(so));
	*incomplete = true;
#else
	so = solisten_clone(head);
	if (!so)
		return NULL;
	if (in_pcballoc(so)) {
		COUNT(socket_of(head)->record, no_memory);
		COUNT(socket_of(head)->record, no_inpcb);
		sodealloc(so);
		atomic_dec(&eagers);
		return NULL;
	}
	inp_wlock(sotoinpcb(so));
#endif
	inp = sotoinpcb(so);
	inp->inp_inc = *inc;
	inp->inp_vflag = inc->inc_flags & INC_ISIPV6 ? INP_IPV6 | INP_IPV6PROTO : INP_IPV4;
#if FREEBSD >= 14
	*incomplete = !solisten_enqueue(so, SS_ISCONNECTED);
#endif
	return so;
}

/* An ACK for a listener. Returns 0 where nothing is half-open; *lsop is NULL if it is refused. */
TRACED int syncache_expand(struct in_conninfo *inc, struct tcpopt *to, struct tcphdr *th,
			   struct socket **lsop, struct mbuf *m, uint16_t port)
{
	struct vnet *stack = (*lsop)->so_vnet;
	struct syncache *sc;
	bool *incomplete = (bool *)to;

	spin_lock(&stack->sch_mtx);
	sc = find_entry(stack, inc);
	if (sc)
		take_entry(sc, stack);
	spin_unlock(&stack->sch_mtx);
	/* Without one the number of the ACK can be a cookie. */
	if (!sc && !th->th_ack)
		return 0;
	*lsop = syncache_socket(inc, *lsop, incomplete);
	if (sc)
		kmem_cache_free(syncache_cache, entry_of(sc));
	return 1;
}

/* tcp_input(): a SYN, or an ACK that is a final one. */

/* Q and its limit as a SYN finds them; the inpcb is locked. */
static void observe(struct listener *listener)
{
	struct totals *totals = &listener->record->totals;
	s64 q = listener->so->sol_qlen;
	s64 most = listener->so->sol_qlimit ? listener->so->sol_qlimit : 1;
	int bucket = SATURATION_BUCKETS - 1;

	if (q <= most)
		bucket = q > 0 ? div64_s64(q * 10 + most - 1, most) : 0;
	atomic64_inc(&totals->saturation[bucket]);
	atomic64_add(q, &totals->q_sum);
	listener->record->changes_seen = atomic64_read(&totals->q_changes);
}

static bool lock_listening(struct listener *listener)
{
	inp_wlock(listener->inp);
	if (!(listener->inp->inp_flags & INP_DROPPED))
		return true;
	inp_wunlock(listener->inp);
	COUNT(listener->record, not_listening);
	return false;
}

void receive_syn(struct listener *listener, struct in_conninfo *inc)
{
	struct tcphdr th = { .th_flags = TH_SYN };
	struct socket *so;

	if (!lock_listening(listener))
		return;
	so = listener->inp->inp_socket;
	observe(listener);
	COUNT(listener->record, syns);
	syncache_add(inc, NULL, &th, listener->inp, FREEBSD == 13 ? (void *)&so : so, NULL, NULL,
		     NULL, 0, 0);
}

void receive_ack(struct listener *listener, struct in_conninfo *inc, bool cookie)
{
	struct tcphdr th = { .th_flags = TH_ACK, .th_ack = cookie };
	bool incomplete = false;
	struct socket *so;
	struct inpcb *inp;
	int found;

	if (!lock_listening(listener))
		return;
	so = listener->inp->inp_socket;
	found = syncache_expand(inc, (struct tcpopt *)&incomplete, &th, &so, NULL, 0);
	inp_wunlock(listener->inp);
	/* Either is answered by a reset. */
	if (!found || !so)
		return;
	inp = sotoinpcb(so);
	let_others_go();
	/* tcp_do_segment() */
	if (incomplete)
		soisconnected(so);
	inp_wunlock(inp);
}

/* What the script needs. */

/* Tell of the oldest half-open connection of a listener. Returns whether there is one. */
bool oldest_inc(struct record *record, struct in_conninfo *inc)
{
	struct vnet *stack = record->place->stack;
	struct syncache *sc;
	bool found = false;

	spin_lock(&stack->sch_mtx);
	list_for_each_entry_reverse(sc, &stack->sch_bucket, sc_hash) {
		found = entry_of(sc)->record == record;
		if (!found)
			continue;
		*inc = sc->sc_inc;
		break;
	}
	spin_unlock(&stack->sch_mtx);
	return found;
}

u64 count_entries(struct record *record)
{
	return atomic64_read(&record->totals.half_open);
}

/* A reset of its client, or a time that is up. */
void forget_oldest(struct record *record)
{
	struct vnet *stack = record->place->stack;
	struct syncache *sc;

	spin_lock(&stack->sch_mtx);
	list_for_each_entry_reverse(sc, &stack->sch_bucket, sc_hash) {
		if (entry_of(sc)->record != record)
			continue;
		COUNT(record, forgotten);
		syncache_drop(sc, stack);
		break;
	}
	spin_unlock(&stack->sch_mtx);
}

void flush_syncache(struct vnet *stack)
{
	while (!list_empty_careful(&stack->sch_bucket)) {
		struct syncache *sc = list_first_entry_or_null(&stack->sch_bucket,
							       struct syncache, sc_hash);

		list_del(&sc->sc_hash);
		kmem_cache_free(syncache_cache, entry_of(sc));
	}
}
