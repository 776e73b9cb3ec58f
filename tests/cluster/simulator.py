"""Puts simulated GPUs on the cluster's node, and looks at them from outside."""

from __future__ import annotations

import base64
import shlex
import subprocess
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from tests.cluster import simulator_pod
from tests.cluster.cluster import Cluster, KubectlError, Object
from tests.simnode.gpus import SetRecord
from tests.simnode.nvml import SONAME, build_library
from tests.waiting import SLOWNESS, until

NAMESPACE = "simulated-gpus"
POD = "driver"
# On the node. The enforcer mounts the two folders below it, and nothing else does.
PLACE = "/var/lib/simulated-gpus"
LIBRARY_FILE, STATE = f"{PLACE}/lib/{SONAME}", f"{PLACE}/state"
MODEL = "H100"

_ROOT = Path(__file__).resolve().parents[2]
# Prints the files of this tree that the driver's program imports.
_FIND_MODULES = """
import sys, tests.cluster.simulator_pod
for name, module in sys.modules.items():
    if name.partition(".")[0] == "tests":
        print(module.__file__)
"""
# Run in the driver's pod; `@` stands for the zero byte, which no argument can hold. The systemd
# driver of cgroups writes a pod's uid with `_` for `-`, so the two count as the same.
_FIND_PROCESSES = """
import pathlib, sys
def same(text):
    return text.replace(b"-", b"_")
words = [same(word.replace("@", chr(0)).encode()) for word in sys.argv[1:]]
wanted = list(zip(sys.argv[1::2], words[1::2]))
for entry in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        if all(text in same((entry / file).read_bytes()) for file, text in wanted):
            print(entry.name)
    except OSError:
        pass
"""
_GET = """
import sys, urllib.error, urllib.request
try:
    answer = urllib.request.urlopen(sys.argv[1], timeout=float(sys.argv[2]))
except urllib.error.HTTPError as error:
    answer = error
print(answer.status)
print(answer.read().decode())
"""


def _modules() -> list[str]:
    found = subprocess.run(
        [sys.executable, "-c", _FIND_MODULES], cwd=_ROOT, capture_output=True, text=True, check=True
    )
    return [str(Path(file).relative_to(_ROOT)) for file in found.stdout.splitlines()]


def objects(image: str, count: int) -> list[Object]:
    """Namespace, code and pod."""
    metadata = {"namespace": NAMESPACE, "name": "simulator"}
    modules = _modules()
    code = {name.replace("/", "."): (_ROOT / name).read_text() for name in modules}
    library = base64.b64encode((build_library() / SONAME).read_bytes()).decode()
    container = {
        "name": "driver",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-B", "-m", "tests.cluster.simulator_pod", str(count), MODEL],
        "workingDir": "/simulator",
        "securityContext": {"privileged": True, "runAsUser": 0, "runAsGroup": 0},
        # Asked until it is there, and no more: an exec each second is all that a slow node can do.
        "startupProbe": {
            "exec": {"command": ["cat", "/tmp/ready"]},
            "periodSeconds": 1,
            "timeoutSeconds": ceil(SLOWNESS),
            "failureThreshold": ceil(60 * SLOWNESS),
        },
        "volumeMounts": [
            {"name": "code", "mountPath": "/simulator"},
            {"name": "node", "mountPath": str(simulator_pod.NODE)},
        ],
    }
    paths = [{"key": name.replace("/", "."), "path": name} for name in modules]
    spec = {
        "hostPID": True,
        "containers": [container],
        "tolerations": [{"operator": "Exists"}],
        "nodeSelector": {"nvidia.com/gpu.present": "true"},
        "terminationGracePeriodSeconds": 0,
        "volumes": [
            {
                "name": "code",
                "configMap": {
                    "name": "simulator",
                    "items": [*paths, {"key": SONAME, "path": SONAME}],
                },
            },
            {"name": "node", "hostPath": {"path": PLACE, "type": "DirectoryOrCreate"}},
        ],
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": NAMESPACE,
                "labels": {"pod-security.kubernetes.io/enforce": "privileged"},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": code,
            "binaryData": {SONAME: library},
        },
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"namespace": NAMESPACE, "name": POD},
            "spec": spec,
        },
    ]


