/*
 * Types of the Solaris and illumos kernels that both generations share.
 *
 * Members that nothing here or in a D program reads are left out or lumped together as `other`.
 * Struct tags that Linux has for something else carry the prefix solaris_; D programs use typedefs.
 */
#ifndef MODEL_SOLARIS_H
#define MODEL_SOLARIS_H

#include <linux/atomic.h>
#include <linux/build_bug.h>
#include <linux/spinlock.h>
#include <linux/stddef.h>
#include <linux/string.h>
#include <linux/types.h>

/* A function that DTrace shall find, whole and under its own name. */
#ifndef TRACED
#define TRACED noinline __noclone __used
#endif

#define AT(type, member, offset) static_assert(offsetof(type, member) == (offset))

/* sys/types.h, LP64 */
typedef unsigned char uchar_t;
typedef unsigned short ushort_t;
typedef unsigned int uint_t;
typedef enum { B_FALSE, B_TRUE } boolean_t;
typedef int32_t zoneid_t;
typedef int32_t netstackid_t;
typedef uint64_t solaris_dev_t;
typedef void *timeout_id_t;

/* sys/mutex.h, sys/condvar.h: 8 and 2 bytes */
typedef struct solaris_mutex {
	spinlock_t lock;
	uint32_t other;
} __aligned(8) kmutex_t;
typedef struct solaris_condvar {
	uint16_t other;
} kcondvar_t;
static_assert(sizeof(kmutex_t) == 8);
static_assert(sizeof(kcondvar_t) == 2);

static inline void kmutex_init(kmutex_t *mutex)
{
	spin_lock_init(&mutex->lock);
}

static inline void kmutex_enter(kmutex_t *mutex)
{
	spin_lock(&mutex->lock);
}

static inline void kmutex_exit(kmutex_t *mutex)
{
	spin_unlock(&mutex->lock);
}

/* sys/thread.h */
typedef struct _kthread kthread_t;

/* Longest names of programs, as p_user.u_comm of sys/user.h has them, and services. */
#define COMM_MOST 16
#define FMRI_MOST 255

/* sys/squeue_impl.h: the first members; sq_run is the thread that is in it */
typedef struct squeue_s {
	kmutex_t sq_lock;
	uint32_t sq_state;
	int sq_count;
	struct msgb *sq_first;
	struct msgb *sq_last;
	kthread_t *sq_run;
} squeue_t;
AT(squeue_t, sq_run, 32);

#ifdef __KERNEL__
/* The module's threads go into squeues together. In a process (see tests/sun) they are real. */
static inline void squeue_enter(squeue_t *squeue)
{
}
static inline void squeue_exit(squeue_t *squeue)
{
}
#else
bool squeue_free(const squeue_t *squeue);
void squeue_enter(squeue_t *squeue);
void squeue_exit(squeue_t *squeue);
#endif

/* netinet/in.h, sys/socket.h, sys/socket_proto.h */
typedef uint16_t in_port_t;
typedef uint32_t ipaddr_t;
typedef uint32_t socklen_t;
typedef uint16_t solaris_sa_family_t;
typedef struct solaris_in6_addr {
	union {
		uint8_t _S6_u8[16];
		uint32_t _S6_u32[4];
		uint32_t __S6_align;
	} _S6_un;
} in6_addr_t;
static_assert(sizeof(in6_addr_t) == 16);
static_assert(__alignof__(in6_addr_t) == 4);

/* An IPv4 address as IPv6 writes it, ::ffff:a.b.c.d; in and out in network order. */
static inline in6_addr_t v4_mapped(ipaddr_t address)
{
	in6_addr_t mapped = { ._S6_un._S6_u8 = { [10] = 0xff, [11] = 0xff } };

	mapped._S6_un._S6_u32[3] = address;
	return mapped;
}

#define SOLARIS_AF_INET 2
#define SOLARIS_AF_INET6 26
#define IPV4_VERSION 4
#define IPV6_VERSION 6
#define SOLARIS_IPPROTO_TCP 6

