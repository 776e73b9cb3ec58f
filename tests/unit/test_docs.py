"""What README, CONTRIBUTING and docs/ say of settings, targets, files and links is so."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from enforcer.settings import EnforcerSettings
from shared.settings import CommonSettings
from watcher.settings import WatcherSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# Set by the kubelet and by deploy/supervised/launch.py, never by a person.
NOT_FOR_PEOPLE = {"KUBERNETES_SERVICE_HOST", "POWER_AGENT_SUPERVISED"}
COMMAND = re.compile(r"(?:^ {4}|`|KUBECONFIG=\S+ )make ([a-z-]+)", re.MULTILINE)
ON_A_CLUSTER = re.compile(r"(?:^ {4,}|`)((?:kubectl|helm) [^`\n#]+)", re.MULTILINE)
FILE = re.compile(r"`((?:enforcer|watcher|shared|deploy|docs|tests)/[\w./-]*)`")

on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))


def settings(kind: type[CommonSettings]) -> dict[str, str | None]:
    """Return each variable's default."""
    variables = [field.metadata["variable"] for field in fields(kind)]
    return {each.name: each.default for each in variables if each.name not in NOT_FOR_PEOPLE}


def told() -> dict[str, str]:
    """Return what the README's tables have as each variable's default."""
    found: dict[str, str] = {}
    text = (ROOT / "README.md").read_text().split("\n## Settings\n")[1].split("\n## ")[0]
    for names, default in re.findall(r"^\| (`[A-Z_`, ]+`) \| (.*?) \|", text, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"[A-Z_]+", names), default)
    return found


def test_every_setting_is_in_the_readme_with_its_default() -> None:
    common = settings(CommonSettings)
    own = {**settings(EnforcerSettings), **settings(WatcherSettings)}
    assert told().keys() == own.keys() - common.keys()
    for name, default in told().items():
        # What a setting without a default means is said in words.
        assert own[name] is None or default == f"`{own[name]}`", name
    text = (ROOT / "README.md").read_text()
    assert [name for name in common if f"`{name}`" not in text] == []


def test_every_make_target_that_is_named_exists_and_contributing_names_them_all() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    asked = {page.name: set(COMMAND.findall(page.read_text())) for page in PAGES}
    assert {name: made - targets for name, made in asked.items() if made - targets} == {}
    assert targets - asked["CONTRIBUTING.md"] == {"clean", "help"}


@on_every_page
def test_commands_about_the_agent_name_its_namespace_and_what_they_delete(page: Path) -> None:
    """Whoever copies one at night has another namespace in mind, and a name alone is no object."""
    named = re.compile(r" -n | -A\b|--raw |clusterrole| -[fk] ?deploy/| -k | annotate ")
    for command in ON_A_CLUSTER.findall(page.read_text()):
        if re.search(r"power-agent|\bPOD\b|\bds\b", command):
            assert named.search(command), command
        assert not re.search(r"^kubectl delete (-n \S+ )?(?!-|\$)\S+$", command), command


@on_every_page
def test_every_file_that_is_named_is_there(page: Path) -> None:
    named = {path for path in FILE.findall(page.read_text()) if "<" not in path}
    named -= {"deploy/overlays/own/kustomization.yaml"}  # the reader's own
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@on_every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}
        assert not anchor or anchor in anchors, target
