"""What must be in the ledger before a batch of writes begins. Pure: no disk, no hardware.

I2: the original limit of a GPU is entered before its first write.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from enforcer.gpu import Gpu, NotEntered
from enforcer.policy import Owned
from shared.units import MAX_MW
from shared.units import format_watts as w

Entries = Mapping[str, Owned]


def entered(
    entries: Entries, batch: Iterable[Gpu], wall_s: float
) -> tuple[dict[str, Owned], dict[str, NotEntered]]:
    """Return the entries with what the batch is about to write, and the GPUs that get none.

    Of a GPU that is entered for the first time the limit was read just now.
    """
    found = dict(entries)
    refused: dict[str, NotEntered] = {}
    for gpu in batch:
        owned = entries.get(gpu.uuid) or _first(gpu, wall_s)
        if owned is None:
            why = "not taken: its present limit cannot be read"
            if gpu.limit_mw is not None:
                why = f"not taken: its present limit is said to be {w(gpu.limit_mw)} W"
            refused[gpu.uuid] = NotEntered("UNREADABLE", why)
        else:
            found[gpu.uuid] = _with_decision(owned, gpu)
    return found, refused


def _first(gpu: Gpu, wall_s: float) -> Owned | None:
    original_mw, target_mw = gpu.limit_mw, gpu.decision.target_mw
    if target_mw is None or original_mw is None or not 0 < original_mw <= MAX_MW:
        return None
    return Owned(original_mw, target_mw, gpu.decision.pods, wall_s)


def _with_decision(owned: Owned, gpu: Gpu) -> Owned:
    """Return the entry with what is about to be written.

    A GPU that is given back is nobody's from here on: a kill in between must not make the next
    start take the limit that was given back for a drift (see policy's _hold).
    """
    decision = gpu.decision
    set_mw = owned.set_mw if decision.target_mw is None else decision.target_mw
    return replace(owned, set_mw=set_mw, pods=decision.pods, aliases=decision.aliases)
