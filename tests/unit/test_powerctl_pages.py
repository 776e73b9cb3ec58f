"""What powerctl says on its pages: widths, the verdict, names, and what it answers where it cannot.

Pure functions for the most part; tests/unit/test_powerctl.py has the process.
"""

import errno
import os
from pathlib import Path

import msgspec
import pytest

from shared.messages import Counters, Gpu, Pod, PodName, Process, StatusReply, WatcherStatus
from shared.powerctl import (
    away_checks,
    doctor,
    layout,
    missing,
    overview,
    processes,
    reply_checks,
    tables,
    verdict,
    watcher_checks,
)
from shared.powerctl.check import Check
from shared.powerctl.explain import explain
from tests.unit.test_powerctl import (
    LINKED,
    UID_A,
    UID_B,
    UID_C,
    enforcer,
    gpu,
    managed_gpu,
    pod,
    reply,
)

GONE = "5a8f0e6d-7c1b-4b0e-8d2a-6f1e9c3b7a55"
LOST_UUID = "GPU-3f9a1c2e-0b6e-4d0b-9a51-3f4f7c9f0a11"
SILENT = WatcherStatus(connected=False, session="s", revision=1, age_s=75.0)
NEVER = WatcherStatus()


def invalid(**changes: object) -> Pod:
    plain = pod(
        UID_A,
        "worker-1",
        namespace="default",
        raw="350W",
        requested_mw=None,
        state="invalid",
        reason="'350W' is no limit: write decimal watts such as 350",
    )
    return msgspec.structs.replace(plain, **changes)


def lost(**changes: object) -> Gpu:
    usual: dict[str, object] = {
        "uuid": LOST_UUID,
        "pci": "00000000:5D:00.0",
        "state": "lost",
        "reason": "off the bus",
    }
    return gpu(None, **(usual | changes))


def trouble() -> StatusReply:
    """A node with something of everything, and long names."""
    many = [gpu(number, pci=f"00000000:{number:02X}:00.0") for number in range(3, 8)]
    long = pod(
        UID_B[:-1] + "0",
        "vllm-disaggregated-prefill-worker-7d9f8c6b5d-abcde",
        namespace="production-inference",
        gpus=[each.uuid for each in many],
        state="waiting",
        reason="no process of it is seen on a GPU yet; " * 4,
    )
    plain = reply()
    return msgspec.structs.replace(
        plain, gpus=[*plain.gpus, *many, lost()], pods=[*plain.pods, invalid(), long]
    )


# ------------------------------------------------------------------------------- the width


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_every_page_stays_within_the_width_and_uses_it(width: int) -> None:
    status = trouble()
    checks = reply_checks.from_reply(msgspec.structs.replace(status, watcher=SILENT))
    pages = [overview.status(status, width=width), doctor.lines(checks, width=width)]
    for subject in (UID_A, "0", LOST_UUID):
        explanation = explain(status, subject, width, verbose=True)
        assert explanation is not None
        pages.append(explanation.text)
    widest = [max(map(len, page)) for page in pages]
    assert width * 0.8 <= max(widest) <= width, widest


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_path_that_is_longer_than_a_line_ends_it_behind_a_slash(width: int) -> None:
    path = "/var/lib/kubelet/device-plugins/" + "a-folder-of-this-name/" * 3 + "checkpoint"
    checks = reply_checks.from_reply(reply(enforcer=enforcer(kubelet=f"{path}: not there")))
    text = doctor.lines(checks, width=width)
    assert max(map(len, text)) <= width
    first = next(number for number, line in enumerate(text) if "/var/lib/kubelet/" in line)
    last = next(number for number, line in enumerate(text) if "checkpoint:" in line)
    assert first < last
    assert all(line.endswith("/") for line in text[first:last])
    assert path in "".join(line.strip() for line in text[first : last + 1])


def test_what_a_dry_run_would_set_is_not_called_nothing() -> None:
    dry = gpu(0, original_mw=None, target_mw=None, wanted_mw=350_000, managed=False)
    explanation = explain(reply(gpus=[dry]), "0", 100)
    assert explanation is not None
    assert "  target      none: left as it is; would be 350 W" in explanation.text


