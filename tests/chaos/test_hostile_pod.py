"""A hostile pod: floods of short-lived processes, cgroups named like another pod's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bench.machine import cpu_s
from tests.chaos.scale import HOSTILE_S
from tests.simnode.gpus import SimGpu
from tests.simnode.node import FAST, Pod, SimNode
from tests.simnode.workloads import RealCgroups, pod_cgroup

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="real cgroups need root"),
    pytest.mark.timeout(180 + 4 * HOSTILE_S),
]

# Forks as fast as it can, in a cgroup that it was put into, and has its children on a GPU's list:
# with keep_dead most of them have ended when the list is read.
FLOOD = """
import os, sys
path, keep = sys.argv[1], [int(pid) for pid in sys.argv[2:]]
sys.stdin.readline()
recent, count = [], 0
while True:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    recent.append(pid)
    count += 1
    if count % 40 == 0:
        recent = recent[-300:]
        with open(path + ".flood", "w") as file:
            file.write("".join(f"{pid}\\n" for pid in keep + recent))
        os.rename(path + ".flood", path)
        print(count, flush=True)
    os.waitpid(pid, 0)
"""


@pytest.fixture
def node() -> Iterator[SimNode]:
    with SimNode(gpus=3, real_api=False, settings=FAST) as made:
        if not isinstance(made.place, RealCgroups):
            pytest.skip("no cgroup2 tree that can be written here")
        yield made


@contextmanager
def flooded(node: SimNode, pod: Pod, gpu: SimGpu, *living: int) -> Iterator[list[int]]:
    """Short-lived processes of `pod` on `gpu`, beside those that live on; afterwards how many."""
    gpu.keep_dead = True
    counts: list[int] = []
    command = [sys.executable, "-S", "-E", "-c", FLOOD, str(gpu.folder / "compute")]
    flood = subprocess.Popen(
        [*command, *map(str, living)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    place = f"{pod_cgroup(pod.cgroup_uid)}/flood"
    try:
        node.place.put(flood.pid, place)
        assert flood.stdin is not None
        flood.stdin.write("go\n")
        flood.stdin.flush()
        assert flood.stdout is not None
        flood.stdout.readline()  # the first processes are on the list
        yield counts
    finally:
        flood.kill()
        told, _ = flood.communicate()
        node.place.clear(flood.pid, place)
        counts.append(int(told.split()[-1]) if told else 0)


def test_a_flood_of_short_lived_processes(node: SimNode) -> None:
    """Neither the pod's own limit nor another's moves, and nobody waits for the flood."""
    good = node.add_pod("good", 350, [0])
    hostile = node.add_pod("hostile", 300, [1])
    neutral = node.add_pod("neutral", None, [2])
    node.wait_for_limit(0, 350)
    node.wait_for_limit(1, 300)
    before, began_s = cpu_s(node.pid("enforcer")), time.monotonic()
    own, shared = node.gpus[1], node.gpus[0]
    with (
        flooded(node, hostile, own) as first,  # its living worker is no longer listed at all
        flooded(node, neutral, shared, good.workers[0].pid) as second,
    ):
        node.annotate(good, 360)
        node.wait_for_limit(0, 360)
        end_s = time.monotonic() + HOSTILE_S
        while time.monotonic() < end_s:
            assert node.limit_mw(1) == 300_000
            assert node.limit_mw(0) == 360_000
            time.sleep(0.01)
    spent, span_s = cpu_s(node.pid("enforcer")) - before, time.monotonic() - began_s
    assert all(first + second), "a flood that did not start"
    assert len(node.gpus[1].sets()) == 1
    assert len(node.gpus[0].sets()) == 2
    assert node.limit_mw(2) == 700_000
    print(f"{sum(first + second)} processes, {spent / span_s:.0%} of a core")


MIMICS = [
    "{own}/kubepods/burstable/pod{uid}/c",
    "{own}/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/c",
    "{own}/pod{uid}",
    "{own}/kubepods-burstable-pod{under}.slice:cri-containerd:{hex}",
    "{own}/0::/kubepods/burstable/pod{uid}/c",
    "{own}/a b:c (deleted)/kubepods/burstable/pod{uid} (deleted)",
    "{own}/\\x2f..\\x2fkubepods/pod{uid}",
    "kubepods.slice-of-mine/kubepods/burstable/pod{uid}/c",
    "user.slice/kubepods/burstable/pod{uid}/c",
    "machine.slice/machine-x.scope/kubepods.slice/kubepods-pod{under}.slice/c",
    "kubepods/burstable/extra/pod{uid}/c",
    "kubepods/guaranteed/pod{uid}/c",
    "KUBEPODS/burstable/pod{uid}/c",
    "kubepods/burstable/pod{upper}/c",
    "kubepods/burstable/pod{uid}x/c",
    "kubepods/burstable/xpod{uid}/c",
]


def test_cgroups_named_like_another_pods(node: SimNode) -> None:
    """None of them gets the annotated pod's limit onto a GPU, all at once or one by one."""
    victim = node.add_pod("victim", 350, [0])
    hostile = node.add_pod("hostile", None, [1])
    node.wait_for_limit(0, 350)
    values = {
        "own": f"{pod_cgroup(hostile.cgroup_uid)}/mine",
        "uid": victim.uid,
        "under": victim.uid.replace("-", "_"),
        "upper": victim.uid.upper(),
        "hex": "3fa9" * 16,
    }
    workers = []
    for mimic in MIMICS:
        cgroup = mimic.format_map(values)
        worker = node.workers.in_cgroup(cgroup, [node.gpus[2]])
        assert Path(f"/proc/{worker.pid}/cgroup").read_text().rstrip("\n").endswith(cgroup)
        workers.append(worker)
        node.status()  # it looks, and decides
        assert node.limit_mw(2) == 700_000, cgroup
    for worker in workers:
        worker.end()
        node.status()
    assert {record.uuid for record in node.gpus.sets()} == {node.gpus[0].uuid}
    node.add_worker(victim, [2])
    node.wait_for_limit(2, 350)


def test_a_process_that_changes_its_cgroup_all_the_time(node: SimNode) -> None:
    """Whatever it names them, below its own pod's, and whenever the line is read."""
    victim = node.add_pod("victim", 350, [0])
    hostile = node.add_pod("hostile", None)
    node.wait_for_limit(0, 350)
    own = f"{pod_cgroup(hostile.cgroup_uid)}/mine"
    worker = node.workers.in_cgroup(own, [node.gpus[1]])
    places = [f"{own}/kubepods/burstable/pod{victim.uid}/{name}" for name in "ab"]
    end_s, moves = time.monotonic() + HOSTILE_S / 2, 0
    while time.monotonic() < end_s or moves <= 50:
        for place in places:
            node.place.put(worker.pid, place)
            moves += 1
        assert node.limit_mw(1) == 700_000
    node.place.put(worker.pid, own)
    assert {record.uuid for record in node.gpus.sets()} == {node.gpus[0].uuid}
