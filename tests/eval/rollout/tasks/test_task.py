"""Test what all tasks share: random streams, documents, files and error messages."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.loader import val_batches
from eval.rollout.tasks import parse_task, task
from eval.rollout.tasks.chain import Chain
from eval.rollout.tasks.nav import Nav
from eval.rollout.tasks.pdfa import Pdfa
from eval.rollout.tasks.task import TaskError

TASKS = [
    Pdfa(horizon=10, n_documents=40),
    Nav(nodes=24, horizon=16, n_documents=40),
    Chain(n_documents=40),
]

every_task = pytest.mark.parametrize("given", TASKS, ids=lambda given: given.name)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "PREPARED", tmp_path / "task" / "prepared")
    return tmp_path / "task" / "prepared"


@every_task
def test_a_spec_names_every_knob_and_gives_the_task_back(given):
    assert parse_task(given.spec) == given
    assert parse_task(given.spec).spec == given.spec
    assert parse_task(f"task:{given.name}") == type(given)()


@every_task
def test_equal_specs_give_equal_documents(given):
    twin = parse_task(given.spec)
    assert twin.documents(50, "train").equal(given.documents(50, "train"))
    assert twin.uniforms(50, 3).equal(given.uniforms(50, 3))


@every_task
def test_streams_and_instances_differ(given):
    other = replace(given, instance=1)
    streams = [given.documents(50, seed) for seed in ("train", "val", 0, 1)]
    streams += [other.documents(50, "train")]
    for i, stream in enumerate(streams):
        assert not any(stream.equal(earlier) for earlier in streams[:i])


@every_task
def test_a_document_is_the_prompt_and_the_oracles_decisions_with_the_environments_answers(given):
    documents = given.documents(50, 0)
    assert documents.shape == (50, given.document_tokens) == (50, given.context_tokens + 1)
    environment, turn = given.environment(50, 0), 1 + given.answer_tokens
    assert documents[:, : given.prompt_tokens].equal(environment.prompts)
    turns = documents[:, given.prompt_tokens :].split(turn, dim=1)
    assert len(turns) == given.horizon
    for token, answer in ((each[:, 0], each[:, 1:]) for each in turns):
        q = environment.oracle()
        assert q.sum(1).numpy() == pytest.approx(1, abs=1e-12)
        assert (q.gather(1, token[:, None]) > 0).all()
        assert environment.step(token)[:, : answer.size(1)].equal(
            answer
        )  # no answer follows the last decision


@every_task
def test_a_law_covers_the_vocabulary(given):
    V = len(given.symbols()) + 1
    assert given.environment(5, 0).oracle().shape == (5, V)
    assert given.environment(5, 0).oracle().dtype == torch.float64
    assert all(0 <= i < V for i in given.unscored())


@every_task
def test_opening_writes_the_documents_once(given, prepared):
    dataset = given.open()
    rows = np.concatenate([shard.tokens() for shard in dataset.split("train").shards])
    assert (rows.reshape(40, -1) == given.documents(40, "train").numpy()).all()
    assert dataset.split("val").n_tokens == given.n_validation * given.document_tokens
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.bin")}
    assert given.open().dir == dataset.dir
    assert before == {path: path.stat().st_mtime_ns for path in prepared.rglob("*.bin")}
    assert len(before) == 2


def test_a_raised_documents_version_prepares_new_documents(prepared, monkeypatch):
    given = Pdfa(horizon=10, n_documents=40)
    before = given.open().dir
    monkeypatch.setattr(Pdfa, "documents_version", Pdfa.documents_version + 1)
    assert given.open().dir != before


@every_task
def test_the_loss_counts_the_decisions_and_neither_prompt_nor_answers(given, prepared):
    batches = val_batches(given.open(), block_size=given.context_tokens, batch_size=100)
    documents = given.documents(given.n_validation, "val")
    x, y = batches[0]
    assert x.equal(documents[:100, :-1])
    expected = documents[:100, 1:].clone()
    expected[:, : given.prompt_tokens - 1] = -1
    for i in given.unscored():
        assert (expected == i).any()
        expected[expected == i] = -1
    assert y.equal(expected)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("pdfa,states=1,alphabet=2,horizon=0", ["states=1", "alphabet=2", "horizon=0"]),
        ("pdfa,states=1024,alphabet=3", ["states=1024", "alphabet=3", "larger alphabet"]),
        ("nav,nodes=3,n_documents=0", ["nodes=3", "16 to 1024", "degree=4", "n_documents=0"]),
        ("nav,nodes=32,degree=32", ["degree=32", "2 to 31"]),
        ("nav,horizon=5", ["horizon=5", "up to 6 moves", "use horizon=6"]),
        ("chain,modulus=2,horizon=-1", ["modulus=2", "3 to 4096", "horizon=-1"]),
        ("pdfa,state=3", ["'state'", "did you mean 'states'", "alphabet"]),
        ("nav,nodes=many", ["nodes='many'", "int"]),
        ("nav,nodes=32,nodes=64", ["nodes is given more than once"]),
        ("navi", ["'navi'", "did you mean 'nav'", "chain"]),
        ("task:lds,states=9", ["has no tokens", "python -m studies.sweep.compare --task lds"]),
    ],
)
def test_a_wrong_spec_is_one_error_with_all_facts(spec, said):
    with pytest.raises(TaskError) as caught:
        parse_task(spec)
    for fact in said:
        assert re.search(re.escape(fact), str(caught.value)), f"{fact!r} is not in {caught.value}"
