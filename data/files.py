"""Write files atomically, hash them, and download them without waiting for a dead network."""

import hashlib
import http.client
import os
import secrets
import socket
import threading
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

PROBE_S = 0.6  # seconds to wait for a first connection before the network counts as absent
TRANSFER_S = 30.0  # seconds of silence after which a download fails


def write_atomic(path: str | Path, content: str | Iterable[bytes]) -> str:
    """Write `content` to `path` so that `path` never holds only a part of it; return its sha256.

    The content goes to a temporary file beside `path`, which is synced to disk and then renamed.
    Several processes may write the same path; the last one to finish wins. A process that is killed
    leaves its temporary file `<path>.<random>.tmp`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = [content.encode()] if isinstance(content, str) else content
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
        fsync(partial)
        partial.replace(path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Force the content of a file, or the entries of a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: str | Path) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_reachable(url: str) -> bool:
    """Return whether a connection to `url`, or to its proxy, opens within `PROBE_S` seconds.

    The attempt runs in a thread because name resolution has no timeout.
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
    """Download `url` to `path`.

    Raises OSError if the network is absent (in under a second), if the transfer breaks off, or if
    the content does not have the expected sha256.
    """
    if not is_reachable(url):
        raise ConnectionError(f"no connection to {urlsplit(url).hostname} within {PROBE_S} s")
    try:
        with urllib.request.urlopen(url, timeout=TRANSFER_S) as response:
            content = response.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: the transfer broke off ({error!r})") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{url} does not hold the expected content (its sha256 differs)")
    write_atomic(path, [content])
