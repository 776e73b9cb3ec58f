"""The processes on a GPU as evidence of who holds it: the device names pids, /proc their pods.

It decides nothing and remembers nothing.
"""

from typing import Protocol

from enforcer import procfs
from enforcer.device import Board, Device, DeviceError
from enforcer.sources import Occupant, Sighting


class Reader(Protocol):
    """What `procfs.ProcessReader` offers."""

    def may_exist(self, pid: int) -> bool:
        """Tell whether this kernel gives such a number to a process."""

    def owner(self, pid: int, listed_ticks: int) -> procfs.Found:
        """Tell whose process `pid` is; None where it has ended."""


class Processes:
    """A `Source`: nothing that it has seen is remembered."""

    def __init__(self, device: Device, reader: Reader) -> None:
        """Take pids from `device` and their pods from `reader`."""
        self._device = device
        self._reader = reader

    def look(self, board: Board) -> Sighting:
        """Return whose processes are on a board; raises DeviceError where its handle is worthless.

        A list that cannot be read is no empty list (I5).
        """
        asked_ticks = procfs.now_ticks()
        try:
            pids = self._device.pids(board)
        except DeviceError as error:
            if error.stale:
                raise
            return Sighting(None, str(error))
        impossible = {pid for pid in pids if not self._reader.may_exist(pid)}
        if impossible:
            return Sighting(None, self._why_misread(min(impossible)))
        seen = []
        for pid in sorted(pids):
            owner, evidence, started_s = self._reader.owner(pid, asked_ticks)
            if owner is not None:
                seen.append(Occupant(owner, pid, evidence, started_s))
        return Sighting(tuple(seen))

    def _why_misread(self, pid: int) -> str:
        """Return why a list is not believed that has a number which no process can have.

        Its entries are larger than is read, so other processes are missing from it.
        """
        driver = self._device.driver_version or "unknown"
        why = f"pid {pid} in a list of driver {driver} cannot be, so the list is not believed"
        return f"{why}; update the driver"
