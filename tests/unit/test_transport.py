"""The sockets, for real: who gets in, what a broken or hostile peer can do, what a restart is."""

import contextlib
import ctypes
import functools
import gc
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from enforcer.server import _TOPICS, Incoming, Server, _credentials
from shared import messages
from shared.client import Client, Subscriber
from shared.messages import MAX_MESSAGE_BYTES, Error, Ping, Pong, SnapshotAccepted, Status
from shared.pace import Bucket
from shared.sockets import TransportError, control_path, events_path
from tests.waiting import HANG_S, ended, joined, until

HANG_MS = round(HANG_S * 1000)
ME = os.geteuid()
PONG = Pong(version="1", uptime_s=1.0)
needs_root = pytest.mark.skipif(ME != 0, reason="needs root")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@contextmanager
def serving(run_dir: Path, *uids: int) -> Iterator[Server]:
    server = Server(run_dir, uids or [ME])
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server(run_dir: Path) -> Iterator[Server]:
    with serving(run_dir) as made:
        yield made


@pytest.fixture
def client(run_dir: Path) -> Iterator[Client]:
    made = Client(run_dir)
    try:
        yield made
    finally:
        made.close()


class Answering:
    """A server that answers every request with a pong, in a thread of its own."""

    def __init__(self, run_dir: Path) -> None:
        self.taken: list[Incoming] = []
        self._server = Server(run_dir, [ME])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            for incoming in self._server.receive(0.02):
                self.taken.append(incoming)
                self._server.reply(incoming, PONG)

    def close(self) -> None:
        self._ended.set()
        joined(self._thread)
        self._server.close()


@contextmanager
def answering(run_dir: Path) -> Iterator[Answering]:
    made = Answering(run_dir)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def plain(
    run_dir: Path, kind: int, path: Callable[[Path], Path] = control_path, rcvhwm: int = 1000
) -> Iterator[Any]:
    """Give a bare ZeroMQ socket, without the care that Client takes."""
    context = zmq.Context()
    sock = context.socket(kind)
    sock.linger = 0
    sock.rcvhwm = rcvhwm
    sock.connect(f"ipc://{path(run_dir)}")
    try:
        yield sock
    finally:
        context.destroy(linger=0)


@contextmanager
def raw(path: Path) -> Iterator[socket.socket]:
    """Give a bare stream to a listening path."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(HANG_S)
        sock.connect(str(path))
        yield sock


def take(server: Server, count: int) -> list[Incoming]:
    taken: list[Incoming] = []

    def enough() -> bool:
        taken.extend(server.receive(0.02))
        return len(taken) >= count

    until(enough, f"{count} requests")
    return taken


def sent_and_taken(server: Server, client: Client, request: messages.Request) -> Incoming:
    """Send as soon as the connection stands, which takes the server's turns too."""

    def sent() -> bool:
        assert server.receive(0.005) == []
        return client.send(request)

    until(sent, "a connection")
    [incoming] = take(server, 1)
    return incoming


def read_until(sock: socket.socket, ending: bytes | None, turn: Callable[[], object]) -> bytes:
    """Return what came up to `ending` (None: until closed); `turn` keeps the server going."""
    sock.setblocking(False)
    got = b""

    def done() -> bool:
        nonlocal got
        turn()
        try:
            chunk = sock.recv(4096)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            chunk = b""
        got += chunk
        assert chunk or ending is None, f"closed after {got!r}"
        return not chunk or (ending is not None and ending in got)

    until(done, f"{ending!r} read")
    sock.setblocking(True)
    return got


# ---------------------------------------------------------------------------------- who is it


def test_the_callers_uid_and_pid_are_the_kernels_word(server: Server, client: Client) -> None:
    incoming = sent_and_taken(server, client, Ping())
    assert (incoming.uid, incoming.pid) == (ME, os.getpid())
    assert messages.decode_request(incoming.payload) == Ping()


