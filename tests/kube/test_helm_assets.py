"""Obtaining the real helm: built once, whole or not at all, and a refusal is one clear line.

A stand-in for the go command takes the place of the minutes that a real build needs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kube import go_command, helm_assets
from tests.kube.test_assets import BUILD, FAIL, World


class HelmWorld(World):
    """The same world, asked for helm."""

    module = "tests.kube.helm_assets"


@pytest.fixture
def world(tmp_path: Path) -> HelmWorld:
    return HelmWorld(tmp_path)


def test_it_is_built_once_and_its_path_is_all_that_stands_on_standard_output(
    world: HelmWorld,
) -> None:
    world.install_go()
    status, out, err = world.run()
    assert (status, out) == (0, f"{world.folder() / 'helm'}\n"), err
    assert [line.split()[0] for line in world.builds()] == ["helm"]
    assert world.run("--if-cached")[:2] == world.run()[:2] == (0, out)
    assert len(world.builds()) == 1
    assert sorted(path.name for path in world.folder().iterdir()) == [".lock", "helm"]


def test_two_callers_build_once(world: HelmWorld) -> None:
    world.install_go()
    world.environment["FAKE_GO_BUILD"] = f"sleep 0.3; {BUILD}"
    with world.start() as one, world.start() as other:
        outputs = {one.communicate()[0], other.communicate()[0]}
    assert (one.returncode, other.returncode) == (0, 0)
    assert len(outputs) == len(world.builds()) == 1


def test_if_cached_builds_nothing(world: HelmWorld) -> None:
    world.install_go()
    status, out, err = world.run("--if-cached")
    assert (status, out) == (go_command.EXIT_NOT_CACHED, "")
    assert f"not built yet: helm {helm_assets.HELM}" in err
    assert not world.builds()


def test_a_failed_build_is_one_clear_line_and_leaves_nothing(world: HelmWorld) -> None:
    world.install_go()
    world.environment["FAKE_GO_BUILD"] = FAIL
    status, out, err = world.run()
    assert (status, out) == (1, "")
    assert "x: no route to host" in err.splitlines()[-1]
    assert [path.name for path in world.folder().iterdir()] == [".lock"]


def test_without_go_it_says_so(world: HelmWorld) -> None:
    status, out, err = world.run()
    assert (status, out) == (1, "")
    assert "no go command found" in err


def test_ones_own_helm_comes_first_and_must_be_one(world: HelmWorld, tmp_path: Path) -> None:
    own = tmp_path / "own"
    world.environment["POWER_AGENT_HELM"] = str(own)
    assert world.run()[0] == 1
    own.touch(mode=0o755)
    assert world.run("--if-cached")[:2] == (0, f"{own}\n")
