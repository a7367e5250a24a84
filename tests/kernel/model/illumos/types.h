/*
 * illumos: conn_t, tcp_t and what hangs on them.
 *
 * Offsets are those that the member lists of illumos-gate's usr/src/uts/common/inet (2010 and
 * later) give by the rules of LP64: ipclassifier.h, tcp.h, tcp_impl.h, tcp_stack.h, tunables.h and
 * ip.h.
 */
#ifndef MODEL_TYPES_H
#define MODEL_TYPES_H

#include "solaris.h"

#define GENERATION "illumos"

/* sys/netstack.h: the modules' pointers come first */
typedef struct solaris_netstack {
	void *netstack_u[32];
	netstackid_t netstack_stackid;
	int netstack_numzones;
} netstack_t;

/* inet/tunables.h */
typedef struct mod_propval_uint32_s {
	uint32_t mod_propval_umin;
	uint32_t mod_propval_umax;
	uint32_t mod_propval_ucur;
} mod_propval_uint32_t;
typedef struct mod_prop_info_s {
	char *mpi_name;
	uint_t mpi_proto;
	void *mpi_setf;
	void *mpi_getf;
	union {
		mod_propval_uint32_t mpi_uval;
		boolean_t mpi_bval;
		uint64_t _pad[2];
	} u;
	union {
		uint32_t mpi_def_uval;
		boolean_t mpi_def_bval;
	} u_def;
} mod_prop_info_t;
AT(mod_prop_info_t, u.mpi_uval.mod_propval_ucur, 40);
static_assert(sizeof(mod_prop_info_t) == 56);

/* sys/refstr_impl.h */
typedef struct refstr {
	uint32_t rs_size;
	uint32_t rs_refcnt;
	char rs_string[1];
} refstr_t;
AT(refstr_t, rs_string, 8);

/* sys/contract/process_impl.h; contract_t of sys/contract_impl.h is 456 bytes */
typedef struct cont_process {
	uint8_t conp_contract[456];
	cred_t *conp_cred;
	uint8_t other[64];
	uint_t conp_params;
	uint_t conp_ev_fatal;
	uint_t conp_nmembers;
	uint_t conp_ninherited;
	refstr_t *conp_svc_fmri;
} cont_process_t;
AT(cont_process_t, conp_cred, 456);
AT(cont_process_t, conp_svc_fmri, 544);

/* sys/proc.h, in its order: its offsets are each release's, as p_user in its middle has grown. */
typedef struct proc {
	void *p_exec;
	void *p_as;
	struct cont_process *p_ct_process;
	zone_t *p_zone;
} proc_t;

/* The model's own: what a process has of its service. */
struct service {
	cont_process_t contract;
	union {
		refstr_t fmri;
		char bytes[offsetof(refstr_t, rs_string) + FMRI_MOST + 1];
	};
};

/* sys/thread.h; label_t is 64 bytes, and k_sigset_t 12 */
struct _kthread {
	struct _kthread *t_link;
	uint8_t other1[296];
	int32_t t_tid;
	int32_t t_waitfor;
	uint8_t other2[80];
	void *t_lwp;
	proc_t *t_procp;
};
AT(kthread_t, t_tid, 304);
AT(kthread_t, t_lwp, 392);
AT(kthread_t, t_procp, 400);

static inline void set_process(kthread_t *thread, proc_t *proc)
{
	thread->t_procp = proc;
}

/* tcp_impl.h: indices into tcps_propinfo_tbl */
#define TCPS_CONN_REQ_MAX_Q 1
#define TCPS_CONN_REQ_MAX_Q0 2
#define TCPS_CONN_REQ_MIN 3
#define TCPS_PROPERTIES 4

/* tcp_stack.h; MD5_CTX is 88 bytes and ipdropper_t a pointer */
typedef struct tcp_stack {
	netstack_t *tcps_netstack;
	int tcps_g_num_epriv_ports;
	in_port_t tcps_g_epriv_ports[64];
	kmutex_t tcps_epriv_port_lock;
	in_port_t tcps_min_anonpriv_port;
	mod_prop_info_t *tcps_propinfo_tbl;
	uint8_t other[208];
	boolean_t tcps_reclaim;
	/* From here on the model's own: a CPU's tcp_sc_mib in illumos. */
	mib2_tcp_t mib;
	mod_prop_info_t properties[TCPS_PROPERTIES];
	netstack_t netstack;
} tcp_stack_t;
AT(tcp_stack_t, tcps_propinfo_tbl, 160);
AT(tcp_stack_t, tcps_reclaim, 376);