@pytest.mark.parametrize(
    ("address", "uid_and_pid"),
    [
        ("localhost:65532:65533:7978", (65532, 7978)),
        ("a:b:c:7:8:9", (7, 9)),  # nothing before can shift the fields
        ("localhost:0:0:0", (0, 0)),  # a pid that this namespace does not have
        ("", (None, 0)),
        ("localhost", (None, 0)),
        ("0:0:1", (None, 0)),
        ("localhost:-1:0:1", (None, 0)),
        ("localhost:0:0:", (None, 0)),
        ("localhost:٠:0:1", (None, 0)),
        ("localhost: 0:0:1", (None, 0)),
        ("localhost:0x0:0:1", (None, 0)),
    ],
)
def test_an_address_proves_a_uid_or_nothing(
    address: str, uid_and_pid: tuple[int | None, int]
) -> None:
    assert _credentials(address) == uid_and_pid


ZMTP3_GREETING = (  # RFC 23: signature, version, mechanism, as-server and filler
    b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
)


def zmtp3_ready(metadata: dict[bytes, bytes]) -> bytes:
    """Return the command with which a ZMTP 3.0 peer tells about itself."""
    body = b"\x05READY" + b"".join(
        bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
        for name, value in metadata.items()
    )
    return b"\x04" + bytes([len(body)]) + body


@pytest.mark.parametrize("name", [b"Peer-Address", b"peer-address", b"User-Id", b"Identity"])
def test_a_client_cannot_claim_to_be_somebody_else(
    server: Server, run_dir: Path, name: bytes
) -> None:
    claim = {b"Socket-Type": b"DEALER", name: b"localhost:4242:4242:1"}
    with raw(control_path(run_dir)) as sock:
        sock.sendall(ZMTP3_GREETING + zmtp3_ready(claim))
        read_until(sock, b"ROUTER", lambda: server.receive(0.01))
        sock.sendall(b"\x00\x05hello")
        [incoming] = take(server, 1)
    assert (incoming.payload, incoming.uid, incoming.pid) == (b"hello", ME, os.getpid())


def number_given(server: Server, run_dir: Path) -> int:
    """Return the number that a peer without an identity of its own has got."""
    with plain(run_dir, zmq.DEALER) as sock:
        sock.send(b"x")
        [incoming] = take(server, 1)
    zero, number = struct.unpack(">BI", incoming.envelope[0])
    assert zero == 0
    return int(number)


def test_the_numbers_of_peers_cannot_be_known_beforehand(run_dir: Path) -> None:
    """One who claims the number that comes next ends the process: see the test below."""
    libc = ctypes.CDLL(None)
    numbers = set()
    for _ in range(3):
        libc.srand(1)  # what every process begins with
        with serving(run_dir) as server:
            numbers.add(number_given(server, run_dir))
    assert len(numbers) == 3


CLAIMED = """
import struct, sys, zmq
context = zmq.Context()
router = context.socket(zmq.ROUTER)
router.bind("inproc://x")
first, claims, next_ = (context.socket(zmq.DEALER) for _ in range(3))
first.connect("inproc://x")
first.send(b"x")
number = struct.unpack(">BI", router.recv_multipart()[0])[1]
claims.routing_id = struct.pack(">BI", 0, (number + 1) % 2**32)
for sock in (claims, next_):
    sock.connect("inproc://x")
    sock.send(b"x")
    router.recv_multipart()
"""


def test_libzmq_ends_the_process_where_the_next_number_was_claimed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLAIMED], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == -signal.SIGABRT
    assert "Assertion failed: ok" in done.stderr


