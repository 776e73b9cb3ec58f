"""Installs Power Agent from its manifests as an administrator does, plus the simulated NVML."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import yaml

from tests.cluster import simulator
from tests.cluster.cluster import Cluster, Object
from tests.simnode.nvml import SONAME
from tests.waiting import SLOWNESS, until

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "deploy/power_agent/daemonset.yaml"
NAMESPACE, NAME = "dynamo-system", "power-agent"
ANNOTATION = "dynamo.nvidia.com/gpu-power-limit"
LEDGER = "/var/lib/power-agent/ledger.json"


def simulated_nvml(container: str = "enforcer", env: Mapping[str, str] | None = None) -> Object:
    """The patch that gives one container the simulated library, as NVIDIA's runtime would."""
    variables = {"SIM_NVML_DIR": "/simulated/state"} | dict(env or {})
    spec = {
        "containers": [
            {
                "name": container,
                "env": [{"name": name, "value": value} for name, value in variables.items()],
                "volumeMounts": [
                    # The loader looks there by itself. LD_LIBRARY_PATH it does not heed where
                    # SELinux changed the process's type (AT_SECURE, ld.so(8)).
                    {
                        "name": "simulated-lib",
                        "mountPath": f"/usr/lib/{SONAME}",
                        "readOnly": True,
                    },
                    {"name": "simulated-state", "mountPath": "/simulated/state"},
                ],
            }
        ],
        "volumes": [
            {"name": "simulated-lib", "hostPath": {"path": simulator.LIBRARY_FILE}},
            {"name": "simulated-state", "hostPath": {"path": simulator.STATE}},
        ],
    }
    return pod_patch(spec)


def pod_patch(spec: Object) -> Object:
    """A patch of the pod's specification."""
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": NAME, "namespace": NAMESPACE},
        "spec": {"template": {"spec": spec}},
    }


def patient_probes(manifests: str, factor: float) -> str:
    """The same with more patient probes; a kubelet takes only whole numbers."""
    if factor == 1:
        return manifests
    documents = list(yaml.safe_load_all(manifests))
    for document in documents:
        template = document.get("spec", {}).get("template", {})
        for container in template.get("spec", {}).get("containers", []):
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                if name in container:
                    _make_patient(name, container[name], factor)
    return yaml.safe_dump_all(documents)


def _make_patient(name: str, probe: Object, factor: float) -> None:
    probe["timeoutSeconds"] = ceil(probe.get("timeoutSeconds", 1) * factor)
    if name == "startupProbe":
        probe["failureThreshold"] = ceil(probe.get("failureThreshold", 3) * factor)
    elif "exec" in probe:
        # Each costs the runtime seconds of an emulated node's processor.
        probe["periodSeconds"] = ceil(probe.get("periodSeconds", 10) * factor)


RUNTIME_CLASS: Object = {
    # What the GPU Operator makes on a cluster of real GPUs.
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "nvidia"},
    "handler": "runc",
}


