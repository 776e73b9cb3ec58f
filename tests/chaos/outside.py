"""Sees a simulated node as an outsider does: hardware, processes and pods, never the agent's word.

Its own reading of processes, cgroups and annotations, so that a mistake of the agent's parsers is
not repeated here.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Set
from decimal import Decimal
from pathlib import Path
from typing import Any

from tests.chaos.witness import Board, View, Witness, expected_mw
from tests.simnode.kubeapi import KubeApi
from tests.simnode.node import ANNOTATION, CONFIG_HASH, SimNode
from tests.waiting import until

LOW_W, HIGH_W = 250, 600  # the administrator's, so that limits as found lie outside
BOUNDS = {"POWER_AGENT_MIN_WATTS": f"{LOW_W}", "POWER_AGENT_MAX_WATTS": f"{HIGH_W}"}
_FOUND_MW = 650_000
_POLL_S = 0.002


class Outside:
    """One node, seen from outside; `witness` keeps what was seen."""

    def __init__(self, node: SimNode) -> None:
        self.node, self.names = node, set[tuple[str, str]]()
        for number, gpu in enumerate(node.gpus):
            gpu.limit_mw = _FOUND_MW + number * 1000  # distinct, and asked for by nobody
        self.boards = [
            Board(gpu.uuid, LOW_W * 1000, HIGH_W * 1000, gpu.limit_mw) for gpu in node.gpus
        ]
        self.witness = Witness(self.boards)
        self._folders = {gpu.uuid: gpu.folder for gpu in node.gpus}
        self.calm, self.ending = True, False
        self.lock = threading.RLock()  # held while something is done between two looks

    # -- looking --

    def look(self) -> View:
        """Note what is to be seen now."""
        with self.lock:
            asks, ids = self._pods()
            on = {board.uuid: self._users(board.uuid, ids) for board in self.boards}
            view = View(time.monotonic_ns(), on, asks, self.ending, self.calm)
            self.witness.see(view)
            return view

    def only(self, kept: Set[tuple[str, str]]) -> bool:
        """Whether the API has none but these pods, after one more look."""
        self.look()
        assert isinstance(self.node.api, KubeApi)
        return not any(self.node.api.get_pod(*key) for key in self.names - kept)

    def _pods(self) -> tuple[dict[str, int | None], dict[str, str]]:
        """What each annotated pod asks, and the pod that each id in a cgroup means."""
        asks: dict[str, int | None] = {}
        ids: dict[str, str] = {}
        assert isinstance(self.node.api, KubeApi)
        for namespace, name in list(self.names):
            pod = self.node.api.get_pod(namespace, name)
            if pod is None:
                continue
            metadata = pod["metadata"]
            annotations, uid = metadata.get("annotations") or {}, metadata["uid"]
            ids[uid] = uid
            if any(owner["kind"] == "Node" for owner in metadata.get("ownerReferences") or ()):
                ids[annotations.get(CONFIG_HASH, uid)] = uid
            if ANNOTATION in annotations:
                asks[uid] = _milliwatts(annotations[ANNOTATION])
        return asks, ids

    def _users(self, uuid: str, ids: dict[str, str]) -> frozenset[str]:
        found = set()
        for kind in ("compute", "graphics", "mps"):
            for line in _text(self._folders[uuid] / kind).splitlines():
                cgroup = _text(self.node.place.proc_root / line.split()[0] / "cgroup")
                root = re.escape(self.node.place.cgroup_root)
                match = re.search(rf"^0::{root}/kubepods/[^:]*?pod([0-9a-f-]+)/", cgroup, re.M)
                if match:
                    found.add(ids.get(match[1], match[1]))
        return frozenset(found)

    def kill(self, program: str) -> None:
        """kill -9; where it is supervisord, its programs may yet hear SIGTERM: launch.py sees to
        that by PR_SET_PDEATHSIG, since outside a container nothing else ends them."""
        self.ending = program == "supervisord"
        self.look()
        try:
            self.node.kill(program)
        finally:
            self.look()
            self.ending = False

    # -- judging --

    def wrong(self) -> list[str]:
        """Every set that should not have been, since this was last asked."""
        return self.witness.judge(self.node.gpus.sets())

    def lost(self) -> list[str]:
        """I2: GPUs whose limit differs from the one found, which no ledger knows."""
        return [str(board) for board in self.boards if self._is_lost(board)]

    def _is_lost(self, board: Board) -> bool:
        for _ in range(5):  # limit and ledger cannot be read at one instant
            if self._limit_mw(board) == board.found_mw:
                return False
            if self.owned().get(board.uuid) == board.found_mw:
                return False
        return True

    def _limit_mw(self, board: Board) -> int:
        return int(_text(self._folders[board.uuid] / "limit_mw"))

    def owned(self) -> dict[str, int]:
        """Originals by UUID, from the ledger on disk, which is whole at every instant."""
        text = _text(self.node.state_dir / "ledger.json")
        book: dict[str, Any] = json.loads(text) if text else {"gpus": {}}
        return {uuid: entry["original_mw"] for uuid, entry in book["gpus"].items()}

    def unsettled(self, view: View) -> list[str]:
        """What is not as it is to be once all has settled: limits and ledger."""
        owned, amiss = self.owned(), []
        for board in self.boards:
            want_mw, has_mw = expected_mw(board, view), self._limit_mw(board)
            if want_mw != has_mw:
                amiss.append(f"{board.uuid} has {has_mw}, is to have {want_mw}")
            elif owned.get(board.uuid) != (None if want_mw == board.found_mw else board.found_mw):
                amiss.append(f"{board.uuid} at {has_mw}: ledger {owned.get(board.uuid)}")
        return amiss

    def wait_until_settled(self, view: View, deadline_s: float) -> None:
        """Until all is as it is to be; raises NotInTimeError with what is not."""

        def settled() -> bool:
            assert not self.lost()
            return not self.unsettled(view)

        def explain() -> str:
            seen = f"ledger: {self.owned()}\nthen: {view}\nnow: {self.look()}"
            return f"{self.unsettled(view)}\n{seen}\n{self.node.explain()}"

        until(settled, "all settled", deadline_s=deadline_s, poll_s=_POLL_S, explain=explain)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _milliwatts(annotation: str) -> int | None:
    if not re.fullmatch(r"[ \t]*[0-9]{1,6}(\.[0-9]{1,3})?[ \t]*", annotation):
        return None
    limit_mw = int(Decimal(annotation.strip()) * 1000)
    return limit_mw if 0 < limit_mw <= 100_000_000 else None
