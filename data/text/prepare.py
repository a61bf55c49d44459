"""Prepare your own text from a folder or a file.

JSON, JSON lines, parquet and CSV files hold one document per row; any other file in a folder is one
document. A single text file is cut in two, and its last part is for validation.
"""

from collections.abc import Sequence
from pathlib import Path

from data.command import parser, run
from data.corpus import TABLES, local_corpus, one_text_corpus
from data.prepare import prepare


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("text", __doc__, tokenizer="bpe", val_fraction=0.05)
    options.add_argument("--input", type=Path, required=True, help="folder or file")
    options.add_argument("--column", default="text", help="name of the column with the text")
    args = vars(options.parse_args(argv))
    path, column = args.pop("input"), args.pop("column")
    if path.is_file() and path.suffix not in TABLES:
        source = {"local": str(path.resolve())}
        corpus = one_text_corpus(source, path.read_bytes, args["val_fraction"])
    else:
        corpus = local_corpus(path, column=column)
    prepare(corpus, **args)


if __name__ == "__main__":
    run(main)