def test_a_gpu_that_was_given_back_was_touched() -> None:
    free = gpu(0, state="free", original_mw=None, managed=False)
    for writes, said in (({}, "never touched"), ({"release": 1}, "given back")):
        status = reply(gpus=[msgspec.structs.replace(free, writes=writes)])
        explanation = explain(status, "0", 100)
        assert explanation is not None
        assert f"  found       {said}; factory default 700 W" in explanation.text


def test_what_is_left_out_where_it_is_narrow_is_said_and_nothing_is_where_it_is_wide() -> None:
    narrow = "\n".join(overview.status(trouble(), width=60))
    assert "left out: PCI, DRAW, RANGE, FOUND, MODEL" in narrow
    assert "left out" not in "\n".join(overview.status(trouble(), width=200))


def test_no_terminal_has_a_hundred_columns_and_columns_may_say_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", _no_terminal)
    assert layout.terminal_width() == 100
    monkeypatch.setenv("COLUMNS", "72")
    assert layout.terminal_width() == 72


def _no_terminal(_fd: int) -> os.terminal_size:
    raise OSError(errno.ENOTTY, "no terminal")


def test_a_uuid_in_a_table_is_short_and_explain_knows_it_and_the_pci_address() -> None:
    status = trouble()
    text = "\n".join(overview.status(status, width=100))
    assert "\nGPU-3f9a1c2e  0000:5d:00.0  lost" in text
    for subject in ("GPU-3f9a1c2e", "0000:5d:00.0", "00000000:5D:00.0"):
        explanation = explain(status, subject, 120)
        assert explanation is not None
        assert explanation.text[0] == (
            f"GPU without an index now, {LOST_UUID}, PCI 00000000:5D:00.0, NVIDIA H100 80GB HBM3"
        )


# ------------------------------------------------------------------------------ the verdict


def enforced(count: int) -> list[Pod]:
    return [pod(f"{number}{UID_A[1:]}", f"good-{number}") for number in range(count)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pods": enforced(4)}, "4 of 4 pods have what they asked for"),
        ({"pods": enforced(1)}, "1 of 1 pod has what it asked for"),
        (
            {"pods": [*enforced(3), invalid()]},
            "3 of 4 pods have what they asked for; default/worker-1: invalid",
        ),
        (
            {"pods": [invalid(uid=f"{n}{UID_B[1:]}", name=f"p-{n}") for n in range(5)]},
            "0 of 5 pods have what they asked for; default/p-0: invalid; default/p-1: invalid; "
            "default/p-2: invalid; and 2 more",
        ),
        (
            {"pods": [pod(UID_A, "w", state="waiting"), pod(UID_B, "f", state="failed")]},
            "0 of 2 pods have what they asked for; team-a/f: failed; team-a/w: waiting",
        ),
        ({"pods": []}, "no pod of this node asks for a limit"),
        (
            {"pods": [], "watcher": NEVER},
            "no pod is known: the watcher has not told of any yet",
        ),
        (
            {"pods": [], "watcher": SILENT},
            "no pod of this node asks for a limit; the watcher is silent for 1 min 15 s",
        ),
        (
            {"pods": enforced(1), "gpus": [gpu(0), gpu(3, state="held"), lost()]},
            "1 of 1 pod has what it asked for; GPU 3: held; GPU GPU-3f9a1c2e: lost",
        ),
        (
            {
                "pods": [],
                "enforcer": enforcer(nvml="failing", dry_run=True),
                "watcher": msgspec.structs.replace(LINKED, api_error="timed out"),
            },
            "no pod of this node asks for a limit; NVML is failing; the API does not answer the "
            "watcher; DRY RUN: no limit is written",
        ),
    ],
)
def test_the_first_sentence_says_how_the_node_does(changes: dict[str, object], said: str) -> None:
    status = reply(**({"gpus": []} | changes))
    assert verdict.verdict(status) == said
    assert overview.status(status, width=300)[0] == said


