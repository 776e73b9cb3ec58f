"""The tests' own client of a real API server, against a TLS server that is the test's."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest

from tests.simnode.controlplane_certs import make_certificates
from tests.simnode.controlplane_rest import RestClient
from tests.waiting import joined

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize("when", ["in the handshake", "while idle", "while idle, with a word"])
def test_a_connection_that_the_server_has_ended_is_made_anew(tmp_path: Path, when: str) -> None:
    paths = make_certificates(tmp_path / "tls")
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(paths.server, paths.server_key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            if when == "in the handshake":
                with listener.accept()[0] as early:
                    early.recv(65536)
            for _ in range(2):
                with theirs.wrap_socket(listener.accept()[0], server_side=True) as client:
                    client.recv(65536)
                    client.sendall(ANSWER)
                    client.recv(65536)  # the next request, or the end
                    if when == "while idle, with a word":
                        client.unwrap()

        thread = threading.Thread(target=serve)
        thread.start()
        ours = ssl.create_default_context(cafile=str(paths.ca))
        with RestClient(listener.getsockname()[1], ours) as rest:
            assert rest.raw("GET", "/first") == (200, "{}")
            assert rest.raw("GET", "/second") == (200, "{}")
        joined(thread)
