"""Test that only the tokens of the answers are scored."""

import json

import pytest
import torch

from studies.finetune.questions import (
    Question,
    answer_loss,
    batch_of,
    encode,
    padding_id,
    read_questions,
    training_batches,
)
from tests.studies.finetune.tiny import LENGTH, MODELS, QUESTIONS, examples, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_equals_the_sum_over_the_answers_tokens(kind):
    model, total = MODELS[kind](), torch.zeros(())
    for prompt, answer in examples():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        for i, token in enumerate(answer):
            total = total - logits[len(prompt) + i - 1, token]
    found = answer_loss(model, batch_of(examples(), pad_id=1))
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(model, found), gradients(model, total), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_neither_padding_nor_the_other_examples_change_the_loss_or_its_gradient(kind):
    model = MODELS[kind]()
    together = gradients(model, answer_loss(model, batch_of(examples(), pad_id=7)))
    apart = [answer_loss(model, batch_of([each], pad_id=1)) for each in examples()]
    for a, b in zip(together, gradients(model, sum(apart)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_prompt_has_the_first_token_and_an_answer_has_the_last_token():
    (example,) = encode([Question("2", "3")], tokenizer())
    names = tokenizer().convert_ids_to_tokens(example.prompt + example.answer)
    assert (names, len(example.answer)) == (["<s>", "2", "\n", "3", "</s>"], 2)


def test_padding_is_end_of_text_unless_the_tokenizer_has_its_own():
    assert padding_id(tokenizer()) == tokenizer().eos_token_id == 1
    assert padding_id(tokenizer(pad_token="?")) == 2


def test_every_epoch_has_each_example_once_in_another_order_of_the_seed():
    items = [*range(10)]
    found = list(training_batches(items, 4, 5, seed=3))  # type: ignore[arg-type]
    assert [len(each) for each in found] == [4] * 5
    order = [item for chosen in found for item in chosen]
    assert sorted(order[:10]) == sorted(order[10:]) == items
    assert order[:10] != order[10:]
    assert found == list(training_batches(items, 4, 5, seed=3))  # type: ignore[arg-type]
    assert found != list(training_batches(items, 4, 5, seed=4))  # type: ignore[arg-type]


def test_keys_can_be_named_and_other_keys_are_ignored(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"problem": "2+3", "solution": "5", "level": 1}) + "\n\n")
    assert read_questions(path, "problem", "solution") == [Question("2+3", "5")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no questions"),
        ('{"question": "2+3"}\n', r"line 1: answer: Field required"),
        (
            '{"question": "2", "answer": "2"}\n{"question": 2, "answer": ""}',
            r"line 2: question: .*",
        ),
        ("2+3\n", "line 1: Invalid JSON"),
    ],
)
def test_a_damaged_file_is_refused_and_its_line_named(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(path)


def test_an_answer_that_is_too_long_and_a_tokenizer_without_an_end_are_refused():
    with pytest.raises(ValueError, match=r"question 2 has 35 tokens with its answer, but .* 32"):
        encode([QUESTIONS[0], Question("1", "9" * 31)], tokenizer(), LENGTH)
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode(QUESTIONS, endless)
