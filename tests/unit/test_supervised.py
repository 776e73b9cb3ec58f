"""supervisord.conf and its helpers, under the real supervisord, with two stand-in programs.

The stand-ins take the place of the programs' interpreters, as the image's per-program virtual
environments do, so that nothing in supervisord.conf is changed but the number of retries.
Supervisord counts in seconds, so the scenarios mostly wait: all run at the same time.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from enforcer.settings import MOST_EXIT_SUPERVISED_S
from tests.waiting import NotInTimeError, ended, gone, until

ROOT = Path(__file__).resolve().parents[2]
AS_ROOT = os.geteuid() == 0
Scenario = Callable[[Path], None]
TICK_S = 5  # supervisord's TICK_5
LONGEST_OPENING_S = 30  # of NVML, where persistence mode is off: the enforcer answers nobody
WATCHER_UID = 12345  # without a passwd entry on purpose

# Says who and what it is; the enforcer also answers pings as the real one does.
STAND_IN = """\
#!/bin/sh
'''exec' "{python}" "$0" "$@"  # for sh; to Python it is a string (a path may hold a space)
' '''
import json, os, pathlib, signal, sys, time
program = sys.argv[-1]
def leave(*_):
    try:
        # Not by print, which may be what was interrupted.
        os.write(1, json.dumps({{"component": program, "event": "stopped"}}).encode() + b"\\n")
    finally:
        os._exit(0)  # whatever the interpreter was at, and also where nobody reads
signal.signal(signal.SIGTERM, leave)
if (pathlib.Path({home!r}) / (program + ".broken")).exists():
    sys.exit(program + ": broken")
status = pathlib.Path("/proc/self/status").read_text()
print(json.dumps({{"component": program, "event": "started", "pid": os.getpid(),
    "uid": os.getuid(), "groups": os.getgroups(), "env": dict(os.environ),
    "no_new_privs": "NoNewPrivs:\\t1" in status, "args": sys.argv[1:]}}), flush=True)
if program == "watcher":
    while True:
        signal.pause()
from shared import messages
from enforcer.server import Server
began = time.monotonic()
server = Server(pathlib.Path(os.environ["POWER_AGENT_RUN_DIR"]), [os.getuid()])
if (pathlib.Path({home!r}) / "enforcer.gives-up").exists():
    while time.monotonic() < began + 4:  # longer than startsecs
        server.receive(0.1)
    sys.exit(1)
while True:
    for request in server.receive(1):
        server.reply(request, messages.Pong(version="stand-in", uptime_s=1.0))
        print(json.dumps({{"component": program, "event": "answered"}}), flush=True)
"""


class Supervised:
    """A running supervisord and what it wrote so far."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.out = home / "out"
        self.err = home / "err"
        supervisord = str(Path(sys.executable).with_name("supervisord"))
        arguments = [supervisord, "-c", str(home / "supervisord.conf")]
        if not AS_ROOT:
            arguments += ["-u", str(os.getuid())]
        environment = {
            "PATH": os.environ["PATH"],
            "POWER_AGENT_RUN_DIR": str(home / "run"),
            "POWER_AGENT_WATCHER_UID": str(WATCHER_UID),
            "LD_LIBRARY_PATH": "/nonexistent",
            "NVML_TUNING": "1",
            "NODE_NAME": "node-a",
            "KUBERNETES_SERVICE_HOST": "192.0.2.1",
            "HTTPS_PROXY": "proxy.invalid",
            "KUBECONFIG": "/nonexistent/kubeconfig",
            "SOME_PASSWORD": "s3cret",
        }
        with self.out.open("ab") as out, self.err.open("ab") as err:
            self.process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment
            )

    def said(self, component: str, event: str) -> list[dict[str, object]]:
        """Return the log lines of this event so far."""
        lines = [json.loads(line) for line in self.out.read_text().splitlines()]
        return [line for line in lines if (line["component"], line["event"]) == (component, event)]

    def pids(self, program: str) -> list[int]:
        """Return the pids under which a program has started so far."""
        return [int(str(line["pid"])) for line in self.said(program, "started")]

    def end_leftovers(self) -> None:
        """Kill what a failed scenario left behind."""
        for pid in self.pids("enforcer") + self.pids("watcher"):
            with suppress(OSError):
                if str(self.home).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def wait_for_starts(self, program: str, count: int) -> int:
        """Wait until a program has started so often; return its latest pid."""
        until(lambda: len(self.pids(program)) >= count, f"{count} starts of {program}")
        return self.pids(program)[-1]


