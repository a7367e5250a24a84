"""The rules of Sun's engine that this simulator follows; each can be switched off.

A test that passes with a rule switched off does not depend on it. So a simulator without one of
the rules is a mutant, which some test should notice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules in force; what happens without a rule is in brackets.

    Rules about memory and faults:
        alignment_checked: a load of n bytes from an address that n does not divide faults [it
            works].
        fault_ends_clause_only: later clauses of an event run after a fault [they do not run].
        errors_fire: a fault fires dtrace:::ERROR at once, before the event's later clauses [it does
            not fire].
        faults_told_each_time: each fault is a line on stderr [only a clause's first fault is].
        drop_ends_clause: a clause ends if its dynamic variable finds no room, and only the drop is
            reported [the clause continues].
        this_kept: ``this->`` keeps what an earlier event left on the CPU [each event starts with
            zeros].
        lazy: operands that ``?:``, ``&&`` and ``||`` do not need are not evaluated [they are].

    Rules about types:
        shifts_narrow: a shift has the type of its left side, so ``uint8_t << n`` is recorded in
            8 bits [at least an int].
        shifts_folded_unsigned: a constant is shifted right without its sign [with it].
        small_types_stay: no operation widens char or short to int [they are widened].
        small_unsigned: on Solaris 10 ``%d`` prints a char or a short without its sign [with it].
        records_truncated: a printed value or a key has the size of its type, whatever its register
            holds [it has the whole register].
        constants_cut: on illumos a constant is cut to the type that it is assigned to, without a
            sign [it is not cut].
        constants_signed: a constant with a minus is negative in every comparison [it has only the
            bits of its type].
        old_casts: on Solaris 10 a cast of another sign keeps the smaller type's bits, so a negative
            int becomes a positive uint64_t [the sign is extended, as on illumos].

    Rules of the compiler:
        clause_per_probe: a clause is compiled for each of its probes [once].
        comment_refused: on Solaris 10 a comment between a predicate and its brace is an error [it
            is allowed].
        registers_leak: on Solaris 10 an addition to a pointer to bytes loses a register [it does
            not].
        registers_limited: there are only seven registers [there are enough].
        versions_differ: a system lacks what its version of D does not have yet [it has everything].
        program_limited: a program that is too large is refused [it is accepted].

    Rules about buffers:
        room_first: a clause that prints reserves its room before its predicate, and does nothing
            without it [predicates and assignments need no room].
        keys_need_room: keys are built in the principal buffer, so nothing is aggregated without
            room there [it is aggregated].
        buffers_limited: a principal buffer holds bufsize [it is unlimited].
        aggregations_limited: an aggregation buffer holds aggsize [it is unlimited].
        dynvars_limited: dynamic variables share dynvarsize [they are unlimited].
        freed_later: a freed place can be used again after the cleaner has run, a hundred times a
            second [at once].
        buffers_grow: a session with aggregations has at least room for its largest record [only
            bufsize].
        zero_frees: assigning 0 to a dynamic variable frees it [it stays].

    Rules of dtrace(1):
        snapshot_first: aggregations are taken from the kernel before the records [after them].
        trunc_on_copy: trunc() and clear() change dtrace(1)'s copy [the kernel's counts are lost
            too].
        rows_by_cpu: records are printed CPU by CPU [in the order of events].
        rows_merged: keys of different sizes are equal if they have the same places and bytes [only
            if they have the same sizes].
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
    """The differences between the generations of Sun's DTrace.

    Args:
        version: the version of D.
        old_compiler: the compiler of 2005, with its lexer, casts and registers.
        header: the bytes before each record: its probe's id, and in illumos a time.
        dof_maxsize: the largest program that its kernel accepts.
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
    # The limit of its kernel is not known, so this is the smaller of the others'.
    "freebsd": System((1, 13), False, 12, 256 << 10, ("in_addr_t *", "struct in6_addr *")),
}
