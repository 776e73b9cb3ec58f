"""The metrics page as a strict reader sees it, and the HTTP server that has to survive anyone."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import __version__
from shared import messages as m
from shared.settings import SettingsError
from tests.simnode.exposition import Family, read
from tests.waiting import HANG_S, until
from watcher import health, metrics
from watcher.metrics import Counts, Link, Sources
from watcher.reflector import Heard
from watcher.settings import Address

# ---------------------------------------------------------------------- names and labels

CONTRACT: dict[str, tuple[str, set[str]]] = {
    "power_agent_gpu_limit_watts": ("gauge", {"gpu", "UUID"}),
    "power_agent_gpu_enforced_limit_watts": ("gauge", {"gpu", "UUID"}),
    "power_agent_gpu_default_limit_watts": ("gauge", {"gpu", "UUID"}),
    "power_agent_gpu_min_limit_watts": ("gauge", {"gpu", "UUID"}),
    "power_agent_gpu_max_limit_watts": ("gauge", {"gpu", "UUID"}),
    "power_agent_gpu_power_watts": ("gauge", {"gpu", "UUID"}),
    "power_agent_gpu_managed": ("gauge", {"gpu", "UUID"}),
    "power_agent_pod_requested_limit_watts": ("gauge", {"namespace", "pod"}),
    "power_agent_pod_effective_limit_watts": ("gauge", {"namespace", "pod", "gpu", "UUID"}),
    "power_agent_pod_state": ("gauge", {"namespace", "pod", "state"}),
    "power_agent_limit_writes_total": ("counter", {"gpu", "UUID", "reason"}),
    "power_agent_limit_write_failures_total": ("counter", {"gpu", "UUID", "error"}),
    "power_agent_enforcement_latency_seconds": ("histogram", {"le"}),
    "power_agent_limit_lead_seconds": ("histogram", {"le"}),
    "power_agent_watch_events_total": ("counter", {"type"}),
    "power_agent_watch_restarts_total": ("counter", {"reason"}),
    "power_agent_list_requests_total": ("counter", set()),
    "power_agent_enforcer_up": ("gauge", set()),
    "power_agent_snapshot_age_seconds": ("gauge", set()),
    "power_agent_denied_messages_total": ("counter", {"reason"}),
    "power_agent_dropped_log_lines_total": ("counter", {"component"}),
    "power_agent_build_info": ("gauge", {"version"}),
    "power_agent_gpu_target_limit_watts": ("gauge", {"gpu", "UUID"}),
    "power_agent_gpu_state": ("gauge", {"gpu", "UUID", "state"}),
    "power_agent_gpu_info": ("gauge", {"gpu", "UUID", "pci_bus_id", "model"}),
    "power_agent_node_most_watts": ("gauge", set()),
    "power_agent_nvml_state": ("gauge", {"state"}),
    "power_agent_dry_run": ("gauge", set()),
    "power_agent_paused": ("gauge", set()),
    "power_agent_refused_connections_total": ("counter", set()),
    "power_agent_report_age_seconds": ("gauge", set()),
    "power_agent_api_age_seconds": ("gauge", set()),
    "power_agent_start_time_seconds": ("gauge", {"component"}),
}
OF_THE_WATCHER = {
    "power_agent_enforcement_latency_seconds",
    "power_agent_limit_lead_seconds",
    "power_agent_watch_events_total",
    "power_agent_watch_restarts_total",
    "power_agent_list_requests_total",
    "power_agent_enforcer_up",
    "power_agent_snapshot_age_seconds",
    "power_agent_report_age_seconds",
    "power_agent_api_age_seconds",
    "power_agent_start_time_seconds",
    "power_agent_build_info",
    "power_agent_dropped_log_lines_total",
}


ENFORCER = m.EnforcerStatus(
    version=__version__,
    pid=1,
    started_ts=2e9,
    dry_run=True,
    paused="",
    min_mw=None,
    max_mw=None,
    conflict="lowest",
    cgroup_roots=[],
    ledger="",
)


def gpu(index: int | None = 0, **more: object) -> m.Gpu:
    known: dict[str, object] = {
        "index": index,
        "uuid": f"GPU-{index}",
        "limit_mw": 350_500,
        "enforced_mw": 300_000,
        "default_mw": 700_000,
        "min_mw": 200_000,
        "max_mw": 700_000,
        "power_mw": 123_456,
        "managed": True,
        "wanted_mw": 350_500,
        "writes": {"acquire": 1, "drift": 2},
        "write_failures": {"NVML_ERROR_UNKNOWN": 3},
    }
    return m.Gpu(**(known | more))  # type: ignore[arg-type]


def pod(name: str = "trainer", **more: object) -> m.Pod:
    known: dict[str, object] = {
        "uid": f"uid-{name}",
        "namespace": "default",
        "name": name,
        "raw": "350.5",
        "requested_mw": 350_500,
        "effective_mw": 350_500,
        "gpus": ["GPU-0"],
        "state": "enforced",
        "reason": "",
    }
    return m.Pod(**(known | more))  # type: ignore[arg-type]


def report(gpus: list[m.Gpu], pods: list[m.Pod]) -> m.Report:
    return m.Report(
        session="s",
        revision=1,
        nvml="ok",
        nvml_message="",
        gpus=gpus,
        pods=pods,
        counters=m.Counters(
            denied=4, refused_connections=154, malformed=5, stale=6, dropped_log_lines=8
        ),
        enforcer=ENFORCER,
    )


def shown(counts: Counts, link: Link) -> str:
    return metrics.page(metrics.registry(Sources(counts, lambda: link, lambda: 61, lambda: 7, 1e9)))


def page(gpus: list[m.Gpu], pods: list[m.Pod], *, up: bool = True) -> dict[str, Family]:
    link = Link(up, 0.25, report(gpus, pods), 0.25 if up else 3600)
    return read(shown(Counts(), link))


def test_every_name_and_label_of_the_contract_is_there() -> None:
    found = page([gpu(0), gpu(1)], [pod()])
    assert {name: (f.kind, f.label_names) for name, f in found.items()} == CONTRACT
    assert all(family.help.strip() for family in found.values())


def test_watts_are_watts() -> None:
    found = page([gpu()], [pod()])
    of = {"gpu": "0", "UUID": "GPU-0"}
    assert found["power_agent_gpu_limit_watts"].one(**of) == 350.5
    assert found["power_agent_gpu_enforced_limit_watts"].one(**of) == 300
    assert found["power_agent_gpu_power_watts"].one(**of) == 123.456
    assert found["power_agent_gpu_managed"].one(**of) == 1
    assert (
        found["power_agent_pod_requested_limit_watts"].one(namespace="default", pod="trainer")
        == 350.5
    )
    assert (
        found["power_agent_pod_effective_limit_watts"].one(namespace="default", pod="trainer", **of)
        == 350.5
    )
    state = found["power_agent_pod_state"].one(namespace="default", pod="trainer", state="enforced")
    assert state == 1


def test_counters_are_there_from_zero_on() -> None:
    """A rate has nothing to start from where a counter appears with its first increment."""
    found = page([gpu(writes={}, write_failures={})], [])
    writes = found["power_agent_limit_writes_total"].samples
    assert sorted(dict(labels)["reason"] for _, labels in writes) == [
        "acquire",
        "adjust",
        "drift",
        "release",
    ]
    assert set(writes.values()) == {0.0}
    assert found["power_agent_limit_write_failures_total"].samples == {}
    assert len(found["power_agent_watch_events_total"].samples) == 5
    assert len(found["power_agent_watch_restarts_total"].samples) == 3


def test_what_is_not_known_is_left_out_and_not_zero() -> None:
    found = page([gpu(limit_mw=None, power_mw=None)], [pod(effective_mw=None, requested_mw=None)])
    assert found["power_agent_gpu_limit_watts"].samples == {}
    assert found["power_agent_gpu_power_watts"].samples == {}
    assert found["power_agent_pod_effective_limit_watts"].samples == {}
    assert found["power_agent_pod_requested_limit_watts"].samples == {}
    assert len(found["power_agent_gpu_max_limit_watts"].samples) == 1


def test_while_the_enforcer_is_away_what_was_last_known_stays_and_says_how_old_it_is() -> None:
    """A series that goes away would end an alert, though nothing was repaired."""
    there, away = page([gpu()], [pod()]), page([gpu()], [pod()], up=False)
    assert {name for name in there if there[name] != away[name]} == {
        "power_agent_enforcer_up",
        "power_agent_report_age_seconds",
    }
    assert away["power_agent_enforcer_up"].one() == 0
    assert away["power_agent_report_age_seconds"].one() == 3600


def test_before_the_first_report_there_are_only_the_watchers_own() -> None:
    away = Link(up=False, snapshot_age_s=3, report=None, report_age_s=4)
    found = read(shown(Counts(), away))
    assert set(found) == OF_THE_WATCHER
    assert found["power_agent_snapshot_age_seconds"].one() == 3
    assert found["power_agent_report_age_seconds"].one() == 4
    assert found["power_agent_build_info"].one(version=__version__) == 1


def test_two_pods_of_one_name_do_not_break_the_page() -> None:
    """The old one still ends, the new one is there: a sample twice would cost the whole page."""
    found = page([gpu()], [pod(uid="old"), pod(uid="new", requested_mw=1000)])
    assert found["power_agent_pod_requested_limit_watts"].one(namespace="default", pod="trainer")


def test_a_gpu_that_is_lost_or_only_named_by_a_pod_has_labels_all_the_same() -> None:
    found = page([gpu(index=None, uuid="GPU-lost")], [pod(gpus=["GPU-lost", "GPU-unheard-of"])])
    assert found["power_agent_gpu_managed"].one(gpu="", UUID="GPU-lost") == 1
    effective = found["power_agent_pod_effective_limit_watts"]
    for uuid in ("GPU-lost", "GPU-unheard-of"):
        assert effective.one(namespace="default", pod="trainer", gpu="", UUID=uuid) == 350.5


def test_a_pod_has_one_state_and_on_each_of_its_gpus_the_limit_of_that_gpu() -> None:
    found = page(
        [gpu(0, limit_mw=400_000), gpu(1, limit_mw=300_000), gpu(2, limit_mw=None)],
        [
            pod(effective_mw=300_000, state="clamped", gpus=["GPU-0", "GPU-1", "GPU-2"]),
            pod("waits", effective_mw=None, gpus=[], state="waiting"),
            pod("wrong", requested_mw=None, effective_mw=None, gpus=[], state="invalid"),
        ],
    )
    states = [dict(labels) for _, labels in found["power_agent_pod_state"].samples]
    assert [(of["pod"], of["state"]) for of in states] == [
        ("trainer", "clamped"),
        ("waits", "waiting"),
        ("wrong", "invalid"),
    ]
    effective = found["power_agent_pod_effective_limit_watts"].samples
    limits = {dict(labels)["gpu"]: watts for (_, labels), watts in effective.items()}
    assert limits == {"0": 400, "1": 300}  # that of GPU 2 is not known
    assert len(found["power_agent_pod_requested_limit_watts"].samples) == 2


def test_refused_messages_are_counted_by_reason() -> None:
    denied = page([], [])["power_agent_denied_messages_total"]
    found = {dict(labels)["reason"]: value for (_, labels), value in denied.samples.items()}
    assert found == {"denied": 4, "malformed": 5, "stale": 6}
    assert page([], [])["power_agent_refused_connections_total"].one() == 154


@pytest.mark.parametrize(
    ("gpus", "watts"),
    [
        ([gpu(0), gpu(1, managed=False, enforced_mw=700_000)], 1000),
        ([gpu(0), gpu(1, enforced_mw=None)], 1000),  # not read: what its hardware takes at most
        ([gpu(0), gpu(1, enforced_mw=None, max_mw=None)], None),
        ([], None),  # nothing is known, which is not "no load"
    ],
)
def test_the_most_that_a_node_may_draw_counts_every_gpu(
    gpus: list[m.Gpu], watts: float | None
) -> None:
    found = page(gpus, []).get("power_agent_node_most_watts")
    assert (None if found is None else found.one()) == watts


@pytest.mark.parametrize("state", ["free", "managed", "held", "failed", "lost"])
def test_a_gpu_has_one_state_and_a_limit_that_was_refused_is_not_managed(state: m.GpuState) -> None:
    found = page([gpu(state=state, pci="00000000:3B:00.0", name="H100")], [])
    of = {"gpu": "0", "UUID": "GPU-0"}
    assert len(found["power_agent_gpu_state"].samples) == 1
    assert found["power_agent_gpu_state"].one(**of, state=state) == 1
    assert found["power_agent_gpu_managed"].one(**of) == (state != "failed")
    what = {"pci_bus_id": "00000000:3B:00.0", "model": "H100"}
    assert found["power_agent_gpu_info"].one(**of, **what) == 1


def test_what_the_enforcer_tells_of_itself_is_shown() -> None:
    found = page([gpu(wanted_mw=300_000)], [])
    assert found["power_agent_dry_run"].one() == 1
    assert found["power_agent_paused"].one() == 1
    assert found["power_agent_gpu_target_limit_watts"].one(gpu="0", UUID="GPU-0") == 300
    assert found["power_agent_nvml_state"].one(state="ok") == 1
    assert found["power_agent_api_age_seconds"].one() == 61
    started = found["power_agent_start_time_seconds"]
    assert (started.one(component="watcher"), started.one(component="enforcer")) == (1e9, 2e9)


def test_log_lines_that_nobody_took_are_counted_by_program() -> None:
    lost = page([], [])["power_agent_dropped_log_lines_total"]
    assert (lost.one(component="watcher"), lost.one(component="enforcer")) == (7, 8)


def test_what_the_watcher_counts_is_shown() -> None:
    counts = Counts()
    counts.watch_events["MODIFIED"] += 3
    counts.watch_restarts["expired"] += 1
    counts.list_requests += 2
    found = read(shown(counts, Link(up=True, snapshot_age_s=0, report=None, report_age_s=0)))
    assert found["power_agent_watch_events_total"].one(type="MODIFIED") == 3
    assert found["power_agent_watch_restarts_total"].one(reason="expired") == 1
    assert found["power_agent_list_requests_total"].one() == 2
    assert found["power_agent_enforcer_up"].one() == 1


@settings(deadline=None)  # the machine may be busy
@given(st.text(), st.text())
def test_any_text_in_a_label_is_read_back_the_same(uuid: str, error: str) -> None:
    found = page([gpu(uuid=uuid, write_failures={error: 7})], [])
    failures = found["power_agent_limit_write_failures_total"]
    assert failures.one(gpu="0", UUID=uuid, error=error) == 7


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.floats(0, 100, allow_nan=False), max_size=30))
def test_latency_is_a_histogram(durations_s: list[float]) -> None:
    counts = Counts()
    for duration_s in durations_s:
        counts.latency.observe(duration_s)
    name = "power_agent_enforcement_latency_seconds"
    found = read(shown(counts, Link(up=True, snapshot_age_s=0, report=None, report_age_s=0)))
    samples = found[name].samples
    assert samples[f"{name}_count", ()] == len(durations_s)
    assert samples[f"{name}_sum", ()] == pytest.approx(sum(durations_s))
    for (sample, labels), value in samples.items():
        if sample == f"{name}_bucket":
            bound = float(dict(labels)["le"])
            assert value == sum(duration_s <= bound for duration_s in durations_s)


def test_a_lead_may_be_negative_and_then_there_is_no_sum() -> None:
    counts = Counts()
    for lead_s in (-40.0, -0.2, 0.3, 0.4, 100.0):
        counts.lead.observe(lead_s)
    name = "power_agent_limit_lead_seconds"
    found = read(shown(counts, Link(up=True, snapshot_age_s=0, report=None, report_age_s=0)))
    samples = found[name].samples
    assert (f"{name}_sum", ()) not in samples
    buckets = {
        bound: samples[f"{name}_bucket", (("le", bound),)]
        for bound in ("-30.0", "0.0", "0.5", "+Inf")
    }
    assert buckets == {"-30.0": 1, "0.0": 2, "0.5": 4, "+Inf": 5}


def test_the_page_of_a_full_node_is_valid() -> None:
    gpus = [gpu(k) for k in range(16)]
    found = page(gpus, [pod(f"p{k}", gpus=[f"GPU-{k % 16}"]) for k in range(1024)])
    assert len(found["power_agent_pod_effective_limit_watts"].samples) == 1024


# ---------------------------------------------------------------------- ready or not


@pytest.mark.parametrize(
    ("heard", "listed", "missing", "page"),
    [
        (Heard(61), True, [], (200, "ok")),
        (Heard(9, never=True), False, [], (503, "pods: not listed yet: asking")),
        (Heard(9, never=True, error="refused"), False, ["nvml: x"], (503, "yet: refused|nvml: x")),
        # One restart of the API makes no node unready; it is noted all the same.
        (Heard(40, error="refused"), True, [], (200, "ok|api: .* 40 s ago: refused")),
        (Heard(80), True, [], (200, "ok|api: .* 80 s ago")),
        (Heard(80), True, ["nvml: x"], (503, "nvml: x|api: .* 80 s ago")),
        (Heard(301, error="refused"), True, [], (503, "api: .* 301 s ago: refused; .* hold")),
    ],
)
def test_readyz_is_red_where_the_work_cannot_be_done(
    heard: Heard, listed: bool, missing: list[str], page: tuple[int, str]
) -> None:
    status, _, text = health.readiness(heard, listed=listed, missing=missing)
    lines = text.splitlines()
    assert (status, len(lines)) == (page[0], page[1].count("|") + 1)
    for pattern, line in zip(page[1].split("|"), lines, strict=True):
        assert re.search(f"{pattern}$", line), line


# ---------------------------------------------------------------------- the server


@pytest.fixture
def server() -> Iterator[health.Server]:
    pages: dict[str, health.Page] = {
        "/metrics": lambda: (200, metrics.CONTENT_TYPE, "x" * 500_000),
        "/healthz": lambda: health.checklist([]),
        "/readyz": lambda: health.checklist(["pods: not listed", "enforcer: no answer"]),
        "/broken": lambda: 1 / 0,  # type: ignore[dict-item, return-value]
    }
    made = health.Server(Address("127.0.0.1", 0), pages)
    made.start()
    yield made
    end(made)


def end(server: health.Server) -> None:
    """Nobody does so in the product; the loop sees it at the next connection."""
    ending = threading.Thread(target=server.shutdown)
    ending.start()
    while ending.is_alive():
        with contextlib.suppress(OSError):
            socket.create_connection(server.server_address[:2], HANG_S).close()  # type: ignore[arg-type]
        ending.join(0.01)
    server.server_close()


IN_A_NAMESPACE = """
import sys, urllib.request
from watcher import health
from watcher.settings import Address
server = health.Server(Address("", 0), {"/healthz": lambda: health.checklist([])})
server.start()
for host in sys.argv[1:]:
    try:
        with urllib.request.urlopen(f"http://{host}:{server.port}/healthz", timeout=30) as answer:
            print(host, answer.status)
    except OSError as error:
        print(host, type(error.reason).__name__)
