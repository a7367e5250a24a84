/*
 * FreeBSD: struct socket, struct inpcb and what hangs on them, as 13 and 14 have them (FREEBSD).
 *
 * Offsets are those that the member lists give by the rules of LP64. 13: sys/sys/socketvar.h,
 * sockbuf.h, protosw.h, ucred.h and sys/netinet/in_pcb.h, tcp_syncache.h of 13.1. 14: the same of
 * the newest sources that were read, which are 14-STABLE's and younger. Members that nothing here
 * or in a D program reads are lumped together as `other`.
 */
#ifndef MODEL_TYPES_H
#define MODEL_TYPES_H

#include <linux/atomic.h>
#include <linux/build_bug.h>
#include <linux/list.h>
#include <linux/spinlock.h>
#include <linux/stddef.h>
#include <linux/string.h>
#include <linux/types.h>

#define GENERATION "FreeBSD"

/*
 * Linux has other structures of these names, and DTrace would take those. ../dtrace gives the
 * program's the same names as here. So Linux' headers have to come before this one.
 */
#ifdef __KERNEL__
#define socket freebsd_socket
#define ucred freebsd_ucred
#define in_addr freebsd_in_addr
#define in6_addr freebsd_in6_addr
#define tcphdr freebsd_tcphdr
#endif

/* A function that DTrace shall find, whole and under its own name. */
#ifndef TRACED
#define TRACED noinline __noclone __used
#endif

#define AT(type, member, offset) static_assert(offsetof(type, member) == (offset))
/* Where the two differ. */
#define AT_13_14(type, member, in_13, in_14) AT(type, member, FREEBSD == 13 ? (in_13) : (in_14))

typedef unsigned char u_char;
typedef unsigned short u_short;
typedef unsigned int u_int;

/* sys/_mutex.h, sys/_rwlock.h: a lock_object of 24 bytes and the owner */
struct mtx {
	spinlock_t lock;
	uint8_t other[28];
};
struct rwlock {
	spinlock_t lock;
	uint8_t other[28];
};
static_assert(sizeof(struct mtx) == 32);
static_assert(sizeof(struct rwlock) == 32);

/* netinet/in.h, netinet6/in6.h */
typedef uint32_t in_addr_t;
struct in_addr {
	in_addr_t s_addr;
};
struct in6_addr {
	union {
		uint8_t __u6_addr8[16];
		uint16_t __u6_addr16[8];
		uint32_t __u6_addr32[4];
	} __u6_addr;
};
#define IPPROTO_TCP 6

/* netinet/in_pcb.h */
struct in_addr_4in6 {
	uint32_t ia46_pad32[3];
	struct in_addr ia46_addr4;
};
union in_dependaddr {
	struct in_addr_4in6 id46_addr;
	struct in6_addr id6_addr;
};
struct in_endpoints {
	uint16_t ie_fport;
	uint16_t ie_lport;
	union in_dependaddr ie_dependfaddr;
	union in_dependaddr ie_dependladdr;
	uint32_t ie6_zoneid;
};
struct in_conninfo {
	uint8_t inc_flags;
	uint8_t inc_len;
	uint16_t inc_fibnum;
	struct in_endpoints inc_ie;
};
AT(struct in_conninfo, inc_ie.ie_lport, 6);
AT(struct in_conninfo, inc_ie.ie_dependladdr, 24);
static_assert(sizeof(struct in_conninfo) == 44);
#define INC_ISIPV6 0x01

#define INP_IPV4 0x1
#define INP_IPV6 0x2
#define INP_IPV6PROTO 0x4
#define INP_DROPPED 0x04000000

struct socket;
struct ucred;
struct inpcb {
#if FREEBSD == 13
	uint8_t other1[32];
	struct rwlock inp_lock;
	uint8_t other2[28];
	u_int inp_refcount;
	int inp_flags;
	int inp_flags2;
	uint8_t other3[8];
	void *inp_ppcb;
	struct socket *inp_socket;
	uint8_t other4[56];
	struct ucred *inp_cred;
	uint32_t inp_flow;
	u_char inp_vflag;
	u_char inp_ip_ttl;
	u_char inp_ip_p;
	u_char inp_ip_minttl;
	uint8_t other5[24];
#else
	uint8_t other1[32];
	struct rwlock inp_lock;
	u_int inp_refcount;
	int inp_flags;
	int inp_flags2;
	uint8_t inp_numa_domain;
	void *inp_ppcb;
	struct socket *inp_socket;
	void *inp_pcbinfo;
	struct ucred *inp_cred;
	uint32_t inp_flow;
	u_char inp_vflag;
	u_char inp_ip_ttl;
	u_char inp_ip_p;
	u_char inp_ip_minttl;
	uint32_t inp_flowid;
	uint32_t inp_smr;
	void *inp_snd_tag;
	uint32_t inp_flowtype;
#endif
	struct in_conninfo inp_inc;
	uint8_t rest[200];
};
AT(struct inpcb, inp_lock, 32);
AT_13_14(struct inpcb, inp_refcount, 92, 64);
AT_13_14(struct inpcb, inp_socket, 120, 88);
AT_13_14(struct inpcb, inp_cred, 184, 104);
AT_13_14(struct inpcb, inp_vflag, 196, 116);
AT_13_14(struct inpcb, inp_inc, 224, 140);

