"""Whose lead counts: pods that came with their limit while the watcher looked, each once."""

from __future__ import annotations

import pytest

from shared import messages as m
from watcher.leads import Leads
from watcher.snapshot import Content

# What each step wants (annotated pods, others) or reports (leads by pod), and what is observed.
Step = tuple[str, str] | dict[str, float | None]


def wanted(pods: str, others: str) -> Content:
    made = [
        m.DesiredPod(uid=uid, aliases=[], namespace="n", name=uid, limit_mw=1000, raw="1")
        for uid in pods
    ]
    return Content(made, [*others])


def reported(leads: dict[str, float | None]) -> list[m.Pod]:
    return [
        m.Pod(
            uid=uid, namespace="n", name=uid, raw="1", requested_mw=1, effective_mw=1, gpus=[],
            state="enforced", reason="", lead_s=lead_s,
        )
        for uid, lead_s in leads.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "observed"),
    [
        pytest.param([("", ""), ("a", ""), {"a": 2.5}, {"a": 2.5}], [2.5], id="new-once"),
        pytest.param([("", ""), ("a", ""), {"a": None}, {"a": -0.1}], [-0.1], id="later"),
        pytest.param([("a", ""), {"a": -900.0}], [], id="there-before"),
        pytest.param([("", "a"), ("a", ""), {"a": -900.0}], [], id="annotated-later"),
        pytest.param([("", ""), ("a", ""), ("", ""), {"a": 1.0}], [], id="gone"),
        pytest.param([{"a": 1.0}, ("", ""), {"a": 1.0}], [], id="never-wanted"),
        pytest.param([("b", ""), ("ab", ""), {"a": 1.0, "b": 2.0}], [1.0], id="one-of-two"),
        pytest.param([("", ""), ("a", ""), ("", "a"), ("a", ""), {"a": -9.0}], [], id="again"),
    ],
)
def test_each_new_pod_is_observed_once(steps: list[Step], observed: list[float]) -> None:
    seen: list[float] = []
    leads = Leads(seen.append)
    for step in steps:
        if isinstance(step, dict):
            leads.told(reported(step))
        else:
            leads.wanted(wanted(*step))
    assert seen == observed
