"""Runs the cluster's tests on a node in a virtual machine: `python -m tests.vm`.

Makes disk and images, boots, runs a subset of tests/cluster on it as on a given cluster, and ends
what it started. The subset is in docs/testing.md, too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.cluster import box, conftest, images, parts
from tests.cluster.node import PAUSE_IMAGE
from tests.vm import debian
from tests.vm.debian import say
from tests.vm.guest import STATIC_PODS
from tests.vm.machine import Machine
from tests.waiting import SLOWNESS_VARIABLE, NotInTimeError

ROOT = Path(__file__).resolve().parents[2]
TCG = "tcg,thread=multi"
# Measured: Python's start takes nine times as long as on the machine that emulates.
_SLOWNESS = "8"
_TESTS = {
    "apparmor": (
        "test_confinement.py",
        "test_static_pods.py",
        "test_overlays.py::test_reduced_privileges_in_a_private_cgroup_namespace_joins_the_hosts",
        "test_overlays.py::test_reduced_privileges_enforces_without_privileged",
        "test_worker_pods.py::test_annotating_changing_and_removing_is_followed_without_a_restart",
        "test_administration.py::test_powerctl_doctor_finds_nothing_wrong",
    ),
    "selinux": ("test_confinement.py",),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("--flavour", default="apparmor", help=" or ".join(debian.FLAVOURS))
    parser.add_argument(
        "--accel", default=TCG, help="qemu's; kvm only where it boots a distribution's kernel"
    )
    parser.add_argument("--stay", action="store_true", help="run no tests, until input ends")
    parser.add_argument("--console", type=Path, help="keep what the machine wrote there")
    parser.add_argument("tests", nargs="*", help="arguments for pytest in place of the subset")
    chosen = parser.parse_args(argv)
    try:
        flavour = debian.flavour_named(chosen.flavour)
        with _machine(flavour, chosen) as machine:
            return _stay(machine) if chosen.stay else _test(machine, flavour, chosen.tests)
    except (parts.LackingError, box.BoxError, NotInTimeError) as error:
        say(str(error))
        return 1


@contextlib.contextmanager
def _machine(flavour: debian.Flavour, chosen: argparse.Namespace) -> Iterator[Machine]:
    box.require()
    parts.provide(parts.IMAGE, debian.COMMANDS)
    binaries = parts.node_binaries()
    with images.builder() as build:
        archives = [
            images.archive(build, images.make_pause(build, PAUSE_IMAGE)),
            images.archive(build, images.build_image(build)),
        ]
    disk = debian.disk(flavour, binaries / "kubelet")
    machine = Machine(disk, binaries, archives, accel=chosen.accel, kernel=flavour.kernel_arguments)
    say(f"booting, flavour {flavour.name}: minutes")
    began_s = time.monotonic()
    with machine:
        say(f"the node is Ready after {time.monotonic() - began_s:.0f} s")
        try:
            yield machine
        finally:
            if chosen.console:
                chosen.console.write_bytes(machine.console.read_bytes())


def _environment(machine: Machine) -> dict[str, str]:
    return {
        "KUBECONFIG": str(machine.kubeconfig),
        "KUBEBUILDER_ASSETS": str(parts.node_binaries()),
        "POWER_AGENT_REQUIRE_CLUSTER": "1",
        conftest.STATIC_PODS_VARIABLE: STATIC_PODS,
        conftest.IMAGE_VARIABLE: images.IMAGE,
        SLOWNESS_VARIABLE: os.environ.get(SLOWNESS_VARIABLE, _SLOWNESS),
    }


def _test(machine: Machine, flavour: debian.Flavour, tests: Sequence[str]) -> int:
    chosen = tests or [f"tests/cluster/{name}" for name in _TESTS[flavour.name]]
    pytest = [sys.executable, "-m", "pytest", "-m", "cluster", "--durations=0", "-v", *chosen]
    return subprocess.run(
        machine.box.in_network(pytest),
        cwd=ROOT,
        env=os.environ | _environment(machine),
        check=False,
    ).returncode


def _stay(machine: Machine) -> int:
    enter = " ".join(machine.box.in_network([]))
    for name, value in _environment(machine).items():
        print(f"export {name}={value}")
    print(f"{enter} {parts.node_binaries()}/kubectl get pods -A", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
