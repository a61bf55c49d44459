"""Options and error handling shared by the commands `python -m data...`."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from data.files import user_path


def path_option(text: str) -> Path:
    """Convert the value of an option to a path; the `type` of options that name a file or folder.

    Raises argparse.ArgumentTypeError if it is empty.
    """
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    add(
        "--tokenizer",
        default=tokenizer,
        help="gpt2, bpe, byte, char, a tokenizer.json (ours or Hugging Face's) or nanoGPT's .pkl",
    )
    add("--vocab_size", type=int, help="number of ids of --tokenizer=bpe, including end-of-text")
    out = Path(__file__).parent / dataset / "prepared"
    add("--out", type=path_option, default=out, help="folder")
    add("--num_proc", type=int, default=os.cpu_count() or 1, help="documents tokenized in parallel")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens per shard")
    add("--val_fraction", type=float, default=val_fraction, help="fraction of validation documents")
    return options


def run(main: Callable[[], None]) -> None:
    """Call a command's `main`; report a user's error as one message with exit code 1.

    Characters that the terminal's encoding lacks are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except MemoryError as error:
        sys.exit(f"error: the memory of this machine does not suffice ({error or 'MemoryError'})")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
