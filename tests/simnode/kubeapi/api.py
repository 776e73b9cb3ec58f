"""KubeApi: the embedded Kubernetes API as a test holds it, with every fault a test can ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from . import pods
from .access import Access
from .discovery import parse_version
from .errors import Json
from .kubeconfig import write_kubeconfig
from .operations import DeletionHook, Target
from .resources import RESOURCES
from .server import Context, Listener, bind
from .store import Store
from .traffic import Request
from .watch import Order

_PODS = RESOURCES["pods"]
_NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")


class KubeApi:
    """Serves from construction until `stop`, or as a context manager."""

    def __init__(
        self,
        *,
        port: int = 0,
        k8s: str = "1.34",
        bookmark_interval_s: float = 60.0,
        history: int = 1000,
        tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`tokens`: bearer token -> user name; None: nobody is asked who he is."""
        self._store = Store(history)
        self._context = Context(
            self._store, Access(tokens), parse_version(k8s), bookmark_interval_s
        )
        for namespace in _NAMESPACES:
            self._context.operations.ensure("namespaces", pods.new_namespace(namespace))
        bound = bind(port)
        self.port: int = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._reserved = bind(self.port)
        self._listener: Listener | None = Listener(bound, self._context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.clear_faults()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._reserved.close()

    def write_kubeconfig(
        self,
        path: str | Path,
        token: str | None = None,
        *,
        token_file: str | Path | None = None,
        user: str = "test",
    ) -> Path:
        """`token_file` is read again by the client: what a rotation test needs."""
        path = Path(path)
        file = None if token_file is None else Path(token_file)
        write_kubeconfig(path, self.url, token=token, token_file=file, user=user)
        return path

    # ------------------------------------------------------------------------ objects

    @property
    def resource_version(self) -> int:
        return self._store.version

    @property
    def deletion_hooks(self) -> list[DeletionHook]:
        """Called with the pod, on a thread of their own, when a graceful deletion begins. The
        kubelet's part: end the containers, then call `finish_deletion`."""
        return self._context.operations.deletion_hooks

    def create_node(self, name: str) -> None:
        """No matter if it is there."""
        self._context.operations.ensure("nodes", pods.new_node(name))

    def create_namespace(self, name: str) -> None:
        """No matter if it is there."""
        self._context.operations.ensure("namespaces", pods.new_namespace(name))

    def create_pod(
        self,
        name: str,
        *,
        node: str,
        namespace: str = "default",
        annotations: Mapping[str, str] | None = None,
        uid: str | None = None,
        phase: str = "Running",
        owner: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Json:
        """A pod bound to `node`; node and namespace are made where missing. `owner` is an
        ownerReference, of which kind and name are enough."""
        self.create_node(node)
        self.create_namespace(namespace)
        pod = pods.new_pod(
            name,
            namespace,
            node,
            uid=uid,
            annotations=annotations,
            labels=labels,
            owner=owner,
        )
        pods.check(_PODS, pod)
        return self._context.operations.insert(_PODS, pods.in_phase(pod, phase))

    def get_pod(self, namespace: str, name: str) -> Json | None:
        return self._store.get(("pods", namespace, name))

    def annotate(self, namespace: str, name: str, key: str, value: str | None) -> None:
        """None removes the annotation."""

        def changed(pod: Json) -> Json:
            annotations = dict(pod["metadata"].get("annotations") or {})
            annotations.pop(key, None)
            if value is not None:
                annotations[key] = value
            return {**pod, "metadata": {**pod["metadata"], "annotations": annotations}}

        self._context.operations.modify(Target(_PODS, namespace, name), changed)

    def set_phase(self, namespace: str, name: str, phase: str) -> None:
        target = Target(_PODS, namespace, name, "status")
        self._context.operations.modify(target, lambda pod: pods.in_phase(pod, phase))

    def delete_pod(self, namespace: str, name: str, *, grace: bool = False) -> None:
        """With `grace` it stays, terminating, until `finish_deletion`."""
        options = {} if grace else {"gracePeriodSeconds": 0}
        self._context.operations.delete(Target(_PODS, namespace, name), options)

    def finish_deletion(self, namespace: str, name: str, *, uid: str | None = None) -> None:
        """Remove the pod if it is still there (and still that one)."""
        self._context.operations.end_pod(namespace, name, uid)

    def remove_pods(self) -> None:
        """All of them, at once and without their kubelets."""
        for _, namespace, name in self._store.keys("pods"):
            self.finish_deletion(namespace, name)

    def events(self, namespace: str = "") -> list[Json]:
        """The Kubernetes Events clients have written."""
        found, _ = self._store.snapshot("events", namespace)
        return found

    # ------------------------------------------------------------------------ who may

    def set_tokens(self, tokens: Mapping[str, str] | None) -> None:
        """The accepted bearer tokens from now on; open watches live on, as in reality."""
        self._context.access.set_tokens(tokens)

    def rotate_token(self, old: str, new: str) -> None:
        self._context.access.rotate(old, new)

    def deny(self, user: str, *verbs: str, resource: str = "pods") -> None:
        """403 for this user from now on; no verb named: all of them."""
        self._context.access.deny(user, verbs or ("*",), resource)

    def allow_all(self) -> None:
        self._context.access.allow_all()

    # ------------------------------------------------------------------------ faults

    def fail_next(
        self, count: int, status: int, *, verb: str = "any", retry_after_s: int | None = None
    ) -> None:
        """The next requests of that verb (list, watch, get, patch, …) meet this HTTP status."""
        self._context.faults.fail_next(count, status, verb, retry_after_s)

    def slow_down(self, delay_s: float, *, verb: str = "any") -> None:
        """Every answer to that verb comes so much later; 0 ends it."""
        self._context.faults.slow_down(delay_s, verb)

    def freeze(self) -> None:
        """Half-open: connections are accepted, nothing is answered, open watches say nothing."""
        self._context.faults.freeze()

    def thaw(self) -> None:
        self._context.faults.thaw()

    def go_down(self) -> None:
        """Connections are refused, and those open end abruptly; objects and versions stay."""
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None

    def come_back(self) -> None:
        """On the same port."""
        if self._listener is not None:
            return
        bound, self._reserved = self._reserved, bind(self.port)
        self._listener = Listener(bound, self._context)

    def cut_watches(self, *, mid_line: bool = False) -> int:
        """End every open watch and its connection; how many there were."""
        order = Order.CUT_MID_LINE if mid_line else Order.END
        return self._context.watches.order(order)

    def expire_watches(self) -> int:
        """Every open watch gets the 410 ERROR event; how many there were."""
        return self._context.watches.order(Order.EXPIRE)

    def compact(self) -> None:
        """Forget the past: an older version is too old (410) from now on."""
        self._store.compact()

    def restore(self, version: int) -> None:
        """While down: etcd as in a backup of `version`, which must not be compacted."""
        self._store.restore(version)

    def serve_stale_lists(self, version: int, *, only_from_cache: bool = False) -> None:
        """Lists that name no version are answered as of `version`, which must not be compacted.
        With `only_from_cache` only those that allow it (resourceVersion=0), as an API server
        whose cache lags behind does."""
        self._context.faults.stale_lists(version, only_from_cache=only_from_cache)

    def serve_current_lists(self) -> None:
        self._context.faults.stale_lists(None, only_from_cache=False)

    def clear_faults(self) -> None:
        """All of the above that lasts, but denials."""
        self._context.faults.clear()

    # ------------------------------------------------------------------------ what was asked

    @property
    def open_watches(self) -> int:
        return self._context.watches.count()

    def count(self, verb: str = "any", *, resource: str = "pods") -> int:
        """Requests received, failed ones included; `any` for all verbs or resources."""
        return self._context.traffic.count(verb, resource)

    def requests(self) -> list[Request]:
        return self._context.traffic.requests()

    def reset_counts(self) -> None:
        self._context.traffic.reset()
