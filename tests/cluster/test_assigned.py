"""A limit before the first instruction: pods ask a real kubelet for GPUs, and read their limit.

The kubelet has them from a device plugin (device_plugin.go). The first that a container does is to
read the limit of its GPUs from the simulated hardware.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from enforcer.kubelet import CHECKPOINT, Held, parse
from tests.cluster.agent import ANNOTATION, Agent
from tests.cluster.cluster import Object, wait_for_pod, wait_gone, worker
from tests.cluster.conftest import MakeWorker, Place
from tests.cluster.device_plugin import IN_CONTAINER, SHARED, WHOLE
from tests.cluster.node import Node
from tests.cluster.simulator import Gpus
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# POWER_AGENT_STARTS=100 for a proof at length: one to two seconds each.
STARTS = int(os.environ.get("POWER_AGENT_STARTS", "8"))
FULL_MW = 700_000
_READ = f"""\
IFS=,; for gpu in $SIM_GPUS; do
read -r limit_mw <{IN_CONTAINER}/gpu$gpu/limit_mw
read -r stat </proc/self/stat
echo "$HOSTNAME $gpu $limit_mw $stat"
done
"""
ENDS = ("/bin/sh", "-c", _READ)
STAYS = ("/bin/sh", "-c", f"{_READ} exec sleep 100000")
_AFTER_THE_NAME = ")"
# A kubelet that knows no plugin yet would refuse the pod that asks for its devices.
_REGISTERED = f'"Got registration request from device plugin with resource" resourceName="{WHOLE}"'


@dataclass(frozen=True)
class Start:
    """What a container saw at its first instruction, and when its process began."""

    pod: str
    gpu: int
    limit_mw: int
    began_ns: int

    @classmethod
    def of(cls, line: str) -> Start:
        pod, gpu, limit_mw, stat = line.split(" ", 3)
        ticks = int(stat.rpartition(_AFTER_THE_NAME)[2].split()[19])
        began_ns = ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        return cls(pod, int(gpu), int(limit_mw), began_ns)


@dataclass
class Pods:
    """Pods that ask the kubelet for GPUs."""

    place: Place
    node: Node
    made: list[str] = field(default_factory=list)

    def container(
        self, command: Sequence[str], resource: str = WHOLE, count: int = 1, name: str = "main"
    ) -> Object:
        plain: Object = worker("any", [], self.place.image, command=command)["spec"]["containers"][
            0
        ]
        del plain["env"]  # the device plugin's answer has it
        return plain | {"name": name, "resources": {"limits": {resource: str(count)}}}

    def create(self, watts: dict[str, int], *containers: Object, **spec: object) -> None:
        """Create pods with these limits, all of the same containers."""
        pods = []
        for name, limit in watts.items():
            pod = worker(name, [], self.place.image, annotations={ANNOTATION: str(limit)})
            pod["metadata"]["labels"] = {"asks": "for-gpus"}
            pod["spec"] |= {"containers": list(containers), **spec}
            pod["spec"]["terminationGracePeriodSeconds"] = 1
            pods.append(pod)
        self.made += watts
        self.place.cluster.apply(*pods)

    def ended(self, names: Sequence[str]) -> list[Start]:
        """Wait until all have succeeded, and return what they said."""
        cluster = self.place.cluster

        def all_ended() -> bool:
            phases = {pod["metadata"]["name"]: pod["status"]["phase"] for pod in self.listed()}
            return all(phases[name] == "Succeeded" for name in names)

        until(all_ended, f"{names} to end", deadline_s=120, poll_s=0.2, explain=cluster.logs)
        return [start for start in self.starts() if start.pod in names]

    def listed(self) -> list[Object]:
        return self.place.cluster.items("pods", "-l", "asks=for-gpus")

    def starts(self) -> list[Start]:
        said = self.place.cluster.kubectl(
            *("logs", "-l", "asks=for-gpus", "--tail=-1", "--all-containers"),
            "--max-log-requests=16",
        )
        return [Start.of(line) for line in said.splitlines()]

    def delete(self, *options: str) -> None:
        if self.made:
            self.place.cluster.kubectl("delete", "pod", *self.made, "--ignore-not-found", *options)
        self.made.clear()

    def uid(self, name: str) -> str:
        uid: str = self.place.cluster.get("pod", name)["metadata"]["uid"]
        return uid

    def checkpoint(self) -> frozenset[Held]:
        """What the real kubelet has written."""
        return parse(self.node.box.path(f"/var/lib/kubelet/{CHECKPOINT}").read_bytes(), ["*"])


@pytest.fixture
def pods(place: Place, agent: Agent, gpus: Gpus) -> Iterator[Pods]:
    del agent
    if place.node is None:
        pytest.skip("the device plugin runs in the node of one's own")
    made = Pods(place, place.node)

    def offered() -> bool:
        found = place.cluster.items("nodes")[0]["status"]["allocatable"]
        return (found.get(WHOLE), found.get(SHARED)) == (str(gpus.count), str(4 * gpus.count))

    until(offered, "the device plugins", deadline_s=60, poll_s=0.5, explain=place.cluster.logs)
    yield made
    made.delete()
    for index in range(gpus.count):
        gpus.wait_limit(index, FULL_MW)


def test_every_container_finds_its_limit_at_its_first_instruction(pods: Pods, gpus: Gpus) -> None:
    for first in range(0, STARTS, gpus.count):
        numbers = range(first, min(first + gpus.count, STARTS))
        watts = {f"start-{number}": 250 + number for number in numbers}
        pods.create(watts, pods.container(ENDS), restartPolicy="Never")
        found = {start.pod: start.limit_mw for start in pods.ended([*watts])}
        assert found == {name: limit * 1000 for name, limit in watts.items()}
        pods.delete("--wait=false")


def test_the_order_is_checkpoint_limit_process(pods: Pods, gpus: Gpus) -> None:
    """One at a time, so that the file is of this pod."""
    leads_ms, after_ms = [], []
    checkpoint = pods.node.box.path(f"/var/lib/kubelet/{CHECKPOINT}")
    for number in range(5):
        name = f"order-{number}"
        pods.create({name: 300 + number}, pods.container(ENDS), restartPolicy="Never")
        (start,) = pods.ended([name])
        wanted_mw = (300 + number) * 1000
        limit_set = [s for s in gpus.sets(start.gpu) if s.requested_mw == wanted_mw][-1]
        written_ns = checkpoint.stat().st_mtime_ns
        assert written_ns < limit_set.wall_ns
        assert limit_set.monotonic_ns < start.began_ns
        leads_ms.append((start.began_ns - limit_set.monotonic_ns) / 1e6)
        after_ms.append((limit_set.wall_ns - written_ns) / 1e6)
        pods.delete("--wait=false")
    print(
        f"\ncheckpoint to limit, ms: {statistics.median(after_ms):.0f} (most {max(after_ms):.0f});"
        f" limit to process, ms: {statistics.median(leads_ms):.0f} (least {min(leads_ms):.0f})"
    )


def test_replicas_of_one_gpu_never_start_above_their_limit(pods: Pods) -> None:
    """One pod more than there are GPUs: two share one, and the lower of their limits holds."""
    watts = {f"replica-{number}": 500 - 50 * number for number in range(5)}
    pods.create(watts, pods.container(STAYS, SHARED))
    for name in watts:
        wait_for_pod(pods.place.cluster, name)
    starts = pods.starts()
    assert {start.pod for start in starts} == set(watts)
    assert [start for start in starts if start.limit_mw > watts[start.pod] * 1000] == []
    asked = {held.device.partition("::")[2] for held in pods.checkpoint()}
    assert all(replica.isdigit() for replica in asked), asked


def test_two_containers_and_an_init_container_find_it_too(pods: Pods) -> None:
    two = [pods.container(ENDS, count=2, name="first"), pods.container(ENDS, name="second")]
    init = pods.container(ENDS, count=3, name="init")
    pods.create({"several": 310}, *two, initContainers=[init], restartPolicy="Never")
    starts = pods.ended(["several"])
    assert len(starts) == 6
    assert {start.limit_mw for start in starts} == {310_000}


def stays(pods: Pods, name: str) -> Start:
    """A pod with 300 W that runs on one GPU."""
    pods.create({name: 300}, pods.container(STAYS))
    wait_for_pod(pods.place.cluster, name)
    (start,) = pods.starts()
    assert start.limit_mw == 300_000
    return start


def test_a_container_restarts_beside_a_stranger_and_nothing_is_ever_above_its_limit(
    pods: Pods, gpus: Gpus, make_worker: MakeWorker
) -> None:
    start = stays(pods, "restarting")
    before = len(gpus.sets(start.gpu))
    make_worker("beside", start.gpu)
    gpus.kill(pods.uid("restarting"))

    def restarted() -> bool:
        (pod,) = pods.listed()
        status = pod["status"]["containerStatuses"][0]
        return status["restartCount"] == 1 and bool(status["ready"])

    until(restarted, "the container started again", deadline_s=60, poll_s=0.2)
    (again,) = pods.starts()
    assert again.began_ns > start.began_ns
    assert again.limit_mw == 300_000
    assert len(gpus.sets(start.gpu)) == before
    pods.delete()
    gpus.wait_limit(start.gpu, FULL_MW)


def test_a_kubelet_that_starts_anew_changes_nothing_and_serves_the_next_pod(
    pods: Pods, gpus: Gpus
) -> None:
    start = stays(pods, "before")
    before = len(gpus.sets(start.gpu))
    log = pods.node.box.folder / "kubelet.log"
    registered = log.read_text().count(_REGISTERED)
    (pid,) = gpus.pids_of("kubelet\0--config=")
    pods.node.box.run("kill", "-9", str(pid))
    until(lambda: log.read_text().count(_REGISTERED) > registered, "a kubelet with the plugin")
    pods.create({"after": 320}, pods.container(ENDS), restartPolicy="Never")
    (after,) = pods.ended(["after"])
    assert (after.limit_mw, after.gpu != start.gpu) == (320_000, True)
    assert pods.uid("before") in {held.pod for held in pods.checkpoint()}
    assert len(gpus.sets(start.gpu)) == before


@pytest.mark.parametrize("options", [(), ("--force", "--grace-period=0")])
def test_a_deleted_pod_gives_back_although_the_checkpoint_still_names_it(
    options: tuple[str, ...], pods: Pods, gpus: Gpus
) -> None:
    start, uid = stays(pods, "deleted"), pods.uid("deleted")
    pods.delete(*options)
    wait_gone(pods.place.cluster, "pod", "deleted")
    gpus.wait_limit(start.gpu, FULL_MW, timeout_s=20)
    assert uid in {held.pod for held in pods.checkpoint()}
