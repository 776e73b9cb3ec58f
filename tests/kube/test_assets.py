"""Obtaining the real binaries: built once, whole or not at all, and a refusal is one clear line.

A stand-in for the go command takes the place of the minutes that a real build needs.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kube import assets, go_command
from tests.waiting import HANG_S, until

ROOT = Path(__file__).parents[2]

# Answers what the recipe asks, and notes each build. FAKE_GO_BUILD is what a build does.
FAKE_GO = r"""#!/bin/sh
case "$*" in
  "env GOVERSION") echo "${FAKE_GO_VERSION:-go1.26.1}" ;;
  "mod download -json "*) echo '{"GoMod": "/some/go.mod"}' ;;
  "mod edit -json "*) echo '{"Go": "1.26.0", "Require": [
      {"Path": "k8s.io/api", "Version": "v0.0.0"},
      {"Path": "k8s.io/klog/v2", "Version": "v2.140.0"}]}' ;;
  build*)
    for argument; do case "$argument" in -o=*) out=${argument#-o=} ;; esac; done
    echo "${out##*/} toolchain=$GOTOOLCHAIN" >> "$FAKE_GO_LOG"
    eval "$FAKE_GO_BUILD" ;;
  *) echo "$*" >> "$FAKE_GO_LOG.mod" ;;
