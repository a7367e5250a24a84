/*
 * A model of the Solaris and illumos kernels' TCP listeners: its start, its end, its totals.
 */
#include <linux/seq_file.h>
#include <linux/slab.h>

#include "driver.h"

DECLARE_RWSEM(model_lock);
LIST_HEAD(places);
LIST_HEAD(records);
LIST_HEAD(processes);
tcp_stack_t *shared_stack;

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
			   "\"listens\": %s",
			   tcp->tcp_conn_req_max, tcp->tcp_conn_req_max + q0max,
			   tcp->tcp_conn_req_cnt_q0, tcp->tcp_conn_req_cnt_q,
			   tcp->tcp_state == TCPS_LISTEN ? "true" : "false");
	}
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
	static const char line[] = "zone 0 global";
	char global[sizeof(line)];

	memcpy(global, line, sizeof(line));
	eager_cache = kmem_cache_create("solaris_eager", sizeof(struct eager), 0, 0, NULL);
	shared_stack = make_stack(0);
	if (!eager_cache || !shared_stack || run_line(global)) {
		kmem_cache_destroy(eager_cache);
		free_stack(shared_stack);
		return -ENOMEM;
	}
	return 0;
}

void stop_model(void)
{
	struct record *record, *next_record;
	struct place *place, *next_place;
	struct process *process, *next_process;

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
	list_for_each_entry_safe(process, next_process, &processes, link)
		kfree(process);
	free_stack(shared_stack);
	kmem_cache_destroy(eager_cache);
}
