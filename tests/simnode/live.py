"""The live view of a simulated node: powerctl's tables, and how to reach the node."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

from shared.powerctl import tables
from shared.powerctl.ask import UnreachableError
from shared.powerctl.live import screen
from tests.simnode.node import ANNOTATION, SimNode

_REFRESH_S = 1.0
_PAINT = re.compile(r"\x1b\[[0-9;]*m")


def how_to_reach(node: SimNode, kubeconfig: Path) -> list[str]:
    """Commands for a second terminal, from any folder."""
    pod = next((name for _, name in sorted(node.pods)), "POD")
    kubectl = f"{_kubectl()} --kubeconfig {shlex.quote(str(kubeconfig))}"
    powerctl = shlex.quote(str(Path(sys.executable).with_name("powerctl")))
    return [
        f"{kubectl} get pods",
        f"{kubectl} annotate pod {pod} {ANNOTATION}=300 --overwrite",
        f"{kubectl} delete pod {pod}",
        f"{powerctl} explain default/{pod} --socket {node.run_dir}",
        f"{powerctl} events --socket {node.run_dir}",
    ]


def _kubectl() -> str:
    """The one beside the real API server where the shell has none."""
    beside = Path(os.environ.get("KUBEBUILDER_ASSETS") or "/nonexistent") / "kubectl"
    return (
        shlex.quote(str(beside)) if beside.exists() and not shutil.which("kubectl") else "kubectl"
    )


def _fitting(lines: list[str], hints: list[str]) -> list[str]:
    """As many of the lines as leave room for the hints, which must not be cut."""
    size = shutil.get_terminal_size()

    def rows(line: str) -> int:
        return max(1, -(-len(_PAINT.sub("", line)) // size.columns))

    left = size.lines - 1 - sum(map(rows, hints))
    fitting = []
    for line in lines:
        left -= rows(line)
        if left < 0:
            break
        fitting.append(line)
    return fitting


def watch(node: SimNode, kubeconfig: Path) -> None:
    """The table, refreshed each second, until interrupted."""
    paint = tables.plain if "NO_COLOR" in os.environ else tables.coloured
    with screen():
        while True:
            hints = ["", "From a second terminal (Ctrl-C here ends everything):", ""]
            hints += [f"  {line}" for line in how_to_reach(node, kubeconfig)]
            try:
                lines = tables.status(node.status(2.0), paint)
            except UnreachableError as error:
                lines = [f"the enforcer does not answer: {error}"]
            shown = [*_fitting(lines, hints), *hints]
            text = "".join(f"{line}\x1b[K\r\n" for line in shown)
            sys.stdout.write(f"\x1b[H{text}\x1b[J")
            sys.stdout.flush()
            time.sleep(_REFRESH_S)
