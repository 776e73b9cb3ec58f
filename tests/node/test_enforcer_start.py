"""What the enforcer refuses to start with: one line that names setting, value and remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.node.enforcer_harness import REPOSITORY, EnforcerNode, pod_uid

# Every setting's own words are tested with the settings; here, that the process ends so.
WRONG = {
    "watts": ({"max_watts": "350W"}, "POWER_AGENT_MAX_WATTS", "350W"),
    "crossing": ({"min_watts": "400", "max_watts": "300"}, "POWER_AGENT_MIN_WATTS", "400"),
    "conflict-alone": ({"conflict": "safe-default"}, "POWER_AGENT_SAFE_DEFAULT", "safe-default"),
    "lease": ({"lease": "release"}, "POWER_AGENT_LEASE", "release"),
    "lease-short": ({"lease": "release:1"}, "POWER_AGENT_LEASE", "heartbeats"),
    "misspelt": ({"minwatts": "200"}, "POWER_AGENT_MINWATTS", "POWER_AGENT_MIN_WATTS"),
    "uid": ({"watcher_uid": "watcher"}, "POWER_AGENT_WATCHER_UID", "watcher"),
    "scan-zero": ({"scan_seconds": "0"}, "POWER_AGENT_SCAN_SECONDS", "0"),
    "run-dir-long": ({"run_dir": "/tmp/" + "x" * 200}, "POWER_AGENT_RUN_DIR", "xxx"),
    "run-dir-no-directory": ({"run_dir": "/dev/null/run"}, "POWER_AGENT_RUN_DIR", "/dev/null/run"),
    "run-dir-a-file": ({"run_dir": "/dev/null"}, "POWER_AGENT_RUN_DIR", "/dev/null"),
    "state-dir-no-directory": (
        {"state_dir": "/dev/null/state"},
        "POWER_AGENT_STATE_DIR",
        "/dev/null/state",
    ),
    "state-dir-a-file": ({"state_dir": "/dev/null"}, "POWER_AGENT_STATE_DIR", "/dev/null"),
}


@pytest.mark.parametrize(("settings", "variable", "value"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_setting_is_one_line_and_exit_status_2(
    settings: dict[str, str], variable: str, value: str
) -> None:
    with EnforcerNode() as node:
        status, said = node.run_to_end(**settings)
        assert status == 2, said
        assert said.count("\n") == 1
        assert variable in said
        assert value in said
        assert node.log_text() == ""


def test_the_start_tells_what_it_works_by_and_how_many_gpus_there_are() -> None:
    with EnforcerNode(gpus=3, min_watts="250.5", dry_run="true", pod_labels="a=b") as node:
        node.start()
        (line,) = node.logs("started")
        assert (line["gpus"], line["owned"], line["dry_run"]) == (3, 0, True)
        assert line["settings"]["POWER_AGENT_MIN_WATTS"] == "250.5"
        assert (
            line["settings"]["POWER_AGENT_SCAN_SECONDS"]
            == node.settings["POWER_AGENT_SCAN_SECONDS"]
        )
        assert line["settings"]["POWER_AGENT_MAX_WATTS"] is None
        assert line["settings"]["POWER_AGENT_ON_EXIT"] == "restore"
        (warning,) = node.logs("setting_unknown")
        assert (warning["level"], "POWER_AGENT_POD_LABELS" in warning["why"]) == ("warning", True)


def test_a_start_without_nvml_knows_no_number_of_gpus() -> None:
    with EnforcerNode() as node:
        node.gpus.driver_missing()
        node.start()
        assert node.logs("started")[0]["gpus"] is None


def test_an_end_that_leaves_limits_says_which() -> None:
    with EnforcerNode(on_exit="hold") as node:
        node.start()
        node.run_pod(pod_uid(1))
        node.snapshot({pod_uid(1): 350})
        node.stop()
        (line,) = node.logs("stopped")
        assert (line["still_owned"], line["watts"]) == (1, {node.gpus[0].uuid: 350})
        assert "stay in force" in line["holds"]


def test_a_socket_path_that_is_a_directory_is_refused() -> None:
    with EnforcerNode() as node:
        (node.run_dir / "control.sock").mkdir(parents=True)
        status, said = node.run_to_end()
        assert status == 2
        assert said.count("\n") == 1
        assert "control.sock" in said


def test_a_stale_socket_is_replaced() -> None:
    with EnforcerNode() as node:
        node.start()
        node.kill()
        assert (node.run_dir / "control.sock").exists()
        node.start()
        assert node.status().enforcer.pid == node.pid


def test_i5_in_kubernetes_outside_any_pod_it_refuses_and_names_the_remedy() -> None:
    with EnforcerNode() as node:
        node.settings["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
        status, said = node.run_to_end(proc_root="/proc")
        assert status == 2
        assert said.count("\n") == 1
        assert "hostPID: true" in said
        assert not node.state_dir.exists()


def test_in_kubernetes_with_another_proc_root_the_checks_do_not_apply() -> None:
    with EnforcerNode() as node:
        node.settings["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
        node.start()
        assert node.status().enforcer.cgroup_roots[:3] == ["/", "/kubelet", "/kubelet.slice"]


def test_i5_a_proc_that_is_not_there_is_refused() -> None:
    with EnforcerNode() as node:
        status, said = node.run_to_end(proc_root="/nonexistent")
        assert status == 2
        assert said.count("\n") == 1
        assert "POWER_AGENT_PROC_ROOT='/nonexistent'" in said


def test_i5_a_proc_that_hides_processes_is_refused(tmp_path: Path) -> None:
    """Every process would look as if it had ended, and every GPU idle."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    if tuple(map(int, os.uname().release.split(".")[:2])) < (5, 8):
        pytest.skip("before Linux 5.8 the option would hold for every proc of this machine")
    mount = ["mount", "-t", "proc", "-o", "hidepid=2,gid=4242", "proc", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a proc is not allowed here")
    try:
        with EnforcerNode() as node:
            status, said = node.run_to_end(proc_root=str(tmp_path))
            assert status == 2, said
            assert said.count("\n") == 1
            assert "without hidepid" in said
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_the_cgroup_root_that_was_set_is_shown() -> None:
    with EnforcerNode(cgroup_root="/kubelet.slice/") as node:
        node.start()
        assert node.status().enforcer.cgroup_roots == ["/kubelet.slice"]


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_version_and_help(option: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "enforcer", option],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "power-agent-enforcer" in done.stdout
    assert ("POWER_AGENT_LEASE" in done.stdout) == (option == "--help")
