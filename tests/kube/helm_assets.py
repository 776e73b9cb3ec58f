"""Obtains helm by building it from its published Go module, kept beside the API server's binaries.

`python -m tests.kube.helm_assets` prints the path of the binary, and nothing else, on standard
output. POWER_AGENT_HELM may name another one, to check the chart with.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.kube import assets
from tests.kube.go_command import (
    GO_MINOR,
    AssetsError,
    Go,
    locked,
    missing,
    parser,
    print_path,
    say,
)

HELM = "4.3.1"
_MODULE = f"helm.sh/helm/v{HELM.partition('.')[0]}"


def cache_folder() -> Path:
    """Where the binary of exactly this version is kept."""
    return assets.cache_folder().parent / f"helm-{HELM}-go1.{GO_MINOR}"


def find() -> Path | None:
    """A helm that is already there: the one that the environment names before the cached one."""
    if given := os.environ.get("POWER_AGENT_HELM"):
        path = Path(given).absolute()
        if not os.access(path, os.X_OK):
            raise AssetsError(f"POWER_AGENT_HELM={given} is no program")
        return path
    return None if missing(cache_folder(), ["helm"]) else cache_folder() / "helm"


def obtain() -> Path:
    """The same, building it where it is missing."""
    if path := find():
        return path
    go = Go("set POWER_AGENT_HELM to a helm that is there")
    folder = cache_folder()
    with locked(folder):
        # Another caller may have built it while this one waited for the lock.
        if missing(folder, ["helm"]):
            _build(go, folder)
    return folder / "helm"


def _build(go: Go, folder: Path) -> None:
    say(f"helm {HELM}; two minutes the first time")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        module = Path(scratch)
        go.run(["mod", "init", "helm-assets.test"], module)
        go.run(["mod", "edit", f"-require={_MODULE}@v{HELM}"], module)
        version = f"{_MODULE}/internal/version.version=v{HELM}"
        go.build(module, f"{_MODULE}/cmd/helm", folder / "helm", f"-X={version}")
    say(f"helm built in {time.monotonic() - began:.0f} s")


def _cached() -> Path | None:
    if (path := find()) is None:
        say(f"not built yet: helm {HELM}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Print the path; 1 where helm cannot be had, 3 where it is not built and must not be."""
    arguments = parser("tests.kube.helm_assets", __doc__).parse_args(argv)
    return print_path(arguments, _cached, obtain)


if __name__ == "__main__":
    sys.exit(main())
