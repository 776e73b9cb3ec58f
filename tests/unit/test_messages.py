"""The protocol's decoder: what is taken, and with which code everything else is refused."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import messages
from shared.messages import (
    MAX_MESSAGE_BYTES,
    MAX_PODS,
    RAW_CHARS,
    DesiredPod,
    Ping,
    Pong,
    RefusedError,
    Snapshot,
    Status,
    StatusReply,
    decode_reply,
    decode_request,
    encode,
)
from shared.units import MAX_MW

POD: dict[str, Any] = {
    "uid": "2c1f7a54-0b6e-4d0b-9a51-3f4f7c9f0a11",
    "aliases": [],
    "namespace": "team-a",
    "name": "llm-0",
    "limit_mw": 350_000,
    "raw": "350",
}
SNAPSHOT: dict[str, Any] = {
    "type": "snapshot",
    "v": 1,
    "session": "s1",
    "revision": 7,
    "node": "node-a",
    "pods": [POD],
    "others": ["0fae7f1c-62a8-4c1e-8d5c-6f8a2f0a3c33"],
}


def packed(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def with_pod(**changes: object) -> dict[str, Any]:
    return SNAPSHOT | {"pods": [POD | changes]}


def refused(payload: bytes) -> str:
    with pytest.raises(RefusedError) as caught:
        decode_request(payload)
    assert len(str(caught.value)) <= 200
    return caught.value.code


def test_the_three_requests_are_taken() -> None:
    taken = decode_request(packed(SNAPSHOT))
    assert isinstance(taken, Snapshot)
    assert taken.pods == [msgspec.convert(POD, DesiredPod)]
    assert decode_request(packed({"type": "status", "v": 1})) == Status()
    assert decode_request(packed({"type": "ping", "v": 1})) == Ping()


def test_every_message_carries_its_type_and_version() -> None:
    assert msgspec.msgpack.decode(encode(Ping())) == {"type": "ping", "v": 1}
    assert msgspec.msgpack.decode(encode(Pong(version="1", uptime_s=0.5))) == {
        "type": "pong",
        "v": 1,
        "version": "1",
        "uptime_s": 0.5,
    }


MALFORMED = {
    "nothing": b"",
    "no MessagePack": b"\xc1",
    "cut short": packed(SNAPSHOT)[:-1],
    "something after the end": packed(SNAPSHOT) + b"\x00",
    "JSON": msgspec.json.encode(SNAPSHOT),
    "a list": packed([SNAPSHOT]),
    "a number": packed(1),
    "no type": packed(without(SNAPSHOT, "type")),
    "type a number": packed(SNAPSHOT | {"type": 3}),
    "version a text": packed(SNAPSHOT | {"v": "1"}),
    "version a fraction": packed(SNAPSHOT | {"v": 1.5}),
    "version true": packed(SNAPSHOT | {"v": True}),
    "no version": packed(without(SNAPSHOT, "v")),
    "keys of bytes that are no text": b"\x81\xa1\xff\x01",
    "type no text": b"\x82\xa4type\xa4\xff\xfe\xfd\xfc\xa1v\x01",
    "deeply nested": b"\x91" * 100_000 + b"\x01",
    "deeply nested in a field": b"\x83\xa4type\xa6status\xa1v\x01\xa1x" + b"\x91" * 100_000,
    "an unknown field": packed(SNAPSHOT | {"pid": 1}),
    "an unknown field of a pod": packed(with_pod(pid=1)),
    "an unknown field of a status": packed({"type": "status", "v": 1, "x": 0}),
    "an unknown field of a ping": packed({"type": "ping", "v": 1, "x": 0}),
    "no session": packed(without(SNAPSHOT, "session")),
    "session empty": packed(SNAPSHOT | {"session": ""}),
    "session too long": packed(SNAPSHOT | {"session": "s" * 65}),
    "session null": packed(SNAPSHOT | {"session": None}),
    "no revision": packed(without(SNAPSHOT, "revision")),
    "revision negative": packed(SNAPSHOT | {"revision": -1}),
    "revision too high": packed(SNAPSHOT | {"revision": 2**53 + 1}),
    "revision a fraction": packed(SNAPSHOT | {"revision": 0.5}),
    "revision a text": packed(SNAPSHOT | {"revision": "7"}),
    "no node": packed(without(SNAPSHOT, "node")),
    "node empty": packed(SNAPSHOT | {"node": ""}),
    "node too long": packed(SNAPSHOT | {"node": "n" * 254}),
    "no pods": packed(without(SNAPSHOT, "pods")),
    "pods null": packed(SNAPSHOT | {"pods": None}),
    "pods a map": packed(SNAPSHOT | {"pods": {}}),
    "a pod a text": packed(SNAPSHOT | {"pods": ["x"]}),
    "no others": packed(without(SNAPSHOT, "others")),
    "others a text": packed(SNAPSHOT | {"others": "x"}),
    "an other empty": packed(SNAPSHOT | {"others": [""]}),
    "an other too long": packed(SNAPSHOT | {"others": ["o" * 65]}),
    "an other of bytes": packed(SNAPSHOT | {"others": [b"x"]}),
    "uid empty": packed(with_pod(uid="")),
    "uid too long": packed(with_pod(uid="u" * 65)),
    "uid a number": packed(with_pod(uid=5)),
    "five aliases": packed(with_pod(aliases=["a"] * 5)),
    "alias empty": packed(with_pod(aliases=[""])),
    "alias too long": packed(with_pod(aliases=["a" * 65])),
    "namespace empty": packed(with_pod(namespace="")),
    "name too long": packed(with_pod(name="n" * 254)),
    "limit zero": packed(with_pod(limit_mw=0)),
    "limit negative": packed(with_pod(limit_mw=-350_000)),
    "limit too high": packed(with_pod(limit_mw=MAX_MW + 1)),
    "limit a fraction": packed(with_pod(limit_mw=350_000.5)),
    "limit a whole float": packed(with_pod(limit_mw=350_000.0)),
    "limit a text": packed(with_pod(limit_mw="350000")),
    "limit true": packed(with_pod(limit_mw=True)),
    "limit infinite": packed(with_pod(limit_mw=float("inf"))),
    "raw too long": packed(with_pod(raw="r" * (RAW_CHARS + 1))),
    "raw null": packed(with_pod(raw=None)),
    "one byte too large": b"\xdb\x00\x03\xff\xfc" + b"x" * (MAX_MESSAGE_BYTES - 4),
    **{f"pod without {key}": packed(SNAPSHOT | {"pods": [without(POD, key)]}) for key in POD},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_wrong_shape_is_malformed(name: str) -> None:
    assert refused(MALFORMED[name]) == "malformed"


@pytest.mark.parametrize("version", [0, 2, -1, 2**63])
@pytest.mark.parametrize("kind", ["snapshot", "status", "ping", "of-the-future"])
def test_another_version_is_named_before_anything_else(version: int, kind: str) -> None:
    strange = {"type": kind, "v": version, "field": "of that version"}
    assert refused(packed(strange)) == "unsupported_version"


ANSWERS = ["report", "status_reply", "pong", "error", "limit_set", "message_denied"]


@pytest.mark.parametrize("kind", [*ANSWERS, "", "Snapshot", "SNAPSHOT", "sna\x00pshot", "x" * 9999])
def test_what_is_no_request_is_an_unknown_type(kind: str) -> None:
    assert refused(packed(SNAPSHOT | {"type": kind})) == "unknown_type"


@pytest.mark.parametrize(
    "changes",
    [
        {"limit_mw": None, "raw": ""},
        {"limit_mw": 1},
        {"limit_mw": MAX_MW},
        {"uid": "u" * 64, "aliases": ["a" * 64] * 4},
        {"namespace": "n" * 253, "name": "n" * 253},
        {"raw": "３" * RAW_CHARS},
    ],
)
def test_values_on_the_bounds_are_taken(changes: dict[str, object]) -> None:
    taken = decode_request(packed(with_pod(**changes)))
    assert isinstance(taken, Snapshot)
    assert msgspec.to_builtins(taken.pods[0]) == POD | changes


@pytest.mark.parametrize("revision", [0, 2**53])
def test_revisions_on_the_bounds_are_taken(revision: int) -> None:
    taken = decode_request(packed(SNAPSHOT | {"revision": revision}))
    assert isinstance(taken, Snapshot)
    assert taken.revision == revision


@pytest.mark.parametrize("pods", [0, 1, 500, MAX_PODS])
def test_1024_pods_are_taken_and_one_more_is_too_many(pods: int) -> None:
    full = SNAPSHOT | {"pods": [POD] * pods, "others": ["o"] * (MAX_PODS - pods)}
    taken = decode_request(packed(full))
    assert isinstance(taken, Snapshot)
    assert len(taken.pods) + len(taken.others) == MAX_PODS
    assert refused(packed(full | {"others": [*full["others"], "o"]})) == "too_many"
    assert refused(packed(full | {"pods": [*full["pods"], POD]})) == "too_many"


def test_a_snapshot_of_1024_usual_pods_fits_into_one_message() -> None:
    pods = [POD | {"name": f"worker-with-a-usual-name-{n}"} for n in range(MAX_PODS)]
    assert len(packed(SNAPSHOT | {"pods": pods, "others": []})) <= MAX_MESSAGE_BYTES


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=64)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=253)
desired_pods = st.builds(
    DesiredPod,
    uid=texts,
    aliases=st.lists(texts, max_size=4),
    namespace=names,
    name=names,
    limit_mw=st.none() | st.integers(1, MAX_MW),
    raw=st.text(st.characters(codec="utf-8"), max_size=RAW_CHARS),
)
requests = st.one_of(
    st.builds(Status),
    st.builds(Ping),
    st.builds(
        Snapshot,
        session=texts,
        revision=st.integers(0, 2**53),
        node=names,
        pods=st.lists(desired_pods, max_size=8),
        others=st.lists(texts, max_size=8),
    ),
)


@given(requests)
def test_what_is_sent_is_what_arrives(request: messages.Request) -> None:
    assert decode_request(encode(request)) == request


@given(st.binary(max_size=512))
def test_any_bytes_are_refused_in_an_orderly_way(payload: bytes) -> None:
    assert refused(payload) in ("malformed", "unknown_type", "unsupported_version")


@given(st.binary(min_size=1, max_size=4), st.integers(0, 10_000))
def test_a_damaged_snapshot_is_taken_whole_or_refused(damage: bytes, where: int) -> None:
    whole = packed(SNAPSHOT)
    at = where % len(whole)
    try:
        taken = decode_request(whole[:at] + damage + whole[at + len(damage) :])
    except RefusedError:
        return
    assert decode_request(encode(taken)) == taken


# ------------------------------------------------------------------------------------ answers


def built(kind: type[Any], **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return values of `kind`, every field filled, whole numbers within what MessagePack holds."""
    numbers = st.integers(-(2**63), 2**64 - 1)
    moments = st.floats(0, 4e9)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: numbers,
        int | None: st.none() | numbers,
        float: moments,
        float | None: st.none() | moments,
    }
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in msgspec.structs.fields(kind):
        if field.name != "v":
            fields[field.name] = simple.get(field.type, st.from_type(field.type))
    return st.builds(kind, **(fields | given))


