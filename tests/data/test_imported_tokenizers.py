"""Tokenizers that the library `tokenizers` saved encode as that library does, or are refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data.files import sha256_of
from data.imported_tokenizers import named_tokenizer
from data.shards import DataError
from data.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = ["the cat sat on the mat; the dog didn't.\n" * 3, "naïve  text", "12345"]


def library_tokenizer(special=(END_OF_TEXT, "<pad>"), **settings):
    """Train a byte-level BPE of 300 ids, the special tokens first."""
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    for name, value in settings.items():
        setattr(library, name, value)
    return library


def save(library, path, **model):
    content = json.loads(library.to_str())
    content["model"] |= model
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def library():
    return library_tokenizer()


@pytest.fixture(scope="module")
def loaded(library, tmp_path_factory):
    return Tokenizer.load(save(library, tmp_path_factory.mktemp("hf") / "tokenizer.json"))


@given(text=st.text() | st.text("the catsodm n'\n 12"))
def test_ids_equal_those_of_the_library_and_decode_to_the_same_text(library, loaded, text):
    ids = loaded.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert loaded.decode(ids) == text
    assert loaded.token_bytes()[ids].sum() == len(text.encode())
    assert loaded.encode_array(text).tolist() == ids


def test_special_tokens_in_a_text_are_ordinary_text(library, loaded):
    assert (loaded.eot, loaded.n_vocab) == (0, library.get_vocab_size())
    for token, i in ((END_OF_TEXT, 0), ("<pad>", 1)):
        assert i not in loaded.encode(token)
        assert loaded.decode(loaded.encode(token)) == token == loaded.decode([i])
        assert loaded.token_bytes()[i] == 0


def test_without_a_token_for_it_end_of_text_is_a_new_id(tmp_path):
    library = library_tokenizer(special=())
    tokenizer = Tokenizer.load(save(library, tmp_path / "t.json"))
    assert tokenizer.eot == library.get_vocab_size() == tokenizer.n_vocab - 1
    assert tokenizer.decode([tokenizer.eot]) == END_OF_TEXT


def test_a_saved_copy_is_the_same_tokenizer(loaded, tmp_path):
    loaded.save(tmp_path / "copy.json")
    copy = named_tokenizer(str(tmp_path / "copy.json"))
    assert copy.sha256 == loaded.sha256 == sha256_of(tmp_path / "copy.json")
    assert (copy.name, copy.encode("the cat")) == (loaded.name, loaded.encode("the cat"))


@pytest.mark.parametrize(
    "settings",
    [
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    ],
)
def test_a_tokenizer_that_changes_the_text_is_refused_at_the_first_change(tmp_path, settings):
    tokenizer = Tokenizer.load(save(library_tokenizer(**settings), tmp_path / "t.json"))
    with pytest.raises(ValueError, match=r"decode to another one: .* at position 0 became"):
        tokenizer.encode("The cat")


def test_truncation_and_padding_are_switched_off(tmp_path):
    library = library_tokenizer()
    library.enable_truncation(2)
    library.enable_padding(length=9)
    tokenizer = Tokenizer.load(save(library, tmp_path / "t.json"))
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"dropout": 0.1}, "model.dropout"),
        ({"type": "Unigram"}, "model.type"),
        ({"vocab": {"a": 9, "▁b": 7}, "merges": []}, "not one of a byte-level BPE"),
        ({"vocab": {"a": 1}, "merges": []}, "two tokens have the same id"),
        ({"vocab": {"a": 9, "b": 65536}, "merges": []}, "ids from 0 to 65536; .*uint16"),
        ({"vocab": {"a": 9, "b": -1}, "merges": []}, "ids from -1"),
        ({"vocab": {"a": 9}, "merges": [["a", "c"]]}, "tokenizers cannot read it"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(tmp_path, model, problem):
    path = save(library_tokenizer(), tmp_path / "tokenizer.json", **model)
    with pytest.raises(DataError, match=rf"tokenizer\.json: .*{problem}"):
        Tokenizer.load(path)


def test_a_folder_is_refused_with_the_file_to_name_or_the_way_to_get_it(tmp_path):
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match=r"tokenizer\.json.*save_pretrained"):
            named_tokenizer(str(name))
    save(library_tokenizer(), tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"is a folder; use .*tokenizer\.json$"):
        named_tokenizer(str(tmp_path))
