"""Tries the real enforcer on real GPUs, as a watcher and a pod's process would use it, and leaves
every GPU as it was found.

It runs in a pod's cgroup: as a Job on a cluster's node (job.yaml), or by `make hardware-test`. What
it asks for is never above the limit that it finds. What was found is on disk before the first
write. A run that was killed is mended by the next one.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import msgspec
import pynvml
from hardware import NO_GPU, Hardware, Holder, ask, listing, no_gpu, table

from enforcer import procfs, sight
from enforcer.device import Board, DeviceError
from enforcer.ledger import Ledger, LedgerError
from enforcer.nvml import Nvml
from enforcer.settings import EnforcerSettings
from shared import messages as m
from shared.client import Client
from shared.settings import SettingsError, parse_settings
from shared.sockets import TransportError

PERMISSION = "POWER_AGENT_MAY_SET_LIMITS"
_WHAT = f"""\
This sets power limits. On each GPU it makes a CUDA context, lets the enforcer lower the limit and
keep it against another writer, kills the enforcer, and has the GPU given back: seconds for each.
It never asks for more than the limit that it finds, and leaves every GPU as found.
To permit that: {PERMISSION}=1"""

FAILED, REFUSED, SIGNALLED = 1, 2, 128  # exit status; NO_GPU is 3
_POLL_S = 0.02
_REST_S = 0.5
_START_S = 90.0  # without persistence mode NVML takes half a minute to open
_STOP_S = 30.0
_TRIES = 6
_LEAST_ROOM_MW = 4_000
# Where this process is killed, the enforcer gets SIGTERM and gives back: PR_SET_PDEATHSIG is 1
# (linux/prctl.h).
_LAUNCH = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)
_ENFORCER = (sys.executable, "-I", "-m", "enforcer")
# Everything else of the agent's settings would change what is tried.
_KEPT = (
    "POWER_AGENT_PROC_ROOT",
    "POWER_AGENT_SYSFS_ROOT",
    "POWER_AGENT_CGROUP_ROOT",
    "POWER_AGENT_EXIT_SECONDS",
)


class RefusedError(Exception):
    """It must not run here; the text says why and what helps."""


class FailedError(Exception):
    """A step did not come out as it must."""


class StoppedError(BaseException):
    """A signal came: nothing but giving back is done any more."""


class Row(NamedTuple):
    """One line of the table."""

    gpu: str
    step: str
    result: str
    detail: str = ""


def _w(limit_mw: int | None) -> str:
    return "an unknown limit" if limit_mw is None else f"{limit_mw / 1000:g} W"


# ---------------------------------------------------------------------- as found


class Record:
    """The limits that were found, on disk until they hold again."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self._path, self._boot_id = path, boot_id

    def read(self) -> dict[str, int]:
        """Return what a run before has left; nothing after a reboot: hardware has forgotten too."""
        try:
            told = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        return dict(told["limits_mw"]) if told["boot_id"] == self._boot_id else {}

    def write(self, limits_mw: Mapping[str, int]) -> None:
        """Return when it is on the disk."""
        text = json.dumps({"format": 1, "boot_id": self._boot_id, "limits_mw": dict(limits_mw)})
        fresh = self._path.with_suffix(".next")
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def changed(gpus: Hardware, found_mw: Mapping[str, int]) -> dict[str, str]:
    """Return the GPUs that are not as found, and how they are."""
    try:
        there = {board.uuid: board for board in gpus.boards().boards}
        limits_mw = {gpu: gpus.read(there[gpu]).limit_mw for gpu in found_mw if gpu in there}
    except DeviceError as error:
        return dict.fromkeys(found_mw, str(error))
    return {
        gpu: f"{_w(limits_mw.get(gpu))} instead of {_w(wanted_mw)}"
        for gpu, wanted_mw in found_mw.items()
        if limits_mw.get(gpu) != wanted_mw
    }


