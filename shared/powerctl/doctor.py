"""The doctor: every check of what a node needs, in one list; needs no root and no NVML."""

import os
import time
from pathlib import Path

from shared import messages
from shared.powerctl import node_checks, reply_checks
from shared.powerctl.ask import Patience, UnreachableError, ask, listener_pid
from shared.powerctl.check import Check, fail
from shared.powerctl.tables import Paint, escape, plain
from shared.settings import whole_environment


def examine(
    run_dir: Path, timeout_s: float, proc: Path, patience: Patience | None = None
) -> tuple[list[Check], bool]:
    """Return every check's outcome and whether the enforcer answered."""
    checks = [node_checks.directory(run_dir), *node_checks.sockets(run_dir)]
    checks += node_checks.proxy(whole_environment())
    began = time.monotonic()
    try:
        reply = ask(run_dir, messages.Status(), messages.StatusReply, timeout_s, patience)
    except UnreachableError as error:
        checks += [fail("enforcer", error.reason, error.remedy), node_checks.cgroup_version(proc)]
        return checks, False
    took_ms = (time.monotonic() - began) * 1000
    try:
        listener = listener_pid(run_dir)
    except OSError:
        listener = 0
    seen = f"version {reply.enforcer.version} answered in {took_ms:.1f} ms"
    checks += [
        Check(name="enforcer", seen=seen),
        node_checks.pulse(run_dir, time.clock_gettime(time.CLOCK_BOOTTIME)),
        Check(name="credentials", seen=f"uid {os.geteuid()} is admitted"),
        node_checks.host_pids(proc, listener, reply.enforcer.pid),
        node_checks.cgroup_version(proc),
        node_checks.ledger(reply, proc, listener, as_root=os.geteuid() == 0),
        node_checks.nodes(proc, listener),
        *reply_checks.from_reply(reply, node_checks.sys_admin(proc, listener)),
    ]
    return checks, True


def lines(checks: list[Check], paint: Paint = plain) -> list[str]:
    """Return the checks as text."""
    width = max((len(check.name) for check in checks), default=0)
    text = []
    for check in checks:
        result = paint(f"{check.result:4}", check.result)
        text.append(f"{result}  {check.name:{width}}  {escape(check.seen)}")
        if check.remedy:
            text.append(f"      {'':{width}}  remedy: {escape(check.remedy)}")
    return text