@dataclass
class Agent:
    """The agent on a cluster."""

    cluster: Cluster
    image: str
    source: Path = MANIFEST
    env: dict[str, str] = field(default_factory=dict)
    container: str = "enforcer"

    def kustomize(self, *patches: Object, image: str | None = None) -> str:
        """The manifest, or an overlay's folder, with what the test's node needs."""
        name, _, tag = (image or self.image).rpartition(":")
        with tempfile.TemporaryDirectory(prefix="power-agent-overlay-") as folder:
            all_patches = (simulated_nvml(self.container, self.env), *patches)
            for number, patch in enumerate(all_patches):
                (Path(folder) / f"patch{number}.json").write_text(json.dumps(patch))
            overlay = {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [str(_relative(self.source, Path(folder)))],
                "patches": [{"path": f"patch{number}.json"} for number in range(len(all_patches))],
                "images": [{"name": "dynamo/power-agent", "newName": name, "newTag": tag}],
            }
            (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
            rendered = self.cluster.kubectl(
                "kustomize", "--load-restrictor=LoadRestrictionsNone", folder
            )
        if not name.startswith("docker.io/dynamo/"):  # of a registry, from which the node may pull
            rendered = rendered.replace("imagePullPolicy: Never", "imagePullPolicy: IfNotPresent")
        return patient_probes(rendered, SLOWNESS)

    def deploy(self, *patches: Object, image: str | None = None, wait: bool = True) -> None:
        self.cluster.kubectl("apply", "-f", "-", stdin=self.kustomize(*patches, image=image))
        if wait:
            self.wait_rolled_out()

    def wait_rolled_out(self, timeout_s: float = 120.0) -> None:
        self.cluster.kubectl(
            *("rollout", "status", f"daemonset/{NAME}", "-n", NAMESPACE),
            f"--timeout={timeout_s}s",
            timeout_s=timeout_s + 10,
        )

    def is_installed(self) -> bool:
        return not self.cluster.gone("daemonset", NAME, NAMESPACE)

    def delete(self) -> None:
        """`kubectl delete -f`: namespace, roles and all; returns when nothing of it is left."""
        self.cluster.kubectl(
            *("delete", "--ignore-not-found", "--wait", "-f", "-"),
            stdin=self.kustomize(),
            timeout_s=120,
        )

    # ------------------------------------------------------------------ looking

    def pods(self) -> list[Object]:
        return self.cluster.items("pods", "-n", NAMESPACE, "-l", f"app={NAME}")

    def pod(self) -> Object:
        """The one that is not on its way out."""
        living = [pod for pod in self.pods() if "deletionTimestamp" not in pod["metadata"]]
        assert len(living) == 1, [pod["metadata"]["name"] for pod in living]
        return living[0]

    @property
    def pod_name(self) -> str:
        name: str = self.pod()["metadata"]["name"]
        return name

    def container_status(self, container: str) -> Object:
        """Of a pod that the kubelet has not told of yet: one that never ran."""
        statuses: list[Object] = self.pod()["status"].get("containerStatuses", [])
        unknown: Object = {"restartCount": 0, "ready": False, "lastState": {}}
        return next((each for each in statuses if each["name"] == container), unknown)

    def restarts(self, container: str) -> int:
        count: int = self.container_status(container)["restartCount"]
        return count

    def exec(self, container: str, *command: str) -> subprocess.CompletedProcess[bytes]:
        return self.cluster.run(
            "exec", "-n", NAMESPACE, self.pod_name, "-c", container, "--", *command
        )

    def status(self) -> Object:
        """`kubectl exec POD -- powerctl status --json`, in the default container."""
        done = self.cluster.run(
            "exec", "-n", NAMESPACE, self.pod_name, "--", "powerctl", "status", "--json"
        )
        found: Object = json.loads(done.stdout)
        return found

    def log(self, container: str, *options: str) -> str:
        return self.cluster.kubectl(
            "logs", "-n", NAMESPACE, "-l", f"app={NAME}", "-c", container, "--tail=-1", *options
        )

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        def ready() -> bool:
            statuses = self.pod()["status"].get("containerStatuses", [])
            return bool(statuses) and all(status["ready"] for status in statuses)

        until(ready, "the agent's pod to be ready", deadline_s=timeout_s, explain=self.described)

    def described(self) -> str:
        return "\n".join(
            [
                self.cluster.run("describe", "pods", "-n", NAMESPACE).stdout.decode(),
                self.cluster.run(
                    *("logs", "-n", NAMESPACE, "-l", f"app={NAME}", "--all-containers"),
                    *("--prefix", "--tail=20"),
                ).stdout.decode(),
            ]
        )


def _relative(path: Path, folder: Path) -> Path:
    """Kustomize takes only relative paths to files."""
    ups = len(folder.resolve().parts) - 1
    return Path(*[".."] * ups, *path.resolve().parts[1:])


def annotate(cluster: Cluster, pod: str, watts: str | None, namespace: str = "default") -> None:
    change: Sequence[str] = [f"{ANNOTATION}-" if watts is None else f"{ANNOTATION}={watts}"]
    cluster.kubectl("annotate", "--overwrite", "pod", pod, "-n", namespace, *change)
