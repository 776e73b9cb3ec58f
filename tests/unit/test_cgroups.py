"""The cgroup parser: real and hostile samples, and what no process can do to its own path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.cgroups import pod_of, root_above, roots_beside, usual_roots
from enforcer.policy import Stranger


class Sample(TypedDict):
    name: str
    text: str
    anchor: str
    pod_uid: str | None
    note: str


class Place(TypedDict):
    """A process on a node: `own`, `first` and `runtime` are what the enforcer learns places by."""

    name: str
    source: str
    own: str
    first: str
    runtime: str
    text: str
    pod_uid: str | None


DATA = Path(__file__).parent / "data"
SAMPLES: list[Sample] = json.loads((DATA / "cgroup_samples.json").read_text())
PLACES: list[Place] = json.loads((DATA / "cgroup_places.json").read_text())
USUAL_ROOTS = ("/", "/kubelet", "/kubelet.slice")
OWN = "2c1f7a54-0b6e-4d0b-9a51-3f4f7c9f0a11"
VICTIM = "9f0e1d2c-3b4a-4958-8776-655443322110"
CONTAINER = "3fa9" * 16


def bytes_of(sample: Sample) -> bytes:
    """The file as the kernel would give it; one sample spells bytes as latin-1 characters."""
    return sample["text"].encode("latin-1" if "latin1" in sample["name"] else "utf-8")


def systemd_slice(uid: str, qos: str = "burstable", nested: str = "") -> str:
    infix, low = f"-{qos}" if qos else "", uid.replace("-", "_")
    middle = f"{nested}kubepods-{qos}.slice/" if qos else ""
    return f"{nested}kubepods.slice/{middle}{nested}kubepods{infix}-pod{low}.slice"


def cgroupfs_path(uid: str, qos: str = "burstable") -> str:
    return f"kubepods/{qos + '/' if qos else ''}pod{uid}"


def test_all_samples_are_here() -> None:
    assert len(SAMPLES) == 67
    assert len({sample["name"] for sample in SAMPLES}) == 67


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample["name"])
def test_sample(sample: Sample) -> None:
    found = pod_of(bytes_of(sample), (sample["anchor"],))
    assert (None if isinstance(found, Stranger) else found) == sample["pod_uid"]


POSITIVE = [sample for sample in SAMPLES if sample["pod_uid"] is not None]


@pytest.mark.parametrize("sample", POSITIVE, ids=lambda sample: sample["name"])
def test_sample_shows_its_root(sample: Sample) -> None:
    """The enforcer's own cgroup, whatever the runtime, shows where pods live."""
    assert root_above(bytes_of(sample)) == sample["anchor"]


@pytest.mark.parametrize("sample", POSITIVE, ids=lambda sample: sample["name"])
def test_sample_under_another_root_is_no_pod(sample: Sample) -> None:
    assert pod_of(bytes_of(sample), ("/somewhere",)) is Stranger.OTHER
    below = sample["text"].replace(":/", ":/machine.slice/box.scope/").encode()
    assert pod_of(below, (sample["anchor"],)) is Stranger.OTHER


RELATIVE = [s for s in SAMPLES if "/.." in s["text"]]


@pytest.mark.parametrize("sample", RELATIVE, ids=lambda sample: sample["name"])
def test_a_path_relative_to_a_private_namespace_is_unknown_not_other(sample: Sample) -> None:
    """OTHER would let a GPU be given back (I5)."""
    assert pod_of(bytes_of(sample), USUAL_ROOTS) is Stranger.UNKNOWN
    assert root_above(bytes_of(sample)) is None


@pytest.mark.parametrize("nested", ["", "kubelet-"], ids=["plain", "nested"])
@pytest.mark.parametrize("qos", ["", "burstable", "besteffort"], ids=["guaranteed", "b", "be"])
@pytest.mark.parametrize("uid", [OWN, "9aac5b5c8815def09a2ef9e37b89da55"], ids=["uuid", "md5"])
def test_every_driver_qos_and_kind_of_uid(uid: str, qos: str, nested: str) -> None:
    root = "/kubelet.slice" if nested else ""
    for below in ("", f"/cri-containerd-{CONTAINER}.scope", "/x/kubepods/pod"):
        text = f"0::{root}/{systemd_slice(uid, qos, nested)}{below}\n".encode()
        assert pod_of(text, USUAL_ROOTS) == uid
        assert root_above(text) == (root or "/")
    if not nested:
        assert pod_of(f"0::/{cgroupfs_path(uid, qos)}/{CONTAINER}\n".encode(), USUAL_ROOTS) == uid