HUNG_UP = r"""
import socket, sys, zmq
context = zmq.Context()
router = context.socket(zmq.ROUTER)
router.rcvhwm = 4
router.bind("ipc://" + sys.argv[1])
greeting = b"\xff" + bytes(7) + b"\x01\x7f\x03\x00NULL" + bytes(48)
ready = b"\x04\x1c\x05READY\x0bSocket-Type" + bytes(3) + b"\x06DEALER"
for _ in range(50):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])
        sock.sendall(greeting + ready)
        while b"READY" not in sock.recv(4096):
            pass
        sock.sendall((b"\x00\x00" + b"\x04\x07\x04PING" + bytes(2)) * 200)
    while router.poll(100):
        router.recv_multipart()
"""


def test_libzmq_ends_the_process_where_a_peer_hangs_up_behind_a_full_queue(tmp_path: Path) -> None:
    """Nothing here keeps an admitted peer from that (stream_engine_base.cpp, restart_input)."""
    done = subprocess.run(
        [sys.executable, "-c", HUNG_UP, str(tmp_path / "s")],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == -signal.SIGABRT
    assert "Assertion failed: !_io_error" in done.stderr


# A ZMTP 1.0 peer (RFC 13) and a 2.0 peer (RFC 15), each: greeting, empty identity, a message.
OLD_PEERS = {
    "1.0": b"\x01\x00" + b"\x06\x00hello",
    "2.0": b"\xff" + bytes(7) + b"\x01\x7f" + b"\x01\x05" + b"\x00\x00" + b"\x00\x05hello",
}


@pytest.mark.parametrize("version", OLD_PEERS)
def test_a_client_of_an_old_protocol_that_carries_no_credentials_is_refused(
    server: Server, run_dir: Path, version: str
) -> None:
    taken: list[Incoming] = []
    with raw(control_path(run_dir)) as sock, contextlib.suppress(BrokenPipeError):
        sock.sendall(OLD_PEERS[version])
        read_until(sock, None, lambda: taken.extend(server.receive(0.01)))
    assert taken == []


@pytest.mark.parametrize("version", OLD_PEERS)
def test_the_old_protocol_above_would_be_understood_elsewhere(tmp_path: Path, version: str) -> None:
    context = zmq.Context()
    try:
        router = context.socket(zmq.ROUTER)
        router.linger = 0
        router.bind(f"ipc://{tmp_path / 's'}")
        with raw(tmp_path / "s") as sock:
            sock.sendall(OLD_PEERS[version])
            assert router.poll(HANG_MS)
            assert router.recv_multipart()[-1] == b"hello"
    finally:
        context.destroy(linger=0)


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """Give a directory that other uids can reach, which pytest's own are not."""
    made = Path(tempfile.mkdtemp(dir="/tmp"))
    made.chmod(0o755)
    yield made / "run"
    shutil.rmtree(made)


STRANGER = """
import os, socket, sys
uid = int(sys.argv[1])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
for path in sys.argv[2:]:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(path)
    try:
        print(sock.recv(1))
    except ConnectionResetError:
        print(b"")
"""


def stranger(run_dir: Path, uid: int = 12345) -> subprocess.Popen[str]:
    paths = [str(control_path(run_dir)), str(events_path(run_dir))]
    return subprocess.Popen(
        [sys.executable, "-c", STRANGER, str(uid), *paths], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.root
@needs_root
def test_another_uid_gets_not_a_byte_and_is_counted(open_dir: Path) -> None:
    refused = 0
    with serving(open_dir, 0) as server, stranger(open_dir) as process:

        def counted() -> bool:
            nonlocal refused
            assert server.receive(0.02) == []
            refused += server.take_refused()
            return refused >= 2 and process.poll() is not None

        until(counted, "two refusals counted")
        assert process.stdout
        assert process.stdout.read() == "b''\nb''\n"
        assert (refused, server.take_refused()) == (2, 0)


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("uid", [12345, 2**31, 2**32 - 2])
def test_each_uid_of_several_is_admitted(open_dir: Path, uid: int) -> None:
    with serving(open_dir, 7, uid), stranger(open_dir, uid) as process:
        assert process.stdout
        assert process.stdout.read() == "b'\\xff'\nb'\\xff'\n"  # libzmq's greeting
        assert ended(process) == 0


@pytest.mark.root
@needs_root
def test_a_client_that_is_not_admitted_learns_it_by_a_timeout(run_dir: Path) -> None:
    with serving(run_dir, 12345):
        client = Client(run_dir)
        try:
            with pytest.raises(TransportError, match=r"no answer within 0\.2 s"):
                client.request(Ping(), 0.2)
            assert (client.connected, client.connections) == (False, 0)
        finally:
            client.close()


# ------------------------------------------------------------------------- the directory


@pytest.mark.parametrize("mode", [0o777, 0o2777, 0o700, 0o1777])
def test_the_directory_is_made_writable_by_its_owner_alone(run_dir: Path, mode: int) -> None:
    run_dir.mkdir()
    run_dir.chmod(mode)
    with serving(run_dir):
        found = run_dir.stat()
        assert stat.S_IMODE(found.st_mode) == 0o755
        assert (found.st_uid, found.st_gid) == (ME, os.getegid())


def test_the_directory_and_those_above_are_made(run_dir: Path) -> None:
    with serving(run_dir / "a" / "b"):
        assert control_path(run_dir / "a" / "b").is_socket()


def test_the_umask_does_not_lock_clients_out(run_dir: Path) -> None:
    before = os.umask(0o077)
    try:
        with serving(run_dir):
            modes = [stat.S_IMODE(p(run_dir).stat().st_mode) for p in (control_path, events_path)]
            assert modes == [0o666, 0o666]
            assert stat.S_IMODE(run_dir.stat().st_mode) == 0o755
    finally:
        os.umask(before)


def test_whatever_lies_at_the_path_is_replaced_and_nothing_behind_it(run_dir: Path) -> None:
    run_dir.mkdir()
    precious = run_dir / "precious"
    precious.write_text("keep")
    control_path(run_dir).symlink_to(precious)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(events_path(run_dir)))
    with answering(run_dir):
        client = Client(run_dir)
        try:
            assert client.request(Ping(), HANG_S) == PONG
        finally:
            client.close()
    assert precious.read_text() == "keep"


def test_a_dangling_link_and_a_plain_file_are_replaced(run_dir: Path) -> None:
    run_dir.mkdir()
    control_path(run_dir).symlink_to(run_dir / "nowhere")
    events_path(run_dir).write_text("x")
    with serving(run_dir):
        assert control_path(run_dir).is_socket()
        assert not control_path(run_dir).is_symlink()
        assert events_path(run_dir).is_socket()
    assert list(run_dir.iterdir()) == []  # a clean end leaves no names


def refused_start(run_dir: Path) -> str:
    with pytest.raises(TransportError) as caught:
        Server(run_dir, [ME])
    said = str(caught.value)
    with warnings.catch_warnings(action="ignore"):
        del caught  # and with it what was half made: a process whose start fails ends at once
        gc.collect()
    return said


def test_a_directory_at_the_path_is_named_not_removed(run_dir: Path) -> None:
    control_path(run_dir).mkdir(parents=True)
    assert refused_start(run_dir) == f"{control_path(run_dir)} is a directory: remove it"
    assert control_path(run_dir).is_dir()


def test_a_directory_that_cannot_be_used_is_told_with_variable_and_remedy(tmp_path: Path) -> None:
    blocked = tmp_path / "file" / "run"
    (tmp_path / "file").write_text("")
    said = refused_start(blocked)
    assert said.startswith(f"POWER_AGENT_RUN_DIR='{blocked}': Not a directory; name a directory")
    assert "\n" not in said


def test_a_link_in_the_directorys_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o777)
    (tmp_path / "elsewhere").chmod(0o777)
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    assert "POWER_AGENT_RUN_DIR" in refused_start(tmp_path / "run")
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o777


