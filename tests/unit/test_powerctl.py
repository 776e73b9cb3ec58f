"""powerctl as a real process against a real transport server that gives canned answers."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import msgspec
import pytest

from enforcer.server import Server
from shared import __version__, messages
from shared.messages import (
    Counters,
    EnforcerStatus,
    Error,
    Gpu,
    LimitSet,
    Ping,
    Pod,
    Pong,
    Process,
    Reply,
    Request,
    Status,
    StatusReply,
    WatcherStatus,
)
from shared.powerctl import live, node_checks, overview, reply_checks, tables, verdict
from shared.powerctl.__main__ import main
from shared.powerctl.explain import explain
from shared.powerctl.missing import near
from shared.sockets import control_path
from tests.simnode import late_signal
from tests.waiting import HANG_S, ended, joined, until

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = HANG_S

UID_A = "2c1f7a54-0b6e-4d0b-9a51-3f4f7c9f0a11"
UID_B = "7b1d8c02-5f1e-4a9c-8f22-91b0d3e6a7c4"
UID_C = "0fae7f1c-62a8-4c1e-8d5c-6f8a2f0a3c33"
LINE_A = f"0::/kubepods.slice/kubepods-pod{UID_A.replace('-', '_')}.slice/cri-containerd-3fa9.scope"
LINE_B = f"0::/kubepods.slice/kubepods-pod{UID_B.replace('-', '_')}.slice/cri-containerd-b71c.scope"


def gpu(index: int | None = 0, **changes: object) -> Gpu:
    plain = Gpu(
        index=index,
        uuid=f"GPU-{index}",
        name="NVIDIA H100 80GB HBM3",
        limit_mw=700_000,
        enforced_mw=700_000,
        default_mw=700_000,
        min_mw=200_000,
        max_mw=700_000,
        power_mw=71_280,
        managed=False,
        original_mw=None,
        target_mw=None,
        pods=[],
        state="free",
        reason="no annotated pod uses it",
        processes=[],
        writes={},
        write_failures={},
    )
    return msgspec.structs.replace(plain, **changes)


def unread(why: str) -> dict[str, object]:
    """A reply's GPUs, of which one has a process list that cannot be read."""
    return {"gpus": [gpu(0, processes=[Process(pid=0, owner="unknown", evidence=why)])]}


def managed_gpu(index: int, limit_mw: int, uids: list[str], **changes: object) -> Gpu:
    usual: dict[str, object] = {
        "limit_mw": limit_mw,
        "enforced_mw": limit_mw,
        "power_mw": 341_700,
        "managed": True,
        "original_mw": 700_000,
        "target_mw": limit_mw,
        "pods": uids,
        "state": "managed",
        "reason": "asked for",
        "writes": {"acquire": 1},
    }
    return gpu(index, **(usual | changes))


def pod(uid: str, name: str, **changes: object) -> Pod:
    plain = Pod(
        uid=uid,
        namespace="team-a",
        name=name,
        raw="350",
        requested_mw=350_000,
        effective_mw=350_000,
        gpus=["GPU-0"],
        state="enforced",
        reason="the limit holds",
    )
    return msgspec.structs.replace(plain, **changes)


def enforcer(**changes: object) -> EnforcerStatus:
    plain = EnforcerStatus(
        version="1.0.0",
        pid=os.getpid(),
        uptime_s=7_380.0,
        dry_run=False,
        nvml="ok",
        nvml_message="ok",
        driver_version="550.54.15",
        node="node-a",
        min_mw=None,
        max_mw=600_000,
        conflict="lowest",
        cgroup_roots=["/"],
        ledger="/var/lib/power-agent/ledger.json",
    )
    return msgspec.structs.replace(plain, **changes)


LINKED = WatcherStatus(connected=True, session="s1", revision=17, age_s=1.24)


def reply(**changes: object) -> StatusReply:
    """Three GPUs: one shared by two pods with different limits, one clamped, one free."""
    shared_gpu = managed_gpu(
        0,
        350_000,
        [UID_A, UID_B],
        reason=f"the lowest of two limits: asked by pod {UID_A}",
        writes={"acquire": 1, "adjust": 2, "drift": 0},
        processes=[
            Process(pid=4242, owner=UID_A, evidence=LINE_A),
            Process(pid=4300, owner=UID_B, evidence=LINE_B),
            Process(pid=900, owner="other", evidence="0::/system.slice/dcgm.service"),
        ],
    )
    clamped_gpu = managed_gpu(
        1,
        600_000,
        [UID_C],
        enforced_mw=540_000,
        processes=[Process(pid=5000, owner=UID_C, evidence="0::/kubepods/podx/c")],
    )
    plain = StatusReply(
        enforcer=enforcer(),
        watcher=LINKED,
        gpus=[gpu(2), clamped_gpu, shared_gpu],
        pods=[
            pod(UID_A, "llm-0"),
            pod(
                UID_B,
                "embed",
                raw="500.5",
                requested_mw=500_500,
                state="conflict",
                reason=f"pod {UID_A} on the same GPU asks for less",
            ),
            pod(
                UID_C,
                "train",
                raw="900",
                requested_mw=900_000,
                effective_mw=600_000,
                gpus=["GPU-1"],
                state="clamped",
                reason="asked 900 W, the administrator allows at most 600 W",
            ),
        ],
        counters=Counters(limit_writes=4, snapshots=17),
    )
    return msgspec.structs.replace(plain, **changes)


class Responder:
    """The enforcer's end of the socket with answers made up beforehand."""

    def __init__(self, run_dir: Path, answer: Callable[[Request], Reply | None]) -> None:
        self.answer = answer
        self.event: messages.Event | None = None  # published on every turn while set
        self.published = 0
        self.asked: list[Request] = []
        self._ended = threading.Event()
        self._server = Server(run_dir, [os.geteuid()])
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            for incoming in self._server.receive(0.02):
                request = messages.decode_request(incoming.payload)
                self.asked.append(request)
                answer = self.answer(request)
                if answer is not None:
                    self._server.reply(incoming, answer)
            if self.event is not None:
                self._server.publish(self.event)
                self.published += 1

    def close(self) -> None:
        self._ended.set()
        joined(self._thread)
        self._server.close()


def answering(status: StatusReply) -> Callable[[Request], Reply]:
    def answer(request: Request) -> Reply:
        return status if isinstance(request, Status) else Pong(version="1.0.0", uptime_s=61.5)

    return answer


@contextmanager
def responding(run_dir: Path, answer: Callable[[Request], Reply | None]) -> Iterator[Responder]:
    responder = Responder(run_dir, answer)
    try:
        yield responder
    finally:
        responder.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "shared.powerctl", *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL") if key in os.environ}
    return kept | {"PYTHONPATH": str(REPOSITORY)} | extra


