"""What the enforcer holds as it runs, compared with the list in docs/threat-model.md."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shared.sockets import control_path
from tests.node.enforcer_harness import REPOSITORY, EnforcerNode, pod_uid
from tests.simnode.programs import descriptors_of
from tests.waiting import HANG_S

CAPABILITIES = {"CAP_SYS_ADMIN": 21}  # linux/capability.h
A = pod_uid(1)


def documented() -> dict[str, str]:
    text = (REPOSITORY / "docs/threat-model.md").read_text()
    block = re.search(r"```privileges\n(.*?)```", text, re.DOTALL)
    assert block
    return dict(line.split(": ", 1) for line in block[1].splitlines())


def status_of_threads(pid: int) -> list[dict[str, str]]:
    return [
        dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        for task in Path(f"/proc/{pid}/task").iterdir()
    ]


def kept_open(pid: int) -> set[str]:
    """What it has opened for good; a scan opens files of /proc for a moment."""
    looks = [descriptors_of(pid) for _ in range(20)]
    return set.intersection(*({to for fd, to in look.items() if fd > 2} for look in looks))


def internet_inodes(pid: int) -> set[str]:
    """Sockets of the process's network namespace that speak TCP, UDP or raw IP."""
    found = set()
    for name in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "icmp", "icmp6", "packet"):
        table = Path(f"/proc/{pid}/net/{name}")
        if table.exists():
            column = 8 if name == "packet" else 9
            found |= {line.split()[column] for line in table.read_text().splitlines()[1:]}
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has anything to give up")
def test_i7_every_thread_holds_the_documented_capabilities_only() -> None:
    kept = sum(1 << CAPABILITIES[name] for name in documented()["capabilities"].split())
    with EnforcerNode() as node:
        node.start()
        threads = status_of_threads(node.pid)
        assert len(threads) > 1  # libzmq's own as well
        for status in threads:
            for name in ("CapPrm", "CapEff", "CapBnd"):
                assert int(status[name], 16) == kept, (status["Name"], name)
            assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0


def test_i7_no_new_privileges_and_no_core_dumps() -> None:
    with EnforcerNode() as node:
        node.start()
        assert documented()["no-new-privs"] == "yes"
        assert all(status["NoNewPrivs"] == "1" for status in status_of_threads(node.pid))
        limits = Path(f"/proc/{node.pid}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits)
        assert re.search(r"Max data size +\d+ +\d+ ", limits)


def with_ulimit(node: EnforcerNode, command: str) -> None:
    """Start its enforcers behind that, and without the power to raise a hard limit again."""
    drop = "setpriv --bounding-set -sys_resource --inh-caps -sys_resource"
    keep = drop if os.geteuid() == 0 else ""
    node.wrapped_in = ["sh", "-c", f'{command} && exec {keep} "$@"', "sh"]


@pytest.mark.parametrize(
    ("command", "files"),
    [
        pytest.param("ulimit -S -n 256", 4608, id="raised"),
        pytest.param("true", 4608, id="as it comes"),
        pytest.param("ulimit -n 4096", 4096, id="a lower hard limit"),
        pytest.param("ulimit -n 128", 128, id="very few"),
    ],
)
def test_as_many_files_as_it_needs_may_be_open(command: str, files: int) -> None:
    """Both limits: NVML's RPC client allocates and touches 52 bytes for each that might be."""
    with EnforcerNode() as node:
        with_ulimit(node, command)
        node.start()
        limits = Path(f"/proc/{node.pid}/limits").read_text()
        found = re.search(r"Max open files +(\d+) +(\d+) ", limits)
        assert found
        assert [int(number) for number in found.groups()] == [files, files]
        said = node.logs("few_files")
        assert len(said) == (files < 4608)
        assert all(str(files) in line["why"] and "LimitNOFILE" in line["why"] for line in said)


def test_where_few_files_may_be_open_it_takes_few_connections_and_lives() -> None:
    """libzmq ends the process where accept finds no descriptor."""
    with EnforcerNode() as node, contextlib.ExitStack() as idle:
        with_ulimit(node, "ulimit -n 128")
        node.start()
        for _ in range(30):
            sock = idle.enter_context(socket.socket(socket.AF_UNIX))
            with contextlib.suppress(OSError):  # dropped with the others, or too soon after that
                sock.connect(str(control_path(node.run_dir)))
        assert node.status().counters.refused_connections > 0
        assert len(descriptors_of(node.pid)) < 64


def test_i7_no_internet_socket_no_child_and_only_the_documented_files() -> None:
    with EnforcerNode() as node:
        node.start()
        node.run_pod(A)
        node.snapshot({A: 300})
        assert node.limit() == 300
        held = kept_open(node.pid)
        sockets = {match[1] for name in held if (match := re.match(r"socket:\[(\d+)\]", name))}
        assert sockets
        assert documented()["internet sockets"] == "none"
        assert not sockets & internet_inodes(node.pid)
        files = {name for name in held if name.startswith("/")}
        files -= {str(node.gpus.directory)}  # the simulated driver's, as /dev/nvidia* would be
        assert documented()["files"] == "ledger directory, its lock"
        assert files == {str(node.state_dir), f"{node.state_dir}/lock"}
        children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text()
        assert documented()["processes started"] == "none"
        assert not children.split()


def test_i7_no_other_package_than_documented_is_loaded() -> None:
    code = (
        "import sys, enforcer.__main__; sys.stdout.write(' '.join({m.split('.')[0] "
        "for m in sys.modules} - set(sys.stdlib_module_names)))"
    )
    command = [sys.executable, "-S", "-c", code]
    paths = os.pathsep.join(path for path in sys.path if path)
    answer = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={"PYTHONPATH": paths},
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = {name for name in answer.stdout.split() if not name.startswith("_")}
    assert loaded - {"typing_extensions"} == set(documented()["packages"].split())


@pytest.mark.parametrize("supervised", ["false", "true"])
def test_i7_a_token_in_the_enforcers_own_container_is_refused(
    supervised: str, tmp_path: Path
) -> None:
    """The token's place is fixed, so a mount namespace of its own gets one there."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    folder = "/var/run/secrets/kubernetes.io/serviceaccount"
    script = (
        f"mount -t tmpfs none /var/run && mkdir -p {folder} && echo secret > {folder}/token && "
        f"exec {sys.executable} -m enforcer"
    )
    environment = os.environ | {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "POWER_AGENT_SUPERVISED": supervised,
        "POWER_AGENT_RUN_DIR": str(tmp_path / "run"),
        "POWER_AGENT_STATE_DIR": str(tmp_path / "state"),
        "POWER_AGENT_PROC_ROOT": "/proc/self/root/proc",  # not /proc: no check at start
    }
    # Supervised it runs on until it is told to stop; else it ends by itself.
    end_s = "8" if supervised == "true" else f"{HANG_S:g}"
    command = ["timeout", "-s", "TERM", end_s, "unshare", "--mount", "sh", "-c", script]
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if "unshare" in ended.stderr or "mount:" in ended.stderr:
        pytest.skip(f"no mount namespace here: {ended.stderr.strip()}")
    if supervised == "true":
        assert "token_readable" in ended.stdout
    else:
        assert ended.returncode == 2
        assert "automountServiceAccountToken: false" in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
