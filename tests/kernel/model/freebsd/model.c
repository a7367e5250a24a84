/*
 * A model of FreeBSD's TCP listeners: its start, its end, its totals.
 */
#include <linux/seq_file.h>
#include <linux/slab.h>

#include "model.h"
#include "words.h"

DECLARE_RWSEM(model_lock);
LIST_HEAD(places);
LIST_HEAD(records);

static void show_record(struct seq_file *seq, struct record *record)
{
	struct listener *listener = record->listener;
	struct totals *totals = &record->totals;

	seq_printf(seq,
		   "{\"name\": \"%s\", \"zone\": %d, \"zone_name\": \"%s\", \"address\": \"%s\", "
		   "\"port\": %u, \"kind\": \"%s\", \"closed\": %s",
		   record->name, record->place->id, record->place->prison.pr_name,
		   record->address, record->port, record->filters ? "filter" : "socket",
		   listener ? "false" : "true");
	if (listener)
		seq_printf(seq,
			   ", \"qmax\": %u, \"q0max\": null, \"tcp_q0\": null, \"tcp_q\": %u, "
			   "\"listens\": true",
			   listener->so->sol_qlimit, listener->so->sol_qlen);
	seq_printf(seq, ", \"asked\": %d, \"asked_times\": %d", record->asked,
		   record->asked_times);
#define SHOW_TOTAL(name) seq_printf(seq, ", \"" #name "\": %lld", atomic64_read(&totals->name));
	TOTALS(SHOW_TOTAL)
	seq_puts(seq, ", \"saturation\": [");
	for (int i = 0; i < SATURATION_BUCKETS; i++)
		seq_printf(seq, "%s%lld", i ? ", " : "", atomic64_read(&totals->saturation[i]));
	seq_puts(seq, "]}\n");
}

/* A line of JSON for each listener that there was. */
int totals_show(struct seq_file *seq, void *data)
{
	struct record *record;

	down_read(&model_lock);
	list_for_each_entry(record, &records, link)
		show_record(seq, record);
	up_read(&model_lock);
	return 0;
}

int start_model(void)
{
	/* The host itself is jail 0, of this name. */
	static const char line[] = "zone 0 0 exclusive";
	char host[sizeof(line)];

	memcpy(host, line, sizeof(line));
	socket_cache = kmem_cache_create("freebsd_socket", sizeof(struct model_socket), 64, 0, NULL);
	inpcb_cache = kmem_cache_create("freebsd_inpcb", sizeof(struct inpcb), 64, 0, NULL);
	syncache_cache =
		kmem_cache_create("freebsd_syncache", sizeof(struct model_syncache), 0, 0, NULL);
	if (socket_cache && inpcb_cache && syncache_cache && !run_line(host))
		return 0;
	stop_model();
	return -ENOMEM;
}

void stop_model(void)
{
	struct record *record, *next_record;
	struct place *place, *next_place;

	list_for_each_entry(place, &places, link)
		flush_syncache(place->stack);
	list_for_each_entry_safe(record, next_record, &records, link) {
		if (record->listener)
			close_listener(record->listener);
		kfree(record);
	}
	list_for_each_entry_safe(place, next_place, &places, link) {
		if (place->stack->owner == place)
			kfree(place->stack);
		kfree(place);
	}
	kmem_cache_destroy(socket_cache);
	kmem_cache_destroy(inpcb_cache);
	kmem_cache_destroy(syncache_cache);
}
