"""From the pods of the node to the snapshot that says what is wanted: pure, data in, data out."""

from collections.abc import Iterable
from dataclasses import dataclass

from shared.messages import MAX_PODS, DesiredPod
from watcher.annotations import Wish
from watcher.metadata import Pod


class TooMuchError(Exception):
    """The node's pods do not fit into one message."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a snapshot says; two that are equal ask for the same."""

    pods: list[DesiredPod]
    others: list[str]


EMPTY = Content([], [])


def content(pods: Iterable[Pod]) -> Content:
    """Return what is wanted of this node, in a fixed order; raises TooMuchError."""
    ordered = sorted(pods, key=lambda pod: (pod.namespace, pod.name, pod.uid))
    aliases = _aliases(ordered)
    wanted = [_desired(pod, pod.wish, aliases[pod.uid]) for pod in ordered if pod.wish is not None]
    others = [id_ for pod in ordered if pod.wish is None for id_ in (pod.uid, *aliases[pod.uid])]
    if len(wanted) + len(others) > MAX_PODS:
        raise TooMuchError(f"{len(wanted) + len(others)} pods on this node; at most {MAX_PODS}")
    return Content(wanted, others)


def _aliases(pods: list[Pod]) -> dict[str, list[str]]:
    """Return the further ids of each pod; no id ever means two pods.

    A pod's own uid, which the server gives, wins. Of two that claim one static id the older has
    it: ownership by a Node can be forged, the time of creation cannot.
    """
    taken = {pod.uid for pod in pods}
    aliases: dict[str, list[str]] = {pod.uid: [] for pod in pods}
    for pod in sorted(pods, key=lambda pod: (pod.created, pod.uid)):
        if pod.static_id is not None and pod.static_id not in taken:
            taken.add(pod.static_id)
            aliases[pod.uid].append(pod.static_id)
    return aliases


def _desired(pod: Pod, wish: Wish, aliases: list[str]) -> DesiredPod:
    return DesiredPod(
        uid=pod.uid,
        aliases=aliases,
        namespace=pod.namespace,
        name=pod.name,
        limit_mw=wish.limit_mw,
        raw=wish.raw,
    )


def changed(before: Content, after: Content) -> list[DesiredPod]:
    """Return the annotated pods of `after` that are new or ask for something else."""
    known = {pod.uid: pod for pod in before.pods}
    return [pod for pod in after.pods if known.get(pod.uid) != pod]


def gone(before: Content, after: Content) -> list[DesiredPod]:
    """Return the annotated pods of `before` that ask for nothing any more."""
    left = {pod.uid for pod in after.pods}
    return [pod for pod in before.pods if pod.uid not in left]


def newly_limited(before: Content, after: Content) -> list[str]:
    """Return the uids of the pods that ask for a usable limit which they did not ask for before."""
    known = {pod.uid: pod.limit_mw for pod in before.pods}
    return [
        pod.uid
        for pod in after.pods
        if pod.limit_mw is not None and pod.limit_mw != known.get(pod.uid)
    ]
