"""The privileged process, as a checklist: settings, sight, one owner, ledger, socket, run."""

import gc
import os
import sys
from pathlib import Path

from enforcer import privileges, procfs
from enforcer.agent import Agent
from enforcer.ledger import Ledger, LedgerError
from enforcer.server import Server, prepare_directory
from enforcer.settings import EnforcerSettings
from enforcer.signals import StopSignal
from shared import __version__, settings
from shared.logs import Log
from shared.sockets import TransportError

_NAME = "power-agent-enforcer"
_PURPOSE = "Sets the power limits of this node's GPUs as the watcher asks, and gives them back."
_LOCK_RETRY_S = 0.5
_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def main() -> int:
    """Run until SIGTERM or SIGINT; returns the exit status."""
    config = settings.from_command_line(_NAME, _PURPOSE, EnforcerSettings)
    log = Log("enforcer", config.log_level, config.log_format)
    stop = StopSignal()
    try:
        _refuse_token(config, log)
        roots = procfs.cgroup_roots(config.cgroup_root, config.proc_root, config.in_kubernetes)
        ledger = Ledger(config.state_dir, procfs.boot_id(config.proc_root))
        if not ledger.try_lock():
            log.warning("waiting", why=f"another enforcer on this node holds {config.state_dir}")
        while not ledger.try_lock():  # to take it twice is to take it once
            if stop.wait(_LOCK_RETRY_S):
                return 0
        for said in ledger.load():
            log.warning("ledger", why=said)
        prepare_directory(config.run_dir)
        privileges.drop()  # before libzmq starts threads: each has its own capabilities
        procfs.check_sight(config.proc_root)
        server = Server(config.run_dir, {config.watcher_uid, *config.reader_uids, os.geteuid()})
    except (LedgerError, TransportError, procfs.BlindError) as error:
        settings.exit_usage(_NAME, str(error))
    server.watch(stop.fileno())
    agent = Agent(config, log, server, procfs.ProcessReader(config.proc_root, roots), ledger)
    log.info("started", version=__version__, owned=len(ledger.entries), cgroup_roots=roots)
    gc.freeze()  # what is here stays: collections in the loop need not walk it
    while not stop.requested:
        agent.turn()
    agent.stop()
    server.close()
    ledger.close()
    log.info("stopped", on_exit=config.on_exit, still_owned=len(ledger.entries))
    return 0


def _refuse_token(config: EnforcerSettings, log: Log) -> None:
    if config.in_kubernetes and _TOKEN.exists():
        if not config.supervised:
            remedy = "set automountServiceAccountToken: false and mount it into the watcher alone"
            settings.exit_usage(_NAME, f"{_TOKEN} is mounted where none may be: {remedy}")
        log.warning("token_readable", why="one container for both; two keep the token from root")


if __name__ == "__main__":
    sys.exit(main())