# --------------------------------------------------------------------- asking and answering


def test_a_dealer_and_a_req_are_both_answered(run_dir: Path) -> None:
    for kind in (zmq.REQ, zmq.DEALER):
        with answering(run_dir) as server, plain(run_dir, kind) as sock:
            sock.send(messages.encode(Ping()))
            assert sock.poll(HANG_MS)
            frames = sock.recv_multipart()
            assert len(frames) == 1
            assert messages.decode_reply(frames[0]) == PONG
            assert server.taken[0].payload == messages.encode(Ping())


@pytest.mark.parametrize("frames", [[b"", b"", b"x"], [b"a", b"x"], [b"", b"a", b"x"], [b"x"] * 50])
def test_a_message_of_more_frames_arrives_as_one_that_no_decoder_takes(
    server: Server, run_dir: Path, frames: list[bytes]
) -> None:
    with plain(run_dir, zmq.DEALER) as sock:
        sock.send_multipart(frames)
        [incoming] = take(server, 1)
        assert incoming.payload == b""
        with pytest.raises(messages.RefusedError, match="truncated"):
            messages.decode_request(incoming.payload)
        server.reply(incoming, Error(code="malformed", message="no"))
        assert sock.poll(HANG_MS)
        assert messages.decode_reply(sock.recv_multipart()[-1]) == Error(
            code="malformed", message="no"
        )


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"x" * MAX_MESSAGE_BYTES])
def test_a_payload_of_any_content_up_to_the_limit_arrives(
    server: Server, run_dir: Path, payload: bytes
) -> None:
    with plain(run_dir, zmq.DEALER) as sock:
        sock.send(payload)
        [incoming] = take(server, 1)
        assert (incoming.payload, incoming.uid) == (payload, ME)


