"""Prepare FineWeb: filtered web text, streamed from the Hugging Face hub (ODC-By licence)."""

from collections.abc import Sequence

from data.command import run
from data.hub import prepare_from_hub


def main(argv: Sequence[str] | None = None) -> None:
    prepare_from_hub(
        argv,
        "fineweb",
        __doc__,
        "HuggingFaceFW/fineweb",
        subset="sample-10BT",
        tokenizer="gpt2",
        val_fraction=0.001,
    )


if __name__ == "__main__":
    run(main)
