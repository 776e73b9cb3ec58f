"""The kubelet's state of claims (DRA): what is read, and that an odd one is unknown, not empty."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.dra import Prepared, parse
from tests.simnode.checkpoint import state_of_claims

SAMPLES = Path(__file__).parent / "data/checkpoints"
POD = "2c1f7a54-0b6e-4d0b-9a51-3f4f7c9f0a11"
SECOND = "7d1b3c8e-52a4-4f0e-8a6f-6c2c1f0d9b22"
THIRD = "c4e5a1d0-9f3b-4f7e-b1d2-8e7f6a5b4c33"
PREPARED = {
    Prepared("nvidia0", POD, "device gpu-0 of claim default/worker-gpu"),
    Prepared("nvidia1", POD, "device gpu-1 of claim default/worker-gpu"),
    Prepared("nvidia2", SECOND, "device gpu-2 of claim team-a/shared"),
    Prepared("nvidia2", THIRD, "device gpu-2 of claim team-a/shared"),
    Prepared("nvidia3", THIRD, "device gpu-3-mig-1g10gb-19-0 of claim team-a/slice"),
}


@pytest.mark.parametrize(
    ("sample", "prepared"),
    [
        ("dra-1.31-to-1.34", PREPARED),
        ("dra-1.35-to-1.36", PREPARED),
        ("dra-1.37", PREPARED),
        ("dra-1.31-to-1.37-new", set()),
    ],
)
def test_what_the_code_of_kubelets_wrote_is_read_exactly(
    sample: str, prepared: set[Prepared]
) -> None:
    """The folder's README says of which versions, and how."""
    assert parse((SAMPLES / f"{sample}.json").read_bytes()) == prepared


CLAIM = "0d7a9c52-6b1e-4f3d-8c2a-5e4f3d2c1b01"


def device(name: str = "gpu-0", **changed: object) -> dict[str, object]:
    plain: dict[str, object] = {
        "PoolName": "node-1",
        "DeviceName": name,
        "RequestNames": None,
        "CDIDeviceIDs": [f"k8s.gpu.nvidia.com/claim={CLAIM}-{name}"],
    }
    return plain | changed


def claim(*devices: object, **changed: object) -> dict[str, object]:
    plain: dict[str, object] = {
        "ClaimUID": CLAIM,
        "ClaimName": "worker-gpu",
        "Namespace": "default",
        "PodUIDs": {POD: {}},
        "DriverState": {"gpu.nvidia.com": {"Devices": list(devices)}},
    }
    return plain | changed


def inside(*claims: object, **changed: object) -> str:
    plain: dict[str, object] = {
        "kind": "DRACheckpoint",
        "apiVersion": "checkpoint.dra.kubelet.k8s.io/v1",
        "ClaimInfoStateList": list(claims),
    }
    return json.dumps(plain | changed)


def whole(*claims: object, **changed: object) -> bytes:
    return state_of_claims(inside(*claims, **changed)).encode()


@pytest.mark.parametrize(
    ("found", "node"),
    [
        (device("gpu-0"), "nvidia0"),
        (device("gpu-12"), "nvidia12"),
        (device("gpu-7-mig-9-4-4"), "nvidia7"),
        (device("gpu-7-mig-1g12gb-me-20-0"), "nvidia7"),
        # By its index, in the candidates before 25.3.0; by its number after: it cannot be told.
        (device(CDIDeviceIDs=["k8s.gpu.nvidia.com/device=gpu-0"]), None),
        (
            device(
                CDIDeviceIDs=[
                    "k8s.gpu.nvidia.com/device=gpu-0",
                    f"k8s.gpu.nvidia.com/claim={CLAIM}-gpu-0",
                ]
            ),
            None,
        ),
        (device(CDIDeviceIDs=[f"k8s.gpu.nvidia.com/claim={CLAIM}-gpu-1"]), None),
        (device(CDIDeviceIDs=["k8s.gpu.nvidia.com/claim=another-gpu-0"]), None),
        (device(CDIDeviceIDs=[f"nvidia.com/claim={CLAIM}-gpu-0"]), None),
        (device(CDIDeviceIDs=[]), None),
        (device(CDIDeviceIDs=None), None),
        (device("gpu-vfio-0"), None),  # a virtual machine's
        (device("gpu-5c0e2d0a-37b0-4d8a-8f0e-0d3d6f6c2b11"), None),  # no release's
        (device("gpu-00"), None),
        (device("gpu-٣"), None),
        (device("gpu-0-mig-"), None),
        (device("gpu-0-1"), None),
        (device("gpu-0\n"), None),
        (device("gpu-"), None),
        (device("0"), None),
        (device(""), None),
    ],
)
def test_only_names_without_doubt_mean_a_gpu(found: dict[str, object], node: str | None) -> None:
    assert {each.node for each in parse(whole(claim(found)))} == ({node} if node else set())


