"""Prepare TinyStories: short stories in simple words, streamed from the Hugging Face hub."""

from collections.abc import Sequence

from data.command import run
from data.hub import prepare_from_hub


def main(argv: Sequence[str] | None = None) -> None:
    prepare_from_hub(
        argv,
        "tinystories",
        __doc__,
        "roneneldan/TinyStories",
        tokenizer="bpe",
        val_fraction=0.01,
        bpe_vocab_size=4096,
    )


if __name__ == "__main__":
    run(main)
