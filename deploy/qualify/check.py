"""What this machine's GPUs and their driver do, through the product's own code, as one JSON file.

It only reads: `Hardware` has nothing that sets a limit, and a CUDA context of its own is all that
it makes. Medians are over the given number of runs.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hardware import NO_GPU, Hardware, Holder, facts, listing, no_gpu, table

from enforcer import procfs, sight
from enforcer.device import Board, DeviceError
from enforcer.nvml import Nvml
from enforcer.policy import Stranger
from enforcer.sources import Occupant

FORMAT = 1
# What daemons have by systemd's default, what the enforcer needs, and what containerd gives.
_DESCRIPTORS = (1024, 4096, 1048576)
_LISTED_S = 10.0
_POLL_S = 0.002

Object = dict[str, Any]


def hardware() -> Hardware:
    """Return the reading half of NVML, with the processes of this machine."""
    proc = Path("/proc")
    roots = sight.cgroup_roots("auto", proc, in_kubernetes=False)
    return Hardware(Nvml(), procfs.ProcessReader(proc, roots))


def measure(call: Callable[[], object], runs: int) -> Object:
    """Return how long a call takes, or why it fails."""
    taken_ms = []
    for _ in range(runs):
        began_s = time.perf_counter()
        try:
            call()
        except DeviceError as error:
            return {"error": str(error)}
        taken_ms.append((time.perf_counter() - began_s) * 1000)
    return {
        "runs": runs,
        "median_ms": round(statistics.median(taken_ms), 3),
        "max_ms": round(max(taken_ms), 3),
    }


# ---------------------------------------------------------------------- sessions


def memory_kib(field: str) -> int:
    """Return VmRSS or VmHWM of this process (proc(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def one_session(descriptors: int) -> Object:
    """Open and close a session in this process, which has opened none before."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    gpus = hardware()
    before_kib = memory_kib("VmRSS")
    init = measure(gpus.open, 1)
    if "error" in init:
        return init
    found = {"rss_kib": memory_kib("VmRSS"), "hwm_kib": memory_kib("VmHWM")}
    shutdown = measure(gpus.close, 1)
    return {
        "init_ms": init["median_ms"],
        "close_ms": shutdown["median_ms"],
        "rss_before_kib": before_kib,
        **found,
    }


def sessions(descriptors: int, runs: int) -> Object:
    """Return what a session costs where so many files may be open; each run is a process."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and descriptors > hard:
        return {"skipped": f"the hard limit of open files is {hard}: raise it (ulimit -Hn)"}
    command = [sys.executable, "-E", "-s", __file__, "--session", str(descriptors)]
    found = []
    for _ in range(runs):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout))
        if "error" in found[-1]:
            return {"error": found[-1]["error"]}
    return {"runs": runs, **{key: statistics.median(run[key] for run in found) for key in found[0]}}


# ---------------------------------------------------------------------- boards


def board(gpus: Hardware, each: Board, runs: int) -> Object:
    """Return what a board tells, and how long it takes to."""
    reading: Object = {"limit_mw": None, "enforced_mw": None, "power_mw": None}
    times = {
        "reading": measure(lambda: reading.update(asdict(gpus.read(each))), runs),
        "processes": measure(lambda: listed(gpus, each), runs),
    }
    return {
        "index": each.index,
        "uuid": each.uuid,
        **asdict(each.facts),
        **reading,
        **facts(each),
        "times": times,
        "context": context(gpus, each),
    }


def _owner(one: Occupant) -> str:
    return one.owner.value if isinstance(one.owner, Stranger) else one.owner


def listed(gpus: Hardware, each: Board) -> dict[int, tuple[str, str]]:
    """Return the processes on a board, whose they are, and the evidence; raises DeviceError."""
    sighting = gpus.look(each)
    if sighting.occupants is None:
        raise DeviceError("UNREADABLE", sighting.why)
    return {one.pid: (_owner(one), one.evidence) for one in sighting.occupants}


