"""Tokenizers encode and decode text, and are saved as JSON."""

import json
import time

import numpy as np
import pytest
import rustbpe
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from data.files import sha256_of
from data.imported_tokenizers import named_tokenizer
from data.tokenizer import (
    END_OF_TEXT,
    PATTERN,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    symbol_tokenizer,
    train_bpe,
)

TEXTS = [
    "the cat sat on the mat; the dog didn't.\n" * 3,
    "def f(x):\n    return x + 12345\n",
    "naïve",
]
BPE = train_bpe(TEXTS, 300)
BYTE = byte_tokenizer()


@given(st.text())
def test_any_text_survives_a_round_trip(text):
    for tokenizer in (BYTE, BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert tokenizer.encode_array(text).tolist() == ids


@given(st.text(alphabet="the catsodmn'd\n 123"))
def test_bpe_ids_equal_those_of_rustbpe(text):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(TEXTS), 299, pattern=PATTERN)
    assert BPE.encode(text) == trainer.encode(text)


def test_vocabulary_sizes_include_end_of_text():
    assert (BPE.n_vocab, BPE.eot) == (300, 299)
    assert (BYTE.n_vocab, BYTE.eot) == (257, 256)
    assert BPE.token_bytes().shape == (300,)
    assert BPE.token_bytes()[BPE.eot] == 0


def test_special_strings_are_ordinary_text():
    for tokenizer in (BYTE, BPE):
        ids = tokenizer.encode(END_OF_TEXT)
        assert tokenizer.eot not in ids
        assert tokenizer.eot not in tokenizer.encode_array(END_OF_TEXT)
        assert tokenizer.decode(ids) == END_OF_TEXT


def test_byte_ids_are_the_bytes():
    assert BYTE.encode("aé") == list("aé".encode())


def test_bytes_that_are_not_utf8_are_decoded_with_replacement():
    assert BYTE.decode([0xFF, ord("a")]) == "\N{REPLACEMENT CHARACTER}a"


@pytest.mark.parametrize("unknown", [300, -1, 2**40])
def test_an_unknown_id_is_named(unknown):
    with pytest.raises(ValueError, match=f"id {unknown} is not in tokenizer 'bpe300'"):
        BPE.decode([1, unknown])


def test_characters_have_one_id_each():
    tokenizer = char_tokenizer("hello\n")
    assert tokenizer.n_vocab == len("ehlo\n") + 1
    assert tokenizer.decode(tokenizer.encode("hole")) == "hole"


def test_an_unknown_character_is_named():
    tokenizer = char_tokenizer("hello")
    for encode in (tokenizer.encode, tokenizer.encode_array):
        with pytest.raises(ValueError, match="character 'x' at position 3"):
            encode("helx")
    with pytest.raises(ValueError, match="character 'é' at position 0"):
        tokenizer.encode("é")


def test_a_character_vocabulary_is_ascii_and_not_empty():
    with pytest.raises(ValueError, match="'é' is not ASCII"):
        char_tokenizer("café")
    with pytest.raises(ValueError, match="not empty"):
        char_tokenizer("")


@pytest.mark.parametrize("vocab_size", [256, 65537])
def test_bpe_refuses_sizes_out_of_range(vocab_size):
    with pytest.raises(ValueError, match="between 257 and 65536"):
        train_bpe(TEXTS, vocab_size)


def test_bpe_refuses_more_merges_than_the_text_has():
    with pytest.raises(ValueError, match=r"only 2 merges; .* --vocab_size=259"):
        train_bpe(["ab ab ab"], 300)


