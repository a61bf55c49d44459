"""Convert between text and token ids: GPT-2's BPE, a trained BPE, bytes, characters or symbols.

A tokenizer is saved as JSON next to the data and in every checkpoint, so training and sampling need
neither the network nor the corpus.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import tiktoken

from data.files import write_atomic
from data.gpt2_files import ensure_gpt2_files
from data.schema import Schema, parse_json
from data.shards import DataError

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB = 65536  # ids are stored as uint16

# GPT-4's pattern to split text before BPE, with at most two digits per piece.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

_PROBE = "aZ é\u4e2d\u0301🙂\r\n\t 09'll.-_<|>\0"  # contains characters of many kinds
_PIECES = {"character": r"(?s:.)", "symbol": r"\S+ ?|\s"}  # pattern of one unit of text


class TokenizerFile(Schema):
    """The content of our tokenizer.json."""

    name: str
    pattern: str
    special: dict[str, int]
    ranks: dict[str, int]  # hexadecimal bytes of a token -> id


class Tokenizer:
    """Byte-pair encoding with `ranks` (token bytes -> id, ids 0..n-1) and end-of-text as id n.

    Ranks without merges give a vocabulary of bytes, characters or symbols. Raises ValueError if the
    ids are not contiguous, if there are more than 65,536, if a token is empty, or if `pattern` is
    not a regular expression or matches an empty piece of text.
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int]) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"tokenizer {name!r}: ids are not 0..{len(ranks) - 1}, each once")
        if not 0 < len(ranks) < MAX_VOCAB or b"" in ranks:
            raise ValueError(
                f"tokenizer {name!r}: {len(ranks) + 1} ids; expected 2 to {MAX_VOCAB}, none empty"
            )
        _check_pattern(name, pattern)
        self.pattern = pattern
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=pattern,
            mergeable_ranks=self.ranks,
            special_tokens={END_OF_TEXT: len(ranks)},
        )
        has_all_bytes = all(bytes([value]) in ranks for value in range(256))
        self._symbols = (
            None if has_all_bytes else {token.decode(errors="replace") for token in ranks}
        )
        self._set_vocabulary(name, [*self.ranks, END_OF_TEXT.encode()], eot=len(ranks))

    def _set_vocabulary(self, name: str, tokens: list[bytes], eot: int) -> None:
        """Set the public attributes; `tokens` are the bytes of every id."""
        self.name = name
        self.eot = eot
        self.n_vocab = len(tokens)
        self._tokens = tokens
        self._lengths = np.array([*map(len, tokens)], dtype=np.int32)
        self._lengths[eot] = 0

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, in which "<|endoftext|>" is ordinary text.

        Raises ValueError if the ids do not decode to the same text: a character is not in the
        vocabulary, or the tokenizer's pattern does not match all of the text.
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Encode `text` as an (n,) uint16 array, as `encode` does.

        Calls from several threads run in parallel.
        """
        ids = self._ids(text)
        if not self._is_complete(ids, text):
            raise ValueError(
                f"tokenizer {self.name!r} cannot encode a text, because its ids decode to another "
                f"one: {_first_difference(text, self.decode(ids.tolist()))}; use a tokenizer that "
                "keeps every character"
            )
        return ids.astype(np.uint16)

    def _ids(self, text: str) -> np.ndarray:
        self._check_symbols(text)
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def _is_complete(self, ids: np.ndarray, text: str) -> bool:
        """Return whether `ids` decode to `text`; the tokens are pieces of it, in order."""
        return int(self._lengths[ids].sum(dtype=np.int64)) == len(text.encode())

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
        return b"".join(self._tokens[i] for i in ids)

    def token_bytes(self) -> np.ndarray:
        """Return the length in bytes of every id, (n_vocab,) int32; 0 for end-of-text."""
        return self._lengths.copy()

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the file that `save` writes."""
        return hashlib.sha256(self._to_json()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, atomically."""
        write_atomic(path, [self._to_json()])

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Load the tokenizer that `save` or Hugging Face's `tokenizers` wrote to `path`.

        Raises DataError that names the file if it is damaged.
        """
        from data.imported_tokenizers import HFTokenizer  # imports this module

        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
        try:
            if b'"added_tokens"' in content:
                return HFTokenizer(content)
            return _from_json(content)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None

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
        for match in regex.finditer(_PIECES[kind], text):
            if match[0] not in self._symbols:
                raise ValueError(
                    f"{kind} {match[0]!r} at position {match.start()} is not among the "
                    f"{len(self._symbols)} {kind}s of tokenizer {self.name!r}"
                )


def _first_difference(text: str, decoded: str) -> str:
    pairs = enumerate(zip(text, decoded, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(text), len(decoded)))
    return f"{text[place : place + 20]!r} at position {place} became {decoded[place:][:20]!r}"


def _check_pattern(name: str, pattern: str) -> None:
    """Raise ValueError if `pattern` is invalid or matches empty text, on which tiktoken crashes."""
    try:
        matches = [match[0] for match in regex.finditer(pattern, _PROBE)]
    except regex.error as error:
        raise ValueError(f"tokenizer {name!r}: pattern {pattern!r:.80}: {error}") from None
    if "" in matches:
        raise ValueError(f"tokenizer {name!r}: pattern {pattern!r:.80} matches empty text")


def _from_json(raw: bytes) -> Tokenizer:
    """Build a tokenizer from the JSON that `save` writes. Raises ValueError on anything else."""
    content = parse_json(raw, "not a tokenizer file", TokenizerFile)
    ranks = {bytes.fromhex(token): rank for token, rank in content.ranks.items()}
    if len(ranks) != len(content.ranks):
        raise ValueError("two ranks have the same bytes")
    if content.special != {END_OF_TEXT: len(ranks)}:
        raise ValueError(
            f"'special' is {content.special}, expected {{'{END_OF_TEXT}': {len(ranks)}}}"
        )
    return Tokenizer(content.name, content.pattern, ranks)


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

    Raises ValueError if the files are absent and cannot be downloaded.
    """
    ensure_gpt2_files()
    encoding = tiktoken.get_encoding("gpt2")
    return Tokenizer("gpt2", encoding._pat_str, encoding._mergeable_ranks)
