"""The command line: the service, and the commands check, top, trace, program and files.

The exit status tells a supervisor whether a restart can help. A descriptor that the supervisor
names in READY_FD tells it when the service is ready.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import platform
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dtrace_exporter import (
    __version__,
    check,
    extras,
    init,
    log,
    notify,
    privileges,
    senders,
    threads,
    top,
    trace,
)
from dtrace_exporter.config import Config, ConfigError, files, load
from dtrace_exporter.permissions import FLAG, Guard, faults, refused
from dtrace_exporter.regular import unseen
from dtrace_exporter.reloads import Reloads
from dtrace_exporter.scripts import configuration
from dtrace_exporter.scripts import session as scripts
from dtrace_exporter.scripts.configuration import ScriptConfig
from dtrace_exporter.service import Service
from dtrace_exporter.tracing import dtrace, plan, program
from dtrace_exporter.web import handlers, paths, server
from dtrace_exporter.web.configuration import WebConfigFile

READY_FD = "DTRACE_EXPORTER_READY_FD"
"""The environment variable with the number of an open file descriptor. When the service has
started, it writes a line there and closes it, unless it is a standard one."""

# As in sysexits.h; service managers are configured with these numbers.
FAILURE = 1
ADDRESS_IN_USE = os.EX_TEMPFAIL
NO_PERMISSION = os.EX_NOPERM
BAD_CONFIGURATION = os.EX_CONFIG

_MEANINGLESS = ("USR1", "USR2", "ALRM", "VTALRM", "PROF", "IO", "POLL", "PWR")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    It is 0, FAILURE, 2 for bad usage, ADDRESS_IN_USE, NO_PERMISSION or BAD_CONFIGURATION. The
    command check returns only 0, FAILURE or 2.

    Args:
        argv: the arguments, by default those of the process.
    """
    _open_standard_descriptors()
    parser = _parser()
    args = parser.parse_args(argv)
    if args.systemd_socket and args.listen:
        parser.error("--web.systemd-socket and --web.listen-address exclude each other")
    if args.run is _trace and args.networks and not args.top:
        parser.error("--networks needs --top")
    if args.run is _serve:
        # It would end the process until it has a handler. Blocked, it causes a reload later.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    log.setup(args.log_level or args.quiet_level, args.log_format)
    try:
        # The command check prints all faults of files instead.
        guard = Guard(refuse=refused(allowed=args.allow_insecure_files))
        args.look = unseen if args.run is _check else guard.look
        config = load(args.config_file, args.look, args.scripts)
        args.web = WebConfigFile(args.web_config_file, args.look)
        status = int(args.run(args, config))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of the output has closed it, as head(1) does. Python writes the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (
        *(ConfigError, dtrace.DTraceError, program.ProgramError, top.TopError),
        *(OSError, ValueError),
    ) as error:
        said = str(error)
        if isinstance(error, ConfigError) and args.run is _check and sys.stderr.isatty():
            # Only the user at this terminal sees it.
            said = error.in_full
        print(f"dtrace-exporter: {said}", file=sys.stderr)  # noqa: T201
        return FAILURE if args.run is _check else _status(error)
    except KeyboardInterrupt:
        return 0


