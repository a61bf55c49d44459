"""Find a tokenizer by name or file; load those that Hugging Face's tools and nanoGPT saved."""

import difflib
import io
import os
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from data.files import user_path
from data.schema import OpenSchema, listed, parse_json
from data.shards import DataError
from data.tokenizer import END_OF_TEXT, MAX_VOCAB, Tokenizer, byte_tokenizer, gpt2_tokenizer

NAMED = ("gpt2", "byte")
TRAINED = ("bpe", "char")  # on the text that is prepared
MAX_PICKLE = 16 << 20  # bytes; nanoGPT's vocabularies of characters take some kilobytes


def check_tokenizer_name(name: str) -> None:
    """Raise ValueError unless `name` names a tokenizer or the file of one."""
    if name in NAMED + TRAINED or name.endswith((".json", ".pkl")):
        return
    if os.path.isdir(os.path.expanduser(name)):
        found = user_path(name) / "tokenizer.json"
        raise ValueError(f"tokenizer {name!r}: is a folder; use {found}{_how_to_get(found)}")
    close = difflib.get_close_matches(name, NAMED + TRAINED, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"tokenizer {name!r}: unknown; {hint}Expected {', '.join(NAMED + TRAINED)}, a "
        "tokenizer.json (ours or Hugging Face's) or nanoGPT's meta.pkl"
    )


def is_file_of_tokenizer(name: str) -> bool:
    """Return whether `name` is that of a file that exists, not of a built-in tokenizer."""
    return name not in NAMED + TRAINED and user_path(name).is_file()


def named_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer that needs no training: "gpt2", "byte" or the path of a saved one.

    Raises ValueError if there is none of that name or its file is damaged.
    """
    check_tokenizer_name(name)
    if name in TRAINED:
        raise ValueError(
            f"tokenizer {name!r} is trained on a text; expected the file of a saved one"
        )
    if name in NAMED:
        return gpt2_tokenizer() if name == "gpt2" else byte_tokenizer()
    path = user_path(name)
    if hint := _how_to_get(path):
        raise DataError(f"{path}: does not exist{hint}")
    return nanogpt_tokenizer(path) if path.suffix == ".pkl" else Tokenizer.load(path)


def _how_to_get(path: Path) -> str:
    """Say how to write a tokenizer.json that is missing from a folder; otherwise ""."""
    if path.exists() or path.name != "tokenizer.json" or not path.parent.is_dir():
        return ""
    return (
        "; write this file with transformers: "
        f"AutoTokenizer.from_pretrained(NAME).save_pretrained({str(path.parent)!r})"
    )


class _Model(OpenSchema):
    type: Literal["BPE"] = "BPE"
    dropout: None = None  # encoding would be random
    vocab: dict[str, int]


class _AddedToken(OpenSchema):
    id: int
    content: str
    special: bool


class _HFFile(OpenSchema):
    model: _Model
    added_tokens: list[_AddedToken]


class HFTokenizer(Tokenizer):
    """A byte-level BPE in the format of the library `tokenizers`, with the ids of that library.

    End-of-text is the id of its special token "<|endoftext|>"; without one, a new id after the last
    one. Special tokens in a text are encoded as ordinary text.

    Args:
        content: the file's content, which `save` writes unchanged.
    Raises:
        ValueError: the content is not a byte-level BPE, or has ids that do not fit uint16.
    """

    def __init__(self, content: bytes) -> None:
        file = parse_json(content, "not a tokenizer of Hugging Face that can be used", _HFFile)
        tokens = _bytes_of_ids(file)
        special = {token.content: token.id for token in file.added_tokens if token.special}
        eot = special.get(END_OF_TEXT, len(tokens))
        if eot == len(tokens):
            tokens.append(END_OF_TEXT.encode())
        if len(tokens) > MAX_VOCAB:
            raise ValueError(
                f"{len(tokens):,} ids; expected at most {MAX_VOCAB:,}, because ids are stored as "
                "uint16"
            )
        self._content = content
        self._library = _library_tokenizer(content)
        self._set_vocabulary(f"hf{len(tokens)}", tokens, eot)
        self._lengths[list(special.values())] = 0

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._library.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def _is_complete(self, ids: np.ndarray, text: str) -> bool:
        return self.decode_bytes(ids.tolist()) == text.encode()

    def _to_json(self) -> bytes:
        return self._content


def _library_tokenizer(content: bytes) -> Any:
    """Return the object of the library `tokenizers`; special tokens in a text are ordinary."""
    from tokenizers import Tokenizer as LibraryTokenizer

    try:
        library = LibraryTokenizer.from_str(content.decode())
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"the library tokenizers cannot read it: {error}") from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    return library


def _bytes_of_ids(file: _HFFile) -> list[bytes]:
    """Return the bytes of every id; b"" for ids that are not used."""
    letters = byte_letters()
    added = {token.content: token.id for token in file.added_tokens}
    by_id = {i: token.encode() for token, i in added.items()}
    own = {token: i for token, i in file.model.vocab.items() if added.get(token) != i}
    for token, i in own.items():
        if not letters.keys() >= set(token):
            raise ValueError(f"token {token!r} is not one of a byte-level BPE such as GPT-2's")
        by_id[i] = bytes(letters[letter] for letter in token)
    if len(by_id) < len(added) + len(own):
        raise ValueError("two tokens have the same id")
    if not by_id or min(by_id) < 0 or max(by_id) >= MAX_VOCAB:
        raise ValueError(
            f"ids from {min(by_id, default=0)} to {max(by_id, default=0)}; expected 0 to at most "
            f"{MAX_VOCAB - 1}, because ids are stored as uint16"
        )
    return [by_id.get(i, b"") for i in range(max(by_id) + 1)]


def byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level BPE stands for, as GPT-2 defined it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


class _NanoGPTMeta(OpenSchema):
    itos: dict[int, str]


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler of plain containers, numbers and text, which loads no class or function."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which is not loaded")


def nanogpt_tokenizer(path: Path) -> Tokenizer:
    """Return the character tokenizer in the meta.pkl that nanoGPT writes, plus end-of-text.

    Raises DataError if the file is damaged, or holds anything but plain containers and text.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_PICKLE + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > MAX_PICKLE:
        raise DataError(f"{path}: more than {MAX_PICKLE:,} bytes, not nanoGPT's meta.pkl")
    try:
        meta = _NanoGPTMeta.model_validate(_PlainUnpickler(io.BytesIO(content)).load())
        ranks = {character.encode(): i for i, character in meta.itos.items()}
        if len(ranks) < len(meta.itos) or any(len(each) != 1 for each in meta.itos.values()):
            raise ValueError("'itos' does not hold different single characters")
        return Tokenizer("char", r"(?s:.)", ranks)
    except ValidationError as error:
        problems = listed(error, with_values=False)
        raise DataError(f"{path}: {problems}; not nanoGPT's") from None
    except (
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        EOFError,
        LookupError,
        AttributeError,
        ImportError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        raise DataError(f"{path}: not nanoGPT's meta.pkl: {error}") from None
