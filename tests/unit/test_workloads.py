"""Cgroup names of simulated workers are those that kubelet and runtimes make."""

from __future__ import annotations

from pathlib import Path

import pytest

from enforcer.cgroups import pod_of
from tests.simnode.workloads import (
    Driver,
    Qos,
    cgroup2_mounts,
    container_cgroup,
    pod_cgroup,
)

UID = "2c1f7a54-0b6e-4a1c-9d2e-0123456789ab"
CONTAINER = "3fa93fa9" * 8


@pytest.mark.parametrize("uid", [UID, "0123456789abcdef0123456789abcdef"], ids=["pod", "static"])
@pytest.mark.parametrize("driver", ["cgroupfs", "systemd"])
@pytest.mark.parametrize("qos", ["guaranteed", "burstable", "besteffort"])
def test_the_enforcer_reads_them(uid: str, driver: Driver, qos: Qos) -> None:
    pod = pod_cgroup(uid, driver=driver, qos=qos)
    path = f"/own/{pod}/{container_cgroup(CONTAINER, driver=driver)}"
    assert pod_of(f"0::{path}\n".encode(), ["/own"]) == uid


def test_names_as_the_kubelet_writes_them() -> None:
    assert pod_cgroup(UID) == f"kubepods/burstable/pod{UID}"
    assert pod_cgroup(UID, qos="guaranteed") == f"kubepods/pod{UID}"
    assert pod_cgroup(UID, driver="systemd", qos="besteffort") == (
        "kubepods.slice/kubepods-besteffort.slice/"
        f"kubepods-besteffort-pod{UID.replace('-', '_')}.slice"
    )


def test_cgroup2_trees_are_found_on_hybrid_and_unified_hosts() -> None:
    hybrid = (
        "37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
    )
    unified = (
        "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
        "36 24 0:31 / /a\\040place rw - cgroup2 none rw\n"
    )
    assert cgroup2_mounts(hybrid) == [Path("/sys/fs/cgroup/unified")]
    assert cgroup2_mounts(unified) == [Path("/sys/fs/cgroup"), Path("/a place")]
