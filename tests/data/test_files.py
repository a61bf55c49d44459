"""Writes are atomic, and downloads are checked and do not wait for a dead network."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from data.files import fetch, is_reachable, sha256_of, write_atomic

CONTENT = b"content" * 1000


@pytest.fixture
def server(monkeypatch):
    """The URL of a local server that answers every request with CONTENT."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *args):
            pass

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/file"
        http.shutdown()
        thread.join()


def test_write_atomic_returns_the_hash_of_the_file(tmp_path):
    digest = write_atomic(tmp_path / "new" / "file", [b"ab", b"c"])
    assert (tmp_path / "new" / "file").read_bytes() == b"abc"
    assert digest == sha256_of(tmp_path / "new" / "file") == hashlib.sha256(b"abc").hexdigest()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    def chunks():
        yield b"half"
        raise RuntimeError("killed")

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(RuntimeError):
        write_atomic(tmp_path / "file", chunks())
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "records.jsonl"

    def chunks():
        yield b"fi"
        write_atomic(path, "second")
        yield b"rst"

    write_atomic(path, chunks())
    assert path.read_text() == "first"
    assert [*tmp_path.iterdir()] == [path]


def test_fetch_downloads_the_wanted_content(server, tmp_path):
    fetch(server, tmp_path / "file", hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_fetch_refuses_other_content(server, tmp_path):
    with pytest.raises(OSError, match="expected content"):
        fetch(server, tmp_path / "file", "0" * 64)
    assert not (tmp_path / "file").exists()


def test_a_proxy_is_probed_instead_of_the_host(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert is_reachable("http://host.invalid/file")


@pytest.mark.usefixtures("offline")
def test_without_a_network_fetch_fails_in_under_a_second(tmp_path):
    start = time.monotonic()
    with pytest.raises(OSError, match=r"no connection to host\.invalid"):
        fetch("https://host.invalid/file", tmp_path / "file", "0" * 64)
    assert time.monotonic() - start < 1