def reachable_python() -> str:
    """Return an interpreter that the watcher's user can start; this one may lie in a home."""
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            ids: dict[str, Any] = (
                {"user": WATCHER_UID, "group": WATCHER_UID, "extra_groups": []} if AS_ROOT else {}
            )
            if not subprocess.run([python, "-c", ""], check=False, **ids).returncode:
                return python
        except OSError:
            continue
    pytest.skip("no Python that another user may run")


def make_home(folder: Path) -> Path:
    """Lay out a folder as the image does: conf, helpers, one interpreter per program."""
    home = folder / "agent home"  # paths with a space work
    shutil.copytree(ROOT / "deploy/supervised", home / "deploy/supervised")
    shutil.copy(ROOT / "supervisord.conf", home)
    for program, python in (("enforcer", sys.executable), ("watcher", reachable_python())):
        stand_in = home / program / "bin/python"
        stand_in.parent.mkdir(parents=True)
        stand_in.write_text(STAND_IN.format(python=python, home=str(home)))
        stand_in.chmod(0o755)
    return home


@contextmanager
def running(home: Path) -> Iterator[Supervised]:
    """Start supervisord and leave nothing behind."""
    supervised = Supervised(home)
    try:
        yield supervised
    except BaseException as error:
        error.add_note(supervised.out.read_text() + supervised.err.read_text())
        raise
    finally:
        supervised.process.terminate()
        try:
            ended(supervised.process)
        except NotInTimeError:
            supervised.process.kill()
            supervised.process.wait()
            raise
        finally:
            supervised.end_leftovers()


def each_program_has_its_user_and_only_its_environment(home: Path) -> None:
    """The watcher gives up root, the enforcer never sees the way to the API."""
    with running(home) as supervised:
        supervised.wait_for_starts("enforcer", 1)
        supervised.wait_for_starts("watcher", 1)
        enforcer = supervised.said("enforcer", "started")[0]
        watcher = supervised.said("watcher", "started")[0]
    assert enforcer["args"] == ["-I", "-m", "enforcer"]
    assert watcher["args"] == ["-I", "-m", "watcher"]
    assert enforcer["uid"] == os.geteuid()
    if AS_ROOT:
        assert (watcher["uid"], watcher["groups"], watcher["no_new_privs"]) == (
            WATCHER_UID,
            [],
            True,
        )
    seen_by_enforcer = enforcer["env"]
    seen_by_watcher = watcher["env"]
    assert isinstance(seen_by_enforcer, dict)
    assert isinstance(seen_by_watcher, dict)
    assert {"POWER_AGENT_RUN_DIR", "LD_LIBRARY_PATH", "NVML_TUNING"} <= set(seen_by_enforcer)
    # Without this one the enforcer would not check its namespaces, and work blind (I5).
    assert "KUBERNETES_SERVICE_HOST" in seen_by_enforcer
    assert not {"KUBECONFIG", "HTTPS_PROXY"} & set(seen_by_enforcer)
    api = {"KUBERNETES_SERVICE_HOST", "KUBECONFIG", "HTTPS_PROXY"}
    assert {"NODE_NAME", *api} <= set(seen_by_watcher)
    assert not {"LD_LIBRARY_PATH", "SOME_PASSWORD"} & set(seen_by_watcher)
    for seen in (seen_by_enforcer, seen_by_watcher):
        assert not [key for key in seen if key.startswith(("SUPERVISOR_", "PYTHON"))]


def a_killed_program_comes_back(program: str, home: Path) -> None:
    """More often than supervisord's default would, and the other one is left alone."""
    other = {"enforcer": "watcher", "watcher": "enforcer"}[program]
    with running(home) as supervised:
        unharmed = supervised.wait_for_starts(other, 1)
        for starts in range(1, 4):
            os.kill(supervised.wait_for_starts(program, starts), signal.SIGKILL)
        assert not gone(supervised.wait_for_starts(program, 4))
        assert supervised.pids(other) == [unharmed]


def a_killed_enforcer_comes_back(home: Path) -> None:
    """See above."""
    a_killed_program_comes_back("enforcer", home)


def a_killed_watcher_comes_back(home: Path) -> None:
    """See above."""
    a_killed_program_comes_back("watcher", home)


