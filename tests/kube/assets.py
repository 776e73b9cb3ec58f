"""Obtains etcd, kube-apiserver and kubectl by building them from their published Go modules.

`python -m tests.kube.assets` prints the folder that holds them, and nothing else, on standard
output: the value for KUBEBUILDER_ASSETS, the variable by which envtest finds these binaries.
They are kept outside the source tree, so only the first call takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

KUBERNETES = "1.37.2"
# The newest Go that the server may be built with: with 1.27 its OpenAPI document breaks.
GO_MINOR = 26
# Fetched (as a Go module, by the go command itself) where the installed Go is another minor.
GO_TOOLCHAIN = "go1.26.8"

SERVER = ("etcd", "kube-apiserver", "kubectl")
NODE = ("kubelet", "kube-controller-manager", "kube-scheduler")

EXIT_FAILED = 1
EXIT_NOT_CACHED = 3

# etcd comes in the version that this release of Kubernetes requires in its own go.mod.
_PACKAGES = {"etcd": "go.etcd.io/etcd/server/v3"} | {
    name: f"k8s.io/kubernetes/cmd/{name}" for name in (*SERVER[1:], *NODE)
}
_VERSION_PACKAGE = "k8s.io/component-base/version"


class AssetsError(Exception):
    """The binaries cannot be had here; the text names the reason and the remedy."""


def missing(folder: Path, names: Sequence[str] = SERVER) -> list[str]:
    """Those of the binaries that the folder does not hold."""
    return [name for name in names if not os.access(folder / name, os.X_OK)]


def from_environment() -> Path:
    """The folder named by KUBEBUILDER_ASSETS, which must be complete."""
    value = os.environ.get("KUBEBUILDER_ASSETS", "")
    if not value:
        raise AssetsError(
            'KUBEBUILDER_ASSETS is not set; try: export KUBEBUILDER_ASSETS="$(make -s kube-assets)"'
        )
    folder = Path(value).absolute()
    if lacking := missing(folder):
        raise AssetsError(f"KUBEBUILDER_ASSETS={value} lacks {', '.join(lacking)}")
    return folder


def cache_folder() -> Path:
    """Where binaries of exactly these versions are kept."""
    override = os.environ.get("POWER_AGENT_KUBE_ASSETS_CACHE")
    if override:
        root = Path(override).absolute()
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(cache) / "power-agent" / "kube-assets"
    return root / f"kubernetes-{KUBERNETES}-go1.{GO_MINOR}"


def find(names: Sequence[str]) -> Path | None:
    """A folder that already holds all of them: the user's own before the cached one."""
    given = os.environ.get("KUBEBUILDER_ASSETS")
    candidates = [Path(given).absolute()] if given else []
    for folder in (*candidates, cache_folder()):
        if not missing(folder, names):
            return folder
    return None


