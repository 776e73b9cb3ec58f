"""Why nobody can be reached at the control socket: each cause by real files and real processes."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.sockets import control_path, hindrance, open_control

WATCHER = 65532
ASK = """
import os, sys
from pathlib import Path
from shared.sockets import control_path, hindrance, open_control
run_dir, uid = Path(sys.argv[1]), int(sys.argv[2])
os.setgroups([]), os.setgid(uid), os.setuid(uid)
try:
    open_control(run_dir, 5).close()
    print("open")
except OSError as error:
    print(*hindrance(control_path(run_dir), error), sep="; ")
"""


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder that every uid reaches: pytest's own is for one."""
    folder = Path("/tmp") / f"power-agent-sockets-{os.getpid()}"
    folder.mkdir(mode=0o755)
    yield folder
    folder.chmod(0o755)
    control_path(folder).unlink(missing_ok=True)
    folder.rmdir()


@pytest.fixture
def listening(run_dir: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(control_path(run_dir)))
        listener.listen()
        yield listener


def asked_by(uid: int, run_dir: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(run_dir), str(uid)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return done.stdout.strip()


@pytest.mark.root
@pytest.mark.usefixtures("listening")
def test_a_mode_that_refuses_is_told_with_the_folder_or_the_file(run_dir: Path) -> None:
    control_path(run_dir).chmod(0o666)
    assert asked_by(WATCHER, run_dir) == "open"
    control_path(run_dir).chmod(0o600)
    said = asked_by(WATCHER, run_dir)
    assert f"uid {WATCHER} may not write {control_path(run_dir)} (owner uid 0, mode 600)" in said
    assert "POWER_AGENT_READER_UIDS" in said
    run_dir.chmod(0o700)
    assert f"may not search {run_dir}; make {run_dir} searchable" in asked_by(WATCHER, run_dir)


def test_nobody_there_and_nobody_listening_are_told_apart(run_dir: Path) -> None:
    def said() -> str:
        with pytest.raises(OSError, match=r"\w") as caught:
            open_control(run_dir, 5)
        return hindrance(control_path(run_dir), caught.value)[0]

    assert said() == f"no socket at {control_path(run_dir)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(control_path(run_dir)))
    assert said() == f"nobody listens at {control_path(run_dir)}"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_a_refusal_in_spite_of_the_mode_names_selinux_and_apparmor(
    run_dir: Path, code: int
) -> None:
    """Under SELinux a watcher may neither write the file nor connect to another domain."""
    path = control_path(run_dir)
    path.touch(mode=0o666)
    path.chmod(0o666)
    why, remedy = hindrance(path, OSError(code, os.strerror(code)))
    assert "though its mode lets it" in why
    assert "seLinuxOptions {type: spc_t, level: s0}" in remedy
    assert "AppArmor" in remedy
    assert "POWER_AGENT_RUN_DIR" not in remedy
