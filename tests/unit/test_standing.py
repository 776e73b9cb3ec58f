"""How a pod stands, from its GPUs; whole sequences are in tests/node."""

from __future__ import annotations

import pytest

from enforcer import standing
from enforcer.policy import Stance
from shared import messages as m

A, B = "pod-a", "pod-b"


def test_a_pod_held_above_its_limit_is_failed_whatever_it_has_elsewhere() -> None:
    asks = m.DesiredPod(uid=A, aliases=[], namespace="n", name="a", limit_mw=400_000, raw="400")
    gpus = [
        m.Gpu(index=0, uuid="0", limit_mw=300_000, target_mw=300_000, state="managed", pods=[A, B]),
        m.Gpu(index=1, uuid="1", limit_mw=500_000, target_mw=500_000, state="held", pods=[A]),
    ]
    stances: dict[str, dict[str, Stance]] = {"0": {A: "conflict"}, "1": {A: "held"}}
    (pod,) = standing.pods([asks], gpus, stances)
    assert pod.state == "failed"


L4 = m.Gpu(index=0, uuid="0", limit_mw=72_000, min_mw=40_000, max_mw=72_000)
H100 = m.Gpu(index=1, uuid="1", limit_mw=700_000, min_mw=200_000, max_mw=700_000)


@pytest.mark.parametrize(
    ("raw", "limit_mw", "gpu", "meant"),
    [
        ("70000", 70_000_000, L4, "70"),
        ("48750.9", 48_750_900, L4, "48.75"),
        ("1000", 1_000_000, L4, None),  # 1 W is no limit of this board
        ("73000", 73_000_000, L4, None),
        ("70000", 70_000_000, H100, None),
        ("350000", None, H100, "350"),  # above what may be asked at all
        (" +700000.0\n", None, H100, "700"),
        ("350000", None, L4, None),
        ("350000W", None, H100, None),
        ("350", None, H100, None),
        ("0" * 64, None, H100, None),
    ],
)
def test_what_was_meant_in_milliwatts_is_asked_only_where_the_board_could_have_it(
    raw: str, limit_mw: int | None, gpu: m.Gpu, meant: str | None
) -> None:
    asks = m.DesiredPod(uid=A, aliases=[], namespace="n", name="a", limit_mw=limit_mw, raw=raw)
    (pod,) = standing.pods([asks], [gpu], {gpu.uuid: {A: "invalid"}})
    assert pod.state == "invalid"
    assert ("did you mean" in pod.reason) == (meant is not None)
    if meant is not None:
        assert f"not milliwatts: did you mean {meant}?" in pod.reason
