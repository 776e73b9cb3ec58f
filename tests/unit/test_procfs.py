"""Reading /proc: real processes, made-up roots, and refusal to work where it would be blind."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from enforcer import procfs, sight
from enforcer.policy import Stranger
from enforcer.procfs import ProcessReader

UID = "2c1f7a54-0b6e-4d0b-9a51-3f4f7c9f0a11"
POD_LINE = f"0::/kubepods/burstable/pod{UID}/box\n"
USUAL_ROOTS = ("/", "/kubelet", "/kubelet.slice")
PROC = Path("/proc")


def stat_text(started_ticks: int, name: str = "a) b (c", flags: int = 0) -> str:
    before = " ".join(["S", *["0"] * 5, str(flags), *["0"] * 12])
    return f"42 ({name}) {before} {started_ticks} 0 0\n"


def proc_entry(root: Path, pid: int, cgroup: str = POD_LINE, started_ticks: int = 1000) -> Path:
    folder = root / str(pid)
    folder.mkdir()
    (folder / "cgroup").write_text(cgroup)
    (folder / "stat").write_text(stat_text(started_ticks))
    return folder


# ---- one process ----


def test_a_pods_process_with_its_evidence(tmp_path: Path) -> None:
    proc_entry(tmp_path, 42)
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[:2] == (UID, POD_LINE.strip())


def test_a_host_process_is_other(tmp_path: Path) -> None:
    proc_entry(tmp_path, 42, "0::/system.slice/sshd.service\n")
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] is Stranger.OTHER


def test_only_the_given_roots_count(tmp_path: Path) -> None:
    proc_entry(tmp_path, 42)
    assert ProcessReader(tmp_path, ("/elsewhere",)).owner(42, 1000)[0] is Stranger.OTHER


def test_evidence_is_bounded_and_text_whatever_the_bytes(tmp_path: Path) -> None:
    folder = proc_entry(tmp_path, 42)
    (folder / "cgroup").write_bytes(b"0::/\xff\xfe" + b"x" * 10_000 + b"\n")
    owner, evidence, _ = ProcessReader(tmp_path, ("/",)).owner(42, 1000)
    assert owner is Stranger.OTHER
    assert len(evidence) <= 400
    evidence.encode()


EXITING, ROOT_LINE = 0x4, "9:freezer:/\n"


def exiting(folder: Path, cgroup: str = ROOT_LINE, started_ticks: int = 1000) -> Path:
    """A task that exits, as a version 1 hierarchy shows it."""
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text(cgroup)
    (folder / "stat").write_text(stat_text(started_ticks, flags=EXITING))
    return folder


def test_a_process_that_exits_is_whose_its_living_threads_are(tmp_path: Path) -> None:
    process = exiting(tmp_path / "42")
    exiting(process / "task/42")
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] is None
    reaped = exiting(process / "task/41")  # between the reads of its cgroup and of its stat
    (reaped / "stat").unlink()
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] is None
    proc_entry(process / "task", 43)
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] == UID


def test_a_process_that_exits_and_shows_its_pod_is_the_pods(tmp_path: Path) -> None:
    """So it is with cgroup version 2: its threads need not be asked."""
    exiting(tmp_path / "42", POD_LINE)
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] == UID


def test_of_a_process_that_exits_with_many_threads_few_are_asked(tmp_path: Path) -> None:
    """They may all be made to stay: asking each would cost every other GPU its time."""
    process = exiting(tmp_path / "42")
    for thread in range(65):
        (process / "task" / str(thread)).mkdir(parents=True)
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] is Stranger.UNKNOWN


def test_a_number_reused_before_the_threads_are_asked_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, listed = exiting(tmp_path / "42"), os.listdir
    (process / "task").mkdir()
    proc_entry(process / "task", 42)

    def reused(path: str) -> list[str]:
        (process / "stat").write_text(stat_text(900))
        return [name for name in listed(path) if name == "42"]

    monkeypatch.setattr(os, "listdir", reused)
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] is None


def test_a_vanished_pid_is_a_normal_result(tmp_path: Path) -> None:
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] is None


def test_in_a_made_up_root_a_process_needs_no_more_than_its_cgroup(tmp_path: Path) -> None:
    (proc_entry(tmp_path, 42) / "stat").unlink()
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] == UID


def test_a_pid_that_vanishes_between_two_reads_has_ended(tmp_path: Path) -> None:
    folder = proc_entry(tmp_path, 42)
    (folder / "cgroup").unlink()
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] is None


def test_a_process_started_after_the_list_was_asked_for_only_has_the_number(
    tmp_path: Path,
) -> None:
    proc_entry(tmp_path, 42, started_ticks=1001)
    reader = ProcessReader(tmp_path, ("/",))
    assert reader.owner(42, 1000)[0] is None
    assert reader.owner(42, 1001)[0] == UID


def test_a_pid_reused_during_the_read_is_not_believed(tmp_path: Path) -> None:
    """The start time differs before and after; pipes make the two reads differ for sure."""
    folder = tmp_path / "42"
    folder.mkdir()
    for name in ("stat", "cgroup"):
        os.mkfifo(folder / name)

    def feed() -> None:
        (folder / "stat").write_text(stat_text(1000))
        (folder / "cgroup").write_text(POD_LINE)
        (folder / "stat").write_text(stat_text(1001))

    feeder = threading.Thread(target=feed)
    feeder.start()
    owner, evidence, _ = ProcessReader(tmp_path, ("/",)).owner(42, 5000)
    feeder.join()
    assert owner is None
    assert "number" in evidence


@pytest.mark.parametrize("what", ["directory", "input-output-error", "loop"])
def test_i5_an_unreadable_cgroup_of_a_living_pid_is_unknown(tmp_path: Path, what: str) -> None:
    folder = proc_entry(tmp_path, 42)
    path = folder / "cgroup"
    path.unlink()
    if what == "directory":
        path.mkdir()
    elif what == "loop":
        path.symlink_to("cgroup")
    else:
        path.symlink_to("/proc/self/mem")  # reading address 0: EIO
    owner, evidence, _ = ProcessReader(tmp_path, ("/",)).owner(42, 1000)
    assert owner is Stranger.UNKNOWN
    assert str(folder) in evidence


@pytest.mark.parametrize("text", ["", "42", "42 (x) S 1 2", "42 (x) " + "z " * 30, "\x00" * 50])
def test_i5_a_start_time_that_cannot_be_read_is_unknown(tmp_path: Path, text: str) -> None:
    folder = proc_entry(tmp_path, 42)
    (folder / "stat").write_text(text)
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] is Stranger.UNKNOWN


def test_i5_an_empty_cgroup_file_is_unknown(tmp_path: Path) -> None:
    proc_entry(tmp_path, 42, "")
    assert ProcessReader(tmp_path, ("/",)).owner(42, 1000)[0] is Stranger.UNKNOWN


# ---- real processes ----


@contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_real_process_is_other_and_none_once_it_ended() -> None:
    reader = ProcessReader(PROC, USUAL_ROOTS)
    with sleeper() as process:
        assert reader.owner(process.pid, procfs.now_ticks())[0] is Stranger.OTHER
    assert reader.owner(process.pid, procfs.now_ticks())[0] is None


def test_a_real_process_started_after_the_list_is_not_meant() -> None:
    reader, listed_ticks = ProcessReader(PROC, USUAL_ROOTS), procfs.now_ticks() - 200
    with sleeper() as process:
        assert reader.owner(process.pid, listed_ticks)[0] is None


def test_processes_that_end_while_they_are_read_never_raise() -> None:
    reader = ProcessReader(PROC, USUAL_ROOTS)
    seen = set()
    for _ in range(60):
        with subprocess.Popen(["true"]) as process:
            while process.poll() is None:
                seen.add(reader.owner(process.pid, procfs.now_ticks())[0])
            seen.add(reader.owner(process.pid, procfs.now_ticks())[0])
    assert seen <= {Stranger.OTHER, None}
    assert None in seen


def test_now_is_in_the_unit_of_start_times() -> None:
    with sleeper() as process:
        started = int((PROC / str(process.pid) / "stat").read_text().rpartition(")")[2].split()[19])
        assert 0 <= procfs.now_ticks() - started <= 10 * os.sysconf("SC_CLK_TCK")


# ---- boot ----


def test_boot_id_is_the_kernels() -> None:
    real = (PROC / "sys/kernel/random/boot_id").read_text()
    assert procfs.boot_id(PROC).strip() == real.strip()


def test_boot_id_of_a_made_up_root_that_has_one(tmp_path: Path) -> None:
    own = tmp_path / "sys/kernel/random/boot_id"
    own.parent.mkdir(parents=True)
    own.write_text("another-boot\n")
    assert procfs.boot_id(tmp_path).strip() == "another-boot"


def test_boot_id_of_a_made_up_root_without_one_is_the_kernels(tmp_path: Path) -> None:
    assert procfs.boot_id(tmp_path) == procfs.boot_id(PROC)


# ---- checks at start ----


def test_outside_kubernetes_nothing_is_checked() -> None:
    assert sight.cgroup_roots("auto", PROC, in_kubernetes=False)[:3] == USUAL_ROOTS
    assert sight.cgroup_roots("/x.slice", PROC, in_kubernetes=False) == ("/x.slice",)


def test_with_another_proc_root_nothing_is_checked(tmp_path: Path) -> None:
    assert sight.cgroup_roots("auto", tmp_path, in_kubernetes=True)[:3] == USUAL_ROOTS
    assert sight.cgroup_roots("/x", tmp_path, in_kubernetes=True) == ("/x",)


ASK = """
import sys
from pathlib import Path
from enforcer import procfs, sight
try:
    print("roots", *sight.cgroup_roots(sys.argv[1], Path("/proc"), in_kubernetes=True))
    owner, *_ = procfs.ProcessReader(Path("/proc"), ()).owner(1, procfs.now_ticks())
    print("pid 1", owner)