typedef struct solaris_sockaddr_in {
	uint16_t sin_family;
	in_port_t sin_port;
	ipaddr_t sin_addr;
	uint8_t sin_zero[8];
} sin_t;
typedef struct solaris_sockaddr_in6 {
	uint16_t sin6_family;
	in_port_t sin6_port;
	uint32_t sin6_flowinfo;
	in6_addr_t sin6_addr;
	uint32_t sin6_scope_id;
	uint32_t __sin6_src_id;
} sin6_t;
static_assert(sizeof(sin_t) == 16);
static_assert(sizeof(sin6_t) == 32);

struct sockaddr;
typedef struct __sock_lower_handle *sock_lower_handle_t;
typedef struct __sock_upper_handle *sock_upper_handle_t;

/* inet/ip.h, netinet/ip6.h, inet/tcp.h: packet headers */
typedef struct ipha_s {
	uint8_t ipha_version_and_hdr_length;
	uint8_t ipha_type_of_service;
	uint16_t ipha_length;
	uint16_t ipha_ident;
	uint16_t ipha_fragment_offset_and_flags;
	uint8_t ipha_ttl;
	uint8_t ipha_protocol;
	uint16_t ipha_hdr_checksum;
	ipaddr_t ipha_src;
	ipaddr_t ipha_dst;
} ipha_t;
AT(ipha_t, ipha_protocol, 9);
AT(ipha_t, ipha_src, 12);
AT(ipha_t, ipha_dst, 16);
static_assert(sizeof(ipha_t) == 20);

typedef struct ip6_hdr {
	union {
		struct ip6_hdrctl {
			uint32_t ip6_un1_flow;
			uint16_t ip6_un1_plen;
			uint8_t ip6_un1_nxt;
			uint8_t ip6_un1_hlim;
		} ip6_un1;
	} ip6_ctlun;
	in6_addr_t ip6_src;
	in6_addr_t ip6_dst;
} ip6_t;
AT(ip6_t, ip6_ctlun.ip6_un1.ip6_un1_nxt, 6);
AT(ip6_t, ip6_src, 8);
AT(ip6_t, ip6_dst, 24);
static_assert(sizeof(ip6_t) == 40);

typedef struct tcphdr_s {
	uint8_t th_lport[2];
	uint8_t th_fport[2];
	uint8_t th_seq[4];
	uint8_t th_ack[4];
	uint8_t th_offset_and_rsrvd[1];
	uint8_t th_flags[1];
	uint8_t th_win[2];
	uint8_t th_sum[2];
	uint8_t th_urp[2];
} tcph_t;
/* lport is the sender's. */
typedef struct tcphdra_s {
	in_port_t tha_lport;
	in_port_t tha_fport;
	uint32_t tha_seq;
	uint32_t tha_ack;
	uint8_t tha_offset_and_reserved;
	uint8_t tha_flags;
	uint16_t tha_win;
	uint16_t tha_sum;
	uint16_t tha_urp;
} tcpha_t;
AT(tcph_t, th_flags, 13);
AT(tcpha_t, tha_flags, 13);
static_assert(sizeof(tcph_t) == 20);
static_assert(sizeof(tcpha_t) == 20);

#define TH_FIN 0x01
#define TH_SYN 0x02
#define TH_RST 0x04
#define TH_PUSH 0x08
#define TH_ACK 0x10
#define TH_URG 0x20

/* sys/stream.h */
typedef struct solaris_queue {
	void *q_qinfo;
	struct msgb *q_first;
	struct msgb *q_last;
	struct solaris_queue *q_next;
	struct solaris_queue *q_link;
	void *q_ptr;
} queue_t;
/* A stream's queues are a pair: read, then write. */
#define RD(q) ((q) - 1)

