"""The simulated node on the command line: `demo` is a tour that checks itself, `up` stays up."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from shared import __version__
from tests.simnode import live, tour
from tests.simnode.gpus import MODELS
from tests.simnode.node import SimNode
from tests.simnode.reachable import UnreachableError
from tests.waiting import NotInTimeError


def main() -> int:
    arguments = _parser().parse_args()
    # As Ctrl-C: a terminal that is closed, and whoever ends this as a service.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    try:
        return demo() if arguments.command == "demo" else up(arguments)
    except KeyboardInterrupt:
        return 0 if arguments.command == "up" else 130
    except (UnreachableError, NotInTimeError) as error:
        print(f"simnode: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simnode", description=__doc__)
    parser.add_argument("--version", action="version", version=f"simnode {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="the main job as a short tour that checks itself")
    stay = commands.add_parser("up", help="a node that stays up, for kubectl and powerctl")
    stay.add_argument("--gpus", type=_count, default=4, metavar="N", help="how many (default: 4)")
    stay.add_argument("--model", choices=sorted(MODELS), default="H100", help="default: H100")
    stay.add_argument(
        "--kubeconfig", type=Path, metavar="FILE", help="write it there; removed at the end"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError("a number from 1 to 64")
    return int(text)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def demo() -> int:
    """0 if all checks held. On a terminal the node stays afterwards."""
    paper = tour.Paper()
    with tour.node_for_tour() as node:
        tour.introduce(node, paper)
        good = tour.Tour(node, paper).run()
        if good and sys.stdin.isatty() and sys.stdout.isatty():
            try:
                paper.say("\nThe live view follows, with pods to play with ...")
                _populate(node)
                node.start()
                time.sleep(3)  # for the reader
                live.watch(node, node.kubeconfig)
            except KeyboardInterrupt:
                paper.say("Ended, nothing is left behind.")
    return 0 if good else 1


def up(arguments: argparse.Namespace) -> int:
    """Until interrupted."""
    if arguments.kubeconfig and arguments.kubeconfig.exists():
        print(f"simnode: {arguments.kubeconfig} exists: name a new file", file=sys.stderr)
        return 2
    paper = tour.Paper()
    with SimNode(
        gpus=arguments.gpus, model=arguments.model, supervised=True, settings=tour.SETTINGS
    ) as node:
        kubeconfig = node.kubeconfig
        if arguments.kubeconfig:
            kubeconfig = arguments.kubeconfig.absolute()
            node.guardian.path(kubeconfig)
            node.api.write_kubeconfig(kubeconfig)
        _populate(node)
        tour.introduce(node, paper)
        if sys.stdout.isatty():
            live.watch(node, kubeconfig)
        for line in ["", *live.how_to_reach(node, kubeconfig)]:
            paper.say(line)
        signal.pause()
    return 0


def _populate(node: SimNode) -> None:
    """A pod on each GPU; the first of them asks for something."""
    for gpu in range(len(node.gpus)):
        limit = None if gpu else node.gpus[0].default_mw // 2000
        node.add_pod(f"worker-{gpu}", limit=limit, gpus=[gpu])


if __name__ == "__main__":
    sys.exit(main())
