"""Prepare FineWeb: filtered web text, streamed from the Hugging Face hub (ODC-By licence)."""

from collections.abc import Sequence

from data.command import parser, run
from data.corpus import hub_corpus, local_corpus
from data.prepare import prepare


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("fineweb", __doc__, tokenizer="gpt2", val_fraction=0.001)
    options.add_argument("--subset", default="sample-10BT", help="configuration on the hub")
    options.add_argument("--local", help="folder with the parquet files, instead of the hub")
    args = vars(options.parse_args(argv))
    subset, local = args.pop("subset"), args.pop("local")
    corpus = local_corpus(local) if local else hub_corpus("HuggingFaceFW/fineweb", subset=subset)
    prepare(corpus, **args)


if __name__ == "__main__":
    run(main)