def test_a_frame_too_large_is_dropped_and_the_next_client_is_served(
    run_dir: Path, client: Client
) -> None:
    with answering(run_dir) as server, plain(run_dir, zmq.DEALER) as sock:
        sock.send(b"x" * (MAX_MESSAGE_BYTES + 1))
        sock.send(messages.encode(Status()))  # after the drop, on a new connection or lost
        assert client.request(Ping(), HANG_S) == PONG
        assert all(len(incoming.payload) <= MAX_MESSAGE_BYTES for incoming in server.taken)


def test_garbage_on_the_wire_ends_that_connection_alone(run_dir: Path, client: Client) -> None:
    with answering(run_dir) as server:
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, bytes(200), os.urandom(4096)):
            with raw(control_path(run_dir)) as sock, contextlib.suppress(OSError):
                sock.sendall(garbage)
        assert client.request(Ping(), HANG_S) == PONG
        assert [incoming.payload for incoming in server.taken] == [messages.encode(Ping())]


def test_a_connection_that_never_says_a_word_is_closed_soon(server: Server, run_dir: Path) -> None:
    began = time.monotonic()
    with raw(control_path(run_dir)) as sock:
        assert read_until(sock, None, lambda: server.receive(0.01))[:1] == b"\xff"
    assert time.monotonic() - began > 0.3


def test_a_flood_is_taken_in_turns(server: Server, run_dir: Path) -> None:
    with plain(run_dir, zmq.DEALER) as first, plain(run_dir, zmq.DEALER) as second:
        turns: list[int] = []
        sent = 0

        def turn() -> bool:
            nonlocal sent
            for sock in (first, second):
                with contextlib.suppress(zmq.Again):
                    for _ in range(500):
                        sock.send(messages.encode(Ping()), zmq.NOBLOCK)
                        sent += 1
            turns.append(len(server.receive(0.01)))
            return sum(turns) >= 2000

        until(turn, "2000 requests taken")
        assert max(turns) <= 64


def test_a_message_of_endless_frames_costs_the_others_no_time(
    server: Server, run_dir: Path, client: Client
) -> None:
    with plain(run_dir, zmq.DEALER) as sock:
        sock.send_multipart([b"x" * MAX_MESSAGE_BYTES] * 320)  # five seconds' worth
        [incoming] = take(server, 1)
        assert incoming.payload == b""
        incoming = sent_and_taken(server, client, Ping())
        assert messages.decode_request(incoming.payload) == Ping()


