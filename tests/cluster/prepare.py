"""Makes all that a node of one's own needs, so that no test waits minutes for it.

With `--if-there` nothing is made: exit status 3 says that something is missing, and what.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.cluster import box, images, parts
from tests.cluster.node import PAUSE_IMAGE

EXIT_LACKING = 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.prepare", description=__doc__)
    parser.add_argument("--if-there", action="store_true", help="make nothing, only look")
    arguments = parser.parse_args(argv)
    try:
        box.require()
        if arguments.if_there:
            parts.require(parts.IMAGE, parts.NODE)
            images.require_base()
            return 0
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
