"""The check command: says what works here, what does not, why, and what to do about it."""

from __future__ import annotations

import json
import logging
import re
import shlex
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from types import ModuleType
from typing import Literal, TextIO

from dtrace_exporter import (
    capabilities,
    families,
    inet_diag,
    kernel,
    namespaces,
    owners,
    permissions,
    reasons,
    terminal,
    unix_diag,
    untraced,
)
from dtrace_exporter.config import Config
from dtrace_exporter.kernel import Host
from dtrace_exporter.listeners import Identity, Owner, SessionId
from dtrace_exporter.namespaces import Namespaces
from dtrace_exporter.scripts import session as scripts
from dtrace_exporter.scripts.session import ScriptPlan
from dtrace_exporter.service import Service
from dtrace_exporter.tracing import dtrace, plan, program, session, supervision
from dtrace_exporter.tracing.session import Session
from dtrace_exporter.untraced import Untraced
from dtrace_exporter.watched import matches
from dtrace_exporter.web.certificates import Validity
from dtrace_exporter.web.configuration import WebConfig

_EXACT = families.Part(
    what="no event is missed, whatever interrupts the program",
    without="under load the counters may miss events",
)

_ELSEWHERE = "listeners of containers are missing: see docs/operations.md, Other network namespaces"
_UNSEEN = "run it as root or with CAP_SYS_PTRACE to get the label program of dtrace_tcp_listen_info"
_UNSAFE = (
    "whoever can change it decides what the exporter runs: chown root and chmod go-w the file and"
    f" its directories; with {permissions.FLAG} root uses them as they are"
)
_NOT_VALID = "clients that verify it refuse it: renew it, or check this host's clock"
_NOBODY_VALID = "no client's certificate is accepted: renew it, or check this host's clock"
_NO_BURST = "set burst to the number of requests that may come at once"
_REMEDIES = {
    reasons.FAR: "try the command by hand, as the exporter's user: {command}",
    r"Argument list too long": "Linux has room for 19 sessions that count SYNs, fewer where others"
    " trace the same functions: set dtrace.session: shared to have one for all ports",
    r"DIF program exceeds maximum program size": "the kernel refuses a program of this size: put"
    " set dtrace:dtrace_dof_maxsize=0x80000 into /etc/system, and reboot",
    r"DIF program content is invalid|[Ii]nsufficient (tuple )?registers": "this DTrace has too few"
    " registers for the program: report it, with the output of uname -a and dtrace -V",
    r"Destructive actions not allowed": "the program may change nothing: remove system(),"
    " copyout() and the like from it",
}
"""What to do about a reason that contains a pattern; the first match counts."""
_BY_HAND = (
    "run it by hand to see what dtrace(1) says: dtrace-exporter program >listen.d;"
    " {command} -s /dev/stdin <listen.d"
)

_NO_UNIX_DIAG = (
    "it needs Linux with its module unix_diag, and netlink sockets that no filter forbids"
)

Result = Literal["ok", "hint", "no", "FAIL"]
Say = Callable[[Result, str, str, str], None]
_STYLES = {"ok": "green", "hint": "cyan", "no": "yellow", "FAIL": "red"}
_INDENT = 30
_MOST_SHOWN = 20


