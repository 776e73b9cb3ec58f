"""The live view of a simulated node: powerctl's tables, and how to reach the node."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

from shared.powerctl.ask import UnreachableError
from shared.powerctl.layout import coloured, plain, terminal_width, wrapped
from shared.powerctl.live import screen
from shared.powerctl.overview import status
from tests.simnode.node import ANNOTATION, SimNode

_REFRESH_S = 1.0
_PAINT = re.compile(r"\x1b\[[0-9;]*m")


def how_to_reach(node: SimNode, kubeconfig: Path) -> list[str]:
    """Lines for a second terminal, from any folder: what to export once, and commands."""
    pod = next((name for _, name in sorted(node.pods)), "POD")
    programs = [str(Path(sys.executable).parent), *_kubectl_folder()]
    metrics = node.metrics_url
    return [
        f"export PATH={shlex.quote(':'.join(programs))}:$PATH",
        f"export KUBECONFIG={shlex.quote(str(kubeconfig))}",
        f"export POWER_AGENT_RUN_DIR={shlex.quote(str(node.run_dir))}",
        *_no_kubectl(programs),
        "kubectl get pods",
        f"kubectl annotate pod {pod} {ANNOTATION}=300 --overwrite",
        f"kubectl delete pod {pod}",
        *([f"curl -s {metrics}"] if metrics else ["# metrics: off"]),
        f"tail -n 5 {shlex.quote(str(node.log_file))}",
        "powerctl status",
        f"powerctl explain default/{pod}",
        "powerctl events",
    ]


def _kubectl_folder() -> list[str]:
    """That of the real API server, where the shell has no kubectl of its own."""
    assets = Path(os.environ.get("KUBEBUILDER_ASSETS") or "/nonexistent")
    found = (assets / "kubectl").exists() and not shutil.which("kubectl")
    return [str(assets)] if found else []


def _no_kubectl(folders: list[str]) -> list[str]:
    """A remark, where the commands that follow would not be found."""
    if any(shutil.which("kubectl", path=path) for path in (None, *folders)):
        return []
    return ["# there is no kubectl here; `make kube-assets` builds one and prints its folder"]


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
    paint = plain if "NO_COLOR" in os.environ else coloured
    with screen():
        while True:
            hints = ["", "From a second terminal (Ctrl-C here ends everything):", ""]
            hints += [f"  {line}" for line in how_to_reach(node, kubeconfig)]
            try:
                lines = status(node.status(2.0), paint, terminal_width())
            except UnreachableError as error:
                lines = wrapped(f"the enforcer does not answer: {error}", terminal_width())
            text = "".join(f"\x1b[K{line}\r\n" for line in [*_fitting(lines, hints), *hints])
            # The terminal wraps what is too wide, so that a command is copied whole.
            sys.stdout.write(f"\x1b[?7h\x1b[H{text}\x1b[J")
            sys.stdout.flush()
            time.sleep(_REFRESH_S)