def test_invalid_is_trouble_and_its_reason_is_said_once() -> None:
    status = reply(pods=[invalid()])
    assert verdict.problems(status) == [
        "pod default/worker-1 is invalid: '350W' is no limit: write decimal watts such as 350"
    ]
    assert "\n".join(overview.status(status)).count("is no limit") == 1


@pytest.mark.parametrize(
    ("watcher", "said"),
    [
        (LINKED, ""),
        (msgspec.structs.replace(LINKED, api_age_s=60.0), ""),
        (msgspec.structs.replace(LINKED, api_age_s=240.0), "its last word came 4 min 0 s ago"),
        (
            msgspec.structs.replace(LINKED, api_age_s=5.0, api_error="timed out"),
            "timed out; its last word came 5.0 s ago",
        ),
        (msgspec.structs.replace(NEVER, api_error="403"), "does not answer the watcher: 403"),
    ],
)
def test_status_and_doctor_know_how_the_api_does(watcher: WatcherStatus, said: str) -> None:
    status = reply(watcher=watcher)
    [check] = [c for c in reply_checks.from_reply(status) if c.name == "API server"]
    assert (check.result, said in check.seen) == ("fail" if said else "ok", True)
    assert any(said in problem for problem in verdict.problems(status)) or not said


# ------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, ["350", "W", "350", "W"]),
        ({"managed": False}, ["350", "W"]),  # dry run, or a pod that asks for nothing usable
        ({"limit_mw": None}, ["350", "W"]),
        ({"limit_mw": 700_000}, ["350", "W"]),  # entered, and the write was refused
        ({"limit_mw": 400_000}, ["350", "W", "400", "W"]),
    ],
)
def test_holds_is_empty_where_nothing_is_held(changes: dict[str, object], holds: list[str]) -> None:
    mine = msgspec.structs.replace(managed_gpu(0, 350_000, [UID_A]), **changes)
    status = reply(gpus=[mine], pods=[pod(UID_A, "solo")])
    [row] = [line for line in tables.pod_table(status) if line.endswith("team-a/solo")]
    assert row.split() == ["enforced", *holds, "0", "team-a/solo"]


@pytest.mark.parametrize(
    ("found", "state", "users"),
    [
        ([], "free", "-"),
        (["other"], "in use", "1 other process"),
        (["other", "unknown", GONE], "in use", "3 other processes"),
        ([UID_A], "in use", "team-a/llm-0"),
        (["other"] * 32, "in use", "32 other processes or more"),
    ],
)
def test_a_gpu_with_strangers_is_not_free_to_the_reader(
    found: list[str], state: str, users: str
) -> None:
    running = [Process(pid=n + 1, owner=owner, evidence="") for n, owner in enumerate(found)]
    row = tables.gpu_table(reply(gpus=[gpu(0, processes=running)]), width=200)[1]
    assert row.startswith(f"0    {state} ")
    assert row.endswith(f"  {users}")


def test_a_pod_that_has_gone_is_still_called_by_name() -> None:
    named = [PodName(uid=GONE, namespace="team-a", name="old-0")]
    kept = managed_gpu(0, 350_000, [GONE], state="held", reason=f"for {GONE}", pod_names=named)
    status = reply(gpus=[kept], pods=[])
    text = "\n".join(overview.status(status, width=200))
    assert "  team-a/old-0" in text
    assert "GPU 0 is held: for team-a/old-0" in text
    assert GONE not in text
    assert missing.why(status, "team-a/old-0") == (
        "pod team-a/old-0 has gone; GPU 0 still has its limit: powerctl explain 0"
    )
    unheard = WatcherStatus(
        connected=False, api_error="Connection refused", unlisted="the API server gave no list"
    )
    said = missing.why(reply(gpus=[kept], pods=[], watcher=unheard), "team-a/old-0")
    assert "has gone" not in said  # nobody has told of any pod yet
    assert "Connection refused" in said
    assert said.endswith("; GPU 0 is kept for it: powerctl explain 0")
    nameless = msgspec.structs.replace(kept, pod_names=[PodName(uid=GONE)])
    assert "  pod 5a8f0e6d" in "\n".join(overview.status(reply(gpus=[nameless], pods=[])))


