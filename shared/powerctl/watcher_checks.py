"""The doctor's checks of the watcher's side: does it run, is it heard, does the API answer it?"""

from collections.abc import Sequence
from dataclasses import dataclass

from shared import messages
from shared.powerctl.check import Check, fail
from shared.powerctl.processes import Running
from shared.powerctl.tables import duration, plural
from shared.powerctl.verdict import api_trouble

_WAYS = (
    "from the watcher's container: is the address of `server` in the error right, does a "
    "NetworkPolicy or a proxy stand between, has the token been revoked (401, 403)"
)


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of the watcher from here; `found` None where processes cannot be seen."""

    found: Sequence[Running] | None = None
    expected_uid: int | None = None
    run_dir: str = ""
    last_lines: str = "the watcher's last log lines"


NOTHING = Sight()


def link(watcher: messages.WatcherStatus, counters: messages.Counters, seen: Sight) -> Check:
    """Check that what the pods ask for arrives."""
    name = "watcher"
    heard = "never heard" if watcher.age_s is None else f"last heard {duration(watcher.age_s)} ago"
    if watcher.connected:
        return Check(name=name, seen=f"connected, revision {watcher.revision}, {heard}")
    if watcher.unlisted or api_trouble(watcher):
        why = watcher.unlisted or api_trouble(watcher)
        text = f"the watcher is there but has no pods to tell: {why}"
        return fail(name, text, f"`API server`, below; {seen.last_lines}")
    if seen.found is None:
        return fail(name, f"not connected, {heard}", _unseen(counters, seen))
    if not seen.found:
        remedy = f"start it; if it ends at once, its last line says why: {seen.last_lines}"
        return fail(name, f"no watcher runs on this node, {heard}", remedy)
    # Where there are more, as beside a simulated node, the one that shares the directory is meant.
    ours = [one for one in seen.found if one.environment.get("POWER_AGENT_RUN_DIR") == seen.run_dir]
    return _running([*ours, *seen.found][0], heard, counters, seen)


def _running(one: Running, heard: str, counters: messages.Counters, seen: Sight) -> Check:
    name, runs = "watcher", f"pid {one.pid} runs"
    if one.state in ("T", "t"):
        return fail(name, f"{runs} but is stopped, {heard}", f"kill -CONT {one.pid}")
    if None not in (one.uid, seen.expected_uid) and one.uid != seen.expected_uid:
        return fail(
            name,
            f"{runs} as uid {one.uid}, but only uid {seen.expected_uid} is heard",
            f"set POWER_AGENT_WATCHER_UID={one.uid} for the enforcer, or run the watcher as "
            f"{seen.expected_uid}",
        )
    theirs = one.environment.get("POWER_AGENT_RUN_DIR")
    if theirs and seen.run_dir and theirs != seen.run_dir:
        return fail(
            name,
            f"{runs} with POWER_AGENT_RUN_DIR={theirs}, and the enforcer's is {seen.run_dir}",
            "let both have the same POWER_AGENT_RUN_DIR, and mount it into both containers",
        )
    if counters.malformed:
        return fail(
            name,
            f"{runs}, and {plural(counters.malformed, 'message')} could not be understood",
            "run both containers from the same image",
        )
    remedy = f"its readiness and its last line name what it waits for: {seen.last_lines}"
    return fail(name, f"{runs} and sends nothing, {heard}", remedy)


def _unseen(counters: messages.Counters, seen: Sight) -> str:
    text = f"see that it runs: {seen.last_lines}"
    if counters.denied or counters.refused_connections or counters.malformed:
        text += "; somebody was refused: its uid must be POWER_AGENT_WATCHER_UID"
    else:
        text += "; its uid must be POWER_AGENT_WATCHER_UID"
    return f"{text}, its POWER_AGENT_RUN_DIR the enforcer's, and both of the same image"


def api(watcher: messages.WatcherStatus, seen: Sight) -> Check:
    """Check that the API server answers the watcher, as the watcher says."""
    name = "API server"
    if trouble := api_trouble(watcher):
        return fail(name, trouble, f"{_WAYS}; {seen.last_lines}")
    if watcher.api_age_s is None:
        return Check(name=name, seen="the watcher has not told of it")
    return Check(name=name, seen=f"the watcher heard it {duration(watcher.api_age_s)} ago")
