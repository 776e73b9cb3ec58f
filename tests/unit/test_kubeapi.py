"""The embedded Kubernetes API, asked by kubectl, by the official client and byte by byte."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import pytest

from tests.simnode.kubeapi import ApiError, KubeApi
from tests.simnode.kubeapi.pods import new_pod
from tests.simnode.kubeapi.representation import choose
from tests.simnode.kubeapi.resources import RESOURCES
from tests.simnode.kubeapi.store import Store
from tests.simnode.kubeapi.watch import Watch, WatchOptions
from tests.waiting import HANG_S, ended, until

KEY = "dynamo.nvidia.com/gpu-power-limit"
META_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
META = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"
ON_NODE = "fieldSelector=" + quote("spec.nodeName=node-a,status.phase!=Succeeded")
PODS = "/api/v1/pods"
DEFAULT_PODS = "/api/v1/namespaces/default/pods"
Json = dict[str, Any]

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is missing")


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with KubeApi() as api:
        yield api


# ------------------------------------------------------------------------------------ clients


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Json:
        parsed: Json = json.loads(self.body)
        return parsed


def ask(
    api: KubeApi,
    method: str,
    path: str,
    body: object = None,
    timeout_s: float = HANG_S,
    /,
    **headers: str,
) -> Answer:
    """One request on a connection of its own; `accept` and the like become headers."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    raw = None if body is None else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=timeout_s)
    try:
        connection.request(method, path, body=raw, headers=sent)
        response = connection.getresponse()
        return Answer(response.status, dict(response.headers), response.read())
    finally:
        connection.close()


def get(api: KubeApi, path: str, **headers: str) -> Answer:
    return ask(api, "GET", path, None, HANG_S, **headers)


def names(answer: Answer) -> list[str]:
    return [item["metadata"]["name"] for item in answer.json["items"]]


class RawWatch:
    """A watch read straight from the socket: chunk by chunk, each one with its time."""

    def __init__(self, api: KubeApi, query: str = "", accept: str = "application/json") -> None:
        self.socket = socket.create_connection(("127.0.0.1", api.port), timeout=HANG_S)
        self.file = self.socket.makefile("rb")
        request = f"GET {PODS}?watch=true&{query} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n"
        self.socket.sendall(request.encode())
        self.status = int(self.file.readline().split()[1])
        self.headers: dict[str, str] = {}
        while line := self.file.readline().strip():
            name, _, value = line.decode().partition(": ")
            self.headers[name.lower()] = value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def chunk(self) -> bytes | None:
        """None: the clean end. A cut line raises EOFError."""
        size = self.file.readline()
        if not size:
            raise EOFError("connection closed without a last chunk")
        length = int(size, 16)
        data = self.file.read(length)
        if len(data) < length:
            raise EOFError("connection closed in the middle of a chunk")
        assert self.file.read(2) == b"\r\n"
        return data or None

    def event(self) -> Json:
        data = self.chunk()
        assert data is not None, "the watch ended"
        assert data.endswith(b"\n")
        assert data.count(b"\n") == 1
        parsed: Json = json.loads(data)
        return parsed

    def brief(self) -> tuple[str, str]:
        event = self.event()
        return event["type"], event["object"]["metadata"]["name"]


def from_now(api: KubeApi) -> str:
    return f"resourceVersion={api.resource_version}"


