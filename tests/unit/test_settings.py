"""The settings: every variable with its default, and a wrong value told in one useful line."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from enforcer.settings import LEAST_LEASE_S, EnforcerSettings, SafeDefault
from shared import unknown
from shared.settings import (
    CommonSettings,
    SettingsError,
    parse_settings,
    run_dir_from_environment,
    unread_variables,
)
from tests.waiting import HANG_S
from watcher.publisher import HEARTBEAT_S
from watcher.settings import Address, WatcherSettings

REPOSITORY = Path(__file__).parents[2]
NODE = {"NODE_NAME": "node-a"}

COMMON_DEFAULTS: dict[str, Any] = {
    "run_dir": Path("/run/power-agent"),
    "log_level": "info",
    "log_format": "json",
    "in_kubernetes": False,
}
ENFORCER_DEFAULTS: dict[str, Any] = COMMON_DEFAULTS | {
    "state_dir": Path("/var/lib/power-agent"),
    "proc_root": Path("/proc"),
    "sysfs_root": Path("/sys"),
    "cgroup_root": "auto",
    "kubelet_dir": None,
    "kubelet_resources": ("nvidia.com/*",),
    "watcher_uid": 65532,
    "reader_uids": frozenset({0}),
    "scan_s": 1.0,
    "reconcile_s": 15.0,
    "min_mw": None,
    "max_mw": None,
    "safe_default": None,
    "conflict": "lowest",
    "release_to": "original",
    "on_exit": "restore",
    "exit_s": 10.0,
    "lease_s": None,
    "dry_run": False,
    "supervised": False,
}
WATCHER_DEFAULTS: dict[str, Any] = COMMON_DEFAULTS | {
    "node": "node-a",
    "kubeconfig": None,
    "namespace": None,
    "annotation": "dynamo.nvidia.com/gpu-power-limit",
    "metrics": Address("", 9100),
    "events": False,
}
# The contract: which program reads which variable.
COMMON = {
    "POWER_AGENT_RUN_DIR",
    "POWER_AGENT_LOG_LEVEL",
    "POWER_AGENT_LOG_FORMAT",
    "KUBERNETES_SERVICE_HOST",
}
ENFORCER = COMMON | {
    "POWER_AGENT_STATE_DIR",
    "POWER_AGENT_PROC_ROOT",
    "POWER_AGENT_CGROUP_ROOT",
    "POWER_AGENT_KUBELET_DIR",
    "POWER_AGENT_KUBELET_RESOURCES",
    "POWER_AGENT_WATCHER_UID",
    "POWER_AGENT_READER_UIDS",
    "POWER_AGENT_SCAN_SECONDS",
    "POWER_AGENT_RECONCILE_SECONDS",
    "POWER_AGENT_MIN_WATTS",
    "POWER_AGENT_MAX_WATTS",
    "POWER_AGENT_SAFE_DEFAULT",
    "POWER_AGENT_CONFLICT",
    "POWER_AGENT_RELEASE_TO",
    "POWER_AGENT_ON_EXIT",
    "POWER_AGENT_EXIT_SECONDS",
    "POWER_AGENT_SYSFS_ROOT",
    "POWER_AGENT_LEASE",
    "POWER_AGENT_DRY_RUN",
    "POWER_AGENT_SUPERVISED",
}
WATCHER = COMMON | {
    "NODE_NAME",
    "KUBECONFIG",
    "WATCH_NAMESPACE",
    "POWER_AGENT_ANNOTATION",
    "POWER_AGENT_METRICS_ADDR",
    "POWER_AGENT_EVENTS",
}


@pytest.mark.parametrize(
    ("kind", "environment", "defaults"),
    [(EnforcerSettings, {}, ENFORCER_DEFAULTS), (WatcherSettings, NODE, WATCHER_DEFAULTS)],
)
def test_defaults(
    kind: type[CommonSettings], environment: dict[str, str], defaults: dict[str, Any]
) -> None:
    settings = parse_settings(kind, environment)
    assert {f.name: getattr(settings, f.name) for f in dataclasses.fields(kind)} == defaults


def variables(kind: type[CommonSettings]) -> set[str]:
    return {field.metadata["variable"].name for field in dataclasses.fields(kind)}


def test_each_program_reads_the_variables_of_the_contract() -> None:
    assert variables(EnforcerSettings) == ENFORCER
    assert variables(WatcherSettings) == WATCHER


def test_an_empty_value_means_not_set() -> None:
    assert parse_settings(EnforcerSettings, dict.fromkeys(ENFORCER, "")) == parse_settings(
        EnforcerSettings, {}
    )


def test_settings_cannot_be_changed_afterwards() -> None:
    settings = parse_settings(EnforcerSettings, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.dry_run = True  # type: ignore[misc]


GOOD: list[tuple[type[CommonSettings], str, str, str, Any]] = [
    (EnforcerSettings, "POWER_AGENT_RUN_DIR", "run_dir", "/tmp/x", Path("/tmp/x")),
    (EnforcerSettings, "POWER_AGENT_LOG_LEVEL", "log_level", "debug", "debug"),
    (EnforcerSettings, "POWER_AGENT_LOG_FORMAT", "log_format", "text", "text"),
    (EnforcerSettings, "KUBERNETES_SERVICE_HOST", "in_kubernetes", "10.0.0.1", True),
    (EnforcerSettings, "POWER_AGENT_STATE_DIR", "state_dir", "/a b", Path("/a b")),
    (EnforcerSettings, "POWER_AGENT_PROC_ROOT", "proc_root", "/host/proc", Path("/host/proc")),
    (EnforcerSettings, "POWER_AGENT_CGROUP_ROOT", "cgroup_root", "/kubelet/", "/kubelet"),
    (EnforcerSettings, "POWER_AGENT_CGROUP_ROOT", "cgroup_root", "/", "/"),
    (EnforcerSettings, "POWER_AGENT_CGROUP_ROOT", "cgroup_root", "//", "/"),
    (EnforcerSettings, "POWER_AGENT_CGROUP_ROOT", "cgroup_root", "/a/, /b.slice", "/a,/b.slice"),
    (EnforcerSettings, "POWER_AGENT_CGROUP_ROOT", "cgroup_root", " auto\n", "auto"),
    (EnforcerSettings, "POWER_AGENT_CGROUP_ROOT", "cgroup_root", "/a,/a/", "/a"),
    (
        EnforcerSettings,
        "POWER_AGENT_CGROUP_ROOT",
        "cgroup_root",
        "/my\\x2dpool.slice",
        "/my\\x2dpool.slice",
    ),
    (EnforcerSettings, "POWER_AGENT_KUBELET_DIR", "kubelet_dir", "/k", Path("/k")),
    (
        EnforcerSettings,
        "POWER_AGENT_KUBELET_RESOURCES",
        "kubelet_resources",
        "a/b, c*",
        ("a/b", "c*"),
    ),
    (EnforcerSettings, "POWER_AGENT_CGROUP_ROOT", "cgroup_root", "//a/./b//, /c", "/a/b,/c"),
    (EnforcerSettings, "POWER_AGENT_CGROUP_ROOT", "cgroup_root", "/a,/b/,/a/", "/a,/b"),
    (EnforcerSettings, "POWER_AGENT_WATCHER_UID", "watcher_uid", "0", 0),
    (EnforcerSettings, "POWER_AGENT_WATCHER_UID", "watcher_uid", "4294967294", 2**32 - 2),
    (EnforcerSettings, "POWER_AGENT_READER_UIDS", "reader_uids", "0, 1000,7", {0, 7, 1000}),
    (EnforcerSettings, "POWER_AGENT_READER_UIDS", "reader_uids", "0,\n1000\n", {0, 1000}),
    (EnforcerSettings, "POWER_AGENT_SCAN_SECONDS", "scan_s", "0.05", 0.05),
    (EnforcerSettings, "POWER_AGENT_RECONCILE_SECONDS", "reconcile_s", "3600", 3600.0),
    (EnforcerSettings, "POWER_AGENT_MIN_WATTS", "min_mw", "48.75", 48_750),
    (EnforcerSettings, "POWER_AGENT_MAX_WATTS", "max_mw", "600", 600_000),
    (EnforcerSettings, "POWER_AGENT_SAFE_DEFAULT", "safe_default", "300", SafeDefault(300_000)),
    (
        EnforcerSettings,
        "POWER_AGENT_SAFE_DEFAULT",
        "safe_default",
        "70%",
        SafeDefault(percent=70),
    ),
    (EnforcerSettings, "POWER_AGENT_RELEASE_TO", "release_to", "default", "default"),
    (EnforcerSettings, "POWER_AGENT_ON_EXIT", "on_exit", "hold", "hold"),
    (EnforcerSettings, "POWER_AGENT_EXIT_SECONDS", "exit_s", "20", 20.0),
    (EnforcerSettings, "POWER_AGENT_SYSFS_ROOT", "sysfs_root", "/h/sys", Path("/h/sys")),
    (EnforcerSettings, "POWER_AGENT_LEASE", "lease_s", "release:90", 90.0),
    (EnforcerSettings, "POWER_AGENT_LEASE", "lease_s", "release:6", 6.0),
    (EnforcerSettings, "POWER_AGENT_LEASE", "lease_s", "hold", None),
    (EnforcerSettings, "POWER_AGENT_DRY_RUN", "dry_run", "true", True),
    (EnforcerSettings, "POWER_AGENT_DRY_RUN", "dry_run", "1", True),
    (EnforcerSettings, "POWER_AGENT_DRY_RUN", "dry_run", "False", False),
    (EnforcerSettings, "POWER_AGENT_SUPERVISED", "supervised", "1", True),
    (WatcherSettings, "NODE_NAME", "node", "n1", "n1"),
    (WatcherSettings, "NODE_NAME", "node", "10.0.0.1", "10.0.0.1"),
    (WatcherSettings, "NODE_NAME", "node", "ip-1.eu--2.x", "ip-1.eu--2.x"),
    (WatcherSettings, "NODE_NAME", "node", "n" * 253, "n" * 253),
    (WatcherSettings, "KUBECONFIG", "kubeconfig", "/k", "/k"),
    (WatcherSettings, "WATCH_NAMESPACE", "namespace", "team-a", "team-a"),
    (WatcherSettings, "WATCH_NAMESPACE", "namespace", "7" * 63, "7" * 63),
    (WatcherSettings, "POWER_AGENT_ANNOTATION", "annotation", "x.y/z", "x.y/z"),
    (WatcherSettings, "POWER_AGENT_METRICS_ADDR", "metrics", "off", None),
    (
        WatcherSettings,
        "POWER_AGENT_METRICS_ADDR",
        "metrics",
        "127.0.0.1:0",
        Address("127.0.0.1", 0),
    ),
    (WatcherSettings, "POWER_AGENT_METRICS_ADDR", "metrics", "[::]:9100", Address("::", 9100)),
    (WatcherSettings, "POWER_AGENT_METRICS_ADDR", "metrics", ":9100", Address("", 9100)),
    (WatcherSettings, "POWER_AGENT_EVENTS", "events", "1", True),
]


@pytest.mark.parametrize(("kind", "variable", "field", "text", "value"), GOOD)
def test_a_right_value_is_taken(
    kind: type[CommonSettings], variable: str, field: str, text: str, value: object
) -> None:
    assert getattr(parse_settings(kind, NODE | {variable: text}), field) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/kubepods.slice", "name its parent, '/'"),
        ("/a.slice/a-kubepods.slice", "name its parent, '/a.slice'"),
        ("/sys/fs/cgroup/kubelet", "leave that out"),
        (",".join(f"/{number}" for number in range(17)), "17 cgroup paths; at most 16"),
    ],
)
def test_a_wrong_cgroup_root_is_refused_with_the_right_one(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)):
        parse_settings(EnforcerSettings, NODE | {"POWER_AGENT_CGROUP_ROOT": text})


def test_every_variable_has_a_right_value_above() -> None:
    assert {variable for _, variable, *_ in GOOD} == (ENFORCER | WATCHER) - {"POWER_AGENT_CONFLICT"}


def test_conflict_safe_default_is_taken_together_with_a_safe_default() -> None:
    both = {"POWER_AGENT_CONFLICT": "safe-default", "POWER_AGENT_SAFE_DEFAULT": "70%"}
    assert parse_settings(EnforcerSettings, both).conflict == "safe-default"


CGROUP_PATHS = [
    *(
        "kubelet",
        "Auto",
        "/a,",
        "/a,b",
        "/a/../b",
        "auto,/a",
        ",",
    ),
    *("/kubepods", "/kubepods.slice", "/k8s.slice/k8s-kubepods.slice/", "/,/kubelet/kubepods"),
    *("/sys/fs/cgroup", "/sys/fs/cgroup/kubelet.slice", ",".join(f"/{n}" for n in range(17))),
]
WRONG: list[tuple[type[CommonSettings], str, list[str]]] = [
    (EnforcerSettings, "POWER_AGENT_RUN_DIR", ["run", "./x", "/" + "x" * 100, "/é" * 40]),
    (EnforcerSettings, "POWER_AGENT_LOG_LEVEL", ["loud", "INFO", "warn"]),
    (EnforcerSettings, "POWER_AGENT_LOG_FORMAT", ["xml", "JSON"]),
    (EnforcerSettings, "POWER_AGENT_STATE_DIR", ["state", "~/x"]),
    (EnforcerSettings, "POWER_AGENT_PROC_ROOT", ["proc"]),
    (EnforcerSettings, "POWER_AGENT_CGROUP_ROOT", CGROUP_PATHS),
    (EnforcerSettings, "POWER_AGENT_KUBELET_DIR", ["kubelet"]),
    (EnforcerSettings, "POWER_AGENT_KUBELET_RESOURCES", [",", "a b", "[x]", "é"]),
    (EnforcerSettings, "POWER_AGENT_WATCHER_UID", ["root", "-1", "4294967295", "1.0", "６"]),
    (EnforcerSettings, "POWER_AGENT_READER_UIDS", ["0;1", "0,root", "0 1"]),
    (EnforcerSettings, "POWER_AGENT_SCAN_SECONDS", ["0", "-1", "1s", "nan", "inf", "1e3", "0.04"]),
    (EnforcerSettings, "POWER_AGENT_RECONCILE_SECONDS", ["0", "99999999", "1.0001"]),
    (EnforcerSettings, "POWER_AGENT_MIN_WATTS", ["0", "-5", "200W", "1e3", "100001"]),
    (EnforcerSettings, "POWER_AGENT_MAX_WATTS", ["0", "x"]),
    (EnforcerSettings, "POWER_AGENT_SAFE_DEFAULT", ["0%", "101%", "70.5%", "-1", "x"]),
    (EnforcerSettings, "POWER_AGENT_CONFLICT", ["highest", "Lowest"]),
    (EnforcerSettings, "POWER_AGENT_RELEASE_TO", ["max"]),
    (EnforcerSettings, "POWER_AGENT_ON_EXIT", ["leave"]),
    (EnforcerSettings, "POWER_AGENT_EXIT_SECONDS", ["0", "long"]),
    (EnforcerSettings, "POWER_AGENT_SYSFS_ROOT", ["sys"]),
    (
        EnforcerSettings,
        "POWER_AGENT_LEASE",
        ["release", "release:", "release:0", "release:1", "release:5.999", "90", "release:x"],
    ),
    (EnforcerSettings, "POWER_AGENT_DRY_RUN", ["yes", "on", "2"]),
    (EnforcerSettings, "POWER_AGENT_SUPERVISED", ["yes"]),
    (
        WatcherSettings,
        "WATCH_NAMESPACE",
        ["a,b", "default ", "Default", "../nodes", "a/b", "a.b", "-a", "a-", "a" * 64, "é"],
    ),
    (WatcherSettings, "POWER_AGENT_ANNOTATION", ["a b", "/x", "kubernetes.io/config.hash"]),
    (WatcherSettings, "POWER_AGENT_METRICS_ADDR", ["9100", "0.0.0.0", "h:65536", "h:", "h:x"]),
    (WatcherSettings, "POWER_AGENT_METRICS_ADDR", ["[x:9100", "[x]:9100", "[]:9100", "a b:9100"]),
    (WatcherSettings, "POWER_AGENT_EVENTS", ["yes"]),
]


@pytest.mark.parametrize(
    ("kind", "variable", "text"), [(k, name, text) for k, name, texts in WRONG for text in texts]
)
def test_a_wrong_value_is_told_with_variable_value_and_remedy(
    kind: type[CommonSettings], variable: str, text: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(kind, NODE | {variable: text})
    said = str(caught.value)
    assert said.startswith(f"{variable}='{text[:80]}")
    assert said.endswith("or unset it")
    assert "\n" not in said


@pytest.mark.parametrize(
    "text", ["Node-A", "a,status.phase=Running", "a_b", "a..b", ".a", "a-", "a\n", "n" * 254]
)
def test_a_node_name_that_cannot_exist_is_told_with_the_remedy(text: str) -> None:
    """With another field in it the selector would choose other pods."""
    with pytest.raises(SettingsError, match=r"^NODE_NAME='.*; correct it \(node whose pods are wa"):
        parse_settings(WatcherSettings, {"NODE_NAME": text})


def test_a_value_with_control_characters_or_a_huge_one_stays_one_short_line() -> None:
    for text in ("a\nb\x1b[2J", "x" * 100_000):
        with pytest.raises(SettingsError) as caught:
            parse_settings(EnforcerSettings, {"POWER_AGENT_CONFLICT": text})
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["/a\nb", "a\x9bb:1"])
def test_what_the_watcher_says_of_itself_is_printable_too(text: str) -> None:
    for name in ("KUBECONFIG", "POWER_AGENT_METRICS_ADDR", "NODE_NAME"):
        with pytest.raises(SettingsError) as caught:
            parse_settings(WatcherSettings, {"NODE_NAME": "a"} | {name: text})
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["RUN_DIR", "STATE_DIR", "PROC_ROOT", "CGROUP_ROOT"])
@pytest.mark.parametrize("text", ["/a\nb", "/\udcff", "/\x1b[2J"])
def test_a_path_that_fits_into_no_message_is_wrong(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match="not printable text; correct it") as caught:
        parse_settings(EnforcerSettings, {f"POWER_AGENT_{name}": text})
    assert str(caught.value).isprintable()


def test_a_required_variable_that_is_missing_is_named() -> None:
    for environment in ({}, {"NODE_NAME": ""}):
        with pytest.raises(SettingsError, match="NODE_NAME is not set: set it to"):
            parse_settings(WatcherSettings, environment)


def test_bounds_that_cross_are_refused_naming_both() -> None:
    bounds = {"POWER_AGENT_MIN_WATTS": "400", "POWER_AGENT_MAX_WATTS": "300.5"}
    with pytest.raises(SettingsError, match=r"POWER_AGENT_MIN_WATTS=400 .*MAX_WATTS=300\.5: lower"):
        parse_settings(EnforcerSettings, bounds)
    parse_settings(EnforcerSettings, dict.fromkeys(bounds, "300"))


def test_a_stop_longer_than_supervisord_waits_is_refused() -> None:
    longer = {"POWER_AGENT_EXIT_SECONDS": "14", "POWER_AGENT_SUPERVISED": "true"}
    with pytest.raises(SettingsError, match="EXIT_SECONDS=14 is too long under supervisord"):
        parse_settings(EnforcerSettings, longer)
    parse_settings(EnforcerSettings, longer | {"POWER_AGENT_EXIT_SECONDS": "13"})
    parse_settings(EnforcerSettings, longer | {"POWER_AGENT_SUPERVISED": "false"})


def test_conflict_safe_default_without_one_is_refused() -> None:
    with pytest.raises(SettingsError, match="needs POWER_AGENT_SAFE_DEFAULT"):
        parse_settings(EnforcerSettings, {"POWER_AGENT_CONFLICT": "safe-default"})


def test_a_share_of_the_factory_limit_is_rounded_down() -> None:
    assert SafeDefault(percent=70).for_gpu(400_000) == 280_000
    assert SafeDefault(percent=33).for_gpu(72_001) == 23_760
    assert SafeDefault(limit_mw=300_000).for_gpu(72_000) == 300_000


def test_a_client_reads_the_socket_directory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWER_AGENT_RUN_DIR", "/x")
    assert run_dir_from_environment() == Path("/x")
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("POWER_AGENT_RUN_DIR")
        else:
            monkeypatch.setenv("POWER_AGENT_RUN_DIR", unset)
        assert run_dir_from_environment() == Path("/run/power-agent")


KINDS = {"EnforcerSettings": EnforcerSettings, "WatcherSettings": WatcherSettings}
PROGRAM = (
    "from shared import settings; from {module} import {kind}; "
    "s = settings.from_command_line('prog', 'What it does.', {kind}); print(s.log_format)"
)


def run(kind: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM.format(kind=kind, module=KINDS[kind].__module__),
            *arguments,
        ],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"], "COLUMNS": "80"} | environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("kind", "names"), [("EnforcerSettings", ENFORCER), ("WatcherSettings", WATCHER)]
)
def test_help_lists_every_variable_with_its_default(kind: str, names: set[str]) -> None:
    done = run(kind, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout.split("environment:")[1]
    for name in names:
        entry = shown.split(f"  {name}\n")[1].split("\n")[0]
        assert "(required)" in entry or "(default: " in entry, name
    for field in dataclasses.fields(KINDS[kind]):
        variable = field.metadata["variable"]
        assert variable.required or f"(default: {variable.default or 'none'})" in shown


def test_a_wrong_configuration_is_one_line_and_exit_status_2() -> None:
    done = run("EnforcerSettings", POWER_AGENT_SCAN_SECONDS="soon")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "prog: POWER_AGENT_SCAN_SECONDS='soon': not a number of seconds of at least 0.05; "
        "correct it (how often GPU process lists are read) or unset it\n"
    )


def test_version_and_unknown_arguments() -> None:
    assert run("EnforcerSettings", "--version").stdout.startswith("prog 1.")
    assert run("EnforcerSettings", "--frobnicate").returncode == 2


def test_logs_are_json_where_nobody_watches() -> None:
    assert run("EnforcerSettings").stdout == "json\n"


def test_a_lease_outlives_two_lost_heartbeats_and_the_refusal_says_why() -> None:
    assert LEAST_LEASE_S == 3 * HEARTBEAT_S
    with pytest.raises(SettingsError, match="shorter than three of the watcher's heartbeats"):
        parse_settings(EnforcerSettings, {"POWER_AGENT_LEASE": "release:5"})


# ---- variables that nobody reads ----

MISSPELT = {
    "MINWATTS": "MIN_WATTS",
    "MIN_WATT": "MIN_WATTS",
    "MIM_WATTS": "MIN_WATTS",
    "MAXIMUM_WATTS": "MAX_WATTS",
    "WATTS_MAX": "MAX_WATTS",
    "DRYRUN": "DRY_RUN",
    "DRY_RNU": "DRY_RUN",
    "ON_EXTI": "ON_EXIT",
    "RECONCILE_SECS": "RECONCILE_SECONDS",
    "SAFE_DEFAUTL": "SAFE_DEFAULT",
    "LOGLEVEL": "LOG_LEVEL",
    "READER_UID": "READER_UIDS",
}


@pytest.mark.parametrize("wrong", MISSPELT)
def test_a_misspelt_variable_is_refused_with_the_right_name(wrong: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_settings(EnforcerSettings, {f"POWER_AGENT_{wrong}": "200"})
    text = f"POWER_AGENT_{wrong} is no setting: did you mean POWER_AGENT_{MISSPELT[wrong]}?"
    assert text in str(refused.value)


@pytest.mark.parametrize("name", ["POWERAGENT_MIN_WATTS", "power_agent_min_watts"])
def test_a_misspelt_prefix_is_refused_too(name: str) -> None:
    with pytest.raises(SettingsError, match="did you mean POWER_AGENT_MIN_WATTS"):
        parse_settings(EnforcerSettings, {name: "200"})


def test_a_name_that_has_no_prefix_is_refused_with_one() -> None:
    wrong = NODE | {"POWER_AGENT_WATCH_NAMESPACE": "team-a"}
    with pytest.raises(SettingsError, match="did you mean WATCH_NAMESPACE"):
        parse_settings(WatcherSettings, wrong)


# Of versions to come, or that have been: an upgrade and a rollback must start.
OTHER_VERSIONS = [
    *("POD_LABELS", "READY", "NFD_DIR", "UPSTREAM_STATE", "METRIC_ALIASES", "PAUSE", "RUN_AS"),
    *("WATCHER_GID", "READER_GIDS", "LEASE_SECONDS", "RELEASE", "SCAN_INTERVAL", "LOG_FILE"),
    *("MIN_POWER", "SAFE_DEFAULT_WATTS", "METRICS_PORT", "KUBELET_SOCKET"),
]
# The kubelet's, for Services called power-agent, power-agent-metrics and the like.
SERVICE_LINKS = {
    "POWER_AGENT_SERVICE_HOST": "10.0.0.1",
    "POWER_AGENT_SERVICE_PORT": "9100",
    "POWER_AGENT_SERVICE_PORT_METRICS": "9100",
    "POWER_AGENT_PORT": "tcp://10.0.0.1:9100",
    "POWER_AGENT_PORT_9100_TCP": "tcp://10.0.0.1:9100",
    "POWER_AGENT_PORT_9100_TCP_PROTO": "tcp",
    "POWER_AGENT_PORT_9100_TCP_PORT": "9100",
    "POWER_AGENT_PORT_9100_TCP_ADDR": "10.0.0.1",
    "POWER_AGENT_METRICS_SERVICE_HOST": "10.0.0.1",
    "POWER_AGENT_METRICS_PORT": "tcp://10.0.0.1:9100",
    "POWER_AGENT_METRICS_PORT_53_UDP_ADDR": "10.0.0.1",
}


@pytest.mark.parametrize("name", OTHER_VERSIONS)
def test_a_variable_of_another_version_is_a_warning(name: str) -> None:
    for kind in (EnforcerSettings, WatcherSettings):
        environment = NODE | {f"POWER_AGENT_{name}": "1"}
        assert parse_settings(kind, environment) == parse_settings(kind, NODE)
        (warning,) = unread_variables(kind, environment)
        assert warning.startswith(f"POWER_AGENT_{name} is no setting of version ")


def test_a_misspelt_variable_of_the_other_program_is_a_warning_that_names_it() -> None:
    environment = NODE | {"POWER_AGENT_MINWATTS": "200"}
    parse_settings(WatcherSettings, environment)
    (warning,) = unread_variables(WatcherSettings, environment)
    assert warning.endswith("; did you mean POWER_AGENT_MIN_WATTS?")


@pytest.mark.parametrize("kind", [EnforcerSettings, WatcherSettings])
def test_what_kubernetes_sets_and_what_is_empty_is_nothing(kind: type[CommonSettings]) -> None:
    environment = NODE | SERVICE_LINKS | {"POWER_AGENT_MINWATTS": "", "HOME": "/"}
    assert parse_settings(kind, environment) == parse_settings(kind, NODE)
    assert unread_variables(kind, environment) == []


def test_every_setting_is_known_to_both_programs() -> None:
    """shared/unknown.py has their names: neither program may import the other's settings."""
    named = {name for name in ENFORCER | WATCHER if name.startswith(unknown.PREFIX)}
    assert named == unknown.EVERY
    both = dict.fromkeys(named, "")
    assert unread_variables(EnforcerSettings, both | {"POWER_AGENT_EVENTS": "true"}) == []