HOSTILE_NO_POD = {
    "user-session": f"0::/user.slice/user-1000.slice/user@1000.service/{systemd_slice(VICTIM)}",
    "user-slice-cgroupfs": f"0::/user.slice/{cgroupfs_path(VICTIM)}/{CONTAINER}",
    "below-a-usual-root-s-child": f"0::/kubelet.slice/x/{systemd_slice(VICTIM)}",
    "kubepods-sibling": f"0::/kubepods2/burstable/pod{VICTIM}/{CONTAINER}",
    "kubepods-suffix": f"0::/xkubepods/burstable/pod{VICTIM}/{CONTAINER}",
    "unknown-qos": f"0::/kubepods/guaranteed/pod{VICTIM}/{CONTAINER}",
    "uid-too-long": f"0::/kubepods/burstable/pod{VICTIM}0/{CONTAINER}",
    "uid-with-a-suffix": f"0::/kubepods/burstable/pod{VICTIM}.slice/{CONTAINER}",
    "uid-33-digits": f"0::/kubepods/burstable/pod{'a' * 33}",
    "uid-31-digits": f"0::/kubepods/burstable/pod{'a' * 31}",
    "underscores-under-cgroupfs": f"0::/kubepods/pod{VICTIM.replace('-', '_')}",
    "dashes-under-systemd": f"0::/kubepods.slice/kubepods-pod{VICTIM}.slice",
    "double-slash": f"0:://kubepods/burstable/pod{VICTIM}",
    "unicode-digits": "0::/kubepods/pod９f0e1d2c-3b4a-4958-8776-655443322110",
    "pod-without-kubepods": f"0::/pod{VICTIM}/{CONTAINER}",
    "systemd-qos-without-its-root": f"0::/{systemd_slice(VICTIM).split('/', 1)[1]}",
    "empty-name-between": f"0::/kubepods//pod{VICTIM}",
    "only-the-root": "0::/kubepods",
    "deleted-root": "0::/kubepods (deleted)",
}


@pytest.mark.parametrize("text", HOSTILE_NO_POD.values(), ids=HOSTILE_NO_POD.keys())
def test_hostile_path_is_no_pod(text: str) -> None:
    assert pod_of(f"{text}\n".encode(), USUAL_ROOTS) is Stranger.OTHER
    assert pod_of(f"{text}\n12:cpu:/\n".encode(), USUAL_ROOTS) is Stranger.OTHER


NONSENSE = {
    "empty": b"",
    "only-a-newline": b"\n",
    "no-colon": b"kubepods\n",
    "one-colon": b"0:/kubepods\n",
    "relative": b"0::kubepods/pod\n",
    "blank-line-between": f"0::/{cgroupfs_path(OWN)}\n\n1:cpu:/\n".encode(),
    "no-number": f":: /{cgroupfs_path(OWN)}\n".encode(),
    "letters-for-a-number": f"x::/{cgroupfs_path(OWN)}\n".encode(),
    "cut-before-the-path": f"0::/{cgroupfs_path(OWN)}\n1:cpu".encode(),
    "dots-after-the-own-pod": f"0::/{cgroupfs_path(OWN)}/../pod{VICTIM}\n".encode(),
    "dots-at-the-end": f"0::/{cgroupfs_path(OWN)}/..\n".encode(),
}


@pytest.mark.parametrize("text", NONSENSE.values(), ids=NONSENSE.keys())
def test_what_no_kernel_writes_is_unknown(text: bytes) -> None:
    assert pod_of(text, USUAL_ROOTS) is Stranger.UNKNOWN
    assert root_above(text) is None


def test_lines_that_name_different_pods_are_unknown() -> None:
    text = f"1:cpu:/{cgroupfs_path(OWN)}\n0::/{cgroupfs_path(VICTIM)}\n".encode()
    assert pod_of(text, USUAL_ROOTS) is Stranger.UNKNOWN


