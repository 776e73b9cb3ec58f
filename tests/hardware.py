"""`python -m tests.hardware`: deploy/qualify/qualify.py in a cgroup that looks like a pod's.

Outside a cluster there is no pod, so one is made up: a cgroup of its own on this machine's cgroup2
tree. All the rest is qualify.py's.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.simnode.workloads import container_cgroup, pod_cgroup, real_cgroups
from tests.waiting import until

QUALIFY = Path(__file__).resolve().parents[1] / "deploy" / "qualify" / "qualify.py"
PERMISSION = "POWER_AGENT_MAY_SET_LIMITS"
_ENTER = 'echo $$ >"$0" && exec "$@"'
_REFUSED = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str]) -> int:
    command = [sys.executable, "-E", "-s", str(QUALIFY), *arguments]
    if os.environ.get(PERMISSION) != "1" or {"-h", "--help"} & set(arguments):
        return subprocess.run(command, check=False).returncode  # it says what it would do
    # This machine may be a pod of some cluster itself.
    strange = ("KUBERNETES_SERVICE_HOST", "POWER_AGENT_CGROUP_ROOT")
    environment = {name: value for name, value in os.environ.items() if name not in strange}
    return run_as_a_pod(command, environment)


def run_as_a_pod(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command in a pod's cgroup, which is gone when this returns; returns its exit status."""
    place = real_cgroups(f"power-agent-hardware-{secrets.token_hex(4)}", None)
    if place is None:
        sys.stderr.write("hardware-test: needs root and a cgroup2 tree that root may write to\n")
        return _REFUSED
    cgroup = f"{pod_cgroup(str(uuid.uuid4()))}/{container_cgroup(secrets.token_hex(32))}"
    members = place.folder / cgroup / "cgroup.procs"
    members.parent.mkdir(parents=True)
    came: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: came.append(number))
    process = subprocess.Popen(
        ["/bin/sh", "-c", _ENTER, members, *command],
        env={"POWER_AGENT_CGROUP_ROOT": place.cgroup_root, **environment},
    )
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: process.send_signal(number))
    for early in came:
        process.send_signal(early)
    try:
        return process.wait()
    finally:
        # Where it was killed, the enforcer is still giving back.
        until(lambda: not members.read_text(), "the end of all processes of the test")
        place.clear(process.pid, cgroup)
        place.folder.rmdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
