"""Who holds which GPU, and on what evidence. Policy does not care which source it came from.

It knows no NVML and no /proc: processes.py does.
"""

from dataclasses import dataclass
from typing import Protocol

from enforcer.device import Board
from enforcer.policy import Occupants, Stranger


@dataclass(frozen=True, slots=True)
class Occupant:
    """One holder of a GPU: any id of a pod, or a stranger, and what shows it."""

    owner: str | Stranger
    pid: int
    evidence: str

    @property
    def tenant(self) -> str | int:
        """What tells it from other holders: a pod's id, which its restarts share, or the pid."""
        return self.owner if isinstance(self.owner, str) else self.pid


@dataclass(frozen=True, slots=True)
class Sighting:
    """Who was seen on a GPU; `occupants` None where that cannot be told, and `why`."""

    occupants: tuple[Occupant, ...] | None
    why: str = ""

    @property
    def owners(self) -> Occupants | None:
        """The holders without their evidence, for policy."""
        if self.occupants is None:
            return None
        return frozenset(occupant.owner for occupant in self.occupants)

    @property
    def tenants(self) -> frozenset[str | int]:
        """What tells the holders from others; nothing where they are not known."""
        return frozenset(occupant.tenant for occupant in self.occupants or ())


class Source(Protocol):
    """One way to know the holders of a GPU."""

    def look(self, board: Board) -> Sighting:
        """Return who holds a board now; raises DeviceError where its handle is worthless."""