def test_devices_of_other_drivers_are_no_gpus() -> None:
    others = claim(DriverState={"gpu.example.com": {"Devices": [device()]}})
    assert parse(whole(others, claim(device("gpu-3")))) == {
        Prepared("nvidia3", POD, "device gpu-3 of claim default/worker-gpu")
    }


def test_a_claim_that_stands_twice_counts_once() -> None:
    assert len(parse(whole(claim(device()), claim(device(), device())))) == 1


@pytest.mark.parametrize(
    "empty",
    [
        claim(),
        claim(device(), PodUIDs=None),
        claim(device(), PodUIDs={}),
        claim(DriverState=None),
        claim(DriverState={"gpu.nvidia.com": {"Devices": None}}),
    ],
)
def test_a_claim_without_pods_or_devices_yet_is_nobodys(empty: dict[str, object]) -> None:
    assert parse(whole(empty)) == set()


GOOD = whole(claim(device()))


@pytest.mark.parametrize(
    "sample",
    [
        b"",
        b"{}",
        b"null",
        GOOD[:-1],
        b"\xff\xfe" + GOOD,
        GOOD.replace(b"worker", b"wor\xffker"),
        GOOD.replace(b"worker", b"wor\\ud800ker"),
        GOOD.replace(b"gpu-0", b"gpu-1"),  # the checksum is of another text
        GOOD.replace(b'"Checksum": ', b'"Checksum": 1'),
        GOOD.replace(b'"Checksum": ', b'"Checksum": -'),
        json.dumps({"Data": json.loads(inside()), "Checksum": 1}).encode(),
        json.dumps({"Data": inside()}).encode(),
        state_of_claims("").encode(),
        state_of_claims("[]").encode(),
        state_of_claims("[" * 100_000).encode(),
        state_of_claims(inside()[:-1]).encode(),
        whole(kind="Another"),
        whole(apiVersion="checkpoint.dra.kubelet.k8s.io/v2"),
        whole(Version=2),
        whole(ClaimInfoStateList={}),
        whole({"ClaimUID": CLAIM}),
        whole(claim(device(), Priority="of a newer kubelet")),
        whole(claim(device(Minor=0))),
        whole(claim(device(DeviceName=7))),
        whole(claim(device(CDIDeviceIDs="k8s.gpu.nvidia.com/claim"))),
        whole(claim(device(), PodUIDs=[POD])),
        whole(claim(device(), PodUIDs={POD: {"since": 1}})),
        whole(claim(device(), PodUIDs={POD: None})),
        whole(claim(device("x" * 513))),
        whole(*[claim()] * 4097),
        whole(claim(*[device()] * 257)),
        whole(claim(device(), PodUIDs={f"pod-{number}": {} for number in range(257)})),
        whole(*[claim(*[device()] * 65, PodUIDs={str(n): {} for n in range(256)})]),
    ],
    ids=lambda sample: repr(sample[:50]),
)
def test_what_is_not_as_expected_is_refused_whole(sample: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse(sample)


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(max_size=200).map(state_of_claims).map(str.encode) | st.binary(max_size=300))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    try:
        found = parse(data)
    except ValueError:
        return
    assert all(isinstance(each, Prepared) for each in found)
