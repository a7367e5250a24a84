/* synload ADDRESS PORT FIRST COUNT: send COUNT SYNs to a listener as fast as this machine can and
 * print how many were sent. Each has a source address and port of its own; those of number FIRST,
 * FIRST + 1, ... are the same in every run.
 *
 * The sources are in 198.18.0.0/15 or 2001:db8::/32. The answers must have a route that leads
 * nowhere: a host that answered them with a reset would end the half-open connections.
 */
#include <arpa/inet.h>
#include <netinet/ip.h>
#include <netinet/ip6.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define PORTS 60000
#define FIRST_PORT 1024

static uint32_t add(uint32_t sum, const void *data, size_t length)
{
	const uint8_t *byte = data;

	for (; length > 1; length -= 2, byte += 2)
		sum += (uint32_t)byte[0] << 8 | byte[1];
	return sum;
}

static uint16_t fold(uint32_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return htons((uint16_t)~sum);
}

static void fill(struct tcphdr *tcp, int port, unsigned i, uint32_t addresses)
{
	memset(tcp, 0, sizeof *tcp);
	tcp->source = htons(FIRST_PORT + i % PORTS);
	tcp->dest = htons(port);
	tcp->seq = htonl(i * 2654435761u);
	tcp->doff = 5;
	tcp->syn = 1;
	tcp->window = htons(65535);
	tcp->check = fold(add(addresses + IPPROTO_TCP + sizeof *tcp, tcp, sizeof *tcp));
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void flood4(struct in_addr to, int port, unsigned first, unsigned count)
{
	struct { struct iphdr ip; struct tcphdr tcp; } p = {0};
	struct sockaddr_in peer = { .sin_family = AF_INET, .sin_addr = to };
	int fd = socket(AF_INET, SOCK_RAW, IPPROTO_RAW), yes = 1;

	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &yes, sizeof yes))
		die("socket");
	p.ip.version = 4;
	p.ip.ihl = 5;
	p.ip.ttl = 64;
	p.ip.protocol = IPPROTO_TCP;
	p.ip.tot_len = htons(sizeof p);
	p.ip.daddr = to.s_addr;
	for (unsigned i = first; i != first + count; i++) {
		p.ip.saddr = htonl(0xc6120001u + i / PORTS);
		fill(&p.tcp, port, i, add(add(0, &p.ip.saddr, 4), &p.ip.daddr, 4));
		if (sendto(fd, &p, sizeof p, 0, (void *)&peer, sizeof peer) < 0)
			die("sendto");
	}
}

static void flood6(struct in6_addr to, int port, unsigned first, unsigned count)
{
	struct { struct ip6_hdr ip; struct tcphdr tcp; } p = {0};
	struct sockaddr_in6 peer = { .sin6_family = AF_INET6, .sin6_addr = to };
	int fd = socket(AF_INET6, SOCK_RAW, IPPROTO_RAW);

	if (fd < 0)
		die("socket");
	p.ip.ip6_flow = htonl(6u << 28);
	p.ip.ip6_plen = htons(sizeof p.tcp);
	p.ip.ip6_nxt = IPPROTO_TCP;
	p.ip.ip6_hlim = 64;
	p.ip.ip6_dst = to;
	inet_pton(AF_INET6, "2001:db8::1", &p.ip.ip6_src);
	for (unsigned i = first; i != first + count; i++) {
		p.ip.ip6_src.s6_addr32[2] = htonl(i / PORTS);
		fill(&p.tcp, port, i, add(add(0, &p.ip.ip6_src, 16), &p.ip.ip6_dst, 16));
		if (sendto(fd, &p, sizeof p, 0, (void *)&peer, sizeof peer) < 0)
			die("sendto");
	}
}

int main(int argc, char **argv)
{
	struct in_addr four;
	struct in6_addr six;

	if (argc != 5) {
		fprintf(stderr, "usage: synload ADDRESS PORT FIRST COUNT\n");
		return 2;
	}
	int port = atoi(argv[2]);
	unsigned first = strtoul(argv[3], NULL, 10);
	unsigned count = strtoul(argv[4], NULL, 10);

	if (inet_pton(AF_INET, argv[1], &four) == 1)
		flood4(four, port, first, count);
	else if (inet_pton(AF_INET6, argv[1], &six) == 1)
		flood6(six, port, first, count);
	else
		return 2;
	printf("%u\n", count);
}