def test_lines_of_other_hierarchies_do_not_hide_the_pod() -> None:
    text = f"2:cpu:/\n1:name=systemd:/user.slice\n0::/{cgroupfs_path(OWN)}/{CONTAINER}\n"
    assert pod_of(text.encode(), USUAL_ROOTS) == OWN


def test_the_root_is_anchored_also_with_a_slash_at_its_end() -> None:
    text = f"0::/kubelet.slice/{systemd_slice(OWN, nested='kubelet-')}\n".encode()
    assert pod_of(text, ("/kubelet.slice/",)) == OWN
    assert pod_of(text, ("/",)) is Stranger.OTHER
    assert pod_of(text, ("/kubelet",)) is Stranger.OTHER  # a prefix of the name is not the place


def test_names_with_colons_blanks_and_bytes_of_no_encoding() -> None:
    below = b"/a:b:c/with blanks/\\x2d/\xff\xfe/ (deleted)/\x01"
    text = b"0::/" + cgroupfs_path(OWN).encode() + below + b"\n"
    assert pod_of(text, USUAL_ROOTS) == OWN


def test_a_removed_cgroup_is_still_its_pods() -> None:
    assert pod_of(f"0::/{cgroupfs_path(OWN)} (deleted)\n".encode(), USUAL_ROOTS) == OWN


def test_a_very_long_path_is_read_to_its_end() -> None:
    text = f"9:cpu:{'/x' * 200_000}\n0::/{cgroupfs_path(OWN)}{'/y' * 200_000}\n".encode()
    assert pod_of(text, USUAL_ROOTS) == OWN


def test_root_above_takes_the_outermost_pod() -> None:
    """The enforcer in a pod of a node that is itself a pod sees the outer node's kubepods."""
    text = f"0::/{cgroupfs_path(OWN)}/{CONTAINER}/kubelet.slice/{cgroupfs_path(VICTIM)}\n"
    assert root_above(text.encode()) == "/"


@pytest.mark.parametrize("text", [b"0::/\n", b"0::/system.slice/sshd.service\n", b"0::/../../x\n"])
def test_root_above_is_none_outside_any_pod(text: bytes) -> None:
    assert root_above(text) is None


# ---- roots that systemd spells, and two of them on one node ----

LOW = OWN.replace("-", "_")
NESTED = {
    "digits": ("/k8s.slice", "k8s-"),
    "levels-and-escapes": ("/root.slice/root-cgroup_here.slice", "root-cgroup_here-"),
    "hex-escape": ("/my\\x2dslice.slice", "my\\x2dslice-"),
    "dots-and-colons": ("/a.b:c.slice", "a.b:c-"),
    "capitals": ("/Kube.slice", "Kube-"),
    "in-a-container": (f"/docker/{CONTAINER}/kubelet.slice", "kubelet-"),
}


@pytest.mark.parametrize("qos", ["", "burstable", "besteffort"])
@pytest.mark.parametrize(("root", "nested"), NESTED.values(), ids=NESTED.keys())
def test_any_parent_that_systemd_can_spell(root: str, nested: str, qos: str) -> None:
    below = f"{systemd_slice(OWN, qos, nested)}/cri-containerd-{CONTAINER}.scope"
    text = f"0::{root}/{below}\n".encode()
    assert root_above(text) == root
    assert pod_of(text, (root,)) == OWN


@pytest.mark.parametrize("nested", ["", "other-", "k8s-other-", "k8s"])
def test_a_slice_that_does_not_spell_its_own_root_is_no_kubelets(nested: str) -> None:
    """systemd makes a-b.slice in a.slice only, so this is somebody's look-alike."""
    text = f"0::/k8s.slice/{systemd_slice(OWN, nested=nested)}/box\n".encode()
    assert pod_of(text, ("/k8s.slice",)) is Stranger.OTHER
    assert root_above(text) is None


SERVICE = "/system.slice/containerd.service"
COLON = f"kubepods-burstable-pod{LOW}.slice:cri-containerd:{CONTAINER}"
SCOPE = f"{systemd_slice(OWN)}/cri-containerd-{CONTAINER}.scope"


