"""The watcher's real process: what it tells the enforcer, and what no fault makes it tell."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared import messages as m
from tests.node.watcher_harness import KEY, NODE, WatcherNode, report
from tests.relay import relay
from tests.simnode.kubeapi import KubeApi
from tests.waiting import ended, stays, until

HASH = "0123456789abcdef0123456789abcdef"
Make = Callable[..., WatcherNode]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes nodes that end with the test."""
    with contextlib.ExitStack() as stack:
        folders = []

        def make(**options: Any) -> WatcherNode:  # noqa: ANN401
            node = WatcherNode(**options)
            folders.append(node.folder)
            return stack.enter_context(node)

        yield make
        stack.close()
        for folder in folders:
            shutil.rmtree(folder)


@pytest.fixture
def node(make: Make) -> WatcherNode:
    """A watcher is still to be started."""
    return make()


# ---------------------------------------------------------------------- what is told


def test_the_first_snapshot_is_the_whole_node(node: WatcherNode) -> None:
    asks, wrong = node.pod("asks", "350.5"), node.pod("wrong", "350W")
    silent = node.pod("silent")
    owner = {"kind": "Node", "name": NODE}
    static = node.pod("static", owner=owner, annotations={"kubernetes.io/config.hash": HASH})
    node.pod("done", "100", phase="Succeeded")
    node.api.create_pod("elsewhere", node="another", annotations={KEY: "100"})
    node.start()
    first = node.wait_for(asks=350_500, wrong=None)
    assert first.revision == 1
    assert first.node == NODE
    assert [(pod.uid, pod.raw, pod.namespace) for pod in first.pods] == [
        (asks, "350.5", "default"),
        (wrong, "350W", "default"),
    ]
    assert sorted(first.others) == sorted([silent, static, HASH])


def test_a_node_without_pods_is_told_too(node: WatcherNode) -> None:
    node.start()
    assert node.wait_for().others == []


def test_each_change_is_one_revision_more(node: WatcherNode) -> None:
    node.pod("a", "300")
    node.started()
    assert node.wait_for(a=300_000).revision == 1
    node.annotate("a", "310")
    assert node.wait_for(a=310_000).revision == 2
    uid = node.pod("b", "200")
    assert node.wait_for(a=310_000, b=200_000).revision == 3
    node.annotate("b", None)
    assert uid in node.wait_for(a=310_000).others
    node.api.delete_pod("default", "b")
    until(lambda: node.sent()[-1].others == [], "the deletion")
    node.api.set_phase("default", "a", "Succeeded")
    assert node.wait_for().revision == 6


def test_a_pod_that_ends_gracefully_is_there_until_it_is_gone(node: WatcherNode) -> None:
    node.pod("a", "300")
    node.started()
    node.wait_for(a=300_000)
    node.api.delete_pod("default", "a", grace=True)
    node.annotate("a", "290")
    node.wait_for(a=290_000)
    node.api.finish_deletion("default", "a")
    node.wait_for()


def test_what_does_not_concern_limits_is_not_told(node: WatcherNode) -> None:
    node.pod("a", "300")
    node.started()
    node.wait_for(a=300_000)
    for number in range(20):
        node.api.annotate("default", "a", "example.com/other", str(number))
    node.pod("b")
    until(lambda: node.sent()[-1].others, "the other pod")
    assert node.sent()[-1].revision == 2


def test_heartbeats_repeat_the_last_snapshot(node: WatcherNode) -> None:
    node.pod("a", "300")
    node.started()
    until(lambda: len(node.sent()) >= 3, "heartbeats")
    first, *_ = node.sent()
    again = [msgspec.structs.replace(each, api_age_s=first.api_age_s) for each in node.sent()]
    assert again == [first] * len(again)


def test_a_burst_is_told_in_few_snapshots(node: WatcherNode) -> None:
    for number in range(50):
        node.pod(f"p{number}")
    node.started()
    node.wait_for()
    for number in range(50):
        node.annotate(f"p{number}", "300")
    until(lambda: len(node.wishes() or {}) == 50, "all fifty")
    assert node.sent()[-1].revision <= 51


