"""From a pod's JSON to a snapshot: what an annotation means, which pod an id means, what fits."""

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import messages
from shared.messages import MAX_PODS, RAW_CHARS
from watcher import annotations, snapshot
from watcher.metadata import CONFIG_HASH, Pod, PodReader

KEY = "dynamo.nvidia.com/gpu-power-limit"
HASH = "0123456789abcdef0123456789abcdef"


def item(uid: str, **meta: Any) -> dict[str, Any]:  # noqa: ANN401
    """A pod as the API gives it, with fields that nobody here wants."""
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {
            "uid": uid,
            "name": f"pod-{uid}",
            "namespace": "default",
            "resourceVersion": "7",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": "x"},
            "managedFields": [{"manager": "kubelet"}],
        }
        | meta,
    }


def decoded(*items: dict[str, Any], key: str = KEY) -> list[Pod]:
    body = {"metadata": {"resourceVersion": "7"}, "items": list(items)}
    return list(PodReader(key).pods(json.dumps(body).encode())[1].values())


def wanted(*items: dict[str, Any]) -> snapshot.Content:
    return snapshot.content(decoded(*items))


# ---------------------------------------------------------------------- the text


@pytest.mark.parametrize(
    ("text", "limit_mw"),
    [("350", 350_000), ("350.5", 350_500), (" 350\t", 350_000), ("48.75", 48_750), ("1", 1000)],
)
def test_decimal_watts_are_a_limit(text: str, limit_mw: int) -> None:
    assert annotations.read(text) == annotations.Wish(text, limit_mw)


@pytest.mark.parametrize(
    "text",
    [
        "350W",
        "-1",
        "0",
        "1e3",
        "NaN",
        "３５０",
        "",
        " ",
        "100001",
        "350,5",
        "0x10",
        "+5",
        "3 5",
        "inf",
    ],
)
def test_everything_else_is_no_limit_and_says_why(text: str) -> None:
    wish = annotations.read(text)
    assert wish.limit_mw is None
    assert wish.raw == text
    assert wish.problem


def test_a_long_text_is_kept_in_part_and_read_in_whole() -> None:
    long = annotations.read("9" * 65536)
    assert (long.raw, long.limit_mw) == ("9" * RAW_CHARS, None)
    # Cut first and read then, this would be 350 W.
    hidden = "350" + " " * RAW_CHARS + "W"
    assert annotations.read(hidden).limit_mw is None
    assert len(annotations.read(hidden).raw) == RAW_CHARS


@given(st.text(max_size=80))
def test_any_text_gives_a_message_that_the_enforcer_takes(text: str) -> None:
    wish = annotations.read(text)
    pod = Pod("u", "ns", "p", "", wish, None)
    content = snapshot.content([pod])
    made = messages.Snapshot(session="s", revision=1, node="n", pods=content.pods, others=[])
    assert messages.decode_request(messages.encode(made)) == made


# ---------------------------------------------------------------------- the JSON


def test_of_all_annotations_only_the_own_key_counts() -> None:
    mine, other = decoded(
        item("a", annotations={KEY: "300", "other": "x" * 1000}),
        item("b", annotations={"example.com/gpu-power-limit": "100"}),
    )
    assert mine.wish == annotations.Wish("300", 300_000)
    assert other.wish is None


def test_the_key_can_be_another() -> None:
    (pod,) = decoded(item("a", annotations={KEY: "300", "x.io/y": "200"}), key="x.io/y")
    assert pod.wish == annotations.Wish("200", 200_000)


@pytest.mark.parametrize("nothing", [{}, {"annotations": None}, {"annotations": {}}])
def test_no_annotation_is_no_wish_but_an_empty_one_is(nothing: dict[str, Any]) -> None:
    (pod,) = decoded(item("a", **nothing))
    assert pod.wish is None
    (pod,) = decoded(item("a", annotations={KEY: ""}))
    assert pod.wish is not None
    assert pod.wish.limit_mw is None


@pytest.mark.parametrize("items", [None, []])
def test_a_node_without_pods_is_an_empty_list(items: list[Any] | None) -> None:
    body = json.dumps({"metadata": {"resourceVersion": "9"}, "items": items}).encode()
    assert PodReader(KEY).pods(body) == ("9", {})


