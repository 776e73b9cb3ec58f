"""A watcher without a list of pods: it is answered, and "not known" never becomes "nothing"."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared import messages as m
from tests.life.life import Life

WHY = "the API server gave no list of pods yet: connection refused"


def unlisted(life: Life, session: str = "new", age_s: float | None = None) -> m.Report:
    word = m.Unlisted(
        session=session, node="node-1", why=WHY, api_age_s=age_s, api_error="connection refused"
    )
    reply = life.deliver(word)
    assert isinstance(reply, m.Report)
    assert (reply.session, reply.revision) == (session, 0)
    return reply


def test_its_report_shows_what_the_node_holds_and_nothing_is_given_back(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.run("a", 0)
    life.snapshot({"a": 300})
    life.pass_s(5)
    life.kill()  # the whole pod starts anew, and the API does not answer
    for _ in range(30):
        report = unlisted(life)
        life.pass_s(2, heartbeats=False)
    assert [(gpu.limit_mw, gpu.managed) for gpu in report.gpus] == [
        (300_000, True),
        (700_000, False),
    ]
    assert (report.pods, report.enforcer and report.enforcer.dry_run) == ([], False)
    assert (life.watts(0), sorted(life.on_disk())) == (300, ["GPU-0"])
    status = life.status().watcher
    assert (status.connected, status.unlisted, status.api_error) == (
        False,
        WHY,
        "connection refused",
    )
    life.snapshot({"a": 350})  # the list comes
    assert (life.watts(0), life.status().watcher.unlisted) == (350, "")


@pytest.mark.parametrize(("lease", "watts"), [("hold", 300), ("release:60", 700)])
def test_it_is_no_heartbeat(tmp_path: Path, lease: str, watts: float) -> None:
    """A watcher that restarts while the API is away knows nothing that could keep a lease."""
    life = Life(tmp_path, lease=lease)
    life.run("a", 0)
    life.snapshot({"a": 300})
    for _ in range(40):
        unlisted(life)
        life.pass_s(2, heartbeats=False)
    assert life.watts(0) == watts
    assert not life.status().watcher.connected


def test_what_the_watcher_says_of_the_api_is_in_status_and_grows_old(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.snapshot({})
    assert life.last is not None
    told = {"api_age_s": 40.0, "api_error": "timed out"}
    life.deliver(m.Snapshot(session="s", revision=1, node="n", pods=[], others=[], **told))  # type: ignore[arg-type]
    life.pass_s(5, heartbeats=False)
    unlisted(life, "another", 0.0)  # one that is replaced says nothing while the other lives
    seen = life.status().watcher
    assert (seen.api_error, seen.unlisted) == ("timed out", "")
    assert seen.api_age_s == pytest.approx(45, abs=1)
    life.pass_s(10, heartbeats=False)
    seen = life.status().watcher
    assert (seen.api_age_s, seen.api_error) == (None, "")  # nobody tells any more


@pytest.mark.parametrize("uid", [0, 12345])
def test_only_the_watcher_may_say_so(tmp_path: Path, uid: int) -> None:
    life = Life(tmp_path)
    word = m.Unlisted(session="x", node="n", why="")
    reply = life.deliver(word, uid=uid)
    assert isinstance(reply, m.Error)
    assert (reply.code, life.status().watcher) == ("denied", m.WatcherStatus())


def test_a_dry_run_tells_what_would_be_set(tmp_path: Path) -> None:
    life = Life(tmp_path, dry_run="true")
    life.run("a", 0)
    report = life.snapshot({"a": 300})
    assert isinstance(report, m.Report)
    assert report.enforcer
    assert report.enforcer.dry_run
    assert [gpu.wanted_mw for gpu in report.gpus] == [300_000, None]
    assert life.watts(0) == 700
