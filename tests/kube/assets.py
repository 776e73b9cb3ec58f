"""Obtains etcd, kube-apiserver and kubectl by building them from their published Go modules.

`python -m tests.kube.assets` prints the folder that holds them, and nothing else, on standard
output: the value for KUBEBUILDER_ASSETS, the variable by which envtest finds these binaries.
They are kept outside the source tree, so only the first call takes minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.kube import go_command
from tests.kube.go_command import GO_MINOR, AssetsError, Go, locked, parser, print_path, say

KUBERNETES = "1.37.2"

SERVER = ("etcd", "kube-apiserver", "kubectl")
NODE = ("kubelet", "kube-controller-manager", "kube-scheduler")

# etcd comes in the version that this release of Kubernetes requires in its own go.mod.
_PACKAGES = {"etcd": "go.etcd.io/etcd/server/v3"} | {
    name: f"k8s.io/kubernetes/cmd/{name}" for name in (*SERVER[1:], *NODE)
}
_VERSION_PACKAGE = "k8s.io/component-base/version"


def missing(folder: Path, names: Sequence[str] = SERVER) -> list[str]:
    """Those of the binaries that the folder does not hold."""
    return go_command.missing(folder, names)


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
    go = Go(f"set KUBEBUILDER_ASSETS to a folder that holds {', '.join(SERVER)}")
    folder = cache_folder()
    with locked(folder):
        # Another caller may have built them while this one waited for the lock.
        if lacking := missing(folder, names):
            _build(go, folder, lacking)
    return folder


def _build(go: Go, folder: Path, names: Sequence[str]) -> None:
    """Finished ones outlive a failure."""
    for stale in folder.glob(".build-*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        module = Path(scratch)
        say(f"Kubernetes {KUBERNETES}: {', '.join(names)}; minutes the first time")
        _write_module(go, module)
        for name in names:
            began = time.monotonic()
            go.build(module, _PACKAGES[name], folder / name, *_version_flags())
            say(f"{name} built in {time.monotonic() - began:.0f} s")


def _write_module(go: Go, folder: Path) -> None:
    """A module whose only content is which versions to build from.

    Kubernetes requires its own libraries as v0.0.0 (they lie beside it in its repository);
    each is published as v0.x.y with every release v1.x.y.
    """
    kubernetes = f"k8s.io/kubernetes@v{KUBERNETES}"
    info = json.loads(go.run(["mod", "download", "-json", kubernetes], folder))
    theirs = json.loads(go.run(["mod", "edit", "-json", info["GoMod"]], folder))
    published = f"v0.{KUBERNETES.split('.', 1)[1]}"
    replacements = [
        f"-replace={required['Path']}={required['Path']}@{published}"
        for required in theirs["Require"]
        if required["Version"] == "v0.0.0"
    ]
    go.run(["mod", "init", "kube-assets.test"], folder)
    go.run(
        ["mod", "edit", f"-go={theirs['Go']}", f"-require={kubernetes}", *replacements],
        folder,
    )


def _version_flags() -> list[str]:
    """Its true version: without one the server will not start."""
    major, minor, _patch = KUBERNETES.split(".")
    told = {"gitVersion": f"v{KUBERNETES}", "gitMajor": major, "gitMinor": minor}
    return [
        word
        for name, value in told.items()
        for word in ("-X", f"{_VERSION_PACKAGE}.{name}={value}")
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the folder; 1 where they cannot be had, 3 where they are not and must not be built."""
    line = parser("tests.kube.assets", __doc__)
    line.add_argument(
        "--node", action="store_true", help=f"also {', '.join(NODE)}, for a real node"
    )
    arguments = line.parse_args(argv)
    names = SERVER + NODE if arguments.node else SERVER

    def cached() -> Path | None:
        if (folder := find(names)) is None:
            say(f"not built yet: {', '.join(missing(cache_folder(), names))}")
        return folder

    return print_path(arguments, cached, lambda: obtain(names))


if __name__ == "__main__":
    sys.exit(main())
