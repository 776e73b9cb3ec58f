"""The metrics page and its server: names, values, escaping, and who cannot hold the probes up."""

import contextlib
import math
import re
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import __version__, messages
from shared.settings import Address, SettingsError
from watcher import health, metrics

UUID = "GPU-1"
LABEL = re.compile(r'([A-Za-z_]\w*)="((?:[^"\\\n]|\\["\\n])*)"')
SAMPLE = re.compile(r"([A-Za-z_]\w*)(?:\{(.*)\})? (\S+)")


def gpu(uuid: str = UUID, index: int | None = 0, **more: object) -> messages.Gpu:
    values: dict[str, object] = {
        "index": index, "uuid": uuid, "name": "H100", "limit_mw": 350_500, "enforced_mw": 350_000,
        "default_mw": 700_000, "min_mw": 200_000, "max_mw": 700_000, "power_mw": 48_750,
        "managed": True, "original_mw": 700_000, "target_mw": 350_500, "pods": ["u"],
        "state": "managed", "reason": "", "processes": [], "writes": {"acquire": 2},
        "write_failures": {},
    }  # fmt: skip
    return messages.Gpu(**(values | more))  # type: ignore[arg-type]


def pod(name: str = "trainer", **more: object) -> messages.Pod:
    values: dict[str, object] = {
        "uid": f"uid-{name}", "namespace": "default", "name": name, "raw": "350.5",
        "requested_mw": 350_500, "effective_mw": 350_500, "gpus": [UUID], "state": "enforced",
        "reason": "",
    }  # fmt: skip
    return messages.Pod(**(values | more))  # type: ignore[arg-type]


def link(
    *gpus: messages.Gpu, pods: tuple[messages.Pod, ...] = (), up: bool = True, current: bool = True
) -> metrics.Link:
    report = messages.Report(
        session="s",
        revision=1,
        nvml="ok",
        nvml_message="",
        gpus=list(gpus),
        pods=list(pods),
        counters=messages.Counters(denied=1, malformed=2, stale=3),
    )
    return metrics.Link(up=up, snapshot_age_s=1.25, report=report, current=current)


NEVER = metrics.Link(up=False, snapshot_age_s=7.0, report=None, current=False)