"""


@pytest.mark.root
@pytest.mark.parametrize(
    ("prepare", "answers"),
    [
        ("true", "127.0.0.1 200 [::1] 200"),
        ("ip addr del 127.0.0.1/8 dev lo", "127.0.0.1 OSError [::1] 200"),
        (
            "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6",
            "127.0.0.1 200 [::1] OSError",
        ),
    ],
    ids=["both", "ipv6-alone", "ipv4-alone"],
)
def test_without_a_host_every_family_that_there_is_is_served(prepare: str, answers: str) -> None:
    alone = ["unshare", "--net", "sh", "-c", f'ip link set lo up && {prepare} && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"`{prepare}` does not work in a network namespace here")
    hosts = ["127.0.0.1", "[::1]"]
    program = [sys.executable, "-c", IN_A_NAMESPACE, *hosts]
    done = subprocess.run([*alone, *program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == answers.split(), done.stderr


def ask(server: health.Server, path: str, method: str = "GET") -> tuple[int, str, str]:
    """Ask from 127.0.0.1, the address of the kubelet here."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANG_S)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        with answer:
            return answer.status, answer.headers.get("Content-Type", ""), answer.read().decode()


def test_pages_have_status_type_and_body(server: health.Server) -> None:
    text = "text/plain; charset=utf-8"
    assert ask(server, "/healthz") == (200, text, "ok\n")
    assert ask(server, "/readyz?verbose") == (503, text, "pods: not listed\nenforcer: no answer\n")
    status, kind, body = ask(server, "/metrics")
    assert (status, kind, len(body)) == (200, "text/plain; version=0.0.4; charset=utf-8", 500_000)
    assert ask(server, "/healthz", "HEAD") == (200, text, "")