def test_many_gpus_of_a_pod_are_a_range() -> None:
    assert layout.ranges([3, 0, 1, 2, 6]) == "0-3,6"
    assert layout.ranges([]) == ""


# ------------------------------------------------------------------------- what is not known


@pytest.mark.parametrize(
    ("changes", "subject", "said"),
    [
        ({}, "team-b/x", "no annotated pod of node-a is called 'team-b/x': it has no annotation, "),
        ({}, "team-b/x", "kubectl get pod x -n team-b -o yaml tells which"),
        ({}, GONE, "custom-columns=U:.metadata.uid"),
        ({"watcher": SILENT}, "team-b/x", "(the watcher is silent for 1 min 15 s)"),
        ({"watcher": NEVER}, "team-b/x", "no pod is known: the watcher has not told of any pod"),
        (
            {"watcher": msgspec.structs.replace(NEVER, api_error="401")},
            "team-b/x",
            "no pod is known: the API does not answer the watcher: 401",
        ),
        (
            {"gpus": [gpu(2, processes=[Process(pid=7, owner=GONE, evidence="")])]},
            GONE,
            f"pod {GONE} runs on GPU 2 of this node and has no annotation",
        ),
        ({}, "9", "this node has no GPU 9: it has GPU 0-2"),
        ({"gpus": [lost()]}, "0", "it has none, and without an index GPU-3f9a1c2e (lost)"),
        ({}, "GPU-ffffffff", "no GPU of this node is called 'GPU-ffffffff'"),
        ({}, "llm-9", "pods are NAMESPACE/NAME"),
    ],
)
def test_explain_says_why_nothing_is_known(
    changes: dict[str, object], subject: str, said: str
) -> None:
    status = reply(**changes)
    assert explain(status, subject) is None
    text = missing.why(status, subject)
    assert said in text
    assert "did you mean" not in text


@pytest.mark.parametrize(
    ("subject", "near"),
    [
        ("team-a/lmm-0", ["team-a/llm-0"]),
        ("team-a/emebd", ["team-a/embed"]),
        ("embed", ["team-a/embed"]),
        ("default/embed", ["team-a/embed"]),
        ("taem-a/embed", ["team-a/embed"]),
        ("GPU-3f9a1c2e-0b6e-4d0b-9a51-3f4f7c9f0a12", [LOST_UUID]),
        ("team-a/llm-1", []),  # another number is another pod
        ("team-a/xyz", []),
        ("team-a/train-embed", []),
        ("2", []),
        ("a", []),
        ("", []),
    ],
)
def test_only_what_is_near_is_meant(subject: str, near: list[str]) -> None:
    status = reply(gpus=[*reply().gpus, lost()])
    assert missing.near(status, subject) == near


def test_cgroup_lines_are_shown_on_request_alone() -> None:
    unknown = Process(pid=7, owner="unknown", evidence="0::/../odd")
    status = reply(gpus=[gpu(0, processes=[unknown])])
    for verbose, said in ((False, "pid 7 of an owner unknown (-v shows"), (True, "by 0::/../odd")):
        explanation = explain(status, "0", verbose=verbose)
        assert explanation is not None
        text = "\n".join(explanation.text)
        assert said in text
        assert ("0::/" in text) is verbose


# ------------------------------------------------------------------------------- the doctor


def check(checks: list[Check], name: str) -> Check:
    [found] = [each for each in checks if each.name == name]
    return found