counts = st.dictionaries(st.text(), st.integers(0, 9), max_size=2)
gpus = st.lists(
    built(
        messages.Gpu,
        processes=st.lists(built(messages.Process), max_size=3),
        writes=counts,
        write_failures=counts,
    ),
    max_size=3,
)
records = {
    "gpus": gpus,
    "pods": st.lists(built(messages.Pod), max_size=3),
    "counters": built(messages.Counters),
}
enforcer = built(messages.EnforcerStatus)
replies = st.one_of(
    built(messages.Error),
    built(messages.Pong),
    built(messages.Report, enforcer=st.none() | enforcer, **records),
    built(
        StatusReply,
        enforcer=enforcer,
        watcher=built(messages.WatcherStatus),
        **records,
    ),
)
events = st.one_of(
    *(
        built(kind)
        for kind in (
            messages.LimitSet,
            messages.LimitReleased,
            messages.LimitFailed,
            messages.LimitDrifted,
            messages.GpuLost,
            messages.GpuBack,
            messages.SnapshotAccepted,
            messages.MessageDenied,
        )
    )
)


@given(replies)
def test_an_answer_arrives_as_it_was_sent(reply: messages.Reply) -> None:
    assert decode_reply(encode(reply)) == reply


@given(events)
def test_an_event_arrives_as_it_was_sent(event: messages.Event) -> None:
    assert messages.decode_event(encode(event)) == event
    assert msgspec.msgpack.decode(encode(event))["type"] == messages.name_of(event)


