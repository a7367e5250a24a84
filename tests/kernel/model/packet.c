/*
 * Segments as they come from the network.
 */
#include <linux/inet.h>
#include <linux/slab.h>

#include "driver.h"

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

static void put_ip6(struct packet *packet, const in6_addr_t *destination, int extension)
{
	ip6_t *ip6h = (ip6_t *)packet->bytes;
	uchar_t *at = (uchar_t *)(ip6h + 1);

	packet->ip_header = sizeof(*ip6h) + extension;
	ip6h->ip6_ctlun.ip6_un1.ip6_un1_flow = htonl(0x60000000);
	ip6h->ip6_ctlun.ip6_un1.ip6_un1_plen = htons(extension + sizeof(tcpha_t));
	ip6h->ip6_ctlun.ip6_un1.ip6_un1_hlim = 64;
	ip6h->ip6_dst = *destination;
	/* Hop-by-hop options (0), then destination options (60) for what is more than 8 bytes. */
	ip6h->ip6_ctlun.ip6_un1.ip6_un1_nxt = extension ? 0 : SOLARIS_IPPROTO_TCP;
	if (extension)
		put_extension(at, extension > 8 ? 60 : SOLARIS_IPPROTO_TCP, 8);
	if (extension > 8)
		put_extension(at + 8, SOLARIS_IPPROTO_TCP, extension - 8);
}

/* A segment from nowhere yet; NULL when there is no memory. kfree() it. */
struct packet *make_packet(const in6_addr_t *to, in_port_t port, bool v4, int options,
			   int extension, uint8_t flags)
{
	struct packet *packet = kzalloc(sizeof(*packet), GFP_KERNEL);

	if (!packet)
		return NULL;
	packet->v4 = v4;
	packet->options = options;
	if (v4)
		put_ip4(packet, to->_S6_un._S6_u32[3], options);
	else
		put_ip6(packet, to, extension);
	tcp_header(packet)->tha_fport = port;
	tcp_header(packet)->tha_offset_and_reserved = sizeof(tcpha_t) / 4 << 4;
	tcp_header(packet)->tha_flags = flags;
	packet->db.db_base = packet->bytes;
	packet->db.db_lim = packet->bytes + sizeof(packet->bytes);
	packet->db.db_ref = 1;
	packet->mb.b_datap = &packet->db;
	packet->mb.b_rptr = packet->bytes;
	packet->mb.b_wptr = packet->bytes + packet->ip_header + sizeof(tcpha_t);
	return packet;
}

void set_client(struct packet *packet, const in6_addr_t *address, in_port_t port)
{
	if (packet->v4)
		((ipha_t *)packet->bytes)->ipha_src = address->_S6_un._S6_u32[3];
	else
		((ip6_t *)packet->bytes)->ip6_src = *address;
	tcp_header(packet)->tha_lport = port;
}

/* The n-th client of a listener, of a net for benchmarks or for documentation. */
in6_addr_t nth_client(bool v4, u64 n)
{
	in6_addr_t address = { ._S6_un._S6_u8 = { 0x20, 0x01, 0x0d, 0xb8 } };

	if (v4)
		return v4_mapped(htonl(0xc6120000 + (n & 0x1ffff)));
	address._S6_un._S6_u32[3] = htonl(n + 1);
	return address;
}

in_port_t nth_port(u64 n)
{
	return htons(1024 + n % 64000);
}

bool is_wildcard(const in6_addr_t *address)
{
	const u32 *words = address->_S6_un._S6_u32;

	return !words[0] && !words[1] && !words[3] && (!words[2] || words[2] == htonl(0xffff));
}

bool is_mapped(const in6_addr_t *address)
{
	const u32 *words = address->_S6_un._S6_u32;

	return !words[0] && !words[1] && words[2] == htonl(0xffff);
}

int read_address(const char *text, in6_addr_t *address, bool *v4)
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
