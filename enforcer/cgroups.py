"""From the text of /proc/<pid>/cgroup to the pod that owns the process. Pure.

Two rules keep a process from being taken for somebody else's. The root is anchored: a pod lives
directly below the parent of the kubelet's `kubepods`, nowhere else. The outermost pod decides: a
process may make cgroups below its own and name them like another pod's, never above.
"""

import re
from collections.abc import Sequence

from enforcer.policy import Stranger

# A pod's uid is a UUID; a static pod's is an md5 of its manifest (kubelet config/common.go).
_UID = r"(?P<uid>[0-9a-f]{8}(?P<sep>[-_])(?:[0-9a-f]{4}(?P=sep)){3}[0-9a-f]{12}|[0-9a-f]{32})"
_QOS = r"(?:burstable|besteffort)"
# systemd spells the way in each slice's name: kubelet-kubepods-burstable-pod2c1f7a54_0b6e....slice
_NESTED = r"(?:[a-z]+-)?"
_CGROUPFS = rf"kubepods/(?:{_QOS}/)?pod{_UID}"
_SYSTEMD = (
    rf"{_NESTED}kubepods\.slice/(?:{_NESTED}kubepods-{_QOS}\.slice/)?"
    rf"{_NESTED}kubepods(?:-{_QOS})?-pod{_UID}\.slice"
)
# containerd on cgroupfs under a systemd kubelet takes slice:prefix:name for one file name:
# kubepods-burstable-pod2c1f7a54_0b6e....slice:cri-containerd:3fa93fa9...
_MISMATCHED = rf"{_NESTED}kubepods(?:-{_QOS})?-pod{_UID}\.slice:[a-z-]+:[0-9a-f]+"
_POD = tuple(
    (re.compile(rf"/{pattern}(?:/|$)"), separator)
    for pattern, separator in ((_CGROUPFS, "-"), (_SYSTEMD, "_"), (_MISMATCHED, "_"))
)
_LINE = re.compile(r"[0-9]+:[^:]*:(/.*)", re.DOTALL)
_DELETED = " (deleted)"  # what the kernel adds for a cgroup that was removed (cgroup.c)


def paths(text: bytes) -> list[str] | None:
    """Return the path in each hierarchy, None where the text is not what a kernel writes."""
    found = []
    for line in text.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n"):
        match = _LINE.fullmatch(line)  # names may hold colons: only the first two separate
        if match is None or ".." in match[1].split("/"):
            return None  # `..`: seen from inside a private cgroup namespace, not to be trusted
        found.append(match[1].removesuffix(_DELETED))
    return found


def _pod_below(path: str, root: str) -> str | None:
    prefix = root.rstrip("/")
    if not path.startswith(f"{prefix}/"):
        return None
    for pattern, separator in _POD:
        match = pattern.match(path, len(prefix))
        if match and match["sep"] in (separator, None):
            return match["uid"].replace("_", "-")
    return None


def pod_of(text: bytes, roots: Sequence[str]) -> str | Stranger:
    """Return the uid of the pod, OTHER for no pod, UNKNOWN where lines contradict or make no sense.

    `roots` are the cgroups that may hold the kubelet's `kubepods`.
    """
    found = paths(text)
    if found is None:
        return Stranger.UNKNOWN
    pods = {pod for path in found for root in roots if (pod := _pod_below(path, root))}
    if len(pods) > 1:
        return Stranger.UNKNOWN
    return pods.pop() if pods else Stranger.OTHER


def root_above(text: bytes) -> str | None:
    """Return the parent of `kubepods` in a pod's own cgroup text, None if it shows no pod."""
    for path in paths(text) or ():
        for end in (m.start() for m in re.finditer("/", path)):
            if _pod_below(path, path[:end]):
                return path[:end] or "/"
    return None
