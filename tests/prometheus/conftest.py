"""Lends the tests of this folder Debian's Prometheus, or says why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.prometheus import tools


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder that has `prometheus` and `promtool`."""
    folder = tools.find()
    if folder is None:
        reason = "no Prometheus: make prometheus (Debian), or put it and promtool on the PATH"
        if tools.required():
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return folder