def obtain(names: Sequence[str]) -> Path:
    """The same, building what is missing."""
    if folder := find(names):
        return folder
    go = _Go()
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        # Another caller may have built them while this one waited for the lock.
        if lacking := missing(folder, names):
            _build(go, folder, lacking)
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time; the kernel lets the lock go when its holder ends, however it ends."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another build of the same binaries")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(go: _Go, folder: Path, names: Sequence[str]) -> None:
    """Each binary appears in the folder whole or not at all; finished ones outlive a failure."""
    for stale in folder.glob(".build-*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        module = Path(scratch)
        _say(f"Kubernetes {KUBERNETES}: {', '.join(names)}; minutes the first time")
        go.write_module(module)
        for name in names:
            began = time.monotonic()
            go.build(module, name)
            (module / name).replace(folder / name)
            _say(f"{name} built in {time.monotonic() - began:.0f} s")


class _Go:
    """The go command, held to a toolchain that builds a working server."""

    def __init__(self) -> None:
        path = shutil.which("go")
        if path is None:
            raise AssetsError(
                f"no go command found; install Go 1.{GO_MINOR}, or set KUBEBUILDER_ASSETS to a "
                f"folder that holds {', '.join(SERVER)}"
            )
        self._path = path
        # GOWORK and GOFLAGS of the user's own projects must not leak into this module.
        self._env = os.environ | {"CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-mod=mod"}
        self._env |= {"GOTOOLCHAIN": self._toolchain()}

    def _toolchain(self) -> str:
        version = self.run(["env", "GOVERSION"], Path("/")).strip()
        found = re.match(r"go1\.(\d+)", version)
        if found and int(found[1]) == GO_MINOR:
            return "local"
        if found and int(found[1]) < 21:  # the first that can fetch another toolchain
            raise AssetsError(f"{version} is too old; install Go 1.{GO_MINOR}")
        _say(f"{version} is installed, {GO_TOOLCHAIN} is needed and will be fetched")
        return GO_TOOLCHAIN

    def run(self, arguments: Sequence[str], folder: Path) -> str:
        done = subprocess.run(
            [self._path, *arguments],
            cwd=folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise AssetsError(_go_failure(arguments, done.stdout + done.stderr))
        return done.stdout

    def write_module(self, folder: Path) -> None:
        """A module whose only content is which versions to build from.

        Kubernetes requires its own libraries as v0.0.0 (they lie beside it in its repository);
        each is published as v0.x.y with every release v1.x.y.
        """
        kubernetes = f"k8s.io/kubernetes@v{KUBERNETES}"
        info = json.loads(self.run(["mod", "download", "-json", kubernetes], folder))
        theirs = json.loads(self.run(["mod", "edit", "-json", info["GoMod"]], folder))
        published = f"v0.{KUBERNETES.split('.', 1)[1]}"
        replacements = [
            f"-replace={required['Path']}={required['Path']}@{published}"
            for required in theirs["Require"]
            if required["Version"] == "v0.0.0"
        ]
        self.run(["mod", "init", "kube-assets.test"], folder)
        self.run(
            ["mod", "edit", f"-go={theirs['Go']}", f"-require={kubernetes}", *replacements],
            folder,
        )

    def build(self, folder: Path, name: str) -> None:
        """Static, stripped, and telling its true version: without one the server will not start."""
        major, minor, _patch = KUBERNETES.split(".")
        flags = ["-s", "-w"]
        for variable, value in {
            "gitVersion": f"v{KUBERNETES}",
            "gitMajor": major,
            "gitMinor": minor,
        }.items():
            flags += ["-X", f"{_VERSION_PACKAGE}.{variable}={value}"]
        # Two at a time: a compiler or linker may take a gigabyte.
        build = ["build", "-p=2", "-trimpath", "-buildvcs=false", f"-ldflags={' '.join(flags)}"]
        self.run([*build, f"-o={folder / name}", _PACKAGES[name]], folder)


def _go_failure(arguments: Sequence[str], output: str) -> str:
    """One line out of go's many: a JSON answer's error, else the last that tells no progress."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith('"Error":')]
    telling = [line for line in lines if not line.startswith("go: downloading")]
    reason = (errors or telling or ["no reason given"])[-1]
    return (
        f"go {arguments[0]} {arguments[-1]} failed: {reason}; see that Go modules can be "
        f"downloaded here, or set KUBEBUILDER_ASSETS to a folder that holds {', '.join(SERVER)}"
    )


def _say(text: str) -> None:
    print(f"kube-assets: {text}", file=sys.stderr, flush=True)


def _terminated(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # as an exception, so that go is ended and scratch removed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kube.assets", description=__doc__)
    parser.add_argument(
        "--node", action="store_true", help=f"also {', '.join(NODE)}, for a real node"
    )
    parser.add_argument(
        "--if-cached",
        action="store_true",
        help=f"build nothing: exit {EXIT_NOT_CACHED} at once when they are not there",
    )
    arguments = parser.parse_args(argv)
    names = SERVER + NODE if arguments.node else SERVER
    if arguments.if_cached:
        folder = find(names)
        if folder is None:
            _say(f"not built yet: {', '.join(missing(cache_folder(), names))}")
            return EXIT_NOT_CACHED
    else:
        signal.signal(signal.SIGTERM, _terminated)
        try:
            folder = obtain(names)
        except AssetsError as error:
            _say(str(error))
            return EXIT_FAILED
        except OSError as error:
            _say(f"{error}; POWER_AGENT_KUBE_ASSETS_CACHE may name another folder to keep them in")
            return EXIT_FAILED
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
