"""The rules of Sun's engine that this simulator follows, each of which can be switched off.

A test that passes with a rule switched off does not depend on it, so a simulator without one of
them is a mutant: something should notice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """Which rules hold; what happens otherwise stands in brackets.

    Rules about memory and faults:
        alignment_checked: an n-byte load from an address that n does not divide faults [it loads].
        fault_ends_clause_only: the later clauses of an event run after a fault [they do not].
        errors_fire: a fault lets dtrace:::ERROR fire at once, before the event's later clauses [not
            at all].
        faults_told_each_time: each fault is a line on stderr [a clause's first one is].
        drop_ends_clause: a clause whose dynamic variable finds no room ends there, and no more is
            told than the drop [it goes on].
        this_kept: ``this->`` keeps what the CPU left in it [each event begins with zeros].
        lazy: what ``?:``, ``&&`` and ``||`` do not need is not evaluated [it is].

    Rules about types:
        shifts_narrow: a shift has the type of its left side, so ``uint8_t << n`` is recorded in
            8 bits [at least an int].
        shifts_folded_unsigned: a constant is shifted right without its sign [with it].
        small_types_stay: no operation widens char or short to int [they are widened].
        small_unsigned: on Solaris 10 ``%d`` prints a char or a short without its sign [with it].
        records_truncated: what is printed or a key has its type's size, whatever a register holds
            [it is recorded whole].
        constants_cut: on illumos a constant is cut to what it is assigned to, without a sign [it is
            not].
        constants_signed: a constant with a minus is negative wherever it is compared [it has only
            the bits of its type].
        old_casts: on Solaris 10 a cast of another sign keeps the smaller type's bits, so a negative
            int becomes a positive uint64_t [the sign is extended, as on illumos].

    Rules of the compiler:
        clause_per_probe: a clause is compiled anew for each of its probes [once].
        comment_refused: on Solaris 10 no comment stands between a predicate and its brace [it may].
        registers_leak: on Solaris 10 an addition to a pointer to bytes loses a register [it does
            not].
        registers_limited: seven registers are all there are [there are plenty].
        versions_differ: a system lacks what its version of D does not have yet [all have all].
        program_limited: a program that is too large is refused [it is taken].

    Rules about buffers:
        room_first: a clause that prints reserves its room before its predicate, and does nothing
            without it [predicates and assignments need none].
        keys_need_room: keys are built in the principal buffer, so without room there nothing is
            aggregated [it is].
        buffers_limited: a principal buffer holds bufsize [it has no end].
        aggregations_limited: an aggregation buffer holds aggsize [it has no end].
        dynvars_limited: dynamic variables share dynvarsize [they have no end].
        freed_later: what was freed has room again after the cleaner came, a hundred times a second
            [at once].
        buffers_grow: a session with aggregations has room for its largest record at least [only
            bufsize].
        zero_frees: to assign 0 to a dynamic variable frees it [it stays].

    Rules of dtrace(1):
        snapshot_first: aggregations are taken from the kernel before the records [after them].
        trunc_on_copy: trunc() and clear() change dtrace(1)'s copy [the kernel's counts are lost
            with it].
        rows_by_cpu: records come CPU by CPU [in the order of events].
        rows_merged: keys of different sizes are the same if they lie in the same places and have
            the same bytes [only those of the same sizes are].
        sorted_by_value: printa() sorts by value [by key].
    """

    alignment_checked: bool = True
    fault_ends_clause_only: bool = True
    errors_fire: bool = True
    drop_ends_clause: bool = True
    faults_told_each_time: bool = True
    this_kept: bool = True
    lazy: bool = True
    shifts_narrow: bool = True
    shifts_folded_unsigned: bool = True
    small_types_stay: bool = True
    small_unsigned: bool = True
    records_truncated: bool = True
    constants_cut: bool = True
    constants_signed: bool = True
    old_casts: bool = True
    clause_per_probe: bool = True
    comment_refused: bool = True
    registers_leak: bool = True
    registers_limited: bool = True
    versions_differ: bool = True
    program_limited: bool = True
    room_first: bool = True
    keys_need_room: bool = True
    buffers_limited: bool = True
    aggregations_limited: bool = True
    dynvars_limited: bool = True
    freed_later: bool = True
    buffers_grow: bool = True
    zero_frees: bool = True
    snapshot_first: bool = True
    trunc_on_copy: bool = True
    rows_by_cpu: bool = True
    rows_merged: bool = True
    sorted_by_value: bool = True


@dataclass(frozen=True, slots=True)
class System:
    """What differs from one generation of Sun's DTrace to the other.

    Args:
        version: of D.
        old_compiler: the compiler of 2005, with its lexer, casts and registers.
        header: bytes that begin each record: its probe's id, and in illumos a time.
        dof_maxsize: the largest program that its kernel takes.
        addresses: types of the arguments of inet_ntoa() and inet_ntoa6().
    """

    version: tuple[int, int]
    old_compiler: bool
    header: int
    dof_maxsize: int
    addresses: tuple[str, str] = ("ipaddr_t *", "in6_addr_t *")


SYSTEMS = {
    "solaris10": System((1, 2), True, 4, 256 << 10),
    "illumos": System((1, 13), False, 12, 8 << 20),
    # What its kernel takes at most has not been read: the least of the others'.
    "freebsd": System((1, 13), False, 12, 256 << 10, ("in_addr_t *", "struct in6_addr *")),
}
