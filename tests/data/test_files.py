"""Writes are atomic, and downloads are checked and do not wait for a dead network."""

import errno
import hashlib
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import data.files
from data.files import fetch, files_under, is_reachable, sha256_of, user_path, write_atomic

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


def test_a_slow_connection_is_awaited_and_the_user_told(server, monkeypatch, capsys):
    def connect(url, real=data.files._connects):
        time.sleep(0.2)
        return real(url)

    monkeypatch.setattr(data.files, "_connects", connect)
    monkeypatch.setattr(data.files, "NOTICE_S", 0.05)
    assert is_reachable(server)
    assert "waiting up to 8 s for a connection to 127.0.0.1" in capsys.readouterr().err


def test_a_connection_that_is_refused_is_not_awaited(capsys):
    assert not is_reachable("http://127.0.0.1:1")
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomic(tmp_path / "file", "content")
    assert caught.value.filename == str(tmp_path / "file")
    assert [*tmp_path.iterdir()] == []


def test_the_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x"
    assert user_path("a/~") == Path("a/~")


@pytest.mark.parametrize("text", ["", " ", "a\0b", "~no-such-user/x"])
def test_a_path_that_cannot_be_one_is_refused(text):
    with pytest.raises(ValueError, match="path '"):
        user_path(text)


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError):
        files_under(tmp_path)
