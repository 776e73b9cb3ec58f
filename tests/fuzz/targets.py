"""What is fuzzed, and what must hold whatever the bytes are: each target takes bytes.

A target raises AssertionError, or whatever the code under it raises and should not.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from decimal import Decimal, localcontext
from pathlib import Path

import msgspec

from enforcer import cgroups, dra, kubelet
from enforcer.ledger import Ledger, LedgerError
from enforcer.policy import Owned, Stranger
from shared import messages as m
from shared.logs import Log
from shared.units import MAX_MW, format_watts
from tests.simnode.checkpoint import state_of_claims
from watcher import reflector
from watcher.annotations import read
from watcher.kube import ApiError
from watcher.metadata import Pod, PodReader
from watcher.metrics import Counts
from watcher.reflector import Listing, Reflector, Scope

CORPUS = Path(__file__).parent / "corpus"
BOOT = "11111111-aaaa"
KEY = "dynamo.nvidia.com/gpu-power-limit"
_ROOTS = ("/", "/kubelet", "/kubelet.slice")
# The tests of test_targets.py that are expected to fail are about these.
_KNOWN = re.compile(rb"[0-9]{4301}|[\[{]{200}")
_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}")


def request(data: bytes) -> None:
    """A request is taken whole, within its bounds, or refused with an answer that can be sent."""
    try:
        taken = m.decode_request(data)
    except m.RefusedError as error:
        answer = m.Error(code=error.code, message=str(error))
    else:
        _check_request(taken)
        return
    assert m.decode_reply(m.encode(answer)) == answer
    assert len(answer.message) < 1000


def _check_request(taken: m.Request) -> None:
    assert m.decode_request(m.encode(taken)) == taken
    if isinstance(taken, m.Snapshot):
        assert len(taken.pods) + len(taken.others) <= m.MAX_PODS
        assert all(p.limit_mw is None or 0 < p.limit_mw <= MAX_MW for p in taken.pods)
        assert all(len(uid) <= 64 for uid in (taken.session, *taken.others))
        assert 0 <= taken.revision <= 2**53


def cgroup(data: bytes) -> None:
    """Whose a process is: a pod that the text names outermost below a root, or nobody's."""
    owner = cgroups.pod_of(data, _ROOTS)
    root = cgroups.root_above(data)
    if isinstance(owner, Stranger):
        return
    assert _UID.fullmatch(owner)
    text = data.decode("utf-8", "surrogateescape")
    spelled = rf"pod({owner}|{owner.replace('-', '_')})(/|\.slice|$| \(deleted\))"
    roots = "|".join(re.escape(root.rstrip("/")) for root in _ROOTS)
    # No other pod stands before it on the line that names it.
    before = rf"^[0-9]+:[^:]*:({roots})/[^\n]*?kubepods[^\n]*?{spelled}"
    assert re.search(before, text, re.M), (owner, text)
    assert root is not None
    # A process cannot become another pod's by what it makes below its own cgroup.
    for mimic in ("kubepods/pod" + "0" * 32, "kubepods.slice/kubepods-pod" + "0" * 32 + ".slice"):
        below = b"\n".join(line + f"/{mimic}".encode() for line in data.splitlines() if line)
        assert cgroups.pod_of(below, _ROOTS) in (owner, Stranger.UNKNOWN) or b" (deleted)" in data


def checkpoint(data: bytes) -> None:
    """The kubelet's checkpoint: read whole, or refused; never more devices than it has text for."""
    try:
        held = kubelet.parse(data, ("nvidia.com/*",))
    except ValueError:
        return
    for each in held:
        assert each.resource.startswith("nvidia.com/")
        name = kubelet.name_of(each.device)
        assert name is None or (name in each.device and name.startswith(("GPU-", "MIG-", "nvidia")))


def dra_state(data: bytes) -> None:
    """The kubelet's state of claims, as the file and as the text in it: read whole, or refused."""
    inside = state_of_claims(data.decode("utf-8", "replace")).encode()
    for text in (data, inside):
        try:
            found = dra.parse(text)
        except ValueError:
            continue
        for each in found:
            assert re.fullmatch(r"nvidia[0-9]{1,6}", each.node)
            assert re.match(rf"device gpu-{each.node[6:]}(-mig-[^ ]+)? of claim ", each.evidence)


def ledger(data: bytes) -> None:
    """Any bytes in the ledger's place: adopted whole, or kept aside; it works from then on."""
    if _KNOWN.search(data):
        return
    cut = data.find(b"\xff\xff")  # where the generation before it begins
    generations = [data] if cut < 0 else [data[:cut], data[cut + 2 :]]
    with tempfile.TemporaryDirectory(prefix="power-agent-fuzz-") as folder:
        names = ("ledger.json", "ledger.previous.json")
        for name, text in zip(names, generations, strict=False):
            Path(folder, name).write_bytes(text)
        book = Ledger(Path(folder), BOOT)
        try:
            _load(book, Path(folder), generations)
        finally:
            book.close()