def test_readers_ignore_fields_that_a_newer_enforcer_adds_to_its_records() -> None:
    newer = {"uuid": "GPU-0", "index": 0, "temperature_c": 70}
    report = {"type": "report", "v": 1, "session": "s", "revision": 1, "nvml": "ok"}
    report |= {"nvml_message": "", "gpus": [newer], "pods": [], "counters": {"denied": 1, "new": 2}}
    reply = decode_reply(packed(report))
    assert isinstance(reply, messages.Report)
    assert (reply.gpus[0].uuid, reply.counters.denied) == ("GPU-0", 1)


@pytest.mark.parametrize("payload", [b"", b"\xc1", packed({"type": "ping", "v": 1}), packed(5)])
def test_what_is_no_answer_raises_a_decode_error(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_reply(payload)
    with pytest.raises(msgspec.DecodeError):
        messages.decode_event(payload)


@pytest.mark.parametrize(
    ("place", "bad"),
    [(b"AAAA", b"\xff\xfe\xff\xfe"), (b"\xa4BBBB", b"\x91" * 100_000 + b"\x90")],
    ids=["no UTF-8", "nested"],
)
def test_an_answer_that_msgspec_has_another_error_for_raises_a_decode_error(
    place: bytes, bad: bytes
) -> None:
    fields = {"v": 1, "version": "AAAA", "uptime_s": 1, "ts": 1, "message": "AAAA", "more": "BBBB"}
    with pytest.raises(msgspec.DecodeError):
        decode_reply(packed({"type": "pong"} | fields).replace(place, bad))
    with pytest.raises(msgspec.DecodeError):
        messages.decode_event(packed({"type": "message_denied"} | fields).replace(place, bad))


def test_no_pid_and_no_path_travels_towards_root() -> None:
    definitions = messages.schema()["$defs"]
    fields = [*definitions["Snapshot"]["properties"], *definitions["DesiredPod"]["properties"]]
    assert sorted(fields) == sorted([*SNAPSHOT, "scope", "api_age_s", "api_error", *POD])
    for request in ("Status", "Ping"):
        assert definitions[request]["properties"].keys() == {"type", "v"}


def test_the_schema_names_every_message_and_who_sends_it() -> None:
    schema = messages.schema()
    named = {definition["$ref"].rpartition("/")[2] for definition in schema["anyOf"]}
    assert len(named) == 16
    for name in named:
        definition = schema["$defs"][name]
        assert "v" in definition["properties"], name
        assert definition["description"].split(":")[0] in (
            "watcher -> enforcer",
            "reader -> enforcer",
            "enforcer -> watcher",
            "enforcer -> reader",
            "enforcer -> anyone",
            "enforcer -> listeners",
        )