class Kubectl:
    def __init__(self, api: KubeApi, tmp_path: Path, token: str | None = None) -> None:
        config = api.write_kubeconfig(tmp_path / "kubeconfig", token=token)
        self.environment = {
            "KUBECONFIG": str(config),
            "HOME": str(tmp_path),  # the discovery cache
            "PATH": os.environ["PATH"],
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["kubectl", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )

    def __call__(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Running meanwhile; ended with the block, whatever happens in it."""
        with subprocess.Popen(
            ["kubectl", *arguments], env=self.environment, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def kubectl(api: KubeApi, tmp_path: Path) -> Kubectl:
    return Kubectl(api, tmp_path)


# ------------------------------------------------------------------------------------ kubectl


@needs_kubectl
def test_kubectl_prints_the_usual_tables(api: KubeApi, kubectl: Kubectl) -> None:
    api.create_pod("a", node="node-a")
    api.create_pod("b", node="node-b", namespace="other", phase="Pending")
    header, row = kubectl("get", "pods").splitlines()
    assert header.split() == ["NAME", "READY", "STATUS", "RESTARTS", "AGE"]
    assert row.split()[:4] == ["a", "1/1", "Running", "0"]
    wide = kubectl("get", "pods", "-A", "-o", "wide").splitlines()
    assert wide[0].split()[:2] == ["NAMESPACE", "NAME"]
    assert wide[2].split()[:4] == ["other", "b", "0/1", "ContainerCreating"]
    assert "node-b" in wide[2]
    nodes = [line.split()[:2] for line in kubectl("get", "nodes").splitlines()[1:]]
    assert nodes == [["node-a", "Ready"], ["node-b", "Ready"]]
    assert "other" in kubectl("get", "ns")
    assert "po " in kubectl("api-resources")


@needs_kubectl
def test_kubectl_annotates_changes_and_removes(api: KubeApi, kubectl: Kubectl) -> None:
    api.create_pod("a", node="node-a")
    kubectl("annotate", "pod", "a", f"{KEY}=350")
    kubectl("annotate", "pod", "a", f"{KEY}=300", "--overwrite")
    listing = (
        'jsonpath={range .items[*]}{.metadata.name}{"\\t"}'
        '{.metadata.annotations.dynamo\\.nvidia\\.com/gpu-power-limit}{"\\n"}{end}'
    )
    assert kubectl("get", "pods", "-o", listing) == "a\t300\n"
    kubectl("annotate", "pod", "a", f"{KEY}-")
    assert kubectl("get", "pods", "-o", listing) == "a\t\n"
    assert f"{KEY}=" not in kubectl("get", "pod", "a", "-o", "yaml")
    refused = kubectl.run("annotate", "pod", "gone", f"{KEY}=1")
    assert 'pods "gone" not found' in refused.stderr


@needs_kubectl
def test_kubectl_selects_by_field_and_label(api: KubeApi, kubectl: Kubectl) -> None:
    for name, node in (("a", "node-a"), ("b", "node-b")):
        api.create_pod(name, node=node)
    kubectl("label", "pod", "b", "tier=low")
    assert kubectl("get", "pods", "-l", "tier in (low,mid)", "-o", "name") == "pod/b\n"
    on_a = kubectl("get", "pods", "--field-selector", "spec.nodeName=node-a", "-o", "name")
    assert on_a == "pod/a\n"
    unknown = kubectl.run("get", "pods", "--field-selector", "spec.colour=red")
    assert "field label not supported: spec.colour" in unknown.stderr


@needs_kubectl
def test_kubectl_watch_shows_each_change(api: KubeApi, kubectl: Kubectl) -> None:
    api.create_pod("a", node="node-a")
    with kubectl.started("get", "pods", "-w", "--output-watch-events") as watching:

        def row() -> list[str]:
            assert watching.stdout is not None
            return watching.stdout.readline().split()

        assert row()[:2] == ["EVENT", "NAME"]
        assert row()[:2] == ["ADDED", "a"]
        until(lambda: api.open_watches == 1, "the watch")
        api.annotate("default", "a", KEY, "300")
        assert row()[:4] == ["MODIFIED", "a", "1/1", "Running"]
        api.delete_pod("default", "a")
        assert row()[:4] == ["MODIFIED", "a", "1/1", "Terminating"]
        assert row()[:2] == ["DELETED", "a"]
    until(lambda: api.open_watches == 0, "the end of the watch")


@needs_kubectl
def test_kubectl_delete_waits_until_the_kubelet_is_done(api: KubeApi, kubectl: Kubectl) -> None:
    told: list[Json] = []
    api.deletion_hooks.append(told.append)
    uid = api.create_pod("a", node="node-a")["metadata"]["uid"]
    with kubectl.started("delete", "pod", "a") as deleting:
        until(lambda: api.count("watch") == 1, "the watch")  # kubectl waits
        assert [pod["metadata"]["deletionGracePeriodSeconds"] for pod in told] == [30]
        assert kubectl("get", "pods").splitlines()[1].split()[2] == "Terminating"
        assert deleting.poll() is None
        api.finish_deletion("default", "a", uid="another-uid")
        assert api.get_pod("default", "a") is not None
        api.finish_deletion("default", "a", uid=uid)
        assert ended(deleting) == 0
    assert api.get_pod("default", "a") is None
    api.create_pod("b", node="node-a")
    kubectl("delete", "pod", "b", "--grace-period=0", "--force")
    assert api.get_pod("default", "b") is None
    assert len(told) == 1


@needs_kubectl
@pytest.mark.parametrize("k8s", ["1.25", "1.28", "1.34"])
def test_kubectl_creates_and_applies(k8s: str, tmp_path: Path) -> None:
    manifest = tmp_path / "pod.json"

    def write(limit: str, image: str = "worker:1") -> str:
        container = {"name": "main", "image": image, "env": [{"name": "A", "value": "1"}]}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "mine", "annotations": {KEY: limit}},
            "spec": {"nodeName": "node-a", "containers": [container]},
        }
        manifest.write_text(json.dumps(pod))
        return str(manifest)

    with KubeApi(k8s=k8s) as api:
        api.deletion_hooks.append(lambda pod: api.finish_deletion("default", pod_name(pod)))
        kubectl = Kubectl(api, tmp_path)
        assert f"v{k8s}.0" in kubectl("version")
        kubectl("create", "-f", write("250"))
        kubectl("delete", "-f", str(manifest), "--now")
        assert kubectl("apply", "-f", write("260")) == "pod/mine created\n"
        assert kubectl("apply", "-f", write("260")) == "pod/mine unchanged\n"
        assert kubectl("apply", "-f", write("270", "worker:2")) == "pod/mine configured\n"
        assert kubectl("apply", "--validate=false", "-f", write("280")) == "pod/mine configured\n"
        pod = api.get_pod("default", "mine")
        assert pod is not None
        assert pod["metadata"]["annotations"][KEY] == "280"
        assert pod["spec"]["containers"][0]["image"] == "worker:1"
        again = kubectl.run("create", "-f", str(manifest))
        assert "AlreadyExists" in again.stderr


@needs_kubectl
def test_server_side_apply_is_refused_in_clear_words(
    api: KubeApi, kubectl: Kubectl, tmp_path: Path
) -> None:
    manifest = tmp_path / "pod.json"
    manifest.write_text(json.dumps(pod_body("mine")))
    done = kubectl.run("apply", "--server-side", "-f", str(manifest))
    assert "Server-side apply not available on the server" in done.stderr
    assert api.get_pod("default", "mine") is None


@needs_kubectl
def test_events_written_by_a_client_show_in_describe(api: KubeApi, kubectl: Kubectl) -> None:
    pod = api.create_pod("a", node="node-a")
    event = event_body(pod)
    path = "/api/v1/namespaces/default/events"
    made = ask(api, "POST", path, event).json
    patch = {"count": 7, "message": "limit is 300 W"}
    patched = ask(api, "PATCH", f"{path}/{made['metadata']['name']}", patch, content_type=STRATEGIC)
    assert patched.json["count"] == 7
    described = kubectl("describe", "pod", "a")
    assert "LimitClamped" in described
    assert "limit is 300 W" in described
    assert "LimitClamped" in kubectl("get", "events", "--field-selector", "type=Warning")
    assert [event["count"] for event in api.events()] == [7]


def pod_name(pod: Json) -> str:
    return str(pod["metadata"]["name"])


def pod_body(name: str, **metadata: object) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, **metadata},
        "spec": {"containers": [{"name": "main", "image": "worker:1"}]},
    }


def event_body(pod: Json) -> Json:
    metadata = pod["metadata"]
    about = {"kind": "Pod", "apiVersion": "v1"}
    about |= {key: metadata[key] for key in ("name", "namespace", "uid")}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": "a."},
        "involvedObject": about,
        "type": "Warning",
        "reason": "LimitClamped",
        "message": "limit is 350 W",
        "count": 1,
        "firstTimestamp": "2025-01-01T00:00:00Z",
        "lastTimestamp": "2025-01-01T00:00:00Z",
        "source": {"component": "power-agent"},
    }


# --------------------------------------------------------------------------- official client


OFFICIAL_CLIENT = """
import json, sys
from kubernetes import client, config

kubeconfig, path, accept = sys.argv[1:]
config.load_kube_config(kubeconfig)
with client.ApiClient() as api_client:
    for pod in client.CoreV1Api(api_client).list_pod_for_all_namespaces().items:
        print(pod.metadata.name, pod.metadata.annotations, flush=True)
    configuration = api_client.configuration
    response = api_client.rest_client.pool_manager.request(
        "GET",
        configuration.host + path,
        headers={
            "Accept": accept,
            "Authorization": configuration.get_api_key_with_prefix("authorization")
            or configuration.get_api_key_with_prefix("BearerToken"),
        },
        preload_content=False,
    )
    for line in response:
        print(line.decode(), end="", flush=True)
    response.release_conn()
"""


def test_the_official_client_lists_and_watches(api: KubeApi, tmp_path: Path) -> None:
    if importlib.util.find_spec("kubernetes") is None:
        pytest.skip("the official client is missing")
    api.set_tokens({"secret": "system:serviceaccount:dynamo-system:power-agent"})
    (tmp_path / "token").write_text("secret")
    config = api.write_kubeconfig(tmp_path / "kubeconfig", token_file=tmp_path / "token")
    api.create_pod("a", node="node-a", annotations={KEY: "300"})
    path = f"{PODS}?watch=true&{ON_NODE}&{from_now(api)}"
    # A process of its own: the client library in parts is what other tests of this one import.
    command = [sys.executable, "-c", OFFICIAL_CLIENT, str(config), path, META]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == f"a {{'{KEY}': '300'}}\n"
        until(lambda: api.open_watches == 1, "the watch")
        api.annotate("default", "a", KEY, "310")
        event = json.loads(client.stdout.readline())
        assert event["object"]["metadata"]["annotations"] == {KEY: "310"}
        api.cut_watches()
        assert client.stdout.read() == ""
    assert client.returncode == 0


# ---------------------------------------------------------------------------------- answers


def test_metadata_only_answers_carry_no_spec(api: KubeApi) -> None:
    empty = get(api, f"{PODS}?{ON_NODE}", accept=META_LIST)
    assert empty.json["items"] is None
    assert get(api, PODS).json["items"] == []
    api.create_pod(
        "a", node="node-a", annotations={KEY: "300"}, owner={"kind": "Node", "name": "n"}
    )
    listed = get(api, f"{PODS}?{ON_NODE}", accept=META_LIST).json
    assert (listed["kind"], listed["apiVersion"]) == (
        "PartialObjectMetadataList",
        "meta.k8s.io/v1",
    )
    assert listed["metadata"]["resourceVersion"] == str(api.resource_version)
    (item,) = listed["items"]
    assert item.keys() == {"kind", "apiVersion", "metadata"}
    assert (item["kind"], item["apiVersion"]) == ("PartialObjectMetadata", "meta.k8s.io/v1")
    assert item["metadata"]["annotations"] == {KEY: "300"}
    assert item["metadata"]["ownerReferences"][0]["kind"] == "Node"
    one = get(api, f"{DEFAULT_PODS}/a", accept=META).json
    assert one == item


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "PodList"),
        ("*/*", "PodList"),
        ("application/json", "PodList"),
        (META_LIST + ", application/json", "PartialObjectMetadataList"),
        ("application/vnd.kubernetes.protobuf, " + META_LIST, "PartialObjectMetadataList"),
        ("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", "Table"),
        ("application/json;as=Unknown;v=v1;g=meta.k8s.io,application/json", "PodList"),
    ],
)
def test_the_first_known_alternative_of_accept_decides(
    api: KubeApi, accept: str, kind: str
) -> None:
    assert get(api, PODS, accept=accept).json["kind"] == kind


def test_what_cannot_be_represented_is_refused(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    for path, accept in (
        (PODS, "application/vnd.kubernetes.protobuf"),
        (PODS, META),
        (f"{DEFAULT_PODS}/a", META_LIST),
        (f"{PODS}?watch=true", META_LIST),
    ):
        assert get(api, path, accept=accept).json["reason"] == "NotAcceptable"


def test_chunks_are_one_consistent_list(api: KubeApi) -> None:
    for number in range(5):
        api.create_pod(f"p{number}", node="node-a")
    first = get(api, f"{PODS}?limit=2")
    assert names(first) == ["p0", "p1"]
    assert first.json["metadata"]["remainingItemCount"] == 3
    api.delete_pod("default", "p2")
    api.create_pod("p9", node="node-a")
    seen, token = names(first), first.json["metadata"].get("continue")
    while token:
        page = get(api, f"{PODS}?limit=2&continue={token}")
        assert page.json["metadata"]["resourceVersion"] == first.json["metadata"]["resourceVersion"]
        seen += names(page)
        token = page.json["metadata"].get("continue")
    assert seen == ["p0", "p1", "p2", "p3", "p4"]


def test_an_old_continue_is_410_and_offers_a_way_on(api: KubeApi) -> None:
    for number in range(4):
        api.create_pod(f"p{number}", node="node-a")
    token = get(api, f"{PODS}?limit=2").json["metadata"]["continue"]
    api.delete_pod("default", "p2")
    api.compact()
    expired = get(api, f"{PODS}?limit=2&continue={token}")
    assert (expired.status, expired.json["reason"]) == (410, "Expired")
    rest = get(api, f"{PODS}?limit=2&continue={expired.json['metadata']['continue']}")
    assert names(rest) == ["p3"]
    assert get(api, f"{PODS}?continue=nonsense").status == 400


def test_a_list_is_answered_at_the_version_it_asks_for(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    then = api.resource_version
    api.create_pod("b", node="node-a")
    api.delete_pod("default", "a")
    assert names(get(api, PODS)) == ["b"]
    assert names(get(api, f"{PODS}?resourceVersion=0")) == ["b"]
    assert names(get(api, f"{PODS}?resourceVersion={then}")) == ["b"]  # not older than
    exact = get(api, f"{PODS}?resourceVersion={then}&resourceVersionMatch=Exact")
    assert (names(exact), exact.json["metadata"]["resourceVersion"]) == (["a"], str(then))
    future = get(api, f"{PODS}?resourceVersion={api.resource_version + 1}")
    assert (future.status, future.json["reason"]) == (504, "Timeout")
    api.compact()
    gone = get(api, f"{PODS}?resourceVersion={then}&resourceVersionMatch=Exact")
    assert gone.status == 410
    assert get(api, f"{PODS}?resourceVersionMatch=Exact").status == 422


# ------------------------------------------------------------------------------------- watch


def test_a_watch_without_a_version_starts_with_what_is(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    with RawWatch(api) as watch:
        assert watch.status == 200
        assert watch.headers["transfer-encoding"] == "chunked"
        assert watch.brief() == ("ADDED", "a")
        api.create_pod("b", node="node-a")
        assert watch.brief() == ("ADDED", "b")


def test_a_watch_replays_exactly_what_came_after_its_version(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    version = from_now(api)
    api.annotate("default", "a", KEY, "1")
    api.create_pod("b", node="node-a", namespace="other")
    api.delete_pod("default", "a")
    with RawWatch(api, version) as watch:
        events = [watch.event() for _ in range(4)]
    assert [event["type"] for event in events] == ["MODIFIED", "ADDED", "MODIFIED", "DELETED"]
    versions = [int(event["object"]["metadata"]["resourceVersion"]) for event in events]
    assert versions == sorted(set(versions))
    assert versions[-1] == api.resource_version


def test_a_pod_that_leaves_the_selector_is_deleted_for_the_watch(api: KubeApi) -> None:
    api.create_pod("a", node="node-a", annotations={KEY: "300"})
    with RawWatch(api, f"{ON_NODE}&{from_now(api)}", META) as watch:
        api.set_phase("default", "a", "Succeeded")
        event = watch.event()
        assert event["type"] == "DELETED"
        assert event["object"]["kind"] == "PartialObjectMetadata"
        assert event["object"]["metadata"]["resourceVersion"] == str(api.resource_version)
        api.annotate("default", "a", KEY, "310")  # outside the selector: not heard of
        api.set_phase("default", "a", "Running")
        assert watch.brief() == ("ADDED", "a")
        api.create_pod("elsewhere", node="node-b")
        api.annotate("default", "a", KEY, "320")
        assert watch.brief() == ("MODIFIED", "a")


def test_the_deleted_event_holds_the_old_object_at_the_new_version(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    with RawWatch(api, f"{ON_NODE}&{from_now(api)}") as watch:
        api.set_phase("default", "a", "Succeeded")
        obj = watch.event()["object"]
    assert obj["status"]["phase"] == "Running"
    assert obj["metadata"]["resourceVersion"] == str(api.resource_version)


def test_label_selector_and_namespace_narrow_a_watch(api: KubeApi) -> None:
    with RawWatch(api, f"labelSelector=app%3Dworker&{from_now(api)}") as watch:
        api.create_pod("a", node="node-a")
        api.create_pod("b", node="node-a", labels={"app": "worker"})
        assert watch.brief() == ("ADDED", "b")
    path = f"{DEFAULT_PODS}?watch=true&timeoutSeconds=1"
    api.create_pod("c", node="node-a", namespace="other")
    lines = get(api, path).body.splitlines()
    assert [json.loads(line)["object"]["metadata"]["name"] for line in lines] == ["a", "b"]


def test_too_old_a_version_is_a_410_event_on_a_watch(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    old = api.resource_version
    api.annotate("default", "a", KEY, "1")
    api.compact()
    with RawWatch(api, f"resourceVersion={old}", META) as watch:
        assert watch.status == 200
        event = watch.event()
        assert event["type"] == "ERROR"
        assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")
        assert event["object"]["kind"] == "Status"
        assert watch.chunk() is None


def test_the_history_has_a_window() -> None:
    with KubeApi(history=5) as api:
        api.create_pod("a", node="node-a")
        version = api.resource_version
        for limit in range(5):
            api.annotate("default", "a", KEY, str(limit))
        with RawWatch(api, f"resourceVersion={version}") as watch:
            assert watch.event()["type"] == "MODIFIED"
        api.annotate("default", "a", KEY, "6")
        with RawWatch(api, f"resourceVersion={version}") as watch:
            assert watch.event()["type"] == "ERROR"


def test_bookmarks_come_at_their_interval_and_carry_the_version() -> None:
    with KubeApi(bookmark_interval_s=0.1) as api:
        with RawWatch(api, f"{ON_NODE}&allowWatchBookmarks=true&{from_now(api)}", META) as watch:
            api.create_pod("elsewhere", node="node-b")  # moves the version, not this watch
            event = watch.event()
        assert event["type"] == "BOOKMARK"
        obj = event["object"]
        assert (obj["kind"], obj["apiVersion"]) == ("PartialObjectMetadata", "meta.k8s.io/v1")
        assert obj["metadata"]["resourceVersion"] == str(api.resource_version)
        with RawWatch(api, from_now(api)) as watch:
            watch.socket.settimeout(0.35)
            with pytest.raises(TimeoutError):
                watch.event()


def test_a_watch_from_the_future_gets_no_bookmark_before_the_server_is_there() -> None:
    with KubeApi(bookmark_interval_s=0.05) as api:
        ahead = api.resource_version + 2
        with RawWatch(api, f"allowWatchBookmarks=true&resourceVersion={ahead}", META) as watch:
            watch.socket.settimeout(0.3)
            with pytest.raises(TimeoutError):
                watch.event()
        with RawWatch(api, f"allowWatchBookmarks=true&resourceVersion={ahead}", META) as watch:
            for name in ("a", "b"):
                api.create_pod(name, node="node-a")
            assert int(watch.event()["object"]["metadata"]["resourceVersion"]) >= ahead


def test_a_bookmark_never_overtakes_an_event() -> None:
    store = Store(history=10)
    options = WatchOptions.parse({"resourceVersion": str(store.version)}, (1, 34))
    watch = Watch(store, RESOURCES["pods"], "", choose(META), options)
    pod = new_pod("a", "default", "node-a")
    store.change(("pods", "default", "a"), lambda _: pod)
    assert watch.bookmark() is None
    assert len(list(watch.taken())) == 1
    bookmark = watch.bookmark()
    assert bookmark is not None
    assert json.loads(bookmark)["object"]["metadata"]["resourceVersion"] == str(store.version)
    watch.close()


def test_the_server_ends_a_watch_cleanly_after_its_time(api: KubeApi) -> None:
    started = time.monotonic()
    with RawWatch(api, f"timeoutSeconds=1&{from_now(api)}") as watch:
        assert watch.chunk() is None
        assert time.monotonic() - started >= 1
        watch.socket.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert watch.file.readline().startswith(b"HTTP/1.1 200")
    until(lambda: api.open_watches == 0, "the end of the watch")


INITIAL = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"


@pytest.mark.parametrize("k8s", ["1.25", "1.31", "1.33"])
def test_an_old_server_refuses_initial_events(k8s: str) -> None:
    with KubeApi(k8s=k8s) as api:
        refused = get(api, f"{PODS}?watch=true&{INITIAL}")
    assert (refused.status, refused.json["reason"]) == (422, "Invalid")
    assert "sendInitialEvents" in refused.json["message"]


@pytest.mark.parametrize("k8s", ["1.32", "1.34"])
def test_a_new_server_sends_initial_events_and_marks_their_end(k8s: str) -> None:
    with KubeApi(k8s=k8s) as api:
        api.create_pod("a", node="node-a")
        version = api.resource_version
        with RawWatch(api, f"{INITIAL}&{ON_NODE}", META) as watch:
            assert watch.brief() == ("ADDED", "a")
            end = watch.event()
            api.create_pod("b", node="node-a")
            assert watch.brief() == ("ADDED", "b")
    assert end["type"] == "BOOKMARK"
    assert end["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
    assert end["object"]["metadata"]["resourceVersion"] == str(version)


def test_a_new_server_marks_the_end_of_the_beginning_unasked(api: KubeApi) -> None:
    """As the real one does for a watch from version 0 that takes bookmarks."""
    api.create_pod("a", node="node-a")
    with RawWatch(api, "resourceVersion=0&allowWatchBookmarks=true", META) as watch:
        assert watch.brief() == ("ADDED", "a")
        end = watch.event()
    assert end["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


def test_a_client_that_hangs_up_is_noticed(api: KubeApi) -> None:
    with RawWatch(api, from_now(api)):
        until(lambda: api.open_watches == 1, "the watch")
    until(lambda: api.open_watches == 0, "the end of the watch")


def test_a_watcher_that_does_not_read_delays_nobody(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    with RawWatch(api, from_now(api)), RawWatch(api, from_now(api), META) as quick:
        big = "x" * 200_000
        for number in range(40):  # 8 MB: more than any socket buffer takes
            api.annotate("default", "a", "note", f"{number}{big}")
        seen = [quick.event()["object"]["metadata"]["annotations"]["note"] for _ in range(40)]
    assert [note.removesuffix(big) for note in seen] == [str(number) for number in range(40)]


# ------------------------------------------------------------------------------------ writes


@pytest.mark.parametrize("content_type", [MERGE, STRATEGIC])
def test_patches_merge_maps_and_null_removes(api: KubeApi, content_type: str) -> None:
    api.create_pod("a", node="node-a", annotations={"keep": "1", "drop": "2"})
    patch = {"metadata": {"annotations": {"drop": None, KEY: "300"}}}
    answer = ask(api, "PATCH", f"{DEFAULT_PODS}/a", patch, content_type=content_type)
    assert answer.json["metadata"]["annotations"] == {"keep": "1", KEY: "300"}
    assert answer.json["metadata"]["resourceVersion"] == str(api.resource_version)


def test_a_strategic_patch_merges_containers_by_name(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    patch = {
        "spec": {
            "$setElementOrder/containers": [{"name": "main"}],
            "containers": [{"name": "main", "image": "worker:2"}],
        }
    }
    answer = ask(api, "PATCH", f"{DEFAULT_PODS}/a", patch, content_type=STRATEGIC)
    (container,) = answer.json["spec"]["containers"]
    assert (container["image"], container["terminationMessagePolicy"]) == ("worker:2", "File")


def test_json_patch(api: KubeApi) -> None:
    api.create_pod("a", node="node-a", annotations={KEY: "300"})
    pointer = f"/metadata/annotations/{KEY.replace('/', '~1')}"

    def patch(*steps: Json) -> Answer:
        return ask(api, "PATCH", f"{DEFAULT_PODS}/a", list(steps), content_type=JSON_PATCH)

    changed = patch(
        {"op": "test", "path": pointer, "value": "300"},
        {"op": "replace", "path": pointer, "value": "310"},
        {"op": "add", "path": "/metadata/labels", "value": {"x": "y"}},
    )
    assert changed.json["metadata"]["annotations"] == {KEY: "310"}
    assert changed.json["metadata"]["labels"] == {"x": "y"}
    assert patch({"op": "test", "path": pointer, "value": "300"}).status == 422
    assert patch({"op": "remove", "path": "/metadata/annotations/none"}).status == 422
    assert "annotations" not in patch({"op": "remove", "path": pointer}).json["metadata"]


def test_a_patch_that_changes_nothing_makes_no_version_and_no_event(api: KubeApi) -> None:
    api.create_pod("a", node="node-a", annotations={KEY: "300"})
    version = api.resource_version
    patch = {"metadata": {"annotations": {KEY: "300"}}}
    assert ask(api, "PATCH", f"{DEFAULT_PODS}/a", patch, content_type=MERGE).status == 200
    assert api.resource_version == version


def test_status_is_written_through_its_own_path_only(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    patch = {"status": {"phase": "Succeeded"}}
    path = f"{DEFAULT_PODS}/a"
    assert ask(api, "PATCH", path, patch, content_type=MERGE).json["status"]["phase"] == "Running"
    done = ask(api, "PATCH", f"{path}/status", patch, content_type=MERGE)
    assert done.json["status"]["phase"] == "Succeeded"


def test_writes_with_a_stale_version_conflict(api: KubeApi) -> None:
    pod = dict(api.create_pod("a", node="node-a"))
    api.annotate("default", "a", KEY, "300")
    path = f"{DEFAULT_PODS}/a"
    stale = ask(api, "PUT", path, pod)
    assert (stale.status, stale.json["reason"]) == (409, "Conflict")
    assert "the object has been modified" in stale.json["message"]
    fresh = get(api, path).json
    fresh["metadata"]["annotations"][KEY] = "310"
    assert ask(api, "PUT", path, fresh).json["metadata"]["annotations"] == {KEY: "310"}


def test_bad_objects_are_refused_as_the_real_server_does(api: KubeApi) -> None:
    def post(body: Json, namespace: str = "default") -> tuple[int, str]:
        answer = ask(api, "POST", f"/api/v1/namespaces/{namespace}/pods", body)
        return answer.status, answer.json["reason"] if answer.status != 201 else "created"

    assert post(pod_body("a")) == (201, "created")
    assert post(pod_body("a")) == (409, "AlreadyExists")
    assert post(pod_body("")) == (422, "Invalid")
    assert post(pod_body("A_b")) == (422, "Invalid")
    assert post({**pod_body("b"), "spec": {}}) == (422, "Invalid")
    assert post(pod_body("b"), "nowhere") == (404, "NotFound")
    assert post(pod_body("b", annotations={"x": 1})) == (400, "BadRequest")
    assert post(pod_body("b", annotations={"x": "y" * 262_144})) == (422, "Invalid")
    assert post(pod_body("b", annotations={"x": "y" * 262_143})) == (201, "created")
    assert get(api, f"{DEFAULT_PODS}/gone").json["message"] == 'pods "gone" not found'
    assert ask(api, "DELETE", f"{DEFAULT_PODS}/gone").status == 404
    patch = {"metadata": {"annotations": {"x": "y" * 262_144}}}
    big = ask(api, "PATCH", f"{DEFAULT_PODS}/a", patch, content_type=MERGE)
    assert big.status == 422
    moved = {"spec": {"nodeName": "node-b"}}
    assert ask(api, "PATCH", f"{DEFAULT_PODS}/a", moved, content_type=MERGE).status == 422
    with pytest.raises(ApiError, match="already exists"):
        api.create_pod("a", node="node-a")


def test_deletion_honours_uid_and_grace(api: KubeApi) -> None:
    api.create_pod("a", node="node-a", uid="11111111-2222-3333-4444-555555555555")
    path = f"{DEFAULT_PODS}/a"
    assert ask(api, "DELETE", path, {"preconditions": {"uid": "other"}}).status == 409
    with RawWatch(api, f"{ON_NODE}&{from_now(api)}") as watch:
        assert ask(api, "DELETE", path).json["metadata"]["deletionTimestamp"]
        event = watch.event()
        assert event["type"] == "MODIFIED"
        assert event["object"]["metadata"]["deletionGracePeriodSeconds"] == 30
        assert ask(api, "DELETE", path, {"gracePeriodSeconds": 0}).status == 200
        # Two events, as from the real server: no grace left, then gone.
        assert watch.event()["object"]["metadata"]["deletionGracePeriodSeconds"] == 0
        assert watch.brief() == ("DELETED", "a")
    api.create_pod("done", node="node-a", phase="Succeeded")
    api.delete_pod("default", "done", grace=True)  # no kubelet has anything left to stop
    assert api.get_pod("default", "done") is None


# ------------------------------------------------------------------------------ who may what


def test_unknown_tokens_are_401_and_rotation_ends_the_old_one() -> None:
    with KubeApi(tokens={"old": "agent"}) as api:
        assert get(api, PODS).json["message"] == "Unauthorized"
        assert get(api, PODS, authorization="Bearer wrong").status == 401
        assert get(api, PODS, authorization="Bearer old").status == 200
        api.rotate_token("old", "new")
        refused = get(api, PODS, authorization="Bearer old")
        assert (refused.status, refused.json["reason"]) == (401, "Unauthorized")
        assert refused.json["kind"] == "Status"
        assert get(api, PODS, authorization="Bearer new").status == 200


def test_a_denied_user_reads_which_right_is_missing() -> None:
    user = "system:serviceaccount:dynamo-system:power-agent"
    with KubeApi(tokens={"t": user, "u": "other"}) as api:
        api.deny(user, "list")
        denied = get(api, PODS, authorization="Bearer t")
        assert denied.status == 403
        assert denied.json["message"] == (
            f'pods is forbidden: User "{user}" cannot list resource "pods" in API group "" '
            "at the cluster scope"
        )
        narrowed = get(api, DEFAULT_PODS, authorization="Bearer t").json["message"]
        assert narrowed.endswith(
            'cannot list resource "pods" in API group "" in the namespace "default"'
        )
        assert get(api, PODS, authorization="Bearer u").status == 200
        api.allow_all()
        assert get(api, PODS, authorization="Bearer t").status == 200


# ------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("status", [410, 429, 500, 503])
def test_the_next_requests_fail_as_ordered(api: KubeApi, status: int) -> None:
    api.fail_next(2, status, verb="list", retry_after_s=1)
    with RawWatch(api) as watch:
        assert watch.status == 200
    for _ in range(2):
        failed = get(api, PODS)
        assert failed.status == status
        assert failed.headers["Retry-After"] == "1"
    assert get(api, PODS).status == 200


def test_watches_are_cut_cleanly_or_in_the_middle_of_a_line(api: KubeApi) -> None:
    with RawWatch(api, from_now(api)) as watch:
        assert api.cut_watches() == 1
        assert watch.chunk() is None
        assert watch.file.read() == b""
    until(lambda: api.open_watches == 0, "the end of the watch")
    with RawWatch(api, from_now(api)) as watch:
        assert api.cut_watches(mid_line=True) == 1
        with pytest.raises(EOFError):
            watch.chunk()
    until(lambda: api.open_watches == 0, "the end of the watch")


def test_open_watches_can_expire(api: KubeApi) -> None:
    with RawWatch(api, from_now(api)) as watch:
        api.expire_watches()
        assert watch.event()["object"]["code"] == 410
        assert watch.chunk() is None


def test_a_frozen_server_accepts_and_says_nothing(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    with RawWatch(api, from_now(api)) as watch:
        api.freeze()
        api.annotate("default", "a", KEY, "300")
        watch.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            watch.socket.recv(1)
        with pytest.raises(TimeoutError):
            ask(api, "GET", PODS, None, 0.2)
        api.thaw()
        watch.socket.settimeout(HANG_S)
        assert b"MODIFIED" in watch.socket.recv(100)


def test_the_server_goes_down_and_comes_back_on_its_port(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    version = from_now(api)
    for _ in range(2):
        with RawWatch(api, from_now(api)) as watch:
            api.go_down()
            with pytest.raises((EOFError, ConnectionError)):
                watch.chunk()
        with pytest.raises(ConnectionRefusedError):
            get(api, PODS)
        api.annotate("default", "a", KEY, str(api.resource_version))
        api.come_back()
        assert names(get(api, PODS)) == ["a"]
    with RawWatch(api, version) as watch:  # versions and history have survived
        assert watch.brief() == ("MODIFIED", "a")


def test_a_restored_cluster_goes_on_from_its_past(api: KubeApi) -> None:
    api.create_pod("a", node="node-a", annotations={KEY: "1"})
    api.create_pod("b", node="node-a")
    backup = api.resource_version
    api.annotate("default", "a", KEY, "2")
    api.delete_pod("default", "b")
    api.create_pod("c", node="node-a")
    lost = api.resource_version
    api.go_down()
    api.restore(backup)
    api.come_back()
    whole = get(api, PODS).json
    assert [pod["metadata"]["name"] for pod in whole["items"]] == ["a", "b"]
    assert whole["items"][0]["metadata"]["annotations"] == {KEY: "1"}
    assert whole["metadata"]["resourceVersion"] == str(backup)
    ahead = get(api, f"{PODS}?resourceVersion={lost}&resourceVersionMatch=NotOlderThan")
    assert ahead.status == 504
    (cause,) = ahead.json["details"]["causes"]
    assert cause["reason"] == "ResourceVersionTooLarge"
    with RawWatch(api, f"resourceVersion={lost}") as watch:  # hears nothing until then
        while api.resource_version <= lost:
            api.annotate("default", "a", KEY, str(api.resource_version))
        assert watch.event()["object"]["metadata"]["resourceVersion"] == str(lost + 1)


def test_stale_lists_show_the_past(api: KubeApi) -> None:
    past = api.resource_version
    api.create_pod("a", node="node-a")
    api.serve_stale_lists(past, only_from_cache=True)
    assert names(get(api, PODS)) == ["a"]
    assert names(get(api, f"{PODS}?resourceVersion=0")) == []
    api.serve_stale_lists(past)
    stale = get(api, PODS, accept=META_LIST).json
    assert (stale["items"], stale["metadata"]["resourceVersion"]) == (None, str(past))
    api.serve_current_lists()
    assert names(get(api, PODS)) == ["a"]


def test_slow_answers(api: KubeApi) -> None:
    api.slow_down(0.2, verb="list")
    started = time.monotonic()
    get(api, PODS)
    assert time.monotonic() - started >= 0.2
    api.slow_down(600, verb="list")
    api.clear_faults()
    get(api, PODS)


def test_requests_are_counted_by_verb(api: KubeApi) -> None:
    api.create_pod("a", node="node-a")
    get(api, PODS, accept=META_LIST)
    with RawWatch(api):
        pass
    get(api, f"{DEFAULT_PODS}/a")
    ask(api, "PATCH", f"{DEFAULT_PODS}/a", {}, content_type=MERGE)
    get(api, "/api/v1/nodes")
    counted = {verb: api.count(verb) for verb in ("list", "watch", "get", "patch", "delete")}
    assert counted == {"list": 1, "watch": 1, "get": 1, "patch": 1, "delete": 0}
    assert api.count("list", resource="any") == 2
    assert api.requests()[0].accept == META_LIST
    api.reset_counts()
    assert api.count() == 0


def test_nothing_is_left_running() -> None:
    with KubeApi() as api:
        port = api.port
        api.freeze()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