def a_clean_exit_nobody_asked_for_is_mended_too(home: Path) -> None:
    """A stray SIGTERM ends a program with status 0; it is started again all the same."""
    with running(home) as supervised:
        until(lambda: "watcher entered RUNNING" in supervised.err.read_text(), "it runs")
        os.kill(supervised.wait_for_starts("watcher", 1), signal.SIGTERM)
        supervised.wait_for_starts("watcher", 2)


def a_program_that_fails_at_start_is_tried_again(home: Path) -> None:
    """Five failures in a row, where supervisord's default stops for ever after four."""
    (home / "watcher.broken").touch()
    with running(home) as supervised:
        until(lambda: supervised.err.read_text().count("watcher: broken") >= 5, "five tries")
        (home / "watcher.broken").unlink()
        supervised.wait_for_starts("watcher", 1)


def an_enforcer_that_hangs_is_restarted(home: Path) -> None:
    """It lives and is stopped: only the unanswered pings tell. A minute of them, less here."""
    watchdog = home / "deploy/supervised/watchdog.py"
    watchdog.write_text(watchdog.read_text().replace("\nUNANSWERED = 12\n", "\nUNANSWERED = 3\n"))
    with running(home) as supervised:
        supervised.wait_for_starts("watcher", 1)
        until(lambda: supervised.said("enforcer", "answered"), "a ping")
        hung = supervised.wait_for_starts("enforcer", 1)
        os.kill(hung, signal.SIGSTOP)
        supervised.wait_for_starts("enforcer", 2)
        assert gone(hung)
        assert [line["pid"] for line in supervised.said("watchdog", "enforcer_hangs")] == [hung]
        assert len(supervised.pids("watcher")) == 1


def a_program_beyond_saving_ends_supervisord(home: Path) -> None:
    """Whoever runs the container sees it end, and the other program has stopped cleanly."""
    conf = home / "supervisord.conf"
    conf.write_text(conf.read_text().replace("startretries=100\n", "startretries=2\n"))
    (home / "enforcer.broken").touch()
    with running(home) as supervised:
        watcher = supervised.wait_for_starts("watcher", 1)
        ended(supervised.process)
        assert [line["program"] for line in supervised.said("watchdog", "beyond_saving")] == [
            "enforcer"
        ]
        assert supervised.said("watcher", "stopped")
        assert gone(watcher)


def an_enforcer_that_gives_up_ends_supervisord(home: Path) -> None:
    """It ended with status 1, minutes after its start: only a new container helps."""
    (home / "enforcer.gives-up").touch()
    with running(home) as supervised:
        watcher = supervised.wait_for_starts("watcher", 1)
        ended(supervised.process)
        assert supervised.said("watchdog", "beyond_saving")
        assert supervised.said("watcher", "stopped")
        assert gone(watcher)


def sigterm_stops_both_and_leaves_nothing(home: Path) -> None:
    """The watcher first: the enforcer gives everything back when nobody asks for more."""
    with running(home) as supervised:
        pids = [supervised.wait_for_starts(name, 1) for name in ("enforcer", "watcher")]
        supervised.process.send_signal(signal.SIGTERM)
        assert ended(supervised.process) == 0
        assert all(gone(pid) for pid in pids)
        stopped = [
            json.loads(line)["component"]
            for line in supervised.out.read_text().splitlines()
            if '"stopped"' in line
        ]
        assert stopped == ["watcher", "enforcer"]


def a_killed_supervisord_takes_both_along(home: Path) -> None:
    """Two programs that nobody minds would keep a second agent from taking over."""
    with running(home) as supervised:
        pids = [supervised.wait_for_starts(name, 1) for name in ("enforcer", "watcher")]
        supervised.process.kill()
        supervised.process.wait()
        until(lambda: all(gone(pid) for pid in pids), "the end of both")


SCENARIOS: list[Scenario] = [
    each_program_has_its_user_and_only_its_environment,
    a_killed_enforcer_comes_back,
    a_killed_watcher_comes_back,
    a_clean_exit_nobody_asked_for_is_mended_too,
    a_program_that_fails_at_start_is_tried_again,
    an_enforcer_that_hangs_is_restarted,
    a_program_beyond_saving_ends_supervisord,
    an_enforcer_that_gives_up_ends_supervisord,
    sigterm_stops_both_and_leaves_nothing,
    a_killed_supervisord_takes_both_along,
]


