"""Which GPUs were prepared for which pod by a ResourceClaim (DRA), as the kubelet writes it down.

It opens no file: kubelet.py reads this one beside the device checkpoint, and as strictly.
"""

import re
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct, field

# pkg/kubelet/cm/dra: written when a pod's claims are prepared, before its sandbox is made, by a
# rename in the kubelet's root. In this form since Kubernetes 1.31.
STATE = "dra_manager_state"
_DRIVER = "gpu.nvidia.com"
# A whole GPU, or a MIG instance and the GPU it is part of. `gpu-vfio-0` is a virtual machine's.
_NAMES = re.compile(r"gpu-(0|[1-9][0-9]{0,5})(?:-mig-[a-z0-9-]{1,50})?")
_Text = Annotated[str, Meta(max_length=512)]
_Texts = Annotated[list[_Text], Meta(max_length=256)]
# Pairs of a pod and a GPU: the API lets 256 pods share a claim.
_MOST_PREPARED = 16384


class _Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """An object of Go's, `{}` where it has no field."""


class _Device(_Strict, frozen=True):
    PoolName: _Text
    DeviceName: _Text
    RequestNames: _Texts | None
    CDIDeviceIDs: _Texts | None
    ShareID: _Text | None = None  # since 1.35


class _Driver(_Strict, frozen=True):
    Devices: Annotated[list[_Device], Meta(max_length=256)] | None
    skipped: _Texts | None = field(default=None, name="skipNodeOperations")  # since 1.37


class _Claim(_Strict, frozen=True):
    ClaimUID: _Text
    ClaimName: _Text
    Namespace: _Text
    PodUIDs: Annotated[dict[_Text, _Strict], Meta(max_length=256)] | None
    DriverState: Annotated[dict[_Text, _Driver], Meta(max_length=256)] | None


class _Claims(_Strict, frozen=True):
    kind: Literal["DRACheckpoint"]
    version: Literal["checkpoint.dra.kubelet.k8s.io/v1"] = field(name="apiVersion")
    ClaimInfoStateList: Annotated[list[_Claim], Meta(max_length=4096)] | None


class _State(_Strict, frozen=True):
    Data: str
    Checksum: int


class Prepared(NamedTuple):
    """One GPU of one pod; `node` is the board's device node, such as nvidia0."""

    node: str
    pod: str
    evidence: str


def parse(text: bytes) -> frozenset[Prepared]:
    """Return the GPUs that were prepared for pods; raises ValueError if it is odd."""
    try:
        state = msgspec.json.decode(text, type=_State)
        data = state.Data.encode()
        if zlib.crc32(data) != state.Checksum:
            raise ValueError("the checksum is not that of the text")
        claims = msgspec.json.decode(data, type=_Claims)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(str(error)[:200]) from error
    found = list(islice(_prepared(claims), _MOST_PREPARED + 1))
    if len(found) > _MOST_PREPARED:
        raise ValueError(f"more than {_MOST_PREPARED} devices are prepared")
    return frozenset(found)


def _prepared(claims: _Claims) -> Iterator[Prepared]:
    for claim in claims.ClaimInfoStateList or ():
        driver = (claim.DriverState or {}).get(_DRIVER, _Driver(None))
        for device in driver.Devices or ():
            evidence = f"device {device.DeviceName} of claim {claim.Namespace}/{claim.ClaimName}"
            if node := _node(claim, device):
                yield from (Prepared(node, pod, evidence) for pod in claim.PodUIDs or ())


def _node(claim: _Claim, device: _Device) -> str | None:
    """Return the device node that a device's name means without doubt.

    NVIDIA's driver calls a GPU by its node's number since 25.3.0, by its index in candidates before
    that. It gives a device one CDI name, made of the claim and the device, since 25.12.0: so where
    the name is that, the number is the node's. No release has a UUID in the name.
    """
    match = _NAMES.fullmatch(device.DeviceName)
    told = [f"k8s.{_DRIVER}/claim={claim.ClaimUID}-{device.DeviceName}"]
    return f"nvidia{match[1]}" if match and device.CDIDeviceIDs == told else None
