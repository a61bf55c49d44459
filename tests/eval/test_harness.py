"""Test the adapter to lm-evaluation-harness: local files, the command, and runs end to end."""

import json
import math
import warnings

import pytest
import torch

from data.tokenizer import byte_tokenizer, train_bpe
from eval import harness as adapter
from eval.harness import LOCAL, harness_model, local_files, main, read_rows
from eval.hf import export_hf
from eval.run import Run
from model import GPT, GPTConfig

ENDINGS = ["is on the mat.", "sat [title] the cat.", "on the first cat.", "the other"]
ROOF = {"ind": 24, "activity_label": "Roof", "ctx_a": "A man is on a roof.", "ctx_b": "he"}
ROOF |= {"ctx": "A man is on a roof. he", "split": "val", "split_type": "indomain"}
ROOF |= {"endings": ENDINGS, "source_id": "activitynet~v_1"}
STORIES = ["the cat sat on the mat", "the other cat sat", "the first cat sat on the other cat"]


TEXT = "the cat sat on the mat; the other cat sat on the first cat.\n" * 4
PAIRS = [
    ("the cat", " sat"),
    ("the cat sat on", " the mat; the other"),
    ("", "the"),
    ("ends with spaces  ", "cat"),
    ("the other cat sat on the first cat " * 4, " sat"),  # longer than the context
]


def run_of(folder, tokenizer, block_size=32):
    """Return a tiny model whose logits are far from uniform, so that a wrong position shows."""
    torch.manual_seed(0)
    shape = {"block_size": block_size, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return Run(folder, 12, model.eval(), tokenizer, {}, {})


@torch.no_grad()
def direct(model, ids, n):
    """Compute log p of the last n ids and whether each is the likeliest, one token at a time."""
    total, greedy = 0.0, True
    for end in range(len(ids) - n, len(ids)):
        context = ids[:end][-model.config.block_size :]
        logits = model(torch.tensor([context]))[0][0, -1].double()
        total += logits.log_softmax(-1)[ids[end]].item()
        greedy &= logits.argmax().item() == ids[end]
    return total, greedy


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


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*lambada_test.jsonl"):
        local_files(["lambada_openai"], tmp_path)
    with pytest.raises(ValueError, match=r"--data supports .*, but not piqa"):
        local_files(["piqa"], tmp_path)


BAD_ROWS = {
    "lambada_openai": [{"words": "a b"}, {"text": ""}, {"text": " one "}, {"text": 3}, "a b"],
    "hellaswag": [
        *({"label": label} for label in (4, -1, True, 1.0, "4", "", None)),
        *({"endings": ends} for ends in (ENDINGS[:3], [*ENDINGS[:3], 3], [*ENDINGS[:3], " "])),
        {"ctx_a": None},
    ],
}
CASES = [(task, row) for task, rows in BAD_ROWS.items() for row in rows]


@pytest.mark.parametrize(("task", "row"), CASES, ids=map(str, range(len(CASES))))
def test_a_bad_row_is_named_by_its_line(tmp_path, task, row):
    good = {"lambada_openai": {"text": "a b"}, "hellaswag": ROOF | {"label": 0}}[task]
    bad = good | row if task == "hellaswag" else row
    write(tmp_path, "rows.jsonl", [good, bad])
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: "):
        read_rows(tmp_path / "rows.jsonl", LOCAL[task])


def test_a_key_that_occurs_twice_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a b"}\n\n{"text": "a b", "text": "c d"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: .*twice"):
        read_rows(path, LOCAL["lambada_openai"])
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_rows(path, LOCAL["lambada_openai"])


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


@pytest.mark.parametrize("offline", ["", "0"])
def test_without_a_network_and_data_it_fails_at_once(monkeypatch, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)  # neither value forbids connections
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


def evaluate(run, tasks, **limits):
    return adapter.evaluate(run, tasks, data=run.path, **limits)


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


@pytest.fixture(params=["byte", "bpe"])
def exported(request, harness, tmp_path):
    """Return a run and its model as the harness loads it."""
    tokenizer = byte_tokenizer() if request.param == "byte" else train_bpe([TEXT], 277)
    run = run_of(tmp_path, tokenizer)
    export_hf(run.model, tokenizer, tmp_path / "hf")
    return run, harness_model(tmp_path / "hf", "cpu", 3)


