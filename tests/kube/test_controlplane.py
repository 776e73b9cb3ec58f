"""What the tests of this folder, and the simulated node, take for granted about the real server."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.simnode.controlplane import ControlPlane, ControlPlaneError
from tests.simnode.controlplane_rest import ApiError, Object
from tests.waiting import gone, until

pytestmark = pytest.mark.kube

KEY = "dynamo.nvidia.com/gpu-power-limit"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


def pods_of(node: str, **parameters: str) -> str:
    selector = f"spec.nodeName={node},status.phase!=Succeeded,status.phase!=Failed"
    return "/api/v1/pods?" + urlencode({"fieldSelector": selector} | parameters)


def metadata_list(kube: ControlPlane, node: str) -> Object:
    with kube.rest_client() as rest:
        return rest.json("GET", pods_of(node), Accept=METADATA_LIST)


def metadata_watch(kube: ControlPlane, node: str, **parameters: str) -> Iterator[Object]:
    path = pods_of(node, watch="true", allowWatchBookmarks="true", **parameters)
    with kube.rest_client() as rest:
        yield from rest.watch(path, Accept=METADATA)


# ---------------------------------------------------------------------- the server itself


def test_the_server_is_recent_and_tells_its_version(controlplane: ControlPlane) -> None:
    major, minor = controlplane.version.removeprefix("v").split(".")[:2]
    assert (int(major), int(minor)) >= (1, 33)
    assert controlplane.kubectl("version", "-o", "json").returncode == 0


def test_the_openapi_document_is_whole(controlplane: ControlPlane) -> None:
    """It breaks when the server was built with too new a Go, and kubectl explain with it."""
    assert "nodeName" in controlplane.kubectl("explain", "pod.spec").stdout


def test_a_failing_kubectl_says_why(controlplane: ControlPlane) -> None:
    with pytest.raises(ControlPlaneError, match="NotFound"):
        controlplane.kubectl("get", "pod", "nobody")
    assert controlplane.kubectl("get", "pod", "nobody", check=False).returncode == 1


# ---------------------------------------------------------------------- list and watch


def test_the_metadata_list_of_an_empty_node_has_null_items(controlplane: ControlPlane) -> None:
    answer = metadata_list(controlplane, "list-empty")
    assert answer["kind"] == "PartialObjectMetadataList"
    assert answer["items"] is None
    assert int(answer["metadata"]["resourceVersion"]) > 0


def test_the_metadata_list_holds_the_nodes_live_pods_without_spec(
    controlplane: ControlPlane,
) -> None:
    created = controlplane.create_pod("list-a", node="list", annotations={KEY: "300"})
    controlplane.create_pod("list-b", node="list", phase="Succeeded")
    controlplane.create_pod("list-c", node="list-other")
    (pod,) = metadata_list(controlplane, "list")["items"]
    assert pod["metadata"]["uid"] == created["metadata"]["uid"]
    assert pod["metadata"]["annotations"] == {KEY: "300"}
    assert "spec" not in pod


def test_the_watch_tells_annotation_and_end(controlplane: ControlPlane) -> None:
    start = metadata_list(controlplane, "watch")["metadata"]["resourceVersion"]
    controlplane.create_pod("watch-a", node="watch", phase="Pending")
    controlplane.annotate("default", "watch-a", KEY, "250")
    controlplane.annotate("default", "watch-a", KEY, None)
    controlplane.set_phase("default", "watch-a", "Succeeded")
    controlplane.create_pod("watch-b", node="watch")

    seen = []
    for event in metadata_watch(controlplane, "watch", resourceVersion=start):
        metadata = event["object"]["metadata"]
        if metadata["name"] == "watch-b":
            break
        seen.append((event["type"], metadata.get("annotations")))
    assert seen == [
        ("ADDED", None),
        ("MODIFIED", {KEY: "250"}),
        ("MODIFIED", None),
        ("DELETED", None),  # it left the selector
    ]


def test_a_bookmark_tells_the_version_of_what_the_selector_hides(
    controlplane: ControlPlane,
) -> None:
    start = metadata_list(controlplane, "bookmark")["metadata"]["resourceVersion"]
    controlplane.create_pod("bookmark-a", node="bookmark", phase="Pending")
    # The server sends one about two seconds before it ends the watch, if there is news to tell.
    events = metadata_watch(controlplane, "bookmark", resourceVersion=start, timeoutSeconds="4")
    assert next(events)["type"] == "ADDED"
    hidden = controlplane.create_pod("bookmark-b", node="bookmark-other")["metadata"]
    for event in events:
        assert event["type"] == "BOOKMARK"
        assert event["object"]["kind"] == "PartialObjectMetadata"
        if event["object"]["metadata"]["resourceVersion"] == hidden["resourceVersion"]:
            return
    pytest.fail("no bookmark told the hidden pod's version")


def test_after_a_restart_all_is_there_on_the_same_port_but_older_versions(
    controlplane: ControlPlane,
) -> None:
    old = metadata_list(controlplane, "gone")["metadata"]["resourceVersion"]
    uid = controlplane.create_pod("gone-a", node="gone")["metadata"]["uid"]
    url = controlplane.url
    controlplane.compact()
    with controlplane.rest_client() as rest:
        controlplane.stop_apiserver()
        with pytest.raises(ConnectionRefusedError):
            rest.raw("GET", "/readyz")
        controlplane.start_apiserver()
        assert rest.raw("GET", "/readyz") == (200, "ok")
        path = pods_of("gone", resourceVersion=old, resourceVersionMatch="Exact")
        assert rest.raw("GET", path)[0] == 410
    assert controlplane.url == url
    (pod,) = metadata_list(controlplane, "gone")["items"]
    assert pod["metadata"]["uid"] == uid

    event = next(metadata_watch(controlplane, "gone", resourceVersion=old, timeoutSeconds="5"))
    assert (event["type"], event["object"]["code"]) == ("ERROR", 410)
    assert event["object"]["reason"] in ("Expired", "Gone")


def test_a_restored_server_refuses_to_list_from_its_future_and_watches_from_it_in_silence(
    controlplane: ControlPlane,
) -> None:
    controlplane.create_pod("restored-a", node="restored", annotations={KEY: "350"})
    controlplane.back_up()
    for watts in range(300, 350):
        controlplane.annotate("default", "restored-a", KEY, str(watts))
    ahead = metadata_list(controlplane, "restored")["metadata"]["resourceVersion"]
    controlplane.restore()

    (pod,) = metadata_list(controlplane, "restored")["items"]
    assert pod["metadata"]["annotations"] == {KEY: "350"}
    with controlplane.rest_client() as rest:
        path = pods_of("restored", resourceVersion=ahead, resourceVersionMatch="NotOlderThan")
        status, text = rest.raw("GET", path, Accept=METADATA_LIST)
    (cause,) = json.loads(text)["details"]["causes"]
    assert (status, cause["reason"]) == (504, "ResourceVersionTooLarge")
    controlplane.annotate("default", "restored-a", KEY, "360")
    watch = metadata_watch(controlplane, "restored", resourceVersion=ahead, timeoutSeconds="1")
    assert list(watch) == []


# ---------------------------------------------------------------------- who may what


def test_a_service_account_may_only_what_a_role_grants(
    controlplane: ControlPlane, tmp_path: Path
) -> None:
    controlplane.kubectl("create", "serviceaccount", "reader", "--namespace=default")
    token = controlplane.service_account_token("default", "reader")
    (tmp_path / "token").write_text(token)
    by_file = controlplane.write_kubeconfig(tmp_path / "by-file", token_file=tmp_path / "token")
    kubeconfig = controlplane.kubeconfig_for_token(token, tmp_path / "kubeconfig")
    assert kubeconfig.stat().st_mode & 0o777 == 0o600

    with controlplane.rest_client(token) as rest:
        assert rest.raw("GET", pods_of("rbac"))[0] == 403
        controlplane.kubectl(
            "create", "clusterrole", "reader", "--verb=get,list,watch", "--resource=pods"
        )
        controlplane.kubectl(
            "create", "clusterrolebinding", "reader", "--clusterrole=reader",
            "--serviceaccount=default:reader",
        )  # fmt: skip
        # The authorizer learns of a binding through a watch of its own.
        until(lambda: rest.raw("GET", pods_of("rbac"))[0] == 200, "the binding")
        assert rest.raw("GET", "/api/v1/secrets")[0] == 403

    for path in (kubeconfig, by_file):
        whoami = controlplane.kubectl("auth", "whoami", "-o", "json", kubeconfig=path)
        user = json.loads(whoami.stdout)["status"]["userInfo"]["username"]
        assert user == "system:serviceaccount:default:reader"


def test_a_made_up_token_is_nobody(controlplane: ControlPlane) -> None:
    with controlplane.rest_client("made-up") as rest:
        assert rest.raw("GET", pods_of("rbac"))[0] == 401


def test_the_official_client_accepts_the_kubeconfig(controlplane: ControlPlane) -> None:
    kubernetes: Any = importlib.import_module("kubernetes")  # takes a second: only where needed
    kubeconfig = str(controlplane.admin_kubeconfig)
    with kubernetes.config.new_client_from_config(kubeconfig) as api:
        namespace = kubernetes.client.CoreV1Api(api).read_namespace("default")
    assert namespace.metadata.name == "default"


# ---------------------------------------------------------------------- counting


def test_request_counts_see_every_list(controlplane: ControlPlane) -> None:
    before = controlplane.request_counts()
    for _ in range(3):
        metadata_list(controlplane, "counts")
    counted = controlplane.request_counts() - before
    assert counted["LIST", "pods"] == 3
    assert ("WATCH", "pods") not in counted


def test_request_counts_see_a_watch_when_it_ends(controlplane: ControlPlane) -> None:
    before = controlplane.request_counts()
    for _ in metadata_watch(controlplane, "counts", timeoutSeconds="1"):
        pass
    until(lambda: (controlplane.request_counts() - before)["WATCH", "pods"] == 1, "the watch")


# ---------------------------------------------------------------------- pods


def test_the_uid_is_the_servers_to_choose(controlplane: ControlPlane) -> None:
    with pytest.raises(ValueError, match="itself"):
        controlplane.create_pod("uid-a", node="uid", uid="1234")


def test_owner_and_labels_are_kept(controlplane: ControlPlane) -> None:
    owner = {"kind": "Node", "name": "owner"}
    pod = controlplane.create_pod("owner-a", node="owner", owner=owner, labels={"app": "x"})
    (kept,) = pod["metadata"]["ownerReferences"]
    assert kept.items() > owner.items()
    assert pod["metadata"]["labels"] == {"app": "x"}
    assert pod["status"]["phase"] == "Running"


def test_a_deleted_pod_goes_at_once_or_waits_for_its_kubelet(controlplane: ControlPlane) -> None:
    for name in ("delete-now", "delete-later"):
        controlplane.create_pod(name, node="delete")
    controlplane.delete_pod("default", "delete-now")
    controlplane.delete_pod("default", "delete-later", grace=True)
    (pod,) = metadata_list(controlplane, "delete")["items"]
    assert pod["metadata"]["name"] == "delete-later"
    assert "deletionTimestamp" in pod["metadata"]
    with pytest.raises(ApiError) as caught:
        controlplane.delete_pod("default", "delete-now")
    assert caught.value.status == 404

    controlplane.finish_deletion("default", "delete-later", uid="another one's")
    assert controlplane.get_pod("default", "delete-later")
    controlplane.finish_deletion("default", "delete-later", uid=pod["metadata"]["uid"])
    assert controlplane.get_pod("default", "delete-later") is None
    controlplane.finish_deletion("default", "delete-later")  # no matter


def test_a_pod_may_live_in_a_namespace_that_was_not_there(controlplane: ControlPlane) -> None:
    pod = controlplane.create_pod("a", node="namespace", namespace="new-here", phase="Pending")
    assert controlplane.get_pod("new-here", "a") == pod


# ---------------------------------------------------------------------- outage and end


def test_a_frozen_server_accepts_and_does_not_answer(controlplane: ControlPlane) -> None:
    controlplane.freeze()
    try:
        with socket.create_connection(("127.0.0.1", controlplane.port), timeout=0.3) as client:
            tls = ssl.create_default_context(cafile=controlplane.certificates.ca)
            with pytest.raises(TimeoutError):
                tls.wrap_socket(client, server_hostname="127.0.0.1")
    finally:
        controlplane.thaw()
    assert controlplane.version


OWNER = """
import os, signal, threading
from pathlib import Path
from tests.simnode.controlplane import ControlPlane
kube = ControlPlane(Path(os.environ["KUBEBUILDER_ASSETS"]))
# A thread that ends must not take with it what it started.
thread = threading.Thread(target=kube.__enter__)
thread.start()
thread.join()
assert kube.create_pod("a", node="n")
print(*kube.pids(), kube.folder, flush=True)
signal.pause()
"""


def test_nothing_outlives_a_killed_owner(controlplane: ControlPlane) -> None:
    assert controlplane.version  # the fixture has found the binaries
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        *pids, folder = owner.stdout.readline().split()
        assert len(pids) == 2
        assert not any(gone(int(pid)) for pid in pids)
        owner.send_signal(signal.SIGKILL)
    until(lambda: all(gone(int(pid)) for pid in pids), "the end of both")
    until(lambda: not Path(folder).exists(), "the folder gone")


def test_a_server_that_cannot_start_says_why(controlplane: ControlPlane) -> None:
    assert controlplane.version
    broken = ControlPlane(Path(os.environ["KUBEBUILDER_ASSETS"]), extra_flags=["--no-such-flag"])
    with pytest.raises(ControlPlaneError, match="unknown flag: --no-such-flag"), broken:
        pass
    assert not broken.folder.exists()
