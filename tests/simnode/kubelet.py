"""The kubelet's part in a graceful deletion: hear of it, end the containers, finish it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Self

from tests.simnode.controlplane import ControlPlane
from tests.simnode.controlplane_rest import ApiError, RestClient
from tests.simnode.kubeapi import KubeApi

# namespace, name, uid of a pod that is to end.
EndPod = Callable[[str, str, str], None]
_LOOK_S = 0.2


class Kubelet:
    """The embedded API tells of deletions; a real one is asked again and again."""

    def __init__(self, api: KubeApi | ControlPlane, node: str, end_pod: EndPod) -> None:
        self._api, self._node, self._end_pod = api, node, end_pod
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if isinstance(self._api, KubeApi):
            self._api.deletion_hooks.append(self._told)
        else:
            self._thread = threading.Thread(target=self._ask, args=[self._api], name="kubelet")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _told(self, pod: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        if pod["spec"].get("nodeName") == self._node:
            self._end_pod(metadata["namespace"], metadata["name"], metadata["uid"])

    def _ask(self, api: ControlPlane) -> None:
        with api.rest_client() as rest:
            while not self._stop.wait(_LOOK_S):
                # An outage is what some tests are about; a pod may be finished by somebody else.
                with contextlib.suppress(OSError, ApiError):
                    self._look(rest)

    def _look(self, rest: RestClient) -> None:
        path = f"/api/v1/pods?fieldSelector=spec.nodeName={self._node}"
        for pod in rest.json("GET", path)["items"] or ():
            if "deletionTimestamp" in pod["metadata"]:
                self._told(pod)
