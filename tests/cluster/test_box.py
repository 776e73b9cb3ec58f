"""The box that the node runs in: nothing of it outlives its maker, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.box import NAMESPACES, Box, hierarchies
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and cgroups need root")

_MAKER = """
import sys
from tests.cluster.box import Box
with Box() as box:
    box.services = {"one": ["sleep", "100000"]}
    box.addresses = {"lo": [], "link0": ["10.9.0.1/24"]}
    box.start()
    print(box.init_pid, box.folder, *box._entrances.split(), flush=True)
    sys.stdin.read()
"""

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""
HYBRID_OWN = "2:cpu,cpuacct:/a/b\n1:name=systemd:/\n0::/c\n"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.mark.parametrize(
    ("mountinfo", "own", "folders"),
    [
        (
            HYBRID,
            HYBRID_OWN,
            {
                "/sys/fs/cgroup/cpu,cpuacct/a/b/box": "cpu,cpuacct",
                "/sys/fs/cgroup/systemd/box": "name=systemd",
                "/sys/fs/cgroup/unified/c/box": "",
            },
        ),
        (UNIFIED, "0::/user.slice/session-1.scope\n", {"/sys/fs/cgroup/box": ""}),
    ],
    ids=["hybrid", "version-2"],
)
def test_the_box_has_a_cgroup_in_every_tree(
    mountinfo: str, own: str, folders: dict[str, str]
) -> None:
    found = hierarchies(mountinfo, own, "box")
    assert {str(tree.folder): tree.options for tree in found} == folders


@needs_root
def test_what_runs_inside_sees_only_the_box() -> None:
    with Box() as box:
        box.services = {"one": ["sleep", "100000"]}
        box.start()
        # Process 1, the service, and whoever looks.
        until(lambda: len(_pids_inside(box)) == 3, "the service")
        assert box.run("ls", "/var/lib") == ""
        assert box.run("cat", "/proc/self/cgroup").count(":/..") == 0
        for namespace in NAMESPACES:
            name = {"--mount": "mnt"}.get(namespace, namespace.removeprefix("--"))
            here = Path(f"/proc/self/ns/{name}").readlink()
            assert box.run("readlink", f"/proc/1/ns/{name}").strip() != str(here)


def _pids_inside(box: Box) -> list[str]:
    return [entry for entry in box.run("ls", "/proc").split() if entry.isdigit()]


@needs_root
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None], ids=["KILL", "TERM", "end"])
def test_nothing_outlives_the_maker(how: signal.Signals | None) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _MAKER],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as maker:
        assert maker.stdin is not None
        assert maker.stdout is not None
        init, folder, *entrances = maker.stdout.readline().split()
        mounts = Path(f"/proc/{init}/mountinfo")
        assert "/sys/fs/cgroup" in mounts.read_text()
        members = {pid for file in entrances for pid in Path(file).read_text().split()}
        assert len(members) >= 3  # unshare, process 1, the service
        if how is None:
            maker.stdin.close()
        else:
            maker.send_signal(how)
        maker.wait()

        def left() -> list[str]:
            processes = [pid for pid in members if Path(f"/proc/{pid}").exists()]
            places = [file for file in (folder, *entrances) if Path(file).exists()]
            return processes + places

        until(lambda: not left(), "everything gone", explain=left)
    assert Path(folder).name not in Path("/proc/self/mountinfo").read_text()
    assert "link0" not in Path("/proc/net/dev").read_text()