def test_likelihoods_are_those_of_our_model(exported):
    run, model = exported
    scores = model.loglikelihood(instances("loglikelihood", PAIRS))
    encode = run.tokenizer.encode
    for (context, continuation), (value, greedy) in zip(PAIRS, scores, strict=True):
        whole = encode(context + continuation) if context else [256, *encode(continuation)]
        n = len(whole) - (len(encode(context.rstrip())) or 1)
        if not context:
            whole[0] = run.tokenizer.eot
        expected = direct(run.model, whole[-33:], n)
        assert value == pytest.approx(expected[0], abs=1e-4)  # float32 sums of order 10
        assert greedy == expected[1]
    assert model.n_truncated == 1


@pytest.mark.parametrize("length", [1, 32, 33, 77])
def test_a_rolling_likelihood_predicts_every_token_once(exported, length):
    run, model = exported
    text = TEXT[:length]
    ids, T, total = [run.tokenizer.eot, *run.tokenizer.encode(text)], 32, 0.0
    for start in range(1, len(ids), T):
        end = min(start + T, len(ids))
        total += direct(run.model, ids[max(0, end - T - 1) : end], end - start)[0]
    found = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    assert found[0] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("length", [0, 33])
def test_a_continuation_that_cannot_be_scored_is_an_error(exported, length):
    _, model = exported
    request = [((" ", "x"), [1], [2] * length)]
    with pytest.raises(ValueError, match=f"has {length} tokens"):
        model._loglikelihood_tokens(request)


@pytest.mark.parametrize("as_label", [int, str])  # as in the authors' file and as on the hub
def test_hellaswag_from_a_file_has_the_accuracy_computed_by_hand(harness, tmp_path, as_label):
    run = run_of(tmp_path, byte_tokenizer(), block_size=64)
    endings = [" is on the mat.", " sat.  the cat.", " on the first cat.", " the other"]
    context = [*b"Roof: A man is on a roof. He"]  # as the harness formats it
    values = [direct(run.model, [*context, *end.encode()], len(end))[0] for end in endings]
    labels = [0, 1, 2, 3, 0]
    write(tmp_path, "hellaswag_val.jsonl", [ROOF | {"label": as_label(i)} for i in labels])
    found = evaluate(run, ["hellaswag"])["results"]["hellaswag"]
    assert found["n"] == 5
    assert found["acc"] == labels.count(values.index(max(values))) / 5
    means = [value / (len(end) - 1) for value, end in zip(values, endings, strict=True)]
    assert found["acc_norm"] == labels.count(means.index(max(means))) / 5


def test_lambada_from_a_file_has_the_numbers_computed_by_hand(harness, tmp_path):
    run = run_of(tmp_path, byte_tokenizer(), block_size=64)
    memorise(run.model, STORIES[0])
    write(tmp_path, "lambada_test.jsonl", [{"text": text} for text in STORIES])
    lengths = [len(text) - text.rindex(" ") for text in STORIES]  # the last word with its space
    scores = [direct(run.model, [*t.encode()], n) for t, n in zip(STORIES, lengths, strict=True)]
    found = evaluate(run, ["lambada_openai"])["results"]["lambada_openai"]
    mean = sum(value for value, _ in scores) / 3
    assert found["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)  # float32 logits
    right = [greedy for _, greedy in scores]
    assert right[0]
    assert not all(right)
    assert found["acc"] == sum(right) / 3


def test_the_record_says_what_was_read_and_how_much(harness, tmp_path):
    write(tmp_path, "lambada_test.jsonl", [{"text": text} for text in STORIES])
    run = run_of(tmp_path, byte_tokenizer(), block_size=16)
    record = evaluate(run, ["lambada_openai"], limit=2)
    assert record["results"]["lambada_openai"]["n"] == record["limit"] == 2
    assert record["n_truncated"] == 1  # of 22 and 17 bytes; block_size + 1 = 17 fit
    assert record["data"].keys() == {"lambada_test.jsonl"}
