"""Text <-> token ids: one class for GPT-2's vocabulary, BPE trained here, bytes and characters.

A tokenizer is saved as JSON beside the data or the weights that it belongs to, so training and
sampling need neither the network nor the corpus again.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from data.files import fetch, sha256_of, write_atomic

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB = 65536  # ids are stored as uint16

# GPT-4's way to cut text into pieces, with at most two digits in a piece.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

_PIECES = {"character": r"(?s:.)", "symbol": r"\S+ ?|\s"}  # what texts of a vocabulary consist of

# url -> sha256 of the file; tiktoken keeps each under the sha1 of its url.
GPT2_FILES = {
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe": (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ),
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json": (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    ),
}


class Tokenizer:
    """Byte-pair encoding over `ranks` (token bytes -> id, ids 0..n-1), with end-of-text as id n.

    Ranks without merges make a vocabulary of bytes, characters or symbols. Raises ValueError if the
    ids are not contiguous or more than 65,536, or if the pattern is no regular expression.
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int]) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"tokenizer {name!r}: ids are not 0..{len(ranks) - 1}, each once")
        if not 0 < len(ranks) < MAX_VOCAB:
            raise ValueError(f"tokenizer {name!r}: {len(ranks) + 1} ids; wanted 2 to {MAX_VOCAB}")
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
        """Ids of `text`, "<|endoftext|>" in it being plain text. ValueError: unknown character."""
        self._check_symbols(text)
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all processors."""
        for text in texts:
            self._check_symbols(text)
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as (n,) uint16; threads of it run side by side."""
        self._check_symbols(text)
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. ValueError on an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of `ids`, exactly. ValueError on an unknown id."""
        unknown = [i for i in ids if not 0 <= i < self.n_vocab]
        if unknown:
            raise ValueError(
                f"token id {unknown[0]} is not in tokenizer {self.name!r} (0..{self.n_vocab - 1})"
            )
        return self.encoding.decode_bytes(ids)

    def token_bytes(self) -> np.ndarray:
        """Length in bytes of every id, (n_vocab,) int32; 0 for end-of-text."""
        return np.array([*map(len, self.ranks), 0], dtype=np.int32)

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokenizer's content; equals the hash of the file that `save` writes."""
        return hashlib.sha256(self._to_json()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, atomically."""
        write_atomic(path, [self._to_json()])

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """The tokenizer that `save` wrote to `path`. ValueError: what is wrong with the file."""
        try:
            return _from_json(Path(path).read_bytes())
        except OSError as error:
            raise ValueError(f"{path}: no tokenizer to read ({error.strerror})") from None
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
        """With all bytes every text has ids; else it must be made of whole symbols."""
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
    """Build a tokenizer from the JSON that `save` writes, refusing everything else."""
    content = json.loads(raw)
    if not isinstance(content, dict):
        raise ValueError(f"got a {type(content).__name__}, wanted an object")
    for key, kind in {"name": str, "pattern": str, "special": dict, "ranks": dict}.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{key!r} is missing or not a {kind.__name__}")
    ranks = {}
    for token, rank in content["ranks"].items():
        if type(rank) is not int or not token:
            raise ValueError(f"rank of token {token!r} is {rank!r}, wanted hex -> whole number")
        ranks[bytes.fromhex(token)] = rank
    if len(ranks) != len(content["ranks"]):
        raise ValueError("two ranks have the same bytes")
    if content["special"] != {END_OF_TEXT: len(ranks)}:
        raise ValueError(
            f"'special' is {content['special']}, wanted {{'{END_OF_TEXT}': {len(ranks)}}}"
        )
    return Tokenizer(content["name"], content["pattern"], ranks)


def byte_tokenizer() -> Tokenizer:
    """256 bytes and end-of-text: needs nothing, encodes everything."""
    return Tokenizer("byte", PATTERN, {bytes([value]): value for value in range(256)})


def char_tokenizer(text: str) -> Tokenizer:
    """The distinct ASCII characters of `text`, in order, and end-of-text."""
    characters = sorted(set(text))
    if not characters:
        raise ValueError("a character vocabulary needs a text that is not empty")
    if characters[-1] > "\x7f":
        raise ValueError(
            f"character {characters[-1]!r} is not ASCII: one id a character works for ASCII text "
            "only; use --tokenizer=byte or --tokenizer=bpe"
        )
    return Tokenizer("char", PATTERN, {c.encode(): i for i, c in enumerate(characters)})


def symbol_tokenizer(name: str, symbols: Sequence[str]) -> Tokenizer:
    """One id a symbol, in their order, and end-of-text; in text, a space follows each symbol."""
    if len(set(symbols)) < len(symbols) or any(not s or set(s) & set(" \n") for s in symbols):
        raise ValueError(f"tokenizer {name!r}: symbols must differ and hold no white space")
    return Tokenizer(name, r"\S+ ", {f"{s} ".encode(): i for i, s in enumerate(symbols)})


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding learnt from `texts`: 256 bytes, `vocab_size` - 257 merges, end-of-text."""
    if not 257 <= vocab_size <= MAX_VOCAB:
        raise ValueError(f"vocab_size={vocab_size}: must be between 257 and {MAX_VOCAB}")
    import rustbpe  # not needed to use what was learnt

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
    """GPT-2's 50,257 ids, from tiktoken's cached files, which are downloaded once if need be.

    Raises ValueError in under a second if the files are absent and cannot be downloaded.
    """
    _ensure_gpt2_files()
    encoding = tiktoken.get_encoding("gpt2")
    return Tokenizer("gpt2", encoding._pat_str, encoding._mergeable_ranks)


def _ensure_gpt2_files() -> None:
    """Have whole files where tiktoken looks: it would wait for a silent network without end."""
    folder = _tiktoken_cache()
    paths = {url: folder / hashlib.sha1(url.encode()).hexdigest() for url in GPT2_FILES}
    try:
        for url, path in paths.items():
            if not path.exists() or sha256_of(path) != GPT2_FILES[url]:
                fetch(url, path, GPT2_FILES[url])
    except OSError as error:
        wanted = "\n".join(f"  {path}  =  {url}" for url, path in paths.items())
        raise ValueError(
            f"tokenizer 'gpt2' needs two files that are absent or damaged, and their download "
            f"failed ({error}).\nPut them there (TIKTOKEN_CACHE_DIR names the folder):\n{wanted}\n"
            "or use --tokenizer=bpe, which needs no download."
        ) from None


def _tiktoken_cache() -> Path:
    """The folder where tiktoken keeps its files."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            if not os.environ[variable]:
                raise ValueError(f"{variable} is empty: name a folder, or unset it")
            return Path(os.environ[variable])
    return Path(tempfile.gettempdir(), "data-gym-cache")


def named_tokenizer(name: str) -> Tokenizer:
    """A tokenizer that needs no corpus: "gpt2", "byte", or the path of a tokenizer.json."""
    fixed = {"gpt2": gpt2_tokenizer, "byte": byte_tokenizer}
    if name in fixed:
        return fixed[name]()
    if not name.endswith(".json"):
        raise ValueError(f"tokenizer {name!r}: unknown; wanted gpt2, byte or a tokenizer.json")
    return Tokenizer.load(name)
