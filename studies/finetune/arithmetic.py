"""Write arithmetic questions with worked answers, and an easier text for pretraining.

    python -m studies.finetune.arithmetic --out FOLDER --seed 0

FOLDER/pretrain.jsonl has single steps and expressions of two terms. train.jsonl and test.jsonl have
expressions of three terms, without a common question:

    {"question": "7+5*3-4", "answer": "5*3=15\\n7+15=22\\n22-4=18\\n#### 18"}
"""

import json
import random
import sys
from pathlib import Path

from data.files import write_atomic
from eval.command import command_parser, output_folder, reported_errors
from studies.finetune.questions import MARK, Question

LARGEST = 30  # of all operands and results; none is negative
N_TERMS = 3  # of a question; half of the terms are products
N_PRETRAIN, N_TRAIN, N_TEST = 20_000, 1024, 256


def single_step(draw: random.Random) -> Question:
    """Return a question of one step whose operands and result are in range."""
    while True:
        sign = draw.choice("+-*")
        a, b = draw.randint(1, LARGEST), draw.randint(1, LARGEST)
        if sign == "*":
            a, b = draw.randint(1, 9), draw.randint(1, 9)
        if 0 <= (value := _apply(a, sign, b)) <= LARGEST:
            return Question(f"{a}{sign}{b}", f"{a}{sign}{b}={value}\n{MARK} {value}")


def several_steps(draw: random.Random, n_terms: int) -> Question:
    """Return a sum of digits and products of digits; its answer does the products first."""
    while True:
        terms = [_term(draw) for _ in range(n_terms)]
        signs = [draw.choice("+-") for _ in terms[1:]]
        question = "".join(f"{term}{sign}" for term, sign in zip(terms, [*signs, ""], strict=True))
        values = [_value(term) for term in terms]
        steps = [f"{term}={_value(term)}" for term in terms if "*" in term]
        total, totals = values[0], [values[0]]
        for sign, value in zip(signs, values[1:], strict=True):
            before, total = total, _apply(total, sign, value)
            steps.append(f"{before}{sign}{value}={total}")
            totals.append(total)
        if 0 <= min(totals) and max(totals) <= LARGEST:
            return Question(question, "\n".join([*steps, f"{MARK} {total}"]))


def _term(draw: random.Random) -> str:
    factors = draw.sample(range(2, 10), draw.choice((1, 2)))
    return "*".join(map(str, factors))


def _value(term: str) -> int:
    a, _, b = term.partition("*")
    return int(a) * int(b or 1)


def _apply(a: int, sign: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def train_and_test(seed: int, n_train: int, n_test: int) -> tuple[list[Question], list[Question]]:
    """Return two lists of questions of several steps, no two of which are the same."""
    draw = random.Random(f"questions {seed}")
    found: dict[str, Question] = {}
    while len(found) < n_train + n_test:
        question = several_steps(draw, N_TERMS)
        found[question.question] = question
    questions = list(found.values())
    return questions[:n_train], questions[n_train:]


def pretraining_texts(seed: int, n: int) -> list[str]:
    """Return n documents in the form of the questions, which may repeat.

    They have single steps and expressions of two terms, in turn.
    """
    draw, texts = random.Random(f"pretrain {seed}"), []
    for i in range(n):
        question, answer = several_steps(draw, 2) if i % 2 else single_step(draw)
        texts.append(f"{question}\n{answer}")
    return texts


def write_data(out: Path, seed: int) -> None:
    """Write the three files."""
    out.mkdir(parents=True, exist_ok=True)
    train, test = train_and_test(seed, N_TRAIN, N_TEST)
    rows = {
        "pretrain": [{"text": text} for text in pretraining_texts(seed, N_PRETRAIN)],
        "train": [each._asdict() for each in train],
        "test": [each._asdict() for each in test],
    }
    for name, own in rows.items():
        write_atomic(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in own))


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("studies.finetune.arithmetic", __doc__)
    parser.add_argument("--out", type=output_folder, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        write_data(arguments.out, arguments.seed)
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
