"""powerctl: its arguments, its commands and its exit status."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from shared import __version__, messages
from shared.powerctl import doctor, layout, live, missing, overview, tables, verdict
from shared.powerctl.ask import Patience, UnreachableError, ask
from shared.powerctl.explain import explain
from shared.settings import DEFAULT_RUN_DIR, colour_from_environment, run_dir_from_environment

# 2 is argparse's own
GOOD = 0
NOT_WELL = 1
WRONG_USE = 2
UNREACHABLE = 3
_INTERRUPTED = 130  # as shells report it
_SOCKET_PATH_BYTES = 107  # sun_path of sockaddr_un without its final zero (unix(7))
_LONGEST_S = 3600.0
# Where --timeout is not given. A question about GPUs has the enforcer open NVML, and it answers
# nobody meanwhile: up to half a minute where persistence mode is off.
_TIMEOUT_S = 2.0
_BUSY_S = 58.0
_EPILOG = f"""\
exit status:
  0 good, 1 not as it should be, 2 wrong use, 3 enforcer not reachable,
  130 interrupted before there was an answer

environment:
  POWER_AGENT_RUN_DIR
      directory of the enforcer's sockets (default: {DEFAULT_RUN_DIR})
"""


def main() -> None:
    """Run one command and exit with its status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: only the exit status is wanted
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - until the end
    arguments = _arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except UnreachableError as error:
        live.note(str(error))
        status = UNREACHABLE
    except KeyboardInterrupt:
        # So top and events end. Any other command has no answer, and must not look successful.
        status = GOOD if arguments.command in ("top", "events") else _INTERRUPTED
    except OSError as error:
        # Nobody reads any more. Without this the interpreter's own last flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = GOOD
        if not isinstance(error, BrokenPipeError):
            live.note(f"cannot write: {error.strerror}")
            status = WRONG_USE
    raise SystemExit(status)


def _arguments() -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.socket is None:
        try:
            arguments.socket = _directory(str(run_dir_from_environment()))
        except argparse.ArgumentTypeError as error:
            parser.error(f"POWER_AGENT_RUN_DIR: {error}")
    arguments.busy_s = 0.0
    if arguments.timeout is None:
        arguments.timeout = _TIMEOUT_S
        arguments.busy_s = 0.0 if arguments.command in ("ping", "events") else _BUSY_S
    return arguments


def _patience(arguments: argparse.Namespace) -> Patience | None:
    return Patience(arguments.busy_s, live.note) if arguments.busy_s else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="powerctl",
        description="Shows what the Power Agent of this node does, and why. Changes nothing.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"powerctl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    common = _options_of_all()
    for name, run, purpose in _COMMANDS:
        command = commands.add_parser(name, parents=[common], help=purpose, description=purpose)
        command.set_defaults(run=run)
        if name == "explain":
            command.add_argument(
                "subject",
                metavar="SUBJECT",
                help="NAMESPACE/NAME or uid of a pod; index, uuid or PCI address of a GPU",
            )
            command.add_argument(
                "-v",
                "--verbose",
                action="store_true",
                help="with the cgroup lines by which each process is known",
            )
        if name != "top":
            command.add_argument("--json", action="store_true", help="machine-readable output")
    return parser