except sight.BlindError as error:
    print("blind", error)
"""


# A pid namespace whose pid 1 stays outside the pod, as a node has it. (A sandbox may hide its own.)
NODE = ("unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", '"$@"; exit $?', "sh")


def ask(
    *before: str, node: tuple[str, ...] = (), cgroup: Path | None = None, setting: str = "auto"
) -> str:
    """What the checks say in a process of its own: on `node`, in `cgroup`, through `before`."""
    command = [*before, sys.executable, "-c", ASK, setting]
    if cgroup is not None:
        move = f'echo $$ >"{cgroup}/cgroup.procs" && exec "$@"'
        command = [*node, "sh", "-c", move, "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_kubernetes_outside_any_pod_it_is_blind_and_names_the_remedy() -> None:
    said = ask()
    assert said.startswith("blind")
    assert "hostPID: true" in said
    assert said.count("\n") == 1


def cgroup2() -> Path | None:
    for line in (PROC / "self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    return None


@contextlib.contextmanager
def cgroup_of_our_own(*below: str) -> Iterator[Path]:
    """A cgroup below one of our own, never in the host's kubepods."""
    tree = cgroup2()
    if os.geteuid() != 0 or tree is None or not os.access(tree, os.W_OK):
        pytest.skip("making cgroups needs root and a writable cgroup2 tree")
    if "0::/" not in (PROC / "self/cgroup").read_text().splitlines():
        pytest.skip("this process sees a cgroup tree that does not begin at the host's")
    top = tree / f"power-agent-test-{os.getpid()}"
    folder = top.joinpath(*below)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        for path, _, _ in os.walk(top, topdown=False):
            Path(path).rmdir()