@pytest.mark.parametrize(
    "body",
    {
        "cut off": b'{"metadata": {"resourceVersion": "9"}, "items": [',
        "no version": b'{"metadata": {}, "items": []}',
        "a page of several": b'{"metadata": {"resourceVersion": "9", "continue": "x"}}',
        "pod without uid": b'{"metadata": {"resourceVersion": "9"}, "items": [{"metadata": {}}]}',
        "uid too long": json.dumps(
            {"metadata": {"resourceVersion": "9"}, "items": [item("u" * 65)]}
        ).encode(),
        "empty": b"",
        "not JSON": b"<html>",
    }.items(),
    ids=lambda case: case[0],
)
def test_a_list_that_is_not_whole_is_refused(body: tuple[str, bytes]) -> None:
    with pytest.raises(msgspec.DecodeError):
        PodReader(KEY).pods(body[1])


# ---------------------------------------------------------------------- ids


def static(uid: str, kind: str = "Node", **meta: Any) -> dict[str, Any]:  # noqa: ANN401
    owners = [{"apiVersion": "v1", "kind": kind, "name": "n1", "uid": "n"}]
    marks = {CONFIG_HASH: HASH} | meta.pop("annotations", {})
    return item(uid, ownerReferences=owners, annotations=marks, **meta)


def test_a_static_pod_is_also_known_by_its_config_hash() -> None:
    content = wanted(static("a", annotations={KEY: "300"}))
    assert [(pod.uid, pod.aliases) for pod in content.pods] == [("a", [HASH])]
    assert wanted(static("b")).others == ["b", HASH]


@pytest.mark.parametrize("owner", ["ReplicaSet", "node", None])
def test_config_hash_of_a_pod_that_no_node_owns_is_not_believed(owner: str | None) -> None:
    pod = static("a", owner or "", annotations={KEY: "300"})
    if owner is None:
        del pod["metadata"]["ownerReferences"]
    assert wanted(pod).pods[0].aliases == []


def test_own_uid_wins_over_another_pods_alias() -> None:
    thief = static("a", annotations={KEY: "100"}, creationTimestamp="2020-01-01T00:00:00Z")
    content = wanted(thief, item(HASH))
    assert content.pods[0].aliases == []
    assert content.others == [HASH]


def test_of_two_that_claim_one_alias_the_older_has_it() -> None:
    real = static("b", creationTimestamp="2026-01-01T00:00:00Z")
    forged = static("a", annotations={KEY: "1"}, creationTimestamp="2026-01-01T00:00:01Z")
    content = wanted(forged, real)
    assert content.pods[0].aliases == []
    assert content.others == ["b", HASH]


def test_alias_too_long_for_a_message_is_left_out() -> None:
    assert wanted(static("a", annotations={CONFIG_HASH: "x" * 65})).others == ["a"]


# ---------------------------------------------------------------------- the whole


def test_unannotated_pods_exist_and_ask_nothing() -> None:
    content = wanted(item("a", annotations={KEY: "300"}), item("b"), item("c"))
    assert [pod.uid for pod in content.pods] == ["a"]
    assert content.others == ["b", "c"]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_pods_makes_no_difference(seed: int) -> None:
    pods = decoded(*(item(f"u{n}", annotations={KEY: str(n)} if n % 3 else {}) for n in range(40)))
    shuffled = random.Random(seed).sample(pods, len(pods))
    assert snapshot.content(shuffled) == snapshot.content(pods)


def test_pods_up_to_the_bound_fit_and_one_more_does_not() -> None:
    pods = decoded(
        *(item(f"u{n}", annotations={KEY: "1"} if n % 2 else {}) for n in range(MAX_PODS))
    )
    content = snapshot.content(pods)
    assert len(content.pods) + len(content.others) == MAX_PODS
    with pytest.raises(snapshot.TooMuchError, match=f"{MAX_PODS + 1} "):
        snapshot.content([*pods, *decoded(item("one-more"))])


def test_what_changed_and_what_is_gone() -> None:
    before = wanted(*(item(uid, annotations={KEY: "1"}) for uid in "abc"))
    after = wanted(
        item("a", annotations={KEY: "1"}), item("b", annotations={KEY: "2"}), item("c"),
        item("d", annotations={KEY: "3"}),
    )  # fmt: skip
    assert [pod.uid for pod in snapshot.changed(before, after)] == ["b", "d"]
    assert [pod.uid for pod in snapshot.gone(before, after)] == ["c"]