/* tcp_impl.h */
typedef struct tcp_listen_cnt_s {
	uint32_t tlc_max;
	uint32_t tlc_cnt;
	int64_t tlc_report_time;
	uint32_t tlc_drop;
} tcp_listen_cnt_t;
AT(tcp_listen_cnt_t, tlc_drop, 16);

struct conn_s;

/* tcp.h; tcp_sack_info_t is 80 bytes */
typedef struct tcp_s {
	struct tcp_s *tcp_time_wait_next;
	struct tcp_s *tcp_time_wait_prev;
	int64_t tcp_time_wait_expire;
	struct conn_s *tcp_connp;
	tcp_stack_t *tcp_tcps;
	int32_t tcp_state;
	int32_t tcp_rcv_ws;
	int32_t tcp_snd_ws;
	uint32_t tcp_ts_recent;
	long tcp_rto;
	int64_t tcp_last_rcv_lbolt;
	uint8_t other1[140];
	uint32_t other_bits1 : 6;
	uint32_t tcp_detached : 1;
	uint32_t other_bits2 : 25;
	uint32_t other_bits3 : 11;
	uint32_t tcp_tconnind_started : 1;
	uint32_t other_bits4 : 20;
	uint32_t tcp_initial_pmtu;
	uint8_t other2[216];
	struct tcp_s *tcp_listener;
	uint8_t other3[72];
	int tcp_conn_req_cnt_q0;
	int tcp_conn_req_cnt_q;
	int tcp_conn_req_max;
	t_scalar_t tcp_conn_req_seqnum;
	kmutex_t tcp_eager_lock;
	struct tcp_s *tcp_eager_next_q;
	struct tcp_s *tcp_eager_last_q;
	struct tcp_s *tcp_eager_next_q0;
	struct tcp_s *tcp_eager_prev_q0;
	boolean_t tcp_conn_def_q0;
	union {
		mblk_t *tcp_eager_conn_ind;
		mblk_t *tcp_opts_conn_req;
	} tcp_conn;
	uint32_t tcp_syn_rcvd_timeout;
	uint8_t other4[84];
	t_uscalar_t tcp_acceptor_id;
	uint8_t other5[220];
	struct tcp_s *tcp_saved_listener;
	uint8_t other6[40];
	boolean_t tcp_issocket;
	uint32_t tcp_squeue_bytes;
	boolean_t tcp_closemp_used;
	struct tcp_s *tcp_eager_prev_drop_q0;
	struct tcp_s *tcp_eager_next_drop_q0;
	uint8_t other7[32];
	tcp_listen_cnt_t *tcp_listen_cnt;
} tcp_t;
AT(tcp_t, tcp_connp, 24);
AT(tcp_t, tcp_tcps, 32);
AT(tcp_t, tcp_state, 40);
AT(tcp_t, tcp_last_rcv_lbolt, 64);
AT(tcp_t, tcp_initial_pmtu, 220);
AT(tcp_t, tcp_listener, 440);
AT(tcp_t, tcp_conn_req_cnt_q0, 520);
AT(tcp_t, tcp_conn_req_cnt_q, 524);
AT(tcp_t, tcp_conn_req_max, 528);
AT(tcp_t, tcp_eager_lock, 536);
AT(tcp_t, tcp_eager_next_q, 544);
AT(tcp_t, tcp_eager_next_q0, 560);
AT(tcp_t, tcp_eager_prev_q0, 568);
AT(tcp_t, tcp_conn_def_q0, 576);
AT(tcp_t, tcp_conn, 584);
AT(tcp_t, tcp_syn_rcvd_timeout, 592);
AT(tcp_t, tcp_acceptor_id, 680);
AT(tcp_t, tcp_saved_listener, 904);
AT(tcp_t, tcp_issocket, 952);
AT(tcp_t, tcp_closemp_used, 960);
AT(tcp_t, tcp_eager_prev_drop_q0, 968);
AT(tcp_t, tcp_eager_next_drop_q0, 976);
AT(tcp_t, tcp_listen_cnt, 1016);

/* ipclassifier.h */
#define IPCL_NONSTR 0x00001000

struct ip_recv_attr_s;
typedef void (*edesc_rpf)(void *, mblk_t *, void *, struct ip_recv_attr_s *);

