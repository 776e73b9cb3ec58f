"""Which GPUs the kubelet has assigned to which pod, from its own files: the second source.

It knows no NVML (it is told what a MIG instance is part of) and no process. The device checkpoint
and the state of claims (dra.py) are the kubelet's own and no interface ("fragile", as its authors
say), so they are read strictly: what is not as expected is unknown, and processes alone count. An
entry of a pod that is gone may stay in them for long (kubernetes #137010): policy counts only those
of pods that live.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from enforcer import dra
from enforcer.device import Board
from enforcer.sources import Assignment
from shared.logs import Log

# pkg/kubelet/cm/devicemanager: Allocate writes it at a pod's admission, before any container is
# made, by a rename in the same folder.
CHECKPOINT = "device-plugins/kubelet_internal_checkpoint"
_MAX_BYTES = 4 << 20
_Text = Annotated[str, Meta(max_length=256)]
# MIG instances that are looked for: seven on each of 16 boards, and as many that are gone.
_MOST_PARTS = 256
_Ids = Annotated[list[_Text], Meta(max_length=4096)]
# Devices that are held at a time: far more than a node has of GPUs, their instances and replicas.
_MOST_HELD = 16384


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """checkpoint.PodDevicesEntry; ids by NUMA node, or a plain list before Kubernetes 1.20."""

    PodUID: _Text
    ContainerName: _Text
    ResourceName: _Text
    DeviceIDs: dict[_Text, _Ids] | _Ids | None
    AllocResp: str | None = None

    def ids(self) -> list[str]:
        found = self.DeviceIDs or []
        if isinstance(found, dict):
            return [each for ids in found.values() for each in ids]
        return found


class _Data(Struct, frozen=True, forbid_unknown_fields=True):
    PodDeviceEntries: Annotated[list[_Entry], Meta(max_length=4096)] | None
    RegisteredDevices: dict[_Text, _Ids | None] | None


class _Checkpoint(Struct, frozen=True, forbid_unknown_fields=True):
    Data: _Data
    # Go's hash of a printed struct: nobody else can compute it.
    Checksum: int


_decoder = msgspec.json.Decoder(_Checkpoint)


@dataclass(frozen=True, slots=True)
class Held:
    """One device of one container, as the checkpoint has it."""

    pod: str
    container: str
    resource: str
    device: str


def parse(text: bytes, resources: Sequence[str]) -> frozenset[Held]:
    """Return the devices of these resources, given as patterns; raises ValueError if it is odd."""
    try:
        data = _decoder.decode(text).Data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)[:200]) from error
    found = (
        Held(entry.PodUID, entry.ContainerName, entry.ResourceName, device)
        for entry in data.PodDeviceEntries or ()
        if any(fnmatchcase(entry.ResourceName, pattern) for pattern in resources)
        for device in entry.ids()
    )
    held = list(islice(found, _MOST_HELD + 1))
    if len(held) > _MOST_HELD:
        raise ValueError(f"more than {_MOST_HELD} devices are held")
    return frozenset(held)


_HOLDS = "what was read before holds; of the rest only processes show who has a GPU"
_AGAIN = "with the next look at the GPUs (POWER_AGENT_SCAN_SECONDS)"
_HEX = "[0-9a-fA-F-]{36}"
_NAMES = re.compile(
    # NVIDIA's plugin names a device by its UUID, whatever deviceIDStrategy is (internal/rm,
    # BuildDevice), and a replica of it for time-slicing and MPS `…::3`.
    rf"((?:GPU|MIG)-{_HEX})(?:::[0-9]{{1,9}})?"
    # Drivers before 470 name a MIG instance by its GPU's UUID: MIG-GPU-…/7/0.
    rf"|MIG-(GPU-{_HEX})/[0-9]{{1,9}}/[0-9]{{1,9}}(?:::[0-9]{{1,9}})?"
    # GKE's plugin names the device node, an instance and a replica: nvidia0/gi1/vgpu2.
    r"|(nvidia(?:0|[1-9][0-9]{0,5}))(?:/gi[0-9]{1,9})?(?:/vgpu[0-9]{1,9})?"
)


def name_of(device: str) -> str | None:
    """Return what a device id names without doubt: a GPU's UUID, a MIG instance's, or a node.

    Other ids (an index) depend on what the plugin has seen at its start: they are not taken for a
    GPU that they may not mean.
    """
    match = _NAMES.fullmatch(device)
    return next(filter(None, match.groups())) if match else None


_ByName = dict[str, tuple[Assignment, ...]]


def _by_name(named: Iterable[tuple[str, str, str]]) -> _ByName:
    """Return assignments by what names their GPU, of (name, pod, evidence); always in one order."""
    by_name: dict[str, list[Assignment]] = {}
    for name, pod, evidence in sorted(named):
        by_name.setdefault(name, []).append(Assignment(pod, evidence))
    return {name: tuple(found) for name, found in by_name.items()}


class _File:
    """What one file of the kubelet's says, read again only when it has changed."""

    def __init__(self, path: Path, parsed: Callable[[bytes], _ByName]) -> None:
        self._path = path
        self._parsed = parsed
        self._seen: tuple[int, int, int] | None = None
        # While the file cannot be read, what it said last holds: a pod keeps its devices for life.
        self.by_name: _ByName = {}
        self.state = "not read yet"
        self.missing = False

    def refresh(self) -> bool:
        """Read it if it has changed; tell whether it was read."""
        self.missing = False
        try:
            found = os.stat(self._path)  # noqa: PTH116 - called often
            seen = found.st_ino, found.st_mtime_ns, found.st_size
            if seen == self._seen:
                return False
            self.by_name = self._parsed(self._read())
        except OSError as error:
            self._seen = None
            # One that went and had something to say is missed.
            self.missing = isinstance(error, FileNotFoundError) and not self.by_name
            self.state = f"{self._path}: {error.strerror}"
            return False
        except ValueError as error:
            self._seen = seen  # it will not be better before it is written again
            self.state = f"{self._path}: not a checkpoint that is known here: {error}"
            return False
        self._seen, self.state = seen, "ok"
        return True

    def _read(self) -> bytes:
        with open(self._path, "rb", opener=_open_file) as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        return text


