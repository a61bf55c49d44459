"""Write files atomically, hash them, and download them without waiting for a dead network."""

import hashlib
import http.client
import os
import secrets
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

PROBE_S = 8.0  # seconds to wait for a first connection before the network counts as absent
NOTICE_S = 1.0  # seconds of waiting after which a message says so
TRANSFER_S = 30.0  # seconds of silence after which a download fails


def user_path(text: str | Path) -> Path:
    """Return the path that a user typed, with "~" and "~user" expanded.

    Raises ValueError if it is empty, holds a null character or names an unknown user.
    """
    is_empty = not str(text).strip()
    if is_empty or "\0" in str(text):
        reason = "the path is empty" if is_empty else "it holds a null character"
        expected = "expected the name of a file or a folder"
        raise ValueError(f"path {str(text)!r}: {expected}, but {reason}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"path {str(text)!r}: {error}") from None


def printable(path: Path) -> str:
    """Return an absolute path as text in any locale; bytes that are not UTF-8 are escaped."""
    return os.fsencode(path.resolve()).decode("utf-8", errors="backslashreplace")


def files_under(root: Path) -> list[Path]:
    """Return all files below the folder `root`, in the order of their paths, but no hidden ones.

    Links to folders are followed. A folder that can be reached in several ways is listed once,
    under its own path if that is below `root`. Raises OSError if a folder cannot be read.
    """
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    tops = [root]  # the links found in one folder are walked after all folders before them
    for top in tops:
        for folder, subfolders, names in os.walk(top, onerror=_raise):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            paths = [Path(folder, name) for name in names if not name.startswith(".")]
            files += [path for path in paths if path.is_file()]
            tops += [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


def write_atomic(path: str | Path, content: str | Iterable[bytes]) -> str:
    """Write `content` to `path` so that `path` never holds only a part of it; return its sha256.

    The content goes to a temporary file beside `path`, which is synced to disk and then renamed.
    Several processes may write the same path; the last one to finish wins. A process that is killed
    leaves its temporary file `<path>.<random>.tmp`. Raises OSError that names `path`, for example
    if the disk is full.
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
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise  # reading the content failed, not writing it
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(path)) from None
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Delete the temporary files of killed writes of the files in a folder that match `pattern`."""
    for leftover in folder.glob(f"{pattern}.*.tmp"):
        leftover.unlink()


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

    A message on stderr says what is waited for. The attempt runs in a thread because name
    resolution has no timeout.
    """
    answers: list[bool] = []
    probe = threading.Thread(target=lambda: answers.append(_connects(url)), daemon=True)
    probe.start()
    probe.join(min(NOTICE_S, PROBE_S))
    if not answers:
        host = urlsplit(url).hostname
        print(f"waiting up to {PROBE_S:g} s for a connection to {host}", file=sys.stderr)
        probe.join(max(0.0, PROBE_S - NOTICE_S))
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

    Raises OSError if there is no connection within `PROBE_S` seconds, if the transfer breaks off,
    or if the content does not have the expected sha256.
    """
    if not is_reachable(url):
        raise ConnectionError(f"no connection to {urlsplit(url).hostname} within {PROBE_S:g} s")
    try:
        with urllib.request.urlopen(url, timeout=TRANSFER_S) as response:
            content = response.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: the transfer broke off ({error!r})") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{url} does not hold the expected content (its sha256 differs)")
    write_atomic(path, [content])
