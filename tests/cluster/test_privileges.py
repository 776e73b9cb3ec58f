"""The boundary between the two containers, seen from inside each of them."""

from __future__ import annotations

import pytest

from tests.cluster.agent import Agent
from tests.cluster.conftest import MakeWorker
from tests.cluster.simulator import Gpus

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

TOKEN = "var/run/secrets/kubernetes.io/serviceaccount/token"
ENFORCER = ("/opt/power-agent/enforcer/bin/python", "-I", "-c")
WATCHER = ("/opt/power-agent/watcher/bin/python", "-I", "-c")


def status_field(gpus: Gpus, program: str, field: str) -> str:
    """A line of /proc/<pid>/status of the running program."""
    (pid,) = gpus.programs(program)
    lines = gpus.shell(f"cat /proc/{pid}/status").splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{field}:"))


def test_no_token_is_mounted_into_the_enforcer(agent: Agent) -> None:
    mounts = {
        container["name"]: {mount["mountPath"] for mount in container["volumeMounts"]}
        for container in agent.pod()["spec"]["containers"]
    }
    assert "/var/run/secrets/kubernetes.io/serviceaccount" in mounts["watcher"]
    assert not any("secrets" in path for path in mounts["enforcer"])
    assert agent.exec("enforcer", "test", "-e", f"/{TOKEN}").returncode == 1
    assert agent.exec("watcher", "test", "-r", f"/{TOKEN}").returncode == 0


def test_the_enforcer_cannot_reach_the_token_through_the_watchers_root(
    agent: Agent, gpus: Gpus
) -> None:
    """It sees the watcher's process (hostPID); what it holds of root does not open the file."""
    (watcher,) = gpus.programs("watcher")
    # Not /var/run: that is a link, which would lead to the reader's own /run.
    path = f"/proc/{watcher}/root/{TOKEN.removeprefix('var/')}"
    reading = f"print(len(open('{path}').read()))"
    assert agent.exec("enforcer", *ENFORCER, reading).returncode == 0  # root as kubelet starts it
    done = agent.exec(
        "enforcer", *ENFORCER, f"from enforcer import privileges; privileges.drop(); {reading}"
    )
    assert done.returncode == 1
    assert b"PermissionError" in done.stderr


@pytest.mark.usefixtures("agent")
def test_the_running_enforcer_holds_one_capability_and_can_gain_none(gpus: Gpus) -> None:
    cap_sys_admin = f"{1 << 21:016x}"
    for field in ("CapEff", "CapPrm", "CapBnd"):
        assert status_field(gpus, "enforcer", field) == cap_sys_admin
    assert status_field(gpus, "enforcer", "NoNewPrivs") == "1"


@pytest.mark.usefixtures("agent")
def test_the_running_watcher_is_nobody_with_nothing(gpus: Gpus) -> None:
    assert status_field(gpus, "watcher", "Uid").split() == ["65532"] * 4
    for field in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"):
        assert int(status_field(gpus, "watcher", field), 16) == 0
    assert status_field(gpus, "watcher", "NoNewPrivs") == "1"
    assert status_field(gpus, "watcher", "Seccomp") == "2"


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("import ctypes; ctypes.CDLL('libnvidia-ml.so.1')", b"OSError"),
        ("import pynvml", b"ModuleNotFoundError"),
        ("open('/var/lib/power-agent/ledger.json')", b"PermissionError"),
        ("open('/proc/{enforcer}/root/var/lib/power-agent/ledger.json')", b"PermissionError"),
        ("open('/proc/{enforcer}/mem', 'rb')", b"PermissionError"),
        ("open('/run/power-agent/x', 'w')", b"OSError"),
        ("import os; os.rename('/run/power-agent/control.sock', '/run/power-agent/x')", b"OSError"),
        ("import os; os.kill({enforcer}, 9)", b"PermissionError"),
        ("open('/x', 'w')", b"OSError"),
    ],
    ids=[
        "NVML",
        "its-binding",
        "ledger",
        "ledger-through-proc",
        "memory",
        "a-file-beside-the-socket",
        "the-socket-itself",
        "signal",
        "own-root",
    ],
)
def test_the_watcher_cannot_reach(
    what: str, error: bytes, agent: Agent, gpus: Gpus, make_worker: MakeWorker
) -> None:
    if "ledger" in what:
        make_worker("recorded", 0, watts="300")  # there is a ledger
        gpus.wait_limit(0, 300_000)
    (enforcer,) = gpus.programs("enforcer")
    done = agent.exec("watcher", *WATCHER, what.replace("{enforcer}", str(enforcer)))
    assert done.returncode == 1
    assert error in done.stderr


def test_the_watcher_sees_no_device_of_a_gpu(agent: Agent) -> None:
    listed = agent.exec("watcher", *WATCHER, "import os; print(*os.listdir('/dev'))")
    assert listed.returncode == 0
    assert b"nvidia" not in listed.stdout
    assert b"kmsg" not in listed.stdout  # nor any other of the host's


def test_the_watcher_may_ask_and_a_worker_pod_has_no_way_to_the_socket(
    agent: Agent, make_worker: MakeWorker
) -> None:
    assert agent.exec("watcher", "powerctl", "ping").returncode == 0
    make_worker("stranger", 0)
    there = agent.cluster.run("exec", "stranger", "--", "ls", "-A", "/run/power-agent")
    assert there.stdout == b""