class Kubelet:
    """What the kubelet's two files say: of devices of plugins, and of claims (DRA)."""

    def __init__(
        self,
        root: Path,
        resources: Sequence[str],
        log: Log,
        whole_of: Callable[[str], str | None],
    ) -> None:
        """Prepare; nothing is read before `assigned`. `whole_of` is the device's."""
        self._resources = tuple(resources)
        self._plugins = _File(root / CHECKPOINT, self._held)
        self._claims = _File(root / dra.STATE, lambda text: _by_name(dra.parse(text)))
        self._log = log
        self._whole_of = whole_of
        # The board of each MIG instance that is assigned, as far as it is known.
        self._wholes: dict[str, str | None] = {}
        self.state = "not read yet"

    def assigned(self, board: Board) -> tuple[Assignment, ...]:
        """Return the pods that a GPU is assigned to."""
        files = (self._plugins, self._claims)
        changed = [file.refresh() for file in files]
        if any(changed):
            parts = [part for part in self._plugins.by_name if part.startswith("MIG-")]
            self._wholes = {part: self._wholes.get(part) for part in parts[:_MOST_PARTS]}
        self._say(files)
        for part in [part for part, whole in self._wholes.items() if whole is None]:
            self._wholes[part] = self._whole_of(part)
        names = [board.uuid, f"nvidia{board.minor}"]
        names += [part for part, whole in self._wholes.items() if whole == board.uuid]
        return tuple(
            each for name in names for file in files for each in file.by_name.get(name, ())
        )

    def _held(self, text: bytes) -> _ByName:
        return _by_name(
            (name, held.pod, f"{held.resource} {held.device} of container {held.container}")
            for held in parse(text, self._resources)
            if (name := name_of(held.device)) is not None
        )

    def _say(self, files: Iterable[_File]) -> None:
        # A node has either or both. Where there is none at all, the checkpoint is what is missed.
        there = [file for file in files if not file.missing] or [self._plugins]
        state = "; ".join(file.state for file in there if file.state != "ok") or "ok"
        if state != self.state:
            if state == "ok":
                self._log.info("kubelet", why=state)
            else:
                self._log.warning("kubelet", why=state, holds=_HOLDS, next_try=_AGAIN)
        self.state = state


def _open_file(path: str, flags: int) -> int:
    # Not through a link, and a pipe in its place would block for ever.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
