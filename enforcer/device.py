"""What the enforcer needs of hardware that takes power limits. It knows no NVML and no policy.

A `Device` is the only way to hardware. NVML is its one implementation (nvml.py); tests hand in
another one that plays faults on a clock of their own.
"""

from dataclasses import dataclass
from typing import Protocol


class DeviceError(Exception):
    """A call that the hardware or its driver refused; the text names the call and a remedy.

    `name` is the driver's own name of the error.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name
        # There is no driver to ask.
        self.absent = False
        # The board or the driver cannot tell this at all, now or later.
        self.lacking = False
        # The handle is worthless until the driver is opened anew.
        self.stale = False
        # The way to the driver may be cut: where this lasts, a new session helps, and where none
        # can be had, only a new container.
        self.cut_off = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What a board tells of itself; each fact by itself is known or None. Limits in milliwatts.

    Without persistence mode the driver forgets a board's limit when its last client has gone.
    """

    name: str | None = None
    default_mw: int | None = None
    min_mw: int | None = None
    max_mw: int | None = None
    persistence: bool | None = None
    pci: str | None = None  # the address on the PCI bus, as the driver writes it

    def or_else(self, before: "Facts") -> "Facts":
        """Return these facts, and those of `before` where these are not known.

        A board's bounds do not change: what it told once holds when it cannot be read later.
        """
        return Facts(
            name=before.name if self.name is None else self.name,
            default_mw=before.default_mw if self.default_mw is None else self.default_mw,
            min_mw=before.min_mw if self.min_mw is None else self.min_mw,
            max_mw=before.max_mw if self.max_mw is None else self.max_mw,
            persistence=before.persistence if self.persistence is None else self.persistence,
            pci=before.pci if self.pci is None else self.pci,
        )


UNKNOWN = Facts()


@dataclass(frozen=True, slots=True)
class Board:
    """One GPU; `handle` means something only to the device, and only in the open session.

    `minor` is the number of its device node, /dev/nvidia<minor>; None where it does not tell.
    """

    uuid: str
    index: int
    handle: object
    facts: Facts = UNKNOWN
    minor: int | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The boards that answer, and the errors that may be gone at the next try."""

    boards: tuple[Board, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What holds on a board now, in milliwatts: None is what could not be read."""

    limit_mw: int | None = None
    enforced_mw: int | None = None
    power_mw: int | None = None


UNREAD = Reading()


class Device(Protocol):
    """The GPUs of this node. Each method raises DeviceError, save `close`."""

    @property
    def driver_version(self) -> str | None:
        """The driver's version, None where it is not known."""

    def open(self) -> None:
        """Begin a session; takes seconds, and all wait for it meanwhile."""

    def boards(self) -> Listing:
        """List the boards of the open session."""

    def close(self) -> None:
        """End the session, open or not."""

    def whole_of(self, instance: str) -> str | None:
        """Return the UUID of the board that a MIG instance is part of, None where it fails."""

    def pids(self, board: Board) -> set[int]:
        """List the processes that use a board."""

    def limit_mw(self, board: Board) -> int:
        """Read the limit that is configured."""

    def read(self, board: Board) -> Reading:
        """Read the limit, and what else of the board's power can be read."""

    def set_limit(self, board: Board, limit_mw: int) -> None:
        """Set the limit."""