@pytest.mark.parametrize("path", ["/", "/metrics/", "/../metrics", "/x" * 1000])
def test_other_paths_are_not_there(server: health.Server, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "X"])
def test_other_methods_are_refused(server: health.Server, method: str) -> None:
    assert ask(server, "/metrics", method)[0] == 501


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\x00" * 100_000,
        b"GET " + b"x" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n",
    ],
)
def test_garbage_harms_nobody(
    server: health.Server, garbage: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), HANG_S) as hostile:
        with contextlib.suppress(ConnectionError):
            hostile.sendall(garbage)
        assert ask(server, "/healthz")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_page_that_fails_costs_its_own_connection_only(
    server: health.Server, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(http.client.RemoteDisconnected):
        ask(server, "/broken")
    assert ask(server, "/healthz")[0] == 200
    assert capfd.readouterr() == ("", "")


def _answers(server: health.Server) -> bool:
    try:
        return ask(server, "/healthz")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def test_clients_that_say_nothing_or_read_nothing_do_not_shut_others_out(
    server: health.Server,
) -> None:
    with contextlib.ExitStack() as held:
        for number in range(3 * health._CONNECTIONS):
            hostile = socket.create_connection(("127.0.0.1", server.port), HANG_S)
            held.enter_context(hostile)
            if number % 2:
                with contextlib.suppress(ConnectionError):
                    hostile.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        until(lambda: _answers(server), "an answer in spite of them")
        serving = [t for t in threading.enumerate() if "process_request" in t.name]
        assert len(serving) <= health._CONNECTIONS + 1
    until(lambda: not server._open, "all connections forgotten")


def test_a_client_that_drips_is_dropped_when_the_house_is_full(server: health.Server) -> None:
    stop = threading.Event()

    def drip(hostile: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.2):
                hostile.sendall(b"x")

    with contextlib.ExitStack() as held:
        drips = [
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), HANG_S))
            for _ in range(health._CONNECTIONS)
        ]
        threads = [threading.Thread(target=drip, args=(hostile,)) for hostile in drips]
        held.callback(stop.set)
        for thread in threads:
            thread.start()
        until(lambda: _answers(server), "an answer in spite of them")
        with contextlib.suppress(ConnectionError):
            assert drips[0].recv(1) == b""  # the oldest was hung up on: its thread is free
        stop.set()
        for thread in threads:
            thread.join()
    until(lambda: not server._open, "all connections forgotten")


