"""List and watch: against the embedded API over real HTTP, and byte by byte against a script."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from shared.logs import Log
from tests.simnode.kubeapi import KubeApi
from tests.waiting import joined, until
from watcher import reflector
from watcher.kube import Api, ApiError
from watcher.metadata import LIST_ACCEPT, WATCH_ACCEPT, Pod, PodReader
from watcher.metrics import Counts
from watcher.reflector import (
    DOUBT_S,
    SILENT_S,
    STEADY_S,
    Heard,
    Listing,
    Pace,
    Reflector,
    Relisting,
    Resuming,
    Scope,
    Verdict,
    Watching,
    Worth,
)

KEY = "dynamo.nvidia.com/gpu-power-limit"
NODE = "node-a"
Wishes = dict[str, str | None]  # pod's name -> its annotation


class Lines(Log):
    """A log that can be looked at."""

    def __init__(self) -> None:
        super().__init__("watcher", "debug", "json")
        self.lines: list[tuple[str, str, dict[str, object]]] = []

    def _write(self, level: str, event: str, values: dict[str, object]) -> None:
        self.lines.append((level, event, values))

    def of(self, event: str) -> list[dict[str, object]]:
        return [values for _, seen, values in self.lines if seen == event]


def wishes(pods: Mapping[str, Pod]) -> Wishes:
    return {pod.name: pod.wish.raw if pod.wish else None for pod in pods.values()}


class Subject:
    """A reflector in a thread of its own, and all that it ever offered."""

    def __init__(
        self, api: reflector.Api, scope: Scope, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.offers: list[Wishes] = []
        self.log, self.counts = Lines(), Counts()
        self.reflector = Reflector(
            api, scope, PodReader(KEY), self._take, self.counts, self.log, clock
        )
        self.thread = threading.Thread(target=self.reflector.run, daemon=True)

    def _take(self, pods: Mapping[str, Pod], _arrived_at: float | None) -> None:
        self.offers.append(wishes(pods))

    @property
    def last(self) -> Wishes | None:
        return self.offers[-1] if self.offers else None

    def wait_for(self, wanted: Wishes) -> None:
        until(lambda: self.last == wanted, str(wanted), explain=lambda: f"it is {self.last}")

    def wait_for_text(self, text: str) -> None:
        until(lambda: text in (self.reflector.problem or ""), f"the problem {text!r}")


Start = Callable[..., Subject]


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with KubeApi() as made:
        yield made


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a reflector on an API; all end with the test."""
    subjects: list[Subject] = []
    clients: list[Api] = []

    def start(api: KubeApi, scope: Scope | None = None, token: str | None = None) -> Subject:
        kubeconfig = api.write_kubeconfig(tmp_path / "kubeconfig", token)
        clients.append(Api(str(kubeconfig), in_kubernetes=False))
        subjects.append(Subject(clients[-1], scope or Scope(NODE, None)))
        subjects[-1].thread.start()
        return subjects[-1]

    yield start
    for subject in subjects:
        subject.reflector.stop()
        joined(subject.thread)  # long before what it waits for has a time of its own
    for client in clients:
        client.close()


def add(
    api: KubeApi,
    name: str,
    watts: str | None = None,
    *,
    node: str = NODE,
    namespace: str = "default",
) -> None:
    annotations = {} if watts is None else {KEY: watts}
    api.create_pod(name, node=node, namespace=namespace, annotations=annotations)


def watching(api: KubeApi) -> None:
    until(lambda: api.open_watches == 1, "the watch")


# ---------------------------------------------------------------------- what is asked


def test_one_list_of_the_newest_state_then_a_watch_of_metadata_only(
    api: KubeApi, start: Start
) -> None:
    add(api, "a", "350")
    subject = start(api)
    watching(api)
    assert subject.last == {"a": "350"}
    listed, watched = [request for request in api.requests() if request.resource == "pods"]
    selector = "spec.nodeName%3Dnode-a%2Cstatus.phase%21%3DSucceeded%2Cstatus.phase%21%3DFailed"
    assert listed.path == f"/api/v1/pods?fieldSelector={selector}"  # no version: the newest
    assert listed.accept == LIST_ACCEPT
    assert watched.accept == WATCH_ACCEPT
    path, _, seconds = watched.path.rpartition("&timeoutSeconds=")
    version = api.resource_version
    asked = f"&watch=1&allowWatchBookmarks=true&resourceVersion={version}"
    assert path == f"/api/v1/pods?fieldSelector={selector}{asked}"
    assert 240 <= int(seconds) <= 300


def test_one_namespace_is_asked_for_where_one_is_named(api: KubeApi, start: Start) -> None:
    add(api, "a", "350", namespace="team")
    add(api, "b", "350")
    subject = start(api, Scope(NODE, "team"))
    watching(api)
    assert subject.last == {"a": "350"}
    assert {r.namespace for r in api.requests() if r.resource == "pods"} == {"team"}
    add(api, "c", "1")
    add(api, "d", "2", namespace="team")
    subject.wait_for({"a": "350", "d": "2"})