def put_back(nvml: Nvml, gpus: Hardware, found_mw: Mapping[str, int]) -> dict[str, str]:
    """Set what is not as found; return what would not go, after several tries."""
    for attempt in range(_TRIES):
        wrong = changed(gpus, found_mw)
        if not wrong:
            break
        if attempt:
            time.sleep(_REST_S)
        try:
            for board in nvml.boards().boards:
                if board.uuid in wrong:
                    nvml.set_limit(board, found_mw[board.uuid])
        except DeviceError as error:
            sys.stderr.write(f"qualify: {error}\n")
            if error.stale:
                _reopen(nvml)
    return changed(gpus, found_mw)


def _reopen(nvml: Nvml) -> None:
    nvml.close()
    try:
        nvml.open()
    except DeviceError as error:
        sys.stderr.write(f"qualify: {error}\n")


# ---------------------------------------------------------------------- the product


class Enforcer:
    """The real enforcer as a process, and this process as its watcher."""

    def __init__(self, config: EnforcerSettings, state_dir: Path, pod: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="power-agent-qualify-"))
        self.log = self._folder / "log"
        self._environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if name in _KEPT or not name.startswith("POWER_AGENT_")
            },
            "POWER_AGENT_RUN_DIR": str(self._folder / "run"),
            "POWER_AGENT_STATE_DIR": str(state_dir),
            "POWER_AGENT_WATCHER_UID": str(os.geteuid()),
            "POWER_AGENT_RECONCILE_SECONDS": "1",
            "POWER_AGENT_LOG_FORMAT": "json",
        }
        self._config, self._pod = config, pod
        self._client = Client(self._folder / "run")
        self._session, self._revision = uuid.uuid4().hex, 0
        self._limit_mw: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it where it does not run; return when it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCH, *_ENFORCER],
                cwd="/",
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end_s = time.monotonic() + _START_S
        while True:
            try:
                self._client.request(m.Ping(), 1.0)
            except TransportError:
                if self._process.poll() is not None or time.monotonic() > end_s:
                    raise FailedError(
                        f"the enforcer does not answer: {self._last_line()}"
                    ) from None
            else:
                return

    def want(self, limit_mw: int | None) -> m.Report:
        """Say that the pod asks for this, None: that it is gone; return the report on it."""
        if limit_mw != self._limit_mw or not self._revision:
            self._revision += 1
        self._limit_mw = limit_mw
        pods = []
        if limit_mw is not None:
            pods.append(
                m.DesiredPod(
                    uid=self._pod,
                    aliases=[],
                    namespace="default",
                    name="qualify",
                    limit_mw=limit_mw,
                    raw=f"{limit_mw / 1000:g}",
                )
            )
        reply = self._client.request(
            m.Snapshot(
                session=self._session,
                revision=self._revision,
                node="qualify",
                pods=pods,
                others=[],
            ),
            _STOP_S,
        )
        if not isinstance(reply, m.Report):
            raise FailedError(f"the enforcer answers {reply}")
        return reply

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int | None:
        """SIGTERM; returns the exit status, None where it did not run or had to be killed."""
        if self._process is None:
            return None
        self._process.terminate()
        try:
            return self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def close(self) -> bool:
        """Stop it and remove its folder; tells whether it ran to its end, not killed just then."""
        status = self.stop()
        self._client.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return status is not None and status not in (-signal.SIGKILL, -signal.SIGTERM)

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it wrote nothing"


# ---------------------------------------------------------------------- one GPU