@pytest.mark.parametrize("tokenizer", [BYTE, BPE, char_tokenizer("hello\n")], ids=lambda t: t.name)
def test_a_saved_tokenizer_is_loaded_unchanged(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tokenizer.sha256 == sha256_of(path)
    assert (loaded.name, loaded.n_vocab, loaded.eot) == (
        tokenizer.name,
        tokenizer.n_vocab,
        tokenizer.eot,
    )
    assert loaded.encode("hello\nhell") == tokenizer.encode("hello\nhell")


def test_the_hash_tells_tokenizers_apart():
    other = train_bpe([text.upper() for text in TEXTS], 300)
    assert other.sha256 != BPE.sha256


CORRUPTIONS = {
    "no name": (lambda c: c.pop("name"), "name: Field required"),
    "pattern is a number": (lambda c: c.update(pattern=3), "pattern: .*string .found 3"),
    "bad pattern": (lambda c: c.update(pattern="("), r"pattern '\(': missing"),
    "empty pattern": (lambda c: c.update(pattern=""), "matches empty text"),
    "optional pattern": (lambda c: c.update(pattern=r"\w*"), "matches empty text"),
    "ranks are a list": (lambda c: c.update(ranks=[]), "ranks: .*object"),
    "no ranks": (lambda c: c.update(ranks={}, special={END_OF_TEXT: 0}), "expected 2 to 65536"),
    "not hex": (lambda c: c["ranks"].update(zz=c["ranks"].pop("00")), "hexadecimal"),
    "empty token": (lambda c: c["ranks"].update({"": c["ranks"].pop("00")}), "none empty"),
    "rank is text": (lambda c: c["ranks"].update({"00": "0"}), r"ranks\.00: .*integer .found '0'"),
    "rank is true": (
        lambda c: c["ranks"].update({"01": True}),
        r"ranks\.01: .*integer .found True",
    ),
    "gap": (lambda c: c["ranks"].update({"00": 999}), "ids are not 0..298"),
    "rank twice": (lambda c: c["ranks"].update({"00": 5}), "ids are not 0..298"),
    "bytes twice": (lambda c: c["ranks"].update({"0A": c["ranks"].pop("00")}), "same bytes"),
    "end-of-text": (lambda c: c.update(special={END_OF_TEXT: 7}), "'special' is"),
}


@pytest.mark.parametrize("fault", CORRUPTIONS)
def test_a_corrupt_file_is_refused(fault, tmp_path):
    corrupt, message = CORRUPTIONS[fault]
    path = tmp_path / "tokenizer.json"
    BPE.save(path)
    content = json.loads(path.read_text())
    corrupt(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_not_a_json_object_is_refused(raw, tmp_path):
    (tmp_path / "t.json").write_bytes(raw)
    with pytest.raises(ValueError, match="not a tokenizer file"):
        Tokenizer.load(tmp_path / "t.json")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json: cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "absent.json")


def test_named_tokenizers(tmp_path):
    BPE.save(tmp_path / "mine.json")
    assert named_tokenizer("byte").sha256 == BYTE.sha256
    assert named_tokenizer(str(tmp_path / "mine.json")).sha256 == BPE.sha256
    with pytest.raises(ValueError, match="'bpe' is trained on a text"):
        named_tokenizer("bpe")


def test_an_unknown_name_gives_all_names_and_the_nearest():
    with pytest.raises(ValueError, match="'gtp2': unknown; did you mean 'gpt2'") as caught:
        named_tokenizer("gtp2")
    for name in ("gpt2", "byte", "bpe", "char", "tokenizer.json", "meta.pkl"):
        assert name in str(caught.value)


def test_text_that_the_pattern_does_not_match_is_refused_with_its_place():
    words = Tokenizer("words", r"\p{L}+|\p{N}+", BYTE.ranks)
    assert words.decode(words.encode("abc123")) == "abc123"
    for encode in (words.encode, words.encode_array):
        with pytest.raises(ValueError, match=r"'words' cannot encode .*'; d' at position 3"):
            encode("abc; d")


@pytest.mark.usefixtures("gpt2_cache")
def test_gpt2_ids_equal_tiktokens_and_need_no_cache_once_saved(tmp_path, monkeypatch):
    tokenizer = gpt2_tokenizer()
    assert (tokenizer.n_vocab, tokenizer.eot) == (50257, 50256)
    assert tokenizer.encode("hello world") == [31373, 995]  # from tiktoken's documentation
    tokenizer.save(tmp_path / "gpt2.json")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    loaded = Tokenizer.load(tmp_path / "gpt2.json")
    reference = tiktoken.get_encoding("gpt2")
    for text in [*TEXTS, "  leading\n\n\ttabs 🙂 ﬁ 1234567"]:
        assert loaded.encode(text) == reference.encode_ordinary(text)
        assert loaded.decode(loaded.encode(text)) == text
    np.testing.assert_array_equal(loaded.token_bytes(), tokenizer.token_bytes())


@pytest.mark.usefixtures("offline")
def test_gpt2_without_files_or_network_fails_quickly_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(ValueError, match="gpt2") as caught:
        gpt2_tokenizer()
    assert time.monotonic() - start < 1
    for part in ("6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "encoder.json", "vocab.bpe"):
        assert part in str(caught.value)
    for part in ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", str(tmp_path), "--tokenizer=bpe"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_gpt2_with_a_damaged_file_fails_as_without_it(gpt2_cache):
    with open(gpt2_cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "ab") as file:
        file.write(b" ")
    start = time.monotonic()
    with pytest.raises(ValueError, match="absent or damaged"):
        gpt2_tokenizer()
    assert time.monotonic() - start < 1


def test_an_empty_cache_variable_is_refused(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR is empty"):
        gpt2_tokenizer()


def test_symbols_have_one_id_each_and_their_text_comes_back():
    symbols = symbol_tokenizer("graph", ["n1", "n12", "end"])
    assert symbols.encode("n1 n12 end ") == [0, 1, 2]
    assert symbols.decode([2, 0]) == "end n1 "
    assert (symbols.eot, symbols.n_vocab) == (3, 4)


def test_an_unknown_symbol_is_named_with_its_place():
    symbols = symbol_tokenizer("graph", ["n1", "n12"])
    with pytest.raises(ValueError, match="symbol 'n2 ' at position 3 is not among the 2 symbols"):
        symbols.encode("n1 n2 ")


@pytest.mark.parametrize("symbols", [["a", "a"], ["a b"], [""]])
def test_symbols_that_cannot_be_told_apart_are_refused(symbols):
    with pytest.raises(ValueError, match="must differ and hold no white space"):
        symbol_tokenizer("bad", symbols)