def _open_standard_descriptors() -> None:
    """Open /dev/null for those that are closed, so that no other file gets their numbers."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            fcntl.fcntl(number, fcntl.F_GETFD)
        except OSError:
            # It gets the lowest free number, and children inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def _status(error: Exception) -> int:
    """Return the exit status for an error; its cause decides first."""
    for each in (error, error.__cause__ or error.__context__):
        if isinstance(each, PermissionError):
            return NO_PERMISSION
        if isinstance(each, OSError) and each.errno == errno.EADDRINUSE:
            return ADDRESS_IN_USE
    if isinstance(error, (ConfigError, program.ProgramError, ValueError)):
        return BAD_CONFIGURATION
    return FAILURE


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config.file", dest="config_file", type=Path, metavar="FILE", help="configuration (YAML)"
    )
    common.add_argument(
        "--script",
        dest="scripts",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="D script whose aggregations become metrics, can be given more than once",
    )
    common.add_argument(
        "--log.level", dest="log_level", choices=[*log.LEVELS], help="(info; warn for commands)"
    )
    common.add_argument(
        "--log.format", dest="log_format", choices=[*log.FORMATS], default="logfmt", help="(logfmt)"
    )
    parser = argparse.ArgumentParser(
        prog="dtrace-exporter",
        parents=[common],
        description="Export what the kernel's TCP listen queues do as Prometheus metrics.",
        allow_abbrev=False,
    )
    version = f"dtrace-exporter {__version__} (Python {platform.python_version()})"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument(
        "--web.listen-address",
        dest="listen",
        action="append",
        metavar="ADDRESS",
        help="address to serve on, can be given more than once (:9748)",
    )
    parser.add_argument(
        "--web.telemetry-path", dest="telemetry_path", default="/metrics", help="(/metrics)"
    )
    parser.add_argument(
        "--web.external-url",
        dest="external_url",
        default="",
        metavar="URL",
        help="URL at which clients reach the exporter, for example through a proxy",
    )
    parser.add_argument(
        "--web.route-prefix",
        dest="route_prefix",
        default="",
        metavar="PATH",
        help="path in front of all of the exporter's own paths (that of the external URL)",
    )
    parser.add_argument(
        "--web.config.file",
        dest="web_config_file",
        type=Path,
        metavar="FILE",
        help="TLS, users and headers, in the format of all Prometheus exporters (YAML)",
    )
    parser.add_argument(
        "--web.systemd-socket",
        dest="systemd_socket",
        action="store_true",
        help="serve on the sockets of a systemd socket unit instead",
    )
    parser.add_argument(
        "--web.enable-lifecycle",
        dest="lifecycle",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="reload on POST /-/reload (no)",
    )
    parser.add_argument(
        FLAG,
        dest="allow_insecure_files",
        action="store_true",
        help="let root use files that others can change",
    )
    parser.set_defaults(run=_serve, quiet_level="info")
    # A subcommand's defaults must not override options before it.
    again = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    again.add_argument("--config.file", dest="config_file", type=Path, metavar="FILE")
    again.add_argument("--script", dest="scripts", action="append", type=Path, metavar="FILE")
    again.add_argument(FLAG, dest="allow_insecure_files", action="store_true")
    commands = parser.add_subparsers(title="commands (without one, the service runs)")
    command = partial(commands.add_parser, parents=[again], allow_abbrev=False)
    checking = command("check", help="say what works here, what does not, and why")
    checking.add_argument("--format", choices=["text", "json"], default="text", help="(text)")
    checking.set_defaults(run=_check, quiet_level="warn")
    showing = command("top", help="show all listeners, updated every second")
    showing.add_argument(
        "--url", type=_url, metavar="URL", help=f"of a running service ({top.URL})"
    )
    showing.add_argument("--sort", choices=top.KEYS, default="full", help="what to sort by (full)")
    showing.set_defaults(run=_top, quiet_level="warn")
    tracing = command("trace", help="print each SYN of a port as CSV")
    tracing.add_argument("port", type=_port)
    tracing.add_argument(
        "--top", action="store_true", help="count who sends SYNs and whose SYNs are dropped"
    )
    tracing.add_argument(
        "--networks", action="store_true", help="with --top: count by /24 and /48, not by address"
    )
    tracing.set_defaults(run=_trace, quiet_level="warn")
    printing = command("program", help="print the D program")
    printing.add_argument(
        "name",
        nargs="?",
        help="linux, illumos, solaris10, freebsd, a path, or a script's name or path",
    )
    printing.set_defaults(run=_program, quiet_level="warn")
    copying = commands.add_parser(
        "files", help="list or copy units, rules, dashboards", allow_abbrev=False
    )
    copying.add_argument("directory", nargs="?", type=Path, help="where to copy them to")
    copying.set_defaults(run=_files, quiet_level="warn")
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535 (found {text!r})")
    return int(text)


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"expected a URL such as {top.URL} (found {text!r})")
    return text


def _serve(args: argparse.Namespace, config: Config) -> int:
    ready = _ready_descriptor()
    init.be_below()
    _survive_signals()
    # Nothing else runs during a garbage collection, so it should skip what has been loaded so far.
    gc.freeze()
    asyncio.run(_run_service(args, config, ready))
    return 0


async def _run_service(args: argparse.Namespace, config: Config, ready: int | None) -> None:
    keep = privileges.Kept().keep
    service = Service(args.config_file, config, args.look, keep, args.scripts)
    reloads = Reloads(service.reload)
    reload = reloads.ask if args.lifecycle else None
    mount = paths.mount(args.external_url, args.route_prefix)
    app = handlers.application(service.state, reload, args.telemetry_path, args.web, mount)
    serving = handlers.serve(
        app, server.from_systemd() if args.systemd_socket else server.bind(args.listen or [":9748"])
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(threads.executor())
    for number in threads.ENDING:
        loop.add_signal_handler(number, stop.set)

    def hangup() -> None:
        # Nobody waits for this reload. If it fails, this is logged, so its exception is dropped.
        reloads.ask().add_done_callback(lambda done: done.cancelled() or done.exception())

    following = args.web.follow(serving.end_connections)
    starting = loop.create_task(service.start())
    telling = loop.create_task(notify.keep_telling(service.summary))
    sampling = loop.create_task(handlers.keep_sampling(app))
    loop.add_signal_handler(signal.SIGHUP, hangup)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    stopping = loop.create_task(stop.wait())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            _say_ready(ready)
            notify.tell("READY=1")
        await stopping
    finally:
        notify.tell("STOPPING=1")
        telling.cancel()
        sampling.cancel()
        serving.stop()
        following.cancel()
        starting.cancel()
        await asyncio.wait([starting, following])
        await reloads.stop()
        await service.stop()
        # The loop removes its handlers. A signal after that would change the exit status.
        signal.pthread_sigmask(signal.SIG_BLOCK, threads.ENDING)


def _survive_signals() -> None:
    """Ignore signals that mean nothing here but would end the service."""
    for number in signal.valid_signals():
        name = getattr(number, "name", "").removeprefix("SIG")
        if name in _MEANINGLESS or number >= signal.SIGRTMIN:
            # Not by SIG_IGN, which children would inherit.
            signal.signal(number, lambda *_: None)


def _ready_descriptor() -> int | None:
    """Return the descriptor in READY_FD, None if there is none.

    Raises:
        ConfigError: it is not the number of a descriptor that is open for writing.
    """
    found = os.environ.pop(READY_FD, "")
    if not found:
        return None
    try:
        number = int(found)
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise ValueError
    except (OSError, ValueError, OverflowError):
        raise ConfigError(
            f"{READY_FD}: expected the number of a descriptor that is open for writing"
            f" (found {found[:40]!r})"
        ) from None
    return number


def _say_ready(descriptor: int | None) -> None:
    if descriptor is None:
        return
    # A standard one stays open: else a client's connection would get its number, and the log.
    closes = descriptor > sys.stderr.fileno()
    # It is no reason to end if the reader has gone.
    with contextlib.suppress(OSError), open(descriptor, "wb", closefd=closes) as file:
        file.write(b"ready\n")


def _check(args: argparse.Namespace, config: Config) -> int:
    used = [*files(args.config_file, config), *args.web.files]
    found = [f"{file}: {fault}" for file in used for fault in faults(file)]
    refuse = refused(allowed=args.allow_insecure_files)
    return asyncio.run(
        check.check(
            config,
            sys.stdout,
            found,
            args.web.config,
            refuse=refuse,
            quiet=not args.log_level,
            as_json=args.format == "json",
        )
    )


def _top(args: argparse.Namespace, config: Config) -> int:
    def service() -> Service:
        return Service(args.config_file, top.without_scripts(config), args.look)

    return asyncio.run(top.top(sys.stdout, args.url or "", service, args.sort))


def _trace(args: argparse.Namespace, config: Config) -> int:
    settings = config.local.dtrace
    if args.top:
        return asyncio.run(senders.senders(settings, args.port, sys.stdout, networks=args.networks))
    return asyncio.run(trace.trace(settings, args.port, sys.stdout))


def _program(args: argparse.Namespace, config: Config) -> int:
    settings = config.local.dtrace
    if script := _script(args.name or "", config):
        wanted_script = scripts.plan(config.local, script)
        sys.stdout.write(asyncio.run(scripts.text(wanted_script)))
        return 0
    chosen = program.load(args.name or asyncio.run(plan.needed(config.local)))
    wanted = plan.Plan(settings, chosen, counters=program.drop_counters(settings.command))
    sys.stdout.write(wanted.render(chosen, wanted.switched_off))
    return 0


def _files(args: argparse.Namespace, _config: Config) -> int:
    found = extras.copy(args.directory) if args.directory else extras.names()
    sys.stdout.writelines(f"{name}\n" for name in found)
    return 0


def _script(name: str, config: Config) -> ScriptConfig | None:
    """Return the script of a name or path: one of the configuration, or any file of this path."""
    for script in config.local.scripts:
        if name == script.name or (
            "/" in name and Path(name).absolute() == Path(script.script.path)
        ):
            return script
    if not name.endswith(".d") and "/" not in name:
        return None
    if program.load(str(Path(name).absolute())).tells_listeners:
        return None
    return configuration.load(Path(name))
