"""Test grading on text with models whose metrics are known."""

from dataclasses import astuple
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval.rollout.tasks.pystdlib
from data.dataset import Dataset
from data.meta import empty_split, write_meta
from data.shards import write_shard
from data.tokenizer import byte_tokenizer
from eval.rollout.intervals import bootstrap_weights
from eval.rollout.metrics import estimate
from eval.rollout.policy import GPTPredictor, Predictor
from eval.rollout.tasks.pystdlib import PyStdlib, TextTask, choose_texts, grade_text
from eval.rollout.tasks.task import TaskError
from model import GPT, GPTConfig

P, H, V, END = 16, 32, 257, 256
SHORT = b"x = 1\n"
DOCUMENTS = [
    b"# %d\ndef f%d(a):\n    return a + %d\n\n\nclass A%d:\n    '''%d'''\n    b = [\n" % ((i,) * 5)
    for i in range(10, 17)
]


def write_texts(folder, *shards):
    """Write a byte-level dataset with the given documents per shard, the same in both splits."""
    tokenizer, splits = byte_tokenizer(), {}
    tokenizer.save(folder / "tokenizer.json")
    ids = [np.array([id for text in part for id in (*text, END)], "uint16") for part in shards]
    for name in ("train", "val"):
        files = [write_shard(folder / f"{name}_{i:06d}.bin", [each]) for i, each in enumerate(ids)]
        splits[name] = empty_split() | {"tokens": sum(map(len, ids)), "files": files}
    write_meta(folder, {"name": "texts"}, tokenizer, splits)
    return Dataset(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("t"), [SHORT, *DOCUMENTS[:4]], DOCUMENTS[4:])


class Table(Predictor):
    """Predict the next token from the last one alone with a table (V, V) of logits."""

    def __init__(self, table):
        self.table = table.double().log_softmax(-1)

    def start(self, prompts, length=None):
        return self.read(prompts)

    def read(self, tokens):
        return self.table[tokens[:, -1]]


class Reader(Predictor):
    """Predict the documents exactly."""

    def start(self, prompts, length=None):
        starts = {text[:P]: text for text in DOCUMENTS}
        self.texts = [starts[bytes(prompt.tolist())] for prompt in prompts]
        self.place = 0
        return self.read(prompts)

    def read(self, tokens):
        self.place += tokens.shape[1]
        logits = torch.zeros(len(self.texts), V, dtype=torch.float64)
        for row, text in zip(logits, self.texts, strict=True):
            row[text[self.place]] = 60.0  # e^-60 remains for each other token
        return logits.log_softmax(-1)


RANDOM = Table(torch.randn(V, V, generator=torch.Generator().manual_seed(0)))


def says(other, then=()):
    """Build a table that predicts b after a for each (a, b) in `then`, and else `other`."""
    following = torch.full((V,), other)
    for token, answer in then:
        following[token] = answer
    return Table(40.0 * F.one_hot(following, V))  # e^-40 remains for each other token


def grade(predictor, texts, n=12, seed=0, **how):
    chosen = choose_texts(texts, P, H, n, seed)
    return grade_text(predictor, chosen, seed=seed, is_python=True, **how)


def test_a_model_that_knows_the_documents_does_as_they_do(texts):
    result = grade(Reader(), texts)
    for name in ("survival", "seq_rep_4", "distinct_2", "loop_rate", "zipf"):
        assert result.metrics[name] == result.metrics[f"data_{name}"]
    assert result.metrics["survival"].mean == 1
    assert abs(result.metrics["val_ce"].mean) < 1e-12  # V e^-60 and float64 rounding
    assert abs(result.metrics["entropy_drift"].mean) < 1e-12
    assert all(sample["own"] == sample["data"] for sample in result.samples)