esac
"""
BUILD = 'echo binary > "$out"; chmod +x "$out"'
FAIL = 'echo "go: downloading x" >&2; echo "x: no route to host" >&2; exit 1'


class World:
    """Runs the program with a cache and a go command of its own."""

    module = "tests.kube.assets"

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.log = folder / "builds"
        self.tools = folder / "tools"
        self.tools.mkdir()
        self.environment = {
            "PATH": str(self.tools),
            "POWER_AGENT_KUBE_ASSETS_CACHE": str(self.cache),
            "FAKE_GO_LOG": str(self.log),
            "FAKE_GO_BUILD": BUILD,
        }

    def install_go(self) -> None:
        (self.tools / "go").write_text(FAKE_GO)
        (self.tools / "go").chmod(0o755)
        for tool in ("chmod", "sleep"):
            found = shutil.which(tool)
            assert found
            (self.tools / tool).symlink_to(found)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", self.module, *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=HANG_S)
        return process.returncode, out, err

    def builds(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def folder(self) -> Path:
        (folder,) = self.cache.iterdir()
        return folder


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def make_binaries(folder: Path, names: tuple[str, ...] = assets.SERVER) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch(mode=0o755)
    return folder


def test_the_folder_is_all_that_stands_on_standard_output(world: World) -> None:
    world.install_go()
    status, out, err = world.run()
    assert (status, out) == (0, f"{world.folder()}\n"), err
    assert sorted(path.name for path in world.folder().iterdir()) == [".lock", *assets.SERVER]


def test_the_second_time_nothing_is_built(world: World) -> None:
    world.install_go()
    first = world.run()
    shutil.rmtree(world.tools)
    assert world.run()[:2] == first[:2]
    assert len(world.builds()) == 3


def test_two_callers_build_once(world: World) -> None:
    world.install_go()
    world.environment["FAKE_GO_BUILD"] = f"sleep 0.3; {BUILD}"
    with world.start() as one, world.start() as other:
        outputs = {one.communicate()[0], other.communicate()[0]}
    assert (one.returncode, other.returncode) == (0, 0)
    assert outputs == {f"{world.folder()}\n"}
    assert sorted(line.split()[0] for line in world.builds()) == list(assets.SERVER)


def test_the_libraries_of_kubernetes_are_replaced_by_the_published_ones(world: World) -> None:
    world.install_go()
    world.run()
    recipe = Path(f"{world.log}.mod").read_text()
    _, minor_and_patch = assets.KUBERNETES.split(".", 1)
    assert f"-replace=k8s.io/api=k8s.io/api@v0.{minor_and_patch}" in recipe
    assert "klog" not in recipe


@pytest.mark.parametrize(
    ("installed", "used"),
    [
        ("go1.26.3", "local"),
        ("go1.27.0", go_command.GO_TOOLCHAIN),  # the server's OpenAPI document would break
        ("go1.22.1", go_command.GO_TOOLCHAIN),
    ],
)
def test_the_server_is_built_with_go_1_26(world: World, installed: str, used: str) -> None:
    world.install_go()
    world.environment["FAKE_GO_VERSION"] = installed
    assert world.run()[0] == 0
    assert {line.split()[1] for line in world.builds()} == {f"toolchain={used}"}


def test_a_go_that_can_fetch_no_toolchain_is_refused(world: World) -> None:
    world.install_go()
    world.environment["FAKE_GO_VERSION"] = "go1.19.8"
    status, out, err = world.run()
    assert (status, out) == (1, "")
    assert err == "kube-assets: go1.19.8 is too old; install Go 1.26\n"


def test_without_go_one_line_names_the_remedy(world: World) -> None:
    status, out, err = world.run()
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "no go command found; install Go 1.26, or set KUBEBUILDER_ASSETS" in err


def test_a_cache_that_cannot_be_written_is_named(world: World, tmp_path: Path) -> None:
    world.install_go()
    (tmp_path / "file").touch()
    world.environment["POWER_AGENT_KUBE_ASSETS_CACHE"] = str(tmp_path / "file")
    status, out, err = world.run()
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "POWER_AGENT_KUBE_ASSETS_CACHE" in err


def test_a_failed_build_names_the_reason_and_keeps_what_was_finished(world: World) -> None:
    world.install_go()
    world.environment["FAKE_GO_BUILD"] = f'[ "${{out##*/}}" = etcd ] || {{ {FAIL}; }}; {BUILD}'
    status, out, err = world.run()
    assert (status, out) == (1, "")
    assert "x: no route to host" in err.splitlines()[-1]
    assert not [path.name for path in world.folder().glob(".build-*")]

    world.environment["FAKE_GO_BUILD"] = BUILD
    assert world.run()[0] == 0
    assert [line.split()[0] for line in world.builds()] == [
        "etcd", "kube-apiserver", "kube-apiserver", "kubectl",
    ]  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing_that_looks_whole(world: World, how: int) -> None:
    world.install_go()
    world.environment["FAKE_GO_BUILD"] = f"{BUILD}; sleep 1"
    with world.start() as process:
        until(world.builds, "a build")
        process.send_signal(how)
    assert process.returncode != 0
    assert world.run("--if-cached")[0] == go_command.EXIT_NOT_CACHED

    world.environment["FAKE_GO_BUILD"] = BUILD
    assert world.run()[0] == 0
    assert not [path.name for path in world.folder().glob(".build-*")]


def test_if_cached_answers_at_once_also_while_another_builds(world: World) -> None:
    world.install_go()
    world.environment["FAKE_GO_BUILD"] = f"sleep 0.5; {BUILD}"
    with world.start() as builder:
        until(world.builds, "a build")
        status, out, err = world.run("--if-cached")
        assert builder.poll() is None
    assert (status, out) == (go_command.EXIT_NOT_CACHED, "")
    assert "not built yet" in err


def test_a_complete_folder_of_the_users_own_comes_first(world: World, tmp_path: Path) -> None:
    own = make_binaries(tmp_path / "own")
    world.environment["KUBEBUILDER_ASSETS"] = str(own)
    assert world.run()[:2] == (0, f"{own}\n")
    (own / "etcd").unlink()
    assert world.run("--if-cached")[0] == go_command.EXIT_NOT_CACHED


def test_node_adds_to_what_is_there(world: World) -> None:
    world.install_go()
    world.run()
    assert world.run("--node", "--if-cached")[0] == go_command.EXIT_NOT_CACHED
    assert world.run("--node")[0] == 0
    assert [line.split()[0] for line in world.builds()] == [*assets.SERVER, *assets.NODE]


def test_from_environment_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    with pytest.raises(go_command.AssetsError, match="is not set"):
        assets.from_environment()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(make_binaries(tmp_path, ("etcd", "kubectl"))))
    with pytest.raises(go_command.AssetsError, match="lacks kube-apiserver"):
        assets.from_environment()
    make_binaries(tmp_path)
    assert assets.from_environment() == tmp_path