@dataclass(frozen=True)
class Limits:
    """What is asked for on one GPU, in milliwatts: never more than it has."""

    found: int
    high: int
    low: int
    least: int

    @staticmethod
    def of(board: Board, found_mw: int | None) -> "Limits":
        """Choose; raises RefusedError where nothing can be lowered."""
        least_mw = board.facts.min_mw
        if found_mw is None or least_mw is None:
            raise RefusedError("it does not tell its limit or its bounds")
        if found_mw - least_mw < _LEAST_ROOM_MW:
            raise RefusedError(f"its limit, {_w(found_mw)}, is at its minimum: nothing to lower")
        high_mw = (least_mw + found_mw) // 2 // 1000 * 1000
        return Limits(found_mw, high_mw, (least_mw + high_mw) // 2, least_mw)


class Trial:
    """The steps on one GPU, in their order."""

    def __init__(
        self, nvml: Nvml, gpus: Hardware, enforcer: Enforcer, board: Board, patience_s: float
    ) -> None:
        self._nvml, self._gpus, self._enforcer = nvml, gpus, enforcer
        self._board, self._patience_s = board, patience_s
        self._limits = Limits.of(board, gpus.read(board).limit_mw)
        self._holder: Holder | None = None

    def run(self, tell: Callable[[Row], None]) -> None:
        """Run the steps up to the first that fails; tell of each."""
        steps = (
            self.acquire, self.change, self.clamp, self.drift, self.kill, self.give_back, self.stop
        )  # fmt: skip
        try:
            for step in steps:
                name = step.__name__.replace("_", " ")
                try:
                    detail = step()
                except (FailedError, DeviceError, TransportError, msgspec.DecodeError) as error:
                    tell(Row(str(self._board.index), name, "FAILED", str(error)))
                    break
                tell(Row(str(self._board.index), name, "ok", detail))
        finally:
            self._let_go()
            self._enforcer.stop()

    def acquire(self) -> str:
        """A process of a pod with a limit opens the GPU."""
        self._enforcer.start()
        self._hold()
        return self._reaches(self._limits.high, self._limits.high)

    def change(self) -> str:
        """The annotation changes."""
        return self._reaches(self._limits.low, self._limits.low)

    def clamp(self) -> str:
        """It asks for less than the board can do. Never for more: that would raise the limit."""
        asked_mw = max(1, self._limits.least - 1000)
        return self._reaches(asked_mw, self._limits.least, "clamped")

    def drift(self) -> str:
        """Another program sets the limit."""
        before = self._enforcer.want(self._limits.least).counters.drifts
        self._nvml.set_limit(self._board, self._limits.high)
        detail = self._reaches(self._limits.least, self._limits.least)
        if self._enforcer.want(self._limits.least).counters.drifts == before:
            raise FailedError("the limit is right again, but no drift was counted")
        return f"set to {_w(self._limits.high)} by another writer, {detail}"

    def kill(self) -> str:
        """kill -9, and a new start: the limit holds, and what was found is not forgotten."""
        self._enforcer.kill()
        if self._gpus.read(self._board).limit_mw != self._limits.least:
            raise FailedError("the limit changed when the enforcer was killed")
        self._enforcer.start()
        detail = self._reaches(self._limits.low, self._limits.low)
        report = self._enforcer.want(self._limits.low)
        (gpu,) = (each for each in report.gpus if each.uuid == self._board.uuid)
        if gpu.original_mw != self._limits.found:
            raise FailedError(f"{_w(gpu.original_mw)} is remembered, {_w(self._limits.found)} was")
        return detail

    def give_back(self) -> str:
        """The pod is gone and its process with it."""
        self._let_go()
        return self._reaches(None, self._limits.found)

    def stop(self) -> str:
        """SIGTERM while the GPU is owned."""
        self._hold()
        self._reaches(self._limits.high, self._limits.high)
        status = self._enforcer.stop()
        limit_mw = self._gpus.read(self._board).limit_mw
        if status != 0 or limit_mw != self._limits.found:
            raise FailedError(f"exit status {status}, {_w(limit_mw)} left")
        return f"{_w(limit_mw)} after its end"

    def _hold(self) -> None:
        self._holder = Holder(self._board.uuid)
        if not self._holder.ready():
            raise FailedError(self._holder.why)

    def _let_go(self) -> None:
        if self._holder is not None:
            self._holder.end()
            self._holder = None

    def _reaches(self, asked_mw: int | None, wanted_mw: int, state: str = "enforced") -> str:
        """Ask, and again, until the hardware has the limit and the enforcer says so."""
        began_s = time.monotonic()
        while True:
            report = self._enforcer.want(asked_mw)
            limit_mw = self._gpus.read(self._board).limit_mw
            after_ms = (time.monotonic() - began_s) * 1000
            states = [pod.state for pod in report.pods]
            if limit_mw == wanted_mw and states == ([] if asked_mw is None else [state]):
                return f"{_w(limit_mw)} after {after_ms:.0f} ms"
            if after_ms > self._patience_s * 1000:
                raise FailedError(f"{_w(limit_mw)}, not {_w(wanted_mw)}: {self._reason(report)}")
            time.sleep(_POLL_S)

    def _reason(self, report: m.Report) -> str:
        said = [f"{pod.state}, {pod.reason}" for pod in report.pods]
        said += [f"GPU {each.state}, {each.reason}" for each in report.gpus
                 if each.uuid == self._board.uuid]  # fmt: skip
        return "; ".join(said) or report.nvml_message


# ---------------------------------------------------------------------- the run


class Run:
    """Everything that is tried, between finding the GPUs and leaving them as found."""

    def __init__(self, config: EnforcerSettings, chosen: argparse.Namespace) -> None:
        """Look around; raises RefusedError or DeviceError before anything is touched."""
        self._config, self._chosen = config, chosen
        self.rows: list[Row] = []
        reader, self._pod = _own_pod(config)
        self._ledger = _only_owner(config)
        self._nvml = Nvml()
        self._nvml.open()
        self._gpus = Hardware(self._nvml, reader)
        listing(self._gpus)
        self._folder = config.state_dir / "qualify"
        self._record = Record(self._folder / "found.json", procfs.boot_id(config.proc_root))

    def tell(self, row: Row) -> None:
        """Keep a row for the table, and show it now."""
        self.rows.append(row)
        sys.stderr.write(f"GPU {row.gpu}: {row.step}: {row.result} {row.detail}\n")

    def everything(self) -> None:
        """Try all GPUs, in turn; whatever ends it, they are as found then."""
        self._mend()
        boards = [each for each in self._chosen_boards() if self._may(each)]
        found_mw = {each.uuid: Limits.of(each, self._limit_mw(each)).found for each in boards}
        if not boards:
            return
        self._record.write(found_mw)
        enforcer = Enforcer(self._config, self._folder / "ledger", self._pod)
        try:
            try:
                for board in boards:
                    trial = Trial(self._nvml, self._gpus, enforcer, board, self._chosen.patience)
                    trial.run(self.tell)
            finally:
                _no_more_signals()  # one that comes just now still ends in the block below
        finally:
            self._leave(found_mw, enforcer.close())

    def _limit_mw(self, board: Board) -> int | None:
        return self._gpus.read(board).limit_mw

    def _mend(self) -> None:
        """Put back what a run that was killed has left."""
        before_mw = self._record.read()
        for gpu, wrong in changed(self._gpus, before_mw).items():
            self.tell(Row("-", "run before", "put back", f"{gpu}: {wrong}"))
        if left := put_back(self._nvml, self._gpus, before_mw):
            raise RefusedError(f"what a run before has left cannot be put back: {left}")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700, parents=True)

    def _chosen_boards(self) -> Sequence[Board]:
        there = listing(self._gpus)
        for fault in there.faults:
            self.tell(Row("-", "list", "FAILED", fault))
        wanted = self._chosen.gpu or _given_to_this_pod(self._config, len(there.boards))
        strange = set(wanted or ()) - {board.uuid for board in there.boards}
        if strange:
            raise RefusedError(f"no such GPU is listed: {', '.join(sorted(strange))}")
        return [board for board in there.boards if not wanted or board.uuid in wanted]

    def _may(self, board: Board) -> bool:
        """Tell whether a GPU can be tried and disturbs nobody."""
        try:
            Limits.of(board, self._limit_mw(board))
            self._is_unused(board)
        except (RefusedError, DeviceError) as error:
            self.tell(Row(str(board.index), "-", "skipped", str(error)))
            return False
        return True

    def _is_unused(self, board: Board) -> None:
        mig = ask(pynvml.nvmlDeviceGetMigMode, board.handle)
        if mig and mig[0]:
            raise RefusedError("MIG is on: its limit is that of others too")
        sighting = self._gpus.look(board)
        if sighting.occupants is None:
            raise RefusedError(f"who uses it cannot be told: {sighting.why}")
        if sighting.occupants and not self._chosen.shared:
            pids = ", ".join(str(each.pid) for each in sighting.occupants)
            raise RefusedError(f"others use it (process {pids}): end them, or allow it by --shared")

    def _leave(self, found_mw: Mapping[str, int], product_ended: bool) -> None:
        """Compare, and put back what the product has not: its fault where it came to its end."""
        wrong = changed(self._gpus, found_mw)
        left = put_back(self._nvml, self._gpus, found_mw) if wrong else {}
        for gpu, found in found_mw.items():
            if gpu in left:
                self.tell(Row("-", "as found", "FAILED", f"{gpu}: {left[gpu]}: run this again"))
            elif gpu in wrong:
                result = "FAILED" if product_ended else "ok"
                self.tell(Row("-", "as found", result, f"{gpu}: put back by this test"))
            else:
                self.tell(Row("-", "as found", "ok", f"{gpu}: {_w(found)}"))
        if not left:
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Let go of the driver and the node's lock."""
        self._nvml.close()
        self._ledger.close()

    def status(self) -> int:
        """Return 0 where every step of at least one GPU was right, and none was wrong."""
        results = {row.result for row in self.rows}
        return 0 if "ok" in results and "FAILED" not in results else FAILED


