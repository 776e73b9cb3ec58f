"""The simulated node on the command line: `demo` is a tour that checks itself, `up` stays up."""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from enforcer.settings import EnforcerSettings
from shared import __version__
from shared.settings import CommonSettings, SettingsError, parse_settings
from tests.simnode import live, mishaps, tour
from tests.simnode.gpus import MODELS
from tests.simnode.node import SimNode
from tests.simnode.reachable import UnreachableError
from tests.waiting import NotInTimeError
from watcher.settings import WatcherSettings

_PROGRAMS: tuple[type[CommonSettings], ...] = (EnforcerSettings, WatcherSettings)


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.command == "up":
        _checked(parser, arguments)
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
    stay = commands.add_parser(
        "up",
        help="a node that stays up, for kubectl and powerctl",
        epilog=f"faults (of GPU 0 where no other is named):\n{mishaps.listed()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stay.add_argument("--gpus", type=_count, default=4, metavar="N", help="how many (default: 4)")
    stay.add_argument("--model", choices=sorted(MODELS), default="H100", help="default: H100")
    stay.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="a setting of the agent, as POWER_AGENT_DRY_RUN=true; may be given again and again",
    )
    stay.add_argument(
        "--fault",
        action="append",
        default=[],
        type=_fault,
        metavar="NAME[=GPU]",
        help="a fault to play (see below); may be given again and again",
    )
    stay.add_argument(
        "--kubeconfig", type=Path, metavar="FILE", help="write it there; removed at the end"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError("a number from 1 to 64")
    return int(text)


# The node is made of these; another value would only break it.
_FIXED = (
    "NODE_NAME",
    "KUBECONFIG",
    *(
        f"POWER_AGENT_{name}"
        for name in (
            *("RUN_DIR", "STATE_DIR", "KUBELET_DIR", "PROC_ROOT", "SYSFS_ROOT", "CGROUP_ROOT"),
            *("WATCHER_UID", "READER_UIDS"),
        )
    ),
)


def _setting(text: str) -> tuple[str, str]:
    """One variable, as both programs would read it."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if name in _FIXED:
        raise argparse.ArgumentTypeError(f"{name} is the simulated node's own and cannot be set")
    known = [variable for kind in _PROGRAMS for variable in _variables(kind)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "README.md has a table of them"
        raise argparse.ArgumentTypeError(f"{name} is no setting of the agent; {hint}")
    return name, value


def _variables(kind: type[CommonSettings]) -> list[str]:
    return [each.metadata["variable"].name for each in fields(kind)]


def _fault(text: str) -> mishaps.Ordered:
    try:
        return mishaps.ordered(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _checked(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with status 2 where the agent would refuse the settings, or a fault has no GPU."""
    given = dict(arguments.set)
    for kind in _PROGRAMS:
        try:
            parse_settings(kind, {"NODE_NAME": "node-a", **given})
        except SettingsError as error:
            parser.error(f"--set: {error}")
    for fault in arguments.fault:
        if fault.gpu >= arguments.gpus:
            parser.error(f"--fault: there is no GPU {fault.gpu}, only 0 to {arguments.gpus - 1}")


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
    settings = {**tour.SETTINGS, **dict(arguments.set)}
    with SimNode(
        gpus=arguments.gpus, model=arguments.model, supervised=True, start=False, settings=settings
    ) as node:
        kubeconfig = node.kubeconfig
        if arguments.kubeconfig:
            kubeconfig = arguments.kubeconfig.absolute()
            node.guardian.path(kubeconfig)
            node.api.write_kubeconfig(kubeconfig)
        _populate(node)
        _begin(node, arguments.fault)
        tour.introduce(node, paper)
        for fault in arguments.fault:
            paper.say(f"    fault       {fault.name}: {fault.mishap.means}")
        if sys.stdout.isatty():
            live.watch(node, kubeconfig)
        for line in ["", *live.how_to_reach(node, kubeconfig)]:
            paper.say(line)
        signal.pause()
    return 0


def _begin(node: SimNode, faults: list[mishaps.Ordered]) -> None:
    """The agent starts, with what is wrong before and after that."""
    for fault in faults:
        if fault.mishap.early:
            fault.play(node)
    # A watcher that finds no API has nothing to tell.
    node.start(linked=all(fault.name != "api-down-at-start" for fault in faults))
    for fault in faults:
        if not fault.mishap.early:
            fault.play(node)


def _populate(node: SimNode) -> None:
    """A pod on each GPU; the first of them asks for something."""
    for gpu in range(len(node.gpus)):
        limit = None if gpu else node.gpus[0].default_mw // 2000
        pod = node.add_pod(f"worker-{gpu}", limit=limit, gpus=[gpu])
        node.assign(pod, [gpu])


if __name__ == "__main__":
    sys.exit(main())