def test_each_change_arrives_and_other_nodes_pods_do_not(api: KubeApi, start: Start) -> None:
    subject = start(api)
    watching(api)
    assert subject.last == {}  # an empty node is a state like any other
    add(api, "a", "350")
    add(api, "foreign", "100", node="node-b")
    subject.wait_for({"a": "350"})
    api.annotate("default", "a", KEY, "400")
    subject.wait_for({"a": "400"})
    api.annotate("default", "a", KEY, None)
    subject.wait_for({"a": None})
    api.annotate("default", "a", KEY, "")
    subject.wait_for({"a": ""})
    api.set_phase("default", "a", "Succeeded")
    subject.wait_for({})
    assert all("foreign" not in offer for offer in subject.offers)
    assert api.count("list") == 1


def test_a_change_that_concerns_nothing_here_is_not_offered(api: KubeApi, start: Start) -> None:
    add(api, "a", "350")
    subject = start(api)
    watching(api)
    for number in range(20):
        api.annotate("default", "a", "something/else", str(number))
    add(api, "b")
    subject.wait_for({"a": "350", "b": None})
    assert len(subject.offers) == 2
    assert subject.counts.watch_events["MODIFIED"] == 20


# ---------------------------------------------------------------------- going on


def test_a_watch_that_the_server_ends_goes_on_without_a_list(start: Start) -> None:
    with KubeApi(bookmark_interval_s=0.02) as api:
        add(api, "a", "350")
        subject = start(api)
        for count in range(1, 4):
            watching(api)
            until(lambda: subject.counts.watch_events["BOOKMARK"], "a bookmark")
            subject.counts.watch_events.clear()
            api.cut_watches()
            until(lambda n=count: subject.counts.watch_restarts["closed"] == n, "the end")  # type: ignore[misc]
        api.annotate("default", "a", KEY, "400")
        subject.wait_for({"a": "400"})
        assert api.count("list") == 1
        assert subject.log.of("watch_expired") == []


@pytest.mark.parametrize("bookmarks", [True, False])
def test_bookmarks_save_the_list_after_a_quiet_time(start: Start, *, bookmarks: bool) -> None:
    """Without them the same reconnect costs a list: so much shows that this test can see one."""
    with KubeApi(bookmark_interval_s=0.02 if bookmarks else 60, history=20) as api:
        add(api, "a", "350")
        subject = start(api)
        watching(api)
        for number in range(50):
            add(api, f"foreign-{number}", node="node-b")
        reached = str(api.resource_version)
        if bookmarks:
            subject.counts.watch_events.clear()
            until(lambda: subject.counts.watch_events["BOOKMARK"] >= 2, "bookmarks")
        api.cut_watches()
        until(lambda: api.count("watch") >= 2, "another watch")
        watching(api)
        api.annotate("default", "a", KEY, "400")
        subject.wait_for({"a": "400"})
        assert api.count("list") == (1 if bookmarks else 2)
        if bookmarks:
            last = [r for r in api.requests() if r.verb == "watch"][-1]
            assert f"resourceVersion={reached}&" in last.path


def test_a_watch_that_ends_as_soon_as_it_is_open_is_a_failure(api: KubeApi, start: Start) -> None:
    """Or a server that does so would be asked without a pause."""
    subject = start(api)
    for _ in range(2):
        watching(api)
        api.cut_watches()
        until(lambda: api.open_watches == 0, "the end of the watch")
    watching(api)
    assert subject.counts.watch_restarts["closed"] == 0
    assert subject.counts.watch_restarts["failed"] >= 2
    assert api.count("list") == 1


# ---------------------------------------------------------------------- 410


@pytest.mark.parametrize("how", ["HTTP status", "ERROR event"])
def test_410_lists_once_and_at_once(api: KubeApi, start: Start, how: str) -> None:
    add(api, "a", "350")
    subject = start(api)
    watching(api)
    if how == "ERROR event":
        api.expire_watches()
    else:
        api.fail_next(1, 410, verb="watch")
        api.cut_watches(mid_line=True)
    until(lambda: api.count("list") == 2, "the second list")
    watching(api)
    assert subject.counts.watch_restarts["expired"] == 1
    assert api.count("list") == 2
    add(api, "b")
    subject.wait_for({"a": "350", "b": None})
    assert subject.log.of("reflector_failed") == []


def test_410_after_an_outage_is_no_reason_to_wait_any_longer(api: KubeApi, start: Start) -> None:
    """An API server that restarts forgets the past: then this is what its return looks like."""
    add(api, "a", "350")
    subject = start(api)
    watching(api)
    api.go_down()
    until(lambda: subject.counts.watch_restarts["failed"] >= 3, "failures")
    api.annotate("default", "a", KEY, "400")
    api.compact()
    api.come_back()
    until(lambda: api.count("watch") >= 2, "the first answer")
    subject.wait_for({"a": "400"})


def test_a_relist_is_swapped_in_whole(api: KubeApi, start: Start) -> None:
    before: Wishes = {**{f"old-{k}": "100" for k in range(50)}, "kept": "1"}
    after: Wishes = {**{f"new-{k}": "200" for k in range(50)}, "kept": "2"}
    for name, watts in before.items():
        add(api, name, watts)
    subject = start(api)
    watching(api)
    api.go_down()
    for number in range(50):
        api.delete_pod("default", f"old-{number}")
        add(api, f"new-{number}", "200")
    api.annotate("default", "kept", KEY, "2")
    api.compact()
    api.come_back()
    subject.wait_for(after)
    assert subject.offers == [before, after]
    add(api, "later", "3")
    subject.wait_for({**after, "later": "3"})  # nothing of before comes back with the next event


