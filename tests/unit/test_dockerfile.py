"""The Dockerfile: its rules at a glance, and (marker `image`) its commands run for real."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared import __version__

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("enforcer", "watcher", "supervised")
PREFIX = "/opt/power-agent"

Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    """Return the Dockerfile's instructions as (keyword, rest), continuation lines joined."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", code)
    return [
        (line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line
    ]


def stages() -> list[list[Instruction]]:
    """Return the instructions of each stage, its FROM first."""
    found: list[list[Instruction]] = []
    for keyword, rest in instructions():
        if keyword == "FROM":
            found.append([])
        if found:
            found[-1].append((keyword, rest))
    return found


def of(stage: list[Instruction], keyword: str) -> list[str]:
    """Return what follows each occurrence of a keyword."""
    return [rest for found, rest in stage if found == keyword]


def test_the_base_is_one_argument_for_both_stages() -> None:
    """So that one --build-arg pins it by digest."""
    assert instructions()[0][0] == "ARG"
    assert instructions()[0][1].startswith("BASE=python:3.13-")
    assert [of(stage, "FROM")[0].split()[0] for stage in stages()] == ["${BASE}", "${BASE}"]


def test_the_image_runs_unprivileged_by_default() -> None:
    """Root is asked for, never given by accident."""
    final = stages()[-1]
    assert of(final, "USER") == ["65532:65532"]
    assert any("power-agent:x:65532:65532:" in run for run in of(final, "RUN"))
    assert "ENTRYPOINT" not in {keyword for keyword, _ in final}


def test_the_label_names_this_version() -> None:
    """Label, manifest and package agree."""
    assert f'image.version="{__version__}"' in of(stages()[-1], "LABEL")[0]


def test_everything_installed_has_a_hash_and_nothing_else_is_fetched() -> None:
    """Reproducible, from a package index alone."""
    runs = [run for stage in stages() for run in of(stage, "RUN")]
    installs = [run for run in runs if " install " in run]
    assert installs
    assert all("--require-hashes" in run and "--only-binary :all:" in run for run in installs)
    assert not any(re.search(r"\b(apt|apt-get|curl|wget|git)\b|://", run) for run in runs)
    assert "ADD" not in {keyword for keyword, _ in instructions()}


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    """.dockerignore lets in only what the image needs."""
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for copy in of(stages()[0], "COPY"):
        for source in copy.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source in allowed, source


def run_build_stage(scratch: Path) -> Path:
    """Run the build stage's commands with its folders moved below `scratch`; return the result."""
    prefix, work = scratch / "opt", scratch / "src"
    prefix.mkdir()
    work.mkdir()
    environment = os.environ | {
        "PATH": f"{sys.base_prefix}/bin:{os.environ['PATH']}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    for keyword, rest in stages()[0]:
        moved = rest.replace(PREFIX, str(prefix)).replace("/tmp/installer", str(scratch / "pip"))
        if keyword == "COPY":
            *sources, target = moved.split()
            for source in sources:
                place = work / target
                if (ROOT / source).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, place, ignore=ignored)
                else:
                    shutil.copy(ROOT / source, place)
        elif keyword == "RUN":
            subprocess.run(["sh", "-c", moved], cwd=work, env=environment, check=True)
    return prefix


def start(*command: str | Path) -> str:
    """Run a command in an empty environment, far from the source; return what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd="/",
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{done.returncode} {done.stdout}{done.stderr}"


@pytest.mark.image
@pytest.mark.timeout(900)
def test_the_commands_install_three_environments_that_start(tmp_path: Path) -> None:
    """And no program's environment can resolve what the other side needs."""
    opt = run_build_stage(tmp_path)
    for program in ("enforcer", "watcher"):
        version = start(opt / program / "bin/python", "-I", "-m", program, "--version")
        assert version.startswith("0 ")
        assert __version__ in version
    assert start(opt / "bin/powerctl", "--version").startswith("0 ")
    assert start(opt / "bin/powerctl", "ping", "--socket", tmp_path).startswith("3 ")
    assert os.access(opt / "bin/probe", os.X_OK)
    assert start(opt / "bin/supervisord", "--version").startswith("0 4.3")
    foreign = {
        "enforcer": ("kubernetes", "urllib3", "watcher", "supervisor", "pip"),
        "watcher": ("pynvml", "enforcer", "supervisor", "pip"),
        "supervised": ("pynvml", "kubernetes", "enforcer", "watcher", "pip"),
    }
    for program, modules in foreign.items():
        for module in modules:
            tried = start(opt / program / "bin/python", "-I", "-c", f"import {module}")
            assert "ModuleNotFoundError" in tried, (program, module)
    assert not [
        path for path in opt.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022
    ]
