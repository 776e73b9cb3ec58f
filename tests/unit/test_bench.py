"""The bench counts, judges and reports right; its cheapest part really runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench import __main__ as bench
from tests.bench import kubelet, machine, parts
from tests.bench.figures import Figure, percentile, table, verdict
from tests.bench.parts import Part
from tests.waiting import HANG_S

ROOT = Path(__file__).resolve().parents[2]


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.bench", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("samples", "percent", "expected"),
    [
        ([7.0], 50, 7.0),
        ([7.0], 99, 7.0),
        ([2.0, 1.0], 50, 1.0),
        ([float(n) for n in range(100, 0, -1)], 50, 50.0),
        ([float(n) for n in range(100, 0, -1)], 99, 99.0),
        ([float(n) for n in range(1, 201)], 99, 198.0),
    ],
)
def test_a_percentile_is_a_sample(samples: list[float], percent: float, expected: float) -> None:
    assert percentile(samples, percent) == expected


def test_a_bound_that_is_met_exactly_holds_and_each_is_judged_by_its_own_statistic() -> None:
    figure = Figure("x", "ms", [1.0] * 98 + [3.0, 9.0], {"p50": 1, "p99": 2, "max": 9, "mean": 1.0})
    assert figure.over() == ["p99", "mean"]


def test_the_last_line_names_what_is_over_and_the_table_is_aligned() -> None:
    good = Figure("a long name", "ms", [1.234], {"p99": 2})
    bad, unbound = Figure("b", "MiB", [30.0], {"max": 26}), Figure("c", "ms", [0.0])
    assert verdict([good, unbound]) == "over: nothing"
    assert verdict([good, bad]) == "over: b: max 30.0 MiB, at most 26"
    heading, *rows = table([good, bad, unbound])
    assert [row.split()[-1] for row in rows] == ["ok", "over", "0"]
    ends = {
        line.index(word) + len(word) for line, word in zip(rows, ("1.23", "30.0"), strict=False)
    }
    assert ends == {heading.index("p50") + 3}


def test_the_clock_of_a_process_runs_with_its_work_only() -> None:
    command = [sys.executable, "-c", "input(1)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as idle:
        assert idle.stdout is not None
        assert idle.stdout.read(1) == b"1"  # it has started, and waits from now on
        at_first, own = machine.cpu_s(idle.pid), machine.cpu_s(os.getpid())
        while time.process_time() < own + 0.05:
            pass
        assert machine.cpu_s(idle.pid) - at_first < 0.01
        assert 0.05 <= machine.cpu_s(os.getpid()) - own < 0.2
        assert machine.resident_mib(idle.pid) > 1
        idle.communicate(b"\n")


@pytest.mark.parametrize(("before", "busy"), [(0.1, False), (3.0, True)])
def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch, before: float, busy: bool) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.2, 9.0, 9.0))
    assert ("busy" in machine.load(before)) is busy


def test_the_kubelets_probes_are_those_of_the_manifest_at_its_periods() -> None:
    asked = kubelet.probes()
    assert len(asked) == 4, "liveness and readiness of two containers"
    assert sum(bool(probe.path) for probe in asked) == 2
    minute = list(kubelet.due(asked, 60))
    assert [at_s for at_s, _ in minute] == sorted(at_s for at_s, _ in minute)
    for probe in asked:
        times = [at_s for at_s, each in minute if each is probe]
        assert len(times) == 60 // probe.period_s
        assert max(times) < 60


def test_what_a_probe_costs_is_the_processor_time_of_its_command(tmp_path: Path) -> None:
    idle_s = kubelet.run(["sleep", "0.3"], tmp_path)
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    busy_s = kubelet.run([sys.executable, "-c", busy], tmp_path)
    assert idle_s < 0.3 <= busy_s


def test_an_unknown_part_is_wrong_use_and_the_parts_are_named() -> None:
    done = _run("chnage")
    assert done.returncode == 2
    assert "no part chnage; there are: change, change-real, waiting" in done.stderr


def test_without_a_real_api_server_its_part_is_skipped_aloud(tmp_path: Path) -> None:
    done = _run("change-real", KUBEBUILDER_ASSETS="", POWER_AGENT_KUBE_ASSETS_CACHE=str(tmp_path))
    assert done.returncode == 0
    assert "skipped change-real: there is no kube-apiserver: make kube-assets" in done.stdout


def test_only_the_parts_named_run_and_quick_takes_the_fewer_trials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(trials: int) -> list[Figure]:
        return [Figure("x", "ms", [5.0] * trials, {"p50": 4})]

    fakes = {"one": Part("one", 7, 3, measure), "two": Part("two", 9, 2, measure)}
    monkeypatch.setattr(bench, "PARTS", fakes)
    monkeypatch.setattr(machine, "use_two_cores", lambda: None)
    assert bench.main(["two", "--quick", "--json"]) == 0  # over, which is no error
    said = json.loads(capsys.readouterr().out)
    assert [(row["trials"], row["over"]) for row in said["figures"]] == [(2, ["p50"])]


def test_the_change_part_measures_a_real_node() -> None:
    done = _run("change", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["figures"]
    assert row["trials"] == parts.PARTS["change"].quick
    assert 0 < row["p50"] <= row["p99"] <= row["max"] < 5000