def test_a_model_that_repeats_one_token_survives_but_is_a_loop(texts):
    metrics = grade(says(ord("x")), texts).means()
    assert metrics["survival"] == metrics["loop_rate"] == 1
    assert metrics["seq_rep_4"] == 1 - 1 / (H - 3)
    assert metrics["distinct_2"] == 1 / (H - 1)
    assert metrics["data_loop_rate"] == 0
    assert np.isnan(metrics["zipf"])


def test_a_model_that_closes_brackets_fails_at_the_end_of_its_first_line(texts):
    bracket, newline = b")\n"
    result = grade(says(bracket, [(bracket, newline)]), texts)
    assert result.curves["survival"].mean == [1.0] + [0.0] * (H - 1)
    assert result.curves["hazard"].mean == [0.0, 1.0] + [0.0] * (H - 2)
    assert result.metrics["data_survival"].mean == 1


def test_the_cross_entropy_of_a_gpt_is_that_of_its_logits(texts):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=V, block_size=P + H - 1, n_layer=1, n_head=2, n_embd=16))
    chosen = choose_texts(texts, P, H, 7, 0)
    result = grade(GPTPredictor(model.eval()), texts, n=7)
    with torch.no_grad():
        logits, _ = model(torch.cat([chosen.prompts, chosen.truth], dim=1)[:, :-1])
    loss = F.cross_entropy(logits[:, P - 1 :].flatten(0, 1), chosen.truth.flatten())
    assert result.metrics["val_ce"].mean == pytest.approx(loss.item(), rel=1e-5)  # float32


def test_the_cache_is_as_long_as_what_is_read(texts):
    config = GPTConfig(vocab_size=V, block_size=1024, n_layer=1, n_head=1, n_embd=4)
    predictor = GPTPredictor(GPT(config))
    grade(predictor, texts)
    assert {cache.kv.shape[-2] for cache in predictor._caches} == {P + H - 1}


def test_the_drift_is_late_entropy_minus_cross_entropy(texts):
    uniform, sure = (grade(each, texts).metrics for each in (Table(torch.zeros(V, V)), says(120)))
    assert abs(uniform["entropy_drift"].mean) < 1e-12  # both are ln V
    assert sure["entropy_drift"].mean == pytest.approx(-sure["val_ce"].mean)
    assert sure["abs_entropy_drift"].mean == pytest.approx(sure["val_ce"].mean)


def test_a_document_that_does_not_parse_shows_beside_the_survival(tmp_path):
    broken = b"x = [\n    1,\n    2,\n    a b\n]\n" + b"# and so on\n" * 3
    result = grade(says(ord("x")), write_texts(tmp_path, [broken, DOCUMENTS[0]]))
    lost = broken.index(b"b\n") + 2 - P
    assert result.curves["data_survival"].mean == [1.0] * (lost - 1) + [0.5] * (H - lost + 1)
    assert result.metrics["survival"].mean == 1


def test_prompts_are_the_beginnings_of_the_long_documents_of_all_shards(texts):
    chosen = choose_texts(texts, P, H, 100, 0)
    rows = torch.cat([chosen.prompts, chosen.truth], dim=1).tolist()
    assert sorted(map(bytes, rows)) == [text[: P + H] for text in DOCUMENTS]
    assert chosen.document.tolist() == [i % 7 for i in range(100)]


def test_documents_are_taken_once_while_there_are_enough(texts):
    few, others = (choose_texts(texts, P, H, 3, seed) for seed in (0, 1))
    assert few.document.tolist() == [0, 1, 2]
    assert len(few.prompts.unique(dim=0)) == 3
    assert not few.prompts.equal(others.prompts)


def test_a_grade_is_a_function_of_the_seed(texts):
    assert grade(RANDOM, texts) == grade(RANDOM, texts)
    chosen = choose_texts(texts, P, H, 12, 0)
    own = (grade_text(RANDOM, chosen, seed=seed, is_python=True).samples for seed in (0, 1))
    assert next(own) != next(own)


