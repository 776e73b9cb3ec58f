"""The two commands that go on until Ctrl-C: `top` and `events`."""

import json
import os
import select
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from shared import messages
from shared.client import Subscriber
from shared.powerctl import tables
from shared.powerctl.ask import Patience, UnreachableError, ask
from shared.powerctl.layout import Paint, terminal_width, wrapped
from shared.powerctl.overview import status

_REFRESH_S = 1.0
_SLICE_S = 0.25  # how soon a closed pipe is noticed while nothing happens
_CHECK_S = 5.0  # a quiet enforcer is asked whether it is still there

# Alternate screen, cursor off, no automatic wrap: the terminal itself cuts what is too wide.
_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"


@contextmanager
def screen() -> Iterator[None]:
    """Draw on the terminal's other screen, and leave the first as it was."""
    sys.stdout.write(_ENTER)
    sys.stdout.flush()
    try:
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


def top(run_dir: Path, timeout_s: float, busy_s: float, paint: Paint) -> None:
    """Show the status, refreshed each second, until interrupted; goes on without the enforcer."""

    def say(text: str) -> None:
        _draw(wrapped(tables.escape(text), terminal_width()))

    patience = Patience(busy_s, say) if busy_s else None
    with screen():
        while True:
            began = time.monotonic()
            _draw(_frame(run_dir, timeout_s, patience, paint))
            time.sleep(max(0.0, _REFRESH_S - (time.monotonic() - began)))


def _frame(run_dir: Path, timeout_s: float, patience: Patience | None, paint: Paint) -> list[str]:
    try:
        reply = ask(run_dir, messages.Status(), messages.StatusReply, timeout_s, patience)
    except UnreachableError as error:
        width = terminal_width()
        return [
            paint("enforcer not reachable", "fail"),
            *wrapped(tables.escape(error.reason), width, "  "),
            *wrapped(tables.escape(error.remedy), width, "  "),
            "",
            "asking again each second; Ctrl-C ends",
        ]
    return status(reply, paint, terminal_width())


def _draw(lines: list[str]) -> None:
    rows = max(1, shutil.get_terminal_size().lines - 1)
    if len(lines) > rows:
        lines = [*lines[: rows - 1], f"... {len(lines) - rows + 1} more lines: powerctl status"]
    # Each line clears what the last frame left: no flicker. It does so first, since behind a line
    # as wide as the terminal the cursor still stands on its last character.
    sys.stdout.write("\x1b[H" + "".join(f"\x1b[K{line}\r\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()


def events(run_dir: Path, timeout_s: float, *, as_json: bool) -> None:
    """Print decisions until interrupted or nobody reads; raises UnreachableError at the start."""
    subscriber = Subscriber(run_dir)
    try:
        ask(run_dir, messages.Ping(), messages.Pong, timeout_s)
        _follow(subscriber, run_dir, timeout_s, as_json=as_json)
    finally:
        subscriber.close()


def _follow(subscriber: Subscriber, run_dir: Path, timeout_s: float, *, as_json: bool) -> None:
    closed = select.poll()
    closed.register(sys.stdout.fileno(), 0)  # POLLERR comes in any case: nobody reads the pipe
    names: dict[str, str] = {}
    here, check_at = True, time.monotonic() + _CHECK_S
    while not closed.poll(0):
        try:
            event = subscriber.receive(_SLICE_S)
        except msgspec.DecodeError as error:
            note(f"an event that this powerctl does not know: {error}")
            continue
        if event is not None:
            if as_json:
                text = json.dumps(msgspec.to_builtins(event))
            else:
                _learn(names, event, run_dir, timeout_s)
                text = tables.event(event, names)
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
            check_at = time.monotonic() + _CHECK_S
        elif time.monotonic() >= check_at:
            here = _look(run_dir, timeout_s, here=here)
            check_at = time.monotonic() + _CHECK_S


def _learn(names: dict[str, str], event: messages.Event, run_dir: Path, timeout_s: float) -> None:
    """Learn how the pods of `event` are called: it tells, or whoever sent it is asked once."""
    if not isinstance(event, messages.GpuEvent):
        return
    names |= tables.event_names(event)
    if not names.keys() >= set(event.pods):
        names.update((uid, tables.escape(uid)) for uid in event.pods if uid not in names)
        with suppress(UnreachableError):
            names |= tables.pod_names(
                ask(run_dir, messages.Status(), messages.StatusReply, timeout_s)
            )


def _look(run_dir: Path, timeout_s: float, *, here: bool) -> bool:
    """Say once when the enforcer goes and once when it is back: silence would hide it."""
    try:
        ask(run_dir, messages.Ping(), messages.Pong, timeout_s)
    except UnreachableError as error:
        if here:
            note(f"enforcer not reachable: {error}")
        return False
    if not here:
        note("enforcer is back")
    return True


def note(text: str) -> None:
    """Write to standard error; if that is not possible, the exit status has to do."""
    try:
        sys.stderr.write(tables.escape(f"powerctl: {text}") + "\n")
        sys.stderr.flush()
    except OSError:  # without this the interpreter's own last flush would fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
