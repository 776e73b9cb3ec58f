"""The kubelet's checkpoint: what is read, and that an odd one is unknown, not empty."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.device import Board
from enforcer.dra import STATE
from enforcer.kubelet import CHECKPOINT, Held, Kubelet, name_of, parse
from shared.logs import Log
from tests.simnode.checkpoint import Checkpoint, Claims

GPU = "GPU-5c0e2d0a-37b0-4d8a-8f0e-0d3d6f6c2b11"
OTHER = "GPU-00000000-37b0-4d8a-8f0e-0d3d6f6c2b12"
POD = "2c1f7a54-0b6e-4d0b-9a51-3f4f7c9f0a11"
ALL = ("nvidia.com/*",)


def entry(**changed: object) -> dict[str, object]:
    plain: dict[str, object] = {
        "PodUID": POD,
        "ContainerName": "main",
        "ResourceName": "nvidia.com/gpu",
        "DeviceIDs": {"-1": [GPU]},
        "AllocResp": "AAAA",
    }
    return plain | changed


def text(*entries: object, **more: object) -> bytes:
    data = {"PodDeviceEntries": list(entries), "RegisteredDevices": {"nvidia.com/gpu": [GPU]}}
    return json.dumps({"Data": data, "Checksum": 18_446_744_073_709_551_615} | more).encode()


# By hand, after pkg/kubelet/cm/devicemanager/checkpoint of the versions named.
@pytest.mark.parametrize(
    ("sample", "devices"),
    [
        pytest.param(text(entry()), [GPU], id="1.20-to-1.37"),
        pytest.param(text(entry(DeviceIDs={"0": [GPU], "1": [OTHER]})), [GPU, OTHER], id="numa"),
        pytest.param(text(entry(DeviceIDs=[GPU])), [GPU], id="before-1.20"),
        pytest.param(text(entry(AllocResp=None)), [GPU], id="no-answer-kept"),
        pytest.param(text(entry(ResourceName="nvidia.com/gpu.shared")), [GPU], id="shared"),
        pytest.param(text(entry(ResourceName="example.com/nic")), [], id="another-vendors"),
        pytest.param(text(), [], id="none"),
        pytest.param(
            b'{"Data":{"PodDeviceEntries":null,"RegisteredDevices":{}},"Checksum":1}', [], id="new"
        ),
    ],
)
def test_checkpoints_of_kubelets(sample: bytes, devices: list[str]) -> None:
    assert sorted(held.device for held in parse(sample, ALL)) == sorted(devices)


SAMPLES = Path(__file__).parent / "data/checkpoints"


def test_what_a_real_kubelet_wrote_is_read_whole() -> None:
    """Kubelet 1.37.2 of the cluster tests: two containers with whole GPUs, one with a replica."""
    held = parse((SAMPLES / "kubelet-1.37.2.json").read_bytes(), ALL)
    assert sorted((each.container, each.resource) for each in held) == [
        ("main", "nvidia.com/gpu.shared"),
        ("server", "nvidia.com/gpu"),
        ("server", "nvidia.com/gpu"),
        ("sidecar", "nvidia.com/gpu"),
    ]
    named = {name_of(each.device) for each in held}
    assert len(named) == 3
    assert all(name is not None and name.startswith("GPU-") for name in named)


SECOND = "GPU-9a7f4b1c-6d52-4c1e-9b3a-2f8e7d6c5b44"
LAST_POD = "7d1b3c8e-52a4-4f0e-8a6f-6c2c1f0d9b22"
OF_GPUS = {
    Held(POD, "server", "nvidia.com/gpu", GPU),
    Held(POD, "server", "nvidia.com/gpu", SECOND),
    Held(POD, "sidecar", "nvidia.com/gpu.shared", f"{GPU}::3"),
    Held(LAST_POD, "main", "nvidia.com/mig-1g.10gb", "MIG-41c2a8a6-8a30-5a2e-a1c5-0d3d6f6c2b11"),
}


@pytest.mark.parametrize(
    ("sample", "held"),
    [
        ("kubelet-1.25-to-1.37", OF_GPUS),
        ("kubelet-1.25-to-1.37-new", set()),
        ("kubelet-1.19", OF_GPUS),
    ],
)
def test_what_the_code_of_kubelets_wrote_is_read_exactly(sample: str, held: set[Held]) -> None:
    """The folder's README says of which versions, and how."""
    assert parse((SAMPLES / f"{sample}.json").read_bytes(), ALL) == held


