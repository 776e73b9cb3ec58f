"""Which POWER_AGENT_ variables nobody reads, and which of these are misspelt.

Pure: it knows the names of all settings, and reads no environment.

A misspelt setting has no effect, and nobody would see it: a start without its bound looks like any
other. So it is refused. A name that resembles none may be of an older or a newer version, before
an upgrade or after a rollback, so it only gets a warning.
"""

import re
from collections.abc import Iterable, Mapping

PREFIX = "POWER_AGENT_"
# The settings of both programs: each sees the other's too where they share a container.
_NAMES = (
    *("LOG_FORMAT", "LOG_LEVEL", "RUN_DIR"),
    *("ANNOTATION", "EVENTS", "METRICS_ADDR"),
    *("CGROUP_ROOT", "CONFLICT", "DRY_RUN", "EXIT_SECONDS", "KUBELET_DIR", "KUBELET_RESOURCES"),
    *("LEASE", "MAX_WATTS", "MIN_WATTS", "ON_EXIT", "PROC_ROOT", "READER_UIDS"),
    *("RECONCILE_SECONDS", "RELEASE_TO", "SAFE_DEFAULT", "SCAN_SECONDS", "STATE_DIR"),
    *("SUPERVISED", "SYSFS_ROOT", "WATCHER_UID"),
)
EVERY = frozenset(f"{PREFIX}{name}" for name in _NAMES)
# What Kubernetes sets for each Service of the namespace whose name begins with `power-agent`
# (kubelet's envvars.FromServices): of POWER_AGENT_PORT and its like the value is an address.
_OF_A_SERVICE = re.compile(
    r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_ADDRESS = re.compile(r"(tcp|udp|sctp)://.*")
# Letters of a name from which on two of them may be wrong. In a shorter one that is another word.
_LONG = 8
# Letters of a word that is shortened.
_SHORTEST = 3
# So much of a name is compared: no setting has as many letters.
_LONGEST = 64


def unread(environment: Mapping[str, str]) -> list[str]:
    """Return the names of variables that look like ours and that no program reads."""
    return sorted(
        name
        for name, value in environment.items()
        if value and _is_ours(name) and name not in EVERY and not _is_of_a_service(name, value)
    )


def meant(name: str, known: Iterable[str]) -> str | None:
    """Return the one of the `known` variables that a misspelt `name` is closest to, if any is.

    What stands between words does not count, nor does the prefix: POWER_AGENT_MINWATTS and
    POWER_AGENT_WATCH_NAMESPACE are no names. A whole word more, less or in place of another makes
    another name, which another version may have.
    """
    found = [(_typos(_letters(name), _letters(each)), each) for each in known]
    near = [(typos, each) for typos, each in found if _is_misspelt(name, each, typos)]
    return min(near)[1] if near else None


def alike(name: str, known: Iterable[str]) -> str | None:
    """Return the first of the `known` variables that has all words of `name`, or the reverse."""
    words = set(_words(name))
    also = [each for each in known if words <= set(_words(each)) or words >= set(_words(each))]
    return min(also, default=None)


def _is_misspelt(name: str, known: str, typos: int) -> bool:
    given, right = _words(name), _words(known)
    if typos == 0 or sorted(given) == sorted(right):
        return True
    if set(given) < set(right) or set(given) > set(right):
        return False
    if len(given) == len(right):
        pairs = [(one, other) for one, other in zip(given, right, strict=True) if one != other]
        # Hardly anybody mistypes a first letter: a gid is no uid.
        if any(one[1:] == other[1:] for one, other in pairs):
            return False
        if all(_is_shortened(one, other) for one, other in pairs):
            return True
    return typos <= (2 if len(_letters(known)) >= _LONG else 1)


def _is_shortened(one: str, other: str) -> bool:
    """Tell whether one word is the other with letters left out, as ADDR and SECS are."""
    short, long = sorted((one, other), key=len)
    left = iter(long)
    return len(short) >= _SHORTEST and short[0] == long[0] and all(each in left for each in short)


def _is_ours(name: str) -> bool:
    return "".join(name.upper().split("_")).startswith("POWERAGENT")


def _is_of_a_service(name: str, value: str) -> bool:
    rest = name.removeprefix(PREFIX)
    if _OF_A_SERVICE.fullmatch(rest):
        return True
    return rest.endswith("PORT") and _ADDRESS.fullmatch(value) is not None


def _words(name: str) -> list[str]:
    return re.findall("[A-Z0-9]+", re.sub("^POWER_?AGENT", "", name.upper()[:_LONGEST]))


def _letters(name: str) -> str:
    """Return what tells a name from others: no prefix, no case, nothing between its words."""
    return "".join(_words(name))


def _typos(one: str, other: str) -> int:
    """Return how many letters are wrong, missing, too many, or swapped with the next one."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        above, row, older = row, [i], before
        for j, wanted in enumerate(other, 1):
            cost = min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != wanted))
            swapped = i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted
            row.append(min(cost, older[j - 2] + 1) if swapped else cost)
        before = above
    return row[-1]
