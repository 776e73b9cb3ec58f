"""What building an image and running a node takes beside Python, and how it is had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import device_plugin
from tests.kube import assets, go_command

# Command -> the Debian package that has it.
IMAGE = {"buildah": "buildah", "debootstrap": "debootstrap", "runc": "runc"}
CHECK = {"podman": "podman", "conmon": "conmon"}
NODE = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "ip": "iproute2",
    "mount": "mount",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
CNI_PACKAGE = "containernetworking-plugins"
CNI_PLUGINS = ("bridge", "host-local", "loopback")
_CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"), Path("/usr/libexec/cni"))
_POLICY = Path("/usr/sbin/policy-rc.d")


class LackingError(Exception):
    """This machine cannot do it; the text names the reason and the remedy."""


def cni_plugins() -> Path | None:
    for folder in _CNI_FOLDERS:
        if all(os.access(folder / plugin, os.X_OK) for plugin in CNI_PLUGINS):
            return folder
    return None


def lacking(*needs: dict[str, str]) -> list[str]:
    """The packages that are missing for these commands."""
    wanted = {
        package for need in needs for command, package in need.items() if not shutil.which(command)
    }
    if NODE in needs and cni_plugins() is None:
        wanted.add(CNI_PACKAGE)
    return sorted(wanted)


def require_root() -> None:
    if os.geteuid() != 0:
        raise LackingError("mounts, namespaces and containers need root; run this as root")


def require(*needs: dict[str, str]) -> None:
    """Raise LackingError unless everything is there already, the node's binaries included."""
    if packages := lacking(*needs):
        raise LackingError(f"not installed here, by Debian's names: {' '.join(packages)}")
    if assets.find(assets.SERVER + assets.NODE) is None or device_plugin.find() is None:
        raise LackingError("no kubelet, control plane or device plugin yet: make cluster-test")


def provide(*needs: dict[str, str]) -> None:
    """Install what is missing where that is possible: as root, with apt-get."""
    require_root()
    packages = lacking(*needs)
    if not packages:
        return
    install = f"apt-get install {' '.join(packages)}"
    if shutil.which("apt-get") is None:
        raise LackingError(f"missing here, by the names of Debian's packages: {install}")
    print(f"installing: {' '.join(packages)}", file=sys.stderr, flush=True)
    with _no_services_started():
        try:
            _apt("update")
            _apt("install", "--yes", "--no-install-recommends", *packages)
        except subprocess.CalledProcessError as error:
            raise LackingError(f"{install}: {error.stderr.strip()[-300:]}") from error
    if still := lacking(*needs):
        raise LackingError(f"installed, yet not found: {' '.join(still)}")


def _apt(*arguments: str) -> None:
    subprocess.run(
        ["apt-get", "-qq", *arguments],
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )


@contextmanager
def _no_services_started() -> Iterator[None]:
    """The commands are wanted, not a containerd of the machine's own (invoke-rc.d(8))."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()


def node_binaries() -> Path:
    """The folder with the control plane's and the kubelet's binaries, built where missing.

    And the device plugin, for which nobody asks alone.
    """
    try:
        device_plugin.obtain()
        return assets.obtain(assets.SERVER + assets.NODE)
    except (go_command.AssetsError, OSError) as error:
        raise LackingError(f"no kubelet and control plane: {error}") from error
