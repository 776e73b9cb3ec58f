"""Makes the node's disk from Debian's packages, once for each flavour; starts no machine.

The disk holds what stays the same for weeks: kernel, systemd, containerd, runc, kubelet. What each
run brings along is on a second disk, see machine.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import images, parts
from tests.kube import assets
from tests.vm.guest import FILES, SELINUX_FILES, SELINUX_POLICY

SUITE = "trixie"
COMMANDS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "debootstrap": "debootstrap",
    "mke2fs": "e2fsprogs",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
_PACKAGES = ("linux-image-cloud-amd64", "systemd-sysv", "udev", "initramfs-tools", "zstd", "dbus",
             "containerd", "runc", "containernetworking-plugins", "iptables", "iproute2", "kmod",
             "procps", "ca-certificates")  # fmt: skip
# All that a container of Kubernetes needs of /etc/apparmor.d. Compiling the other hundred profiles
# takes an emulated machine a minute at each start.
_APPARMOR_KEPT = ("abi", "abstractions", "disable", "force-complain", "local", "runc", "tunables")
_SURPLUS = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt/archives",
            "var/lib/apt/lists", "usr/lib/firmware")  # fmt: skip
_SIZE = "8G"  # a sparse file


@dataclass(frozen=True)
class Flavour:
    """What sets one kind of node apart from another."""

    name: str
    packages: tuple[str, ...]
    kernel_arguments: str


FLAVOURS = {
    "apparmor": Flavour("apparmor", ("apparmor",), "apparmor=1 security=apparmor"),
    "selinux": Flavour(
        "selinux",
        ("selinux-policy-default", "policycoreutils"),
        "apparmor=0 security=selinux selinux=1 enforcing=1",
    ),
}


@dataclass(frozen=True)
class Disk:
    """What a machine boots from."""

    root: Path
    kernel: Path
    initrd: Path


def cache_folder() -> Path:
    return images.cache_folder().with_name("vm")


def disk(flavour: Flavour, kubelet: Path) -> Disk:
    """The cached one, or one that is made now: three minutes."""
    recipe = "".join(Path(file).read_text() for file in (__file__, _guest_file()))
    key = hashlib.sha256(f"{recipe}{assets.KUBERNETES}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{flavour.name}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".lock-{flavour.name}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for older in folder.parent.glob(f"{flavour.name}-*"):
                shutil.rmtree(older)
            _make(flavour, kubelet, folder)
    return Disk(folder / "root.ext4", folder / "vmlinuz", folder / "initrd.img")


def _guest_file() -> str:
    return str(Path(__file__).with_name("guest.py"))


def _make(flavour: Flavour, kubelet: Path, folder: Path) -> None:
    say(f"making the disk of flavour {flavour.name}: three minutes, once")
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
        root, finished = Path(scratch) / "root", Path(scratch) / "finished"
        finished.mkdir()
        packages = ",".join((*_PACKAGES, *flavour.packages))
        command(
            *("unshare", "--mount", "debootstrap", "--variant=minbase"),
            *(f"--include={packages}", SUITE, root),
        )
        # Where users have them, and where SELinux's policy expects them.
        shutil.copy(kubelet, root / "usr/bin/kubelet")
        shutil.copytree(root / "usr/lib/cni", root / "opt/cni/bin")
        _configure(root, flavour)
        for name in ("vmlinuz", "initrd.img"):
            (found,) = (root / "boot").glob(f"{name}-*")
            shutil.move(found, finished / name)
        # Written straight from the folder, labels and all: nothing is mounted.
        make_filesystem(root, finished / "root.ext4", _SIZE)
        finished.rename(folder)


def _configure(root: Path, flavour: Flavour) -> None:
    for place, text in FILES.items():
        _write(root, place, text)
    for profile in (root / "etc/apparmor.d").glob("*"):
        if profile.name not in _APPARMOR_KEPT:
            shutil.rmtree(profile) if profile.is_dir() else profile.unlink()
    (root / "node").mkdir()
    with _chroot(root) as inside:
        inside("systemctl", "enable", "systemd-networkd", "containerd", "kubelet")
        inside("systemctl", "mask", "apt-daily.timer", "apt-daily-upgrade.timer",
               "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer")  # fmt: skip
        inside("update-initramfs", "-u", "-k", "all")
    for surplus in _SURPLUS:
        shutil.rmtree(root / surplus, ignore_errors=True)
    if flavour.name == "selinux":
        _label(root)


def _label(root: Path) -> None:
    """SELinux's labels; they lie in extended attributes, which mke2fs copies."""
    for place, text in {**SELINUX_FILES, **SELINUX_POLICY}.items():
        _write(root, place, text)
    contexts = "/etc/selinux/default/contexts/files/file_contexts"
    with _chroot(root) as inside:
        inside("semodule", "--noreload", "--store=default", "--install", *SELINUX_POLICY)
        inside("setfiles", "-F", "-e", "/proc", "-e", "/sys", contexts, "/")


def _write(root: Path, place: str, text: str) -> None:
    file = root / place.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


class _Inside:
    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, *words: str) -> None:
        """In a table of mounts, with a /proc, that end with the command."""
        mounted = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
        command("unshare", "--mount", "/bin/sh", "-c", mounted, self._root, *words)


@contextmanager
def _chroot(root: Path) -> Iterator[_Inside]:
    yield _Inside(root)


def make_filesystem(source: Path, file: Path, size: str, label: str = "") -> None:
    """An ext4 file with all that is in the folder."""
    naming = ["-L", label] if label else []
    command("mke2fs", "-q", "-t", "ext4", *naming, "-d", source, file, size)


def command(*words: str | Path) -> None:
    done = subprocess.run(
        ["nice", "-n", "10", *map(str, words)],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C",
             "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise parts.LackingError(f"{' '.join(map(str, words))} failed:\n{said}")


def say(text: str) -> None:
    print(f"vm-test: {text}", file=sys.stderr, flush=True)


def flavour_named(name: str) -> Flavour:
    if name not in FLAVOURS:
        raise parts.LackingError(f"no flavour {name}: there are {' and '.join(FLAVOURS)}")
    return FLAVOURS[name]


__all__: Sequence[str] = ("COMMANDS", "FLAVOURS", "Disk", "Flavour", "disk", "flavour_named")
