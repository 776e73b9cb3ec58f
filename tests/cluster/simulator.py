"""Puts simulated GPUs on the cluster's node, and looks at them from outside."""

from __future__ import annotations

import base64
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import simulator_pod
from tests.cluster.cluster import Cluster, Object
from tests.cluster.waiting import wait_for
from tests.simnode import gpus as sim_gpus
from tests.simnode.gpus import SetRecord
from tests.simnode.nvml import SONAME, build_library

NAMESPACE = "simulated-gpus"
POD = "driver"
# On the node. The enforcer mounts the two folders below it, and nothing else does.
PLACE = "/var/lib/simulated-gpus"
LIBRARY, STATE = f"{PLACE}/lib", f"{PLACE}/state"
MODEL = "H100"

_MODULES = {
    "tests/cluster/simulator_pod.py": Path(simulator_pod.__file__),
    "tests/simnode/gpus.py": Path(sim_gpus.__file__),
    "tests/simnode/nvml/__init__.py": Path(sim_gpus.__file__).parent / "nvml/__init__.py",
}


def objects(image: str, count: int) -> list[Object]:
    """Namespace, code and pod."""
    metadata = {"namespace": NAMESPACE, "name": "simulator"}
    code = {name.replace("/", "."): path.read_text() for name, path in _MODULES.items()}
    library = base64.b64encode((build_library() / SONAME).read_bytes()).decode()
    container = {
        "name": "driver",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-B", "-m", "tests.cluster.simulator_pod", str(count), MODEL],
        "workingDir": "/simulator",
        "securityContext": {"privileged": True, "runAsUser": 0, "runAsGroup": 0},
        "readinessProbe": {"exec": {"command": ["cat", "/tmp/ready"]}, "periodSeconds": 1},
        "volumeMounts": [
            {"name": "code", "mountPath": "/simulator"},
            {"name": "node", "mountPath": str(simulator_pod.NODE)},
        ],
    }
    paths = [{"key": name.replace("/", "."), "path": name} for name in _MODULES]
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

    def _shell(self, command: str) -> str:
        return self.cluster.kubectl("exec", "-n", NAMESPACE, POD, "--", "sh", "-c", command)

    def _read(self, file: str) -> str:
        if self.local is not None:
            return (self.local / "state" / file).read_text()
        return self._shell(f"cat {shlex.quote(f'{simulator_pod.NODE}/state/{file}')}")

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
        self._shell(f"echo {value} >{place}/.other && mv {place}/.other {place}/limit_mw")

    def kill(self, pod_uid: str) -> None:
        """SIGKILL, as the kernel gives it, to every process of a pod that uses a GPU."""
        code = (
            "import os, pathlib\n"
            "for p in pathlib.Path('/proc').glob('[0-9]*'):\n"
            "    try:\n"
            f"        if b'SIM_GPUS=' in (p / 'environ').read_bytes() and "
            f"b'pod{pod_uid}' in (p / 'cgroup').read_bytes():\n"
            "            os.kill(int(p.name), 9)\n"
            "    except OSError: pass\n"
        )
        self.cluster.kubectl("exec", "-n", NAMESPACE, POD, "--", "python3", "-c", code)

    def sets(self, index: int) -> list[SetRecord]:
        """Every write to this GPU since the beginning, in order: nothing is missed between looks."""
        own = self.uuid(index)
        found = []
        for line in self._read("sets.log").splitlines():
            wall, monotonic, pid, uuid, requested, result = line.split()
            if uuid == own:
                found.append(
                    SetRecord(int(wall), int(monotonic), int(pid), uuid, int(requested), int(result))
                )
        return found

    def wait_limit(self, index: int, expected_mw: int, timeout_s: float = 15.0) -> None:
        wait_for(
            lambda: self.limit_mw(index) == expected_mw,
            timeout_s,
            f"GPU {index} at {expected_mw} mW",
            on_timeout=lambda: f"it has {self.limit_mw(index)} mW\n{self.cluster.logs()}",
        )


def install(cluster: Cluster, image: str, *, count: int = 4, local: Path | None = None) -> Gpus:
    cluster.apply(*objects(image, count))
    cluster.kubectl("wait", "-n", NAMESPACE, f"pod/{POD}", "--for=condition=Ready",
                    "--timeout=60s")  # fmt: skip
    return Gpus(cluster, count, local)


def uninstall(cluster: Cluster) -> None:
    """Away from the cluster, and from its node."""
    place = str(simulator_pod.NODE)
    cluster.run("exec", "-n", NAMESPACE, POD, "--", "sh", "-c", f"rm -rf {place}/lib {place}/state")
    cluster.run("delete", "namespace", NAMESPACE)
