"""A cluster as an administrator has it: kubectl, and what can be seen with it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.waiting import SLOWNESS, until

Object = dict[str, Any]


class KubectlError(Exception):
    """kubectl failed; the text is its own."""


@dataclass(frozen=True)
class Cluster:
    """`command` makes a full command line of kubectl's arguments."""

    command: Callable[..., list[str]]
    kubeconfig: Path
    logs: Callable[[], str] = str

    def run(
        self, *arguments: str, stdin: str | bytes = b"", timeout_s: float = 90.0
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.command(*(patient(each, SLOWNESS) for each in arguments)),
            env=os.environ | {"KUBECONFIG": str(self.kubeconfig)},
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            timeout=timeout_s * SLOWNESS,
            check=False,
        )

    def kubectl(self, *arguments: str, stdin: str | bytes = b"", timeout_s: float = 90.0) -> str:
        done = self.run(*arguments, stdin=stdin, timeout_s=timeout_s)
        if done.returncode != 0:
            raise KubectlError(
                f"kubectl {' '.join(arguments)}: {done.returncode}\n"
                f"{done.stdout.decode(errors='replace')}{done.stderr.decode(errors='replace')}"
            )
        return done.stdout.decode(errors="replace")

    def apply(self, *objects: Object) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"kind": "List", "apiVersion": "v1",
                                                            "items": objects}))  # fmt: skip

    def get(self, *arguments: str) -> Object:
        found: Object = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def items(self, *arguments: str) -> list[Object]:
        listed: list[Object] = self.get(*arguments)["items"]
        return listed

    def gone(self, kind: str, name: str, namespace: str = "default") -> bool:
        return not self.kubectl("get", kind, name, "-n", namespace, "--ignore-not-found")


def patient(argument: str, factor: float) -> str:
    """The argument of kubectl, a time-out so many times longer."""
    option, _, seconds = argument.partition("=")
    if option != "--timeout":
        return argument
    return f"{option}={float(seconds.removesuffix('s')) * factor:g}s"


# ---------------------------------------------------------------------- worker pods


def worker(
    name: str,
    gpus: Sequence[int],
    image: str,
    *,
    annotations: Mapping[str, str] | None = None,
    command: Sequence[str] = ("/bin/sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"),
) -> Object:
    """A pod whose processes use GPUs, and end when they are told to."""
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": list(command),
        "env": [{"name": "SIM_GPUS", "value": ",".join(map(str, gpus))}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "annotations": dict(annotations or {})},
        "spec": {
            "containers": [container],
            "terminationGracePeriodSeconds": 5,
            "tolerations": [{"operator": "Exists"}],
            "automountServiceAccountToken": False,
        },
    }


def wait_for_pod(cluster: Cluster, name: str, timeout_s: float = 60.0) -> None:
    cluster.kubectl("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={timeout_s}s")


def wait_gone(cluster: Cluster, kind: str, name: str, timeout_s: float = 60.0) -> None:
    until(lambda: cluster.gone(kind, name), f"{kind} {name} to be gone", deadline_s=timeout_s)
