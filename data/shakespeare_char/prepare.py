"""Prepare Tiny Shakespeare: one megabyte of plays with one id per character.

The last tenth of the text is for validation.
"""

from collections.abc import Sequence
from pathlib import Path

from data.command import parser, path_option, run
from data.corpus import one_text_corpus
from data.files import fetch, printable, sha256_of
from data.prepare import prepare
from data.readers import read_text
from data.shards import DataError

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download(file: Path) -> str:
    """Return the plays; download them to `file` on the first call."""
    if not file.exists():
        try:
            fetch(URL, file, SHA256)
        except OSError as error:
            raise DataError(f"{URL}: {error}; get it elsewhere and pass --input FILE") from None
    return read_text(file)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("shakespeare_char", __doc__, tokenizer="char", val_fraction=0.1)
    options.add_argument(
        "--input", type=path_option, help="file with the text, instead of a download"
    )
    args = vars(options.parse_args(argv))
    given = args.pop("input")
    source = {"dataset": "shakespeare_char", "input": printable(given) if given else URL}
    if given and given.is_file():
        source["sha256"] = sha256_of(given)

    def read() -> str:
        return read_text(given) if given else download(args["out"] / "input.txt")

    prepare(one_text_corpus(source, read, args["val_fraction"]), **args)


if __name__ == "__main__":
    run(main)
