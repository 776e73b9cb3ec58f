"""Every message that crosses the privilege boundary, its bounds, and its one strict decoder.

Requests are claims about pods, never orders about processes: no pid and no path travels towards
root. msgspec checks types and bounds on decoding only, so both sides decode with these types.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from shared.units import MAX_MW

VERSION: Literal[1] = 1
MAX_MESSAGE_BYTES = 256 * 1024
MAX_PODS = 1024
RAW_CHARS = 64

Id = Annotated[str, Meta(min_length=1, max_length=64)]
Name = Annotated[str, Meta(min_length=1, max_length=253)]
LimitMw = Annotated[int, Meta(ge=1, le=MAX_MW)]
Revision = Annotated[int, Meta(ge=0, le=2**53)]
AgeS = Annotated[float, Meta(ge=0, le=1e9)]
ApiText = Annotated[str, Meta(max_length=300)]

NvmlState = Literal["ok", "absent", "failing"]
GpuState = Literal["free", "managed", "held", "failed", "lost"]
PodState = Literal["enforced", "clamped", "conflict", "waiting", "invalid", "failed"]
WriteReason = Literal["acquire", "adjust", "drift", "release"]
ErrorCode = Literal[
    "denied", "malformed", "too_many", "unsupported_version", "unknown_type", "stale"
]


def pod_text(namespace: str | None, name: str, uid: str) -> str:
    """Return how a log line calls a pod: by all that a person may search for."""
    return f"{namespace}/{name} ({uid})"


class _Message(Struct, frozen=True, kw_only=True, tag_field="type"):
    v: Literal[1] = VERSION


class _Request(_Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests are decoded strictly; an answer may have fields that its reader does not know."""


