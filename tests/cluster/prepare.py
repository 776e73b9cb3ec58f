"""Makes all that a node of one's own needs, so that no test waits minutes for it."""

from __future__ import annotations

import sys

from tests.cluster import images, parts
from tests.cluster.node import PAUSE_IMAGE

EXIT_LACKING = 3


def main() -> int:
    try:
        parts.provide(parts.IMAGE, parts.NODE)
        parts.node_binaries()
        with images.builder() as build:
            images.build_image(build)
            images.make_pause(build, PAUSE_IMAGE)
    except parts.LackingError as error:
        print(f"cluster-test: {error}", file=sys.stderr)
        return EXIT_LACKING
    return 0


if __name__ == "__main__":
    sys.exit(main())