def test_an_entry_that_stands_twice_counts_once() -> None:
    assert parse(text(entry(), entry(), entry(DeviceIDs={"0": [GPU, GPU]})), ALL) == {
        Held(POD, "main", "nvidia.com/gpu", GPU)
    }


@pytest.mark.parametrize(
    "sample",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        text(entry())[:-1],
        text(entry(PodUID=7)),
        text(entry(DeviceIDs={"0": GPU})),
        text(entry(DeviceIDs=[[GPU]])),
        text(entry(PodUID="x" * 257)),
        text(entry(Claim="of a newer kubelet")),
        text(entry(), Version=3),
        text({"PodUID": POD}),
        text(*[entry()] * 4097),
        b"\xff\xfe" + text(entry()),
        text(entry()).replace(b"main", b"ma\xffn"),
        text(entry()).replace(b"main", b"\\ud800"),
        b"[" * 100_000,
        text(entry(AllocResp=7)),
        text(entry(DeviceIDs={"0": [GPU] * 4097})),
        text(*[entry(DeviceIDs=[f"{pod}-{n}" for n in range(4096)]) for pod in range(5)]),
        text(Data={"PodDeviceEntries": [], "RegisteredDevices": {"nvidia.com/gpu": GPU}}),
        text(Data={"PodDeviceEntries": [], "RegisteredDevices": {"nvidia.com/gpu": [GPU] * 4097}}),
        text(Data={"PodDeviceEntries": {}, "RegisteredDevices": {}}),
        text(Checksum="1"),
    ],
    ids=lambda sample: repr(sample[:40]),
)
def test_what_is_not_as_expected_is_refused_whole(sample: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse(sample, ALL)


@settings(max_examples=300, deadline=None, database=None)
@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    try:
        found = parse(data, ALL)
    except ValueError:
        return
    assert all(isinstance(held, Held) for held in found)


MIG = "MIG-41c2a8a6-8a30-5a2e-a1c5-0d3d6f6c2b11"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (GPU, GPU),
        (f"{GPU}::0", GPU),
        (f"{GPU}::17", GPU),
        (f"MIG-{GPU}/7/0", GPU),
        (f"MIG-{GPU}/7/0::2", GPU),
        (MIG, MIG),
        (f"{MIG}::3", MIG),
        ("nvidia0", "nvidia0"),
        ("nvidia12/vgpu3", "nvidia12"),
        ("nvidia0/gi1", "nvidia0"),
        ("nvidia0/gi1/vgpu2", "nvidia0"),
        (f"{MIG}/7/0", None),
        ("nvidia", None),
        ("nvidia00", None),
        ("nvidia-1", None),
        ("nvidiactl", None),
        ("nvidia0/vgpu1/gi1", None),
        ("nvidia0/", None),
        ("nvidia٣", None),
        (f"MIG-{GPU}", None),
        (f"{GPU}::", None),
        (f"{GPU}::a", None),
        (f"{GPU} ", None),
        (f"x{GPU}", None),
        ("0", None),
        ("0:1", None),
        ("", None),
    ],
)
def test_only_names_without_doubt_mean_a_gpu(device: str, name: str | None) -> None:
    assert name_of(device) == name


def test_a_mig_instances_board_is_asked_for_until_it_is_known(tmp_path: Path) -> None:
    boards: dict[str, str] = {}
    asked: list[str] = []

    def whole_of(part: str) -> str | None:
        asked.append(part)
        return boards.get(part)

    kubelet = Kubelet(tmp_path, ALL, Lines(), whole_of)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.assign(POD, f"{MIG}::1", resource="nvidia.com/mig-1g.10gb")
    board, other = Board(GPU, 0, None), Board(OTHER, 1, None)
    assert kubelet.assigned(board) == ()
    boards[MIG] = GPU
    (held,) = kubelet.assigned(board)
    assert (held.pod, MIG in held.evidence) == (POD, True)
    checkpoint.assign("other", "nvidia9")
    assert [each.pod for each in kubelet.assigned(board)] == [POD]
    assert kubelet.assigned(other) == ()
    assert asked == [MIG, MIG]
    checkpoint.forget([POD])
    assert kubelet.assigned(board) == ()


