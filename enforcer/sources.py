"""Who holds which GPU, and on what evidence. Policy does not care which source it came from.

It knows no NVML and no /proc: processes.py does.
"""

from dataclasses import dataclass
from typing import Protocol

from enforcer.device import Board
from enforcer.policy import Occupants, Stranger

# What tells holders apart: a pod's id, which its restarts share, or a process's number.
Tenants = frozenset[str | int]


@dataclass(frozen=True, slots=True)
class Occupant:
    """One holder of a GPU: any id of a pod, or a stranger, and what shows it.

    `started_s` is when its process began, in seconds since the boot; None where that is not known.
    """

    owner: str | Stranger
    pid: int
    evidence: str
    started_s: float | None = None

    @property
    def tenant(self) -> str | int:
        """What tells it from other holders: a pod's id, which its restarts share, or the pid."""
        return self.owner if isinstance(self.owner, str) else self.pid


@dataclass(frozen=True, slots=True)
class Assignment:
    """A pod to which the kubelet has assigned a GPU, and what shows it."""

    pod: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Sighting:
    """Who was seen on a GPU; `occupants` None where that cannot be told, and `why`.

    `assigned` are the pods that the kubelet gave it to, whether they run there yet or not.
    """

    occupants: tuple[Occupant, ...] | None
    why: str = ""
    assigned: tuple[Assignment, ...] = ()

    @property
    def owners(self) -> Occupants | None:
        """The holders without their evidence, for policy."""
        if self.occupants is None:
            return None
        return frozenset(occupant.owner for occupant in self.occupants)

    @property
    def tenants(self) -> Tenants:
        """What tells the holders from others; nothing where they are not known."""
        return frozenset(occupant.tenant for occupant in self.occupants or ())


class Source(Protocol):
    """One way to know the holders of a GPU."""

    def look(self, board: Board) -> Sighting:
        """Return who holds a board now; raises DeviceError where its handle is worthless."""


class Assignments(Protocol):
    """What `kubelet.Kubelet` offers."""

    state: str

    def assigned(self, board: Board) -> tuple[Assignment, ...]:
        """Return the pods that a GPU is assigned to."""


class Joined:
    """A `Source`: who runs on a GPU, and to whom it is assigned."""

    def __init__(self, processes: Source, kubelet: Assignments) -> None:
        """Take holders from `processes`, and add what `kubelet` knows."""
        self._processes = processes
        self._kubelet = kubelet

    def look(self, board: Board) -> Sighting:
        """Return who holds a board now; raises DeviceError where its handle is worthless."""
        seen = self._processes.look(board)
        assigned = self._kubelet.assigned(board)
        return Sighting(seen.occupants, seen.why, assigned) if assigned else seen