def test_after_a_crowd_it_listens_again_though_nothing_else_happens(
    server: Server, run_dir: Path
) -> None:
    with contextlib.ExitStack() as stack:

        def dropped() -> bool:
            # All at once, for each is dropped that says nothing for a moment.
            with contextlib.suppress(BlockingIOError):  # as many wait as may
                for _ in range(200):
                    stack.enter_context(raw(control_path(run_dir)))
            server.receive(0)
            return server._router.closed_until is not None

        until(dropped, "all dropped")
        began = time.monotonic()
        server.receive(HANG_S)
        assert time.monotonic() - began < HANG_S / 2


def test_a_uid_that_enters_too_often_waits_and_then_enters(server: Server, run_dir: Path) -> None:
    slow = Bucket.full(per_s=1.0, most=40.0, now_s=time.monotonic())
    server._entries = dict.fromkeys(server._entries, slow)
    began, entered = time.monotonic(), 0
    while server.take_refused() == 0:
        assert entered < 80
        with raw(control_path(run_dir)) as sock, contextlib.suppress(AssertionError):
            shake_hands(sock, server)
            entered += 1
    assert 40 <= entered <= 40 + time.monotonic() - began
    with contextlib.closing(Client(run_dir)) as client, asking(client) as replies:

        def turn() -> bool:
            for incoming in server.receive(0.01):
                server.reply(incoming, PONG)
            return bool(replies)

        until(turn, "an answer")


@contextlib.contextmanager
def asking(client: Client) -> Iterator[list[messages.Reply]]:
    """Ask in a thread what is answered within; the answer is there at the end."""
    replies: list[messages.Reply] = []
    thread = threading.Thread(target=lambda: replies.append(client.request(Ping(), HANG_S)))
    thread.start()
    yield replies
    joined(thread)
    assert replies == [PONG]


def test_an_answer_that_is_lost_with_its_connection_is_asked_for_again(
    server: Server, client: Client
) -> None:
    with asking(client):
        take(server, 1)
        server._router.drop()
        [incoming] = take(server, 1)
        server.reply(incoming, PONG)


CROWDED = """
import contextlib, os, socket, sys, time
from pathlib import Path
from enforcer.server import Server
from shared.sockets import control_path
run_dir = Path(sys.argv[1])
server = Server(run_dir, [os.geteuid()])

def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    end_s = time.monotonic() + 2
    while time.monotonic() < end_s:
        with contextlib.suppress(BlockingIOError):  # as many wait as may
            sock.connect(str(control_path(run_dir)))
            return sock
    return None

held = [connect() for _ in range(200)]
while sock := connect():  # until libzmq accepts no more: nobody reads what it tells
    sock.close()
while server._router.closed_until is None:
    server.receive(0)
closed_s = time.monotonic()
while time.monotonic() < closed_s + 0.3:
    pass  # a slow driver
server.receive(0)
server.close()
print("turns")
"""


