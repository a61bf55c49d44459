"""Turn a folder of token files into a dataset: `python -m data.adopt DIR --tokenizer gpt2`.

Accepts files with "train" or "val" in their names or in the names of their subfolders: llm.c's
`.bin`, numpy's `.npy`, and nanoGPT's train.bin and val.bin, which have no header. Reads every token
once; writes meta.json and tokenizer.json, and copies of files whose tokens are wider than uint16.
"""

import argparse
from collections.abc import Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from data.command import path_option, run
from data.files import files_under, printable, remove_leftovers, sha256_of, write_atomic
from data.imported_tokenizers import named_tokenizer
from data.meta import META, SPLITS, TOKENIZER, empty_split, write_meta
from data.shards import DataError, Shard, has_header, is_npy, read_npy_header, shard_entry
from data.tokenizer import Tokenizer

CHUNK = 1 << 22  # tokens read at a time
DTYPES = ("uint16", "uint32", "uint64")
NANOGPT_META = "meta.pkl"


def adopt(folder: Path, tokenizer: Tokenizer, dtype: str | None = None) -> None:
    """Write meta.json and tokenizer.json for the token files in `folder`.

    A file whose tokens are wider than uint16 is copied to `<name>.uint16`.

    Args:
        dtype: the type of the tokens in files without a header. By default only train.bin and
            val.bin may have none, and they have to look like uint16.
    Raises:
        DataError: a split has no file, a file is damaged, or an id is not in the tokenizer.
    """
    if (folder / META).exists():
        raise DataError(f"{folder}: has a {META} already; delete it to write a new one")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = [path for path in files_under(folder) if path.suffix in (".bin", ".npy")]
    split_of = {path: _split_of(path, folder) for path in files}
    if missing := [name for name in SPLITS if name not in split_of.values()]:
        raise DataError(
            f"{folder}: no .bin or .npy file has {' or '.join(map(repr, missing))} in its name"
        )
    splits = {name: empty_split() for name in SPLITS}
    with FileLock(folder / "adopt.lock", mode=0o644):
        for path, split in split_of.items():
            _add(splits[split], folder, _as_shard(path, dtype, tokenizer), tokenizer)
    tokenizer.save(folder / TOKENIZER)
    write_meta(folder, {"adopted": printable(folder)}, tokenizer, splits)


def _split_of(path: Path, folder: Path) -> str:
    """Return the split that the file's name states, or else the nearest folder's."""
    for part in reversed(path.relative_to(folder).parts):
        names = [name for name in SPLITS if name in part]
        if len(names) == 1:
            return names[0]
        if names:
            break
    raise DataError(f"{path}: expected either 'train' or 'val' in the file's name")


def _as_shard(path: Path, dtype: str | None, tokenizer: Tokenizer) -> Shard:
    """Open one token file; a file of wider integers is first copied as uint16."""
    if has_header(path):
        return Shard(path)
    if is_npy(path):
        kind, n_tokens, offset = read_npy_header(path)
        expected = offset + n_tokens * kind.itemsize
        if path.stat().st_size != expected:
            raise DataError(
                f"{path}: {path.stat().st_size:,} bytes, expected {expected:,} for {n_tokens:,} "
                "tokens; the file is damaged"
            )
    elif path.suffix == ".npy" or (dtype is None and path.name not in {"train.bin", "val.bin"}):
        return Shard(path)  # which says that the header is missing
    else:
        kind, offset = np.dtype(dtype or _checked_uint16(path)).newbyteorder("<"), 0
    if kind == np.dtype("<u2"):
        return Shard(path, headerless=not offset)
    size = path.stat().st_size - offset
    if size <= 0 or size % kind.itemsize:
        raise DataError(f"{path}: {size:,} bytes of tokens, expected a multiple of {kind.itemsize}")
    ids = np.memmap(path, kind, "r", offset)
    copy = path.with_name(f"{path.name}.uint16")
    remove_leftovers(copy.parent, escape(copy.name))
    write_atomic(copy, (part.astype("<u2").tobytes() for part in _checked(path, ids, tokenizer)))
    return Shard(copy, headerless=True)


def _checked_uint16(path: Path) -> str:
    """Return "uint16". Raises DataError if the file looks like wider integers."""
    start = np.fromfile(path, "<u2", CHUNK)
    for width, name, which in ((4, "uint64", "fourth"), (2, "uint32", "second")):
        if len(start) >= 8 * width and len(start) % width == 0:
            columns = start.reshape(-1, width)
            if columns[:, 1:].max() < 16 <= columns[:, 0].max():
                raise DataError(
                    f"{path}: looks like {name}, because, read as uint16, only every {which} "
                    f"number is above 15; pass --dtype={name}, or --dtype=uint16 if it is not"
                )
    return "uint16"


def _checked(path: Path, ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield `ids` in parts. Raises DataError at an id that the tokenizer does not have."""
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        unknown = (part < 0) | (part >= tokenizer.n_vocab)
        if unknown.any():
            place = int(unknown.argmax())
            raise DataError(
                f"{path}: token {start + place} is {part[place]}, but tokenizer "
                f"{tokenizer.name!r} has only ids below {tokenizer.n_vocab}"
            )
        yield part


def _add(split: dict[str, Any], folder: Path, shard: Shard, tokenizer: Tokenizer) -> None:
    """Check one token file and add its counts to its split."""
    lengths = tokenizer.token_bytes()
    for ids in _checked(shard.path, shard.tokens(), tokenizer):
        split["text_bytes"] += int(lengths[ids].sum(dtype=np.int64))
        split["documents"] += int((ids == tokenizer.eot).sum())
    name = shard.path.relative_to(folder).as_posix()
    split["files"].append(shard_entry(name, shard.n_tokens, shard.offset, sha256_of(shard.path)))
    split["tokens"] += shard.n_tokens


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m data.adopt", description=__doc__)
    options.add_argument("folder", type=path_option)
    options.add_argument(
        "--tokenizer",
        help="gpt2, byte, a tokenizer.json (ours or Hugging Face's) or nanoGPT's meta.pkl, which "
        "is the default if it is in the folder",
    )
    options.add_argument("--dtype", choices=DTYPES, help="type of tokens in files without a header")
    args = options.parse_args(argv)
    name = args.tokenizer
    if name is None:
        if not (args.folder / NANOGPT_META).exists():
            options.error("--tokenizer is required, because the folder has no meta.pkl")
        name = str(args.folder / NANOGPT_META)
    adopt(args.folder, named_tokenizer(name), args.dtype)
    print(f"{args.folder}: is now a dataset")


if __name__ == "__main__":
    run(main)
