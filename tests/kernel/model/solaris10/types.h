/*
 * Solaris 10: conn_t and tcp_t, and their global tunables.
 *
 * conn_t as a late update has it, with the one flag bit that the LSO project added to the member
 * list of the OpenSolaris of October 2006 (usr/src/uts/common/inet/ipclassifier.h): tcp at 0x28 and
 * local port at 0x10a, as published for Solaris 10. tcp_t is that source's inet/tcp.h, by LP64's
 * rules.
 */
#ifndef MODEL_TYPES_H
#define MODEL_TYPES_H

#include "solaris.h"

#define GENERATION "solaris10"

/* Its one and only stack has no structure of its own; this is the model's. */
typedef struct solaris10_stack {
	int unused;
} tcp_stack_t;

/* Nothing that is in these is read, and contracts do not tell services yet. */
typedef struct proc {
	void *p_exec;
} proc_t;
struct _kthread {
	struct _kthread *t_link;
};
struct service {
	int unused;
};

static inline void set_process(kthread_t *thread, proc_t *proc)
{
}

/* inet/tcp_impl.h */
typedef struct tcpparam_s {
	uint32_t tcp_param_min;
	uint32_t tcp_param_max;
	uint32_t tcp_param_val;
	char *tcp_param_name;
} tcpparam_t;
AT(tcpparam_t, tcp_param_val, 8);
#define TCP_CONN_REQ_MAX_Q 1
#define TCP_CONN_REQ_MAX_Q0 2
#define TCP_CONN_REQ_MIN 3
#define TCP_PARAMS 4
extern tcpparam_t tcp_param_arr[TCP_PARAMS];
extern mib2_tcp_t tcp_mib;
extern int hz;

struct conn_s;

typedef struct tcp_s {
	struct tcp_s *tcp_time_wait_next;
	struct tcp_s *tcp_time_wait_prev;
	long tcp_time_wait_expire;
	struct conn_s *tcp_connp;
	int32_t tcp_state;
	int32_t tcp_rcv_ws;
	int32_t tcp_snd_ws;
	uint32_t tcp_ts_recent;
	long tcp_rto;
	long tcp_last_rcv_lbolt;
	uint8_t other1[24];
	queue_t *tcp_rq;
	queue_t *tcp_wq;
	uint8_t other2[108];
	uint32_t other_bits1;
	uint32_t other_bits2 : 8;
	uint32_t tcp_detached : 1;
	uint32_t other_bits3 : 3;
	uint32_t tcp_conn_def_q0 : 1;
	uint32_t other_bits4 : 4;
	uint32_t tcp_syn_defense : 1;
	uint32_t other_bits5 : 14;
	uint32_t other_bits6;
	uint32_t tcp_if_mtu;
	uint8_t other3[148];
	struct tcp_s *tcp_listener;
	uint8_t other4[72];
	int tcp_conn_req_cnt_q0;
	int tcp_conn_req_cnt_q;
	int tcp_conn_req_max;
	t_scalar_t tcp_conn_req_seqnum;
	kmutex_t tcp_eager_lock;
	struct tcp_s *tcp_eager_next_q;
	struct tcp_s *tcp_eager_last_q;
	struct tcp_s *tcp_eager_next_q0;
	struct tcp_s *tcp_eager_prev_q0;
	union {
		mblk_t *tcp_eager_conn_ind;
		mblk_t *tcp_opts_conn_req;
	} tcp_conn;
	uint32_t tcp_syn_rcvd_timeout;
	uint8_t other5[108];
	t_uscalar_t tcp_acceptor_id;
	int tcp_ipsec_overhead;
	uint_t tcp_family;
	uint8_t other6[76];
	cred_t *tcp_cred;
	pid_t tcp_cpid;
	uint8_t tcp_hdr_info[8];
	ushort_t tcp_ipversion;
	uint_t tcp_bound_if;
	/* A bit far behind in Solaris, the model's place for it. */
	boolean_t tcp_issocket;
} tcp_t;
AT(tcp_t, tcp_connp, 24);
AT(tcp_t, tcp_state, 32);
AT(tcp_t, tcp_last_rcv_lbolt, 56);
AT(tcp_t, tcp_rq, 88);
AT(tcp_t, tcp_if_mtu, 224);
AT(tcp_t, tcp_listener, 376);
AT(tcp_t, tcp_conn_req_cnt_q0, 456);
AT(tcp_t, tcp_conn_req_cnt_q, 460);
AT(tcp_t, tcp_conn_req_max, 464);
AT(tcp_t, tcp_eager_lock, 472);
AT(tcp_t, tcp_eager_next_q, 480);
AT(tcp_t, tcp_eager_next_q0, 496);
AT(tcp_t, tcp_conn, 512);
AT(tcp_t, tcp_syn_rcvd_timeout, 520);
AT(tcp_t, tcp_acceptor_id, 632);
AT(tcp_t, tcp_family, 640);
AT(tcp_t, tcp_cred, 720);
AT(tcp_t, tcp_cpid, 728);
AT(tcp_t, tcp_ipversion, 740);

