"""Files that are whole or absent: atomic writes, content hashes, downloads that fail in time."""

import hashlib
import http.client
import os
import socket
import threading
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

PROBE_S = 0.6  # time that a first connection may take before the network counts as absent
TRANSFER_S = 30.0  # silence after which a download is given up


def write_atomic(path: str | Path, chunks: Iterable[bytes]) -> str:
    """Write `chunks` to `path` so that `path` never holds a part of them; returns their sha256.

    A temporary file beside `path` is written, synced and renamed; a kill leaves only `<path>.tmp`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    digest = hashlib.sha256()
    with open(temporary, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return digest.hexdigest()


def sha256_of(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_reachable(url: str) -> bool:
    """Whether a connection to `url`, or to the proxy before it, opens within `PROBE_S` seconds.

    The attempt runs in a thread because a name look-up knows no time limit.
    """
    answers: list[bool] = []
    probe = threading.Thread(target=lambda: answers.append(_connects(url)), daemon=True)
    probe.start()
    probe.join(PROBE_S)
    return answers == [True]


def _connects(url: str) -> bool:
    target = urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname, port), timeout=PROBE_S).close()
    except OSError:
        return False
    return True


def fetch(url: str, path: str | Path, sha256: str) -> None:
    """Download `url` to `path`. OSError: no network (said in under a second), other content."""
    if not is_reachable(url):
        raise ConnectionError(f"no connection to {urlsplit(url).hostname} within {PROBE_S} s")
    try:
        with urllib.request.urlopen(url, timeout=TRANSFER_S) as response:
            content = response.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: transfer broke off ({error!r})") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{url} does not hold the expected content (sha256 differs)")
    write_atomic(path, [content])
