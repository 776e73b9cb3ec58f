"""How pods are called: the names of those that ask, and of those that are gone but still spoken of.

It knows no GPU and decides nothing: policy works with uids alone.
"""

from collections.abc import Iterable, Mapping

from shared import messages as m

# Namespace and name by uid.
Names = Mapping[str, tuple[str, str]]


class Roster:
    """The names that the watcher told, as long as a log line may need them."""

    def __init__(self, names: Names) -> None:
        """Begin with what an earlier start kept."""
        self._names = dict(names)

    def learn(self, pods: Iterable[m.DesiredPod], spoken_of: frozenset[str]) -> None:
        """Take the names of `pods`; of others only those that are `spoken_of` are kept."""
        kept = {uid: name for uid, name in self._names.items() if uid in spoken_of}
        self._names = kept | {pod.uid: (pod.namespace, pod.name) for pod in pods}

    def of(self, uids: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Return the names of those of these pods whose names are known."""
        return {uid: self._names[uid] for uid in sorted(uids) if uid in self._names}

    def named(self, uids: Iterable[str]) -> list[m.PodName]:
        """Return these pods with their names."""
        return [self._named(uid) for uid in sorted(uids)]

    def _named(self, uid: str) -> m.PodName:
        namespace, name = self._names.get(uid, (None, None))
        return m.PodName(uid=uid, namespace=namespace, name=name)

    def in_words(self, text: str) -> str:
        """Return a sentence with the names of pods beside their uids."""
        for uid in self._names:
            if uid in text:
                text = text.replace(uid, str(self._named(uid)))
        return text
