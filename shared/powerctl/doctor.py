"""The doctor: every check of what a node needs, in one list; needs no root and no NVML."""

import os
import socket
import time
from pathlib import Path

from shared import messages
from shared.powerctl import away_checks, node_checks, reply_checks, watcher_checks
from shared.powerctl.ask import Patience, UnreachableError, ask, listener_pid
from shared.powerctl.check import Check, fail
from shared.powerctl.layout import WIDTH, Paint, plain, wrapped
from shared.powerctl.processes import environment_of, running
from shared.powerctl.tables import escape
from shared.settings import whole_environment


def examine(
    run_dir: Path, timeout_s: float, proc: Path, patience: Patience | None = None
) -> tuple[list[Check], bool]:
    """Return every check's outcome and whether the enforcer answered."""
    checks = [node_checks.directory(run_dir), *node_checks.sockets(run_dir)]
    environment = whole_environment()
    checks += node_checks.proxy(environment)
    began = time.monotonic()
    try:
        reply = ask(run_dir, messages.Status(), messages.StatusReply, timeout_s, patience)
    except UnreachableError as error:
        checks.append(fail("enforcer", error.reason, error.remedy))
        if error.unclear:  # one that refuses works: its process is not what is wrong
            checks += away_checks.checks(run_dir, proc, environment, socket.gethostname())
        return [*checks, node_checks.cgroup_version(proc)], False
    took_ms = (time.monotonic() - began) * 1000
    listener = _listener(run_dir)
    seen = f"version {reply.enforcer.version} answered in {took_ms:.1f} ms"
    checks += [
        Check(name="enforcer", seen=seen),
        node_checks.pulse(run_dir, time.clock_gettime(time.CLOCK_BOOTTIME)),
        Check(name="credentials", seen=f"uid {os.geteuid()} is admitted"),
        node_checks.host_pids(proc, listener, reply.enforcer.pid),
        node_checks.cgroup_version(proc),
        node_checks.ledger(reply, proc, listener, as_root=os.geteuid() == 0),
        node_checks.nodes(proc, listener),
        *reply_checks.from_reply(
            reply,
            node_checks.sys_admin(proc, listener),
            _watchers(run_dir, proc, listener if listener == reply.enforcer.pid else 0),
        ),
    ]
    return checks, True


def _listener(run_dir: Path) -> int:
    """Return the enforcer's pid as it is seen from here, 0 where it is not."""
    try:
        return listener_pid(run_dir)
    except OSError:
        return 0


def _watchers(run_dir: Path, proc: Path, enforcer: int) -> watcher_checks.Sight:
    """Return what is seen of the watcher; `enforcer` is its pid, 0 in another pid namespace."""
    uid = environment_of(proc / str(enforcer)).get("POWER_AGENT_WATCHER_UID", "65532")
    # Without root it cannot be told for which node a process is.
    found = running(proc, "watcher") if enforcer and os.geteuid() == 0 else None
    return watcher_checks.Sight(
        found=found,
        expected_uid=int(uid) if uid.isdecimal() else None,
        run_dir=str(run_dir),
        last_lines=away_checks.logs(whole_environment(), socket.gethostname(), "watcher"),
    )


def lines(checks: list[Check], paint: Paint = plain, width: int = WIDTH) -> list[str]:
    """Return the checks as text."""
    name = max((len(check.name) for check in checks), default=0)
    before = len("fail  ") + name + 2
    text = []
    for check in checks:
        first, *more = wrapped(escape(check.seen), width - before) or [""]
        result = paint(f"{check.result:4}", check.result)
        text.append(f"{result}  {check.name:{name}}  {first}")
        text += [" " * before + line for line in more]
        if check.remedy:
            text += wrapped(f"remedy: {escape(check.remedy)}", width, " " * before, " " * before)
    return text