/* sys/protosw.h; from 14 on the methods are in it */
struct pr_usrreqs;
struct protosw {
#if FREEBSD == 13
	short pr_type;
	void *pr_domain;
	short pr_protocol;
	short pr_flags;
	uint8_t other[64];
	struct pr_usrreqs *pr_usrreqs;
#else
	short pr_type;
	short pr_protocol;
	short pr_flags;
	short pr_unused;
	void *pr_domain;
	uint8_t other[64];
#endif
};
AT_13_14(struct protosw, pr_protocol, 16, 2);

/* sys/jail.h: MAXHOSTNAMELEN is 256; how much is before the name is not the same in all releases */
struct prison {
	uint8_t other[256];
	char pr_name[256];
};

/* sys/ucred.h */
struct ucred {
	struct mtx cr_mtx;
	u_int cr_ref;
	u_int cr_users;
	uint8_t other[104];
	struct prison *cr_prison;
};
AT(struct ucred, cr_prison, 144);

/* sys/socketvar.h; TAILQ_HEAD and TAILQ_ENTRY of sys/queue.h */
struct accept_queue {
	struct socket *tqh_first;
	struct socket **tqh_last;
};
enum socket_qstate {
	SQ_NONE = 0,
	SQ_INCOMP = 0x0800,
	SQ_COMP = 0x1000,
};
#define SO_ACCEPTCONN 0x0002
#define SO_ACCEPTFILTER 0x1000
#define SS_ISCONNECTED 0x0002
#define SU_OK 0
#define SU_ISCONNECTED 1
#define SOMAXCONN_DEFAULT 128

/* Its methods are in a module in FreeBSD, and of no interest here. */
struct accept_filter;
struct vnet;
struct socket {
	struct mtx so_lock;
	volatile u_int so_count;
	uint8_t so_rdsel[72] __aligned(8);
	uint8_t so_wrsel[72];
#if FREEBSD == 13
	short so_type;
	int so_options;
	short so_linger;
	short so_state;
	void *so_pcb;
	struct vnet *so_vnet;
	struct protosw *so_proto;
	short so_timeo;
	u_short so_error;
	u_short so_rerror;
	void *so_sigio;
	struct ucred *so_cred;
	uint8_t other[80];
#else
	int so_options;
	short so_type;
	short so_state;
	void *so_pcb;
	struct vnet *so_vnet;
	struct protosw *so_proto;
	short so_linger;
	short so_timeo;
	u_short so_error;
	u_short so_rerror;
	void *so_sigio;
	struct ucred *so_cred;
	uint8_t other[104];
	uint8_t locks[128] __aligned(64);
#endif
	union {
		struct {
			uint8_t so_rcv[280] __aligned(8);
			uint8_t so_snd[280];
			struct {
				struct socket *tqe_next;
				struct socket **tqe_prev;
			} so_list;
			struct socket *so_listen;
			enum socket_qstate so_qstate;
		};
		struct {
			struct accept_queue sol_incomp;
			struct accept_queue sol_comp;
			u_int sol_qlen;
			u_int sol_incqlen;
			u_int sol_qlimit;
			struct accept_filter *sol_accept_filter;
			uint8_t more[72];
			int sol_overcount;
		};
	};
};
AT_13_14(struct socket, so_options, 188, 184);
AT_13_14(struct socket, so_pcb, 200, 192);
AT_13_14(struct socket, so_proto, 216, 208);
AT_13_14(struct socket, so_cred, 240, 232);
AT_13_14(struct socket, sol_incomp, 328, 512);
AT_13_14(struct socket, sol_qlen, 360, 544);
AT_13_14(struct socket, sol_incqlen, 364, 548);
AT_13_14(struct socket, sol_qlimit, 368, 552);
/* Behind two buffers of 280 bytes; those of 14 are smaller, by how much has not been read. */
AT_13_14(struct socket, so_listen, 904, 1088);
AT_13_14(struct socket, so_qstate, 912, 1096);

/* netinet/tcp_syncache.h */
struct syncache {
	struct list_head sc_hash;
	struct in_conninfo sc_inc;
	uint8_t other[76];
	struct ucred *sc_cred;
};
AT(struct syncache, sc_inc, 16);
AT(struct syncache, sc_cred, 136);

struct tcpopt;
struct tcphdr {
	uint16_t th_sport;
	uint16_t th_dport;
	uint32_t th_seq;
	uint32_t th_ack;
	uint8_t th_off;
	uint8_t th_flags;
	uint16_t th_win;
	uint16_t th_sum;
	uint16_t th_urp;
};
static_assert(sizeof(struct tcphdr) == 20);
#define TH_SYN 0x02
#define TH_ACK 0x10

struct mbuf;
struct sockaddr;
struct thread;

#endif
