"""The image: the same from the same sources, nothing in it that no lock file names, and it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import image_check, images, parts, sbom
from tests.cluster.images import Builder

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def build() -> Iterator[Builder]:
    try:
        parts.provide(parts.IMAGE, parts.CHECK, parts.NODE)
        with images.builder() as builder:
            images.build_image(builder)
            yield builder
    except parts.LackingError as error:
        pytest.skip(f"no image: {error}")


def layers(build: Builder, image: str) -> str:
    return build("inspect", "--type=image", "--format={{.OCIv1.RootFS.DiffIDs}}", image)


def test_two_builds_of_the_same_sources_have_the_same_layers(build: Builder) -> None:
    names = [f"localhost/power-agent-again:{number}" for number in (1, 2)]
    try:
        for name in names:
            images.build_image(build, name, cached=False)
        first, second = (layers(build, name) for name in names)
    finally:
        build("rmi", "--force", *names)
    assert first == second
    assert first.count("sha256:") >= 2


def test_the_bill_of_materials_names_what_each_environment_has(
    build: Builder, tmp_path: Path
) -> None:
    document = sbom.document(build.save(images.IMAGE, tmp_path / "image.tar"))
    environments = {
        component["name"]: {
            each["value"]
            for each in component["properties"]
            if each["name"] == "power-agent:environment"
        }
        for component in document["components"]
        if component["purl"].startswith("pkg:pypi/")
    }
    assert environments["msgspec"] == {"enforcer", "watcher", "supervised"}
    assert environments["nvidia-ml-py"] == {"enforcer"}
    assert environments["kubernetes"] == {"watcher"}
    assert environments["supervisor"] == {"supervised"}
    assert "pip" not in environments
    assert any(c["purl"].startswith("pkg:deb/debian/libc6@") for c in document["components"])


def test_it_says_of_itself_what_the_dockerfile_declares(build: Builder) -> None:
    image_check.check_configuration(build, images.IMAGE)


def test_each_of_its_three_ways_enforces(build: Builder) -> None:
    image_check.check_ways(build, images.IMAGE)
