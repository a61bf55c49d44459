"""Prepare the Python sources of the interpreter's standard library, one document per file.

This text exists on every machine that can run the trainer: 12 MB, PSF licence, no download.
Tests and installed packages are excluded; manifest.json lists every file with its hash.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from data.command import parser, run
from data.corpus import Corpus
from data.prepare import prepare
from data.readers import decoded

EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def stdlib_files(root: Path) -> list[Path]:
    """Return every *.py under `root`, without tests and installed packages, in a fixed order."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # os.walk descends only into the folders left in this list.
        subfolders[:] = sorted(name for name in subfolders if name not in EXCLUDED)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return files


def stdlib_corpus(root: Path) -> Corpus:
    """Return the files of the standard library at `root` as a corpus with a manifest."""
    contents = {path.relative_to(root).as_posix(): path.read_bytes() for path in stdlib_files(root)}
    manifest = [
        {"path": path, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        for path, raw in contents.items()
    ]
    items = list(contents.items())
    return Corpus(
        source={"dataset": "pystdlib", "python": platform.python_version()},
        documents=lambda start: (decoded(raw, path) for path, raw in items[start:]),
        manifest=manifest,
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("pystdlib", __doc__, tokenizer="bpe", val_fraction=0.1)
    args = options.parse_args(argv)
    corpus = stdlib_corpus(Path(sysconfig.get_paths()["stdlib"]))
    # With 2048 ids, three quarters of a one-million-parameter model are in its blocks.
    prepare(corpus, bpe_vocab_size=2048, **vars(args))


if __name__ == "__main__":
    run(main)
