"""From the API's JSON to the snapshot: which pods, which ids, in which order, and how many."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.messages import MAX_PODS, DesiredPod
from watcher import metadata, snapshot
from watcher.annotations import read
from watcher.metadata import Pod, PodReader
from watcher.settings import CONFIG_HASH

KEY = "dynamo.nvidia.com/gpu-power-limit"
NODE_OWNS = [{"apiVersion": "v1", "kind": "Node", "name": "node-a", "uid": "n", "controller": True}]


def item(name: str, annotations: dict[str, str] | None = None, **more: object) -> dict[str, Any]:
    """A pod as `as=PartialObjectMetadataList` brings it, with fields that nobody asked for."""
    meta: dict[str, Any] = {
        "name": name,
        "namespace": "default",
        "uid": f"uid-{name}",
        "resourceVersion": "7",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"app": "x"},
        "managedFields": [{"manager": "kubectl"}],
    }
    if annotations is not None:
        meta["annotations"] = annotations
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": meta | more,
    }


def listed(*items: dict[str, Any], **meta: str) -> bytes:
    return json.dumps({"metadata": {"resourceVersion": "9"} | meta, "items": items}).encode()


def content_of(*items: dict[str, Any]) -> snapshot.Content:
    return snapshot.content(PodReader(KEY).pods(listed(*items))[1].values())


def pod(uid: str, watts: str | None = None, **more: object) -> Pod:
    fields: dict[str, Any] = {
        "namespace": "default",
        "name": uid,
        "created": "2026-01-01T00:00:00Z",
        "wish": None if watts is None else read(watts),
        "static_id": None,
    }
    return Pod(uid=uid, **(fields | more))


# ---------------------------------------------------------------------- what the API says


def test_annotated_pods_are_wishes_and_the_rest_are_others() -> None:
    found = content_of(item("a", {KEY: "350.5"}), item("b", {"else": "1"}), item("c"))
    assert found.pods == [
        DesiredPod(
            uid="uid-a",
            aliases=[],
            namespace="default",
            name="a",
            limit_mw=350_500,
            raw="350.5",
        )
    ]
    assert found.others == ["uid-b", "uid-c"]


def test_unusable_annotation_is_a_wish_without_a_limit() -> None:
    (wanted,) = content_of(item("a", {KEY: ""})).pods
    assert (wanted.limit_mw, wanted.raw) == (None, "")


def test_another_annotation_key_can_be_chosen() -> None:
    pods = PodReader("example.com/watts").pods(listed(item("a", {KEY: "1"})))[1]
    assert snapshot.content(pods.values()).pods == []
    pods = PodReader("example.com/watts").pods(listed(item("a", {"example.com/watts": "1"})))[1]
    assert snapshot.content(pods.values()).pods[0].limit_mw == 1000


@pytest.mark.parametrize("items", ["null", "[]"])
def test_an_empty_list_may_be_null(items: str) -> None:
    """A real API server answers so; taking it for broken would never send the empty wish."""
    body = f'{{"metadata": {{"resourceVersion": "9"}}, "items": {items}}}'.encode()
    assert PodReader(KEY).pods(body) == ("9", {})


def test_a_list_that_is_only_a_part_is_refused() -> None:
    """Taken for the whole, it would release the rest."""
    with pytest.raises(msgspec.DecodeError, match="incomplete"):
        PodReader(KEY).pods(listed(item("a"), **{"continue": "token"}))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"items": []}',
        b'{"metadata": {"resourceVersion": "9"}, "items": [{}]}',
        b'{"metadata": {"resourceVersion": "9"}, "items": [{"metadata": {"uid": ""}}]}',
        listed(item("a"))[:-20],
        b"<html>502 Bad Gateway</html>",
    ],
)
def test_a_list_that_makes_no_sense_is_refused(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        PodReader(KEY).pods(body)


def test_version_of_a_bookmark_is_read_whatever_else_it_has() -> None:
    line = b'{"type":"BOOKMARK","object":{"kind":"x","metadata":{"resourceVersion":"12746",'
    line += b'"creationTimestamp":null,"annotations":{"a":"b"}}}}'
    event = metadata.event(line)
    assert (event.type, metadata.version(event.object)) == ("BOOKMARK", "12746")


def test_times_and_lists_that_are_null_do_no_harm() -> None:
    (wanted,) = content_of(item("a", {KEY: "1"}, creationTimestamp=None, ownerReferences=None)).pods
    assert wanted.uid == "uid-a"


# ---------------------------------------------------------------------- static pods


def test_config_hash_of_a_mirror_pod_is_another_id() -> None:
    found = content_of(
        item("a", {KEY: "350", CONFIG_HASH: "f" * 32}, ownerReferences=NODE_OWNS),
        item("b", {CONFIG_HASH: "e" * 32}, ownerReferences=NODE_OWNS),
    )
    assert found.pods[0].aliases == ["f" * 32]
    assert found.others == ["uid-b", "e" * 32]


@pytest.mark.parametrize(
    "owners",
    [
        pytest.param(None, id="nobody"),
        pytest.param([], id="an empty list"),
        pytest.param([{"kind": "ReplicaSet", "name": "x"}], id="a ReplicaSet"),
        pytest.param([{"kind": "node"}], id="something written alike"),
        pytest.param([{}], id="without a kind"),
    ],
)
def test_config_hash_on_a_pod_of_another_owner_is_not_believed(owners: object) -> None:
    (wanted,) = content_of(
        item("a", {KEY: "350", CONFIG_HASH: "f" * 32}, ownerReferences=owners)
    ).pods
    assert wanted.aliases == []


@pytest.mark.parametrize("hash_", ["", "f" * 65])
def test_config_hash_that_is_no_id_is_left_out(hash_: str) -> None:
    (wanted,) = content_of(
        item("a", {KEY: "350", CONFIG_HASH: hash_}, ownerReferences=NODE_OWNS)
    ).pods
    assert wanted.aliases == []


def test_a_pods_own_uid_wins_over_anothers_claim() -> None:
    thief, owner = pod("thief", "100", static_id="owner"), pod("owner", "350")
    for pods in ([thief, owner], [owner, thief]):
        assert {p.uid: p.aliases for p in snapshot.content(pods).pods} == {"thief": [], "owner": []}
    other = snapshot.content([thief, pod("owner")])
    assert (other.pods[0].aliases, other.others) == ([], ["owner"])


def test_of_two_that_claim_one_id_the_older_has_it() -> None:
    old = pod("z-old", "350", static_id="hash", created="2026-01-01T00:00:00Z")
    new = pod("a-new", "100", static_id="hash", created="2026-01-02T00:00:00Z")
    for pods in ([old, new], [new, old]):
        assert {p.uid: p.aliases for p in snapshot.content(pods).pods} == {
            "z-old": ["hash"],
            "a-new": [],
        }


PODS = st.lists(
    st.builds(
        pod,
        st.sampled_from("abcdef"),
        st.sampled_from([None, "350", "broken"]),
        static_id=st.sampled_from([None, *"abcxyz"]),
        created=st.sampled_from(["1", "2"]),
        name=st.sampled_from(["p", "q"]),
    ),
    unique_by=lambda p: p.uid,
)


@given(PODS, st.randoms(use_true_random=False))
def test_no_id_means_two_pods_and_every_pod_is_there_in_any_order(
    pods: list[Pod], chance: random.Random
) -> None:
    found = snapshot.content(pods)
    ids = [id_ for p in found.pods for id_ in (p.uid, *p.aliases)] + found.others
    assert len(ids) == len(set(ids))
    assert {p.uid for p in pods} <= set(ids)
    assert {p.uid for p in found.pods} == {p.uid for p in pods if p.wish is not None}
    shuffled = pods.copy()
    chance.shuffle(shuffled)
    assert snapshot.content(shuffled) == found


# ---------------------------------------------------------------------- how many, what changed


@pytest.mark.parametrize("annotated", [0, 1, MAX_PODS])
def test_as_many_as_a_message_holds_and_not_one_more(annotated: int) -> None:
    pods = [pod(str(k), "350" if k < annotated else None) for k in range(MAX_PODS)]
    found = snapshot.content(pods)
    assert len(found.pods) + len(found.others) == MAX_PODS
    with pytest.raises(snapshot.TooMuchError, match=f"{MAX_PODS + 1} pods .* at most {MAX_PODS}"):
        snapshot.content([*pods, pod("one more")])


def test_what_changed_is_what_is_new_or_asks_for_something_else() -> None:
    before = snapshot.content([pod("a", "1"), pod("b", "2"), pod("c", "3"), pod("d")])
    after = snapshot.content([pod("a", "1"), pod("b", "9"), pod("c"), pod("d", "4")])
    assert [p.uid for p in snapshot.changed(before, after)] == ["b", "d"]
    assert [p.uid for p in snapshot.gone(before, after)] == ["c"]


def test_newly_limited_is_who_asks_for_another_limit_and_not_for_the_same_in_other_words() -> None:
    before = snapshot.content(
        [pod("a", "1"), pod("b", "2"), pod("c", "x"), pod("d"), pod("e", "5")]
    )
    after = snapshot.content(
        [pod("a", "1.0"), pod("b", "9"), pod("c", "3"), pod("d", "4"), pod("e", "x"), pod("f", "6")]
    )
    assert snapshot.newly_limited(before, after) == ["b", "c", "d", "f"]
