"""Where pods' cgroups are on real nodes: both drivers at once, and any parent of `kubepods`.

Whole processes on the simulated node; what is asserted is what the hardware and `powerctl` say.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.node.conftest import MakeNode
from tests.simnode.node import Pod, SimNode
from tests.simnode.workloads import RUNTIME, Driver

FOUND_MW = 700_000  # an H100's factory default
CONTAINER = "3fa9" * 16
EKS = "runtime.slice/containerd.service"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="real cgroups need root")


def powerctl(node: SimNode, *arguments: str) -> str:
    """Its text without the breaks of lines; doctor may find other things and end with 1."""
    command = [sys.executable, "-m", "shared.powerctl", *arguments, "--socket", str(node.run_dir)]
    wide = os.environ | {"COLUMNS": "400"}  # long paths are broken where it is narrow
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=wide)
    assert not done.stderr, done.stderr
    return " ".join(done.stdout.split())


def misfit(pod: Pod) -> str:
    """The name that a handler on cgroupfs makes of what a kubelet on systemd asks for."""
    slice_ = f"kubepods-burstable-pod{pod.cgroup_uid.replace('-', '_')}.slice"
    return f"{slice_}:cri-containerd:{CONTAINER}"


@needs_root
@pytest.mark.root
@pytest.mark.parametrize(
    ("driver", "levels", "runtime"),
    [
        ("systemd", (), RUNTIME),
        ("systemd", ("k8s",), EKS),
        ("systemd", ("root", "cgroup-here"), RUNTIME),
        ("systemd", ("my\\x2dpool", "a.b:c", "7"), RUNTIME),
        ("cgroupfs", ("k8s-1", "cgroup.here"), RUNTIME),
    ],
    ids=["plain", "digits", "levels", "escapes", "cgroupfs"],
)
def test_both_drivers_of_one_node_below_any_parent(
    make_node: MakeNode, driver: Driver, levels: Sequence[str], runtime: str
) -> None:
    node = make_node(driver=driver, cgroup_levels=levels, runtime=runtime)
    node.add_pod("worker", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    if driver == "systemd":
        beside = node.add_pod("beside", limit=300)
        node.add_worker(beside, [1], driver="misfit")
        node.wait_for_limit(1, 300)
        said = powerctl(node, "doctor")
        assert "cgroupfs under a kubelet on systemd and systemd side by side" in said
        assert f"roots {', '.join(node.workers.cgroup_roots)}" in said


ELSEWHERE = (
    "user.slice/user-1000.slice/user@1000.service/{misfit}",
    "machine.slice/{misfit}",
    "system.slice/nginx.service/{misfit}",
    "docker/{container}/kubepods/burstable/pod{uid}/{container}",
    "docker/{container}/system.slice/containerd.service/{misfit}",
    "kubelet.slice/kubepods.slice/kubepods-burstable.slice/{misfit}",
)


@needs_root
@pytest.mark.root
def test_i1_a_look_alike_elsewhere_is_nobodys(make_node: MakeNode) -> None:
    """One for each place, and each on a GPU of its own."""
    node = make_node(driver="systemd", gpus=1 + len(ELSEWHERE))
    victim = node.add_pod("victim", limit=300, gpus=[0])
    names = {"misfit": misfit(victim), "uid": victim.cgroup_uid, "container": CONTAINER}
    for number, place in enumerate(ELSEWHERE, 1):
        node.workers.in_cgroup(place.format(**names), [node.gpus[number]])
    node.wait_for_limit(0, 300)

    def owners() -> list[list[str]]:
        return [[each.owner for each in gpu.processes] for gpu in node.status().gpus[1:]]

    node.wait_for(lambda: all(owners()), "each look-alike on its GPU")
    assert owners() == [["other"]] * len(ELSEWHERE)
    assert node.limits_mw()[1:] == [FOUND_MW] * len(ELSEWHERE)


def test_a_pod_that_waits_names_the_processes_that_may_be_its_own(make_node: MakeNode) -> None:
    """CRIU and Docker in Docker: the worker is there, in somebody else's cgroup."""
    node = make_node(gpus=3)
    waiting = node.add_pod("restored", limit=350)
    agent = node.add_pod("snapshot-agent")
    in_agent = node.add_worker(agent, [0])
    in_docker = node.workers.in_cgroup(f"docker/{CONTAINER}", [node.gpus[1]])
    taken = node.add_pod("taken", limit=300, gpus=[2])
    node.wait_for_limit(2, 300)
    node.wait_for_state(waiting, "waiting")
    node.wait_for(lambda: all(gpu.processes for gpu in node.status().gpus), "all three processes")
    said = powerctl(node, "explain", "-v", "default/restored")
    assert "candidates of others on this node's GPUs" in said
    assert f"GPU 0: pid {in_agent.pid} of pod {agent.uid}, not annotated, by " in said
    assert f"GPU 1: pid {in_docker.pid} of no known pod, by " in said
    assert f"docker/{CONTAINER}" in said
    assert "candidates" not in powerctl(node, "explain", "default/taken")
    assert f"pid {taken.workers[0].pid} of" not in said
    assert node.limits_mw()[:2] == [FOUND_MW, FOUND_MW]  # nothing is guessed
