"""Convert between text and token ids: GPT-2's BPE, a trained BPE, bytes, characters or symbols.

A tokenizer is saved as JSON next to the data and in every checkpoint, so training and sampling need
neither the network nor the corpus.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from data.files import write_atomic
from data.gpt2_files import ensure_gpt2_files

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB = 65536  # ids are stored as uint16

# GPT-4's pattern to split text before BPE, with at most two digits per piece.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

_PIECES = {"character": r"(?s:.)", "symbol": r"\S+ ?|\s"}  # pattern of one unit of text


class Tokenizer:
    """Byte-pair encoding with `ranks` (token bytes -> id, ids 0..n-1) and end-of-text as id n.

    Ranks without merges give a vocabulary of bytes, characters or symbols. Raises ValueError if the
    ids are not contiguous, if there are more than 65,536, or if `pattern` is not a valid regular
    expression.
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int]) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"tokenizer {name!r}: ids are not 0..{len(ranks) - 1}, each once")
        if not 0 < len(ranks) < MAX_VOCAB:
            raise ValueError(f"tokenizer {name!r}: {len(ranks) + 1} ids; expected 2 to {MAX_VOCAB}")
        self.name = name
        self.pattern = pattern
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.eot = len(ranks)
        self.n_vocab = len(ranks) + 1
        self.encoding = tiktoken.Encoding(
            name,
            pat_str=pattern,
            mergeable_ranks=self.ranks,
            special_tokens={END_OF_TEXT: self.eot},
        )
        has_all_bytes = all(bytes([value]) in ranks for value in range(256))
        self._symbols = None if has_all_bytes else {*map(_text, ranks)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, in which "<|endoftext|>" is ordinary text.

        Raises ValueError if a character is not in the vocabulary.
        """
        self._check_symbols(text)
        return self.encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Encode `text` as an (n,) uint16 array. Calls from several threads run in parallel."""
        self._check_symbols(text)
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError on an unknown id.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of `ids`. Raises ValueError on an unknown id."""
        unknown = [i for i in ids if not 0 <= i < self.n_vocab]
        if unknown:
            raise ValueError(
                f"token id {unknown[0]} is not in tokenizer {self.name!r} (0..{self.n_vocab - 1})"
            )
        return self.encoding.decode_bytes(ids)

    def token_bytes(self) -> np.ndarray:
        """Return the length in bytes of every id, (n_vocab,) int32; 0 for end-of-text."""
        return np.array([*map(len, self.ranks), 0], dtype=np.int32)

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the file that `save` writes."""
        return hashlib.sha256(self._to_json()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, atomically."""
        write_atomic(path, [self._to_json()])

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Load the tokenizer that `save` wrote to `path`. Raises ValueError on a damaged file."""
        try:
            return _from_json(Path(path).read_bytes())
        except OSError as error:
            raise ValueError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
        except ValueError as error:
            raise ValueError(f"{path}: not a tokenizer file: {error}") from None

    def _to_json(self) -> bytes:
        content = {
            "name": self.name,
            "pattern": self.pattern,
            "special": {END_OF_TEXT: self.eot},
            "ranks": {token.hex(): rank for token, rank in self.ranks.items()},
        }
        return (json.dumps(content, indent=1) + "\n").encode()

    def _check_symbols(self, text: str) -> None:
        """Raise ValueError at the first part of `text` that is not in the vocabulary."""
        if self._symbols is None or self._symbols.issuperset(text):
            return
        kind = "character" if all(len(symbol) == 1 for symbol in self._symbols) else "symbol"
        for match in re.finditer(_PIECES[kind], text):
            if match[0] not in self._symbols:
                raise ValueError(
                    f"{kind} {match[0]!r} at position {match.start()} is not among the "
                    f"{len(self._symbols)} {kind}s of tokenizer {self.name!r}"
                )


def _text(token: bytes) -> str:
    return token.decode(errors="replace")


def _from_json(raw: bytes) -> Tokenizer:
    """Build a tokenizer from the JSON that `save` writes. Raises ValueError on anything else."""
    content = json.loads(raw)
    if not isinstance(content, dict):
        raise ValueError(f"got a {type(content).__name__}, expected an object")
    for key, kind in {"name": str, "pattern": str, "special": dict, "ranks": dict}.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{key!r} is missing or not a {kind.__name__}")
    ranks = {}
    for token, rank in content["ranks"].items():
        if type(rank) is not int or not token:
            raise ValueError(f"rank of token {token!r} is {rank!r}, expected an integer")
        ranks[bytes.fromhex(token)] = rank
    if len(ranks) != len(content["ranks"]):
        raise ValueError("two ranks have the same bytes")
    if content["special"] != {END_OF_TEXT: len(ranks)}:
        raise ValueError(
            f"'special' is {content['special']}, expected {{'{END_OF_TEXT}': {len(ranks)}}}"
        )
    return Tokenizer(content["name"], content["pattern"], ranks)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of the 256 bytes and end-of-text, which encodes any text."""
    return Tokenizer("byte", PATTERN, {bytes([value]): value for value in range(256)})


def char_tokenizer(text: str) -> Tokenizer:
    """Return a tokenizer of the distinct ASCII characters of `text`, sorted, and end-of-text."""
    characters = sorted(set(text))
    if not characters:
        raise ValueError("a character vocabulary needs a text that is not empty")
    if characters[-1] > "\x7f":
        raise ValueError(
            f"character {characters[-1]!r} is not ASCII; a character vocabulary supports only "
            "ASCII text: use --tokenizer=byte or --tokenizer=bpe"
        )
    return Tokenizer("char", PATTERN, {c.encode(): i for i, c in enumerate(characters)})


def symbol_tokenizer(name: str, symbols: Sequence[str]) -> Tokenizer:
    """Return a tokenizer with one id per symbol, in order, and end-of-text.

    In text, every symbol is followed by a space.
    """
    if len(set(symbols)) < len(symbols) or any(not s or set(s) & set(" \n") for s in symbols):
        raise ValueError(f"tokenizer {name!r}: symbols must differ and hold no white space")
    return Tokenizer(name, r"\S+ ", {f"{s} ".encode(): i for i, s in enumerate(symbols)})


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a BPE on `texts`: 256 bytes, `vocab_size` - 257 merges and end-of-text."""
    if not 257 <= vocab_size <= MAX_VOCAB:
        raise ValueError(f"vocab_size={vocab_size}: must be between 257 and {MAX_VOCAB}")
    import rustbpe  # needed only to train

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) + 1 != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the texts hold only {len(ranks) - 256} merges; "
            f"use more text or --vocab_size={len(ranks) + 1}"
        )
    return Tokenizer(f"bpe{vocab_size}", PATTERN, ranks)


def gpt2_tokenizer() -> Tokenizer:
    """Return GPT-2's tokenizer of 50,257 ids from tiktoken's files, which are downloaded once.

    Raises ValueError in under a second if the files are absent and cannot be downloaded.
    """
    ensure_gpt2_files()
    encoding = tiktoken.get_encoding("gpt2")
    return Tokenizer("gpt2", encoding._pat_str, encoding._mergeable_ranks)


def named_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer that needs no training: "gpt2", "byte" or the path of a tokenizer.json."""
    fixed = {"gpt2": gpt2_tokenizer, "byte": byte_tokenizer}
    if name in fixed:
        return fixed[name]()
    if not name.endswith(".json"):
        raise ValueError(f"tokenizer {name!r}: unknown; expected gpt2, byte or a tokenizer.json")
    return Tokenizer.load(name)