def test_the_same_document_is_continued_in_different_ways(tmp_path):
    result = grade(RANDOM, write_texts(tmp_path, DOCUMENTS[:1]))
    assert len({tuple(sample["own"]) for sample in result.samples}) == 4
    assert len({tuple(sample["data"]) for sample in result.samples}) == 1


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_nothing(texts, batch_size):
    assert grade(RANDOM, texts, batch_size=batch_size) == grade(RANDOM, texts)


def test_the_interval_is_a_bootstrap_over_documents_however_many_the_rollouts(texts):
    chosen = choose_texts(texts, P, H, 7, 0)
    before = torch.cat([chosen.prompts[:, -1:], chosen.truth[:, :-1]], dim=1)
    nll = -RANDOM.table[before, chosen.truth].mean(1).numpy()  # (D,)
    expected = estimate(bootstrap_weights(7) @ nll / 7, len(DOCUMENTS))
    for n in (7, 70):
        got = grade(RANDOM, texts, n=n).metrics["val_ce"]
        assert astuple(got) == pytest.approx(astuple(expected), rel=1e-12)  # float64


def test_every_interval_holds_its_number(texts):
    for each in grade(RANDOM, texts, n=30).metrics.values():
        assert each.lo <= each.mean <= each.hi


def test_a_text_ends_where_the_model_ends_it(texts):
    words = [200, 201, 202, 203, 204, END]
    result = grade(says(200, pairwise(words)), texts)
    assert result.metrics["ended"].mean == 1
    assert result.n_t == {"data": [12] * H, "own": [12] * 6 + [0] * (H - 6)}
    assert {tuple(s["own"]) for s in result.samples} == {tuple(words)}
    assert result.metrics["distinct_2"].mean == 1
    assert result.metrics["loop_rate"].mean == 0
    assert np.isnan(result.metrics["entropy_drift"].mean)  # no rollout reached the second half
    short = grade(says(200, [(200, END)]), texts)
    assert np.isnan(short.metrics["zipf"].mean)  # end-of-text does not count as a second token


def test_a_text_that_ended_keeps_its_state(texts):
    bracket, newline = b")\n"
    closes = says(bracket, [(bracket, newline), (newline, END)])
    assert grade(closes, texts).curves["survival"].mean == [1.0] + [0.0] * (H - 1)
    assert grade(says(END), texts).curves["survival"].mean == [1.0] * H


def test_pystdlib_is_ranked_by_survival(texts, monkeypatch):
    monkeypatch.setattr(
        eval.rollout.tasks.pystdlib, "open_dataset", {"pystdlib": texts}.__getitem__
    )
    task = PyStdlib(prompt_tokens=P, horizon=H)
    result = task.grade(RANDOM, n=12, seed=3)
    assert result == grade(RANDOM, texts, seed=3)
    assert result.metrics[task.primary].mean == result.curves["survival"].mean[-1]
    assert task.higher_is_better


def test_any_other_text_is_ranked_by_its_drift_and_need_not_parse(texts):
    task = TextTask(dataset=str(texts.dir), prompt_tokens=P, horizon=H)
    result = task.grade(RANDOM, n=12, seed=0)
    assert result.metrics[task.primary].mean >= 0
    assert not result.curves


def test_a_task_needs_all_but_the_last_token_as_context(texts):
    task = TextTask(dataset=str(texts.dir), prompt_tokens=P, horizon=H)
    n, config = task.context_tokens, {"vocab_size": V, "n_layer": 1, "n_head": 1, "n_embd": 4}
    enough, short = (GPTPredictor(GPT(GPTConfig(block_size=size, **config))) for size in (n, n - 1))
    task.grade(enough, n=2, seed=0)
    with pytest.raises(ValueError, match="block_size"):
        task.grade(short, n=2, seed=0)


def test_what_cannot_be_graded_is_refused(texts):
    with pytest.raises(TaskError, match="task pystdlib: prompt_tokens=0: must be at least 1"):
        PyStdlib(prompt_tokens=0)
    with pytest.raises(TaskError, match="no validation document has 1016 tokens; use a smaller"):
        choose_texts(texts, P, 1000, 1, 0)