typedef void (*edesc_rpf)(void *, mblk_t *, void *);

typedef struct conn_s {
	kmutex_t conn_lock;
	uint32_t conn_ref;
	uint_t conn_state_flags;
	void *conn_ire_cache;
	uint32_t conn_flags;
	unsigned int conn_bits;
	unsigned int conn_lso_ok : 1;
	tcp_t *conn_tcp;
	void *conn_udp;
	squeue_t *conn_sqp;
	edesc_rpf conn_recv;
	uint8_t other1[48];
	queue_t *conn_rq;
	queue_t *conn_wq;
	solaris_dev_t conn_dev;
	cred_t *conn_cred;
	uint8_t other2[32];
	in6_addr_t conn_bound_source_v6;
	uint8_t other3[32];
	struct {
		in6_addr_t connua_laddr;
		in6_addr_t connua_faddr;
	} connua_v6addr;
	union {
		uint32_t conn_ports2;
		struct {
			in_port_t tcpu_fport;
			in_port_t tcpu_lport;
		} tcpu_ports;
	} u_port;
	uint8_t conn_ulp;
	uint8_t conn_unused_byte;
	kcondvar_t conn_cv;
	uint8_t other4[176];
	zoneid_t conn_zoneid;
} conn_t;
#define conn_lport u_port.tcpu_ports.tcpu_lport
#define conn_fport u_port.tcpu_ports.tcpu_fport
AT(conn_t, conn_tcp, 0x28);
AT(conn_t, conn_recv, 0x40);
AT(conn_t, conn_rq, 0x78);
AT(conn_t, conn_cred, 0x90);
AT(conn_t, conn_bound_source_v6, 0xb8);
AT(conn_t, connua_v6addr.connua_laddr, 0xe8);
AT(conn_t, connua_v6addr.connua_faddr, 0xf8);
AT(conn_t, conn_fport, 0x108);
AT(conn_t, conn_lport, 0x10a);
AT(conn_t, conn_ulp, 0x10c);
AT(conn_t, conn_zoneid, 0x1c0);

#define IRA_PARAMETER
#define IRA_NONE

/* Not yet a function of its own: its lines stood in both of the functions that need it. */
#define GET_DEF_CONN_IND static __always_inline

/* Every socket lies on a stream. */
#define PLAIN_SOCKET STREAMS

/* The list of droppable eagers came later: tcp_drop_q0 looks for one in Q0. */
static inline void make_undroppable(tcp_t *eager)
{
}

/* Whether the application has been told of an eager. */
static inline bool conn_ind_gone_up(tcp_t *eager)
{
	return !eager->tcp_conn.tcp_eager_conn_ind;
}

static inline void leave_listen_cnt(tcp_t *tcp)
{
}

#endif
