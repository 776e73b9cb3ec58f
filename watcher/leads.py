"""Whose lead counts: by how much a limit stood before the first process of a pod, once a pod.

It knows nothing of the enforcer's link: what is wanted and what was reported is handed in.
"""

from collections.abc import Callable, Iterable

from shared import messages
from watcher.snapshot import Content


class Leads:
    """Hands on the lead of each pod that came with its limit while the watcher looked.

    One that was there before, or that was annotated when it ran, says nothing of how early we are.
    """

    def __init__(self, observe: Callable[[float], None]) -> None:
        """`observe` is called once for each pod that counts."""
        self._observe = observe
        self._known: frozenset[str] | None = None
        self._awaited = frozenset[str]()

    def wanted(self, content: Content) -> None:
        """Take in the pods of the node, each time they change."""
        limited = frozenset(pod.uid for pod in content.pods)
        if self._known is not None:
            self._awaited = (self._awaited | (limited - self._known)) & limited
        self._known = limited | frozenset(content.others)

    def told(self, pods: Iterable[messages.Pod]) -> None:
        """Take in what the enforcer reports."""
        for pod in pods:
            if pod.lead_s is not None and pod.uid in self._awaited:
                self._awaited -= {pod.uid}
                self._observe(pod.lead_s)