typedef struct conn_s {
	kmutex_t conn_lock;
	uint32_t conn_ref;
	uint32_t conn_flags;
	union {
		tcp_t *cp_tcp;
		void *cp_priv;
	} conn_proto_priv;
	kcondvar_t conn_cv;
	uint8_t conn_proto;
	edesc_rpf conn_recv;
	uint8_t other1[112];
	queue_t *conn_rq;
	queue_t *conn_wq;
	solaris_dev_t conn_dev;
	void *conn_minor_arena;
	void *conn_helper_info;
	cred_t *conn_cred;
	pid_t conn_cpid;
	uint64_t conn_open_time;
	uint8_t other2[32];
	in6_addr_t conn_bound_addr_v6;
	void *conn_fanout;
	struct conn_s *conn_next;
	struct conn_s *conn_prev;
	struct {
		in6_addr_t connua_laddr;
		in6_addr_t connua_faddr;
	} connua_v6addr;
	in6_addr_t conn_saddr_v6;
	union {
		uint32_t connu_ports2;
		struct {
			in_port_t connu_fport;
			in_port_t connu_lport;
		} connu_ports;
	} u_port;
	uint8_t other3[68];
	zoneid_t conn_zoneid;
	int conn_rtaware;
	kcondvar_t conn_sq_cv;
	void *conn_upcalls;
	sock_upper_handle_t conn_upper_handle;
	uint_t other4;
	boolean_t conn_flow_cntrld;
	netstack_t *conn_netstack;
	ushort_t conn_ipversion;
	solaris_sa_family_t conn_family;
	uint_t conn_so_type;
} conn_t;
#define conn_tcp conn_proto_priv.cp_tcp
#define conn_lport u_port.connu_ports.connu_lport
#define conn_fport u_port.connu_ports.connu_fport
AT(conn_t, conn_proto_priv, 0x10);
AT(conn_t, conn_recv, 32);
AT(conn_t, conn_rq, 152);
AT(conn_t, conn_cred, 192);
AT(conn_t, conn_cpid, 200);
AT(conn_t, conn_bound_addr_v6, 248);
AT(conn_t, connua_v6addr.connua_laddr, 288);
AT(conn_t, connua_v6addr.connua_faddr, 304);
AT(conn_t, conn_fport, 336);
AT(conn_t, conn_lport, 338);
AT(conn_t, conn_zoneid, 408);
AT(conn_t, conn_netstack, 448);
AT(conn_t, conn_ipversion, 456);
AT(conn_t, conn_family, 458);

/* ip.h */
#define IRAF_IS_IPV4 0x80000000ULL
#define IRAF_IPV4_OPTIONS 0x00000002ULL
typedef uint64_t iaflags_t;
typedef struct ip_recv_attr_s {
	iaflags_t ira_flags;
	uint32_t ira_free_flags;
	squeue_t *ira_sqp;
	void *ira_ring;
	squeue_t *ira_target_sqp;
	mblk_t *ira_target_sqp_mp;
	uint32_t ira_xmit_hint;
	zoneid_t ira_zoneid;
	uint_t ira_pktlen;
	uint16_t ira_ip_hdr_length;
	uint8_t ira_protocol;
	uint_t ira_rifindex;
	uint_t ira_ruifindex;
	void *ira_tsl;
	void *ira_rill;
	void *ira_ill;
	cred_t *ira_cred;
	pid_t ira_cpid;
} ip_recv_attr_t;
AT(ip_recv_attr_t, ira_zoneid, 52);
AT(ip_recv_attr_t, ira_ip_hdr_length, 60);
AT(ip_recv_attr_t, ira_cred, 96);
AT(ip_recv_attr_t, ira_cpid, 104);

/* For the functions that only illumos hands its receive attributes. */
#define IRA_PARAMETER , ip_recv_attr_t *dummy
#define IRA_NONE , NULL

#define GET_DEF_CONN_IND TRACED

#define PLAIN_SOCKET SOCKET

/* The list of half-open eagers that may be thrown out, headed by the listener. */
static inline void make_undroppable(tcp_t *eager)
{
	if (!eager->tcp_eager_next_drop_q0)
		return;
	eager->tcp_eager_next_drop_q0->tcp_eager_prev_drop_q0 = eager->tcp_eager_prev_drop_q0;
	eager->tcp_eager_prev_drop_q0->tcp_eager_next_drop_q0 = eager->tcp_eager_next_drop_q0;
	eager->tcp_eager_prev_drop_q0 = NULL;
	eager->tcp_eager_next_drop_q0 = NULL;
}

mblk_t *tcp_get_def_conn_ind(tcp_t *listener);

/* Give back the place that an endpoint has in its listener's limit. */
void leave_listen_cnt(tcp_t *tcp);

/* Whether the application has been told of an eager. */
static inline bool conn_ind_gone_up(tcp_t *eager)
{
	return eager->tcp_tconnind_started;
}

#endif
