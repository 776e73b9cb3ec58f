"""Device nodes that may not be opened, under the real process: real files in a /dev of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.node.enforcer_harness import REPOSITORY, EnforcerNode, pod_uid
from tests.waiting import until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount"),
]
A = pod_uid(1)
# A file system of its own over /dev, with what Python needs and the stand-ins; then the program.
DEV = """
set -e
dev=$(mktemp -d) && mount -t tmpfs none $dev
for name in null zero random urandom; do
    touch $dev/$name && mount --bind /dev/$name $dev/$name
done
mkdir $dev/shm
for name in nvidiactl nvidia0 nvidia1; do touch $dev/$name && chmod 0666 $dev/$name; done
{change}
mount --move $dev /dev
exec "$@"
"""
CLOSED = "chown 1000:1000 $dev/{0} && chmod 0600 $dev/{0}"
# Refused whatever the mode and the capabilities, with EPERM, as by a device cgroup.
LOST = "chattr +i $dev/{0}"


@pytest.fixture
def node() -> Iterator[EnforcerNode]:
    with EnforcerNode() as made:
        made.settings["SIM_NVML_DEV"] = "/dev"
        yield made


def wrapped(node: EnforcerNode, change: str) -> EnforcerNode:
    node.wrapped_in = ["unshare", "--mount", "sh", "-c", DEV.format(change=change), "sh"]
    tried = subprocess.run([*node.wrapped_in, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no such /dev here: {tried.stderr.strip()}")
    return node.start()


def doctor(node: EnforcerNode) -> dict[str, dict[str, str]]:
    """What `powerctl doctor` says in the enforcer's container."""
    command = ["nsenter", "--mount", "-t", str(node.pid), "--", sys.executable, "-m"]
    done = subprocess.run(
        [*command, "shared.powerctl", "doctor", "--json", "--socket", str(node.run_dir)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


@pytest.mark.parametrize("closed", ["nvidiactl", "nvidia0"])
def test_a_node_of_another_user_is_told_from_a_missing_capability(
    node: EnforcerNode, closed: str
) -> None:
    wrapped(node, CLOSED.format(closed))
    said = node.status().enforcer.nvml_message
    assert f"/dev/{closed} (uid 1000, gid 1000, mode 0600)" in said
    assert "CAP_DAC_OVERRIDE" in said
    assert "CAP_SYS_ADMIN" not in said
    assert said in str(node.logs("nvml"))
    check = doctor(node)["device nodes"]
    assert check["result"] == "fail"
    assert f"/dev/{closed} (uid 1000, gid 1000, mode 0600)" in check["seen"]
    assert "NVreg_DeviceFileMode=0666" in check["remedy"]


def test_an_owned_gpu_whose_node_was_closed_says_so(node: EnforcerNode) -> None:
    wrapped(node, "true")
    node.run_pod(A)
    node.snapshot({A: 300})
    assert node.limit() == 300
    node.kill()
    wrapped(node, CLOSED.format("nvidia0"))
    lost = node.wait_state("lost")
    assert "/dev/nvidia0 (uid 1000, gid 1000, mode 0600)" in lost.reason
    assert lost.managed


def test_where_all_nodes_are_open_a_refused_set_names_the_capability(node: EnforcerNode) -> None:
    node.gpus[0].fault("nvmlDeviceSetPowerManagementLimit", error=4)
    wrapped(node, "true")
    node.run_pod(A)
    node.snapshot({A: 300})
    assert "CAP_SYS_ADMIN" in node.gpu().reason
    assert doctor(node)["device nodes"]["result"] == "ok"


def test_a_container_that_has_lost_its_devices_says_so(node: EnforcerNode) -> None:
    wrapped(node, LOST.format("nvidiactl"))
    until(lambda: node.status().enforcer.nvml == "failing", "failing")
    said = node.status().enforcer.nvml_message
    assert "UNKNOWN" in said
    assert "systemctl daemon-reload" in said
    found = doctor(node)
    for name in ("device nodes", "NVML"):
        assert found[name]["result"] == "fail"
        assert "systemctl daemon-reload" in found[name]["seen"] + found[name]["remedy"]
        assert "new container" in found[name]["seen"] + found[name]["remedy"]