def test_namespace_and_annotation_can_be_chosen(make: Make) -> None:
    node = make(WATCH_NAMESPACE="team-a", POWER_AGENT_ANNOTATION="example.com/watts")
    node.pod("ours", namespace="team-a", annotations={"example.com/watts": "200", KEY: "1"})
    node.pod("theirs", namespace="team-b", annotations={"example.com/watts": "200"})
    node.started()
    node.wait_for(ours=200_000)
    paths = {request.path.partition("?")[0] for request in node.api.requests()}
    assert paths == {"/api/v1/namespaces/team-a/pods"}


@pytest.mark.parametrize("k8s", ["1.25", "1.34"])
def test_what_is_asked_of_the_api(make: Make, k8s: str) -> None:
    node = make(api=KubeApi(k8s=k8s))
    node.pod("a", "300")
    node.started()
    node.wait_for(a=300_000)
    listed, watched = node.api.requests()
    assert (listed.verb, watched.verb) == ("list", "watch")
    assert "resourceVersion" not in listed.path  # the newest, not what a cache remembers
    assert "limit=" not in listed.path
    assert "allowWatchBookmarks=true" in watched.path
    timeout = re.search(r"timeoutSeconds=(\d+)", watched.path)
    assert timeout
    assert 240 <= int(timeout[1]) <= 300
    for request in (listed, watched):
        assert "as=PartialObjectMetadata" in request.accept
        assert f"spec.nodeName%3D{NODE}" in request.path
        assert request.user_agent.startswith("power-agent/")


# ---------------------------------------------------------------------- the enforcer's side


def test_an_enforcer_that_comes_back_is_told_again(node: WatcherNode) -> None:
    assert node.enforcer
    node.pod("a", "300")
    node.started()
    node.wait_for(a=300_000)
    for _ in range(3):
        node.enforcer.stop()
        node.enforcer.got.clear()
        node.enforcer.start()
        until(node.enforcer.last, "the resent snapshot")
        assert node.sent()[0].revision == 1


def test_an_enforcer_that_comes_late_is_told_the_newest_only(make: Make) -> None:
    node = make()
    assert node.enforcer
    node.enforcer.stop()
    node.pod("a", "300")
    node.started()
    node.annotate("a", "290")
    node.annotate("a", "280")
    until(lambda: "280" in str(node.logs("wanted")[-1:]), "the last one")
    node.enforcer.start()
    node.wait_for(a=280_000)
    assert {pod.limit_mw for snapshot in node.sent() for pod in snapshot.pods} == {280_000}


def test_another_watcher_that_took_over_is_said_once(node: WatcherNode) -> None:
    assert node.enforcer
    node.enforcer.answer = lambda _: m.Error(code="stale", message="session x was replaced")
    node.started()
    until(lambda: len(node.sent()) >= 2, "two refusals")
    until(lambda: "another watcher took over" in node.page("/readyz")[1], "the reason")
    (line,) = node.logs("enforcer_refuses")
    assert line["code"] == "stale"
    node.enforcer.answer = report
    until(lambda: node.page("/readyz")[0] == 200, "green")


def test_nvml_that_fails_turns_ready_red(node: WatcherNode) -> None:
    assert node.enforcer
    node.enforcer.answer = lambda s: report(s, nvml="absent", nvml_message="no driver")
    node.started()
    expected = (503, "nvml: absent: no driver\n")
    until(lambda: node.page("/readyz") == expected, "the reason")