@pytest.fixture
def pod_cgroup() -> Iterator[tuple[Path, str]]:
    """A pod's cgroup; with its root's path."""
    with cgroup_of_our_own("kubepods", "burstable", f"pod{UID}", "box") as folder:
        yield folder, f"/{folder.parents[3].name}"


APPARMOR = "appArmorProfile {type: Unconfined}"
SELINUX = "seLinuxOptions {type: spc_t, level: s0}"


def need(*command: str) -> None:
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{' '.join(command)} does not work here")


@pytest.mark.root
def test_in_its_pod_it_learns_the_root_from_its_own_path(pod_cgroup: tuple[Path, str]) -> None:
    folder, root = pod_cgroup
    assert ask(cgroup=folder).startswith(f"roots {root} /system.slice/containerd.service ")


ENTER = 'echo 0 >"$0/cgroup.procs" && "$@"; exit $?'


def enters(folder: Path) -> tuple[str, ...]:
    """A shell that moves into a cgroup and waits there for what it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    return ("sh", "-c", ENTER, str(folder))


@pytest.mark.root
def test_the_usual_places_lie_below_pid_1s_root_and_where_the_runtime_is() -> None:
    """A node in a container: nothing of the machine around it counts."""
    need(*NODE)
    with cgroup_of_our_own("kubepods.slice") as folder:
        top = folder.parent
        slices = f"kubepods-burstable.slice/kubepods-burstable-pod{UID.replace('-', '_')}.slice"
        own = folder / slices / "cri-containerd-3fa9.scope"
        own.mkdir(parents=True)
        shim = enters(top / "runtime.slice/containerd.service")
        node = (*NODE[:4], *enters(top / "init.scope"), *shim)
        roots = ask(node=node, cgroup=own).splitlines()[0].split()[1:]
    name = f"/{top.name}"
    assert roots[:2] == [name, f"{name}/runtime.slice/containerd.service"]
    assert f"{name}/system.slice/containerd.service" in roots
    assert all(root.startswith(name) for root in roots)


@pytest.mark.root
def test_in_the_container_of_pid_1_it_is_blind_though_a_root_is_named() -> None:
    """Without hostPID and with --cgroups-per-qos=false no pod is named anywhere."""
    need(*NODE)
    with cgroup_of_our_own("k8s.io") as folder:
        said = ask(node=(*NODE[:4], *enters(folder)), cgroup=folder, setting="/")
    assert said.startswith("blind")
    assert "hostPID: true" in said


@pytest.mark.root
def test_in_its_pod_an_explicit_root_stands(pod_cgroup: tuple[Path, str]) -> None:
    assert ask(cgroup=pod_cgroup[0], setting="/x.slice").splitlines()[0] == "roots /x.slice"


@pytest.mark.root
def test_a_named_root_lets_it_start_where_the_own_path_names_no_pod() -> None:
    with cgroup_of_our_own() as folder:
        assert ask(cgroup=folder, setting="/a,/b.slice").splitlines()[0] == "roots /a /b.slice"
        said = ask(cgroup=folder)
        assert said.startswith("blind")
        assert "--cgroups-per-qos=false" in said
        assert folder.name in said


@pytest.mark.parametrize(
    ("number", "label", "who", "remedy"),
    [
        (errno.EACCES, "cri-containerd.apparmor.d (enforce)", "AppArmor", APPARMOR),
        (errno.EACCES, ":lxd-box_<var-lib-lxd>:docker-default (enforce)", "AppArmor", APPARMOR),
        (errno.EACCES, "", "AppArmor or SELinux", APPARMOR),
        (errno.EACCES, "system_u:system_r:container_t:s0:c1,c2", "SELinux", SELINUX),
        (errno.EACCES, "system_u:system_r:container_t:s0", "SELinux", SELINUX),
        (errno.EACCES, "unconfined", "user namespace", "hostUsers: true"),
        (errno.EPERM, "cri-containerd.apparmor.d (enforce)", "seccomp", "seccompProfile"),
    ],
)
def test_a_refusal_in_spite_of_both_capabilities_names_what_refused(
    monkeypatch: pytest.MonkeyPatch, number: int, label: str, who: str, remedy: str
) -> None:
    """The kernel's modules cannot be had here: what they answer is made up, and only that."""
    monkeypatch.setattr(sight, "may_join", lambda _process: True)
    monkeypatch.setattr(sight, "label", lambda _process: label)
    text = sight._remedy(OSError(number, os.strerror(number)))
    assert f", by {who}" in text or f", by a {who}" in text
    assert remedy in text
    assert ("appArmorProfile: Unconfined" in text) == (remedy == APPARMOR)
    assert "grant CAP_SYS_ADMIN" not in text


