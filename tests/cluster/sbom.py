"""Lists what is in the image as CycloneDX: `python -m tests.cluster.sbom ARCHIVE`, to a file.

Read from the image itself, not from what it should hold: Python packages of each program's
environment with the hashes that the lock files allow, and the base's Debian packages.
"""

from __future__ import annotations

import email.parser
import hashlib
import json
import re
import sys
import tarfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shared import __version__
from tests.cluster.images import ROOT

Component = dict[str, Any]

_METADATA = re.compile(r"opt/power-agent/(?P<part>\w+)/lib/.*/(?P<name>[^/]+)\.dist-info/METADATA$")
_DPKG = "var/lib/dpkg/status"
_OS_RELEASE = "usr/lib/os-release"
_NAMESPACE = uuid.UUID("6f0a3f0e-4d0c-5b0b-9a0e-2f6f0b6d1c11")  # of no meaning but its own


def layers(archive: Path) -> Iterator[tarfile.TarFile]:
    """The image's layers, the base's first (docker image specification, manifest.json)."""
    with tarfile.open(archive) as outer:
        listed = outer.extractfile("manifest.json")
        assert listed is not None
        for name in json.load(listed)[0]["Layers"]:
            layer = outer.extractfile(name)
            assert layer is not None
            with tarfile.open(fileobj=layer) as inner:
                yield inner


def texts(archive: Path) -> dict[str, str]:
    """The files that name packages, as the topmost layer has them."""
    found: dict[str, str] = {}
    for layer in layers(archive):
        for member in layer:
            name = member.name.removeprefix("./")
            if member.isfile() and (name in (_DPKG, _OS_RELEASE) or _METADATA.match(name)):
                content = layer.extractfile(member)
                assert content is not None
                found[name] = content.read().decode(errors="replace")
    return found


def locked_hashes() -> dict[str, list[str]]:
    """`name==version` -> SHA-256 of every file that the lock allows for it."""
    found: dict[str, list[str]] = {}
    for lock in sorted((ROOT / "deploy/lock").glob("*.txt")):
        current: list[str] = []
        for line in lock.read_text().splitlines():
            if named := re.match(r"([A-Za-z0-9_.-]+)==([^\s;\\]+)", line):
                current = found.setdefault(f"{normal(named[1])}=={named[2]}", [])
            current += [h for h in re.findall(r"sha256:([0-9a-f]{64})", line) if h not in current]
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def python_packages(found: dict[str, str]) -> Iterator[Component]:
    """One component a package, with the programs whose environment has it."""
    hashes = locked_hashes()
    parts: dict[tuple[str, str], set[str]] = {}
    licences: dict[tuple[str, str], str | None] = {}
    for path, text in found.items():
        if matched := _METADATA.match(path):
            metadata = email.parser.HeaderParser().parsestr(text)
            key = (normal(metadata["Name"]), metadata["Version"])
            parts.setdefault(key, set()).add(matched["part"])
            licences[key] = metadata["License-Expression"]
    if foreign := [f"{n}=={v}" for n, v in parts if f"{n}=={v}" not in hashes]:
        raise SystemExit(f"sbom: in the image, but in no lock file: {', '.join(foreign)}")
    for (name, version), programs in sorted(parts.items()):
        component: Component = {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version}",
            "properties": [
                *({"name": "power-agent:environment", "value": each} for each in sorted(programs)),
                *(
                    {"name": "power-agent:allowed-sha256", "value": each}
                    for each in hashes[f"{name}=={version}"]
                ),
            ],
        }
        if licence := licences[name, version]:
            component["licenses"] = [{"expression": licence}]
        yield component


def debian_packages(found: dict[str, str]) -> Iterator[Component]:
    release = dict(
        line.split("=", 1) for line in found.get(_OS_RELEASE, "").splitlines() if "=" in line
    )
    distribution = f"{release.get('ID', 'debian')}-{release.get('VERSION_ID', '')}".replace('"', "")
    for paragraph in found.get(_DPKG, "").split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        if "installed" not in fields.get("Status", ""):
            continue
        name, version = fields["Package"], fields["Version"]
        purl = (
            f"pkg:deb/debian/{quote(name)}@{quote(version)}"
            f"?arch={fields['Architecture']}&distro={distribution}"
        )
        yield {
            "type": "library",
            "bom-ref": purl,
            "name": name,
            "version": version,
            "purl": purl,
        }


def document(archive: Path) -> dict[str, Any]:
    """The same for the same image: nothing of the time or place of writing."""
    found = texts(archive)
    components = [*python_packages(found), *debian_packages(found)]
    digest = hashlib.sha256(json.dumps(components).encode()).hexdigest()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": "power-agent",
                "name": "dynamo/power-agent",
                "version": f"v{__version__}",
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": components,
    }


def main(argv: Sequence[str] | None = None) -> int:
    (name,) = sys.argv[1:] if argv is None else argv
    archive = Path(name)
    written = document(archive)
    target = archive.with_suffix(".cdx.json")
    target.write_text(json.dumps(written, indent=1) + "\n")
    print(f"{target}: {len(written['components'])} components", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