def _options_of_all() -> argparse.ArgumentParser:
    """Return the options that every command has."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--socket",
        metavar="DIR",
        type=_directory,
        help="directory of the enforcer's sockets (default: POWER_AGENT_RUN_DIR, that is "
        f"{DEFAULT_RUN_DIR} where it is not set)",
    )
    common.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        help="how long to wait for an answer (default: 2; status, explain, top and doctor wait a "
        "minute for an enforcer that is there but busy, as while it opens NVML)",
    )
    return common


def _directory(text: str) -> Path:
    try:
        path = Path(text).absolute()
        str(path).encode()  # as libzmq's binding does
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: {why}") from error
    if len(os.fsencode(path / "control.sock")) > _SOCKET_PATH_BYTES or "\0" in text:
        raise argparse.ArgumentTypeError(
            f"{text[:60]!r}...: too long, a socket path has at most {_SOCKET_PATH_BYTES} bytes"
        )
    return path


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.001 <= seconds <= _LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not between 0.001 and {_LONGEST_S:g} seconds"
        )
    return seconds


def _paint() -> layout.Paint:
    wanted = sys.stdout.isatty() and colour_from_environment()
    return layout.coloured if wanted else layout.plain


def _print(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def _print_json(value: object) -> None:
    # ASCII only: a terminal takes no control character from a name, in no encoding.
    sys.stdout.write(json.dumps(msgspec.to_builtins(value), indent=2) + "\n")


def _ask_status(arguments: argparse.Namespace) -> messages.StatusReply:
    return ask(
        arguments.socket,
        messages.Status(),
        messages.StatusReply,
        arguments.timeout,
        _patience(arguments),
    )


def _status(arguments: argparse.Namespace) -> int:
    reply = _ask_status(arguments)
    if arguments.json:
        value = msgspec.to_builtins(reply)
        _print_json({key: value[key] for key in value if key not in ("type", "v")})
    else:
        _print(overview.status(reply, _paint(), layout.terminal_width()))
    return NOT_WELL if verdict.problems(reply) else GOOD


def _explain(arguments: argparse.Namespace) -> int:
    reply = _ask_status(arguments)
    explanation = explain(
        reply, arguments.subject, layout.terminal_width(), verbose=arguments.verbose
    )
    if explanation is None:
        live.note(missing.why(reply, arguments.subject))
        return NOT_WELL
    if arguments.json:
        _print_json(explanation)
    else:
        _print(explanation.text)
    return NOT_WELL if verdict.faults(explanation.gpus, explanation.pods) else GOOD


def _top(arguments: argparse.Namespace) -> int:
    if not sys.stdout.isatty():
        live.note("top needs a terminal; powerctl status prints once")
        return WRONG_USE
    live.top(arguments.socket, arguments.timeout, arguments.busy_s, _paint())
    return GOOD


def _events(arguments: argparse.Namespace) -> int:
    live.events(arguments.socket, arguments.timeout, as_json=arguments.json)
    return GOOD


def _ping(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    pong = ask(arguments.socket, messages.Ping(), messages.Pong, arguments.timeout)
    took_ms = (time.monotonic() - began) * 1000
    if arguments.json:
        _print_json(
            {
                "version": pong.version,
                "uptime_s": pong.uptime_s,
                "round_trip_ms": round(took_ms, 3),
            }
        )
    else:
        up = tables.duration(pong.uptime_s)
        _print([tables.escape(f"power-agent {pong.version} answers in {took_ms:.1f} ms, up {up}")])
    return GOOD


def _doctor(arguments: argparse.Namespace) -> int:
    checks, answered = doctor.examine(
        arguments.socket, arguments.timeout, Path("/proc"), _patience(arguments)
    )
    if arguments.json:
        _print_json({"checks": checks})
    else:
        _print(doctor.lines(checks, _paint(), layout.terminal_width()))
    if not answered:
        return UNREACHABLE
    return NOT_WELL if any(check.result == "fail" for check in checks) else GOOD


def _schema(_arguments: argparse.Namespace) -> int:
    _print_json(messages.schema())
    return GOOD


_COMMANDS: tuple[tuple[str, Callable[[argparse.Namespace], int], str], ...] = (
    ("status", _status, "show GPUs and pods; 1 if something is not as it should be"),
    ("top", _top, "the same, refreshed each second, until Ctrl-C"),
    ("explain", _explain, "show all from annotation to hardware for a pod or GPU; 1 as in status"),
    ("events", _events, "follow decisions as they happen, until Ctrl-C"),
    ("ping", _ping, "ask whether the enforcer answers"),
    ("doctor", _doctor, "check what this node needs and name the remedies"),
    ("schema", _schema, "print the protocol as JSON Schema"),
)


if __name__ == "__main__":
    main()
