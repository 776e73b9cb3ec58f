"""Changes annotations and waits for the limits, in a process of its own.

Its interpreter does nothing else, so that neither the API's threads nor a loop that polls lie
between the agent and the clock: the kernel tells (inotify) when a limit was replaced, it is read
back, and only then the time is taken. The order comes as JSON on standard input, the answer, in
milliseconds, as JSON on standard output.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import random
import select
import ssl
import sys
import time
from pathlib import Path

import msgspec

_IN_MOVED_TO = 0x80  # inotify(7); the simulated NVML replaces files by renaming
_DEADLINE_S = 5.0
# Long enough that the agent's own scans, one a second, come between as they do in real life. One
# GPU is written ten times a second at most: eight in turn never wait for that.
_PAUSE_S = (0.03, 1.23)
# Within the bounds of an H100.
_WATTS = (250, 650)


class Tls(msgspec.Struct, frozen=True):
    """The files of the cluster's administrator."""

    ca: str
    certificate: str
    key: str


class Target(msgspec.Struct, frozen=True):
    """A pod's path in the API, and the folder of the GPU that its process runs on."""

    path: str
    gpu: str


class Order(msgspec.Struct, frozen=True):
    """What to do; `tls` is None where the API speaks plain HTTP."""

    port: int
    tls: Tls | None
    annotation: str
    targets: list[Target]
    trials: int


class LateError(Exception):
    """A limit did not come."""


class Notices:
    """The kernel's word that a file in one of some folders was replaced."""

    def __init__(self, folders: list[str]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        for folder in folders:
            if libc.inotify_add_watch(self._fd, os.fsencode(folder), _IN_MOVED_TO) < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), folder)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def wait(self, timeout_s: float) -> bool:
        """Whether something was replaced since the last call."""
        if not self._poll.poll(timeout_s * 1000):
            return False
        os.read(self._fd, 65536)
        return True


class Patches:
    """One kept connection to the API."""

    def __init__(self, order: Order) -> None:
        self._annotation = order.annotation
        self._connection = _connection(order)
        self._headers = {
            "Content-Type": "application/merge-patch+json",
            "Accept": "application/json",
        }

    def annotate(self, path: str, watts: int) -> None:
        """Returns when the whole answer is here."""
        body = json.dumps({"metadata": {"annotations": {self._annotation: str(watts)}}})
        self._connection.request("PATCH", path, body.encode(), self._headers)
        with self._connection.getresponse() as response:
            text = response.read()
        if response.status != 200:
            raise OSError(f"PATCH {path}: {response.status} {text[:500].decode()}")


def _connection(order: Order) -> http.client.HTTPConnection:
    if order.tls is None:
        return http.client.HTTPConnection("127.0.0.1", order.port, timeout=_DEADLINE_S)
    context = ssl.create_default_context(cafile=order.tls.ca)
    context.load_cert_chain(order.tls.certificate, order.tls.key)
    return http.client.HTTPSConnection(
        "127.0.0.1", order.port, context=context, timeout=_DEADLINE_S
    )


def changes_ms(order: Order) -> list[float]:
    """From the API's answer to the limit read back, which may have been there before."""
    notices, patches = Notices([target.gpu for target in order.targets]), Patches(order)
    samples = []
    for trial in range(order.trials):
        target = order.targets[trial % len(order.targets)]
        limit = Path(target.gpu) / "limit_mw"
        watts = _another(limit)
        time.sleep(random.uniform(*_PAUSE_S))  # no step with anything that the agent does
        patches.annotate(target.path, watts)
        answered_s = time.monotonic()
        while int(limit.read_text()) != watts * 1000:
            if not notices.wait(answered_s + _DEADLINE_S - time.monotonic()):
                raise LateError(f"{target.path}: not at {watts} W in {_DEADLINE_S:g} s")
        samples.append((time.monotonic() - answered_s) * 1000)
    return samples


def _another(limit: Path) -> int:
    """Watts that are not what it has."""
    has = int(limit.read_text()) // 1000
    return random.choice([watts for watts in range(*_WATTS) if watts != has])


def main() -> int:
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    json.dump(changes_ms(order), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
