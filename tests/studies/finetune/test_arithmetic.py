"""Test that the questions are right, distinct and a function of the seed."""

import pytest

from studies.finetune import arithmetic
from studies.finetune.arithmetic import LARGEST, pretraining_texts, train_and_test
from studies.finetune.questions import final_answer, read_questions


def test_every_step_of_every_answer_is_right():
    train, test = train_and_test(0, 200, 100)
    for question, answer in train + test:
        *steps, _ = answer.split("\n")
        for step in steps:
            left, _, right = step.partition("=")
            assert eval(left) == int(right)  # Python's precedence is that of arithmetic
            assert 0 <= int(right) <= LARGEST
        assert int(final_answer(answer)) == eval(question) == int(right)
        assert len(steps) == sum(question.count(sign) for sign in "+-*")


def test_the_questions_of_both_files_are_disjoint_and_follow_the_seed():
    train, test = train_and_test(1, 300, 200)
    assert len({each.question for each in train + test}) == 500
    assert (train, test) == train_and_test(1, 300, 200)
    assert train != train_and_test(2, 300, 200)[0]


def test_the_text_for_pretraining_has_single_steps_and_expressions_of_two_terms():
    texts = pretraining_texts(0, 300)
    for i, text in enumerate(texts):
        question, *steps, last = text.split("\n")
        assert last == f"#### {eval(question)}"
        assert len(steps) == sum(question.count(sign) for sign in "+-*")
        assert question.count("+") + question.count("-") == 1 or i % 2 == 0
    assert all(any(sign in text for text in texts) for sign in "+-*")
    assert texts == pretraining_texts(0, 300)


def test_the_command_writes_three_files(tmp_path, monkeypatch, capsys):
    sizes = {"N_PRETRAIN": 5, "N_TRAIN": 4, "N_TEST": 3}
    for name, size in sizes.items():
        monkeypatch.setattr(arithmetic, name, size)
    arithmetic.main(["--out", str(tmp_path / "data")])
    for name, size in sizes.items():
        path = tmp_path / "data" / f"{name.removeprefix('N_').lower()}.jsonl"
        assert len(path.read_text().splitlines()) == size
    (train, test) = train_and_test(0, 4, 3)
    assert read_questions(tmp_path / "data" / "train.jsonl") == train
    assert read_questions(tmp_path / "data" / "test.jsonl") == test
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        arithmetic.main(["--out", str(tmp_path / "file")])
    assert "is not a folder" in capsys.readouterr().err