def test_a_relist_that_goes_back_in_time_is_not_taken(api: KubeApi, start: Start) -> None:
    """Where the server was as far as what is held, it has to list what is no older."""
    old = api.resource_version
    add(api, "a", "350")
    subject = start(api)
    watching(api)
    api.serve_stale_lists(old)
    api.expire_watches()
    until(lambda: api.count("watch") == 2, "another watch")
    assert subject.offers == [{"a": "350"}] * 2
    assert (api.count("list"), subject.log.of("kubernetes_restored")) == (3, [])


# ---------------------------------------------------------------------- a restored cluster


def test_a_restored_cluster_is_followed_soon(
    api: KubeApi, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its versions have gone back: a watch from where it was would bring nothing for hours."""
    monkeypatch.setattr(reflector, "DOUBT_S", (2, 2))
    add(api, "a", "350")
    backup = api.resource_version
    for watts in range(100):
        api.annotate("default", "a", KEY, str(watts))
    add(api, "b")
    held = api.resource_version
    subject = start(api)
    subject.wait_for({"a": "99", "b": None})
    watching(api)
    api.go_down()
    api.restore(backup)
    api.come_back()
    subject.wait_for({"a": "350"})
    watching(api)
    api.annotate("default", "a", KEY, "400")
    subject.wait_for({"a": "400"})
    asked = [r.path.partition("Failed")[2] for r in api.requests() if r.verb == "list"]
    assert asked == ["", f"&resourceVersion={held}&resourceVersionMatch=NotOlderThan", ""]
    (told,) = subject.log.of("kubernetes_restored")
    assert told == {"held": str(held), "listed": str(backup)}
    assert subject.counts.watch_restarts["expired"] == 1


def test_a_watch_that_proves_itself_after_an_outage_costs_no_list(
    api: KubeApi, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflector, "DOUBT_S", (5, 5))
    add(api, "a", "350")
    subject = start(api)
    watching(api)
    api.go_down()
    api.come_back()
    until(lambda: api.count("watch") >= 2 and api.open_watches == 1, "the watch in doubt")
    api.annotate("default", "a", KEY, "400")
    until(lambda: api.count("watch") >= 3, "the next one")
    subject.wait_for({"a": "400"})
    assert api.count("list") == 1


def test_a_server_that_only_lags_behind_was_not_restored() -> None:
    """It says the same, but the newest list shows that nothing went back."""
    subject, api, _ = run_script([pod_list(10)])
    api.answers.append(ScriptedAnswer([pod_list(11, meta("a", "1", 11))]))
    assert subject.reflector.step(Listing(rewound=True)) == Resuming("11")
    assert subject.last == {"a": "1"}
    assert subject.log.of("kubernetes_restored") == []


# ---------------------------------------------------------------------- outages


def _refused(api: KubeApi) -> None:
    api.go_down()


def _frozen(api: KubeApi) -> None:
    api.freeze()


def _cut(api: KubeApi) -> None:
    api.cut_watches()


def _cut_mid_line(api: KubeApi) -> None:
    api.cut_watches(mid_line=True)


def _status(status: int) -> Callable[[KubeApi], None]:
    def fail(api: KubeApi) -> None:
        busy = status == 429
        api.fail_next(1 if busy else 2, status, retry_after_s=1 if busy else None)
        api.cut_watches(mid_line=True)

    return fail


OUTAGES = {
    "refused": _refused,
    "frozen": _frozen,
    "cut": _cut,
    "cut in the middle of a line": _cut_mid_line,
    "503": _status(503),
    "429": _status(429),
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_no_outage_empties_what_is_held_or_costs_a_list(
    api: KubeApi, start: Start, outage: str
) -> None:
    add(api, "a", "350")
    add(api, "b", "1")
    subject = start(api)
    watching(api)
    OUTAGES[outage](api)
    api.annotate("default", "a", KEY, "400")
    api.delete_pod("default", "b")
    time.sleep(0.05)  # an outage takes its time
    api.thaw()
    api.come_back()
    subject.wait_for({"a": "400"})
    assert all("a" in offer for offer in subject.offers)
    assert api.count("list") == 1


@pytest.mark.parametrize("outage", ["refused", "503"])
def test_api_down_at_start_offers_nothing_until_it_lists(
    api: KubeApi, start: Start, outage: str
) -> None:
    add(api, "a", "350")
    OUTAGES[outage](api)
    subject = start(api)
    until(lambda: subject.reflector.problem, "the reason")
    assert (subject.reflector.listed, subject.offers) == (False, [])
    api.come_back()
    subject.wait_for({"a": "350"})
    assert (subject.reflector.listed, subject.offers) == (True, [{"a": "350"}])
    until(lambda: subject.log.of("kubernetes_answers"), "the end of the outage said")
    (said,) = subject.log.of("kubernetes_failing")  # though it tried more than once
    assert isinstance(said["next_try_s"], float)
    assert said["next_try_s"] > 0
    assert "no list of pods yet" in str(said["holds"])


def test_retry_after_is_obeyed(api: KubeApi, start: Start) -> None:
    api.fail_next(1, 429, retry_after_s=1)
    begun_s = time.monotonic()
    subject = start(api)
    subject.wait_for({})
    assert time.monotonic() - begun_s >= 1.0


@pytest.mark.parametrize(
    ("verb", "namespace", "kind"),
    [("list", None, "ClusterRole"), ("watch", "team", "Role in namespace team")],
)
def test_403_says_once_which_rule_to_paste(
    start: Start, verb: str, namespace: str | None, kind: str
) -> None:
    with KubeApi(tokens={"secret": "system:serviceaccount:dynamo-system:power-agent"}) as api:
        api.create_namespace("team")
        api.deny("system:serviceaccount:dynamo-system:power-agent", verb)
        subject = start(api, Scope(NODE, namespace), "secret")
        rule = '- {apiGroups: [""], resources: ["pods"], verbs: ["get", "list", "watch"]}'
        subject.wait_for_text(f"add to the rules of the watcher's {kind}: {rule}")
        assert "power-agent" in str(subject.reflector.problem)  # who may not
        until(lambda: api.count(verb) >= 3, "more tries")
        assert len(subject.log.of("kubernetes_failing")) == 1
        api.allow_all()
        until(lambda: api.open_watches == 1, "the watch")


# ---------------------------------------------------------------------- verdicts


DOWN, GONE = ApiError("down"), ApiError("gone", 410)
AHEAD = ApiError("ahead", 504, 1, too_large=True)
SHORT_S, MINUTE_S = STEADY_S - 0.1, DOUBT_S[0] - STEADY_S
IN_DOUBT = Watching("9", 0.0, doubtful=True)
BARE, FRUITFUL, STEADY, SILENT = Worth.BARE, Worth.FRUITFUL, Worth.STEADY, Worth.SILENT


@pytest.mark.parametrize(
    ("state", "lasted_s", "worth"),
    [
        (Watching("9", 0.0), 0.0, BARE),
        (Watching("9", 0.0), SHORT_S, BARE),
        (Watching("9", 0.0, fruitful=True), 0.0, FRUITFUL),
        (Watching("9", 0.0, fruitful=True), SHORT_S, FRUITFUL),
        (Watching("9", 0.0), STEADY_S, STEADY),
        (Watching("9", 0.0, fruitful=True), STEADY_S, STEADY),
        (Watching("9", 0.0), 300.0, STEADY),
        (IN_DOUBT, SHORT_S, BARE),
        (IN_DOUBT, MINUTE_S - 0.1, STEADY),
        (IN_DOUBT, MINUTE_S, SILENT),
    ],
)
@pytest.mark.parametrize(
    ("error", "cause"), [(None, "closed"), (DOWN, "failed"), (GONE, "expired"), (AHEAD, "expired")]
)
def test_what_a_watch_was_worth_is_another_question_than_what_ended_it(
    state: Watching, lasted_s: float, worth: Worth, error: ApiError | None, cause: str
) -> None:
    judged = reflector.verdict(state, error, lasted_s)
    if error is None and worth is BARE:
        cause = "failed"  # a server that ends each watch at once is not to be asked at once
    assert (judged.worth, judged.cause) == (worth, cause)
    assert judged.lasted == (worth in (STEADY, SILENT))


@pytest.mark.parametrize(
    ("state", "error", "cause"),
    [
        (Listing(), DOWN, "failed"),
        (Listing(), GONE, "failed"),  # it asked for no version
        (Relisting("7"), DOWN, "failed"),
        (Relisting("7"), AHEAD, "expired"),
        (Resuming("7"), DOWN, "failed"),
        (Resuming("7"), GONE, "expired"),
    ],
)
def test_a_request_that_fails_is_worth_nothing(
    state: reflector.State, error: ApiError, cause: str
) -> None:
    judged = reflector.verdict(state, error, 1000.0)
    assert (judged.worth, judged.cause) == (BARE, cause)


def after(state: reflector.State, error: ApiError | None, now_s: float = 0.0) -> reflector.State:
    return reflector.after_end(state, error, reflector.verdict(state, error, now_s))


def test_after_each_failure_it_is_known_where_to_go_on() -> None:
    watch = Watching("9", 0.0)
    assert after(Listing(), DOWN) == Listing()
    assert after(Resuming("7"), DOWN) == Resuming("7", doubtful=True)
    assert after(watch, DOWN) == Resuming("9", doubtful=True)
    assert after(Relisting("7"), DOWN) == Relisting("7")
    for state in (Resuming("7"), Relisting("7"), watch):
        assert after(state, GONE) == Listing()
    assert after(Relisting("7"), AHEAD) == Listing(rewound=True)
    assert after(Listing(rewound=True), DOWN) == Listing(rewound=True)


def test_a_watch_that_ends_in_order_goes_on_where_it_was_and_keeps_its_doubt() -> None:
    assert after(Watching("9", 0.0), None, 300.0) == Resuming("9")
    assert after(Watching("9", 0.0, fruitful=True), None) == Resuming("9")
    assert after(IN_DOUBT, None, 2.0) == Resuming("9", doubtful=True)


@pytest.mark.parametrize("error", [None, DOWN])
@pytest.mark.parametrize(("lasted_s", "listed"), [(58.0, False), (60.0, True)])
def test_a_watch_in_doubt_that_was_silent_for_a_minute_is_doubted_however_it_ends(
    lasted_s: float, error: ApiError | None, *, listed: bool
) -> None:
    """A proxy may cut what is silent for a minute before the server ends it in order."""
    following = Relisting("9") if listed else Resuming("9", doubtful=True)
    assert after(IN_DOUBT, error, lasted_s) == following


@pytest.mark.parametrize("status", [400, 403, 422])
def test_a_server_that_refuses_to_list_what_is_no_older_is_watched_all_the_same(
    status: int,
) -> None:
    assert after(Relisting("7"), ApiError("not that", status)) == Resuming("7", doubtful=True)


# ---------------------------------------------------------------------- waits


FAILED, EXPIRED = Verdict(BARE, "failed"), Verdict(BARE, "expired")
ENDED_SOON, LASTED = Verdict(FRUITFUL, "closed"), Verdict(STEADY, "closed")
TORN, EXPIRED_LATE = Verdict(FRUITFUL, "failed"), Verdict(STEADY, "expired")


@pytest.mark.parametrize(
    ("ends", "waits"),
    [
        # Five tries in the half minute that a server takes to restart.
        ([FAILED] * 6, [0.25, 1, 4, 16, 30, 30]),
        ([FAILED] * 3 + [LASTED, FAILED], [0.25, 1, 4, 0, 0.25]),
        ([FAILED] * 3 + [Verdict(SILENT, "closed"), FAILED], [0.25, 1, 4, 0, 0.25]),
        # What lasted begins anew, also where it ends in a failure.
        ([FAILED] * 3 + [Verdict(STEADY, "failed")] * 2, [0.25, 1, 4, 0.25, 0.25]),
        # Only the first 410 in a row is free, also where an event comes before it.
        ([EXPIRED, EXPIRED, EXPIRED, FAILED, EXPIRED], [0, 0.25, 1, 4, 0]),
        ([Verdict(FRUITFUL, "expired")] * 6, [0, 0.25, 1, 4, 16, 30]),
        ([EXPIRED_LATE] * 3, [0, 0, 0]),
        # A short watch that brings something waits a second at most.
        ([TORN] * 6, [0.25, 1, 1, 1, 1, 1]),
        ([ENDED_SOON] * 6, [0, 0.25, 1, 1, 1, 1]),
        ([FAILED] * 4 + [ENDED_SOON] * 2, [0.25, 1, 4, 16, 0, 1]),
    ],
)
def test_each_end_has_its_wait(ends: list[Verdict], waits: list[float]) -> None:
    pace, seen = Pace(), []
    for judged in ends:
        pace = pace.after(judged, 64.0)
        seen.append(pace.wait_s)
    assert seen == waits


def test_waits_are_jittered() -> None:
    """So that the nodes of a cluster do not come at once."""
    assert Pace().after(FAILED, 0.0, share=0.5).wait_s == 0.125


def test_retry_after_is_the_least_and_never_more_than_30_seconds() -> None:
    assert Pace().after(FAILED, 0.0, share=0.5, least_s=7).wait_s == 7
    assert Pace().after(FAILED, 0.0, least_s=1e300).wait_s == 30


class Watched:
    """An API whose list and first watches are scripted, on a clock that each read moves on."""

    def __init__(self, *watches: tuple[float, list[bytes | ApiError]]) -> None:
        self.watches = list(watches)
        self.now_s = 1000.0
        self.asked_s: list[str] = []
        self.timeouts_s: list[float] = []

    def get(
        self, _path: str, query: Mapping[str, str], *, accept: str, read_timeout_s: float
    ) -> ScriptedAnswer:
        assert accept
        if "watch" not in query:
            return ScriptedAnswer([pod_list(10)])
        assert read_timeout_s > min(69, float(query["timeoutSeconds"]))
        self.asked_s.append(query["timeoutSeconds"])
        self.timeouts_s.append(read_timeout_s)
        lasts_s, pieces = self.watches.pop(0)
        return ScriptedAnswer(pieces, lambda: self._pass(lasts_s))

    def _pass(self, seconds: float) -> None:
        self.now_s += seconds


def test_the_first_watch_after_a_failure_is_short_and_its_end_says_that_all_is_well() -> None:
    """A read that is waited in cannot look at the clock, and nothing may happen for a minute."""
    api = Watched((0.5, [ApiError("torn")]), (2.5, []), (300.0, []))
    subject = Subject(api, Scope(NODE, None), lambda: api.now_s)
    waits = Waits(3)
    subject.reflector._stop = waits
    subject.reflector.run()
    proof, doubt = int(api.asked_s[1]), int(api.asked_s[2])
    assert int(api.asked_s[0]) >= 240
    assert STEADY_S < proof <= 3  # or its orderly end would prove nothing, or come late
    assert 60 <= doubt <= 75  # the doubt is still to be settled
    assert [event for _, event, _ in subject.log.lines] == [
        "kubernetes_failing",
        "kubernetes_answers",
    ]
    assert subject.log.of("kubernetes_answers") == [{"outage_s": 2.5}]
    assert subject.reflector.problem is None


HUNG = ApiError("timed out", silent=True)


def test_silence_is_noticed_after_a_minute_and_a_server_without_bookmarks_is_not_blamed() -> None:
    """Its kernel goes on acknowledging, so only silence tells: a bookmark comes each minute."""
    quiet = Watched((SILENT_S, [HUNG]), (SILENT_S, [HUNG]), (0.0, [ApiError("torn")]))
    subject = Subject(quiet, Scope(NODE, None), lambda: quiet.now_s)
    seen: list[Heard] = []
    waits = Waits(3, lambda: seen.append(subject.reflector.heard()))
    subject.reflector._stop = waits
    subject.reflector.run()
    assert [(heard.age_s, heard.error) for heard in seen] == [(70, ""), (70, ""), (0, "torn")]
    assert dict(subject.counts.watch_restarts) == {"closed": 2, "expired": 0, "failed": 1}
    assert quiet.timeouts_s == [SILENT_S] * 3


def test_the_servers_last_word_is_the_newest_of_list_head_event_and_bookmark() -> None:
    line = json.dumps({"type": "BOOKMARK", "object": meta("", "", 11)}).encode() + b"\n"
    api = Watched((50.0, [line, ApiError("torn")]))
    subject = Subject(api, Scope(NODE, None), lambda: api.now_s)
    assert (subject.reflector.heard().age_s, subject.reflector.heard().silent_s) == (None, 0)
    api.now_s += 5
    assert subject.reflector.heard() == Heard(5, never=True)
    state = subject.reflector.step(Listing())
    ages = [subject.reflector.heard().age_s]
    api.now_s += 3
    for _ in range(2):
        state = subject.reflector.step(state)
        ages.append(subject.reflector.heard().age_s)
    assert ages == [0, 0, 0]
    with pytest.raises(ApiError):
        subject.reflector.step(state)
    assert subject.reflector.heard().age_s == 50


# ---------------------------------------------------------------------- byte by byte


class ScriptedAnswer:
    """Brings the given pieces, then ends; has the shape of kube.Answer."""

    def __init__(
        self, pieces: list[bytes | ApiError], on_read: Callable[[], None] = lambda: None
    ) -> None:
        self.pieces, self.closed, self.on_read = pieces, False, on_read

    def read(self) -> bytes:
        self.on_read()
        piece = self.pieces.pop(0) if self.pieces else b""
        if isinstance(piece, ApiError):
            raise piece
        return piece

    def read_all(self, limit_bytes: int) -> bytes:
        body = b"".join(iter(self.read, b""))
        assert len(body) <= limit_bytes
        return body

    def interrupt(self) -> None:
        self.pieces = []

    def close(self) -> None:
        self.closed = True


class ScriptedApi:
    """Gives one answer after the other and notes what was asked."""

    def __init__(self, *answers: list[bytes | ApiError]) -> None:
        self.answers = [ScriptedAnswer(list(answer)) for answer in answers]
        self.asked: list[Mapping[str, str]] = []

    def get(
        self, _path: str, query: Mapping[str, str], *, accept: str, read_timeout_s: float
    ) -> ScriptedAnswer:
        assert accept
        assert read_timeout_s > 0
        self.asked.append(query)
        return self.answers.pop(0)


def meta(name: str, watts: str, version: int) -> dict[str, object]:
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": f"uid-{name}",
            "resourceVersion": str(version),
            "annotations": {KEY: watts},
        }
    }


def pod_list(version: int, *items: dict[str, object]) -> bytes:
    return json.dumps({"metadata": {"resourceVersion": str(version)}, "items": items}).encode()


def line(kind: str, thing: dict[str, object]) -> bytes:
    return json.dumps({"type": kind, "object": thing}).encode() + b"\n"


def run_script(*answers: list[bytes | ApiError]) -> tuple[Subject, ScriptedApi, ApiError | None]:
    """Step until a step fails or the script is at its end."""
    api = ScriptedApi(*answers)
    subject = Subject(api, Scope(NODE, None))
    state: reflector.State = Listing()
    try:
        while api.answers or isinstance(state, Watching):
            state = subject.reflector.step(state)
    except ApiError as error:
        return subject, api, error
    return subject, api, None


class EndlessApi:
    """Lists always succeed; each watch brings what `pieces` makes of its number."""

    def __init__(
        self,
        pieces: Callable[[int], list[bytes | ApiError]],
        version: Callable[[int], int] = lambda _: 10,
    ) -> None:
        self.pieces, self.version = pieces, version
        self.lists = self.watches = 0

    def get(
        self, _path: str, query: Mapping[str, str], *, accept: str, read_timeout_s: float
    ) -> ScriptedAnswer:
        assert accept
        assert read_timeout_s > 0
        if "watch" in query:
            self.watches += 1
            return ScriptedAnswer(self.pieces(self.watches))
        self.lists += 1
        return ScriptedAnswer([pod_list(self.version(self.lists), meta("a", "350", 9))])


class Waits(threading.Event):
    """Stands in for the reflector's `_stop`: notes how long it would wait, and ends it at last."""

    def __init__(self, most: int = 12, on_wait: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.most, self.seconds, self.on_wait = most, list[float](), on_wait

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        self.on_wait()
        if len(self.seconds) == self.most:
            self.set()
        return self.is_set()


def run_endless(api: EndlessApi) -> tuple[Subject, list[float]]:
    """Reflect until it has waited 12 times; return the seconds too."""
    subject, waits = Subject(api, Scope(NODE, None)), Waits()
    subject.reflector._stop = waits
    subject.reflector.run()
    return subject, waits.seconds


def grows(seconds: list[float]) -> bool:
    """Tell whether these are the waits after one failure, after two, and so on."""
    return all(0.125 * 4**k <= s <= min(30, 0.25 * 4**k) or s >= 15 for k, s in enumerate(seconds))


def grows_to_a_second(seconds: list[float]) -> bool:
    return grows(seconds[:2]) and all(0.5 <= s <= 1 for s in seconds[1:])


def error_event(code: int) -> bytes:
    return line("ERROR", {"code": code, "message": "because"})


def bookmark(version: int) -> bytes:
    return line("BOOKMARK", {"metadata": {"resourceVersion": str(version)}})


def test_a_watch_that_is_accepted_and_then_fails_each_time_is_one_failure() -> None:
    """A server tells etcd's trouble as 200 with an ERROR event."""
    subject, waits = run_endless(EndlessApi(lambda _: [error_event(500)]))
    assert [event for _, event, _ in subject.log.lines] == ["kubernetes_failing"]
    assert subject.counts.watch_restarts["failed"] == 12
    assert grows(waits)


def test_an_event_before_each_failure_makes_no_storm() -> None:
    def pieces(number: int) -> list[bytes | ApiError]:
        return [line("MODIFIED", meta("a", "350", 10 + number)), ApiError("torn")]

    subject, waits = run_endless(EndlessApi(pieces))
    assert [event for _, event, _ in subject.log.lines] == ["kubernetes_failing"]
    assert grows_to_a_second(waits)


def test_only_the_first_410_in_a_row_is_free_also_where_an_event_comes_before() -> None:
    api = EndlessApi(lambda n: [bookmark(10 * n + 1), error_event(410)], lambda n: 10 * n)
    subject, waits = run_endless(api)
    assert (waits[0], grows(waits[1:])) == (0, True)
    assert api.lists == 12  # one for each
    assert subject.counts.watch_restarts["expired"] == 12


def test_only_the_first_short_watch_that_ends_in_order_is_free() -> None:
    api = EndlessApi(lambda _: [bookmark(10)])
    subject, waits = run_endless(api)
    assert (waits[0], grows_to_a_second(waits[1:])) == (0, True)
    assert (api.lists, subject.log.lines) == (1, [])
    assert subject.counts.watch_restarts == {"closed": 12, "expired": 0, "failed": 0}


def test_short_watches_between_failures_are_no_recovery() -> None:
    api = EndlessApi(lambda number: [bookmark(10)] if number % 2 else [error_event(500)])
    subject, _ = run_endless(api)
    assert [event for _, event, _ in subject.log.lines] == ["kubernetes_failing"]


def test_a_watch_that_lasted_may_end_without_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "STEADY_S", 0.0)
    subject, _, error = run_script([pod_list(10)], [], [], [])
    assert (error, subject.counts.watch_restarts["closed"]) == (None, 3)


def test_a_problem_whose_numbers_change_is_told_once() -> None:
    """A server that breaks its word: each list has another version, older than was asked for."""
    api = EndlessApi(lambda _: [error_event(410)], lambda n: 1000 if n == 1 else 100 + n)
    subject, _ = run_endless(api)
    assert len(subject.log.of("kubernetes_failing")) == 1
    assert f"older ({100 + api.lists})" in str(subject.reflector.problem)  # the newest
    assert subject.counts.watch_restarts == {"closed": 0, "expired": 1, "failed": 11}
    assert len(subject.offers) == 1


def test_lists_that_fail_are_counted(api: KubeApi, start: Start) -> None:
    api.fail_next(2, 503)
    subject = start(api)
    subject.wait_for({})
    assert subject.counts.watch_restarts["failed"] == 2


EVENTS = b"".join(
    [
        line("ADDED", meta("a", "１", 11)),
        line("MODIFIED", meta("a", "2", 12)),
        b"\n",
        line("ADDED", meta("b", "3", 13)),
        line("BOOKMARK", {"metadata": {"resourceVersion": "20"}}),
        line("DELETED", meta("b", "3", 21)),
    ]
)


def test_a_watch_that_ends_in_order_after_an_event_is_no_failure() -> None:
    subject, api, error = run_script([pod_list(10)], [EVENTS], [EVENTS], [EVENTS])
    assert error is None
    assert subject.counts.watch_restarts == {"closed": 3, "expired": 0, "failed": 0}
    assert subject.log.lines == []
    assert len(api.asked) == 4


@pytest.mark.parametrize("seed", range(20))
def test_lines_may_be_cut_anywhere(seed: int) -> None:
    chance = random.Random(seed)
    cuts = sorted(chance.sample(range(1, len(EVENTS)), chance.choice([0, 1, 3, 40])))
    pieces: list[bytes | ApiError] = [
        EVENTS[a:b] for a, b in zip([0, *cuts], [*cuts, len(EVENTS)], strict=True)
    ]
    subject, api, error = run_script([pod_list(10)], pieces, [])
    assert subject.last == {"a": "2"}
    assert [query.get("resourceVersion") for query in api.asked] == [None, "10", "21"]
    assert error is not None  # the last watch, which brought nothing


def test_a_burst_in_one_piece_is_one_offer() -> None:
    subject, _, _ = run_script([pod_list(10)], [EVENTS])
    assert subject.offers == [{}, {"a": "2"}]


BROKEN = {
    "no JSON": b"{nonsense}\n",
    "HTML": b"<html>502 Bad Gateway</html>\n",
    "no object": b'{"type":"ADDED"}\n',
    "another type": line("SURPRISE", meta("x", "1", 15)),
    "a pod without uid": line("ADDED", {"metadata": {"name": "x", "resourceVersion": "15"}}),
    "no UTF-8": line("ADDED", meta("x", "1", 15)).replace(b"default", b"\xff\xfe"),
    "an error": line("ERROR", {"code": 500, "message": "etcd is gone"}),
    "an error without code": line("ERROR", {}),
    "too long": b"x" * (reflector.LINE_BYTES + 1) + b"\n",
    "too long without end": b"x" * (reflector.LINE_BYTES + 1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_came_before_a_broken_event_holds_and_nothing_is_released(what: str) -> None:
    before = pod_list(10, meta("kept", "1", 9))
    pieces: list[bytes | ApiError] = [line("ADDED", meta("a", "2", 14)), BROKEN[what]]
    if not what.startswith("too long"):
        pieces = [b"".join(piece for piece in pieces if isinstance(piece, bytes))]
    subject, _, error = run_script([before], pieces)
    assert error is not None
    assert subject.last == {"kept": "1", "a": "2"}


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"<html>", pod_list(10, meta("a", "1", 9))[:-3], pod_list(10, {})]
)
def test_a_broken_list_is_not_taken(body: bytes) -> None:
    subject, _, error = run_script([body])
    assert "makes no sense" in str(error)
    assert (subject.offers, subject.reflector.listed) == ([], False)


def test_versions_need_not_be_numbers() -> None:
    """Old rules call them opaque; then only going back in time cannot be noticed."""
    body = json.dumps({"metadata": {"resourceVersion": "v-x"}, "items": []}).encode()
    subject, api, _ = run_script([body], [line("ADDED", meta("a", "1", 5))])
    assert subject.last == {"a": "1"}
    assert api.asked[1]["resourceVersion"] == "v-x"


def test_an_error_of_its_own_is_told_and_ends_in_a_new_list(api: KubeApi, start: Start) -> None:
    add(api, "a", "350")
    subject = start(api)
    watching(api)
    broken = subject.reflector._reader
    subject.reflector._reader = None  # type: ignore[assignment]
    api.annotate("default", "a", KEY, "400")
    until(lambda: subject.log.of("reflector_failed"), "the error")
    subject.reflector._reader = broken
    subject.wait_for({"a": "400"})
    assert subject.thread.is_alive()


# ---------------------------------------------------------------------- any order


@pytest.mark.parametrize("seed", range(6))
def test_any_stream_ends_in_the_truth_and_never_hides_a_pod(
    api: KubeApi, start: Start, seed: int
) -> None:
    """Three pods live throughout; their values only rise, so that a step back would be seen."""
    chance = random.Random(seed)
    truth: Wishes = {f"lasting-{k}": "1" for k in range(3)}
    for name, watts in truth.items():
        add(api, name, watts)
    subject = start(api)
    watching(api)
    for number in range(2, 62):
        _disturb(api, chance)
        _change(api, chance, truth, number)
        if chance.random() < 0.2:
            time.sleep(chance.choice([0.001, 0.02]))  # when it happens is the input here
    api.thaw()
    api.come_back()
    subject.wait_for(truth)
    _check_offers(subject.offers)


def _disturb(api: KubeApi, chance: random.Random) -> None:
    kind = chance.randrange(30)
    if kind == 0:
        api.expire_watches()
    elif kind == 1:
        api.cut_watches(mid_line=chance.random() < 0.5)
    elif kind == 2:
        api.compact()
    elif kind == 3:
        api.fail_next(1, chance.choice([410, 410, 500]), verb=chance.choice(["watch", "list"]))
    elif kind == 4:
        api.freeze()
    elif kind == 5:
        api.go_down()
    else:
        api.thaw()
        api.come_back()


def _change(api: KubeApi, chance: random.Random, truth: Wishes, number: int) -> None:
    fleeting = sorted(name for name in truth if name.startswith("fleeting"))
    kind = chance.randrange(5)
    if kind == 0:
        name, watts = f"fleeting-{number}", chance.choice([None, str(number)])
        add(api, name, watts)
        truth[name] = watts
    elif kind == 1 and fleeting:
        name = chance.choice(fleeting)
        with contextlib.suppress(KeyError):
            del truth[name]
        if chance.random() < 0.5:
            api.set_phase("default", name, "Failed")
        else:
            api.delete_pod("default", name)
    else:
        name = chance.choice([f"lasting-{k}" for k in range(3)])
        api.annotate("default", name, KEY, str(number))
        truth[name] = str(number)


def _check_offers(offers: list[Wishes]) -> None:
    for name in (f"lasting-{k}" for k in range(3)):
        values = [int(str(offer.get(name))) for offer in offers]  # never absent
        assert values == sorted(values)
