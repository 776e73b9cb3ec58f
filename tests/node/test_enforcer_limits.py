"""The main job, by the whole enforcer process: limits are set, kept, and given back as found."""

from __future__ import annotations

from shared import messages as m
from shared.client import Subscriber
from tests.node.enforcer_harness import HOST_CGROUP, EnforcerNode, pod_cgroup, pod_uid
from tests.waiting import until

A, B, C = pod_uid(1), pod_uid(2), pod_uid(3)


def test_i1_a_mimicked_cgroup_is_not_taken_for_the_pod() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(B, cgroup=pod_cgroup(B, f"x/kubepods/burstable/pod{A}/y"))
        node.run_pod(B, 1, cgroup=f"0::/user.slice/kubepods/burstable/pod{A}/x\n")
        node.snapshot({A: 300}, others=[B])
        node.looks()
        assert node.writes() == 0
        assert node.pod(A).state == "waiting"


def test_a_pid_moves_between_pods_only_by_its_cgroup() -> None:
    """Nothing is cached across scans: what the file says now counts."""
    with EnforcerNode() as node:
        node.start()
        pid = node.run_pod(A)
        node.snapshot({A: 300, B: 250})
        assert node.limit() == 300
        (node.work.root / str(pid) / "cgroup").write_text(pod_cgroup(B))
        node.wait_limit(250)
        (node.work.root / str(pid) / "cgroup").write_text(HOST_CGROUP)
        node.wait_limit(700)


def test_decisions_are_published_as_they_happen() -> None:
    with EnforcerNode() as node:
        node.start()
        listener = Subscriber(node.run_dir)
        try:
            # A subscription takes a moment: changes go on until the first event has come.
            until(lambda: changed_until_heard(node, listener), "an event")
            pid = node.run_pod(A)
            node.snapshot({A: 300})
            node.end(pid)
            node.snapshot({})
            kinds: list[type] = []

            def released() -> bool:
                kinds.append(type(listener.receive(0.5)))
                return m.LimitReleased in kinds

            until(released, "the release", explain=lambda: kinds)
            assert kinds.index(m.LimitSet) < kinds.index(m.LimitReleased)
            assert m.SnapshotAccepted in kinds
        finally:
            listener.close()


def changed_until_heard(node: EnforcerNode, listener: Subscriber) -> bool:
    node.snapshot({C: 300 + node.revision})
    return listener.receive(0.05) is not None


def test_processes_of_every_mig_instance_count_toward_the_gpu() -> None:
    with EnforcerNode() as node:
        node.start()
        folder = node.gpus[0].folder
        (folder / "mig").write_text("1 1\n")
        first, second = node.work.start(pod_cgroup(A)), node.work.start(pod_cgroup(B))
        (folder / "compute").write_text(f"{first} 100 1 0\n{second} 100 2 0\n")
        node.snapshot({A: 400, B: 300})
        assert node.limit() == 300
        assert set(node.gpu().pods) == {A, B}
