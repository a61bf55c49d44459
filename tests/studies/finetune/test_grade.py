"""Test the grades of models whose answers are known."""

import itertools
import json
import math

import pytest
import torch

from studies.finetune import grade as module
from studies.finetune.grade import generate, grade, pass_at_k
from studies.finetune.models import save
from studies.finetune.questions import Question, encode, final_answer
from studies.finetune.train import Settings, finetune
from tests.studies.finetune.tiny import QUESTIONS, examples, gpt2, llama, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
WRONG = Question("3*3", "3*3=9 #### 9")


@pytest.fixture(scope="module")
def trained():
    """A Llama that answers QUESTIONS by heart."""
    settings = Settings(2e-2, 60, batch_size=3)
    model, losses = finetune(llama(), examples(), settings, pad_id=1)
    assert losses[-1] < 0.05
    return model


@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (5, 3), (5, 5)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, k):
    for n_right in range(n + 1):
        samples = [i < n_right for i in range(n)]
        subsets = [any(chosen) for chosen in itertools.combinations(samples, k)]
        assert pass_at_k(n, n_right, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="k=5: must be between 1 and the number of samples, 4"):
        pass_at_k(4, 1, 5)


def test_the_final_answer_follows_the_mark_or_is_the_whole_text():
    assert final_answer("1+1=2\n#### 2 \n") == "2"
    assert final_answer(" 42\n") == "42"
    assert final_answer("#### 2 #### 3") == "2 #### 3"


def test_a_model_that_knows_the_answers_is_right_and_fails_on_others(trained):
    grades = grade(trained, tokenizer(), QUESTIONS, samples=4, temperature=0.1)
    assert grades.pop("loss") < 0.05
    assert grades == dict.fromkeys(("greedy", "sampled", "pass@1", "pass@2", "pass@4"), 1.0)
    assert grade(trained, tokenizer(), [*QUESTIONS, WRONG])["greedy"] == 0.75


def test_greedy_answers_do_not_depend_on_the_batch(trained):
    """Left padding is masked, and positions begin behind it."""
    texts = [
        generate(model, tokenizer(), examples(), max_new_tokens=12, batch_size=size)
        for model in (trained, gpt2())
        for size in (1, 3)
    ]
    assert texts[0] == texts[1] == [[each.answer] for each in QUESTIONS]
    assert texts[2] == texts[3]


def test_samples_have_the_probabilities_of_the_model():
    """The first token is drawn from the softmax of the logits, up to five standard errors."""
    model, n, temperature = llama(), 4000, 2.0
    (example,) = encode([Question("2", "3")], tokenizer())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.prompt])).logits[0, -1]
    p = (logits / temperature).softmax(-1)
    torch.manual_seed(0)
    how = {"samples": n, "temperature": temperature, "max_new_tokens": 1, "batch_size": n}
    (texts,) = generate(model, tokenizer(), [example], **how)
    for token in range(3, 20):
        share = texts.count(tokenizer().decode([token])) / n
        assert share == pytest.approx(float(p[token]), abs=5 * math.sqrt(float(p[token]) / n))


def test_the_loss_is_per_token_of_the_answers_and_sampling_follows_the_seed():
    model = llama()
    first, again, other = (
        grade(model, tokenizer(), QUESTIONS, samples=64, batch_size=2, seed=s) for s in (0, 0, 1)
    )
    assert first == again
    assert first["loss"] == other["loss"]
    total = sum(
        grade(model, tokenizer(), [each])["loss"] * len(example.answer)
        for each, example in zip(QUESTIONS, examples(), strict=True)
    )
    assert first["loss"] == pytest.approx(total / sum(len(x.answer) for x in examples()), rel=1e-5)


def test_the_command_prints_the_grades(trained, tmp_path, capsys):
    save(trained, tokenizer(), tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(each._asdict()) + "\n" for each in QUESTIONS))
    module.main([str(tmp_path / "model"), "--data", str(data), "--samples=2"])
    assert json.loads(capsys.readouterr().out)["greedy"] == 1
    for option, message in (
        ("--temperature=0", "--temperature=0.0: must be positive"),
        ("--batch_size=0", "--batch_size=0: must be at least 1"),
        (f"--data={tmp_path / 'none'}", "none: cannot be read"),
    ):
        with pytest.raises(SystemExit):
            module.main([str(tmp_path / "model"), "--data", str(data), option])
        assert message in capsys.readouterr().err