def test_a_flood_of_connections_during_a_slow_turn_is_no_deadlock(run_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CROWDED, str(run_dir)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("turns\n", "")


def test_an_answer_to_a_client_that_has_gone_is_dropped(server: Server, run_dir: Path) -> None:
    with plain(run_dir, zmq.DEALER) as sock:
        sock.send(messages.encode(Ping()))
        [incoming] = take(server, 1)
    for _ in range(200):
        server.reply(incoming, PONG)
    assert server.receive(0.01) == []


def test_for_a_client_that_does_not_read_few_answers_are_kept(run_dir: Path) -> None:
    big = Error(code="malformed", message="x" * 60_000)
    with serving(run_dir) as server, plain(run_dir, zmq.DEALER, rcvhwm=1) as sock:
        sock.send(messages.encode(Ping()))
        [incoming] = take(server, 1)
        for _ in range(2000):
            server.reply(incoming, big)
        assert sock.poll(HANG_MS)
        kept = 0
        while sock.poll(300):
            sock.recv()
            kept += 1
        assert 1 <= kept < 500


def test_waiting_ends_when_a_watched_descriptor_is_readable(server: Server, client: Client) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server.watch(theirs.fileno())
        client.watch(theirs.fileno())
        until(lambda: connected(server, client), "a connection")
        ours.send(b".")
        began = time.monotonic()
        assert server.receive(HANG_S) == []
        assert client.wait(HANG_S) == []
        assert time.monotonic() - began < HANG_S / 2


def test_receive_waits_no_longer_than_it_may(server: Server) -> None:
    began = time.monotonic()
    assert server.receive(0.05) == []
    assert server.receive(-1.0) == []
    assert time.monotonic() - began >= 0.05


# ------------------------------------------------------------------ an enforcer that comes back


def connected(server: Server, client: Client) -> bool:
    """Take a turn on both sides; tell whether they have met."""
    assert server.receive(0.005) == []
    client.wait(0.005)
    return client.connected


def test_nothing_is_kept_for_an_enforcer_that_is_away(run_dir: Path, client: Client) -> None:
    for _ in range(3):
        assert client.send(Status()) is False
    with serving(run_dir) as server:
        until(lambda: connected(server, client), "a connection")
        assert server.receive(0.1) == []
        incoming = sent_and_taken(server, client, Ping())
        assert messages.decode_request(incoming.payload) == Ping()


def test_a_client_reconnects_after_a_restart_notices_it_and_sends_nothing_stale(
    run_dir: Path, client: Client
) -> None:
    for round_number in range(1, 4):
        with serving(run_dir) as server:
            meet = functools.partial(connected, server, client)
            until(meet, "a connection")
            assert client.connections == round_number
            incoming = sent_and_taken(server, client, Ping())
            assert messages.decode_request(incoming.payload) == Ping()
        until(lambda: client.wait(0.01) or not client.connected, "the loss noticed")
        # libzmq tells of the loss a moment before it takes the way there: lost, never kept. The
        # next round sees only its ping.
        until(lambda: not client.send(Status()), "nothing is taken any more")


def test_a_request_waits_for_an_enforcer_that_is_just_starting(
    run_dir: Path, client: Client
) -> None:
    with asking(client) as replies, answering(run_dir):
        until(lambda: replies, "an answer")


def test_a_request_without_an_answer_ends_in_time(server: Server, client: Client) -> None:
    assert server.receive(0) == []
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"no answer within 0\.15 s"):
        client.request(Ping(), 0.15)
    assert time.monotonic() - began >= 0.15


def test_an_answer_that_is_none_is_an_error_of_its_own(run_dir: Path, client: Client) -> None:
    context = zmq.Context()
    try:
        run_dir.mkdir()
        router = context.socket(zmq.ROUTER)
        router.bind(f"ipc://{control_path(run_dir)}")
        until(lambda: client.send(Ping()), "sent")
        assert router.poll(HANG_MS)
        router.send_multipart([router.recv_multipart()[0], b"\xc1"])

        def wait() -> bool:
            return bool(client.wait(0.02))

        with pytest.raises(msgspec.DecodeError):
            until(wait, "an answer")
    finally:
        context.destroy(linger=0)


# ------------------------------------------------------------------------------------ events


def event(number: int, filling: str = "") -> SnapshotAccepted:
    return SnapshotAccepted(ts=0.0, message=filling, session="s", revision=number, pods=0)


@contextmanager
def subscribed(run_dir: Path) -> Iterator[Subscriber]:
    subscriber = Subscriber(run_dir)
    try:
        yield subscriber
    finally:
        subscriber.close()


def hears(server: Server, subscriber: Subscriber, message: messages.Event) -> Callable[[], bool]:
    """Return a step that publishes once, keeps the server going, and tells if it was heard."""

    def step() -> bool:
        server.receive(0.005)
        server.publish(message)
        return subscriber.receive(0.01) == message

    return step