def process(*arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
    """As a program of its own."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=environment(**extra),
    )


def powerctl(*arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
    """The same program in this process: its start costs more than all that it does."""
    told = [*map(str, arguments)]
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")  # as the interpreter's own
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            mock.patch.object(sys, "argv", ["powerctl", *told]),
            mock.patch.dict(os.environ, environment(**extra), clear=True),
            mock.patch.object(sys, "__stdout__", out),  # by which the width of a terminal is asked
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as ended_with,
        ):
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    status = ended_with.value.code
    assert isinstance(status, int)
    return subprocess.CompletedProcess(told, status, _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


# ------------------------------------------------------------------------------- exit status


def test_ping_of_a_living_enforcer_exits_0_with_version_and_round_trip(run_dir: Path) -> None:
    with responding(run_dir, answering(reply())):
        done = process("ping", "--socket", run_dir)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(
            r"power-agent 1\.0\.0 answers in [0-9.]+ ms, up 1 min 1 s\n", done.stdout
        )
        shown = json.loads(powerctl("ping", "--json", "--socket", run_dir).stdout)
    assert shown.keys() == {"version", "uptime_s", "round_trip_ms"}
    assert shown["version"] == "1.0.0"


def test_the_directory_comes_from_the_environment_too(run_dir: Path) -> None:
    with responding(run_dir, answering(reply())):
        assert powerctl("ping", POWER_AGENT_RUN_DIR=str(run_dir)).returncode == 0


@pytest.mark.parametrize("arguments", [["status"], ["explain", "0"], ["events"], ["ping"]])
def test_exit_3_where_no_socket_is(run_dir: Path, arguments: list[str]) -> None:
    done = powerctl(*arguments, "--socket", run_dir, "--timeout", "0.05")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"powerctl: no socket at {run_dir}/control.sock; start the enforcer, "
        "or name its directory with --socket or POWER_AGENT_RUN_DIR; "
        "powerctl doctor finds out\n"
    )


def test_exit_3_where_a_dead_enforcer_left_its_socket(run_dir: Path) -> None:
    run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(control_path(run_dir)))
    done = powerctl("ping", "--socket", run_dir, "--timeout", "0.05")
    assert done.returncode == 3
    assert "nobody listens" in done.stderr
    assert "start it" in done.stderr


def test_exit_3_where_the_enforcer_does_not_answer(run_dir: Path) -> None:
    with responding(run_dir, lambda _request: None):
        done = powerctl("ping", "--socket", run_dir, "--timeout", "0.3")
    assert done.returncode == 3
    assert "is open but gave no answer within 0.3 s" in done.stderr
    assert "restart it" in done.stderr


def test_an_enforcer_that_is_there_but_busy_is_waited_for(run_dir: Path) -> None:
    """It answers nobody while it opens NVML. Ping is for probes: it says no after two seconds."""

    def busy(request: Request) -> Reply | None:
        opened.wait(4)
        return answering(reply())(request)

    opened = threading.Event()
    with responding(run_dir, busy):
        asked = powerctl("ping", "--socket", run_dir)
        assert (asked.returncode, "within 2 s" in asked.stderr) == (3, True)
        done = powerctl("status", "--socket", run_dir)
        opened.set()
    assert done.returncode == 0
    assert "team-a/train" in done.stdout
    assert "the enforcer is there but busy" in done.stderr


def test_where_nobody_is_there_it_is_said_at_once(run_dir: Path) -> None:
    """It would be no use to wait as for one that is busy."""
    assert powerctl("status", "--socket", run_dir).returncode == 3


def test_exit_3_where_a_listener_does_not_even_greet(run_dir: Path) -> None:
    run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(str(control_path(run_dir)))
        stopped.listen(8)
        done = powerctl("ping", "--socket", run_dir, "--timeout", "0.1")
    assert done.returncode == 3
    assert "stopped or overloaded" in done.stderr


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_exit_3_where_this_uid_is_not_admitted(run_dir: Path) -> None:
    server = Server(run_dir, [12345])
    try:
        done = powerctl("status", "--socket", run_dir, "--timeout", "0.2")
        doctor = powerctl("doctor", "--socket", run_dir, "--timeout", "0.2")
    finally:
        server.close()
    assert done.returncode == 3
    assert f"uid 0 is not admitted at {run_dir}/control.sock" in done.stderr
    assert "POWER_AGENT_READER_UIDS" in done.stderr
    # An enforcer that refuses somebody works: nothing else is to be searched, restarted or killed.
    assert (doctor.returncode, "POWER_AGENT_READER_UIDS" in doctor.stdout) == (3, True)
    assert "enforcer process" not in doctor.stdout


def test_exit_3_where_the_enforcer_denies_or_speaks_another_version(run_dir: Path) -> None:
    denied = Error(code="denied", message="uid 7 may not ask")
    with responding(run_dir, lambda _request: denied) as responder:
        done = powerctl("status", "--socket", run_dir)
        assert (done.returncode, "uid 7 may not ask" in done.stderr) == (3, True)
        assert "POWER_AGENT_READER_UIDS" in done.stderr
        responder.answer = lambda _request: Error(code="unsupported_version", message="version 2")
        done = powerctl("status", "--socket", run_dir)
        assert done.returncode == 3
        assert "enforcer's own version" in done.stderr
        responder.answer = lambda _request: Pong(version="9", uptime_s=1)
        assert powerctl("status", "--socket", run_dir).returncode == 3


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["statsu"],
        ["explain"],
        ["ping", "--timeout", "soon"],
        ["ping", "--timeout", "-1"],
        ["ping", "--timeout", "nan"],
        ["ping", "--timeout", "inf"],
        ["status", "--socket", "/" + "x" * 120],
        ["top", "--json"],
    ],
)
def test_wrong_use_exits_2(arguments: list[str]) -> None:
    done = powerctl(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_a_run_dir_too_long_for_a_socket_names_its_variable() -> None:
    done = powerctl("ping", POWER_AGENT_RUN_DIR="/" + "x" * 120)
    assert done.returncode == 2
    assert "POWER_AGENT_RUN_DIR" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["status", "ping", "doctor"])
def test_a_question_that_is_interrupted_is_not_good(
    run_dir: Path, what: str, how: signal.Signals
) -> None:
    with responding(run_dir, lambda _request: None) as responder:
        arguments = command(what, "--socket", run_dir, "--timeout", DEADLINE_S)
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment()) as process:
            until(lambda: bool(responder.asked), "asked")
            process.send_signal(how)
            assert process.communicate(timeout=DEADLINE_S)[0] == b""
    assert process.returncode == 130


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["status", "ping", "doctor"])
def test_a_signal_in_the_last_moment_before_a_wait_ends_it(
    run_dir: Path, what: str, how: signal.Signals
) -> None:
    """The wait is longer than the test may take: what is seen only after it is lost."""
    with responding(run_dir, lambda _request: None):
        done = process(
            what, "--socket", run_dir, "--timeout", "3600", **late_signal.environment(how, 0.1)
        )
    assert (done.returncode, done.stdout) == (130, "")


def in_shell(script: str, run_dir: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        ["sh", "-c", script, *command("ping", "--socket", run_dir)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=environment(),
    )
    return done.returncode, done.stdout, done.stderr


def test_where_nothing_can_be_written_the_status_still_tells(run_dir: Path) -> None:
    with responding(run_dir, answering(reply())):
        assert in_shell('"$0" "$@" >&-', run_dir) == (0, "", "")
        full = in_shell('"$0" "$@" >/dev/full', run_dir)
        assert in_shell('"$0" "$@" >/dev/full 2>&-', run_dir) == (2, "", "")
    assert full == (2, "", "powerctl: cannot write: No space left on device\n")
    for nowhere in ("2>&-", "2>/dev/full", ">&- 2>&-"):
        assert in_shell(f'"$0" "$@" {nowhere}', run_dir) == (3, "", ""), nowhere


def test_a_directory_that_no_path_can_name_is_wrong_use(tmp_path: Path) -> None:
    done = powerctl("ping", "--socket", b"/tmp/\xff".decode(errors="surrogateescape"))
    assert (done.returncode, "not UTF-8" in done.stderr) == (2, True)
    (tmp_path / "gone").mkdir()
    script = f'cd "{tmp_path}/gone" && rmdir "{tmp_path}/gone" && "$0" "$@"'
    status, _, errors = in_shell(script, Path("run"))
    assert (status, "'run': No such file or directory\n" in errors) == (2, True)


def test_top_without_a_terminal_is_wrong_use(run_dir: Path) -> None:
    assert powerctl("top", "--socket", run_dir).returncode == 2


def test_version_and_help() -> None:
    assert powerctl("--version").stdout == f"powerctl {__version__}\n"
    shown = powerctl("--help")
    assert shown.returncode == 0
    for name in ("status", "top", "explain", "events", "ping", "doctor", "schema"):
        assert name in shown.stdout
    assert "POWER_AGENT_RUN_DIR" in shown.stdout
    assert "(default: /run/power-agent)" in shown.stdout
    assert "3 enforcer not reachable" in shown.stdout
    own = " ".join(powerctl("status", "--help").stdout.split())
    assert "POWER_AGENT_RUN_DIR, that is /run/power-agent" in own


# ------------------------------------------------------------------------------------- status


STATUS = """\
1 of 3 pods have what they asked for; team-a/embed: conflict; team-a/train: clamped

power-agent 1.0.0 on node-a | NVML ok, driver 550.54.15 | watcher linked, 1.2 s ago | up 2 h 3 min

GPU  STATE    LIMIT  ENFORCED   DRAW  RANGE    FOUND  MODEL           PODS
0    managed  350 W     350 W  342 W  200-700  700 W  H100 80GB HBM3  team-a/llm-0, team-a/embed,
                                                                      1 other process
1    managed  600 W     540 W  342 W  200-700  700 W  H100 80GB HBM3  team-a/train
2    free     700 W     700 W   71 W  200-700      -  H100 80GB HBM3  -

STATE       ASKED  HOLDS  GPUS  POD
conflict  500.5 W  350 W  0     team-a/embed
          pod team-a/llm-0 on the same GPU asks for less
enforced    350 W  350 W  0     team-a/llm-0
clamped     900 W  600 W  1     team-a/train
          asked 900 W, the administrator allows at most 600 W
"""


def test_status_text(run_dir: Path) -> None:
    with responding(run_dir, answering(reply())):
        done = powerctl("status", "--socket", run_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == STATUS


def test_status_json_is_the_shape_of_the_contract(run_dir: Path) -> None:
    with responding(run_dir, answering(reply())):
        done = powerctl("status", "--json", "--socket", run_dir)
    shown = json.loads(done.stdout)
    assert shown.keys() == {"enforcer", "watcher", "gpus", "pods", "counters"}
    names = "version pid uptime_s dry_run nvml driver_version node"
    assert shown["enforcer"].keys() >= set(names.split())
    assert shown["watcher"].keys() >= {"connected", "session", "revision", "age_s"}
    names = (
        "index uuid name limit_mw enforced_mw default_mw min_mw max_mw power_mw managed "
        "original_mw target_mw pods state reason"
    )
    assert len(shown["gpus"]) == 3
    assert all(row.keys() >= set(names.split()) for row in shown["gpus"])
    names = "uid namespace name requested_mw effective_mw gpus state reason"
    assert len(shown["pods"]) == 3
    assert all(row.keys() >= set(names.split()) for row in shown["pods"])
    names = "limit_writes limit_write_failures drifts snapshots denied malformed"
    assert shown["counters"].keys() >= set(names.split())
    assert msgspec.convert(shown | {"type": "status_reply", "v": 1}, StatusReply) == reply()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"enforcer": enforcer(nvml="failing", nvml_message="driver mismatch")},
            "NVML is failing: driver mismatch",
        ),
        (
            {"enforcer": enforcer(nvml="absent", nvml_message="no library")},
            "NVML is absent: no library",
        ),
        (
            {"enforcer": enforcer(nvml_message="GPU 3: nvmlDeviceGetName: UNKNOWN")},
            "NVML is ok: GPU 3: nvmlDeviceGetName: UNKNOWN",
        ),
        (
            {"watcher": WatcherStatus(connected=False, session="s", revision=2, age_s=75.0)},
            "watcher is not connected, last heard: 1 min 15 s ago",
        ),
        (
            {"watcher": WatcherStatus(connected=False, session=None, revision=None, age_s=None)},
            "watcher is not connected, last heard: never",
        ),
        (
            {"enforcer": enforcer(paused="it hums")},
            "paused (it hums): no limit of this node is written",
        ),
        ({"gpus": [gpu(3, state="lost", reason="gone")]}, "GPU 3 is lost: gone"),
        ({"gpus": [gpu(None, state="failed", reason="no")]}, "GPU GPU-None is failed: no"),
        ({"gpus": [gpu(3, state="held", reason="unreadable")]}, "GPU 3 is held: unreadable"),
        (
            {"pods": [pod(UID_A, "llm-0", state="failed", reason="not written")]},
            "pod team-a/llm-0 is failed: not written",
        ),
    ],
)
def test_status_exits_1_and_says_what_is_wrong(
    run_dir: Path, changes: dict[str, object], said: str
) -> None:
    with responding(run_dir, answering(reply(**changes))):
        done = powerctl("status", "--socket", run_dir)
        as_json = powerctl("status", "--json", "--socket", run_dir)
    assert (done.returncode, as_json.returncode) == (1, 1)
    assert f"\nnot as it should be:\n  {said}\n" in done.stdout
    assert json.loads(as_json.stdout)["counters"]["snapshots"] == 17


@pytest.mark.parametrize("state", ["clamped", "conflict", "waiting", "enforced"])
def test_what_a_pod_author_chose_is_no_fault_of_the_node(state: str) -> None:
    assert verdict.problems(reply(pods=[pod(UID_A, "a", state=state)])) == []


def test_status_of_an_empty_node(run_dir: Path) -> None:
    nothing = reply(gpus=[], pods=[], enforcer=enforcer(node=None, dry_run=True))
    with responding(run_dir, answering(nothing)):
        done = powerctl("status", "--socket", run_dir)
    assert done.returncode == 0
    assert "a node not yet named" in done.stdout
    assert "DRY RUN" in done.stdout
    assert "no GPU is known\n\nno annotated pod on this node\n" in done.stdout


def test_status_shows_what_is_not_known_as_a_dash_never_as_zero() -> None:
    unknown = gpu(
        5,
        name=None,
        limit_mw=None,
        enforced_mw=None,
        min_mw=None,
        max_mw=None,
        power_mw=None,
        state="lost",
        reason="off the bus",
    )
    rows = overview.status(reply(gpus=[unknown], pods=[]))
    assert rows[8].split() == ["5", "lost", "-", "-", "-", "-", "-", "-", "-"]


def test_an_invalid_annotation_is_shown_as_written() -> None:
    odd = pod(UID_A, "odd", raw="350W and much more", requested_mw=None, state="invalid", gpus=[])
    text = "\n".join(overview.status(reply(pods=[odd])))
    assert '"350W and m.."' in text


def test_no_control_character_from_the_network_reaches_the_terminal(run_dir: Path) -> None:
    evil = "\x1b]0;owned\x07\x9b2J\r\nx\u202e\u200b３"
    bad = reply(
        enforcer=enforcer(node=evil, nvml="failing", nvml_message=evil),
        gpus=[gpu(0, name=evil, reason=evil, state="failed", pods=[evil])],
        pods=[pod(UID_A, evil, raw=evil, requested_mw=None, state="invalid", reason=evil)],
    )
    with responding(run_dir, answering(bad)):
        for arguments in (["status"], ["status", "--json"], ["explain", "0"], ["doctor"]):
            done = powerctl(*arguments, "--socket", run_dir)
            assert done.returncode in (0, 1)
            assert re.search(r"[^\n -~]", done.stdout + done.stderr) is None, arguments
    assert tables.escape(evil) == r"\x1b]0;owned\x07\x9b2J\r\nx\u202e\u200b\uff13"


def test_lines_stay_within_100_columns_for_usual_names() -> None:
    long_reason = "the process list cannot be read and so nothing is given back " * 4
    rows = overview.status(reply(gpus=[gpu(0, state="held", reason=long_reason)]))
    assert max(map(len, rows)) <= 100


def test_reasons_call_pods_by_name_unless_the_uid_is_none() -> None:
    names = {UID_A: "team-a/llm-0", "3": "x"}
    assert tables.named(f"300 W: asked by {UID_A}\n", names) == r"300 W: asked by team-a/llm-0\n"


def test_colours_only_on_a_terminal(run_dir: Path) -> None:
    with responding(run_dir, answering(reply())):
        assert "\x1b" not in powerctl("status", "--socket", run_dir).stdout
        with on_terminal("status", "--socket", str(run_dir)) as (process, screen):
            screen.until(lambda text: "team-a/train" in text, "the table")
            assert ended(process) == 0
        assert "\x1b[32mmanaged\x1b[0m" in screen.text
        with on_terminal("status", "--socket", str(run_dir), NO_COLOR="1") as (process, screen):
            screen.until(lambda text: "team-a/train" in text, "the table")
            assert ended(process) == 0
        assert "\x1b" not in screen.text


# ------------------------------------------------------------------------------------ explain


EXPLAIN_TRAIN = f"""\
pod team-a/train, uid {UID_C}
  state       clamped: asked 900 W, the administrator allows at most 600 W
  annotation  "900", read as 900 W
  runs on     GPU 1
  holds       600 W

GPU 1, GPU-1, NVIDIA H100 80GB HBM3
  state       managed: asked for
  processes   pid 5000 of team-a/train
  bounds      hardware 200 W to 700 W, administrator at most 600 W, together 200 W to 600 W
  target      600 W
  written     acquire 1 since the enforcer started
  read back   limit 600 W, enforced 540 W; another limiter (thermal, power supply, the module's,
              out-of-band) is stronger
  found       700 W at first touch; factory default 700 W

watcher heard 1.2 s ago (connected, revision 17)
"""


@pytest.mark.parametrize("subject", ["team-a/train", UID_C])
def test_explain_a_pod_shows_the_whole_chain(run_dir: Path, subject: str) -> None:
    with responding(run_dir, answering(reply())):
        done = powerctl("explain", subject, "--socket", run_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == EXPLAIN_TRAIN


@pytest.mark.parametrize(
    ("changes", "subject", "status"),
    [
        ({"gpus": [managed_gpu(0, 1, [UID_A], state="held")]}, "team-a/llm-0", 1),
        ({"gpus": [managed_gpu(0, 1, [UID_A], state="failed")]}, "0", 1),
        ({"gpus": [gpu(0), gpu(3, state="lost")]}, "GPU-3", 1),
        ({"pods": [pod(UID_A, "llm-0", state="failed")]}, "team-a/llm-0", 1),
        ({"pods": [pod(UID_A, "llm-0", state="failed")]}, "0", 1),
        # Others' faults are not the subject's, nor are the node's.
        ({"gpus": [managed_gpu(0, 1, [UID_A]), gpu(3, state="lost")]}, "team-a/llm-0", 0),
        ({"pods": [pod(UID_A, "llm-0", state="failed")]}, "2", 0),
        ({"enforcer": enforcer(nvml="failing")}, "team-a/llm-0", 0),
        ({"pods": [pod(UID_A, "llm-0", state="waiting", gpus=[])]}, "team-a/llm-0", 0),
    ],
)
def test_explain_exits_1_where_what_it_shows_is_not_as_it_should_be(
    run_dir: Path, changes: dict[str, object], subject: str, status: int
) -> None:
    with responding(run_dir, answering(reply(**changes))):
        done = powerctl("explain", subject, "--socket", run_dir)
        as_json = powerctl("explain", "--json", subject, "--socket", run_dir)
    assert (done.returncode, as_json.returncode) == (status, status)
    assert subject in done.stdout
    assert json.loads(as_json.stdout)["subject"] == subject


@pytest.mark.parametrize("subject", ["0", "GPU-0"])
def test_explain_a_gpu_shows_processes_conflict_and_both_pods(subject: str) -> None:
    explanation = explain(reply(), subject)
    assert explanation is not None
    text = "\n".join(explanation.text)
    assert text.startswith("GPU 0, GPU-0, NVIDIA H100")
    words = " ".join(text.split())
    assert "pid 4242 of team-a/llm-0 pid" in words
    assert LINE_A not in words
    assert "managed: the lowest of two limits: asked by pod team-a/llm-0 processes" in words
    assert "pid 900 of no known pod " in words
    assert (
        "conflict team-a/llm-0 350 W, team-a/embed 500.5 W; rule `lowest`: the lowest holds"
    ) in words
    assert "written acquire 1, adjust 2 since" in words
    assert [found.name for found in explanation.pods] == ["llm-0", "embed"]


def test_explain_says_nothing_of_a_first_process_that_was_not_seen() -> None:
    explanation = explain(reply(), UID_A, verbose=True)
    assert explanation is not None
    assert "limit stood" not in "\n".join(explanation.text)


def test_explain_json_carries_the_records_and_the_text(run_dir: Path) -> None:
    with responding(run_dir, answering(reply(pods=[pod(UID_A, "llm-0", lead_s=0.25)]))):
        done = powerctl("explain", "--json", "team-a/llm-0", "--socket", run_dir)
    shown = json.loads(done.stdout)
    assert shown.keys() == {"subject", "pods", "gpus", "enforcer", "watcher", "text"}
    assert shown["subject"] == "team-a/llm-0"
    assert [(row["uid"], row["lead_s"]) for row in shown["pods"]] == [(UID_A, 0.25)]
    assert [row["uuid"] for row in shown["gpus"]] == ["GPU-0"]
    assert shown["gpus"][0]["processes"][0]["evidence"] == LINE_A
    assert shown["text"][0] == f"pod team-a/llm-0, uid {UID_A}"


def test_explain_an_unknown_subject_exits_1_with_near_matches(run_dir: Path) -> None:
    with responding(run_dir, answering(reply())):
        done = powerctl("explain", "team-a/lmm-0", "--socket", run_dir)
        assert (done.returncode, done.stdout) == (1, "")
        assert "did you mean team-a/llm-0?" in done.stderr
        done = powerctl("explain", "zzz\x1b", "--socket", run_dir)
    assert done.returncode == 1
    assert "powerctl status lists" in done.stderr
    assert "\x1b" not in done.stderr
    assert near(reply(), "embed") == ["team-a/embed"]
    assert near(reply(), UID_B[:8]) == [UID_B]
    assert near(reply(), UID_B[:4]) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"pods": [pod(UID_A, "p", raw="350W", requested_mw=None, effective_mw=None, gpus=[])]},
            ['"350W", which is no usable limit', "no GPU: none of its processes", "holds nothing"],
        ),
        (
            {"enforcer": enforcer(dry_run=True), "gpus": [managed_gpu(0, 1, [UID_A], writes={})]},
            ["nothing since the enforcer started; dry run: no limit is written"],
        ),
        (
            {"gpus": [managed_gpu(0, 400_000, [UID_A], target_mw=350_000)]},
            ["limit 400 W, enforced 400 W; not the target of 350 W"],
        ),
        (
            {"gpus": [managed_gpu(0, 1, [UID_A], write_failures={"NO_PERMISSION": 3})]},
            ["failed: NO_PERMISSION 3"],
        ),
        (
            {"watcher": WatcherStatus(connected=False, session=None, revision=None, age_s=None)},
            ["the watcher has never been heard"],
        ),
        (
            {"watcher": WatcherStatus(connected=False, session="s", revision=3, age_s=75.0)},
            ["watcher heard 1 min 15 s ago (NOT connected, revision 3)"],
        ),
        (
            {"enforcer": enforcer(min_mw=250_000, max_mw=None)},
            ["administrator at least 250 W, together 250 W to 700 W"],
        ),
        (
            {"enforcer": enforcer(max_mw=None)},
            ["bounds hardware 200 W to 700 W, administrator none target"],
        ),
        (
            {
                "gpus": [
                    managed_gpu(
                        0,
                        350_000,
                        [UID_A],
                        processes=[
                            Process(pid=0, owner="unknown", evidence="nvml: UNKNOWN"),
                            Process(pid=8, owner="other", evidence=""),
                            Process(pid=9, owner=UID_C[::-1], evidence="2:cpu:/p\n1:a:/p\n0::/\n"),
                        ],
                    )
                ]
            },
            [
                "processes the list cannot be read: nvml: UNKNOWN",
                "pid 8 of no known pod, by no evidence",
                f"pid 9 of pod {UID_C[::-1]}, not annotated, by 2:cpu:/p",
            ],
        ),
        ({"enforcer": enforcer(conflict="safe-default")}, ["rule `safe-default`: the safe"]),
        (
            {"pods": [pod(UID_A, "llm-0", lead_s=0.0)]},
            ["holds 350 W limit stood 0 ms before its first process on a GPU began"],
        ),
        (
            {"pods": [pod(UID_A, "llm-0", lead_s=2.345)]},
            ["limit stood 2.3 s before its first process on a GPU began"],
        ),
        (
            {"pods": [pod(UID_A, "llm-0", lead_s=-0.1204)]},
            ["limit stood 120 ms after its first process on a GPU began"],
        ),
        (
            {"pods": [pod(UID_A, "llm-0", lead_s=-75.0)]},
            ["limit stood 1 min 15 s after its first process on a GPU began"],
        ),
    ],
)
def test_explain_says_what_is_special(changed: dict[str, object], words: list[str]) -> None:
    explanation = explain(reply(**changed), UID_A, verbose=True)
    assert explanation is not None
    text = " ".join(" ".join(explanation.text).split())
    for expected in words:
        assert expected in text


def test_explain_of_a_pod_that_waits_names_the_processes_of_others_as_candidates() -> None:
    """A restored worker is in the cgroup of the agent that restored it: nobody can tell."""
    others = [
        Process(pid=7000 + number, owner=UID_C[::-1], evidence=f"0::/kubepods/pod{number}")
        for number in range(10)
    ]
    others += [Process(pid=900, owner="other", evidence="0::/docker/3fa9")]
    mine = Process(pid=1, owner=UID_B, evidence=LINE_B)
    waiting = pod(UID_A, "llm-0", state="waiting", gpus=[])
    changed = reply(
        pods=[waiting, pod(UID_B, "embed")], gpus=[gpu(0, processes=[*others[-1:], mine, *others])]
    )
    explanation = explain(changed, UID_A)
    assert explanation is not None
    text = " ".join(" ".join(explanation.text).split())
    assert "candidates of others on this node's GPUs" in text
    assert "pid 900 of no known pod GPU" in text
    assert f"pid 7000 of pod {UID_C[::-1]}, not annotated" in text
    assert "and 4 more" in text
    assert "pid 1 of" not in text  # an annotated pod's own is no candidate
    assert "candidates" not in " ".join(getattr(explain(changed, UID_B), "text", []))


# --------------------------------------------------------------------------------- top, events


class Screen:
    """What a program wrote to its terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.text = ""

    def until(self, condition: Callable[[str], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition(self.text):
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"never seen: {what} in {self.text[-2000:]!r}"
            if select.select([self._fd], [], [], left_s)[0]:
                try:
                    self.text += os.read(self._fd, 65536).decode()
                except OSError:  # EIO: the program has closed its side
                    assert condition(self.text), f"ended without {what}: {self.text[-2000:]!r}"


@contextmanager
def on_terminal(
    *arguments: str, rows: int = 40, **extra: str
) -> Iterator[tuple[subprocess.Popen[bytes], Screen]]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 120, 0, 0))
    process = subprocess.Popen(
        command(*arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(TERM="xterm", **extra),
    )
    os.close(theirs)
    try:
        yield process, Screen(ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_top_survives_the_enforcers_restart_and_restores_the_screen(
    run_dir: Path, end: signal.Signals
) -> None:
    with on_terminal("top", "--socket", str(run_dir), "--timeout", "0.2") as (process, screen):
        screen.until(lambda text: "not reachable" in text, "not reachable, at the start")
        for _ in range(2):
            screen.text = screen.text[-1:]
            with responding(run_dir, answering(reply())):
                screen.until(lambda text: "team-a/train" in text, "the table")
            screen.text = screen.text[-1:]
            screen.until(lambda text: "not reachable" in text, "not reachable")
        process.send_signal(end)
        screen.until(lambda text: "\x1b[?1049l" in text, "the screen restored")
        assert ended(process) == 0
        assert screen.text.rstrip().endswith("\x1b[?7h\x1b[?25h\x1b[?1049l")
        assert "Traceback" not in screen.text


def test_top_refreshes_and_fits_a_small_terminal(run_dir: Path) -> None:
    with (
        responding(run_dir, answering(reply())) as responder,
        on_terminal("top", "--socket", str(run_dir), rows=8) as (_process, screen),
    ):
        screen.until(lambda text: "more lines: powerctl status" in text, "the cut")
        until(lambda: len(responder.asked) >= 3, "three questions")
        frame = screen.text.split("\x1b[H")[1]
        assert frame.count("\r\n") <= 7


def an_event(**changes: object) -> LimitSet:
    plain = LimitSet(
        ts=1_767_323_045.678,
        message=f"asked by pod {UID_A}",
        index=0,
        uuid="GPU-0",
        pods=[UID_A],
        from_mw=700_000,
        to_mw=350_000,
        reason="acquire",
    )
    return msgspec.structs.replace(plain, **changes)


@contextmanager
def following(run_dir: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command("events", "--socket", run_dir, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout
    assert process.stderr
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def has_line(process: subprocess.Popen[str]) -> bool:
    assert process.stdout
    return bool(select.select([process.stdout], [], [], 0)[0])


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    assert select.select([process.stdout], [], [], DEADLINE_S)[0], "no line came"
    return process.stdout.readline()


def test_events_text_flushes_each_line_and_ends_on_sigint(run_dir: Path) -> None:
    with (
        responding(run_dir, answering(reply())) as responder,
        following(run_dir) as process,
    ):
        until(lambda: Ping() in responder.asked, "the ping")
        responder.event = an_event()
        # As few as would stay in a buffer that is not flushed.
        until(lambda: has_line(process) or responder.published >= 50, "a line")
        responder.event = None
        assert read_line(process) == (
            "2026-01-02T03:04:05.678Z  limit_set         GPU 0 700 W -> 350 W (acquire) "
            "for team-a/llm-0: asked by pod team-a/llm-0\n"
        )
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, errors) == (0, "")


def test_a_quiet_enforcer_that_has_gone_is_told_once_and_its_return_too(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert live._look(run_dir, 0.02, here=True) is False
    assert "enforcer not reachable: no socket" in capsys.readouterr().err
    assert live._look(run_dir, 0.02, here=False) is False
    assert capsys.readouterr().err == ""
    with responding(run_dir, answering(reply())):
        assert live._look(run_dir, DEADLINE_S, here=False) is True
        assert "enforcer is back" in capsys.readouterr().err
        assert live._look(run_dir, DEADLINE_S, here=True) is True
    assert capsys.readouterr().err == ""


def test_events_json_is_one_object_a_line(run_dir: Path) -> None:
    with (
        responding(run_dir, answering(reply())) as responder,
        following(run_dir, "--json") as process,
    ):
        responder.event = an_event(message="a\x1b\nb")
        line = read_line(process)
        assert line.endswith("}\n")
        assert json.loads(line)["type"] == "limit_set"
        assert msgspec.convert(json.loads(line), LimitSet) == responder.event
        process.send_signal(signal.SIGTERM)
        assert ended(process) == 0


def test_events_names_a_pod_that_only_the_event_knows(run_dir: Path) -> None:
    gone = messages.PodName(uid=UID_A, namespace="team-b", name="gone\x1b")
    names: dict[str, str] = {}
    live._learn(names, an_event(pod_names=[gone]), run_dir, 0.02)  # nobody could be asked
    assert names == {UID_A: r"team-b/gone\x1b"}


def test_events_ends_when_its_reader_has_gone_even_if_nothing_happens(run_dir: Path) -> None:
    with (
        responding(run_dir, answering(reply())) as responder,
        following(run_dir) as process,
    ):
        until(lambda: Ping() in responder.asked, "the ping")
        assert process.stdout
        process.stdout.close()
        assert ended(process) == 0
        assert process.stderr
        assert process.stderr.read() == ""


HEAD = '"$@" | head -n 1; exit "${PIPESTATUS[0]}"'


def test_events_ends_when_a_pipe_closes_between_two_lines(run_dir: Path) -> None:
    with responding(run_dir, answering(reply())) as responder:
        responder.event = an_event()
        done = subprocess.run(
            ["bash", "-c", HEAD, "-", *command("events", "--socket", run_dir)],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            env=environment(),
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("limit_set") == 1


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            messages.SnapshotAccepted(ts=0, message="2 pods", session="s", revision=4, pods=2),
            "snapshot_accepted revision 4: 2 pods",
        ),
        (
            messages.MessageDenied(ts=0, message="no\x1b", code="denied", uid=7),
            r"message_denied denied from uid 7: no\x1b",
        ),
        (
            messages.MessageDenied(ts=0, message="", code="malformed", uid=None),
            "message_denied malformed without a proven uid",
        ),
        (
            messages.GpuLost(
                ts=0,
                message="off the bus",
                index=None,
                uuid="GPU-9",
                pods=[],
                from_mw=None,
                to_mw=350_000,
                reason="lost",
            ),
            "gpu_lost GPU GPU-9: off the bus",
        ),
        (
            an_event(ts=0, pci="00000000:3B:00.0", dry_run=True, pods=[], message=""),
            "limit_set GPU 0 (00000000:3B:00.0), dry run, 700 W -> 350 W (acquire)",
        ),
    ],
)
def test_event_lines(event: messages.Event, words: str) -> None:
    line = tables.event(event, {})
    assert " ".join(line.split()) == f"1970-01-01T00:00:00.000Z {words}"


# ---------------------------------------------------------------------------- doctor, schema


def results(checks: list[dict[str, str]]) -> dict[str, str]:
    return {check["name"]: check["result"] for check in checks}


def test_doctor_on_a_good_node_finds_nothing_to_fail(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    path.write_text("{}")
    good = reply(enforcer=enforcer(ledger=str(path)))
    with responding(run_dir, answering(good)):
        done = powerctl("doctor", "--json", "--socket", run_dir)
        text = powerctl("doctor", "--socket", run_dir)
    checks = json.loads(done.stdout)["checks"]
    assert text.stderr == ""
    assert all(check.keys() == {"name", "result", "seen", "remedy"} for check in checks)
    assert all(bool(check["remedy"]) == (check["result"] != "ok") for check in checks)
    found = results(checks)
    holds = node_checks.sys_admin(Path("/proc"), os.getpid())  # not every test's root does
    assert found.pop("NVML permission") == ("ok" if holds else "fail")
    assert (done.returncode, text.returncode) == ((0, 0) if holds else (1, 1))
    assert "fail" not in found.values()
    for name in ("control.sock", "enforcer", "credentials", "NVML", "watcher", "ledger"):
        assert found[name] == "ok", name
    assert found["GPU 1"] == "warn"  # 540 W enforced below a limit of 600 W
    assert max(map(len, text.stdout.splitlines())) <= 100


def test_doctor_without_an_enforcer_exits_3_and_still_shows_the_rest(run_dir: Path) -> None:
    done = powerctl("doctor", "--json", "--socket", run_dir, "--timeout", "0.05")
    checks = json.loads(done.stdout)["checks"]
    assert done.returncode == 3
    found = results(checks)
    assert found["socket directory"] == found["control.sock"] == found["enforcer"] == "fail"
    assert found["cgroup version"] == "ok"
    for name in ("socket directory", "control.sock"):
        [remedy] = [check["remedy"] for check in checks if check["name"] == name]
        assert "`enforcer process`, below" in remedy
    assert found["enforcer process"] == "fail"


def test_doctor_exits_1_on_a_failure(run_dir: Path) -> None:
    bad = reply(enforcer=enforcer(nvml="absent", nvml_message="no library"))
    with responding(run_dir, answering(bad)):
        done = powerctl("doctor", "--socket", run_dir)
    assert done.returncode == 1
    assert re.search(r"^fail +NVML +absent.*no library\n +remedy: .*driver", done.stdout, re.M)


@pytest.mark.parametrize(
    ("changed", "name", "result", "remedy"),
    [
        ({"enforcer": enforcer(nvml="failing")}, "NVML", "fail", "nvidia-smi"),
        ({"enforcer": enforcer(dry_run=True)}, "dry run", "warn", "POWER_AGENT_DRY_RUN"),
        ({"enforcer": enforcer(paused="hums")}, "brake", "warn", "rm /var/lib/power-agent/pause"),
        ({"enforcer": enforcer(released=["0"])}, "brake", "warn", "begins with a UUID"),
        (
            {"enforcer": enforcer(released=["GPU-0"]), "gpus": [gpu(0, uuid="GPU-0")]},
            "brake",
            "warn",
            "rm /var/lib/power-agent/release",
        ),
        (
            {"enforcer": enforcer(paused="hums", released=["0"])},
            "brake",
            "warn",
            "rm /var/lib/power-agent/pause; each line begins with a UUID",
        ),
        (
            {"enforcer": enforcer(nvml="absent", kubelet="not read yet")},
            "kubelet's assignments",
            "ok",
            "",
        ),
        (
            {"enforcer": enforcer(kubelet="/k: not a checkpoint that is known here: truncated")},
            "kubelet's assignments",
            "warn",
            "the kubelet's version",
        ),
        (
            {"enforcer": enforcer(kubelet="/k: No such file or directory")},
            "kubelet's assignments",
            "warn",
            "mount device-plugins",
        ),
        (
            {
                "enforcer": enforcer(nvml="failing", nvml_message="nvmlInit: UNKNOWN"),
                "gpus": [gpu(0, state="lost", reason="nvmlInit: UNKNOWN")],
            },
            "GPU 0",
            "fail",
            "`NVML`, above",
        ),
        (
            {"counters": Counters(refused_connections=82)},
            "refused messages",
            "warn",
            "counts about ten a second",
        ),
        (
            {
                "gpus": [gpu(0, write_failures={"NO_PERMISSION": 2})],
                "counters": Counters(limit_write_failures=2),
            },
            "NVML permission",
            "fail",
            "SYS_ADMIN",
        ),
        (
            {"watcher": WatcherStatus(connected=False, session="s", revision=1, age_s=90)},
            "watcher",
            "fail",
            "POWER_AGENT_WATCHER_UID",
        ),
        ({"gpus": [gpu(4, state="lost", reason="off the bus")]}, "GPU 4", "fail", "Xid"),
        ({"gpus": [gpu(4, state="held", reason="?")]}, "GPU 4", "fail", "powerctl explain 4"),
        ({"gpus": [gpu(4, enforced_mw=1)]}, "GPU 4", "warn", "the module's"),
        (unread("x: FUNCTION_NOT_FOUND; update the driver"), "process lists", "fail", "update the"),
        (unread("x: NOT_SUPPORTED"), "process lists", "fail", "does not tell its processes"),
        (unread("x: NO_PERMISSION"), "process lists", "fail", "device nodes"),
        (unread("x: UNKNOWN"), "process lists", "fail", "Xid"),
        (unread("x: UNKNOWN"), "unknown owners", "ok", ""),
        ({}, "process lists", "ok", ""),
        (
            {"gpus": [gpu(0, processes=[Process(pid=7, owner="unknown", evidence="0::/../x")])]},
            "unknown owners",
            "warn",
            "held",
        ),
        (
            {
                "gpus": [
                    gpu(
                        0, processes=[Process(pid=7, owner="other", evidence="0::/k/kubepods/podx")]
                    )
                ]
            },
            "other owners",
            "warn",
            "POWER_AGENT_CGROUP_ROOT",
        ),
        (
            {
                "gpus": [
                    gpu(0, processes=[Process(pid=7, owner="other", evidence="0::/system.slice/x")])
                ]
            },
            "other owners",
            "ok",
            "",
        ),
        (
            {
                "gpus": [
                    gpu(
                        0,
                        processes=[
                            Process(pid=7, owner=UID_A, evidence="0::/kubepods/podx/c"),
                            Process(pid=8, owner=UID_A, evidence=LINE_A),
                        ],
                    )
                ]
            },
            "cgroup driver",
            "warn",
            "same cgroup driver",
        ),
        ({"counters": Counters(denied=2)}, "refused messages", "warn", "POWER_AGENT_WATCHER_UID"),
    ],
)
def test_doctor_findings_name_a_remedy(
    changed: dict[str, object], name: str, result: str, remedy: str
) -> None:
    [check] = [c for c in reply_checks.from_reply(reply(**changed)) if c.name == name]
    assert check.result == result
    assert remedy in check.remedy


MISMATCH = "nvmlInit_v2: LIB_RM_VERSION_MISMATCH; the driver was upgraded: restart this pod"


@pytest.mark.parametrize(
    ("state", "message", "result", "remedy"),
    [
        ("ok", "ok", "ok", ""),
        ("ok", "GPU 3: nvmlDeviceGetName: UNKNOWN", "fail", "dmesg (Xid)"),
        ("failing", "nvmlInit_v2: UNKNOWN", "fail", "dmesg (Xid)"),
        ("failing", MISMATCH, "fail", "restart the enforcer's container"),
        ("absent", "nvmlInit_v2: DRIVER_NOT_LOADED", "fail", "install the driver"),
    ],
)
def test_doctor_names_the_remedy_that_fits_what_nvml_says(
    state: str, message: str, result: str, remedy: str
) -> None:
    check = reply_checks.nvml(enforcer(nvml=state, nvml_message=message))
    assert (check.result, message in check.seen) == (result, True)
    assert remedy in check.remedy


def status_file(effective: str) -> str:
    return f"Name:\tpython\nCapPrm:\t000001ffffffffff\nCapEff:\t{effective}\n"


@pytest.mark.parametrize(
    ("effective", "writes", "failures", "result"),
    [
        ("0000000000200000", 0, {}, "ok"),  # what an enforcer keeps
        ("000001ffffffffff", 4, {}, "ok"),
        ("000001ffffdfffff", 0, {}, "fail"),
        ("0000000000000000", 0, {}, "fail"),
        ("0000000000000000", 4, {}, "ok"),  # the driver takes them all the same
        ("0000000000200000", 0, {"NO_PERMISSION": 1}, "fail"),  # of another user namespace
        ("0000000000200000", 4, {"NO_PERMISSION": 1}, "ok"),  # it is over
        (None, 0, {}, "warn"),
        (None, 4, {}, "ok"),
    ],
)
def test_doctor_looks_at_the_enforcers_capability(
    tmp_path: Path, effective: str | None, writes: int, failures: dict[str, int], result: str
) -> None:
    if effective is not None:
        (tmp_path / "50").mkdir()
        (tmp_path / "50/status").write_text(status_file(effective))
    status = reply(counters=Counters(limit_writes=writes), gpus=[gpu(0, write_failures=failures)])
    check = reply_checks.permission(status, node_checks.sys_admin(tmp_path, 50))
    assert check.result == result
    assert result != "fail" or "SYS_ADMIN" in check.remedy


def test_a_listener_that_has_no_pid_here_has_no_capabilities_to_be_seen(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0/status").write_text(status_file("0000000000000000"))
    assert node_checks.sys_admin(tmp_path, 0) is None


@pytest.mark.parametrize(
    ("evidence", "shown"),
    [
        ("0::/kubepods/podx/c", "0::/kubepods/podx/c"),
        ("3:cpu:/a\n2:pids:/a\n1:name=systemd:/b\n0::/\n", "3:cpu:/a; 1:name=systemd:/b"),
        ("3:cpu:/\n0::/\n", "3:cpu:/"),
        ("0::/a:b\n", "0::/a:b"),
        # Names with what Unicode takes for the end of a line make no second line.
        ("0::/podx/a\r0::/pody\n", "0::/podx/a\r0::/pody"),
        ("0::/podx/a\x850::/pody\n", "0::/podx/a\x850::/pody"),
        ("", ""),
    ],
)
def test_cgroup_lines_are_shown_without_repetition(evidence: str, shown: str) -> None:
    assert tables.cgroup_lines(evidence) == shown


def test_doctor_shows_samples_of_lines_that_map_to_no_pod() -> None:
    process = Process(pid=7, owner="unknown", evidence="0::/../../odd")
    checks = reply_checks.from_reply(reply(gpus=[gpu(0, processes=[process] * 9)]))
    [check] = [c for c in checks if c.name == "unknown owners"]
    assert check.seen.startswith("9 on GPUs: pid 7: 0::/../../odd; ")
    assert check.seen.count("pid 7") == 5


SLICE_A = f"kubepods-pod{UID_A.replace('-', '_')}.slice"


@pytest.mark.parametrize(
    ("line", "driver"),
    [
        ("0::/kubepods/burstable/podx/c", "cgroupfs"),
        (LINE_A, "systemd"),
        ("0::/x", "not seen yet"),
        (f"0::/x.service/{SLICE_A}:cri-containerd:3fa9", "cgroupfs under a kubelet on systemd"),
    ],
)
def test_doctor_tells_the_cgroup_driver(line: str, driver: str) -> None:
    process = Process(pid=7, owner=UID_A, evidence=line)
    check = reply_checks.cgroup_driver(reply(gpus=[gpu(0, processes=[process])]))
    assert (check.result, check.seen.startswith(driver)) == ("ok", True)


def proc_root(tmp_path: Path, first: str, namespace: str, own: str = "0::/\n") -> Path:
    for name, text in (("1", first), ("self", own)):
        (tmp_path / name / "ns").mkdir(parents=True)
        (tmp_path / name / "cgroup").write_text(text)
    (tmp_path / "self/ns/pid").symlink_to(namespace)
    return tmp_path


FIRST_NAMESPACE = "pid:[4026531836]"


@pytest.mark.parametrize(
    ("first", "namespace", "pids", "result"),
    [
        ("0::/init.scope\n", FIRST_NAMESPACE, (50, 50), "ok"),
        ("0::/kubepods/podx/c\n", "pid:[4026532999]", (50, 50), "fail"),
        ("3:cpu:/kubepods/podx/c\n0::/\n", "pid:[4026532999]", (50, 50), "fail"),
        ("0::/\n", "pid:[4026532999]", (1, 1), "fail"),
        ("0::/\n", "pid:[4026532999]", (50, 50), "warn"),  # a node inside a container
        ("0::/init.scope\n", FIRST_NAMESPACE, (950, 12), "fail"),  # seen from the host
        ("0::/init.scope\n", FIRST_NAMESPACE, (0, 12), "warn"),
        ("0::/\n", "pid:[4026532999]", (0, 12), "warn"),  # another container
    ],
)
def test_doctor_notices_a_missing_host_pid(
    tmp_path: Path, first: str, namespace: str, pids: tuple[int, int], result: str
) -> None:
    check = node_checks.host_pids(proc_root(tmp_path, first, namespace), *pids)
    assert check.result == result
    assert result != "fail" or "hostPID: true" in check.remedy


@pytest.mark.parametrize(
    ("own", "seen"),
    [
        ("0::/a\n", "v2"),
        ("2:cpu:/a\n1:name=systemd:/a\n", "v1"),
        ("2:cpu:/a\n0::/a\n", "hybrid (v1 and v2)"),
    ],
)
def test_doctor_tells_the_cgroup_version(tmp_path: Path, own: str, seen: str) -> None:
    assert node_checks.cgroup_version(proc_root(tmp_path, "", "x", own)).seen == seen
    assert node_checks.cgroup_version(tmp_path / "none").result == "warn"


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o1777])
def test_doctor_fails_a_directory_that_others_may_write(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    check = node_checks.directory(tmp_path)
    assert (check.result, f"chmod 755 {tmp_path}" in check.remedy) == ("fail", True)
    tmp_path.chmod(0o755)
    assert node_checks.directory(tmp_path).result == ("ok" if os.geteuid() == 0 else "warn")


def test_doctor_fails_a_socket_that_is_none(tmp_path: Path) -> None:
    control_path(tmp_path).write_text("")
    assert [check.result for check in node_checks.sockets(tmp_path)] == ["fail", "fail"]


@pytest.mark.parametrize(
    ("lies_there", "result", "seen"),
    [
        ("      1000\n", "ok", "the loop turned 4 s ago"),
        ("       998\n", "warn", "says 6 s ago"),
        ("      2000\n", "warn", "says -996 s ago"),
        ("soon", "warn", "holds no time"),
        (None, "warn", "No such file or directory"),
    ],
)
def test_doctor_sees_whether_probes_find_the_pulse(
    tmp_path: Path, lies_there: str | None, result: str, seen: str
) -> None:
    if lies_there is not None:
        (tmp_path / "pulse").write_text(lies_there)
    check = node_checks.pulse(tmp_path, 1004.9)
    assert (check.result, seen in check.seen) == (result, True), check.seen


def test_doctor_judges_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    told = reply(enforcer=enforcer(ledger=str(path)))
    idle = reply(enforcer=enforcer(ledger=str(path)), gpus=[gpu(0)])

    def result(status: StatusReply, *, as_root: bool = True) -> str:
        return node_checks.ledger(status, tmp_path / "proc", 50, as_root=as_root).result

    assert result(idle) == "ok"
    assert result(told) == "fail"
    assert result(told, as_root=False) == "ok"
    path.write_text("{")
    assert result(told) == "fail"
    path.write_text("{}")
    assert result(told) == "ok"
    aside = path.with_name("ledger.previous.json.damaged-20260101T000000-7")
    aside.touch()
    warned = node_checks.ledger(told, tmp_path / "proc", 50, as_root=True)
    assert (warned.result, str(aside) in warned.seen) == ("warn", True)
    assert f"rm {aside}" in warned.remedy
    path.unlink()  # its pod has gone, and the GPU stays at its limit
    assert result(idle) == "warn"
    path.write_text("{}")
    aside.unlink()
    faulty = reply(enforcer=enforcer(ledger=str(path), ledger_fault="No space left on device"))
    assert result(faulty) == "fail"
    # The enforcer's own view of its path goes first.
    inside = tmp_path / "proc/50/root" / path.relative_to("/")
    inside.parent.mkdir(parents=True)
    inside.write_text("{")
    assert result(told) == "fail"


def test_schema_is_the_protocol_as_json_schema() -> None:
    done = powerctl("schema", "--json")
    shown = json.loads(done.stdout)
    assert (done.returncode, shown) == (0, messages.schema())
    assert shown["$defs"]["DesiredPod"]["additionalProperties"] is False
    assert len(shown["anyOf"]) == 16


def test_the_worked_example_of_the_protocols_description_works(run_dir: Path) -> None:
    text = (REPOSITORY / "docs" / "protocol.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", example],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            env=environment(POWER_AGENT_RUN_DIR=str(run_dir)),
        )

    with responding(run_dir, answering(reply())) as responder:
        done = run()
        assert (done.returncode, done.stderr) == (0, "")
        assert "GPU 1: managed, 600 W, because asked for\n" in done.stdout
        responder.answer = lambda _request: Error(code="denied", message="not you")
        done = run()
    assert (done.returncode, done.stderr) == (1, "refused, denied: not you\n")


def test_the_protocols_description_names_every_message_and_field() -> None:
    text = (REPOSITORY / "docs" / "protocol.md").read_text()
    schema = messages.schema()
    for definition in (schema["$defs"][d["$ref"].split("/")[-1]] for d in schema["anyOf"]):
        for name in (definition["properties"]["type"]["enum"][0], *definition["properties"]):
            assert f"`{name}`" in text, name
    for code in msgspec.json.schema(messages.ErrorCode)["enum"]:
        assert f"`{code}`" in text


@pytest.mark.parametrize(
    ("changed", "result", "shown"),
    [
        ({}, "warn", "HTTPS_PROXY=http://proxy:3128"),
        ({"https_proxy": "socks5://u:p@lower:1"}, "warn", "https_proxy=socks5://lower:1"),
        ({"HTTPS_PROXY": "", "ALL_PROXY": "all:1"}, "warn", "ALL_PROXY=http://all:1"),
        ({"NO_PROXY": "a,10.0.0.0/8"}, "ok", "does not bear on 10.1.2.3"),
        ({"NO_PROXY": "10.1.2.3"}, "ok", "does not bear on 10.1.2.3"),
        ({"NO_PROXY": "192.168.0.0/16,x"}, "warn", "HTTPS_PROXY"),
        ({"NO_PROXY": "10.1.2.3:443"}, "ok", "does not bear on 10.1.2.3"),
        ({"NO_PROXY": "10.1.2.3", "no_proxy": ""}, "warn", "HTTPS_PROXY"),
        ({"HTTPS_PROXY": "http://u:p://x@h:1"}, "warn", "HTTPS_PROXY=http://h:1"),
        ({"HTTPS_PROXY": "u:p/x@h:1"}, "warn", "HTTPS_PROXY=http://h:1"),
    ],
)
def test_doctor_knows_a_proxy_and_hides_its_password(
    changed: dict[str, str], result: str, shown: str
) -> None:
    set_by_cluster = {"KUBERNETES_SERVICE_HOST": "10.1.2.3", "HTTPS_PROXY": "http://u:p@proxy:3128"}
    (check,) = node_checks.proxy(set_by_cluster | changed)
    assert check.result == result
    assert shown in check.seen
    assert "u:p" not in check.seen
    assert list(node_checks.proxy({"KUBERNETES_SERVICE_HOST": "10.1.2.3"})) == []
    assert list(node_checks.proxy(set_by_cluster | {"https_proxy": ""})) == []


def test_powerctl_loads_neither_nvml_nor_kubernetes_nor_the_enforcer() -> None:
    program = (
        "import sys, shared.powerctl.__main__;"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('pynvml', 'kubernetes', 'enforcer', 'watcher', 'supervisor')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert done.stdout == "[]\n"
