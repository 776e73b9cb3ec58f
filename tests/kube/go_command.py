"""The go command, held to one toolchain, for binaries that are built from published modules."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# The newest Go that kube-apiserver may be built with: with 1.27 its OpenAPI document breaks.
GO_MINOR = 26
# Fetched (as a Go module, by the go command itself) where the installed Go is another minor.
GO_TOOLCHAIN = "go1.26.8"

EXIT_FAILED = 1
EXIT_NOT_CACHED = 3


class AssetsError(Exception):
    """The binaries cannot be had here; the text names the reason and the remedy."""


def missing(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the binaries that the folder does not hold."""
    return [name for name in names if not os.access(folder / name, os.X_OK)]


def say(text: str) -> None:
    print(f"kube-assets: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One builder at a time; the kernel lets the lock go when its holder ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another build of the same binaries")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Go:
    """`otherwise` is what to do instead of building, for the texts of errors."""

    def __init__(self, otherwise: str) -> None:
        self._otherwise = otherwise
        path = shutil.which("go")
        if path is None:
            raise AssetsError(f"no go command found; install Go 1.{GO_MINOR}, or {otherwise}")
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
        say(f"{version} is installed, {GO_TOOLCHAIN} is needed and will be fetched")
        return GO_TOOLCHAIN

    def run(self, arguments: Sequence[str], folder: Path) -> str:
        """What go prints; raises AssetsError."""
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
            raise AssetsError(self._failure(arguments, done.stdout + done.stderr))
        return done.stdout

    def build(self, module: Path, package: str, binary: Path, *linker_flags: str) -> None:
        """Static and stripped; it appears at `binary` whole or not at all."""
        flags = " ".join(["-s", "-w", *linker_flags])
        # Two at a time: a compiler or linker may take a gigabyte.
        build = ["build", "-p=2", "-trimpath", "-buildvcs=false", f"-ldflags={flags}"]
        self.run([*build, f"-o={module / binary.name}", package], module)
        (module / binary.name).replace(binary)

    def _failure(self, arguments: Sequence[str], output: str) -> str:
        """One line out of go's many: a JSON answer's error, else the last but progress."""
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith('"Error":')]
        telling = [line for line in lines if not line.startswith("go: downloading")]
        reason = (errors or telling or ["no reason given"])[-1]
        return (
            f"go {arguments[0]} {arguments[-1]} failed: {reason}; see that Go modules can be "
            f"downloaded here, or {self._otherwise}"
        )


def _terminated(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # as an exception, so that go is ended and scratch removed


def print_path(
    arguments: argparse.Namespace, find: Callable[[], Path | None], obtain: Callable[[], Path]
) -> int:
    """Print where the binaries are, built where missing and allowed; returns the exit status."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        path = find() if arguments.if_cached else obtain()
    except AssetsError as error:
        say(str(error))
        return EXIT_FAILED
    except OSError as error:
        say(f"{error}; POWER_AGENT_KUBE_ASSETS_CACHE may name another folder to keep them in")
        return EXIT_FAILED
    if path is None:
        return EXIT_NOT_CACHED
    print(path)
    return 0


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The command line that the builders share."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    made.add_argument(
        "--if-cached",
        action="store_true",
        help=f"build nothing: exit {EXIT_NOT_CACHED} at once when it is not there",
    )
    return made