def test_a_refusal_for_want_of_a_capability_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sight, "may_join", lambda _process: False)
    monkeypatch.setattr(sight, "label", lambda _process: "cri-containerd.apparmor.d (enforce)")
    text = sight._remedy(OSError(errno.EACCES, "Permission denied"))
    assert "CAP_SYS_ADMIN and CAP_SYS_PTRACE" in text
    assert "AppArmor" not in text


@pytest.mark.root
def test_in_a_private_cgroup_namespace_it_joins_the_hosts(pod_cgroup: tuple[Path, str]) -> None:
    need(*NODE, "unshare", "-C")
    folder, root = pod_cgroup
    assert ask("unshare", "-C", node=NODE, cgroup=folder).startswith(
        f"roots {root} /system.slice/containerd.service "
    )


@pytest.mark.root
@pytest.mark.parametrize("missing", ["sys_ptrace", "sys_admin"])
def test_in_a_private_cgroup_namespace_that_it_cannot_leave_it_is_blind(
    pod_cgroup: tuple[Path, str], missing: str
) -> None:
    without = ("unshare", "-C", "setpriv", f"--bounding-set=-{missing}")
    need(*NODE, *without)
    said = ask(*without, node=NODE, cgroup=pod_cgroup[0])
    assert said.startswith("blind")
    assert "CAP_SYS_PTRACE" in said
    assert "CAP_SYS_ADMIN" in said


@pytest.mark.root
@pytest.mark.parametrize("also", [(), ("-C",)], ids=["host-cgroups", "private-cgroups"])
def test_where_pid_1_is_in_a_pod_it_is_blind(
    pod_cgroup: tuple[Path, str], also: tuple[str, ...]
) -> None:
    """A pid namespace of the pod's own: NVML would leave out everybody else in silence."""
    alone = ("unshare", *also, "--pid", "--fork", "--mount-proc")
    need(*alone)
    said = ask(*alone, cgroup=pod_cgroup[0])
    assert said.startswith("blind")
    assert "hostPID: true" in said


@pytest.mark.root
def test_a_real_process_in_a_real_pods_cgroup_is_the_pods(pod_cgroup: tuple[Path, str]) -> None:
    folder, root = pod_cgroup
    with sleeper() as process:
        (folder / "cgroup.procs").write_text(str(process.pid))
        owner, evidence, _ = ProcessReader(PROC, (root,)).owner(process.pid, procfs.now_ticks())
        assert owner == UID
        assert UID in evidence
        # The same place below a root that is not the kubelet's is nobody's pod.
        assert ProcessReader(PROC, ("/",)).owner(process.pid, procfs.now_ticks())[0] is (
            Stranger.OTHER
        )
        process.kill()
        process.wait()
