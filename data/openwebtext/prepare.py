"""Prepare OpenWebText, the open reproduction of GPT-2's corpus, from the Hugging Face hub."""

from collections.abc import Sequence

from data.command import parser, run
from data.corpus import hub_corpus, local_corpus
from data.prepare import prepare


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("openwebtext", __doc__, tokenizer="gpt2", val_fraction=0.0005)
    options.add_argument("--local", help="folder with the parquet files, instead of the hub")
    args = vars(options.parse_args(argv))
    local = args.pop("local")
    prepare(local_corpus(local) if local else hub_corpus("Skylion007/openwebtext"), **args)


if __name__ == "__main__":
    run(main)