def play(scenario: Scenario) -> None:
    """Run a scenario in a folder laid out as in the image, which the watcher's user can enter."""
    with tempfile.TemporaryDirectory(prefix="power-agent-") as folder:
        Path(folder).chmod(0o755)
        scenario(make_home(Path(folder)))


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[Scenario, Future[None]]]:
    """Start all scenarios and return where each one's outcome will be."""
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {scenario: pool.submit(play, scenario) for scenario in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_supervised(scenario: Scenario, outcomes: dict[Scenario, Future[None]]) -> None:
    """Each scenario's docstring is the claim."""
    outcomes[scenario].result()


def test_stopping_fits_the_grace_period_of_a_pod() -> None:
    """Groups stop one after the other, so what counts is the sum."""
    lines = (ROOT / "supervisord.conf").read_text().splitlines()
    waits = [int(line.partition("=")[2]) for line in lines if line.startswith("stopwaitsecs=")]
    assert len(waits) == 3
    assert sum(waits) < 30


def test_the_enforcer_is_given_longer_than_it_may_be_told_to_take() -> None:
    _, _, enforcer = (ROOT / "supervisord.conf").read_text().partition("[program:enforcer]")
    waits = [line for line in enforcer.splitlines() if line.startswith("stopwaitsecs=")]
    assert int(waits[0].partition("=")[2]) >= MOST_EXIT_SUPERVISED_S + 2


def helper(name: str) -> ModuleType:
    """Import a helper that belongs to no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"deploy/supervised/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_an_enforcer_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that gives every GPU back, nor one that waits for another agent to go."""
    module = helper("watchdog")
    killed: list[int] = []
    monkeypatch.setattr(module, "children_named", lambda *_: [4711])
    monkeypatch.setattr(module.os, "kill", lambda pid, _: killed.append(pid))

    class Enforcer:
        answers = False

        def request(self, *_: object) -> None:
            if not self.answers:
                raise module.TransportError("no answer")

    class Quiet:
        def error(self, *_: object, **__: object) -> None:
            pass

    ticking = Enforcer()
    watchdog = module.Watchdog(ticking, Quiet())

    def ticks(count: int, *, answered: bool) -> None:
        ticking.answers = answered
        for _ in range(count):
            watchdog.hear("TICK_5", {})

    def state(name: str) -> None:
        watchdog.hear(f"PROCESS_STATE_{name}", {"processname": "enforcer"})

    ticks(2, answered=False)
    state("STOPPING")
    ticks(5, answered=False)
    state("STARTING")
    state("RUNNING")
    ticks(50, answered=False)
    assert killed == [], "stopping, or not up yet"
    ticks(1, answered=True)
    assert module.UNANSWERED * TICK_S > LONGEST_OPENING_S + 15
    ticks(module.UNANSWERED - 1, answered=False)
    ticks(1, answered=True)
    ticks(module.UNANSWERED - 1, answered=False)
    assert killed == [], "never a minute of them in a row"
    ticks(1, answered=False)
    assert killed == [4711]

    state("EXITED")
    ticking.answers = True
    state("STARTING")
    ticking.answers = False
    state("RUNNING")
    ticks(module.UNANSWERED - 1, answered=False)
    assert killed == [4711, 4711], "it answered before it counted as running"


def test_an_enforcer_that_hangs_before_its_first_answer_is_killed_after_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would hang for ever: the container's own probe asks the watcher, which lives."""
    module = helper("watchdog")
    killed: list[int] = []
    monkeypatch.setattr(module, "children_named", lambda *_: [4711])
    monkeypatch.setattr(module.os, "kill", lambda pid, _: killed.append(pid))

    class Hung:
        def request(self, *_: object) -> None:
            raise module.TransportError("no answer")

    class Quiet:
        def error(self, *_: object, **__: object) -> None:
            pass

    watchdog = module.Watchdog(Hung(), Quiet())
    watchdog.hear("PROCESS_STATE_STARTING", {"processname": "enforcer"})
    for _ in range(module.UNANSWERED_FROM_THE_START - 2):
        watchdog.hear("TICK_5", {})
    assert killed == []
    watchdog.hear("TICK_5", {})
    assert killed == [4711]


@pytest.mark.root
@pytest.mark.skipif(not AS_ROOT, reason="needs root")
@pytest.mark.parametrize("uid", ["0", "nobody", "-1", "4294967295", "٣"])
def test_a_watcher_uid_that_is_no_plain_user_is_refused(uid: str) -> None:
    """Never root by accident."""
    done = subprocess.run(
        [sys.executable, "-I", ROOT / "deploy/supervised/launch.py", "watcher"],
        env={"POWER_AGENT_WATCHER_UID": uid},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "POWER_AGENT_WATCHER_UID" in done.stderr
