"""Obtains helm by building it from its published Go module, kept beside the API server's binaries.

`python -m tests.kube.helm_assets` prints the path of the binary, and nothing else, on standard
output. POWER_AGENT_HELM may name another one, to check the chart with.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.kube import assets

HELM = "4.3.1"
_MODULE = f"helm.sh/helm/v{HELM.partition('.')[0]}"


def cache_folder() -> Path:
    """Where the binary of exactly this version is kept."""
    return assets.cache_folder().parent / f"helm-{HELM}-go1.{assets.GO_MINOR}"


def find() -> Path | None:
    """A helm that is already there: the one that the environment names before the cached one."""
    if given := os.environ.get("POWER_AGENT_HELM"):
        path = Path(given).absolute()
        if not os.access(path, os.X_OK):
            raise assets.AssetsError(f"POWER_AGENT_HELM={given} is no program")
        return path
    return None if assets.missing(cache_folder(), ["helm"]) else cache_folder() / "helm"


def obtain() -> Path:
    """The same, building it where it is missing."""
    if path := find():
        return path
    go = assets._Go()
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with assets._locked(folder / ".lock"):
        # Another caller may have built it while this one waited for the lock.
        if assets.missing(folder, ["helm"]):
            _build(go, folder)
    return folder / "helm"


def _build(go: assets._Go, folder: Path) -> None:
    """The binary appears in the folder whole or not at all."""
    _say(f"helm {HELM}; two minutes the first time")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        module = Path(scratch)
        go.run(["mod", "init", "helm-assets.test"], module)
        go.run(["mod", "edit", f"-require={_MODULE}@v{HELM}"], module)
        flags = f"-s -w -X {_MODULE}/internal/version.version=v{HELM}"
        # Two at a time: a compiler or linker may take a gigabyte.
        build = ["build", "-p=2", "-trimpath", "-buildvcs=false", f"-ldflags={flags}"]
        go.run([*build, f"-o={module / 'helm'}", f"{_MODULE}/cmd/helm"], module)
        (module / "helm").replace(folder / "helm")
    _say(f"built in {time.monotonic() - began:.0f} s")


def _say(text: str) -> None:
    print(f"helm-assets: {text}", file=sys.stderr, flush=True)


def _terminated(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # as an exception, so that go is ended and scratch removed


def main(argv: Sequence[str] | None = None) -> int:
    """Print the path; 1 where helm cannot be had, 3 where it is not built and must not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.kube.helm_assets", description=__doc__)
    parser.add_argument(
        "--if-cached",
        action="store_true",
        help=f"build nothing: exit {assets.EXIT_NOT_CACHED} at once when it is not there",
    )
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        path = find() if arguments.if_cached else obtain()
    except (assets.AssetsError, OSError) as error:
        _say(str(error))
        return assets.EXIT_FAILED
    if path is None:
        _say(f"not built yet: helm {HELM}")
        return assets.EXIT_NOT_CACHED
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
