"""Test the adapter to lm-evaluation-harness: local files, the command, and runs end to end."""

import json
import math
import warnings

import pytest
import torch

from data.tokenizer import byte_tokenizer
from eval import harness as adapter
from eval.harness import local_files, main
from eval.run import Run
from tests.eval.test_scorer import PAIRS, direct, scorer

ENDINGS = ["is on the mat.", "sat [title] the cat.", "on the first cat.", "the other"]
ROOF = {"ind": 24, "activity_label": "Roof", "ctx_a": "A man is on a roof.", "ctx_b": "he"}
ROOF |= {"ctx": "A man is on a roof. he", "split": "val", "split_type": "indomain"}
ROOF |= {"endings": ENDINGS, "source_id": "activitynet~v_1"}
STORIES = ["the cat sat on the mat", "the other cat sat", "the first cat sat on the other cat"]


def memorise(model, text):
    """Train until greedy decoding yields the text."""
    ids = torch.tensor([[*text.encode()]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:].contiguous())[1].backward()
        optimizer.step()


# -- local files


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_bad_local_file_is_named_with_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*lambada_test.jsonl"):
        local_files(["lambada_openai"], tmp_path)
    write(tmp_path, "lambada_test.jsonl", [{"text": "a b"}, {"words": "a b"}])
    with pytest.raises(ValueError, match=r"lambada_test.jsonl:2: expected a JSON object with text"):
        local_files(["lambada_openai"], tmp_path)
    write(tmp_path, "hellaswag_val.jsonl", [ROOF | {"label": 4}])
    with pytest.raises(ValueError, match=r"hellaswag_val.jsonl:1: label=4"):
        local_files(["hellaswag"], tmp_path)
    with pytest.raises(ValueError, match=r"--data supports .*, but not piqa"):
        local_files(["piqa"], tmp_path)


# -- the command


@pytest.mark.parametrize(
    ("line", "message"),
    [(["--limit=0"], "--limit=0: must be at least 1"), ([], "no checkpoint at")],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path, line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "none"), *line])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_without_the_harness_the_remedy_is_named(monkeypatch):
    def missing(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(adapter.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"No module named 'lm_eval'.*pip install '\.\[eval\]'"):
        adapter.harness()


def test_without_a_network_and_data_it_fails_at_once(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(
        "HF_ENDPOINT", "http://127.0.0.1:9"
    )  # the discard port, where no server answers
    with pytest.raises(ValueError, match=r"127.0.0.1:9 does not answer: put hellaswag_val.jsonl"):
        adapter.hub_manager(["hellaswag"])


# -- the harness itself


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """Import the harness without its warnings and let it cache below tmp_path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra: eval)")
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setenv("DISABLE_MULTIPROC", "1")
        yield module


def evaluate(subject, folder, tasks, **limits):
    run = Run(folder, 12, subject.model, subject.tokenizer, {}, {})
    return adapter.evaluate(run, tasks, data=folder, **limits)


def test_pairs_are_cut_as_the_harness_cuts_them(harness):
    subject = scorer()
    from lm_eval.api.model import TemplateLM

    class Theirs:
        backend = "causal"
        tok_encode = staticmethod(subject.tokenizer.encode)

    for pair in PAIRS:
        if pair[0]:  # the harness handles an empty context elsewhere
            assert subject.encode_pair(*pair) == TemplateLM._encode_pair(Theirs(), *pair)


@pytest.mark.parametrize("as_label", [int, str])  # as in the authors' file and as on the hub
def test_hellaswag_from_a_file_has_the_accuracy_computed_by_hand(harness, tmp_path, as_label):
    subject = scorer(byte_tokenizer(), block_size=64)
    endings = [" is on the mat.", " sat.  the cat.", " on the first cat.", " the other"]
    context = [*b"Roof: A man is on a roof. He"]  # as the harness formats it
    values = [direct(subject, [*context, *end.encode()], len(end))[0] for end in endings]
    labels = [0, 1, 2, 3, 0]
    write(tmp_path, "hellaswag_val.jsonl", [ROOF | {"label": as_label(i)} for i in labels])
    found = evaluate(subject, tmp_path, ["hellaswag"])["results"]["hellaswag"]
    assert found["n"] == 5
    assert found["acc"] == labels.count(values.index(max(values))) / 5
    means = [value / (len(end) - 1) for value, end in zip(values, endings, strict=True)]
    assert found["acc_norm"] == labels.count(means.index(max(means))) / 5


def test_lambada_from_a_file_has_the_numbers_computed_by_hand(harness, tmp_path):
    subject = scorer(byte_tokenizer(), block_size=64)
    memorise(subject.model, STORIES[0])
    write(tmp_path, "lambada_test.jsonl", [{"text": text} for text in STORIES])
    lengths = [len(text) - text.rindex(" ") for text in STORIES]  # the last word with its space
    scores = [direct(subject, [*t.encode()], n) for t, n in zip(STORIES, lengths, strict=True)]
    found = evaluate(subject, tmp_path, ["lambada_openai"])["results"]["lambada_openai"]
    mean = sum(value for value, _ in scores) / 3
    assert found["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)  # float32 logits
    right = [greedy for _, greedy in scores]
    assert right[0]
    assert not all(right)
    assert found["acc"] == sum(right) / 3


def test_the_record_says_what_was_read_and_how_much(harness, tmp_path):
    write(tmp_path, "lambada_test.jsonl", [{"text": text} for text in STORIES])
    record = evaluate(
        scorer(byte_tokenizer(), block_size=16), tmp_path, ["lambada_openai"], limit=2
    )
    assert record["results"]["lambada_openai"]["n"] == record["limit"] == 2
    assert record["n_truncated"] == 1  # of 22 and 17 bytes; block_size + 1 = 17 fit
    assert record["data"].keys() == {"lambada_test.jsonl"}
