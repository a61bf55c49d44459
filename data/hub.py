"""Prepare a dataset that is streamed from the Hugging Face hub, or from a download of it."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from data.command import parser, path_option
from data.corpus import Corpus, local_corpus
from data.files import is_reachable
from data.prepare import prepare
from data.readers import Document, texts_in
from data.shards import DataError


def prepare_from_hub(
    argv: Sequence[str] | None,
    dataset: str,
    about: str | None,
    path: str,
    *,
    tokenizer: str,
    val_fraction: float,
    subset: str | None = None,
    bpe_vocab_size: int = 8192,
) -> None:
    """Run the command `python -m data.<dataset>.prepare` for the dataset `path` of the hub.

    Args:
        about: the command's description.
        tokenizer, val_fraction, subset: defaults of the options. Without a default there is no
            option --subset.
    """
    options = parser(dataset, about, tokenizer=tokenizer, val_fraction=val_fraction)
    options.add_argument("--local", type=path_option, help="folder with the files, not the hub")
    if subset is not None:
        options.add_argument("--subset", default=subset, help="configuration on the hub")
    args = vars(options.parse_args(argv))
    local, subset = args.pop("local"), args.pop("subset", None)
    corpus = local_corpus(local, out=args["out"]) if local else hub_corpus(path, subset=subset)
    prepare(corpus, bpe_vocab_size=bpe_vocab_size, **args)


def hub_corpus(path: str, *, subset: str | None = None, column: str = "text") -> Corpus:
    """Stream the split "train" of a dataset on the Hugging Face hub without storing it.

    Reading the documents raises DataError if the hub cannot be reached.
    """

    def documents(start: int) -> Iterator[Document]:
        _require_hub(path)
        numbered = ((f"row {number}", row) for number, row in _rows(path, subset, start))
        return texts_in(numbered, column, f"dataset {path!r}")

    return Corpus(source={"hub": path, "subset": subset, "column": column}, documents=documents)


def _rows(path: str, subset: str | None, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows from number `start` on.

    The libraries below raise classes of their own if the connection breaks: they become DataErrors.
    """
    from datasets import load_dataset  # takes a second to import

    try:
        rows = load_dataset(path, name=subset, split="train", streaming=True)
        yield from enumerate(rows.skip(start), start)
    except (ValueError, OSError):  # a wrong subset, a full disk
        raise
    except Exception as error:
        raise DataError(
            f"dataset {path!r}: {type(error).__name__}: {error}; run the same command again, which "
            "continues where it stopped"
        ) from error


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids connections, by the rule of huggingface_hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def silent_endpoint() -> str | None:
    """Return the address of the Hugging Face hub if it does not answer, else None."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return None if is_reachable(endpoint) else endpoint


def _require_hub(path: str) -> None:
    if is_offline():
        reason = "HF_HUB_OFFLINE forbids it; unset that variable"
    elif endpoint := silent_endpoint():
        reason = f"{endpoint} does not answer; connect this machine"
    else:
        return
    raise DataError(
        f"dataset {path!r} must be streamed from the Hugging Face hub, but {reason}, or download "
        "its parquet files elsewhere and pass --local FOLDER"
    )