@pytest.mark.parametrize(
    ("own", "first", "worker"),
    [
        (f"{SERVICE}/{COLON}", "/init.scope", f"/{SCOPE}"),
        (f"/{SCOPE}", "/init.scope", f"{SERVICE}/{COLON}"),
        (f"/{SCOPE}", "/", f"/system.slice/rke2-agent.service/{COLON}"),
        (f"/{SCOPE}", "/init.scope", f"/runtime.slice/containerd.service/{COLON}"),
        (
            f"{SERVICE}/k8s-{COLON}",
            "/init.scope",
            f"/k8s.slice/{systemd_slice(OWN, nested='k8s-')}/x.scope",
        ),
        (
            f"/docker/abc/kubelet.slice/{systemd_slice(OWN, nested='kubelet-')}/x.scope",
            "/docker/abc/init.scope",
            f"/docker/abc{SERVICE}/kubelet-{COLON}",
        ),
    ],
    ids=["own-on-cgroupfs", "own-on-systemd", "rke2", "eks", "a-root-of-its-own", "in-a-container"],
)
def test_both_drivers_of_one_node_are_known_from_the_own_path(
    own: str, first: str, worker: str
) -> None:
    roots = roots_beside(f"0::{own}\n".encode(), f"0::{first}\n".encode())
    assert roots[0] == root_above(f"0::{own}\n".encode())
    for path in (own, worker):
        assert pod_of(f"0::{path}\n".encode(), roots) == OWN


@pytest.mark.parametrize(
    "path",
    [
        f"/user.slice/user-1000.slice/{COLON}",
        f"/machine.slice/{COLON}",
        f"/system.slice/nginx.service/{COLON}",
        f"/system.slice/docker-{CONTAINER}.scope{SERVICE}/{COLON}",
        f"/docker/{CONTAINER}/kubelet.slice/{systemd_slice(OWN, nested='kubelet-')}",
        f"/docker/{CONTAINER}/{SCOPE}",
    ],
)
def test_what_lies_elsewhere_stays_nobodys_with_both_drivers(path: str) -> None:
    text = f"0::{path}\n".encode()
    for own in (f"{SERVICE}/{COLON}", f"/{SCOPE}"):
        roots = roots_beside(f"0::{own}\n".encode(), b"0::/init.scope\n")
        assert pod_of(text, roots) is Stranger.OTHER
    assert pod_of(text, usual_roots()) is Stranger.OTHER


def test_a_pod_inside_a_pod_counts_for_the_outer_one() -> None:
    roots = roots_beside(f"0::/{SCOPE}\n".encode(), b"0::/init.scope\n")
    inner = f"kubelet.slice/{systemd_slice(VICTIM, nested='kubelet-')}"
    assert pod_of(f"0::/{SCOPE}/{inner}\n".encode(), roots) == OWN
    assert pod_of(f"0::/{SCOPE}{SERVICE}/{COLON}\n".encode(), roots) == OWN


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place["name"])
def test_place(place: Place) -> None:
    roots = roots_beside(*(place[key].encode() for key in ("own", "first", "runtime")))
    found = pod_of(place["text"].encode(), roots)
    assert (None if isinstance(found, Stranger) else found) == place["pod_uid"]


def test_without_a_pod_in_the_own_path_there_is_no_root() -> None:
    assert roots_beside(b"0::/system.slice/x.service\n", b"0::/init.scope\n") == ()


# ---- properties ----

BYTES = st.one_of(
    st.binary(max_size=200),
    st.text("0123456789:/.-_kubepodsurtlicen\n ", max_size=120).map(str.encode),
    st.sampled_from([bytes_of(s) for s in SAMPLES]).flatmap(
        lambda text: st.integers(0, len(text)).map(lambda cut: text[:cut])
    ),
)


# One level of a --cgroup-root as the kubelet spells it for systemd (systemd.unit(5)).
LEVELS = st.lists(st.from_regex(r"[A-Za-z0-9:_.\\]{1,12}", fullmatch=True), max_size=4)


