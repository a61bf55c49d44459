"""Test that an exported tokenizer gives our ids and our text in Hugging Face's libraries."""

import shutil
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.tokenizer import END_OF_TEXT, byte_tokenizer, char_tokenizer, gpt2_tokenizer, train_bpe
from data.tokenizer import Tokenizer as OurTokenizer
from eval.hf import _tokenizer_json, export_hf
from tests.data.conftest import GPT2_CACHE
from tests.eval.test_hf import gpt

TEXT = "the cat sat on the mat; the other cat sat on the first cat, 1234 times.\n" * 4


@pytest.fixture(scope="module", params=["byte", "bpe", "gpt2"])
def both(request, tmp_path_factory):
    """Return one of our tokenizers and the AutoTokenizer loaded from its export."""
    folder = tmp_path_factory.mktemp(request.param)
    make = {"byte": byte_tokenizer, "bpe": lambda: train_bpe([TEXT], 280)}
    ours = gpt2(folder) if request.param == "gpt2" else make[request.param]()
    export_hf(gpt(vocab_size=ours.n_vocab), ours, folder / "out")
    return ours, transformers.AutoTokenizer.from_pretrained(folder / "out")


def gpt2(folder):
    if not GPT2_CACHE.is_dir():
        pytest.skip(f"GPT-2's BPE files are not at {GPT2_CACHE}")
    shutil.copytree(GPT2_CACHE, folder / "tiktoken")  # tiktoken deletes damaged files
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "tiktoken"))
        return gpt2_tokenizer()


PIECES = st.sampled_from(["the cat", " sat", "  ", "\n\n", "\r\n", "'ll", "123", END_OF_TEXT])
ANY_TEXT = st.lists(st.text() | PIECES | st.text("ab \n")).map("".join)


@settings(max_examples=200)
@given(text=ANY_TEXT)
def test_the_exported_tokenizer_gives_our_ids_and_our_text(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text


def test_the_exported_tokenizer_knows_the_end_of_text(both):
    ours, theirs = both
    assert len(theirs) == ours.n_vocab
    assert theirs.eos_token == END_OF_TEXT
    assert theirs.eos_token_id == ours.eot
    assert theirs.decode([ours.eot], skip_special_tokens=True) == ""


@settings(max_examples=50)
@given(text=st.text("ab", max_size=80), corpus=st.text("ab", min_size=60, max_size=60))
def test_merges_of_the_same_letters_happen_in_the_same_order(text, corpus):
    ours = train_bpe([corpus * 3], 257 + 4)
    theirs = Tokenizer.from_str(_tokenizer_json(ours))
    assert theirs.encode(text).ids == ours.encode(text)


def test_a_token_that_no_merge_makes_is_found_whole():
    ranks = {bytes([value]): value for value in range(256)} | {b"abc": 256}
    ours = OurTokenizer("whole", r"\w+|\W+", ranks)
    assert ours.encode("abc abcd") == [256, *b" abcd"]
    assert Tokenizer.from_str(_tokenizer_json(ours)).encode("abc abcd").ids == [256, *b" abcd"]


def test_a_character_vocabulary_is_exported_too(tmp_path):
    ours = char_tokenizer("hello world")
    export_hf(gpt(vocab_size=ours.n_vocab), ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("hold")["input_ids"] == ours.encode("hold")


@pytest.fixture(scope="module")
def back(both):
    """Load the export with our reader of Hugging Face's format."""
    return OurTokenizer.load(Path(both[1].name_or_path) / "tokenizer.json")


@settings(max_examples=50)
@given(text=ANY_TEXT)
def test_an_exported_tokenizer_comes_back(both, back, text):
    assert back.encode(text) == both[0].encode(text)


def test_a_tokenizer_of_hugging_face_is_exported_unchanged(both, back, tmp_path):
    export_hf(gpt(vocab_size=back.n_vocab), back, tmp_path)
    path = Path(both[1].name_or_path) / "tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_bytes() == path.read_bytes()
