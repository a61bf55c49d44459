"""Prepare your own text from a folder or a file.

JSON, JSON lines, parquet, CSV and TSV files hold one document per row; any other file in a folder
is one document. A single text file is cut in two, and its last part is for validation. Files may be
compressed with gzip or zstd.
"""

from collections.abc import Sequence

from data.command import parser, path_option, run
from data.corpus import local_corpus, one_text_corpus
from data.files import printable, sha256_of
from data.prepare import prepare
from data.readers import is_table, read_text


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("text", __doc__, tokenizer="bpe", val_fraction=0.05)
    add = options.add_argument
    add("--input", type=path_option, required=True, help="folder or file")
    add("--column", default="text", help="name of the column with the text")
    add("--include", action="append", default=[], metavar="PATTERN", help="read only such files")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="skip files and folders")
    args = vars(options.parse_args(argv))
    path = args.pop("input")
    choice = {name: args.pop(name) for name in ("column", "include", "exclude")}
    if path.is_file() and (choice["include"] or choice["exclude"]):
        options.error("--include and --exclude choose the files of a folder, but --input is a file")
    if path.is_file() and not is_table(path):
        source = {"local": printable(path), "sha256": sha256_of(path)}
        corpus = one_text_corpus(source, lambda: read_text(path), args["val_fraction"])
    else:
        corpus = local_corpus(path, out=args["out"], **choice)
    prepare(corpus, **args)


if __name__ == "__main__":
    run(main)
