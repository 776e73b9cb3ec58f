"""The simulated node itself: what it offers, and that nothing of it is left, however it ends."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.node.conftest import MakeNode
from tests.simnode import __main__ as command_line
from tests.simnode import mishaps
from tests.simnode.node import FAST, SimNode
from tests.simnode.programs import children_of
from tests.simnode.reachable import ROOT, WATCHER_UID, as_user, base_folder
from tests.simnode.workloads import MadeUpProc, RealCgroups, cgroup2_mounts
from tests.waiting import HANG_S, ended, gone, until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
EMBEDDED = {k: v for k, v in os.environ.items() if k != "KUBEBUILDER_ASSETS"}


def descendants(pid: int) -> set[int]:
    found = set(children_of(pid))
    return found.union(*map(descendants, found))


def made_by(output: str) -> set[Path]:
    """The folder and the cgroup of the node that says so much of itself."""
    mounts = cgroup2_mounts(Path("/proc/self/mountinfo").read_text())
    names = set(re.findall(r"power-agent-sim-[0-9a-f]{8}", output))
    wanted = {folder / name for folder in (base_folder(), *mounts) for name in names}
    return {path for path in wanted if path.exists()}


# ---------------------------------------------------------------------- the command line


class Up:
    """`python -m tests.simnode up` in a process group of its own, as a shell starts it."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.simnode", "up", *arguments],
            cwd=ROOT,
            env=EMBEDDED,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.text = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line
            if " events" in line:
                break
        self.made = made_by(self.text)
        self.pids = {self.process.pid} | descendants(self.process.pid)

    def pid(self, program: str) -> int:
        supervisord = next(p for p in self.pids if b"supervisord" in _command(p))
        return children_of(supervisord, program)[0]

    def assert_gone(self) -> None:
        until(lambda: all(map(gone, self.pids)), "processes gone", explain=self._left)
        until(lambda: not any(p.exists() for p in self.made), f"gone: {self.made}")

    def _left(self) -> list[bytes]:
        return [_command(pid) for pid in self.pids if not gone(pid)]


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.fixture
def up() -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*arguments: str) -> Up:
        started.append(Up(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        assert each.process.stdout is not None
        each.process.stdout.close()


def test_kill_9_leaves_nothing_behind(up: Callable[..., Up], tmp_path: Path) -> None:
    """Not even what ignores a polite end: an enforcer that is stopped hears no SIGTERM."""
    kubeconfig = tmp_path / "kubeconfig"
    node = up("--gpus", "2", "--kubeconfig", str(kubeconfig))
    assert kubeconfig.exists()
    assert node.made
    assert len(node.pids) >= 7  # itself, guardian, supervisord and three, two workers
    os.kill(node.pid("enforcer"), signal.SIGSTOP)
    node.process.kill()
    node.assert_gone()
    assert not kubeconfig.exists()


def test_ctrl_c_leaves_nothing_behind(up: Callable[..., Up]) -> None:
    node = up("--gpus", "1")
    os.killpg(node.process.pid, signal.SIGINT)
    assert ended(node.process) == 0
    node.assert_gone()


def test_up_says_how_to_reach_it(up: Callable[..., Up]) -> None:
    wishes = ("--set", "POWER_AGENT_DRY_RUN=true", "--fault", "pod-invalid", "--fault", "stranger")
    node = up("--gpus", "1", "--model", "L4", *wishes)
    exports = re.findall(r"^export .*$", node.text, re.MULTILINE)
    assert len(exports) == len(set(exports)) == 3

    def run(command: str) -> subprocess.CompletedProcess[str]:
        [line] = re.findall(rf"^{command}.*$", node.text, re.MULTILINE)
        script = "\n".join([*exports, line])
        return subprocess.run(script, shell=True, capture_output=True, check=False, text=True)

    if shutil.which("kubectl"):
        assert run("kubectl annotate").returncode == 0
    assert "mistyped" in run("powerctl explain").stdout
    assert '"component":"enforcer"' in run("tail").stdout
    status = run("powerctl status")
    assert status.returncode == (0 if shutil.which("kubectl") else 1)  # mended by then
    verdict, *_ = status.stdout.split("\n\n")
    assert re.match(r"[0-9] of 2 pods have what they asked for; default/", verdict)
    assert "DRY RUN" in verdict
    assert re.search(r"[0-9] other process", status.stdout)
    assert "fault       stranger: a process of the host runs on it" in node.text
    if shutil.which("curl"):
        assert "power_agent_build_info" in run("curl").stdout
    node.process.send_signal(signal.SIGTERM)
    assert ended(node.process) == 0
    node.assert_gone()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "POWER_AGENT_DRYRUN=true"], "did you mean POWER_AGENT_DRY_RUN?"),
        (["--set", "POWER_AGENT_DRY_RUN"], "is not NAME=VALUE"),
        (["--set", "POWER_AGENT_DRY_RUN=maybe"], "neither true nor false"),
        (["--set", "POWER_AGENT_CONFLICT=safe-default"], "POWER_AGENT_SAFE_DEFAULT"),
        (["--set", "POWER_AGENT_RUN_DIR=/tmp"], "is the simulated node's own"),
        (["--fault", "earthquake"], "'earthquake' is none of: api-down, "),
        (["--fault", "api-down=1"], "a fault of the whole node"),
        (["--fault", "gpu-lost=x"], "comes the number of a GPU"),
        (["--fault", "gpu-lost=4"], "there is no GPU 4, only 0 to 3"),
    ],
)
def test_what_it_cannot_set_or_play_is_refused_with_what_it_can(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["simnode", "up", *arguments])
    with pytest.raises(SystemExit) as ended_with:
        command_line.main()
    assert ended_with.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(mishaps.MISHAPS))
