"""Asks the watcher's HTTP pages, as a kubelet and a Prometheus do."""

from __future__ import annotations

import urllib.error
import urllib.request

from tests.waiting import HANG_S


def page(port: int, path: str) -> tuple[int, str]:
    """(status, text) of a page of this machine; status 0 where nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=HANG_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)