class DesiredPod(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """watcher -> enforcer: one annotated pod; `limit_mw` null means no usable value in `raw`."""

    uid: Id
    aliases: Annotated[list[Id], Meta(max_length=4)]
    namespace: Name
    name: Name
    limit_mw: LimitMw | None
    raw: Annotated[str, Meta(max_length=RAW_CHARS)]


class Snapshot(_Request, frozen=True, kw_only=True, tag="snapshot"):
    """watcher -> enforcer: the whole desired state of the node; also its heartbeat."""

    session: Id
    revision: Revision
    node: Name
    pods: list[DesiredPod]
    others: list[Id]
    # Whether these are all pods of the node, or those of one namespace.
    scope: Literal["node", "namespace"] = "node"
    api_age_s: AgeS | None = None  # since the API server's last word, None where it said none
    api_error: ApiText = ""  # what is wrong with the API now, empty where nothing is


class Unlisted(_Request, frozen=True, kw_only=True, tag="unlisted"):
    """watcher -> enforcer: it lives, but has no list of pods to tell; asks and changes nothing.

    So it is no heartbeat: "not known" is never taken for "nothing".
    """

    session: Id
    node: Name
    why: ApiText
    api_age_s: AgeS | None = None
    api_error: ApiText = ""


class Status(_Request, frozen=True, kw_only=True, tag="status"):
    """reader -> enforcer: what holds now, and why?"""


class Ping(_Request, frozen=True, kw_only=True, tag="ping"):
    """reader -> enforcer: do you still work?"""


class Process(Struct, frozen=True, kw_only=True):
    """enforcer -> reader: one process on a GPU; `owner` is a pod uid, `other` or `unknown`."""

    pid: int
    owner: str
    evidence: str


class Assigned(Struct, frozen=True, kw_only=True):
    """enforcer -> reader: a pod to which the kubelet has assigned a GPU; `owner` is its uid."""

    owner: str
    evidence: str


class PodName(Struct, frozen=True, kw_only=True):
    """enforcer -> anyone: how a pod is called, null where the enforcer never heard it."""

    uid: str
    namespace: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        """Return `namespace/name (uid)`, or the uid alone."""
        return pod_text(self.namespace, self.name, self.uid) if self.name else self.uid


class Gpu(Struct, frozen=True, kw_only=True):
    """enforcer -> reader: one GPU; values not known are null."""

    index: int | None = None
    uuid: str
    pci: str | None = None  # the PCI address as NVML writes it: 00000000:3B:00.0
    name: str | None = None
    limit_mw: int | None = None
    enforced_mw: int | None = None
    default_mw: int | None = None
    min_mw: int | None = None
    max_mw: int | None = None
    power_mw: int | None = None
    persistence: bool | None = None  # persistence mode; off: the driver forgets limits
    managed: bool = False
    original_mw: int | None = None
    target_mw: int | None = None
    wanted_mw: int | None = None  # as target_mw, and in a dry run what it would be
    pods: list[str] = []
    pod_names: list[PodName] = []  # of `pods`, also of those that are gone
    state: GpuState = "free"
    reason: str = "not looked at yet"
    processes: list[Process] = []
    assigned: list[Assigned] = []
    writes: dict[str, int] = {}
    write_failures: dict[str, int] = {}

    @property
    def unread(self) -> str | None:
        """Why its process list cannot be read, which stands in place of a process; else None."""
        return next((each.evidence for each in self.processes if each.pid == 0), None)


class Pod(Struct, frozen=True, kw_only=True):
    """enforcer -> reader: one annotated pod, what it asked for and what it has.

    `lead_s`: by how much its limit stood before its first process on a GPU, negative where that
    began first; null until one was seen.
    """

    uid: str
    namespace: str
    name: str
    raw: str
    requested_mw: int | None
    effective_mw: int | None
    gpus: list[str]
    state: PodState
    reason: str
    lead_s: float | None = None


class Counters(Struct, frozen=True, kw_only=True):
    """enforcer -> reader: totals since the enforcer started."""

    limit_writes: int = 0
    limit_write_failures: int = 0
    drifts: int = 0
    snapshots: int = 0
    denied: int = 0
    refused_connections: int = 0  # closed before a byte was read: no message came of them
    malformed: int = 0
    stale: int = 0
    dropped_log_lines: int = 0  # which nobody took from standard output


class EnforcerStatus(Struct, frozen=True, kw_only=True):
    """enforcer -> reader: the enforcer itself and the rules it works by."""

    version: str
    pid: int
    uptime_s: float = 0.0
    started_ts: float | None = None  # when it started, as Unix time
    dry_run: bool
    nvml: NvmlState = "absent"
    nvml_message: str = "not opened yet"
    driver_version: str | None = None
    node: str | None = None
    min_mw: int | None
    max_mw: int | None
    conflict: str
    cgroup_roots: list[str]
    ledger: str
    ledger_fault: str = ""
    kubelet: str = "off"  # whether the kubelet's assignments can be read: off, ok, or why not
    paused: str | None = None  # why no limit is written, as a person on the node says; else null
    released: list[str] = []  # UUIDs that a person on the node keeps free of limits


class WatcherStatus(Struct, frozen=True, kw_only=True):
    """enforcer -> reader: the watcher as the enforcer sees it."""

    connected: bool = False
    session: str | None = None
    revision: int | None = None
    age_s: float | None = None
    unlisted: str = ""  # why it has no pods to tell, as it says now; empty where it tells them
    api_age_s: float | None = None  # since the API server's last word to it; None: not known
    api_error: str = ""  # what is wrong with the API now, as it says


class Report(_Message, frozen=True, kw_only=True, tag="report"):
    """enforcer -> watcher: the answer to a snapshot, after it was acted on, or to an unlisted.

    `revision` is 0 in an answer to the latter.
    """

    session: str
    revision: int
    nvml: NvmlState
    nvml_message: str
    gpus: list[Gpu]
    pods: list[Pod]
    counters: Counters
    enforcer: EnforcerStatus | None = None


class StatusReply(_Message, frozen=True, kw_only=True, tag="status_reply"):
    """enforcer -> reader: the answer to a status."""

    enforcer: EnforcerStatus
    watcher: WatcherStatus
    gpus: list[Gpu]
    pods: list[Pod]
    counters: Counters


class Pong(_Message, frozen=True, kw_only=True, tag="pong"):
    """enforcer -> reader: the answer to a ping."""

    version: str
    uptime_s: float


class Error(_Message, frozen=True, kw_only=True, tag="error"):
    """enforcer -> anyone: the request was refused and changed nothing."""

    code: ErrorCode
    message: str


class _Event(_Message, frozen=True, kw_only=True):
    ts: float
    message: str


class GpuEvent(_Event, frozen=True, kw_only=True):
    """What every event about one GPU carries; `index` of one that is lost is its last."""

    index: int | None
    uuid: str
    pci: str | None = None
    pods: list[str]
    pod_names: list[PodName] = []
    from_mw: int | None
    to_mw: int | None
    reason: str
    dry_run: bool = False


class LimitSet(GpuEvent, frozen=True, kw_only=True, tag="limit_set"):
    """enforcer -> listeners: a limit was written and read back."""


class LimitReleased(GpuEvent, frozen=True, kw_only=True, tag="limit_released"):
    """enforcer -> listeners: a GPU was given back."""


class LimitFailed(GpuEvent, frozen=True, kw_only=True, tag="limit_failed"):
    """enforcer -> listeners: a limit could not be written, or did not hold."""


class LimitDrifted(GpuEvent, frozen=True, kw_only=True, tag="limit_drifted"):
    """enforcer -> listeners: somebody else had changed a limit; it was written again."""


class GpuLost(GpuEvent, frozen=True, kw_only=True, tag="gpu_lost"):
    """enforcer -> listeners: a GPU no longer answers or is gone."""


class GpuBack(GpuEvent, frozen=True, kw_only=True, tag="gpu_back"):
    """enforcer -> listeners: a GPU answers again."""


class SnapshotAccepted(_Event, frozen=True, kw_only=True, tag="snapshot_accepted"):
    """enforcer -> listeners: the desired state changed."""

    session: str
    revision: int
    pods: int


class MessageDenied(_Event, frozen=True, kw_only=True, tag="message_denied"):
    """enforcer -> listeners: a message was refused."""

    code: ErrorCode
    uid: int | None


Request = Snapshot | Unlisted | Status | Ping
Reply = Report | StatusReply | Pong | Error
Event = (
    LimitSet
    | LimitReleased
    | LimitFailed
    | LimitDrifted
    | GpuLost
    | GpuBack
    | SnapshotAccepted
    | MessageDenied
)


class RefusedError(Exception):
    """A request that cannot be taken; `code` is what the answer carries."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: ErrorCode = code


class _Header(Struct, frozen=True):
    type: str
    v: int


T = TypeVar("T")
_REQUEST_TYPES = ("snapshot", "unlisted", "status", "ping")
_header_decoder = msgspec.msgpack.Decoder(_Header)
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Request | Reply | Event | GpuEvent) -> bytes:
    """Return `message` as one MessagePack payload."""
    return _encoder.encode(message)


def name_of(message: Request | Reply | Event | GpuEvent) -> str:
    """Return the type of `message` as it is written on the wire."""
    return str(message.__struct_config__.tag)


def decode_request(payload: bytes) -> Request:
    """Return the request in `payload`; raises RefusedError naming the code and the reason."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise RefusedError("malformed", f"{len(payload)} bytes; at most {MAX_MESSAGE_BYTES}")
    try:
        header = _header_decoder.decode(payload)
        if header.v != VERSION:
            raise RefusedError("unsupported_version", f"version {header.v}; this side speaks 1")
        if header.type not in _REQUEST_TYPES:
            raise RefusedError("unknown_type", f"type {header.type[:32]!r} is no request")
        request = _request_decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError("malformed", str(error)[:200]) from error
    if isinstance(request, Snapshot) and len(request.pods) + len(request.others) > MAX_PODS:
        count = len(request.pods) + len(request.others)
        raise RefusedError("too_many", f"{count} pods in a snapshot; at most {MAX_PODS}")
    return request


def decode_reply(payload: bytes) -> Reply:
    """Return the enforcer's answer in `payload`; raises msgspec.DecodeError."""
    return _decoded(_reply_decoder, payload)


def decode_event(payload: bytes) -> Event:
    """Return the event in `payload`; raises msgspec.DecodeError."""
    return _decoded(_event_decoder, payload)


def _decoded(decoder: msgspec.msgpack.Decoder[T], payload: bytes) -> T:
    try:
        return decoder.decode(payload)
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these two through
        raise msgspec.DecodeError(str(error)) from error


def schema() -> dict[str, Any]:
    """Return the whole protocol as JSON Schema."""
    return msgspec.json.schema(Request | Reply | Event)