def _load(book: Ledger, folder: Path, generations: list[bytes]) -> None:
    try:
        said = book.load()
    except LedgerError as error:
        if "newer Power Agent" not in str(error):  # that one is left as it is
            raise
        return
    for owned in book.entries.values():
        assert 0 < owned.original_mw <= MAX_MW
        assert 0 < owned.set_mw <= MAX_MW
    kept = {path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    assert kept == set(generations)
    assert said or any(b'"version"' in each for each in generations)
    fresh = {"GPU-1": Owned(700_000, 300_000, frozenset({"pod-a"}), 1.0)}
    book.store({**book.entries, **fresh})
    again = Ledger(folder, BOOT)
    try:
        assert again.load() == []
        assert again.entries == book.entries
    finally:
        again.close()


def annotation(data: bytes) -> None:
    """Decimal watts, to the milliwatt below, and nothing else: as another reader of the grammar."""
    text = data.decode("utf-8", "replace")
    wish = read(text)
    assert wish.raw == text[: m.RAW_CHARS]
    expected = None
    blanks = " \t\n\v\f\r"
    if re.fullmatch(rf"[{blanks}]*\+?[0-9]{{1,6}}(\.[0-9]+)?[{blanks}]*", text, re.ASCII):
        with localcontext(prec=len(text) + 8):
            limit_mw = int(Decimal(text.strip(blanks)) * 1000)
        expected = limit_mw if 0 < limit_mw <= MAX_MW else None
    assert wish.limit_mw == expected, text
    assert (expected is None) == bool(wish.problem)
    if expected is not None:
        assert read(format_watts(expected)).limit_mw == expected


class _Silent(Log):
    def __init__(self) -> None:
        super().__init__("watcher", "error", "json")

    def _write(self, *_: object) -> None:
        pass


class _Answer:
    """An answer in pieces; has the shape of `kube.Answer`."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def read(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    def read_all(self, limit_bytes: int) -> bytes:
        return b"".join(self._pieces)[:limit_bytes]

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Api:
    def __init__(self, answers: list[_Answer]) -> None:
        self._answers = answers

    def get(self, *_: object, **__: object) -> _Answer:
        if not self._answers:
            raise ApiError("nobody there")
        return self._answers.pop(0)


LIST = msgspec.json.encode(
    {
        "metadata": {"resourceVersion": "10"},
        "items": [
            {
                "metadata": {
                    "uid": "uid-held",
                    "name": "held",
                    "namespace": "default",
                    "resourceVersion": "9",
                    "annotations": {KEY: "300"},
                }
            }
        ],
    }
)


def watch(data: bytes) -> None:
    """A watch of any bytes: events or an ApiError, and only a DELETED takes the pod away."""
    if _KNOWN.search(data):
        return
    size = 1 + (data[0] if data else 0)
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    held: list[Mapping[str, Pod]] = []

    def offer(pods: Mapping[str, Pod], _arrived_at: float | None) -> None:
        held.append(pods)

    step_through([LIST], pieces, offer)
    assert "uid-held" in held[0]
    if b"DELETED" not in data and b"\\u00" not in data:
        assert "uid-held" in held[-1]


def step_through(listed: list[bytes], watched: list[bytes], offer: reflector.Offer) -> None:
    """Play a list and a watch through the reflector, to the end or the first ApiError."""
    answers = [_Answer(listed), _Answer(watched)]
    subject = Reflector(_Api(answers), Scope("n", None), PodReader(KEY), offer, Counts(), _Silent())
    state: reflector.State = Listing()
    with suppress(ApiError):
        while answers or isinstance(state, reflector.Watching):
            state = subject.step(state)


def pod_list(data: bytes) -> None:
    """A list of any bytes: pods with ids and names in their bounds, or a DecodeError."""
    if _KNOWN.search(data):
        return
    try:
        _, pods = PodReader(KEY).pods(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    for uid, pod in pods.items():
        assert uid == pod.uid
        assert 0 < len(uid) <= 64
        assert 0 < len(pod.name) <= 253
        assert pod.static_id is None or len(pod.static_id) <= 64


TARGETS: dict[str, Callable[[bytes], None]] = {
    "request": request,
    "cgroup": cgroup,
    "ledger": ledger,
    "checkpoint": checkpoint,
    "dra": dra_state,
    "annotation": annotation,
    "watch": watch,
    "pod_list": pod_list,
}


def seeds(target: str) -> list[bytes]:
    """The corpus of a target: one well-formed input a file, and those that once went wrong."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