def test_an_answer_that_is_no_utf8_is_told_and_survived(
    node: WatcherNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = m.encode
    monkeypatch.setattr(m, "encode", lambda reply: encode(reply).replace(b"AAAA", b"\xff" * 4))
    assert node.enforcer
    node.enforcer.answer = lambda snapshot: report(snapshot, nvml="failing", nvml_message="AAAA")
    node.started()
    until(lambda: node.logs("enforcer_refuses"), "a word")
    assert "makes no sense" in node.page("/readyz")[1]
    assert node.stop() == 0
    assert node.errors == ""


# ---------------------------------------------------------------------- the API's side


def test_an_outage_changes_nothing_and_costs_no_list(node: WatcherNode) -> None:
    node.pod("a", "300")
    node.pod("b", "200")
    node.started()
    node.wait_for(a=300_000, b=200_000)
    with node.outage():
        before = len(node.sent())
        node.annotate("a", "310")
        node.api.delete_pod("default", "b")
        until(lambda: len(node.sent()) > before, "a heartbeat")
        assert {snapshot.revision for snapshot in node.sent()} == {1}
    node.wait_for(a=310_000)
    assert node.api.count("list") == 1
    (said,) = node.logs("kubernetes_failing")[-1:]
    assert "refused" in said["message"]
    assert len(node.logs("kubernetes_failing")) <= 2  # the broken watch, then the refusal
    until(lambda: node.logs("kubernetes_answers"), "the end of the outage said")
    assert len(node.logs("kubernetes_answers")) == 1


def test_api_down_at_start_is_waited_for_and_nothing_is_told(node: WatcherNode) -> None:
    node.pod("a", "300")
    with node.outage():
        node.start()
        until(lambda: "pods: not listed yet" in node.page("/readyz")[1], "the reason")
        stays(lambda: node.sent() == [], 1.0)
        assert "enforcer" not in node.page("/readyz")[1]  # which answers
        assert node.metric("power_agent_enforcer_up") == 1
        assert node.page("/healthz")[0] == 200
        assert len(node.logs("kubernetes_failing")) == 1
    node.wait_for(a=300_000)


@pytest.mark.parametrize("mid_line", [False, True])
def test_a_watch_that_ends_goes_on_where_it_was(node: WatcherNode, mid_line: bool) -> None:
    node.pod("a", "300")
    node.started()
    for count, watts in enumerate(range(301, 305), 1):
        until(
            lambda n=count: node.api.count("watch") >= n and node.api.open_watches == 1,  # type: ignore[misc]
            "the watch, not the one before",
        )
        node.annotate("a", str(watts))
        node.wait_for(a=watts * 1000)
        node.api.cut_watches(mid_line=mid_line)
    reason = "failed" if mid_line else "closed"
    restarts = "power_agent_watch_restarts_total"
    until(lambda: node.metric(restarts, reason=reason) == 4, "the last restart")
    until(lambda: node.api.open_watches == 1, "the watch")
    assert node.api.count("list") == 1
    assert node.metric("power_agent_list_requests_total") == 1


@pytest.mark.parametrize("how", ["HTTP 410", "ERROR event"])
def test_410_lists_once_and_swaps_the_whole_in(node: WatcherNode, how: str) -> None:
    node.pod("a", "300")
    node.pod("b", "200")
    node.started()
    node.wait_for(a=300_000, b=200_000)
    with node.outage() if how == "HTTP 410" else contextlib.nullcontext():
        node.annotate("a", "310")
        node.api.delete_pod("default", "b")
        node.api.compact()
        node.api.expire_watches()
    node.wait_for(a=310_000)
    until(lambda: node.api.open_watches == 1, "the watch")
    assert node.api.count("list") == 2
    # Every snapshot was the node as it was at some moment: none lacks `a`.
    assert all("a" in [pod.name for pod in snapshot.pods] for snapshot in node.sent())
    assert node.metric("power_agent_watch_restarts_total", reason="expired") == 1


def test_a_list_from_the_past_is_not_taken(node: WatcherNode) -> None:
    node.pod("early", "300")
    past = node.api.resource_version
    node.pod("a", "200")
    node.started()
    node.wait_for(early=300_000, a=200_000)
    node.api.delete_pod("default", "early")
    node.wait_for(a=200_000)
    told = len(node.sent())
    node.api.serve_stale_lists(past)
    node.api.expire_watches()
    until(lambda: node.api.count("watch") == 2, "another watch")
    assert node.api.count("list") == 3  # the one from the past, and one that is no older than held
    node.annotate("a", "210")
    node.wait_for(a=210_000)
    assert all("early" not in [p.name for p in s.pods] for s in node.sent()[told:])


def test_a_failing_server_is_not_hammered(node: WatcherNode) -> None:
    node.api.fail_next(1000, 503)
    node.start()
    until(lambda: node.api.count("list") >= 2, "a second try")
    stays(lambda: node.api.count() <= 8, 3)
    assert len(node.logs("kubernetes_failing")) == 1
    assert "503" in node.page("/readyz")[1]


def test_retry_after_is_obeyed(node: WatcherNode) -> None:
    node.pod("a", "300")
    node.api.fail_next(1, 429, verb="list", retry_after_s=2)
    node.start()
    node.wait_for(a=300_000)
    first_s, second_s = [each.at_s for each in node.api.requests() if each.verb == "list"]
    assert second_s - first_s >= 2


def test_a_rotated_token_is_read_again_without_a_word(make: Make) -> None:
    node = make(api=KubeApi(tokens={"old": "agent"}))
    token = node.folder / "token"
    token.write_text("old")
    node.api.write_kubeconfig(node.kubeconfig, token_file=token)
    node.pod("a", "300")
    node.started()
    node.wait_for(a=300_000)
    node.annotate("a", "305")
    node.wait_for(a=305_000)  # a watch that brought something may end at any time
    node.api.rotate_token("old", "new")
    token.write_text("new")
    node.api.cut_watches()
    node.annotate("a", "310")
    node.wait_for(a=310_000)
    assert node.logs("kubernetes_failing") == []
    assert node.api.count("list") == 1


def test_a_token_that_is_no_good_holds_and_is_said(make: Make) -> None:
    node = make(api=KubeApi(tokens={"good": "agent"}))
    token = node.folder / "token"
    token.write_text("bad")
    node.api.write_kubeconfig(node.kubeconfig, token_file=token)
    node.pod("a", "300")
    node.start()
    until(lambda: "401" in node.page("/readyz")[1], "the reason")
    assert node.sent() == []
    token.write_text("good")
    node.wait_for(a=300_000)


@pytest.mark.parametrize(
    ("namespace", "place"), [(None, "ClusterRole"), ("team-a", "Role in namespace team-a")]
)
def test_403_says_which_rule_is_missing(make: Make, namespace: str | None, place: str) -> None:
    more = {"WATCH_NAMESPACE": namespace} if namespace else {}
    node = make(api=KubeApi(tokens={"t": "agent"}), **more)
    node.api.write_kubeconfig(node.kubeconfig, token="t")
    node.api.deny("agent", "watch")
    node.start()
    until(lambda: node.logs("kubernetes_failing"), "the refusal")
    (line,) = node.logs("kubernetes_failing")
    rule = '- {apiGroups: [""], resources: ["pods"], verbs: ["get", "list", "watch"]}'
    assert f"{place}: {rule}" in line["message"]
    node.api.allow_all()
    until(lambda: node.api.open_watches == 1, "the watch")


def test_half_open_connections_leave_the_heartbeat_alone(node: WatcherNode) -> None:
    node.pod("a", "300")
    node.started()
    node.wait_for(a=300_000)
    node.api.freeze()
    node.annotate("a", "310")
    before = len(node.sent())
    until(lambda: len(node.sent()) >= before + 2, "two heartbeats")
    assert node.page("/healthz")[0] == 200
    node.api.thaw()
    node.wait_for(a=310_000)


# ---------------------------------------------------------------------- bad input


def test_an_unusable_annotation_is_said_once_per_change(node: WatcherNode) -> None:
    node.pod("a", "350W")
    node.started()
    node.wait_for(a=None)
    node.api.compact()
    node.api.expire_watches()  # a new list is no new value
    until(lambda: node.api.count("list") == 2, "another list")
    node.annotate("a", "lots")
    until(lambda: node.sent()[-1].revision == 2, "the other value")
    node.annotate("a", "300")
    node.wait_for(a=300_000)
    said = [(line["pod"], line["value"]) for line in node.logs("annotation_unusable")]
    assert said == [("a", "350W"), ("a", "lots")]


def test_an_annotation_of_64_kib_is_cut(node: WatcherNode) -> None:
    node.pod("a", "9" * 65536)
    node.pod("b", "300")
    node.started()
    first = node.wait_for(a=None, b=300_000)
    assert first.pods[0].raw == "9" * m.RAW_CHARS


def test_more_pods_than_a_message_holds_are_an_error_and_not_told(node: WatcherNode) -> None:
    for number in range(m.MAX_PODS + 1):
        node.pod(f"p{number}")
    node.start()
    until(lambda: node.logs("snapshot_impossible"), "the error")
    until(lambda: f"{m.MAX_PODS + 1} pods" in node.page("/readyz")[1], "the reason")
    stays(lambda: node.sent() == [], 2.5)
    node.api.delete_pod("default", "p0")
    until(node.sent, "a snapshot")
    assert len(node.sent()[-1].others) == m.MAX_PODS
    assert len(node.logs("snapshot_impossible")) == 1


# ---------------------------------------------------------------------- start and end


@pytest.mark.parametrize(
    ("number", "api"),
    [
        (signal.SIGTERM, "answers"),
        (signal.SIGINT, "answers"),
        (signal.SIGTERM, "says nothing"),  # other states: test_watcher_faults.py
    ],
)
def test_a_signal_ends_it_cleanly(node: WatcherNode, number: int, api: str) -> None:
    node.pod("a", "300")
    node.started()
    node.wait_for(a=300_000)
    if api == "says nothing":
        node.api.freeze()
    assert node.stop(number) == 0
    assert node.logs()[-1]["event"] == "stopped"
    assert node.errors == ""


# What else is refused: the tables of tests/unit/test_watcher_kube.py and test_settings.py.
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KUBECONFIG", "/no/such/file"),
        ("NODE_NAME", "Gpu_Node"),
        ("HTTP_PROXY", "squid.example:3128"),  # curl takes it; the API here is http
    ],
)
def test_a_setting_that_cannot_be_right_is_a_configuration_error(
    node: WatcherNode, variable: str, value: str
) -> None:
    node.environment[variable] = value
    _exits_2(node, variable, value)


