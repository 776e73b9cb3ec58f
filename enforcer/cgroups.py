"""From the text of /proc/<pid>/cgroup to the pod that owns the process. Pure.

Two rules keep a process from being taken for somebody else's. The root is anchored: a pod lives
directly below the parent of the kubelet's `kubepods`, nowhere else. The outermost pod decides: a
process may make cgroups below its own and name them like another pod's, never above.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from enforcer.policy import Stranger


def _uid(separator: str) -> str:
    # A pod's uid is a UUID; a static pod's is an md5 of its manifest (kubelet config/common.go).
    uuid = separator.join(f"[0-9a-f]{{{digits}}}" for digits in (8, 4, 4, 4, 12))
    return f"({uuid}|[0-9a-f]{{32}})"


_QOS = r"(?:burstable|besteffort)"
# What systemd allows in a unit's name (systemd.unit(5)), up to the dash before the last part.
_ANY_WAY = r"(?:[A-Za-z0-9:_.\\-]+-)?"


def _spellings(way: str) -> str:
    """Return the pattern of a pod's cgroup below its root.

    systemd spells in each slice's name the `way` to it: k8s-kubepods-pod2c1f7a54_0b6e….slice lies
    in k8s-kubepods.slice, and that in k8s.slice. The kubelet does the same
    (cgroup_manager_linux.go, ToSystemd).
    """
    pod_slice = rf"{way}kubepods(?:-{_QOS})?-pod{_uid('_')}\.slice"
    return "|".join(
        (
            rf"kubepods/(?:{_QOS}/)?pod{_uid('-')}",
            rf"{way}kubepods\.slice/(?:{way}kubepods-{_QOS}\.slice/)?{pod_slice}",
            # A runtime on cgroupfs under a systemd kubelet takes slice:prefix:name for one name:
            # kubepods-burstable-pod2c1f7a54_0b6e….slice:cri-containerd:3fa93fa9… It lies in the
            # runtime's own cgroup, so the way is not that of its root.
            rf"{_ANY_WAY}kubepods(?:-{_QOS})?-pod{_uid('_')}\.slice:[a-z-]+:[0-9a-f]+",
        )
    )


@lru_cache(maxsize=64)
def _below(root: str) -> re.Pattern[str]:
    name = root.rpartition("/")[2]
    way = re.escape(name.removesuffix(".slice") + "-") if name.endswith(".slice") else ""
    return re.compile(rf"(?<!/)/(?:{_spellings(way)})(?:/|$)")


_ANYWHERE = re.compile(rf"(?<!/)/(?:{_spellings(_ANY_WAY)})(?:/|$)")
# A name in the runtime's own cgroup, and the way in it.
_IN_THE_RUNTIMES = re.compile(rf"/({_ANY_WAY})kubepods[^/]*\.slice:[^/]+(?:/|$)")
# Runtimes as systemd services: their own cgroups, below the host's root.
_RUNTIMES = (
    "system.slice/containerd.service",
    "runtime.slice/containerd.service",  # Amazon Linux 2023 and Bottlerocket
    "system.slice/k3s.service",
    "system.slice/k3s-agent.service",
    "system.slice/rke2-server.service",
    "system.slice/rke2-agent.service",
    "system.slice/k0scontroller.service",
    "system.slice/k0sworker.service",
    "system.slice/snap.microk8s.daemon-containerd.service",
)
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
    if path.startswith(prefix) and (match := _below(prefix).match(path, len(prefix))):
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
    found = _outermost(text)
    return None if found is None else found[1]


def _outermost(text: bytes) -> tuple[str, str] | None:
    """Return the first path that names a pod, and the root that its outermost pod lies below."""
    for path in _paths(text):
        for match in _ANYWHERE.finditer(path):
            root = path[: match.start()] or "/"
            if _pod_below(path, root):
                return path, root
    return None


def roots_beside(own: bytes, first: bytes, runtime: bytes = b"") -> tuple[str, ...]:
    """Return the root that the own cgroup shows, and where the other driver would put pods.

    One node may have two: a runtime handler on cgroupfs beside one on systemd. `own` is the text of
    a process in a pod, `first` that of pid 1, which shows where the host's cgroups begin, and
    `runtime` that of the process which started the own container. Only usual places count, since
    nobody but the host's root can make cgroups there, and none outside the host that is the own
    one: the cgroups of a node in a container (kind, k3d) begin below those of the machine.
    """
    found = _outermost(own)
    if found is None:
        return ()
    path, root = found
    host = _host_root(first, root)
    if host is None:
        return (root,)
    roots = [root]
    if match := _IN_THE_RUNTIMES.match(path, len(root.rstrip("/"))):
        roots.append((host + _slices(match[1])) or "/")
    roots += _services(runtime, host)
    roots += [f"{host}/{service}" for service in _RUNTIMES]
    return tuple(dict.fromkeys([*roots, host or "/"]))


def _host_root(first: bytes, root: str) -> str | None:
    """Return where the host's cgroups begin, without a slash at the end; None if `root` is outside.

    systemd as pid 1 is in init.scope. Others are in the root itself, or in `init` below it, since a
    cgroup of version 2 with processes has none below (k3d's entrypoint, Talos). Where hierarchies
    differ, the longest is taken: it lets in the least.
    """
    begins = {re.sub(r"/(?:init(?:\.scope)?)?$", "", path) for path in _paths(first)}
    return max((place for place in begins if _lies_in(root, place)), key=len, default=None)


def _lies_in(path: str, place: str) -> bool:
    return f"{path.rstrip('/')}/".startswith(f"{place}/")


def _services(text: bytes, host: str) -> list[str]:
    """Return the systemd service that `text` shows: the runtime's own, in which slice ever.

    EKS has containerd.service in runtime.slice, kubespray in kube.slice.
    """
    found = [path for path in _paths(text) if path.endswith(".service") and _lies_in(path, host)]
    return [path for path in found if not _lies_in(path, f"{host}/user.slice")]


def _slices(way: str) -> str:
    """Return the path of the slices that `way` names: k8s-pods- is /k8s.slice/k8s-pods.slice."""
    parts = way.removesuffix("-").split("-") if way else []
    return "".join(f"/{'-'.join(parts[:end])}.slice" for end in range(1, len(parts) + 1))


def usual_roots() -> tuple[str, ...]:
    """Return the places to look at where no own pod shows one."""
    return (
        *("/", "/kubelet", "/kubelet.slice"),
        *(f"/{service}" for service in _RUNTIMES),
    )
