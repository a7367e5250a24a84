"""Mutants, which are programs with an error: some fixed script notices each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

from dtrace_exporter.tracing.rows import RowError
from sun import fixed, freebsd_fixed
from sun.engine import Refused
from sun.fixed import Start, first_wrong, starting
from sun.library import FREEBSD, GENERATIONS, SOLARIS, why_not
from sun.watching import text

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

BOTH = "both"


class Mutant(NamedTuple):
    """An error to put into a program."""

    name: str
    generation: str
    old: str
    new: str
    port: int = 0


MUTANTS = (
    *(
        one
        for generation, end in (("illumos", " : -1] ="), ("solaris10", "] ="))
        for one in (
            Mutant("one more than Q", generation, f"_cnt_q{end}", f"_cnt_q + 1{end}"),
            Mutant("Q0 for Q", generation, f"_cnt_q{end}", f"_cnt_q0{end}"),
        )
    ),
    Mutant("a drop twice", BOTH, "tcpListenDropQ0 {", "tcpListenDrop, mib:::tcpListenDropQ0 {"),
    Mutant("reasons changed", BOTH, "@drop[syn[curthread], 1]", "@drop[syn[curthread], 2]"),
    Mutant("no eviction", BOTH, "mib:::tcpHalfOpenDrop {", "mib:::tcpHalfOpenDrops {"),
    Mutant(
        "opened at the SYN",
        "illumos",
        "mib:::tcpPassiveOpens {",
        "fbt:ip:tcp_input_listener:entry {",
    ),
    Mutant(
        "opened at the SYN",
        "solaris10",
        "mib:::tcpPassiveOpens {",
        "fbt:ip:tcp_conn_request:entry {",
    ),
    Mutant("any segment is a SYN", "illumos", "+ 13] & SYN_FLAG ?", "+ 13] & 255 ?"),
    Mutant("the wrong flag", "illumos", "inline int SYN_FLAG = 2;", "inline int SYN_FLAG = 16;"),
    Mutant("told but once", BOTH, "/ (this->life ^ second) >> 16 &&", "/ this->life == 0 &&"),
    Mutant("told whatever it is", BOTH, "tcp_state == STATE_LISTEN &&", "tcp_state != 0 &&"),
    Mutant("told by other SYNs too", BOTH, "this->life == 0 && probefunc", "probefunc"),
    Mutant(
        "a number of its own",
        BOTH,
        "(conn_t *)arg0]) & 0xffff,",
        "(conn_t *)arg0]) & 0xffff | 1,",
    ),
    Mutant("a first SYN that none has", BOTH, "this->syn = this->life == 0 &&", "this->syn = 0 &&"),
    Mutant(
        "the SYN of the last telling",
        BOTH,
        "? this->who : syn[curthread];",
        "&& this->syn ? this->who : syn[curthread];",
    ),
    Mutant("numbers that stay", BOTH, "++tellings % 65535 + 1", "1"),
    Mutant(
        "Q0 and Q changed",
        "illumos",
        "tcp->tcp_conn_req_cnt_q0, this->tcp->tcp_conn_req_cnt_q)",
        "tcp->tcp_conn_req_cnt_q, this->tcp->tcp_conn_req_cnt_q0)",
    ),
    Mutant("no reading of Q0", "solaris10", "this->listener->tcp_conn_req_cnt_q0,", "0,"),
    Mutant("another tunable", "illumos", "tcps_propinfo_tbl[2]", "tcps_propinfo_tbl[1]"),
    Mutant("another tunable", "solaris10", "tcp_param_arr)[2]", "tcp_param_arr)[1]"),
    Mutant("the peer's port", "solaris10", "CONN_LPORT = 0x10a", "CONN_LPORT = 0x108"),
    Mutant(
        "bytes changed",
        "solaris10",
        "256 * this->at[34] + this->at[35], this",
        "256 * this->at[35] + this->at[34], this",
    ),
    Mutant(
        "no order of bytes",
        "illumos",
        "    ntohs(this->listener->u_port.connu_ports.connu_lport),",
        "    this->listener->u_port.connu_ports.connu_lport,",
    ),
    Mutant("an accept is a departure", BOTH, "{ self->taking = 1; }", "{ self->taking = 0; }"),
    Mutant("any departure is an accept", BOTH, "{ self->taking = 0; }", "{ self->taking = 1; }"),
    Mutant(
        "Q and Q0 changed",
        BOTH,
        "tcp_eager_next_q0 == NULL ? 15 : 16",
        "tcp_eager_next_q0 == NULL ? 16 : 15",
    ),
    Mutant(
        "a time that is kept",
        BOTH,
        "(this->since > 1 && this->eager->tcp_eager_next_q0 == NULL ? this->since : 0) : 0,",
        "this->since : this->since,",
    ),
    Mutant(
        "microseconds as they are",
        BOTH,
        "10000000 * ((this->ns + 1) / 1000) + 1",
        "10000000 * (this->ns + 1) + 1",
    ),
    Mutant("a bucket that is too wide", BOTH, "this->ns >> 22 ? 7", "this->ns >> 23 ? 7"),
    Mutant("buckets of 32 bits", BOTH, "this->ns >> 32 ? 12", "(int)this->ns >> 31 ? 12"),
    Mutant(
        "a deferred one is in Q",
        BOTH,
        "tcp_conn_req_cnt_q < this->tcp->tcp_conn_req_max",
        "tcp_conn_req_cnt_q >= 0",
    ),
    Mutant(
        "no deferred one",
        "illumos",
        "start[this->eager] <= 1 &&",
        "start[this->eager] < 1 &&",
    ),
    Mutant(
        "returns that count what waits",
        BOTH,
        "this->since & 1 && !this->waits &&",
        "this->since & 1 &&",
    ),
    Mutant(
        "returns that know whose it is from the connection",
        "illumos",
        "this->since & 1 && !this->waits &&",
        "this->since & 1 && !this->waits && self->eager->tcp_listener != NULL &&",
    ),
    Mutant(
        "returns that know whose it is from the connection",
        "solaris10",
        "this->since & 1 && !this->waits &&",
        "this->since & 1 && !this->waits && this->eager->tcp_listener != NULL &&",
    ),
    Mutant(
        "nobody looks at returns",
        "illumos",
        " self->eager = this->eager; }",
        " }",
    ),
    Mutant("nobody looks at returns", "solaris10", "(crowded = 1, self", "(self"),
    Mutant(
        "no deferred one",
        "solaris10",
        "/ start[this->eager] == 1 &&",
        "/ start[this->eager] == 2 &&",
    ),
    Mutant(
        "no deferred one of TLI",
        "solaris10",
        "    start[this->eager] == 1 &&",
        "    start[this->eager] == 2 &&",
    ),
    Mutant(
        "counted when it returns",
        "illumos",
        "fbt:ip:tcp_newconn_notify:entry\n/ this->life /",
        "fbt:ip:tcp_newconn_notify:return\n/ this->life /",
    ),
    Mutant("a second listen() is nothing", BOTH, "] &= 0xffff", "]"),
    *(
        one
        for generation, conn in (("illumos", "listener"), ("solaris10", "conn"))
        for one in (
            Mutant(
                "nothing closes",
                generation,
                f'printf("closed %x %d\\n", (uint64_t)this->{conn}, timestamp);',
                "",
            ),
            Mutant("a life that goes on", generation, f"	life[this->{conn}] = 0;\n", ""),
            Mutant(
                "told and forgotten",
                generation,
                f"life[this->{conn}] = this->life = this->told,",
                "this->life = this->told,",
            ),
        )
    ),
    Mutant("a copy that is kept", BOTH, "trunc(@opened);", ""),
    Mutant("a copy that is cleared", BOTH, "trunc(@left);", "clear(@left);"),
    Mutant(
        "emptied by a clause of its own",
        BOTH,
        " trunc(@syn);",
        "",
    ),
    Mutant("foreign SYNs stay", BOTH, "syn[curthread] = NOBODY, this->life", "this->life", 81),
    Mutant("no order of bytes at a SYN", "illumos", "port = htons(PORT)", "port = PORT", 81),
    Mutant("another port", BOTH, "PORT == 0 ||", "1 ||", 81),
    Mutant("a second too late", BOTH, "second = timestamp / 1000000000 << 16;\n\tprinta", "printa"),
)
FREEBSD_MUTANTS = (
    (
        "one more than Q",
        "this->listener->sol_qlen] = count",
        "this->listener->sol_qlen + 1] = count",
    ),
    (
        "what waits for data is in Q",
        "this->address, this->port, this->listener->sol_qlen,",
        "this->address, this->port, this->listener->sol_incqlen,",
    ),
    ("a capacity of the limit", "3 * this->listener->sol_qlimit / 2", "this->listener->sol_qlimit"),
    ("a capacity of one less", "sol_qlen > 3 *", "sol_qlen >= 3 *"),
    ("every failure is a full Q", "/ 2 ? 4 : 5]", "/ 2 ? 4 : 4]"),
    ("no failure is a full Q", "/ 2 ? 4 : 5]", "/ 2 ? 5 : 5]"),
    (
        "what a filter throws out is nothing",
        "self->filling != NULL && (this",
        "self->filling == NULL && (this",
    ),
    ("a filter that holds nothing", "this->child->so_qstate == IN_COMP && (", "("),
    ("told but once", "/ this->life < second &&", "/ this->life == 0 &&"),
    ("told by other SYNs too", "this->life == 0 && probefunc", "probefunc"),
    ("a first SYN that none has", 'this->life == 0 && probefunc == "syncache_add"', "0"),
    ("numbers that stay", "++tellings % 65535 + 1", "1"),
    (
        "no order of bytes",
        "ntohs(this->ends->ie_lport),\n    PORT",
        "this->ends->ie_lport,\n    PORT",
    ),
    ("any address is of IPv4", "= this->is_v6 ? IPV6", "= 0 ? IPV6"),
    ("evictions at any time", "{ self->adding = 0; }", "{ self->adding = 1; }"),
    ("all are of any address", "this->address] ? this->address :", 'this->address] ? "::" :'),
    ("none is of any address", 'this->is_v6 ? "::" : "0.0.0.0", bound', '"1.2.3.4", bound'),
    ("no any address of both", "this->both = this->is_v6 &&", "this->both = 0 &&"),
    (
        "any address of IPv6 is of both",
        "this->is_v6 && this->inp->inp_vflag & VERSION_4",
        "this->is_v6",
    ),
    (
        "one close closes all",
        "-= bound[this->jail, this->port, this->address] > 0",
        "= 0 & bound[this->jail, this->port, this->address]",
    ),
    ("no close closes", "-= bound[this->jail, this->port, this->address] > 0", "-= 0"),
    ("both stay", "-= this->both &&", "-= 0 &&"),
    ("another's are evicted", "this->jail = this->half->sc_cred->cr_prison", "this->jail = 0"),
    ("known again with each telling", "+= this->new ||", "+= 1 ||"),
    (
        "what was asked for is what was granted",
        "sol_qlimit, this->asked",
        "sol_qlimit, this->listener->sol_qlimit",
    ),
    ("granted before it was", "(int)arg1; }", "(int)arg1 + 1; }"),
    ("an accept that failed", "/ (int)arg1 != 0 / {", "{"),
    (
        "whose it is tells the accept alone",
        "self->accepting != NULL ? self->accepting :",
        "0 ? self->accepting :",
    ),
    ("a time that is kept", "head[this->child] = NULL, start[this->child] = 0,", ""),
    ("no quick accept", "this->life && this->since & 1 /", "this->life && 0 /"),
    ("microseconds as they are", "10000000 * (this->ns / 1000) + 1", "10000000 * this->ns + 1"),
    ("a bucket that is too wide", "this->ns <= 1 << 22 ? 6", "this->ns <= 1 << 23 ? 6"),
    ("buckets of 32 bits", "1L << 32", "1 << 31"),
    ("a second listen() is nothing", "] &= 0xffff", "]"),
    ("nothing closes", 'printf("closed %x %d\\n", (uint64_t)arg0, timestamp);', ""),
    ("a copy that is kept", "trunc(@established);", ""),
    ("a copy that is cleared", "trunc(@left);", "clear(@left);"),
    ("a second too late", "second = timestamp / 1000000000 << 16;\n\tprinta", "printa"),
)
OWN_CLAUSE = "emptied by a clause of its own"


def mutants() -> list[tuple[str, Mutant]]:
    """Return all mutants, each with every generation that it applies to."""
    found = [
        (generation, mutant)
        for mutant in MUTANTS
        for generation in SOLARIS
        if mutant.generation in {generation, BOTH}
    ]
    return found + [
        (generation, Mutant(name, "freebsd", old, new))
        for name, old, new in FREEBSD_MUTANTS
        for generation in FREEBSD
    ]


def _cases(generation: str) -> Sequence[Callable[[Start], list[str]]]:
    return freebsd_fixed.CASES if generation in FREEBSD else fixed.CASES


def mutated(generation: str, mutant: Mutant) -> str:
    """Return a program with an error."""
    source = text(generation, mutant.port)
    assert mutant.old in source, mutant.name
    source = source.replace(mutant.old, mutant.new)
    return source + "tick-1s { trunc(@syn); }\n" if mutant.name == OWN_CLAUSE else source


@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_mutant(generation: str) -> None:
    """The programs without errors pass all fixed scripts."""
    assert first_wrong(starting(generation), _cases(generation)) == ""


@pytest.mark.parametrize(
    ("generation", "mutant"), mutants(), ids=lambda one: getattr(one, "name", one)
)
def test_mutant(generation: str, mutant: Mutant) -> None:
    """Some fixed script notices the error in the program."""
    start = starting(generation, source=mutated(generation, mutant))
    cases = _cases(generation)
    if generation in FREEBSD:
        # The program watches all ports.
        cases = tuple(case for case in cases if case.__name__ != "one_port")
    if mutant.port:
        cases = tuple(case for case in cases if case.__name__ == "one_port")
    try:
        found = first_wrong(start, cases)
    except (Refused, RowError) as error:
        found = str(error)
    assert found
