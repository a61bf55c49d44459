"""The Python sources of the running interpreter's standard library, a file a document.

Real text that is on every machine able to run the trainer: 12 MB, PSF licence, no download.
Tests and installed packages are left out; manifest.json lists every file with its hash.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from data.command import parser, run
from data.corpus import Corpus
from data.prepare import prepare

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def stdlib_files(root: Path) -> list[Path]:
    """Every *.py under `root` but for tests and installed packages, in a fixed order."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # Assigned in place, the walk goes on with these only.
        subfolders[:] = sorted(name for name in subfolders if name not in LEFT_OUT)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return files


def stdlib_corpus(root: Path) -> Corpus:
    """The files of the standard library at `root`, with their manifest."""
    contents = {path.relative_to(root).as_posix(): path.read_bytes() for path in stdlib_files(root)}
    manifest = [
        {"path": path, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        for path, raw in contents.items()
    ]
    return Corpus(
        source={"dataset": "pystdlib", "python": platform.python_version()},
        documents=lambda start: islice(contents.values(), start, None),
        manifest=manifest,
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("pystdlib", __doc__, tokenizer="bpe", val_fraction=0.1)
    args = options.parse_args(argv)
    corpus = stdlib_corpus(Path(sysconfig.get_paths()["stdlib"]))
    # 2048 ids leave three quarters of a one-million-parameter model to its blocks.
    prepare(corpus, bpe_vocab_size=2048, **vars(args))


if __name__ == "__main__":
    run(main)
