"""Runs in a box: the image in each of its three ways, on a simulated node, by podman.

The options are those that the Dockerfile's head and the manifest declare.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tests.simnode.node import SimNode

PYTHON = "/opt/power-agent/{}/bin/python"
WATCHER = ("--cap-drop=all", "--security-opt=no-new-privileges")  # its command is the default one
AS_ROOT = ("--user=0", "--pid=host")
PRIVILEGED = (*AS_ROOT, "--privileged")
REDUCED = (*AS_ROOT, "--cap-drop=all", "--cap-add=sys_admin", "--security-opt=no-new-privileges")
ENFORCER = (PYTHON.format("enforcer"), "-I", "-m", "enforcer")
SUPERVISED = ("supervisord", "-c", "supervisord.conf")
_IMAGES_OWN = ("PATH", "LANG", "POWER_AGENT_RUN_DIR", "POWER_AGENT_STATE_DIR")


@dataclass(frozen=True)
class Podman:
    """Images from the builder's store, which is only read; all else on the box's own disk."""

    store: str
    image: str

    def command(self, *arguments: str) -> list[str]:
        return [
            "podman",
            "--root=/var/lib/containers",
            "--runroot=/run/containers",
            "--storage-driver=overlay",
            f"--storage-opt=additionalimagestore={self.store}",
            "--cgroup-manager=cgroupfs",
            "--runtime=runc",
            "--events-backend=none",
            *arguments,
        ]

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"podman {' '.join(arguments)}: {done.returncode}\n{done.stderr}")
        return done

    def start(
        self,
        name: str,
        node: SimNode,
        options: Sequence[str],
        command: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        self.run(
            *(
                "run",
                "--detach",
                "--read-only",
                "--read-only-tmpfs=false",
                "--network=host",
                f"--name={name}",
            ),
            # The image's own health check, by hand: no systemd timer is here to run it.
            "--health-interval=disable",
            f"--volume={node.folder}:{node.folder}",
            f"--volume={node.run_dir}:/run/power-agent",
            f"--volume={node.state_dir}:/var/lib/power-agent",
            *(f"--volume={place}:{place}:ro" for place in _library_folders(environment)),
            *(f"--env={key}={value}" for key, value in environment.items()),
            *options,
            self.image,
            *command,
        )

    def end(self, name: str) -> int:
        """As `docker stop`; the exit status of what ran."""
        self.run("stop", "--time=25", name)
        status = int(self.run("inspect", "--format={{.State.ExitCode}}", name).stdout)
        self.run("rm", "--force", name)
        return status


def _library_folders(environment: Mapping[str, str]) -> list[str]:
    return [folder for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder]


@contextlib.contextmanager
def _node() -> Iterator[SimNode]:
    with SimNode(gpus=2, start=False, real_api=False) as node:
        for folder in (node.run_dir, node.state_dir):
            folder.mkdir(exist_ok=True)
        yield node


def _environment(node: SimNode, program: str) -> dict[str, str]:
    """What the node gives the program, and the image's own paths."""
    environment = node.programs[program].environment
    return {key: value for key, value in environment.items() if key not in _IMAGES_OWN}


def _end_to_end(node: SimNode, podman: Podman, asked: str) -> None:
    """A pod is limited, changed and given back; powerctl and the health check answer inside."""
    node.wait_for_link()
    pod = node.add_pod("worker", 300, [0])
    node.wait_for_limit(0, 300)
    node.annotate(pod, 350)
    node.wait_for_limit(0, 350)
    status = json.loads(podman.run("exec", asked, "powerctl", "status", "--json").stdout)
    assert [p["state"] for p in status["pods"]] == ["enforced"], status["pods"]
    podman.run("healthcheck", "run", asked)
    node.delete_pod(pod)
    node.wait_for_limit(0, 700)
    node.add_pod("at-the-end", 300, [1])
    node.wait_for_limit(1, 300)


def two_containers(podman: Podman, enforcer_options: Sequence[str]) -> None:
    """The way of the manifest."""
    with _node() as node:
        podman.start("enforcer", node, enforcer_options, ENFORCER, _environment(node, "enforcer"))
        podman.start("watcher", node, WATCHER, (), _environment(node, "watcher"))
        try:
            _end_to_end(node, podman, "enforcer")
            podman.run("exec", "watcher", "powerctl", "ping")
            refused = podman.run("exec", "watcher", "touch", "/tmp/x", check=False)
            assert "Read-only file system" in refused.stderr, refused.stderr
            assert podman.end("watcher") == 0
            assert podman.end("enforcer") == 0
        except AssertionError:
            _show_logs(podman, "enforcer", "watcher")
            raise
        finally:
            podman.run("rm", "--force", "--all", check=False)
        assert node.limits_mw() == [700_000, 700_000], node.limits_mw()


def supervised(podman: Podman) -> None:
    """Both in one container."""
    with _node() as node:
        podman.start("both", node, PRIVILEGED, SUPERVISED, _environment(node, "supervisord"))
        try:
            _end_to_end(node, podman, "both")
            assert podman.end("both") == 0
        except AssertionError:
            _show_logs(podman, "both")
            raise
        finally:
            podman.run("rm", "--force", "--all", check=False)
        assert node.limits_mw() == [700_000, 700_000], node.limits_mw()


def _show_logs(podman: Podman, *names: str) -> None:
    for name in names:
        done = podman.run("logs", "--tail=20", name, check=False)
        print(f"--- {name}\n{done.stdout}{done.stderr}", flush=True)


def main() -> None:
    podman = Podman(*sys.argv[1:3])
    os.environ.pop("KUBEBUILDER_ASSETS", None)
    assert podman.run("image", "exists", podman.image, check=False).returncode == 0, podman
    ways: dict[str, Callable[[], None]] = {
        "two containers, enforcer privileged": partial(two_containers, podman, PRIVILEGED),
        "two containers, enforcer with CAP_SYS_ADMIN alone": partial(
            two_containers, podman, REDUCED
        ),
        "one container, supervised": partial(supervised, podman),
    }
    for title, way in ways.items():
        began = time.monotonic()
        way()
        print(f"image-check: {title}: good, {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
