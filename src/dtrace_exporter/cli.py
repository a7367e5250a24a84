"""The command line: the service, and the commands check, trace and program.

A supervisor learns from the exit status whether another try can help, and from a descriptor that it
names in READY_FD when there is something to scrape.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import os
import platform
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dtrace_exporter import __version__, check, log, notify, privileges, trace
from dtrace_exporter.config import Config, ConfigError, files, load
from dtrace_exporter.permissions import FLAG, Guard, faults, refused
from dtrace_exporter.reloads import Reloads
from dtrace_exporter.service import Service
from dtrace_exporter.tracing import dtrace, plan, program
from dtrace_exporter.web import handlers, server
from dtrace_exporter.web.configuration import WebConfigFile

READY_FD = "DTRACE_EXPORTER_READY_FD"
"""Environment variable with the number of an open file descriptor: once the service has started, it
writes a line there and closes it."""

# As in sysexits.h; service managers know them by these numbers.
FAILURE = 1
ADDRESS_IN_USE = os.EX_TEMPFAIL
NO_PERMISSION = os.EX_NOPERM
BAD_CONFIGURATION = os.EX_CONFIG


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    It is 0, FAILURE, 2 for bad usage, and but for the check command, which knows only good and bad,
    ADDRESS_IN_USE, NO_PERMISSION or BAD_CONFIGURATION.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.systemd_socket and args.listen:
        parser.error("--web.systemd-socket and --web.listen-address exclude each other")
    if args.run is _serve:
        # It would end us until somebody handles it; held back it is a reload when we have started.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    log.setup(args.log_level or args.quiet_level, args.log_format)
    try:
        config = load(args.config_file)
        guard = Guard(refuse=refused(allowed=args.allow_insecure_files))
        if args.run is _check:
            # It tells them all instead.
            args.web = WebConfigFile(args.web_config_file)
        else:
            guard.admit(files(args.config_file, config))
            args.admit, args.web = guard.admit, WebConfigFile(args.web_config_file, guard.admit)
        status = int(args.run(args, config))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has had enough, as head(1) does. Python writes the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ConfigError, dtrace.DTraceError, program.ProgramError, OSError, ValueError) as error:
        said = str(error)
        if isinstance(error, ConfigError) and args.run is _check and sys.stderr.isatty():
            # Nobody but who asked sees it.
            said = error.in_full
        print(f"dtrace-exporter: {said}", file=sys.stderr)  # noqa: T201
        return FAILURE if args.run is _check else _status(error)
    except KeyboardInterrupt:
        return 0


def _status(error: Exception) -> int:
    """Tell what kind of failure an error is; what it was raised for tells more than itself."""
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
        "--web.config.file",
        dest="web_config_file",
        type=Path,
        metavar="FILE",
        help="TLS, users and headers, as for every Prometheus exporter (YAML)",
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
        help="have root use files that others can change",
    )
    parser.set_defaults(run=_serve, quiet_level="info")
    # A subcommand's defaults must not undo what was said before it.
    again = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    again.add_argument("--config.file", dest="config_file", type=Path, metavar="FILE")
    commands = parser.add_subparsers(title="commands (without one, the service runs)")
    command = partial(commands.add_parser, parents=[again], allow_abbrev=False)
    checking = command("check", help="say what works here and why not")
    checking.set_defaults(run=_check, quiet_level="warn")
    tracing = command("trace", help="print each SYN of a port as CSV")
    tracing.add_argument("port", type=_port)
    tracing.set_defaults(run=_trace, quiet_level="warn")
    printing = command("program", help="print the D program")
    printing.add_argument("name", nargs="?", help="linux, illumos, solaris10 or a path")
    printing.set_defaults(run=_program, quiet_level="warn")
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535 (found {text!r})")
    return int(text)


def _serve(args: argparse.Namespace, config: Config) -> int:
    # Python need not look for garbage in what has been loaded: nothing else runs meanwhile.
    gc.freeze()
    asyncio.run(_run_service(args, config))
    return 0


async def _run_service(args: argparse.Namespace, config: Config) -> None:
    service = Service(args.config_file, config, args.admit, privileges.Kept().keep)
    reloads = Reloads(service.reload)
    reload = reloads.ask if args.lifecycle else None
    app = handlers.application(service.state, reload, args.telemetry_path, args.web)
    serving = handlers.serve(
        app, server.from_systemd() if args.systemd_socket else server.bind(args.listen or [":9748"])
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # No thread needs a privilege.
    loop.set_default_executor(ThreadPoolExecutor(initializer=privileges.give_up))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def hangup() -> None:
        # Why a reload failed has been logged, and nobody waits for this one.
        reloads.ask().add_done_callback(lambda done: done.cancelled() or done.exception())

    following = loop.create_task(args.web.follow(serving.end_connections))
    starting = loop.create_task(service.start())
    telling = loop.create_task(notify.keep_telling(service.summary))
    loop.add_signal_handler(signal.SIGHUP, hangup)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    stopping = loop.create_task(stop.wait())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            _say_ready()
            notify.tell("READY=1")
        await stopping
    finally:
        notify.tell("STOPPING=1")
        telling.cancel()
        serving.stop()
        following.cancel()
        starting.cancel()
        await asyncio.wait([starting, following])
        await reloads.stop()
        await service.stop()


def _say_ready() -> None:
    number = os.environ.pop(READY_FD, "")
    if not number:
        return
    # Who has stopped waiting for it is no reason to end.
    with contextlib.suppress(BrokenPipeError), open(int(number), "wb") as file:  # noqa: PTH123
        file.write(b"ready\n")


def _check(args: argparse.Namespace, config: Config) -> int:
    used = [*files(args.config_file, config), *args.web.files]
    found = [f"{file}: {fault}" for file in used for fault in faults(file)]
    refuse = refused(allowed=args.allow_insecure_files)
    return asyncio.run(
        check.check(config, sys.stdout, found, refuse=refuse, quiet=not args.log_level)
    )


def _trace(args: argparse.Namespace, config: Config) -> int:
    return asyncio.run(trace.trace(config.local.dtrace, args.port, sys.stdout))


def _program(args: argparse.Namespace, config: Config) -> int:
    settings = config.local.dtrace
    chosen = program.load(args.name or asyncio.run(plan.needed(config.local)))
    wanted = plan.Plan(settings, chosen, counters=program.drop_counters(settings.command))
    sys.stdout.write(wanted.render(chosen, wanted.switched_off))
    return 0
