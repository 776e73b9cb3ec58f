"""Checks the image: what it says of itself, what is in it, and each of its three ways at work.

`python -m tests.cluster.image_check [IMAGE]`; the containers run in a box, see container_ways.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from shared import __version__
from tests.cluster import images, parts
from tests.cluster.box import Box


def check_configuration(build: images.Builder, image: str) -> None:
    """What a runtime reads before it starts anything."""
    inspected: dict[str, Any] = json.loads(build("inspect", "--type=image", image))
    docker = inspected["Docker"]
    config = docker["config"]
    assert config["User"] == "65532:65532", config["User"]
    assert config["Cmd"][-3:] == ["-I", "-m", "watcher"], config["Cmd"]
    assert config["Healthcheck"]["Test"] == ["CMD", "probe", "2"], config
    assert config["Labels"]["org.opencontainers.image.version"] == __version__, config["Labels"]
    assert not any("/etc/pip.conf" in str(step) for step in docker["history"]), docker["history"]
    _say(f"{image}: {inspected['FromImageID'][:12] or image}, as declared")


def check_ways(build: images.Builder, image: str) -> None:
    with Box() as box:
        box.start()
        command = [sys.executable, "-m", "tests.cluster.container_ways"]
        done = subprocess.run(
            box.inside([*command, str(build.folder / "storage"), image]),
            cwd=images.ROOT,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    if done.returncode != 0:
        raise AssertionError("one of the image's ways failed, see above")


def _say(text: str) -> None:
    print(f"image-check: {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    image = (sys.argv[1:] if argv is None else list(argv) or [images.IMAGE])[:1]
    try:
        parts.provide(parts.IMAGE, parts.CHECK, parts.NODE)
        with images.builder() as build:
            name = image[0] if image else images.build_image(build)
            check_configuration(build, name)
            check_ways(build, name)
    except (parts.LackingError, AssertionError) as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
