"""How a pod stands, from its GPUs; whole sequences are in tests/node."""

from __future__ import annotations

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
