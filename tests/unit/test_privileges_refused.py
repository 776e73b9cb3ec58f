"""Power that cannot be given up is told in one line, with a remedy, and is no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# Bound more tightly than the enforcer bounds itself, and without the power to raise that again.
PROGRAM = """
import os, resource
from enforcer import privileges
resource.setrlimit(resource.RLIMIT_DATA, (256 << 20, 256 << 20))
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    privileges.drop()
except privileges.DropError as error:
    print(error)
"""


def test_a_limit_that_may_not_be_set_names_what_failed_and_a_remedy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "privileges cannot be given up: " in done.stdout
    assert "let the runtime's seccomp profile and limits allow it" in done.stdout