@dataclass(frozen=True)
class Gpus:
    """What the hardware remembers, read through the driver's pod or, faster, from `local`."""

    cluster: Cluster
    count: int
    local: Path | None = None

    def shell(self, command: str) -> str:
        """On the node, as root, with its processes in sight."""
        return self.cluster.kubectl("exec", "-n", NAMESPACE, POD, "--", "sh", "-c", command)

    def _read(self, file: str) -> str:
        if self.local is not None:
            return (self.local / "state" / file).read_text()
        return self.shell(f"cat {shlex.quote(f'{simulator_pod.NODE}/state/{file}')}")

    def limit_mw(self, index: int) -> int:
        return int(self._read(f"gpu{index}/limit_mw"))

    def limits_mw(self) -> list[int]:
        return [self.limit_mw(index) for index in range(self.count)]

    def uuid(self, index: int) -> str:
        return self._read(f"gpu{index}/uuid").strip()

    def default_mw(self, index: int) -> int:
        return int(self._read(f"gpu{index}/default_mw"))

    def change_mw(self, index: int, value: int) -> None:
        """As another program of the host would, behind the agent's back."""
        place = f"{simulator_pod.NODE}/state/gpu{index}"
        self.shell(f"echo {value} >{place}/.other && mv {place}/.other {place}/limit_mw")

    def write_on_node(self, path: str, text: str) -> None:
        """A file of the node, all at once. Its name must not begin with a dot."""
        folder, _, name = f"/proc/1/root{path}".rpartition("/")
        fresh = f"{folder}/.{name}"
        self.shell(f"echo {shlex.quote(text)} >{fresh} && mv {fresh} {folder}/{name}")

    def remove_on_node(self, path: str) -> None:
        self.shell(f"rm -f /proc/1/root{path}")

    def kill(self, pod_uid: str) -> None:
        """SIGKILL to every process of a pod that uses a GPU."""
        for pid in self.processes_of(pod_uid):
            self.shell(f"kill -9 {pid}")

    def processes_of(self, pod_uid: str) -> list[int]:
        """Those that use a GPU and whose cgroup shows this pod."""
        return self._processes("cgroup", f"pod{pod_uid}", "environ", "SIM_GPUS=")

    def programs(self, name: str) -> list[int]:
        """Pids of the running enforcers or watchers, as the node numbers them."""
        return self.pids_of(f"-m\0{name}\0")

    def pids_of(self, command: str) -> list[int]:
        """Those whose command line contains this."""
        return self._processes("cmdline", command)

    def signal_program(self, name: str, signal: str) -> None:
        (pid,) = self.programs(name)
        self.shell(f"kill -{signal} {pid}")

    def kill_program(self, name: str) -> None:
        self.signal_program(name, "KILL")

    def _processes(self, *conditions: str) -> list[int]:
        """Those whose files in /proc contain the given text: file, text, file, text ..."""
        printed = self.cluster.kubectl(
            "exec", "-n", NAMESPACE, POD, "--", "python3", "-c", _FIND_PROCESSES,
            *(text.replace("\0", "@") for text in conditions),
        )  # fmt: skip
        return [int(pid) for pid in printed.split()]

    def http(self, url: str) -> tuple[int, str]:
        """What an HTTP server inside the cluster answers."""
        printed = self.cluster.kubectl(
            *("exec", "-n", NAMESPACE, POD, "--", "python3", "-c", _GET, url, str(5 * SLOWNESS))
        )
        status, _, text = printed.partition("\n")
        return int(status), text

    def sets(self, index: int) -> list[SetRecord]:
        """Every write to this GPU since the beginning: nothing is missed between two looks."""
        own = self.uuid(index)
        found = []
        for line in self._read("sets.log").splitlines():
            wall, monotonic, pid, uuid, *numbers = line.split()
            if uuid == own:
                requested, result = map(int, numbers)
                found.append(
                    SetRecord(int(wall), int(monotonic), int(pid), uuid, requested, result)
                )
        return found

    def wait_limit(self, index: int, expected_mw: int, timeout_s: float = 15.0) -> None:
        until(
            lambda: self.limit_mw(index) == expected_mw,
            f"GPU {index} at {expected_mw} mW",
            deadline_s=timeout_s,
            explain=lambda: f"it has {self.limit_mw(index)} mW\n{self.cluster.logs()}",
        )


def install(cluster: Cluster, image: str, *, count: int = 4, local: Path | None = None) -> Gpus:
    cluster.apply(*objects(image, count))
    try:
        cluster.kubectl("wait", "-n", NAMESPACE, f"pod/{POD}", "--for=condition=Ready",
                        "--timeout=60s")  # fmt: skip
    except KubectlError as error:
        said = cluster.run("logs", "-n", NAMESPACE, POD).stdout.decode(errors="replace")
        raise KubectlError(f"{error}\nits log:\n{said}\n{cluster.logs()}") from None
    return Gpus(cluster, count, local)


def uninstall(cluster: Cluster) -> None:
    """Away from the cluster, and from its node."""
    place = str(simulator_pod.NODE)
    cluster.run("exec", "-n", NAMESPACE, POD, "--", "sh", "-c", f"rm -rf {place}/lib {place}/state")
    cluster.run("delete", "namespace", NAMESPACE)