def test_a_listener_hears_decisions_again_after_a_restart(run_dir: Path) -> None:
    with subscribed(run_dir) as subscriber:
        assert subscriber.receive(0.01) is None
        for number in (1, 2):
            with serving(run_dir) as server:
                until(hears(server, subscriber, event(number)), f"event {number}")


def test_a_listener_that_does_not_read_delays_neither_server_nor_others(run_dir: Path) -> None:
    with (
        serving(run_dir) as server,
        plain(run_dir, zmq.SUB, events_path, rcvhwm=1) as slow,
        subscribed(run_dir) as quick,
    ):
        slow.subscribe(b"")

        def slow_is_in() -> bool:
            server.receive(0.005)
            server.publish(event(0))
            return bool(slow.poll(5))

        until(slow_is_in, "the slow one in")
        until(hears(server, quick, event(0)), "the quick one in")
        for number in range(5000):
            server.publish(event(number, "x" * 10_000))
        until(hears(server, quick, event(9999)), "still heard")


def shake_hands(sock: socket.socket, server: Server, kind: bytes = b"DEALER") -> None:
    sock.sendall(ZMTP3_GREETING + zmtp3_ready({b"Socket-Type": kind}))
    read_until(sock, b"READY", lambda: server.receive(0.01))


def zmtp3_subscription(topic: bytes) -> bytes:
    return b"\x02" + (1 + len(topic)).to_bytes(8, "big") + b"\x01" + topic


def test_listeners_with_many_topics_are_dropped_and_honest_ones_hear(
    server: Server, run_dir: Path
) -> None:
    """A tree of them takes memory, and seconds of the only thread when the listeners go."""
    with subscribed(run_dir) as subscriber, raw(events_path(run_dir)) as sock:
        shake_hands(sock, server, b"SUB")
        topics = [b"%060d" % number for number in range(2 * _TOPICS)]
        sock.sendall(b"".join(map(zmtp3_subscription, topics)))

        def turn() -> None:
            server.publish(event(0))  # as of each message that is refused
            server.receive(0.01)

        read_until(sock, None, turn)
        until(hears(server, subscriber, event(1)), "heard")


def test_a_listener_with_a_topic_that_no_event_has_is_dropped(
    server: Server, run_dir: Path
) -> None:
    """Each byte of it would cost a node of a tree, in the thread that keeps the limits."""
    with raw(events_path(run_dir)) as sock:
        shake_hands(sock, server, b"SUB")
        sock.sendall(zmtp3_subscription(b"x" * 64))
        read_until(sock, None, lambda: server.receive(0.01))


def test_listeners_that_come_and_go_leave_nothing_behind(server: Server, run_dir: Path) -> None:
    """Also while there is nothing to publish, which may be for months."""
    open_door = Bucket.full(per_s=1e9, most=1e9, now_s=time.monotonic())
    server._entries = dict.fromkeys(server._entries, open_door)  # else they would hardly get in

    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    def come_and_go(times: int) -> None:
        for _ in range(times):
            with raw(events_path(run_dir)) as sock:
                shake_hands(sock, server, b"SUB")

    come_and_go(100)
    before = resident_pages()
    come_and_go(800)  # of 12 KiB each
    assert (resident_pages() - before) * os.sysconf("SC_PAGESIZE") < 4 << 20


@pytest.mark.root
@needs_root
def test_a_listener_of_another_uid_hears_nothing(run_dir: Path) -> None:
    with serving(run_dir, 12345) as server, subscribed(run_dir) as subscriber:
        refused = 0

        def counted() -> bool:
            nonlocal refused
            server.receive(0.005)
            server.publish(event(1))
            refused += server.take_refused()
            return refused >= 1

        until(counted, "a refusal")
        assert subscriber.receive(0.05) is None