@pytest.mark.parametrize(
    ("state", "reason", "remedy"),
    [
        ("held", "its process list cannot be read: nvml: UNKNOWN", "`process lists`, above"),
        ("held", "watcher is silent", "`watcher`, above"),
        ("held", "it cannot be told whether a process on it belongs to a pod", "`unknown owners`"),
        ("failed", "nvmlDeviceSet...: NO_PERMISSION", "`NVML permission`, above"),
        ("failed", "not taken: No space left on device", "`ledger`, above"),
        ("failed", "it takes no power limit", "keep annotated pods off"),
        ("failed", "set to 1 mW without an error, yet it reads 2 mW", "another program"),
        ("failed", "nvmlDeviceSet...: UNKNOWN", "powerctl explain 4 shows what holds meanwhile"),
    ],
)
def test_doctor_leads_from_a_gpu_to_its_cause(state: str, reason: str, remedy: str) -> None:
    checks = reply_checks.from_reply(reply(gpus=[gpu(4, state=state, reason=reason)]))
    found = check(checks, "GPU 4")
    assert remedy in found.remedy
    assert "log" not in found.remedy
    for other in ("process lists", "watcher", "NVML permission", "unknown owners"):
        if f"`{other}`" in found.remedy:
            assert other in [each.name for each in checks]


def test_permission_is_judged_by_the_last_write_and_names_the_user_namespace() -> None:
    past = gpu(0, write_failures={"NO_PERMISSION": 3})
    now = gpu(1, state="failed", reason="set: NO_PERMISSION", write_failures={"NO_PERMISSION": 1})
    counters = Counters(limit_writes=4)
    well = reply_checks.permission(reply(gpus=[past], counters=counters), sys_admin=True)
    assert (well.result, "3 refused before" in well.seen) == ("ok", True)
    ill = reply_checks.permission(reply(gpus=[past, now], counters=counters), sys_admin=True)
    assert (ill.result, "GPU 1: the last write was refused" in ill.seen) == ("fail", True)
    assert "hostUsers: false" in ill.remedy


def a_watcher(**changes: object) -> processes.Running:
    usual: dict[str, object] = {
        "pid": 50,
        "uid": 65532,
        "state": "S",
        "environment": {"POWER_AGENT_RUN_DIR": "/run/power-agent"},
    }
    return processes.Running(**(usual | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("watcher", "found", "seen", "remedy"),
    [
        (
            msgspec.structs.replace(NEVER, unlisted="no list of pods yet"),
            [a_watcher()],
            "the watcher is there but has no pods to tell: no list of pods yet",
            "`API server`, below",
        ),
        (
            msgspec.structs.replace(NEVER, api_error="timed out"),
            None,
            "has no pods to tell: the API does not answer the watcher: timed out",
            "`API server`, below",
        ),
        (NEVER, [], "no watcher runs on this node, never heard", "start it"),
        (SILENT, [a_watcher(state="T")], "pid 50 runs but is stopped", "kill -CONT 50"),
        (NEVER, [a_watcher(uid=7)], "as uid 7, but only uid 65532 is heard", "WATCHER_UID=7"),
        (
            NEVER,
            [a_watcher(environment={"POWER_AGENT_RUN_DIR": "/elsewhere"})],
            "with POWER_AGENT_RUN_DIR=/elsewhere, and the enforcer's is /run/power-agent",
            "mount it into both",
        ),
        (SILENT, [a_watcher()], "sends nothing, last heard 1 min 15 s ago", "LOGS"),
        (SILENT, None, "not connected, last heard", "POWER_AGENT_WATCHER_UID"),
    ],
)
def test_doctor_finds_why_the_watcher_is_not_heard(
    watcher: WatcherStatus, found: list[processes.Running] | None, seen: str, remedy: str
) -> None:
    sight = watcher_checks.Sight(found, 65532, "/run/power-agent", "LOGS")
    check = watcher_checks.link(watcher, Counters(), sight)
    assert (check.result, seen in check.seen) == ("fail", True), check.seen
    assert remedy in check.remedy


def a_process(proc: Path, pid: int, program: str, state: str, **environment: str) -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "cmdline").write_text(f"python\0-I\0-m\0{program}\0")
    status = f"State:\t{state} (x)\nUid:\t0\t0\t0\t0\n"
    (folder / "status").write_text(status)
    variables = "".join(f"{name}={value}\0" for name, value in environment.items())
    (folder / "environ").write_text(variables)


