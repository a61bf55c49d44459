"""Prepare TinyStories: short stories in simple words, streamed from the Hugging Face hub."""

from collections.abc import Sequence

from data.command import parser, run
from data.corpus import hub_corpus, local_corpus
from data.prepare import prepare


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("tinystories", __doc__, tokenizer="bpe", val_fraction=0.01)
    options.add_argument("--local", help="folder with the parquet files, instead of the hub")
    args = vars(options.parse_args(argv))
    local = args.pop("local")
    corpus = local_corpus(local) if local else hub_corpus("roneneldan/TinyStories")
    prepare(corpus, bpe_vocab_size=4096, **args)


if __name__ == "__main__":
    run(main)
