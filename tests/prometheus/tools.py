"""Obtains Prometheus and promtool from Debian's package, unpacked beside the other tools.

`python -m tests.prometheus.tools` prints their folder, and nothing else, on standard output. The
package is unpacked and not installed: an installed one would start a service. Programs that are on
the PATH come first. It knows nothing of the agent.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kube import assets
from tests.kube.go_command import locked, missing

NAMES = ("prometheus", "promtool")
_DOWNLOAD_TIMEOUT_S = 300


class ToolsError(Exception):
    """There is no Prometheus here; says why."""


def cache_folder() -> Path:
    """Where the unpacked package is kept."""
    return assets.cache_folder().parent / "prometheus-debian"


def find() -> Path | None:
    """A folder that has both programs already."""
    on_path = [shutil.which(name) for name in NAMES]
    if on_path[0] and on_path[1]:
        return Path(on_path[0]).parent
    folder = cache_folder() / "usr/bin"
    return None if missing(folder, NAMES) else folder


def obtain() -> Path:
    """The same, downloading the package where it is missing."""
    if folder := find():
        return folder
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise ToolsError("no Prometheus on the PATH, and no apt-get to download it with")
    with locked(cache_folder()):
        # Another caller may have unpacked it while this one waited for the lock.
        return find() or _unpack(cache_folder())


def _unpack(into: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix=".download-", dir=into) as scratch:
        try:
            _apt_get("download", "prometheus", folder=scratch)
        except ToolsError:
            if os.geteuid():
                raise
            # A bare machine has no lists of packages yet.
            _apt_get("update", folder=scratch)
            _apt_get("download", "prometheus", folder=scratch)
        (package,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", package, into], check=True)
    return into / "usr/bin"


def _apt_get(*words: str, folder: str) -> None:
    command = ["apt-get", "-qq", *words]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolsError(str(error)) from error
    if done.returncode:
        raise ToolsError(f"{' '.join(command)}: {done.stderr.strip()}")


def main() -> int:
    """Print the folder; 1 where it cannot be had."""
    try:
        print(obtain())
    except ToolsError as error:
        print(f"prometheus: {error}", file=sys.stderr)
        return 1
    return 0


def required() -> bool:
    """Whether a missing Prometheus is a failure and no skip."""
    return os.environ.get("POWER_AGENT_REQUIRE_PROMETHEUS") == "1"


if __name__ == "__main__":
    sys.exit(main())
