"""One factor makes all waits longer where the machine under test is a slow one."""

from __future__ import annotations

import pytest
import yaml

from tests import waiting
from tests.cluster import parts
from tests.cluster.agent import MANIFEST, patient_probes
from tests.cluster.cluster import patient
from tests.vm import debian
from tests.waiting import SLOWNESS_VARIABLE, NotInTimeError, rest_s, slowness, until

PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@pytest.mark.parametrize(
    ("text", "factor"), [(None, 1.0), ("", 1.0), ("1", 1.0), ("8", 8.0), ("2.5", 2.5)]
)
def test_the_factor_is_what_the_environment_says(text: str | None, factor: float) -> None:
    assert slowness({} if text is None else {SLOWNESS_VARIABLE: text}) == factor


@pytest.mark.parametrize("text", ["0", "0.5", "-3", "nan", "inf", "1000", "slow"])
def test_what_is_no_factor_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"{SLOWNESS_VARIABLE}={text}: a factor from 1 to 100"):
        slowness({SLOWNESS_VARIABLE: text})


def test_a_deadline_is_multiplied_and_the_failure_tells_the_one_that_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "SLOWNESS", 10.0)
    with pytest.raises(NotInTimeError, match=r"never: not within 0\.1 s"):
        until(lambda: False, "never", deadline_s=0.01, poll_s=0.001)


@pytest.mark.parametrize(
    ("looked_s", "factor", "expected_s"), [(5.0, 1, 0.01), (0.0, 8, 0.01), (5.0, 8, 5.0)]
)
def test_only_on_a_slow_machine_a_look_is_rested_from(
    looked_s: float, factor: float, expected_s: float
) -> None:
    assert rest_s(0.01, looked_s, factor) == expected_s


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--timeout=60s", "--timeout=480s"),
        ("--timeout=120.0s", "--timeout=960s"),
        ("--tail=20", "--tail=20"),
        ("pods", "pods"),
    ],
)
def test_only_kubectls_timeouts_grow(argument: str, expected: str) -> None:
    assert patient(argument, 8) == expected


def test_probes_of_the_manifest_have_whole_numbers_and_nothing_else_changes() -> None:
    before = MANIFEST.read_text()
    assert patient_probes(before, 1) == before
    given, slow = (list(yaml.safe_load_all(t)) for t in (before, patient_probes(before, 2.25)))
    changed = 0
    for each, container in zip(_containers(given), _containers(slow), strict=True):
        for probe in PROBES:
            fields = ["timeoutSeconds"]
            if probe == "startupProbe":  # else a slow start is killed, and begins again
                fields.append("failureThreshold")
            elif "exec" in each[probe]:
                fields.append("periodSeconds")
            for field in fields:
                assert container[probe].pop(field) == -(-each[probe].pop(field) * 9 // 4)
                changed += 1
    assert changed == 10
    assert slow == given


def _containers(documents: list[dict]) -> list[dict]:  # type: ignore[type-arg]
    (pod,) = (each["spec"]["template"] for each in documents if each["kind"] == "DaemonSet")
    found: list[dict] = pod["spec"]["containers"]  # type: ignore[type-arg]
    return found


def test_a_machine_without_an_emulator_is_told_the_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(parts, "require_root", lambda: None)
    with pytest.raises(
        parts.LackingError, match=r"apt-get install debootstrap e2fsprogs .*qemu-system-x86"
    ):
        parts.provide(debian.COMMANDS)


def test_an_unknown_flavour_is_told_the_known_ones() -> None:
    with pytest.raises(parts.LackingError, match=r"no flavour windows: .* apparmor and selinux"):
        debian.flavour_named("windows")
