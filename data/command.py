"""What the commands `python -m data...` share: options, and errors as one message, no traceback."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path


def parser(
    dataset: str, about: str | None, *, tokenizer: str, val_fraction: float
) -> argparse.ArgumentParser:
    """Options of `python -m data.<dataset>.prepare`; their names are the arguments of `prepare`."""
    options = argparse.ArgumentParser(
        prog=f"python -m data.{dataset}.prepare",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--tokenizer", default=tokenizer, help="gpt2, bpe, byte, char or a tokenizer.json")
    add("--vocab_size", type=int, help="ids of --tokenizer=bpe, end-of-text included")
    add("--out", type=Path, default=Path(__file__).parent / dataset / "prepared", help="folder")
    add("--num_proc", type=int, default=os.cpu_count() or 1, help="texts tokenised side by side")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens after which a shard ends")
    add("--val_fraction", type=float, default=val_fraction, help="share of documents for val")
    return options


def run(main: Callable[[], None]) -> None:
    """Call a command's `main`; users' errors end it with one message and exit code 1."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