def test_an_address_in_use_is_a_configuration_error(node: WatcherNode) -> None:
    with socket.create_server(("127.0.0.1", node.port)):
        _exits_2(node, "POWER_AGENT_METRICS_ADDR", str(node.port))


def _exits_2(node: WatcherNode, *parts: str) -> None:
    node.start()
    assert node.process
    assert ended(node.process) == 2
    (line,) = node.errors.splitlines()
    assert all(part in line for part in parts), line
    assert node.sent() == []


def test_a_proxy_is_told_at_the_start_and_in_errors_without_its_password(
    node: WatcherNode,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    node.environment |= {
        "HTTP_PROXY": f"http://user:s3cr3t%40@{address}",
        "NO_PROXY": "",
        "no_proxy": "",
    }
    node.start()
    until(lambda: node.logs("kubernetes_failing"), "a word of the API")
    (started,) = node.logs("started")
    assert started["proxy"] == f"http://{address}"
    (said, *_) = node.logs("kubernetes_failing")
    assert f"(through the proxy http://{address})" in said["message"]
    assert said["api"] == started["api"]
    assert f"(through the proxy http://{address})" in node.page("/readyz")[1]
    assert "s3cr3t" not in str(node.logs()) + node.errors + node.page("/readyz")[1]


def test_where_no_proxy_covers_the_server_none_is_told(node: WatcherNode) -> None:
    node.environment |= {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "127.0.0.0/8"}
    node.started()
    node.wait_for()
    assert "proxy" not in node.logs("started")[0]


def test_without_metrics_no_port_is_open(make: Make) -> None:
    node = make(POWER_AGENT_METRICS_ADDR="off")
    node.started()
    node.wait_for()
    assert node.process
    sockets = Path(f"/proc/{node.process.pid}/net/tcp").read_text()
    assert f":{node.port:04X} " not in sockets
    assert node.stop() == 0


# ---------------------------------------------------------------------- health


def test_slow_clients_do_not_keep_the_probes_out(node: WatcherNode) -> None:
    node.started()
    until(lambda: node.page("/healthz")[0] == 200, "health")
    with contextlib.ExitStack() as stack:
        for _ in range(40):  # each sends half a request and then nothing
            slow = socket.create_connection(("127.0.0.1", node.port))
            stack.enter_context(slow)
            slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        until(lambda: node.page("/healthz")[0] == 200, "health")
        assert node.process
        threads = len(list(Path(f"/proc/{node.process.pid}/task").iterdir()))
        assert threads <= 16
    assert node.page("/elsewhere")[0] == 404


# ---------------------------------------------------------------------- Events


def judged(snapshot: m.Snapshot) -> m.Report:
    """An enforcer whose only GPU takes what is asked, up to 700 W."""
    return report(snapshot, pods=[_judged(pod) for pod in snapshot.pods])


def _judged(pod: m.DesiredPod) -> m.Pod:
    state: m.PodState = "invalid"
    has = None
    if pod.limit_mw is not None:
        has = min(pod.limit_mw, 700_000)
        state = "enforced" if has == pod.limit_mw else "clamped"
    return m.Pod(
        uid=pod.uid,
        namespace=pod.namespace,
        name=pod.name,
        raw=pod.raw,
        requested_mw=pod.limit_mw,
        effective_mw=has,
        gpus=[] if has is None else ["GPU-1"],
        state=state,
        reason="because",
    )


def test_the_latency_counts_only_what_the_enforcer_says_it_enforced(node: WatcherNode) -> None:
    """The pods of one revision each, in this order; the last is there to see the end."""
    states: dict[str, m.PodState] = {
        "a-waiting": "waiting",
        "b-failed": "failed",
        "c-conflict": "conflict",
        "d-enforced": "enforced",
    }

    def answer(snapshot: m.Snapshot) -> m.Report:
        found = [_judged(pod) for pod in snapshot.pods]
        pods = [msgspec.structs.replace(pod, state=states[pod.name]) for pod in found]
        return report(snapshot, pods=pods)

    assert node.enforcer
    node.enforcer.answer = answer
    node.started()
    for name in states:
        node.pod(name, "300")
        until(lambda n=name: n in (node.wishes() or {}), name)  # type: ignore[misc]
    node.annotate("d-enforced", None)  # a removal, which is none
    until(lambda: "d-enforced" not in (node.wishes() or {}), "the removal")
    states |= dict.fromkeys([*states, "e-last"], "enforced")  # the first processes, after a while
    node.pod("e-last", "300")
    count = "power_agent_enforcement_latency_seconds_count"
    until(lambda: node.metric(count) == 2, "the two that were enforced")


def test_events_say_what_became_of_a_wish_only_when_it_changes(make: Make) -> None:
    node = make(POWER_AGENT_EVENTS="true")
    assert node.enforcer
    node.enforcer.answer = judged
    node.pod("a")
    node.started()
    node.wait_for()
    expected = []
    for value, reason in (
        ("300", "PowerLimitApplied"),
        ("350W", "InvalidPowerLimit"),
        ("900", "PowerLimitClamped"),
    ):
        node.annotate("a", value)
        expected.append(reason)
        until(lambda: {e["reason"] for e in node.api.events()} == set(expected), reason)
    before = len(node.sent())
    until(lambda: len(node.sent()) >= before + 2, "two heartbeats")
    assert len(node.api.events()) == 3
    (event,) = [e for e in node.api.events() if e["reason"] == "PowerLimitClamped"]
    assert event["involvedObject"]["name"] == "a"
    assert event["type"] == "Warning"
    assert event["message"] == "GPU power limit 700 W holds on GPU-1, asked for 900 W: because"


def test_an_event_of_a_static_pod_names_the_kubelets_id_of_it(make: Make) -> None:
    node = make(POWER_AGENT_EVENTS="true")
    assert node.enforcer
    node.enforcer.answer = judged
    id_ = "0123456789abcdef" * 2
    marks = {"kubernetes.io/config.hash": id_}
    node.pod("static", annotations=marks, owner={"kind": "Node", "name": NODE})
    node.started()
    node.wait_for()
    until(lambda: node.page("/readyz")[0] == 200, "the first report")
    node.annotate("static", "350")
    until(node.api.events, "the event")
    (event,) = node.api.events()
    assert event["involvedObject"]["uid"] == id_


def test_events_that_may_not_be_written_name_the_rule_and_delay_nothing(make: Make) -> None:
    node = make(api=KubeApi(tokens={"t": "agent"}), POWER_AGENT_EVENTS="true")
    node.api.write_kubeconfig(node.kubeconfig, token="t")
    node.api.deny("agent", "create", resource="events")
    assert node.enforcer
    node.enforcer.answer = judged
    node.pod("a")
    node.started()
    node.wait_for()
    for watts in range(300, 310):
        node.annotate("a", str(watts))
        node.wait_for(a=watts * 1000)
    until(lambda: node.logs("event_not_written"), "the reason")
    (line,) = node.logs("event_not_written")
    assert '- {apiGroups: [""], resources: ["events"], verbs: ["create"]}' in line["message"]


def test_no_events_unless_asked_for(node: WatcherNode) -> None:
    assert node.enforcer
    node.enforcer.answer = judged
    node.pod("a")
    node.started()
    node.wait_for()
    node.annotate("a", "300")
    node.wait_for(a=300_000)
    node.stop()
    assert node.api.count("create", resource="events") == 0


# ---------------------------------------------------------------------- cost


def test_idle_it_asks_logs_and_takes_next_to_nothing(node: WatcherNode) -> None:
    for number in range(8):
        node.pod(f"p{number}", "300" if number % 2 else None)
    node.started()
    until(lambda: len(node.sent()) >= 2, "a heartbeat")
    assert node.process
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident
    assert int(resident[1]) < 56 * 1024
    before = node.api.count(), len(node.logs()), len(node.sent())
    until(lambda: len(node.sent()) >= before[2] + 2, "two heartbeats")
    assert (node.api.count(), len(node.logs())) == before[:2]
    revisions = {snapshot.revision for snapshot in node.sent()}
    assert revisions == {1}


def test_each_change_is_counted_in_the_latency(node: WatcherNode) -> None:
    assert node.enforcer
    node.enforcer.answer = judged
    node.pod("a", "300")
    node.started()
    node.wait_for(a=300_000)
    for watts in range(301, 331):
        node.annotate("a", str(watts))
        node.wait_for(a=watts * 1000)
    count = node.metric("power_agent_enforcement_latency_seconds_count")
    assert count is not None
    assert count >= 29


# ---------------------------------------------------------------------- a kept connection


@pytest.mark.parametrize("closes", [1, 2])
def test_a_kept_connection_that_the_server_closes_is_no_failure_once(
    node: WatcherNode, closes: int
) -> None:
    """RFC 9112, 9.3.1: only asking tells; a second time in a row it is a failure like others."""
    with _closing_front(node.api.port, closes) as port:
        text = node.kubeconfig.read_text().replace(str(node.api.port), str(port))
        node.kubeconfig.write_text(text)
        node.pod("a", "300")
        node.started()
        node.wait_for(a=300_000)
        assert len(node.logs("kubernetes_failing")) == closes - 1
        assert node.stop() == 0


@contextlib.contextmanager
def _closing_front(behind: int, closes: int) -> Iterator[int]:
    """A port before the API that answers one list and takes the next `closes` requests away."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed
            client, _ = listener.accept()
            with client, socket.create_connection(("127.0.0.1", behind)) as server:
                server.sendall(client.recv(65536))
                answer = b""
                while not answer.rstrip().endswith((b"}", b"0")):
                    answer += server.recv(65536)
                client.sendall(answer)
                client.recv(65536)
            for _ in range(closes - 1):
                client, _ = listener.accept()
                client.recv(65536)
                client.close()
            while True:
                threading.Thread(target=_join, args=(listener.accept()[0], behind)).start()

    thread = threading.Thread(target=serve)
    thread.start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def _join(client: socket.socket, behind: int) -> None:
    with client, socket.create_connection(("127.0.0.1", behind)) as server:
        relay(client, server)
