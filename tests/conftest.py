"""What holds for every test: Ctrl-C as on a terminal, and which files run when and where."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler.loadfile import LoadFileScheduling

if TYPE_CHECKING:
    from xdist.remote import Producer

# A shell starts what runs in its background with SIGINT ignored, and every program that is started
# from there inherits that. Tests send SIGINT, as Ctrl-C does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A control plane costs ten seconds of a core, and each worker that meets a test of tests/kube has
# its own. So two workers share these files. What helm renders is shared in the same way.
_TOGETHER = {
    "tests/kube/": "kube",
    "tests/kube/test_deploy.py": "kube, rendered",
    "tests/kube/test_dynamo.py": "kube, rendered",
    "tests/kube/test_manifest.py": "kube, rendered",
    "tests/kube/test_platforms.py": "kube, rendered",
    "tests/kube/test_assets.py": "assets",  # these two need none
    "tests/kube/test_helm_assets.py": "helm assets",
    "tests/unit/test_chart.py": "chart",
    "tests/unit/test_platforms.py": "chart",
}
# What waits longest comes first: so no worker is left with it while the others have nothing to do.
_FIRST = (
    "tests/kube/",
    "tests/prometheus/test_other_nights.py",
    "tests/node/test_watcher.py",
    "tests/chaos/",
    "tests/node/",
    "tests/unit/test_reflector.py",
    "tests/unit/test_powerctl.py",
    "tests/unit/test_transport.py",
    "tests/unit/test_supervised.py",
)


class _ByPlace(LoadFileScheduling):  # type: ignore[misc]
    """A worker has whole files, and those together that share what is dear."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        folder = file[: file.rfind("/") + 1]
        return _TOGETHER.get(file) or _TOGETHER.get(folder) or file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByPlace | None:
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # the order is ours
    return _ByPlace(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _turn(item.nodeid))


def _turn(nodeid: str) -> int:
    return next((n for n, folder in enumerate(_FIRST) if nodeid.startswith(folder)), len(_FIRST))