def samples(seen: metrics.Link, counts: metrics.Counts | None = None) -> dict[str, float]:
    """Every sample of the page, which must be well-formed: typed, once, escaped."""
    text = metrics.page(counts or metrics.Counts(), seen)
    assert text.endswith("\n")
    found: dict[str, float] = {}
    types: dict[str, str] = {}
    for line in text[:-1].split("\n"):
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in types
            types[name] = kind
        elif not line.startswith("# HELP "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = match.groups()
            assert re.sub(r"_(bucket|sum|count)$", "", name) in types or name in types
            assert (
                labels is None or ",".join(f'{k}="{v}"' for k, v in LABEL.findall(labels)) == labels
            )
            key = line.rpartition(" ")[0]
            assert key not in found
            found[key] = float(value)
    return found


def named(prefix: str, of: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in of.items() if key.startswith(prefix)}


# ---------------------------------------------------------------------- GPUs and pods


def test_limits_are_watts_with_the_labels_of_dcgm_exporter() -> None:
    found = samples(link(gpu()))
    labels = f'{{gpu="0",UUID="{UUID}"}}'
    expected = {
        "limit": 350.5, "enforced_limit": 350, "default_limit": 700, "min_limit": 200,
        "max_limit": 700, "power": 48.75,
    }  # fmt: skip
    for name, watts in expected.items():
        assert found[f"power_agent_gpu_{name}_watts{labels}"] == watts
    assert found[f"power_agent_gpu_managed{labels}"] == 1


def test_what_is_not_known_is_left_out() -> None:
    found = samples(link(gpu(power_mw=None, limit_mw=None, index=None, managed=False)))
    assert not named("power_agent_gpu_power_watts", found)
    assert not named("power_agent_gpu_limit_watts", found)
    assert found[f'power_agent_gpu_managed{{gpu="",UUID="{UUID}"}}'] == 0


def test_a_pod_has_what_it_asked_for_what_it_has_and_one_state() -> None:
    pods = (
        pod(effective_mw=300_000, state="clamped", gpus=[UUID, "GPU-2"]),
        pod("waits", effective_mw=None, gpus=[], state="waiting"),
        pod("wrong", requested_mw=None, effective_mw=None, gpus=[], state="invalid"),
    )
    found = samples(link(gpu(), gpu("GPU-2", 1), pods=pods))
    assert named("power_agent_pod_requested", found) == {
        'power_agent_pod_requested_limit_watts{namespace="default",pod="trainer"}': 350.5,
        'power_agent_pod_requested_limit_watts{namespace="default",pod="waits"}': 350.5,
    }
    name = 'power_agent_pod_effective_limit_watts{namespace="default",pod="trainer"'
    assert named("power_agent_pod_effective", found) == {
        f'{name},gpu="0",UUID="{UUID}"}}': 300,
        f'{name},gpu="1",UUID="GPU-2"}}': 300,
    }
    assert named("power_agent_pod_state", found) == {
        'power_agent_pod_state{namespace="default",pod="trainer",state="clamped"}': 1,
        'power_agent_pod_state{namespace="default",pod="waits",state="waiting"}': 1,
        'power_agent_pod_state{namespace="default",pod="wrong",state="invalid"}': 1,
    }


def test_a_gpu_that_only_a_pod_names_is_still_labelled() -> None:
    found = samples(link(pods=(pod(gpus=["GPU-gone"]),)))
    assert any('gpu="",UUID="GPU-gone"' in key for key in found)


def test_two_pods_of_one_name_do_not_make_the_page_invalid() -> None:
    samples(link(gpu(), pods=(pod(), pod(uid="another"))))  # it asserts that none is there twice


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_name_is_one_line_and_can_be_read_back(name: str, uuid: str) -> None:
    found = samples(link(gpu(uuid), pods=(pod(name, gpus=[uuid]),)))
    (key,) = named("power_agent_pod_requested", found)
    (_, _), (_, read) = LABEL.findall(key)
    undo = {r"\n": "\n", r"\"": '"', r"\\": "\\"}
    assert re.sub(r"\\.", lambda match: undo[match[0]], read) == name


# ---------------------------------------------------------------------- counters


def test_writes_are_counted_for_each_reason_from_zero() -> None:
    found = samples(link(gpu(writes={"acquire": 2, "drift": 1}, write_failures={"999": 4})))
    for reason, count in {"acquire": 2, "adjust": 0, "drift": 1, "release": 0}.items():
        key = f'power_agent_limit_writes_total{{gpu="0",UUID="{UUID}",reason="{reason}"}}'
        assert found[key] == count
    name = "power_agent_limit_write_failures_total"
    assert found[f'{name}{{gpu="0",UUID="{UUID}",error="999"}}'] == 4


def test_refused_messages_are_counted_by_reason() -> None:
    assert named("power_agent_denied_messages_total", samples(link())) == {
        'power_agent_denied_messages_total{reason="denied"}': 1,
        'power_agent_denied_messages_total{reason="malformed"}': 2,
        'power_agent_denied_messages_total{reason="stale"}': 3,
    }


def test_the_watchers_own_counters_are_there_from_the_start() -> None:
    counts = metrics.Counts()
    before = samples(NEVER, counts)
    assert before['power_agent_watch_events_total{type="MODIFIED"}'] == 0
    assert before['power_agent_watch_restarts_total{reason="expired"}'] == 0
    assert before["power_agent_list_requests_total"] == 0
    counts.watch_events["MODIFIED"] += 3
    counts.watch_restarts["expired"] += 1
    counts.list_requests += 2
    after = samples(NEVER, counts)
    assert after['power_agent_watch_events_total{type="MODIFIED"}'] == 3
    assert after['power_agent_watch_restarts_total{reason="expired"}'] == 1
    assert after["power_agent_list_requests_total"] == 2
    assert after[f'power_agent_build_info{{version="{__version__}"}}'] == 1


# ---------------------------------------------------------------------- an enforcer that is away


def test_gauges_of_an_enforcer_that_is_away_are_dropped_not_stale() -> None:
    gone = samples(link(gpu(), pods=(pod(),), up=False, current=False))
    assert not named("power_agent_gpu_", gone)
    assert not named("power_agent_pod_", gone)
    assert gone["power_agent_enforcer_up"] == 0
    # Totals stay true.
    assert named("power_agent_limit_writes_total", gone)
    assert named("power_agent_denied_messages_total", gone)


def test_age_and_up_are_always_there() -> None:
    assert samples(link())["power_agent_enforcer_up"] == 1
    assert samples(link())["power_agent_snapshot_age_seconds"] == 1.25
    assert samples(NEVER)["power_agent_enforcer_up"] == 0
    assert samples(NEVER)["power_agent_snapshot_age_seconds"] == 7


# ---------------------------------------------------------------------- latency

NAME = "power_agent_enforcement_latency_seconds"


@given(st.lists(st.floats(min_value=0, max_value=100), max_size=50))
def test_the_histogram_is_cumulative_and_complete(durations_s: list[float]) -> None:
    counts = metrics.Counts()
    for duration_s in durations_s:
        counts.latency.observe(duration_s)
    found = samples(NEVER, counts)
    buckets = named(f"{NAME}_bucket", found)
    for key, count in buckets.items():
        (bound,) = re.findall(r'le="(.*)"', key)
        assert count == sum(duration_s <= float(bound) for duration_s in durations_s)
    assert list(buckets)[-1] == f'{NAME}_bucket{{le="+Inf"}}'
    assert found[f"{NAME}_count"] == len(durations_s)
    assert math.isclose(found[f"{NAME}_sum"], sum(durations_s), abs_tol=1e-9)


# ---------------------------------------------------------------------- the server


@pytest.fixture
def server() -> health.Server:
    pages: dict[str, health.Page] = {
        "/metrics": lambda: (200, metrics.CONTENT_TYPE, "a 1\n"),
        "/healthz": lambda: health.checklist([]),
        "/readyz": lambda: health.checklist(["enforcer: no answer", "nvml: absent"]),
    }
    made = health.Server(Address("127.0.0.1", 0), pages)
    made.start()
    return made


def fetch(server: health.Server, path: str, method: str = "GET") -> tuple[int, str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def test_pages_have_status_type_and_body(server: health.Server) -> None:
    assert fetch(server, "/metrics?x=y") == (200, metrics.CONTENT_TYPE, "a 1\n")
    assert fetch(server, "/healthz") == (200, "text/plain; charset=utf-8", "ok\n")
    status, _, text = fetch(server, "/readyz")
    assert (status, text) == (503, "enforcer: no answer\nnvml: absent\n")
    assert fetch(server, "/else")[0] == 404
    assert fetch(server, "/healthz", "HEAD") == (200, "text/plain; charset=utf-8", "")
    assert fetch(server, "/healthz", "POST")[0] == 501


def test_an_address_that_cannot_be_bound_names_the_setting(server: health.Server) -> None:
    with pytest.raises(SettingsError, match=f"POWER_AGENT_METRICS_ADDR='127.0.0.1:{server.port}'"):
        health.Server(Address("127.0.0.1", server.port), {})


def test_connections_are_bounded_and_slow_ones_give_way(server: health.Server) -> None:
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            connection = socket.create_connection(("127.0.0.1", server.port))
            stack.enter_context(connection)
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /met")
        deadline = time.monotonic() + 10
        while True:
            assert threading.active_count() - before <= 16
            try:
                if fetch(server, "/healthz")[0] == 200:
                    break
            except OSError:
                assert time.monotonic() < deadline, "the probes are kept out"
                time.sleep(0.05)
