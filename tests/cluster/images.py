"""Builds the image of the Dockerfile without a container engine: `python -m tests.cluster.images`.

The base is made from Debian's packages, because a registry may be out of reach; the Dockerfile is
the one and only. All of buildah's storage lies in a folder of its own.
"""

from __future__ import annotations

import argparse
import configparser
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared import __version__
from tests.cluster import parts

ROOT = Path(__file__).resolve().parents[2]
IMAGE = f"docker.io/dynamo/power-agent:v{__version__}"
BASE = "localhost/power-agent-base"
SUITE = "bookworm"
PAUSE_SOURCE = Path(__file__).with_name("pause.c")
# What the official Python image has of them beyond the interpreter: venv, and certificates.
_BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates")
# Documentation and package lists that no program reads.
_BASE_SURPLUS = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt",
                 "var/lib/apt/lists", "var/log")  # fmt: skip
_INDEX_OPTIONS = (*("index-url", "extra-index-url", "trusted-host", "cert", "find-links", "proxy"),)
_LIMITS = ("--ulimit=nofile=20000:20000", "--ulimit=nproc=32768:32768")


@dataclass(frozen=True)
class Builder:
    """Buildah with storage below one folder; its mounts never reach this machine's table."""

    folder: Path

    def __call__(self, *arguments: str | Path, runtime: str = "buildah") -> str:
        command = [
            *("unshare", "--mount", runtime),
            f"--root={self.folder / 'storage'}",
            f"--runroot={self.folder / 'run'}",
            "--storage-driver=overlay",
            *map(str, arguments),
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
            raise parts.LackingError(f"{runtime} {arguments[0]} failed:\n{said}")
        return done.stdout.strip()

    def has(self, image: str) -> bool:
        return bool(self("images", "--quiet", "--filter", f"reference={image}"))

    def from_folder(self, folder: Path, image: str, *config: str) -> None:
        """An image whose only layer is this folder."""
        container = self("from", "scratch")
        try:
            self("copy", "--quiet", container, folder, "/")
            if config:
                self("config", *config, container)
            self("commit", "--quiet", "--timestamp=0", container, image)
        finally:
            self("rm", container)

    def save(self, image: str, archive: Path) -> Path:
        """A tar file that docker load, podman load and ctr images import read."""
        fresh = archive.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        self("push", "--quiet", image, f"docker-archive:{fresh}:{image}")
        fresh.replace(archive)
        return archive


def cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "power-agent" / "images"


@contextmanager
def builder() -> Iterator[Builder]:
    """One at a time."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Builder(folder)


# ---------------------------------------------------------------------- base


def make_base(build: Builder) -> str:
    """Debian with Python and nothing else; made once."""
    if build.has(BASE):
        return BASE
    _say(f"{BASE}: debootstrap, a minute or two")
    with tempfile.TemporaryDirectory(prefix="power-agent-base-", dir=build.folder) as scratch:
        root = Path(scratch) / "root"
        log = Path(scratch) / "log"
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(_BASE_PACKAGES)}"]
        with log.open("w") as output:
            # /proc is mounted for its work: in a table of mounts that ends with it.
            done = subprocess.run(
                ["unshare", "--mount", *command, SUITE, root],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
            )
        if done.returncode != 0:
            raise parts.LackingError(f"debootstrap failed:\n{log.read_text()[-1000:]}")
        for surplus in _BASE_SURPLUS:
            shutil.rmtree(root / surplus, ignore_errors=True)
        for folder in ("var/log", "var/lib/apt/lists"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        build.from_folder(root, BASE)
    return BASE


def require_base() -> None:
    """Raise LackingError unless the base was made before."""
    with builder() as build:
        if not build.has(BASE):
            raise parts.LackingError(f"no {BASE} yet: make image")


# ---------------------------------------------------------------------- image


@contextmanager
def _package_index(scratch: Path) -> Iterator[list[str]]:
    """Options that let pip find its index as it does here: configuration and certificates.

    They are mounted while the build runs, so nothing of them is in the image.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, str] = {}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        option = key.rpartition(".")[2]
        if option in _INDEX_OPTIONS:
            found[option] = value.strip("'\"")
    options = []
    for option in ("cert", "find-links"):
        place = Path(found.get(option, ""))
        if option in found and place.is_absolute() and place.exists():
            options += ["--volume", f"{place.resolve()}:{place}:ro"]
        else:
            found.pop(option, None)
    config = configparser.RawConfigParser()
    config["global"] = found
    with (scratch / "pip.conf").open("w") as file:
        config.write(file)
    yield [*options, "--volume", f"{scratch / 'pip.conf'}:/etc/pip.conf:ro"] if found else []


def build_image(
    build: Builder, tag: str = IMAGE, *, cached: bool = True, base: str | None = None
) -> str:
    """The Dockerfile's image; `cached`: from layers of earlier builds where nothing changed."""
    with (
        tempfile.TemporaryDirectory(prefix="power-agent-image-") as scratch,
        _package_index(Path(scratch)) as index,
    ):
        build(
            "build",
            "--isolation=chroot",
            "--network=host",
            "--format=docker",  # the other format has no health check
            "--layers" if cached else "--no-cache",
            # Same sources, same bytes.
            "--timestamp=0",
            *_LIMITS,
            f"--build-arg=BASE={base or make_base(build)}",
            *index,
            f"--tag={tag}",
            ".",
        )
    return tag


def make_pause(build: Builder, image: str) -> str:
    """The container that holds a pod's namespaces, as one static binary."""
    with tempfile.TemporaryDirectory(prefix="power-agent-pause-") as scratch:
        root = Path(scratch) / "root"
        root.mkdir(mode=0o755)
        compiled = subprocess.run(
            ["cc", "-Os", "-static", "-s", "-o", root / "pause", PAUSE_SOURCE],
            capture_output=True,
            text=True,
            check=False,
        )
        if compiled.returncode != 0:
            raise parts.LackingError(f"no static binary can be made: {compiled.stderr.strip()}")
        build.from_folder(root, image, '--entrypoint=["/pause"]')
    return image


def archive(build: Builder, image: str) -> Path:
    """The image as a file, below build/ of this tree."""
    folder = ROOT / "build" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    name = image.rpartition("/")[2].replace(":", "-")
    return build.save(image, folder / f"{name}.tar")


def _say(text: str) -> None:
    print(f"image: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.images", description=__doc__)
    parser.add_argument("--tag", default=IMAGE)
    parser.add_argument("--base", help="another base than the one made here from packages")
    chosen = parser.parse_args(argv)
    try:
        parts.provide(parts.IMAGE)
        with builder() as build:
            _say(f"building {chosen.tag}")
            build_image(build, chosen.tag, base=chosen.base)
            print(archive(build, chosen.tag))
    except parts.LackingError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