def _own_pod(config: EnforcerSettings) -> tuple[procfs.ProcessReader, str]:
    """Return what reads processes, and the pod that this process is of."""
    try:
        roots = sight.cgroup_roots(config.cgroup_root, config.proc_root, config.in_kubernetes)
    except sight.BlindError as error:
        raise RefusedError(str(error)) from error
    reader = procfs.ProcessReader(config.proc_root, roots)
    owner, evidence, _ = reader.owner(os.getpid(), procfs.now_ticks())
    if not isinstance(owner, str):
        why = f"this process is in no pod's cgroup ({evidence.splitlines()[-1]})"
        raise RefusedError(f"{why}: use `make hardware-test` or deploy/qualify/job.yaml")
    return reader, owner


def _only_owner(config: EnforcerSettings) -> Ledger:
    """Take the node's lock, which each enforcer takes: one that starts meanwhile waits."""
    try:
        ledger = Ledger(config.state_dir, procfs.boot_id(config.proc_root))
    except LedgerError as error:
        raise RefusedError(str(error)) from error
    if not ledger.try_lock():
        why = f"a Power Agent runs on this node and holds {config.state_dir}"
        raise RefusedError(f"{why}: keep it off the node meanwhile, or annotate a pod to try it")
    return ledger


def _given_to_this_pod(config: EnforcerSettings, boards: int) -> list[str] | None:
    """Return the GPUs that the device plugin gave; None outside a cluster: all."""
    if not config.in_kubernetes:
        return None
    given = os.environ.get("NVIDIA_VISIBLE_DEVICES", "").split(",")
    if all(each.startswith("GPU-") for each in given):
        return given
    if boards > 1:
        raise RefusedError("which of the GPUs is this pod's cannot be told: name it by --gpu UUID")
    return None


