"""The embedded API alone, with a few pods, to be looked at with kubectl."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from . import KubeApi
from .errors import Json


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simnode.kubeapi", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--k8s", default="1.34", help="the version to play")
    parser.add_argument("--node", default="node-a")
    parser.add_argument("--pods", type=int, default=3)
    parser.add_argument("--kubeconfig", type=Path, help="write a kubeconfig there")
    options = parser.parse_args()
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with KubeApi(port=options.port, k8s=options.k8s) as api:

        def finish(pod: Json) -> None:
            metadata = pod["metadata"]
            api.finish_deletion(metadata["namespace"], metadata["name"], uid=metadata["uid"])

        api.deletion_hooks.append(finish)
        for number in range(options.pods):
            api.create_pod(f"worker-{number}", node=options.node, labels={"app": "worker"})
        if options.kubeconfig:
            api.write_kubeconfig(options.kubeconfig)
        print(f"kubectl --server {api.url} get pods", flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