def test_one_address_that_connects_without_end_does_not_shut_another_out(
    server: health.Server,
) -> None:
    stop = threading.Event()

    def hold() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.socket() as hostile:
                hostile.bind(("127.0.0.2", 0))
                hostile.settimeout(0.5)
                hostile.connect(("127.0.0.1", server.port))
                hostile.recv(1)  # says nothing itself, until it is hung up on

    threads = [threading.Thread(target=hold) for _ in range(health._CONNECTIONS + 4)]
    for thread in threads:
        thread.start()
    until(lambda: len(server._open) == health._CONNECTIONS, "a full house")
    answered = [_answers(server) for _ in range(20)]
    stop.set()
    for thread in threads:
        thread.join()
    assert all(answered)


def test_a_full_house_of_one_address_still_lets_its_oldest_have_its_time(
    server: health.Server,
) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(health._CONNECTIONS):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), HANG_S))
        until(lambda: len(server._open) == health._CONNECTIONS, "a full house")
        assert not _answers(server)


def test_a_full_house_of_many_addresses_lets_its_oldest_have_its_time(
    server: health.Server,
) -> None:
    with contextlib.ExitStack() as stack:
        house = [
            stack.enter_context(
                socket.create_connection(("127.0.0.1", server.port), 5, (f"127.0.0.{number}", 0))
            )
            for number in range(1, 10)  # one more than there is room for
        ]
        assert house[-1].recv(1) == b""
        house[0].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert house[0].recv(12).endswith(b"200")


def test_an_address_that_is_taken_is_a_wrong_setting(server: health.Server) -> None:
    with pytest.raises(SettingsError, match=r"POWER_AGENT_METRICS_ADDR='127.*in use.*or off"):
        health.Server(Address("127.0.0.1", server.port), {})


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 300])
def test_an_address_of_others_is_a_wrong_setting(host: str) -> None:
    with pytest.raises(SettingsError, match="POWER_AGENT_METRICS_ADDR"):
        health.Server(Address(host, 0), {})


def test_ipv6_is_served() -> None:
    try:
        made = health.Server(Address("::1", 0), {"/healthz": lambda: health.checklist([])})
    except SettingsError:
        pytest.skip("no IPv6 here")
    made.start()
    with socket.create_connection(("::1", made.port), HANG_S) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert b"200" in client.recv(100)
    end(made)
