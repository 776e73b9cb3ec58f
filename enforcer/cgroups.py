"""From the text of /proc/<pid>/cgroup to the pod that owns the process. Pure.

Two rules keep a process from being taken for somebody else's. The root is anchored: a pod lives
directly below the parent of the kubelet's `kubepods`, nowhere else. The outermost pod decides: a
process may make cgroups below its own and name them like another pod's, never above.
"""

import re
from collections.abc import Sequence

from enforcer.policy import Stranger


def _uid(separator: str) -> str:
    # A pod's uid is a UUID; a static pod's is an md5 of its manifest (kubelet config/common.go).
    uuid = separator.join(f"[0-9a-f]{{{digits}}}" for digits in (8, 4, 4, 4, 12))
    return f"({uuid}|[0-9a-f]{{32}})"


_QOS = r"(?:burstable|besteffort)"
# systemd spells the way in each slice's name: kubelet-kubepods-burstable-pod2c1f7a54_0b6e....slice
_NESTED = r"(?:[a-z]+-)?"
_SLICE = rf"{_NESTED}kubepods(?:-{_QOS})?-pod{_uid('_')}\.slice"
_SPELLINGS = (
    rf"kubepods/(?:{_QOS}/)?pod{_uid('-')}",
    rf"{_NESTED}kubepods\.slice/(?:{_NESTED}kubepods-{_QOS}\.slice/)?{_SLICE}",
    # containerd on cgroupfs under a systemd kubelet takes slice:prefix:name for one file name:
    # kubepods-burstable-pod2c1f7a54_0b6e....slice:cri-containerd:3fa93fa9...
    rf"{_SLICE}:[a-z-]+:[0-9a-f]+",
)
_POD = re.compile(rf"(?<!/)/(?:{'|'.join(_SPELLINGS)})(?:/|$)")
# The kernel adds ` (deleted)` for a cgroup that was removed (cgroup.c).
_LINE = re.compile(r"[0-9]+:[^:]*:(/.*?)(?: \(deleted\))?")


def _paths(text: bytes) -> list[str]:
    """Return the path in each hierarchy, none where the text is not what a kernel writes."""
    found = []
    for line in text.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n"):
        match = _LINE.fullmatch(line)  # names may hold colons: only the first two separate
        if match is None or ".." in match[1].split("/"):
            return []  # `..`: seen from inside a private cgroup namespace, not to be trusted
        found.append(match[1])
    return found


def _pod_below(path: str, root: str) -> str | None:
    prefix = root.rstrip("/")
    if path.startswith(prefix) and (match := _POD.match(path, len(prefix))):
        uid: str = next(filter(None, match.groups()))  # each spelling has one
        return uid.replace("_", "-")
    return None


def pod_of(text: bytes, roots: Sequence[str]) -> str | Stranger:
    """Return the uid of the pod, OTHER for no pod, UNKNOWN where lines contradict or make no sense.

    `roots` are the cgroups that may hold the kubelet's `kubepods`.
    """
    found = _paths(text)
    pods = {pod for path in found for root in roots if (pod := _pod_below(path, root))}
    if not found or len(pods) > 1:
        return Stranger.UNKNOWN
    return pods.pop() if pods else Stranger.OTHER


def root_above(text: bytes) -> str | None:
    """Return the parent of `kubepods` in a pod's own cgroup text, None if it shows no pod."""
    for path in _paths(text):
        if match := _POD.search(path):
            return path[: match.start()] or "/"
    return None
