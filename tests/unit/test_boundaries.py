"""The tree is the privilege diagram: who may import what, and how long a function may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("enforcer", "watcher", "shared")
FUNCTION_MAX_LINES = 35

# Third-party packages that each side may import at all, its own side excepted.
ALLOWED = {
    "enforcer": {"enforcer", "shared", "msgspec", "pynvml", "zmq"},
    "watcher": {
        "watcher",
        "shared",
        "msgspec",
        "zmq",
        "kubernetes",
        "urllib3",
        "prometheus_client",
    },
    "shared": {"shared", "msgspec", "zmq"},
}
# Imports that exactly one file of a side may have.
ONE_FILE = {
    ("enforcer", "pynvml"): "enforcer/nvml.py",
    ("watcher", "kubernetes"): "watcher/kube.py",
    ("watcher", "prometheus_client"): "watcher/metrics.py",
}
# What the root side has no use for, even in the standard library.
NOT_AS_ROOT = {
    "asyncio", "code", "concurrent", "ftplib", "http", "marshal", "multiprocessing", "pickle",
    "pty", "runpy", "shelve", "smtplib", "socketserver", "ssl", "subprocess", "urllib", "xmlrpc",
}  # fmt: skip
TOP_LEVEL = {
    ".ci", ".dockerignore", ".gitattributes", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md",
    "Dockerfile", "LICENSE", "Makefile", "README.md", "SECURITY.md", "deploy", "docs", "enforcer",
    "pyproject.toml", "shared", "supervisord.conf", "tests", "watcher",
}  # fmt: skip
EVALUATES = {"eval", "exec", "compile", "__import__"}


def sources(*folders: str) -> list[Path]:
    """Return the Python files of these folders."""
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found, f"no source found in {folders}"
    return found


def tree(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_bytes(), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of each module that a file imports, wherever in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module


def packages(path: Path) -> set[str]:
    """Return the top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


def name(path: Path) -> str:
    """Return a file's name as git shows it."""
    return path.relative_to(ROOT).as_posix()


def test_the_contracts_of_import_linter_hold() -> None:
    """Indirect imports too: what `lint-imports` finds in pyproject.toml."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_side_imports_only_its_own_packages(program: str) -> None:
    """A new dependency of either side is a decision, not an accident."""
    allowed = ALLOWED[program] | sys.stdlib_module_names
    strangers = {name(path): packages(path) - allowed for path in sources(program)}
    assert {path: extra for path, extra in strangers.items() if extra} == {}


def test_the_root_side_imports_nothing_that_starts_processes_or_evaluates() -> None:
    """I7: no process, no HTTP, no deserialiser that runs code."""
    found = {name(path): packages(path) & NOT_AS_ROOT for path in sources("enforcer")}
    assert {path: extra for path, extra in found.items() if extra} == {}


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_side_evaluates_code(program: str) -> None:
    """I7: nothing that arrives can become code."""
    calls = [
        f"{name(path)}:{node.lineno}"
        for path in sources(program)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in EVALUATES
    ]
    assert calls == []


@pytest.mark.parametrize(("side", "package"), ONE_FILE)
def test_a_dangerous_import_has_one_file(side: str, package: str) -> None:
    """One grep shows every call into it."""
    users = [name(path) for path in sources(side) if package in packages(path)]
    assert users == [ONE_FILE[side, package]]


@pytest.mark.parametrize("program", PROGRAMS)
def test_sockets_of_zeromq_are_made_in_one_file_of_each_side(program: str) -> None:
    """The border of each side is one file."""
    users = [name(path) for path in sources(program) if "zmq" in packages(path)]
    assert len(users) <= 1, users


def test_the_environment_is_read_in_one_place() -> None:
    """Each variable has one reader, one default and one line of help."""
    readers = {
        name(path)
        for path in sources(*PROGRAMS)
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"})
        or (isinstance(node, ast.ImportFrom) and node.module == "os"
            and {alias.name for alias in node.names} & {"environ", "environb", "getenv"})
    }  # fmt: skip
    assert readers <= {"shared/settings.py"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_function_fits_on_a_screen(program: str) -> None:
    """Long functions hide their cases."""
    long = [
        f"{name(path)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in sources(program)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > FUNCTION_MAX_LINES
    ]
    assert long == []


@pytest.mark.parametrize("folder", [*PROGRAMS, "tests", "deploy"])
def test_every_file_opens_with_its_job(folder: str) -> None:
    """One sentence first: the reader knows what belongs here and what does not."""
    silent = [
        name(path)
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.stat().st_size and not ast.get_docstring(tree(path))
    ]
    assert silent == []


def test_the_top_level_holds_only_what_belongs_there() -> None:
    """A reader sees the product at a glance."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout
    assert {path.partition("/")[0] for path in listed.split("\0") if path} <= TOP_LEVEL


def test_locks_name_hashes_and_no_host() -> None:
    """Any package index serves, and none is believed: the hash decides."""
    for lock in sorted((ROOT / "deploy/lock").glob("*.txt")):
        text = lock.read_text()
        pins = [line for line in text.splitlines() if line[:1].isalnum()]
        assert pins, lock.name
        assert all("==" in pin and pin.endswith("\\") for pin in pins), lock.name
        assert "://" not in text, lock.name
        assert not any(line.startswith("-") for line in text.splitlines()), lock.name