@pytest.mark.parametrize(
    ("state", "seen", "remedy"),
    [
        (None, "none runs", "if it ends at once"),
        ("T", "pid 50 is stopped", "kill -CONT 50"),
        ("D", "waits in the kernel", "dmesg"),
        ("R", "busy", "kill 50; limits stay"),
        ("S", "pid 50 runs", "kill 50; limits stay"),
    ],
)
def test_doctor_says_what_an_enforcer_does_that_gives_no_answer(
    tmp_path: Path, state: str | None, seen: str, remedy: str
) -> None:
    if state:
        run = {"POWER_AGENT_RUN_DIR": "/run/x", "POWER_AGENT_STATE_DIR": "/nonexistent"}
        a_process(tmp_path, 50, "enforcer", state, **run)
    a_process(tmp_path, 60, "enforcer", "S", POWER_AGENT_RUN_DIR="/run/another-node")
    [found] = away_checks.checks(Path("/run/x"), tmp_path, {}, "pod-0")
    assert (found.result, seen in found.seen) == ("fail", True), found.seen
    assert remedy in found.remedy


def test_doctor_names_who_holds_the_lock_that_an_enforcer_waits_for(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "lock").touch()
    inode = (state / "lock").stat().st_ino
    proc = tmp_path / "proc"
    a_process(proc, 50, "enforcer", "S", POWER_AGENT_STATE_DIR=str(state))
    a_process(proc, 40, "enforcer", "S", POWER_AGENT_RUN_DIR="/run/other")
    (proc / "locks").write_text(
        f"1: FLOCK  ADVISORY  WRITE 40 fd:01:{inode} 0 EOF\n"
        f"1: -> FLOCK  ADVISORY  WRITE 50 fd:01:{inode} 0 EOF\n"
    )
    run_dir = Path("/run/power-agent")
    [found] = away_checks.checks(run_dir, proc, {}, "pod-0")
    assert "pid 50 waits for pid 40" in found.seen
    assert "python -I -m enforcer" in found.seen


@pytest.mark.parametrize(
    ("label", "capabilities", "seen", "remedy"),
    [
        ("cri-containerd.apparmor.d (enforce)\n", 0x280000, "AppArmor (cri", "Unconfined"),
        ("system_u:system_r:container_t:s0:c1,c2", 0x280000, "SELinux (system_u", "spc_t"),
        ("docker-default (enforce)", 0, "without CAP_SYS_PTRACE", "privileged"),
    ],
)
def test_doctor_knows_who_refuses_the_hosts_cgroup_namespace(
    tmp_path: Path, label: str, capabilities: int, seen: str, remedy: str
) -> None:
    (tmp_path / "self/attr").mkdir(parents=True)
    (tmp_path / "self/attr/current").write_text(label)
    (tmp_path / "self/status").write_text(f"CapEff:\t{capabilities:016x}\n")

    def refused(_path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    found = away_checks.cgroup_namespace(tmp_path, refused)
    assert (found.result, seen in found.seen) == ("fail", True), found.seen
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("resolv", "namespace"),
    [
        ("search gpu-ops.svc.cluster.local svc.cluster.local cluster.local\n", "gpu-ops"),
        ("nameserver 10.96.0.10\nsearch\tgpu-ops.svc.corp.example eu.example\n", "gpu-ops"),
        ("search eu.svc-example.com example.com\n", "dynamo-system"),
        ("search svc.cluster.local\n", "dynamo-system"),
        (None, "dynamo-system"),
    ],
)
def test_in_a_pod_the_next_command_is_one_of_kubectl_in_its_namespace(
    tmp_path: Path, resolv: str | None, namespace: str
) -> None:
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    if resolv is not None:
        (tmp_path / "resolv.conf").write_text(resolv)
    assert away_checks.logs(
        environment, "power-agent-x7k2p", "enforcer", tmp_path / "resolv.conf"
    ).startswith(f"kubectl logs -n {namespace} power-agent-x7k2p -c enforcer --tail=20")


def test_a_name_is_distant_from_another_by_its_typing_errors() -> None:
    words = {("llm", "llm"): 0, ("lmm", "llm"): 1, ("emebd", "embed"): 1, ("abc", "xyz"): 3}
    for (one, other), distance in words.items():
        assert missing._distance(one, other) == distance
    assert UID_C not in missing.near(reply(), UID_C[:7])
