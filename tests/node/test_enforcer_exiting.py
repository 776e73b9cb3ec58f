"""On cgroup version 1 a task that has begun to exit shows `/` in every hierarchy.

proc_cgroup_show (kernel/cgroup/cgroup.c): "On traditional hierarchies, all zombie tasks show up as
belonging to the root cgroup": PF_EXITING is enough. That holds from the beginning of do_exit(),
while the driver still tears down the context and lists the pid, and for as long as a process lives
whose first thread has ended. Taken at its word it is `other`: evidence to give its GPU back.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.node.enforcer_harness import EnforcerNode, pod_uid
from tests.waiting import until

A = pod_uid(1)
FREEZER = Path("/sys/fs/cgroup/freezer")
ROOT = f"/power-agent-test-{os.getpid()}"
SOURCE = """
#include <pthread.h>
#include <stddef.h>
#include <unistd.h>
static void *runs(void *nothing) { (void)nothing; for (;;) pause(); }
int main(void)
{
    pthread_t one;
    char c;
    if (read(0, &c, 1) < 1)
        return 1;
    pthread_create(&one, NULL, runs, NULL);
    pthread_exit(NULL); /* the process lives on, and its GPU context with it */
}
"""


@pytest.fixture
def pod_folder() -> Iterator[Path]:
    """A real cgroup v1 of a pod."""
    if os.geteuid() != 0 or not (FREEZER / "cgroup.procs").exists():
        pytest.skip("needs root and a cgroup v1 hierarchy")
    folder = FREEZER / ROOT[1:] / "kubepods" / "burstable" / f"pod{A}"
    folder.mkdir(parents=True)
    yield folder
    for each in (folder, *list(folder.parents)[:3]):
        each.rmdir()


@contextmanager
def worker(
    node: EnforcerNode, folder: Path, *command: str | Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the pod on GPU 0, shown in the kernel's own words; the driver still lists it."""
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            (folder / "cgroup.procs").write_text(str(process.pid))
            (node.work.root / str(process.pid)).symlink_to(f"/proc/{process.pid}")
            node.start()
            node.gpus[0].keep_dead = True
            node.gpus[0].add_process(process.pid)
            node.snapshot({A: 300})
            assert node.limit() == 300
            yield process
        finally:
            process.kill()


def shows_the_root(pid: int) -> bool:
    """Whether it is exiting, as the kernel shows it."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return any(line.endswith(":freezer:/") for line in lines)


def test_i4_a_living_process_whose_first_thread_has_ended_keeps_its_limit(
    pod_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.c").write_text(SOURCE)
    subprocess.run(["cc", "-pthread", "x.c", "-o", "x"], cwd=tmp_path, check=True)
    with (
        EnforcerNode(cgroup_root=ROOT) as node,
        worker(node, pod_folder, tmp_path / "x") as process,
    ):
        assert process.stdin is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        until(lambda: shows_the_root(process.pid), "the first thread ends")
        node.looks(5)
        assert process.poll() is None  # it lives
        assert node.limit() == 300
        assert [p.owner for p in node.gpu().processes] == [A]


def test_i4_a_worker_that_is_being_torn_down_is_no_stranger(pod_folder: Path) -> None:
    """Its pod is in the snapshot: it restarts."""
    with (
        EnforcerNode(cgroup_root=ROOT) as node,
        worker(node, pod_folder, "/bin/cat") as process,
    ):
        process.kill()  # and nobody waits for it yet
        until(lambda: shows_the_root(process.pid), "it exits")
        node.looks(5)
        assert node.limit() == 300
        assert node.gpu().processes == []
