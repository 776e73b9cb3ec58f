"""The privileged process, as a checklist: settings, sight, one owner, ledger, socket, run.

It makes what the loop is given, NVML included, and holds no rule.
"""

import gc
import os
import sys
from pathlib import Path

from enforcer import privileges, procfs, report, sight
from enforcer.agent import Agent, World
from enforcer.bus import Bus
from enforcer.clock import SystemClock
from enforcer.kubelet import Kubelet
from enforcer.ledger import Ledger, LedgerError, UnreadableError
from enforcer.nvml import Nvml
from enforcer.processes import Processes
from enforcer.pulse import Pulse
from enforcer.server import Server, connections_for, prepare_directory
from enforcer.settings import EnforcerSettings
from enforcer.signals import StopSignal
from enforcer.sources import Joined, Source
from shared import __version__, settings
from shared.logs import Log
from shared.sockets import TransportError
from shared.units import watts

_NAME = "power-agent-enforcer"
_PURPOSE = "Sets the power limits of this node's GPUs as the watcher asks, and gives them back."
_RETRY_S = 0.5
_UNTOUCHED = "limits stay as they are; nothing is touched and nobody is answered meanwhile"
_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def main() -> int:
    """Run until SIGTERM or SIGINT; returns the exit status."""
    config = settings.from_command_line(_NAME, _PURPOSE, EnforcerSettings)
    log = Log("enforcer", config.log_level, config.log_format)
    stop = StopSignal()
    pulse = Pulse(config.run_dir)
    try:
        roots = _look_around(config, log)
        ledger = Ledger(config.state_dir, procfs.boot_id(config.proc_root))
        if not (_lock(ledger, config, log, stop) and _load(ledger, log, stop)):
            return 0
        server = _listen(config, log, stop)
    except (LedgerError, TransportError, sight.BlindError, privileges.DropError) as error:
        settings.exit_usage(_NAME, str(error))
    nvml = Nvml()
    source: Source = Processes(nvml, procfs.ProcessReader(config.proc_root, roots))
    kubelet = None
    if config.kubelet_dir is not None:
        kubelet = Kubelet(config.kubelet_dir, config.kubelet_resources, log, nvml.whole_of)
        source = Joined(source, kubelet)
    world = World(server, nvml, source, Bus(config.sysfs_root), SystemClock(), kubelet)
    agent = Agent(config, log, world, ledger, report.about(config, roots, ledger.path))
    _say_started(log, agent, len(ledger.entries), roots)
    gc.freeze()  # what is here stays: collections in the loop need not walk it
    while not (stop.requested or agent.hopeless):
        agent.turn()
        pulse.beat()
    why = None if stop.requested else agent.hopeless
    if why is None:
        agent.stop()
    server.close()
    ledger.close()
    return _say_the_end(log, config, why, ledger)


def _say_started(log: Log, agent: Agent, owned: int, roots: tuple[str, ...]) -> None:
    """Say what this start works by, and look around: to open NVML may take half a minute."""
    opening = "it may take half a minute, and nobody is answered meanwhile"
    log.info("nvml", state="opening", why=opening, version=__version__)
    for line in settings.unread_here(EnforcerSettings):
        log.warning("setting_unknown", why=line)
    log.info(
        "started",
        version=__version__,
        gpus=agent.begin(),
        owned=owned,
        cgroup_roots=roots,
        settings=settings.effective(EnforcerSettings),
    )


def _say_the_end(log: Log, config: EnforcerSettings, why: str | None, ledger: Ledger) -> int:
    """Say that this is the end, in order or because of `why`; return the exit status."""
    values: dict[str, object] = {"still_owned": len(ledger.entries)}
    if ledger.entries:
        values["watts"] = {uuid: watts(owned.set_mw) for uuid, owned in ledger.entries.items()}
        values["holds"] = "these limits stay in force; the next start goes on with them"
    if why is None:
        say = log.warning if ledger.entries and config.on_exit == "restore" else log.info
        say("stopped", on_exit=config.on_exit, **values)
        return 0
    log.error("ended", why=why, **values)
    sys.stderr.write(f"{_NAME}: {why}\n")
    return 1


def _look_around(config: EnforcerSettings, log: Log) -> tuple[str, ...]:
    """See that this is the host's view; return the cgroups that may hold pods."""
    _refuse_token(config, log)
    return sight.cgroup_roots(config.cgroup_root, config.proc_root, config.in_kubernetes)


def _listen(config: EnforcerSettings, log: Log, stop: StopSignal) -> Server:
    """Give up power, then listen to those who may ask."""
    prepare_directory(config.run_dir)
    # Before libzmq starts threads: each has its own capabilities.
    connections = _connections(privileges.drop(), log)
    sight.check_sight(config.proc_root)
    uids = {config.watcher_uid, *config.reader_uids, os.geteuid()}
    server = Server(config.run_dir, uids, connections)
    server.watch(stop.fileno())
    return server


def _connections(descriptors: int, log: Log) -> int:
    """Return how many connections a socket may have; says so where files are too few for them."""
    connections, wanted = connections_for(descriptors), privileges.DESCRIPTORS
    if descriptors < wanted:
        why = f"the hard limit of open files is {descriptors}, below the {wanted} wanted"
        risk = f"at most {connections} connections a socket, and a flood of them may end this"
        remedy = "raise LimitNOFILE of the container runtime's service"
        log.warning("few_files", why=f"{why}: {risk}; {remedy}")
    return connections


def _lock(ledger: Ledger, config: EnforcerSettings, log: Log, stop: StopSignal) -> bool:
    """Wait for the node's lock; tells whether it is held: else a stop was requested."""
    if not ledger.try_lock():
        why = f"another enforcer on this node holds {config.state_dir}"
        log.warning("waiting", why=why, holds=_UNTOUCHED, next_try_s=_RETRY_S)
    while not ledger.try_lock():  # to call it again while it is held is harmless
        if stop.wait(_RETRY_S):
            return False
    return True


def _load(ledger: Ledger, log: Log, stop: StopSignal) -> bool:
    """Read the ledger, again and again where it cannot be read; False where a stop came first.

    Nothing is known of the GPUs meanwhile, so nothing is done to them (I5).
    """
    said = ""
    while True:
        try:
            for line in ledger.load():
                log.warning("ledger", why=line)
        except UnreadableError as error:
            if str(error) != said:
                said = str(error)
                log.error("ledger", why=said, holds=_UNTOUCHED, next_try_s=_RETRY_S)
        else:
            return True
        if stop.wait(_RETRY_S):
            return False


def _refuse_token(config: EnforcerSettings, log: Log) -> None:
    if config.in_kubernetes and _TOKEN.exists():
        if not config.supervised:
            remedy = "set automountServiceAccountToken: false and mount it into the watcher alone"
            settings.exit_usage(_NAME, f"{_TOKEN} is mounted where none may be: {remedy}")
        log.warning("token_readable", why="one container for both; two keep the token from root")


if __name__ == "__main__":
    sys.exit(main())
