"""Turn a folder of token files into a dataset: `python -m data.adopt DIR --tokenizer gpt2`.

Accepts llm.c's `.bin` files with "train" or "val" in their names, and nanoGPT's train.bin and
val.bin, which have no header. Reads every token once; writes only meta.json and tokenizer.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.command import run
from data.files import sha256_of
from data.meta import META, SPLITS, TOKENIZER, empty_split, write_meta
from data.shards import DataError, Shard, has_header, shard_entry
from data.tokenizer import Tokenizer, named_tokenizer

CHUNK = 1 << 22  # tokens read at a time


def adopt(folder: Path, tokenizer: Tokenizer) -> None:
    """Write meta.json and tokenizer.json for the token files in `folder`.

    Raises DataError if a split has no file, a file is damaged, or an id is not in the tokenizer.
    """
    if (folder / META).exists():
        raise DataError(f"{folder}: has a {META} already; delete it to write a new one")
    splits = {name: empty_split() for name in SPLITS}
    for path in sorted(folder.glob("*.bin")):
        names = [name for name in SPLITS if name in path.name]
        if len(names) != 1:
            raise DataError(f"{path}: expected either 'train' or 'val' in the file's name")
        _add(splits[names[0]], path, tokenizer)
    missing = [name for name in SPLITS if not splits[name]["files"]]
    if missing:
        raise DataError(
            f"{folder}: no *.bin file has {' or '.join(map(repr, missing))} in its name"
        )
    tokenizer.save(folder / TOKENIZER)
    write_meta(folder, {"adopted": str(folder.resolve())}, tokenizer, splits)


def _add(split: dict[str, Any], path: Path, tokenizer: Tokenizer) -> None:
    """Check one token file and add its counts to its split."""
    headerless = path.name in {"train.bin", "val.bin"} and not has_header(path)
    shard = Shard(path, headerless=headerless)
    lengths = tokenizer.token_bytes()
    for start in range(0, shard.n_tokens, CHUNK):
        ids = shard.tokens()[start : start + CHUNK]
        if ids.max() >= tokenizer.n_vocab:
            raise DataError(
                f"{path}: token {start + int(ids.argmax())} is {ids.max()}, but tokenizer "
                f"{tokenizer.name!r} has only ids below {tokenizer.n_vocab}"
            )
        split["text_bytes"] += int(lengths[ids].sum(dtype=np.int64))
        split["documents"] += int((ids == tokenizer.eot).sum())
    split["files"].append(shard_entry(path.name, shard.n_tokens, shard.offset, sha256_of(path)))
    split["tokens"] += shard.n_tokens


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m data.adopt", description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--tokenizer", required=True, help="gpt2, byte or a tokenizer.json")
    args = options.parse_args(argv)
    adopt(args.folder, named_tokenizer(args.tokenizer))
    print(f"{args.folder}: is now a dataset")


if __name__ == "__main__":
    run(main)
