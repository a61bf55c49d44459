"""Options and error handling shared by the commands `python -m data...`."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path


def parser(
    dataset: str, about: str | None, *, tokenizer: str, val_fraction: float
) -> argparse.ArgumentParser:
    """Build the options of `python -m data.<dataset>.prepare`.

    The names of the options are the names of the arguments of `data.prepare.prepare`.
    """
    options = argparse.ArgumentParser(
        prog=f"python -m data.{dataset}.prepare",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--tokenizer", default=tokenizer, help="gpt2, bpe, byte, char or a tokenizer.json")
    add("--vocab_size", type=int, help="number of ids of --tokenizer=bpe, including end-of-text")
    add("--out", type=Path, default=Path(__file__).parent / dataset / "prepared", help="folder")
    add("--num_proc", type=int, default=os.cpu_count() or 1, help="documents tokenized in parallel")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens per shard")
    add("--val_fraction", type=float, default=val_fraction, help="fraction of validation documents")
    return options


def run(main: Callable[[], None]) -> None:
    """Call a command's `main`; report a user's error as one message with exit code 1."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