typedef struct datab {
	struct msgb *db_frtnp_unused;
	uchar_t *db_base;
	uchar_t *db_lim;
	uchar_t db_ref;
	uchar_t db_type;
	uchar_t db_flags;
	uchar_t db_struioflag;
} dblk_t;
AT(dblk_t, db_base, 8);
AT(dblk_t, db_type, 25);

typedef struct msgb {
	struct msgb *b_next;
	struct msgb *b_prev;
	struct msgb *b_cont;
	uchar_t *b_rptr;
	uchar_t *b_wptr;
	struct datab *b_datap;
	uchar_t b_band;
	uchar_t b_tag;
	ushort_t b_flag;
	queue_t *b_queue;
} mblk_t;
AT(mblk_t, b_rptr, 24);
AT(mblk_t, b_wptr, 32);
AT(mblk_t, b_datap, 40);
static_assert(sizeof(mblk_t) == 64);

/* sys/tihdr.h, the LP64 kernel's: 32-bit members */
typedef int32_t t_scalar_t;
typedef uint32_t t_uscalar_t;
struct T_conn_ind {
	t_scalar_t PRIM_type;
	t_scalar_t SRC_length;
	t_scalar_t SRC_offset;
	t_scalar_t OPT_length;
	t_scalar_t OPT_offset;
	t_scalar_t SEQ_number;
};
struct T_conn_res {
	t_scalar_t PRIM_type;
	t_uscalar_t ACCEPTOR_id;
	t_scalar_t OPT_length;
	t_scalar_t OPT_offset;
	t_scalar_t SEQ_number;
};
struct T_bind_req {
	t_scalar_t PRIM_type;
	t_scalar_t ADDR_length;
	t_scalar_t ADDR_offset;
	t_uscalar_t CONIND_number;
};
#define T_CONN_RES 1
#define T_CONN_IND 11
#define T_BIND_REQ 30
AT(struct T_conn_ind, OPT_offset, 16);
AT(struct T_conn_res, OPT_offset, 12);

/* sys/zone.h: the first members */
typedef struct solaris_zone {
	char *zone_name;
	char *zone_nodename;
	char *zone_domain;
	uint32_t zone_hostid;
	kmutex_t zone_lock;
	zoneid_t zone_id;
} zone_t;
AT(zone_t, zone_name, 0);

/* sys/cred_impl.h: seven ids, four sets of 12 bytes with flags, the project, the zone */
typedef struct solaris_cred {
	uint_t cr_ref;
	uint32_t cr_uid;
	uint32_t cr_gid;
	uint32_t cr_ruid;
	uint32_t cr_rgid;
	uint32_t cr_suid;
	uint32_t cr_sgid;
	uint32_t cr_priv[13];
	int32_t cr_projid;
	zone_t *cr_zone;
} cred_t;
AT(cred_t, cr_zone, 88);

/* inet/tcp.h */
#define TCPS_CLOSED (-6)
#define TCPS_IDLE (-5)
#define TCPS_BOUND (-4)
#define TCPS_LISTEN (-3)
#define TCPS_SYN_SENT (-2)
#define TCPS_SYN_RCVD (-1)
#define TCPS_ESTABLISHED 0

/* sys/tiuser.h */
#define TOUTSTATE 6

/*
 * Solaris' mib probes, the one place that names them. Linux has no mib provider, so each is a
 * function with the probe's arguments; the script `dtrace` beside this file puts it in its place.
 */
#define MIB_PROBES(X) \
	X(tcpListenDrop) X(tcpListenDropQ0) X(tcpHalfOpenDrop) X(tcpPassiveOpens)

#define MIB_COUNTER(name) atomic_t name;
typedef struct mib2_tcp {
	MIB_PROBES(MIB_COUNTER)
} mib2_tcp_t;

#define MIB_DECLARE(name) void mib_##name(int increment, void *counter);
MIB_PROBES(MIB_DECLARE)

#define BUMP_MIB(mib, name) (atomic_inc(&(mib)->name), mib_##name(1, &(mib)->name))

#endif