def test_each_fault_can_be_played(make_node: MakeNode, name: str) -> None:
    """On a node whose agent does not run: only what needs it is left out."""
    if name.endswith("-hangs") and not name.startswith("api"):
        pytest.skip("stops a program of the agent")
    node = make_node(start=False)
    mishaps.ordered(name).play(node)


def test_up_overwrites_no_kubeconfig(tmp_path: Path) -> None:
    precious = tmp_path / "config"
    precious.write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "tests.simnode", "up", "--kubeconfig", str(precious)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 2
    assert "name a new file" in done.stderr
    assert precious.read_text() == "mine"


def test_the_tour_passes() -> None:
    done = _demo()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 27 checks" in done.stdout
    assert "\x1b" not in done.stdout  # no terminal, no colours


def test_the_tour_fails_when_the_agent_does_not_do_its_job() -> None:
    sabotage = "from tests.simnode import tour; tour.SETTINGS['POWER_AGENT_DRY_RUN'] = 'true'"
    done = _demo(f"{sabotage}; tour.HANG_S = 0.2")
    assert done.returncode == 1
    assert "not within" in done.stdout


def _demo(before: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys; {before or 'pass'}; from tests.simnode.__main__ import main\n"
    return subprocess.run(
        [sys.executable, "-c", f"{program}sys.argv[1:] = ['demo']; sys.exit(main())"],
        cwd=ROOT,
        env=EMBEDDED,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * HANG_S,
        check=False,
    )


# ---------------------------------------------------------------------- the parts


@needs_root
@pytest.mark.root
def test_workers_lie_in_real_cgroups_of_the_nodes_own(node: SimNode) -> None:
    if not isinstance(node.place, RealCgroups):
        pytest.skip("no cgroup2 tree can be written here")
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    path = f"{node.place.cgroup_root}/kubepods/burstable/pod{pod.uid}/"
    text = Path(f"/proc/{pod.workers[0].pid}/cgroup").read_text()
    assert f"0::{path}" in text
    node.wait_for_limit(0, 350)
    node.end_workers(pod)
    assert list(node.place.folder.glob("kubepods/*/*")) == []


@pytest.mark.parametrize("made_up", [False, True], ids=["real", "made-up"])
def test_the_systemd_driver_in_both_places(make_node: MakeNode, made_up: bool) -> None:
    """Every other node has cgroupfs; in the made-up place: test_without_root."""
    node = make_node(driver="systemd", made_up_proc=made_up)
    if made_up:
        assert isinstance(node.place, MadeUpProc)
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.workers.of_host([node.gpus[1]])
    node.wait_for_limit(0, 350)
    pod.workers[0].kill()
    node.api.delete_pod("default", "trainer")
    node.wait_for_limit(0, 700)
    assert node.gpus[1].sets() == []


def test_what_is_waited_for_in_vain_is_explained(node: SimNode) -> None:
    node.add_pod("trainer", limit=350, gpus=[0])
    with pytest.raises(AssertionError) as caught:
        node.wait_for_limit(0, 123, deadline_s=0.5)
    for part in ("GPU 0 at 123 W", "hardware:", "default/trainer", "limit_set"):
        assert part in str(caught.value)


_AS_NOBODY = """\
from tests.simnode.node import SimNode
with SimNode(real_api=False, supervised=True) as node:
    pod = node.add_pod("trainer", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    node.delete_pod(pod)
    node.wait_for_limit(0, 700)
    print(node.place.described)
"""


def test_without_root() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=2 * HANG_S,
        check=False,
        **(as_user(WATCHER_UID) if os.geteuid() == 0 else {}),  # type: ignore[call-overload]
    )
    if "Permission denied" in done.stderr and os.geteuid() == 0:
        pytest.skip("the checkout lies where only root can read it")
    assert done.returncode == 0, done.stderr
    assert "made-up proc root" in done.stdout


_PYTHON_OF_ROOT = """\
import pathlib, sys
from tests.simnode import reachable
python, library = reachable._base_python()
private = pathlib.Path("python")
reachable._put_folder(library, private / "lib" / library.name, "test", "config-*")
(private / "bin").mkdir()
reachable._put(python, private / "bin" / python.name)
found = (private / "bin" / python.name).resolve(), (private / "lib" / library.name).resolve()
reachable._base_python = lambda: found
"""


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("prepare", ["", _PYTHON_OF_ROOT], ids=["checkout", "python too"])
def test_a_checkout_that_only_root_can_read(tmp_path: Path, prepare: str) -> None:
    """As in root's home: what the watcher's user needs is put elsewhere."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    for name in ("deploy", "enforcer", "shared", "tests", "watcher", "supervisord.conf"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, home / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, home)
    program = f"import sys; sys.path.insert(0, '.')\n{prepare}"
    program += _AS_NOBODY
    program += "print(node.installation.home)\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=home,
        env=EMBEDDED,
        capture_output=True,
        text=True,
        timeout=2 * HANG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    copy = Path(done.stdout.splitlines()[-1])
    assert copy.name.startswith("power-agent-sim-copy-")
    until(lambda: not copy.exists(), "the copy gone")


@pytest.mark.kube
@pytest.mark.skipif(not os.environ.get("KUBEBUILDER_ASSETS"), reason="no real API server")
def test_the_same_with_a_real_api_server() -> None:
    with SimNode(real_api=True, settings=FAST) as node:
        pod = node.add_pod("trainer", limit=350, gpus=[0])
        node.wait_for_limit(0, 350)
        with node.api_outage():
            assert node.limit_mw(0) == 350_000
        node.annotate(pod, 300)
        node.wait_for_limit(0, 300)
        node.delete_pod(pod)
        node.wait_for_limit(0, 700)
