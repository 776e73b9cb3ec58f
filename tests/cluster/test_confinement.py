"""What the node's kernel adds to the runtime's rules: AppArmor or SELinux, and cgroup version 2.

Where a node has neither, as the box, these tests are skipped; `make vm-test` has one of each.
"""

from __future__ import annotations

import contextlib

import pytest

from tests.cluster.agent import Agent, pod_patch
from tests.cluster.cluster import Cluster, KubectlError
from tests.cluster.conftest import Install, MakeWorker
from tests.cluster.simulator import Gpus
from tests.cluster.test_overlays import check_it_enforces
from tests.cluster.test_privileges import status_field
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def on_node(gpus: Gpus, file: str) -> str:
    """What a file of the node says; nothing where it has none."""
    return gpus.shell(f"cat /proc/1/root{file} 2>/dev/null || :").strip()


def label(gpus: Gpus, program: str) -> str:
    """The security module's, of a running program."""
    (pid,) = gpus.programs(program)
    return gpus.shell(f"cat /proc/{pid}/attr/current").strip().rstrip("\0")


def why_it_ended(agent: Agent, module: str) -> str:
    """What the enforcer said of this security module before it gave up.

    By the time that a slow node tells of one end its kubelet may have thrown that log away, with
    the next end at hand.
    """

    def said() -> str:
        for options in (["--previous"], []):
            # Nothing where there is no such container any more, or none yet.
            with contextlib.suppress(KubectlError):
                if module in (text := agent.log("enforcer", *options)):
                    return text
        return ""

    until(lambda: agent.restarts("enforcer") >= 1, "the enforcer to give up")
    assert agent.container_status("enforcer")["lastState"]["terminated"]["exitCode"] == 2
    return until(said, f"the enforcer to name {module}", explain=agent.described)


@pytest.fixture
def apparmor(agent: Agent, gpus: Gpus) -> None:
    # containerd loads its profile with the first container that it confines: here the watcher.
    assert agent.pods()
    if "(enforce)" not in on_node(gpus, "/sys/kernel/security/apparmor/profiles"):
        pytest.skip("the node has no AppArmor")


@pytest.mark.usefixtures("apparmor")
def test_under_apparmor_the_manifest_enforces_and_only_the_enforcer_is_unconfined(
    agent: Agent, gpus: Gpus, cluster: Cluster, make_worker: MakeWorker
) -> None:
    assert label(gpus, "watcher").endswith("(enforce)")
    assert not label(gpus, "enforcer").endswith("(enforce)")
    check_it_enforces(gpus, cluster, make_worker)
    assert agent.restarts("enforcer") == 0


@pytest.mark.usefixtures("apparmor")
def test_an_enforcer_whom_apparmor_keeps_from_pid_1_names_apparmor_and_the_remedy(
    install: Install, gpus: Gpus, make_worker: MakeWorker
) -> None:
    """Both capabilities are there, so a text about capabilities would send people astray."""
    confined = {"securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}}
    before = len(gpus.sets(0))
    agent = install(
        "reduced-privileges",
        pod_patch({"containers": [{"name": "enforcer", **confined}]}),
        ready=False,
    )
    make_worker("unseen", 0, watts="300")
    said = why_it_ended(agent, "AppArmor")
    assert "appArmorProfile {type: Unconfined}" in said
    assert len(gpus.sets(0)) == before


# ---------------------------------------------------------------------- SELinux

SPC = {"securityContext": {"seLinuxOptions": {"type": "spc_t", "level": "s0"}}}


@pytest.fixture
def selinux(gpus: Gpus) -> None:
    if on_node(gpus, "/sys/fs/selinux/enforce") != "1":
        pytest.skip("the node enforces no SELinux")


@pytest.mark.usefixtures("selinux")
def test_under_selinux_the_manifest_with_its_component_enforces(
    install: Install, gpus: Gpus, cluster: Cluster, make_worker: MakeWorker
) -> None:
    install("selinux")
    for program in ("watcher", "enforcer"):
        assert ":spc_t:s0" in label(gpus, program)
    check_it_enforces(gpus, cluster, make_worker)


@pytest.mark.usefixtures("selinux")
def test_under_selinux_reduced_privileges_enforces_with_the_lines_of_its_patch(
    install: Install, gpus: Gpus, cluster: Cluster, make_worker: MakeWorker
) -> None:
    both = [{"name": name, **SPC} for name in ("watcher", "enforcer")]
    install("reduced-privileges", pod_patch({"containers": both}))
    assert status_field(gpus, "enforcer", "CapEff") == f"{1 << 21:016x}"
    check_it_enforces(gpus, cluster, make_worker)


@pytest.mark.usefixtures("selinux")
def test_under_selinux_a_watcher_without_the_component_names_selinux_and_nothing_is_written(
    install: Install, gpus: Gpus, make_worker: MakeWorker
) -> None:
    before = len(gpus.sets(0))
    agent = install("../power_agent", ready=False)
    make_worker("unseen", 0, watts="300")
    until(lambda: "SELinux" in agent.log("watcher"), "the reason", explain=agent.described)
    assert ":container_t:" in label(gpus, "watcher")
    assert "seLinuxOptions {type: spc_t, level: s0}" in agent.log("watcher")
    assert len(gpus.sets(0)) == before


@pytest.mark.usefixtures("selinux")
def test_under_selinux_an_enforcer_with_reduced_privileges_names_selinux_and_the_remedy(
    install: Install, gpus: Gpus, make_worker: MakeWorker
) -> None:
    before = len(gpus.sets(0))
    agent = install("reduced-privileges", ready=False)
    make_worker("unseen", 0, watts="300")
    said = why_it_ended(agent, "SELinux")
    assert "seLinuxOptions {type: spc_t, level: s0}" in said
    assert len(gpus.sets(0)) == before