def test_a_device_node_means_the_board_with_that_number_and_no_index(tmp_path: Path) -> None:
    Checkpoint(tmp_path).assign(POD, "nvidia1/gi2/vgpu0", "1")
    kubelet = Kubelet(tmp_path, ALL, Lines(), nobody_tells)
    held = [
        bool(kubelet.assigned(Board(GPU, index, None, minor=minor)))
        for index, minor in ((0, 1), (1, 0), (1, None))
    ]
    assert held == [True, False, False]


def nobody_tells(_part: str) -> str | None:
    return None


class Lines(Log):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__("enforcer", "info", "json")
        self.said: list[tuple[str, str, object]] = []

    def _write(self, level: str, event: str, values: dict[str, object]) -> None:
        self.said.append((level, event, values["why"]))


def test_what_was_read_last_holds_while_the_file_cannot_be_read(tmp_path: Path) -> None:
    log, checkpoint = Lines(), Checkpoint(tmp_path)
    kubelet = Kubelet(tmp_path, ALL, log, nobody_tells)
    board = Board(GPU, 0, None)
    assert kubelet.assigned(board) == ()
    assert str(tmp_path / CHECKPOINT) in kubelet.state
    checkpoint.assign(POD, f"{GPU}::1", container="server")
    (held,) = kubelet.assigned(board)
    assert held.pod == POD
    assert held.evidence == f"nvidia.com/gpu {GPU}::1 of container server"
    assert kubelet.assigned(Board(OTHER, 1, None)) == ()
    assert kubelet.state == "ok"
    for damage in (b"{", b" " * (4 << 20) + b"{}"):
        checkpoint.path.write_bytes(damage)
        assert kubelet.assigned(board) == (held,)
        assert kubelet.assigned(board) == (held,)
        assert kubelet.state != "ok"
    checkpoint.path.unlink()
    assert kubelet.assigned(board) == (held,)
    checkpoint.forget([POD])
    assert kubelet.assigned(board) == ()
    assert len(log.said) == 6  # each state once


def test_both_files_say_whose_a_gpu_is(tmp_path: Path) -> None:
    log = Lines()
    kubelet = Kubelet(tmp_path, ALL, log, nobody_tells)
    Checkpoint(tmp_path).assign(POD, GPU)
    board = Board(GPU, 0, None, minor=3)
    assert [each.pod for each in kubelet.assigned(board)] == [POD]
    claims = Claims(tmp_path)
    claims.prepare("b", "c", devices=["gpu-3"])
    claims.prepare("d", devices=["gpu-3-mig-1g10gb-19-0", "gpu-0"], name="slice")
    assert [(each.pod, each.evidence) for each in kubelet.assigned(board)] == [
        (POD, f"nvidia.com/gpu {GPU} of container main"),
        ("b", "device gpu-3 of claim default/worker-gpu"),
        ("c", "device gpu-3 of claim default/worker-gpu"),
        ("d", "device gpu-3-mig-1g10gb-19-0 of claim default/slice"),
    ]
    assert [each.pod for each in kubelet.assigned(Board(OTHER, 3, None, minor=0))] == ["d"]
    assert kubelet.assigned(Board(OTHER, 3, None)) == ()
    assert log.said == [("info", "kubelet", "ok")]  # that there was no claim is nothing to say


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({}, CHECKPOINT),
        ({CHECKPOINT: text()}, "ok"),
        ({STATE: b"dra"}, "ok"),
        ({STATE: b"{"}, STATE),
        ({CHECKPOINT: b"{"}, CHECKPOINT),
        ({CHECKPOINT: text(), STATE: b"{"}, STATE),
        ({CHECKPOINT: b"{", STATE: b"dra"}, CHECKPOINT),
        ({CHECKPOINT: b"{", STATE: b"{"}, f"{CHECKPOINT}: not .*; .*{STATE}: not "),
    ],
)
def test_a_node_has_either_file_or_both(
    tmp_path: Path, files: dict[str, bytes], state: str
) -> None:
    (tmp_path / CHECKPOINT).parent.mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        if content == b"dra":
            Claims(tmp_path).write()
    log = Lines()
    kubelet = Kubelet(tmp_path, ALL, log, nobody_tells)
    for _ in range(3):
        kubelet.assigned(Board(GPU, 0, None))
    assert re.search(state, kubelet.state)
    assert ("ok" in kubelet.state) == (state == "ok")
    assert [level for level, *_ in log.said] == ["info" if state == "ok" else "warning"]