def context(gpus: Hardware, each: Board) -> Object:
    """Return how a CUDA context of our own is seen, and how soon."""
    holder = Holder(each.uuid)
    try:
        if not holder.ready():
            return {"error": holder.why}
        while holder.pid not in (seen := listed(gpus, each)):
            if time.monotonic() > holder.since_s + _LISTED_S:
                return {"error": f"process {holder.pid} is not listed within {_LISTED_S:g} s"}
            time.sleep(_POLL_S)
        after_ms = (time.monotonic() - holder.since_s) * 1000
        owner, evidence = seen[holder.pid]
        return {
            "listed_after_ms": round(after_ms, 3),
            "pid": holder.pid,
            "owner": owner,
            "cgroup": evidence,
        }
    except DeviceError as error:
        return {"error": str(error)}
    finally:
        holder.end()


# ---------------------------------------------------------------------- the report


def check(runs: int, session_runs: int) -> Object:
    """Return everything; raises DeviceError where there is no GPU."""
    gpus = hardware()
    # Sessions come first: while another one is open, an init costs less.
    costs = {str(count): sessions(count, session_runs) for count in _DESCRIPTORS}
    gpus.open()
    try:
        there = listing(gpus)
        return {
            "format": FORMAT,
            "machine": {"kernel": platform.release(), "python": platform.python_version()},
            "driver_version": gpus.driver_version,
            "open_files": costs,
            "list_boards": measure(gpus.boards, runs),
            "faults": list(there.faults),
            "boards": [board(gpus, each, runs) for each in there.boards],
        }
    finally:
        gpus.close()


def _cost(times: Object, key: str = "median_ms", unit: str = "ms") -> str:
    if "skipped" in times:
        return f"skipped: {times['skipped']}"
    return times.get("error") or f"{times[key]:g} {unit}"


def _watts(value_mw: int | None) -> str:
    return "unknown" if value_mw is None else f"{value_mw / 1000:g} W"


def summary(report: Object) -> str:
    """Return the short table for people."""
    rows = [("driver", report["driver_version"] or "unknown")]
    for count, cost in report["open_files"].items():
        rows.append((f"init, {count} files", _cost(cost, "init_ms")))
        if "hwm_kib" in cost:
            rows.append(("  memory, at most", f"{cost['hwm_kib'] / 1024:.1f} MiB"))
    rows.append(("list of boards", _cost(report["list_boards"])))
    for each in report["boards"]:
        context_ = each["context"]
        rows += [
            (f"GPU {each['index']}", f"{each['name'] or 'no name'}, {each['uuid']}"),
            ("  limit", _watts(each["limit_mw"])),
            ("  default", _watts(each["default_mw"])),
            ("  bounds", f"{_watts(each['min_mw'])} to {_watts(each['max_mw'])}"),
            ("  persistence mode", {None: "unknown", True: "on", False: "off"}[
                each["persistence"]
            ]),
            ("  processes", _cost(each["times"]["processes"])),
            ("  limits and power", _cost(each["times"]["reading"])),
            ("  CUDA context listed", _cost(context_, "listed_after_ms")),
            ("    its cgroup", context_.get("cgroup", "not seen").splitlines()[-1]),
        ]  # fmt: skip
    return "\n".join([table(rows), *(f"fault: {fault}" for fault in report["faults"])])


def main() -> int:
    """Measure, write the file, print the table."""
    parser = argparse.ArgumentParser(prog="hardware-check", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("build/hardware-check.json"))
    parser.add_argument("--runs", type=int, default=25, help="of each read")
    parser.add_argument("--session-runs", type=int, default=3, help="of each init: slow")
    parser.add_argument("--session", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.session:
        print(json.dumps(one_session(chosen.session)))
        return 0
    try:
        report = check(chosen.runs, chosen.session_runs)
    except DeviceError as error:
        sys.stderr.write(f"hardware-check: {no_gpu(error)}\n")
        return NO_GPU
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(report, indent=2) + "\n")
    print(summary(report))
    print(f"written: {chosen.json}")
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