@settings(max_examples=300, deadline=None, database=None)
@given(LEVELS, st.sampled_from(["", "burstable", "besteffort"]))
def test_any_levels_that_systemd_can_spell_show_the_pod_and_no_other_root(
    levels: list[str], qos: str
) -> None:
    chain = [f"{'-'.join(levels[:end])}.slice" for end in range(1, len(levels) + 1)]
    root, way = "/" + "/".join(chain), "".join(f"{level}-" for level in levels)
    text = f"0::{root.rstrip('/')}/{systemd_slice(OWN, qos, way)}/x.scope\n".encode()
    assert root_above(text) == root
    assert pod_of(text, (root,)) == OWN
    for end in range(len(levels)):
        assert pod_of(text, ("/" + "/".join(chain[:end]),)) is Stranger.OTHER


NODES = st.sampled_from(["", "/docker/a", "/docker/b", "/system.slice/docker-c.scope", "/lxc/d"])
FIRSTS = st.sampled_from(["", "/init", "/init.scope"])
OWNS = st.sampled_from(
    [SCOPE, cgroupfs_path(OWN), f"kubelet.slice/{systemd_slice(OWN, nested='kubelet-')}"]
)
WORKERS = st.sampled_from([SCOPE, cgroupfs_path(OWN), f"{SERVICE[1:]}/{COLON}"])


@settings(max_examples=300, deadline=None, database=None)
@given(NODES, NODES, FIRSTS, OWNS, WORKERS)
def test_pods_count_on_the_node_whose_they_are_and_on_no_other(
    here: str, there: str, first: str, own: str, worker: str
) -> None:
    """Nodes in containers, and the machine around them, in one cgroup namespace."""
    roots = roots_beside(f"0::{here}/{own}\n".encode(), f"0::{here}{first or '/'}\n".encode())
    found = pod_of(f"0::{there}/{worker}\n".encode(), roots)
    assert found == (OWN if here == there else Stranger.OTHER)


@settings(max_examples=500, deadline=None, database=None)
@given(BYTES, st.lists(st.sampled_from((*USUAL_ROOTS, "/x")), max_size=3))
def test_no_bytes_raise(text: bytes, roots: list[str]) -> None:
    found = pod_of(text, roots)
    assert isinstance(found, (str, Stranger))
    root = root_above(text)
    assert root is None or root.startswith("/")
    if root is not None:
        assert pod_of(text, (root,)) is not Stranger.OTHER


@pytest.mark.parametrize("sample", POSITIVE, ids=lambda sample: sample["name"])
def test_a_cut_anywhere_never_names_another_pod(sample: Sample) -> None:
    text = bytes_of(sample)
    for end in range(len(text)):
        found = pod_of(text[:end], (sample["anchor"],))
        assert isinstance(found, Stranger) or found == sample["pod_uid"]


MIMICS = st.lists(
    st.sampled_from(
        (
            *systemd_slice(VICTIM).split("/"),
            *systemd_slice(VICTIM, nested="kubelet-").split("/"),
            *cgroupfs_path(VICTIM).split("/"),
            cgroupfs_path(VICTIM),
            systemd_slice(VICTIM, ""),
            f"kubepods-burstable-pod{VICTIM.replace('-', '_')}.slice:cri-containerd:{CONTAINER}",
            f"cri-containerd-{CONTAINER}.scope",
            "kubelet.slice",
            "kubelet",
            "x y",
            "1:cpu:",
            " (deleted)",
        )
    ),
    min_size=1,
    max_size=6,
).map("/".join)
# Where only root makes cgroups: the root, and the kubelet's own between it and the pods.
ROOTS_OWN = ("host-root", "host-kubepods-slice-itself", "v1-mixed-controllers")
WHOLE = [s for s in SAMPLES if s["text"].endswith("\n") and s["name"] not in ROOTS_OWN]


@settings(max_examples=600, deadline=None, database=None)
@given(st.sampled_from(WHOLE), MIMICS)
def test_a_mimicked_cgroup_below_a_process_s_own_never_changes_the_answer(
    sample: Sample, below: str
) -> None:
    own = bytes_of(sample)
    inside = b"\n".join(line + b"/" + below.encode() for line in own.rstrip(b"\n").split(b"\n"))
    for roots in (USUAL_ROOTS, (sample["anchor"],)):
        assert pod_of(inside + b"\n", roots) == pod_of(own, roots)