async def check(
    config: Config,
    out: TextIO,
    faults: Sequence[str] = (),
    web: WebConfig | None = None,
    *,
    refuse: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> int:
    """Try out a configuration that has no errors, and print the findings.

    The sessions are started as the service starts them. They are ended when each is up, or down
    with a reason. Each line has a result, a topic and what was found. The result is ``ok``,
    ``hint``, ``no`` for what is left out or not used, or ``FAIL``. Lines that begin with an arrow
    say what to do, or what the line above means for the metrics. On a terminal, lines are wrapped
    and coloured. As JSON it is one object, which docs/commands.md describes.

    Args:
        config: the configuration to try out.
        out: where the findings go.
        faults: who else can change its files, one text for each fault.
        web: the web configuration, if there is one.
        refuse: whether the service would not start because of ``faults``; then nothing is tried.
        quiet: log nothing about the sessions, because the findings say the same.
        as_json: print JSON.

    Returns:
        The exit status: 0 if the service would export all that the configuration asks for, so if
        no result is ``FAIL``; else 1.
    """
    findings: list[dict[str, str]] = []
    speak = None if as_json else _speaker(out)

    def say(result: Result, what: str, found: str, advice: str) -> None:
        finding = {"result": result, "what": what.strip(), "found": found, "advice": advice}
        findings.append(finding)
        if speak is not None:
            speak(result, what, found, advice)

    here = sys.platform == "linux" and program.runs_here(config.local.dtrace.command)
    host = kernel.look() if here else None
    say("ok", "configuration", "no mistakes", "")
    if any(each.listeners and each.exclude_ports for each in (config.local, *config.hosts)):
        found = "not used: the configuration names listeners, so no others are watched"
        say("hint", "exclude_ports", found, "")
    for fault in faults:
        say("FAIL" if refuse else "no", "files", fault, _UNSAFE)
    reason = ""
    if not (faults and refuse):
        if web is not None:
            _look_at_web(say, web)
        reason = await _try(say, config, host, quiet=quiet)
    works = not any(finding["result"] == "FAIL" for finding in findings)
    if as_json:
        whole = {
            "works": works,
            "reason": reason,
            "findings": findings,
            "host": {**asdict(host), "obstacles": host.obstacles} if host else None,
        }
        out.write(json.dumps(whole, indent=2) + "\n")
    return 0 if works else 1


def _look_at_web(say: Say, web: WebConfig) -> None:
    """Say whether certificates are valid and requests would be answered."""
    limit = web.rate_limit
    if limit.interval and not limit.burst:
        say("FAIL", "rate_limit", "a burst of 0: every request is answered with 429", _NO_BURST)
    if web.served is not None:
        _look_at(say, "certificate", web.served, _NOT_VALID)
    if web.authorities is not None:
        _look_at(say, "client_ca", web.authorities, _NOBODY_VALID)


def _look_at(say: Say, what: str, validity: Validity, advice: str) -> None:
    begin, end = (datetime.fromtimestamp(at, UTC).isoformat(" ", "minutes") for at in validity)
    if validity.end <= time.time():
        say("FAIL", what, f"expired at {end}", advice)
    elif validity.begin > time.time():
        say("FAIL", what, f"not valid before {begin}", advice)
    else:
        say("ok", what, f"valid until {end}", "")


async def _try(say: Say, config: Config, host: Host | None, *, quiet: bool) -> str:
    """Try everything; return the key of reasons.REASONS for why this host has no DTrace."""
    reason = "configured"
    configured = untraced.SOURCES.get(config.source)
    if configured is None:
        reason = await _try_dtrace(say, config, host)
    other = configured or (_instead(config) if reason else None)
    if other is not None:
        _try_without(say, other, config.local.dtrace.limits.places)
    if config.hosts or not reason:
        with _quiet(session, supervision) if quiet else nullcontext():
            await _try_sessions(say, _without_scripts(config))
    for planned in scripts.plans(config).items():
        await _try_script(say, *planned)
    if config.unix.paths:
        _tell_unix(say, config)
    if host is not None:
        with _other_namespaces(config) as others:
            _tell_silent(say, config, others)
            _tell_owners(say, config, others)
        if reason:
            _tell_host(say, host, reason)
    return reason


def _instead(config: Config) -> Untraced | None:
    """Return the source that would be used instead of DTrace, None if there is none."""
    return untraced.here() if config.source == "auto" else None


async def _try_dtrace(say: Say, config: Config, host: Host | None) -> str:
    """Say whether this host's dtrace(1) may be used; return the key of REASONS for why not."""
    command = config.local.dtrace.command
    version = await dtrace.version(command)
    refusal = await dtrace.attempt(command)
    if not refusal:
        say("ok", "dtrace(1)", f"version {version or 'unknown'}, may be used", "")
        return ""
    result: Result = "no" if _instead(config) else "FAIL"
    say(result, "dtrace(1)", refusal, _remedy(refusal, command, host))
    return reasons.classify(refusal, host)


def _try_without(say: Say, source: Untraced, places: int) -> None:
    """Say what the source without DTrace has, or why it cannot be read."""
    others = Namespaces()
    try:
        with _quiet(namespaces):
            if source.namespaces:
                others.begin(places)
            others.look()
        sockets = sum(len(reading.samples) for reading in source.read(others, {}))
        text = f"used: {source.gives} of {sockets} sockets"
        where = f" in {len(others) + 1} network namespaces" if len(others) else ""
        say("ok", source.name, text + where, "")
        if others.why_not:
            say("no", "  other namespaces", others.why_not, _ELSEWHERE)
    except OSError as error:
        say("FAIL", source.name, str(error), source.wants)
    finally:
        others.close()


@contextmanager
def _other_namespaces(config: Config) -> Iterator[Namespaces]:
    """Look for other network namespaces of this host, without a message in the log."""
    others = Namespaces()
    try:
        with _quiet(namespaces, owners):
            others.begin(config.local.dtrace.limits.places)
            others.look()
            yield others
    finally:
        others.close()


def _tell_silent(say: Say, config: Config, others: Namespaces) -> None:
    """Say at which configured ports nobody listens, and which namespaces are not there."""
    wanted = sorted({one.netns for one in config.local.listeners if one.netns})[:_MOST_SHOWN]
    places = namespaces.named(name for name in wanted if not name.isdecimal())
    netlinks = {"": None, namespaces.own(): None} | {one.place: one.netlink for one in others}
    for netns in ("", *wanted):
        place = places.get(netns, netns)
        if place in netlinks:
            where = f"the network namespace {netns}" if netns else "this network namespace"
            _tell_nobody(say, config.local.expected(netns), netlinks[place], where)
        elif netns not in places and not (netns.isdecimal() and others.why_not):
            kind = "inode" if netns.isdecimal() else "name"
            say("hint", "netns", f"no network namespace has the {kind} {netns} now", "")


def _tell_nobody(
    say: Say, expected: list[set[tuple[str, int]]], netlink: socket.socket | None, where: str
) -> None:
    """Say it once for each entry of the configuration."""
    with suppress(OSError):
        silent = inet_diag.silent(set().union(*expected), netlink)
        found = [[one for one in silent if one in entry] for entry in expected]
        for (address, port), *others in [*filter(None, found)][:_MOST_SHOWN]:
            at = f"port {port}"
            if others:
                at = f"{len(others) + 1} ports from {port} to {others[-1][1]}"
            of = f" of {address}" if address else ""
            say("hint", f"listener {port}", f"nobody listens at {at}{of} in {where}", "")


def _tell_owners(say: Say, config: Config, others: Namespaces) -> None:
    """Say whose the listeners are, as far as it can be seen."""
    try:
        found = _owners(others)
    except OSError:
        return
    names = {each.netns for each in config.local.listeners if each.netns}
    watched = plan.watched(config.local, namespaces.named(names))
    shown = {who: owner for who, owner in found.items() if watched.find(*who[1:])}
    for who in sorted(shown, key=lambda who: (who.port, who.place, who.address))[:_MOST_SHOWN]:
        place = shown[who].place_name or who.place
        where = "" if who.address == "*" else f" at {who.address}"
        where += f" in netns {place}" if place else ""
        text = str(shown[who]) or "unknown owner"
        say("ok", f"listener {who.port}", text + where, "")
    if len(shown) > _MOST_SHOWN:
        say("ok", "listeners", f"and {len(shown) - _MOST_SHOWN} more", "")
    if shown and capabilities.SYS_PTRACE not in capabilities.effective():
        say("no", "programs", "what other users' processes have open cannot be seen", _UNSEEN)


def _owners(others: Namespaces) -> dict[Identity, Owner]:
    """Return the owners of all listeners that can be seen; this namespace's place is empty."""
    known = owners.Owners(others.holders)
    places = owners.read(namespaces.own(), others)
    known.find(places)
    known.walk()
    return known.find(places)


def _tell_unix(say: Say, config: Config) -> None:
    """Say how many UNIX sockets are exported, and which patterns match none in this namespace."""
    try:
        paths = {one.path for one in unix_diag.listeners()}
    except OSError as error:
        say("no", "unix", str(error), _NO_UNIX_DIAG)
        return
    wanted = config.unix.paths
    matching = sum(matches(path, wanted) for path in paths)
    say("ok", "unix", f"Q and Qmax of UNIX sockets with {matching} paths", "")
    for pattern in wanted[:_MOST_SHOWN]:
        if not any(matches(path, [pattern]) for path in paths):
            found = f"no UNIX socket listens at {pattern} in this network namespace"
            say("hint", "unix", found, "")


def _tell_host(say: Say, host: Host, reason: str) -> None:
    """Say what is known about a host without DTrace, and what it would have with it."""

    def tell(what: str, found: str, *, good: bool, advice: str = "") -> None:
        say("ok" if good else "no", what, found, "" if good else advice)

    say("ok", "kernel", f"Linux {host.kernel}; 6.1 and 6.12 are tested", "")
    found = "/sys/kernel/btf/vmlinux" if host.btf else "no /sys/kernel/btf/vmlinux"
    tell("BTF", found, good=host.btf, advice=reasons.REASONS["no_btf"].advice)
    tell(
        "lockdown",
        host.lockdown or "no /sys/kernel/security/lockdown",
        good=host.lockdown != "confidentiality",
        advice=reasons.REASONS["lockdown"].advice,
    )
    if host.tracefs is None:
        tell(
            "tracefs", "not in this kernel", good=False, advice=reasons.REASONS["no_tracefs"].advice
        )
    else:
        mount = "mount -t tracefs tracefs /sys/kernel/tracing"
        found = host.tracefs or "not mounted"
        tell("tracefs", found, good=bool(host.tracefs), advice=mount)
    who = "root" if host.uid == 0 else f"user {host.uid}"
    lacks = f"without {' and '.join(host.missing)}" if host.missing else ""
    only = "in a user namespace that is not the host's" if host.user_namespace else ""
    may = host.uid == 0 and not lacks and not only
    found = ", ".join(filter(None, (who, lacks or "with CAP_SYS_ADMIN and CAP_SYSLOG", only)))
    tell("privileges", found, good=may, advice=reasons.REASONS["not_permitted"].advice)
    if host.container:
        say(
            "hint",
            "container",
            host.container,
            "the kernel is the host's: run the exporter on the host, or the container with"
            " --privileged and the host's /sys/kernel/tracing",
        )
    if host.obstacles:
        because = " and ".join(reasons.REASONS[word].because for word in host.obstacles)
        say("no", "this host", f"cannot have DTrace, because {because}", "")
    else:
        advice = reasons.REASONS[reason].advice if reason == "configured" else ""
        found = f"with dtrace(1) it would also have: {reasons.MISSING}"
        say("hint", "this host", found, advice)


def _without_scripts(config: Config) -> Config:
    """Return a configuration without its scripts, which are only compiled."""
    local, *hosts = (replace(host, scripts=()) for host in (config.local, *config.hosts))
    return replace(config, local=local, hosts=tuple(hosts))


async def _try_script(say: Say, session: SessionId, plan: ScriptPlan) -> None:
    """Compile a script, and say which metrics it has."""
    where = f"script {session.host}/{plan.script.name}".replace(" /", " ")
    try:
        await scripts.compiled(plan)
    except dtrace.DTraceError as error:
        advice = f"compile the output of dtrace-exporter program {plan.script.name} by hand"
        say("FAIL", where, str(error), advice)
        return
    say("ok", where, f"compiles; at most {plan.script.limit} series of these metrics", "")
    families = plan.script.families
    width = max(len(family.samples[0]) for family in families)
    for family in families:
        labels = ", ".join(filter(None, family.labels)) or "no labels"
        say("ok", f"  {family.samples[0]:<{width}}", f"{family.kind:<9} {labels}", "")


async def _try_sessions(say: Say, config: Config) -> None:
    """Start the sessions as the service does, and say how each one is."""
    running = Service(None, config)
    try:
        await running.start()
        told: set[SessionId] = set()
        # A host that has to be asked which program it needs may get one more session.
        while left := [one for one in running.of_listeners() if one.id not in told]:
            for each in left:
                await each.settled.wait()
                _tell(say, each)
                told.add(each.id)
    finally:
        await running.stop()


@contextmanager
def _quiet(*modules: ModuleType) -> Iterator[None]:
    """Keep some modules from logging."""
    logs = [logging.getLogger(module.__name__) for module in modules]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _tell(say: Say, tried: Session) -> None:
    """Say whether a session is up, and which of its optional parts are enabled."""
    host, name = tried.id
    where = f"session {host}/{name}" if host else f"session {name}"
    status = tried.status
    if status.up:
        say("ok", where, "up", "")
    else:
        say("FAIL", where, status.reason, _remedy(status.reason, tried.plan.dtrace.command, None))
    parts = {**tried.parts, session.EXACT: _EXACT}
    for feature, enabled in status.features.items():
        if enabled:
            say("ok", f"  {feature}", parts[feature].what if feature in parts else "", "")
        else:
            say(
                "no",
                f"  {feature}",
                tried.left_out[feature],
                parts[feature].without if feature in parts else "",
            )


def _speaker(out: TextIO) -> Say:
    paint, columns = terminal.painter(out), terminal.width(out)
    if columns:
        out.write(paint(f"{'':<6}{'What':<24}Found", "bold") + "\n")

    def say(result: Result, what: str, found: str, advice: str) -> None:
        lines = _wrapped(terminal.printable(found), columns)
        out.write(f"{paint(f'{result:<6}', _STYLES[result])}{what:<23} {lines[0]}\n")
        if advice:
            first, *rest = _wrapped(terminal.printable(advice), columns - 3)
            lines += [paint(f"-> {first}", "bold"), *(paint(f"   {each}", "bold") for each in rest)]
        out.writelines(f"{'':<{_INDENT}}{line}\n" for line in lines[1:])
        out.flush()

    return say


def _wrapped(text: str, columns: int) -> list[str]:
    """Wrap a text to the width of a terminal, only between words."""
    room = columns - _INDENT
    if room < 20:
        return [text]
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [text]


def _remedy(refusal: str, command: Sequence[str], host: Host | None) -> str:
    """Return what to do about an error of dtrace(1) or of its session.

    Args:
        refusal: the error.
        command: the command of dtrace(1).
        host: the facts about the host, None if they are not known.
    """
    advice = next((one for pattern, one in _REMEDIES.items() if re.search(pattern, refusal)), "")
    word = reasons.classify(refusal, host)
    if not advice and word != "refused":
        return reasons.REASONS[word].advice
    return (advice or _BY_HAND).format(command=shlex.join(command))
