"""Prepare OpenWebText, the open reproduction of GPT-2's corpus, from the Hugging Face hub."""

from collections.abc import Sequence

from data.command import run
from data.hub import prepare_from_hub


def main(argv: Sequence[str] | None = None) -> None:
    prepare_from_hub(
        argv,
        "openwebtext",
        __doc__,
        "Skylion007/openwebtext",
        tokenizer="gpt2",
        val_fraction=0.0005,
    )


if __name__ == "__main__":
    run(main)