def test_claims_that_were_read_last_hold_while_their_file_cannot_be_read(tmp_path: Path) -> None:
    log, claims = Lines(), Claims(tmp_path)
    Checkpoint(tmp_path).write()
    kubelet, board = Kubelet(tmp_path, ALL, log, nobody_tells), Board(GPU, 0, None, minor=0)
    claims.prepare(POD, devices=["gpu-0"])
    (held,) = kubelet.assigned(board)
    whole = claims.path.read_bytes()
    for damage in (whole[:-1], whole.replace(b"gpu-0", b"gpu-1"), whole.ljust(5 << 20)):
        claims.path.write_bytes(damage)
        assert kubelet.assigned(board) == kubelet.assigned(board) == (held,)
        assert f"{STATE}: not a checkpoint that is known here" in kubelet.state
    claims.path.unlink()  # one that had something to say is missed
    assert kubelet.assigned(board) == (held,)
    assert "No such file" in kubelet.state
    claims.path.write_bytes(whole)
    assert kubelet.assigned(board) == (held,)
    claims.claims.clear()
    claims.write()
    assert kubelet.assigned(board) == ()
    assert len(log.said) == 6  # each state once


def test_a_file_that_was_out_of_reach_for_a_while_is_read_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.assign(POD, GPU)
    kubelet, board = Kubelet(tmp_path, ALL, Lines(), nobody_tells), Board(GPU, 0, None)
    assert kubelet.assigned(board)
    aside = checkpoint.path.rename(tmp_path / "aside")
    assert kubelet.assigned(board)
    assert kubelet.state != "ok"
    aside.rename(checkpoint.path)
    assert kubelet.assigned(board)
    assert kubelet.state == "ok"


def whole_one(root: Path, place: str) -> Path:
    """A file that would be read, for another place."""
    made = Checkpoint(root) if place == CHECKPOINT else Claims(root)
    made.write()
    return made.path


def link_to_a_whole_one(path: Path, place: str) -> None:
    path.symlink_to(whole_one(path.parent / "elsewhere", place))


def five_mib(path: Path, place: str) -> None:
    path.write_bytes(whole_one(path.parent / "elsewhere", place).read_bytes().ljust(5 << 20))


def cut(path: Path, place: str) -> None:
    path.write_bytes(whole_one(path.parent / "elsewhere", place).read_bytes()[:-1])


@pytest.mark.parametrize("place", [CHECKPOINT, STATE])
@pytest.mark.parametrize(
    "make",
    [
        lambda path, _: os.mkfifo(path),
        lambda path, _: path.mkdir(),
        lambda path, _: path.symlink_to("/dev/zero"),
        link_to_a_whole_one,
        five_mib,
        cut,
    ],
    ids=["pipe", "folder", "device", "link", "five-mib", "cut"],
)
def test_what_lies_in_its_place_does_not_block_or_lead_elsewhere(
    tmp_path: Path, make: Callable[[Path, str], None], place: str
) -> None:
    (tmp_path / CHECKPOINT).parent.mkdir()
    make(tmp_path / place, place)
    kubelet = Kubelet(tmp_path, ALL, Lines(), nobody_tells)
    assert kubelet.assigned(Board(GPU, 0, None)) == ()
    assert kubelet.state.startswith(str(tmp_path / place))
