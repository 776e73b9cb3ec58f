"""Whose connections are refused: a socket of its own at the path, for a moment, and back again."""

import os
import socket
from pathlib import Path

import pytest

from enforcer.desk import Told
from enforcer.lookout import Lookout
from tests.life.hardware import HandClock

ME = os.getuid()


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A path at which somebody listens."""
    path = tmp_path / "control.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.detach()
    return path


def come(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(path))
    return client


def test_who_comes_while_it_looks_is_known_and_hears_nothing(served: Path) -> None:
    owner, lookout = served.stat().st_ino, Lookout({ME + 1})
    lookout.begin(served, 100.0)
    assert served.stat().st_ino != owner
    with come(served) as client:
        client.send(b"whatever it says")
        lookout.look(100.1)
        with pytest.raises(ConnectionError):  # closed without a byte being read
            client.recv(1)
    assert lookout.take() == (ME, os.getpid())
    assert lookout.take() is None
    assert (lookout.is_looking, lookout.fd) == (False, None)
    assert (served.stat().st_ino, list(served.parent.iterdir())) == (owner, [served])
    looks = []
    for now_s in (160.0, 160.2):  # once a minute
        lookout.begin(served, now_s)
        looks.append(lookout.is_looking)
    assert looks == [False, True]
    lookout.end()


def test_where_nobody_or_only_who_may_connect_comes_it_ends_soon(served: Path) -> None:
    owner, lookout = served.stat().st_ino, Lookout({ME})
    lookout.begin(served, 100.0)
    come(served).close()
    lookout.look(100.1)
    assert lookout.is_looking
    lookout.look(100.3)
    assert (lookout.is_looking, lookout.take()) == (False, None)
    assert (served.stat().st_ino, list(served.parent.iterdir())) == (owner, [served])


def test_what_a_killed_enforcer_left_does_no_harm_and_no_folder_no_look(served: Path) -> None:
    killed = Lookout(())
    killed.begin(served, 0.0)
    lookout = Lookout(())
    lookout.begin(served, 0.0)
    assert lookout.is_looking
    lookout.end()
    killed.end()
    assert list(served.parent.iterdir()) == [served]
    away = Lookout(())
    away.begin(served.parent / "gone" / "control.sock", 0.0)
    assert not away.is_looking


def test_each_kind_is_told_once_a_minute_with_how_often_it_came() -> None:
    clock = HandClock()
    told = Told(clock.now_s)
    assert [told.count("denied", 1), told.count("denied", 2), told.count("stale", 1)] == [1, 1, 1]
    for wait_s in (1.0, 2.0, 56.9):
        clock.rest(wait_s)
        assert told.count("denied", 1) == 0
    clock.rest(0.2)
    assert not told.lately("denied", 1)
    assert (told.count("denied", 1), told.count("denied", 1)) == (4, 0)
    assert told.lately("denied", 1)