def _no_more_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    _no_more_signals()
    raise StoppedError(number)


def main() -> int:
    """Try everything, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="qualify", description=__doc__)
    parser.add_argument("--gpu", action="append", metavar="UUID", help="only this one; again: more")
    parser.add_argument("--shared", action="store_true", help="also where others use the GPU")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds for each step")
    chosen = parser.parse_args()
    if os.environ.get(PERMISSION) != "1":
        sys.stderr.write(f"{_WHAT}\n")
        return REFUSED
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        run = Run(parse_settings(EnforcerSettings, os.environ), chosen)
    except (SettingsError, RefusedError) as error:
        sys.stderr.write(f"qualify: {error}\n")
        return REFUSED
    except DeviceError as error:
        sys.stderr.write(f"qualify: {no_gpu(error)}\n")
        return NO_GPU
    except StoppedError as stop:
        return SIGNALLED + int(stop.args[0])
    return _finish(run)


def _finish(run: Run) -> int:
    status = None
    try:
        run.everything()
    except StoppedError as stop:
        status = SIGNALLED + int(stop.args[0])
    except (RefusedError, DeviceError) as error:
        run.tell(Row("-", "-", "FAILED", str(error)))
    run.close()
    print(table([("GPU", "step", "result", ""), *run.rows]))
    return run.status() if status is None else status


if __name__ == "__main__":
    sys.exit(main())
