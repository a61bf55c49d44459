"""Grade a fine-tuned model by the answers that it generates to questions.

    python -m studies.finetune.grade FOLDER --data test.jsonl --samples 8 --temperature 0.7

It prints as JSON: `loss`, per token of the true answers after the tokens before them; `greedy`, the
share of questions whose greedy answer is right; with --samples, `sampled`, the same for samples,
and `pass@k`, the probability that one of k samples is right. An answer is right if its final answer
is that of the data: the text after "####", or the whole text without it.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from eval.command import DEVICES, at_least, command_parser, pick_device, reported_errors
from studies.finetune.models import context_length, load
from studies.finetune.questions import (
    Example,
    Question,
    answer_loss,
    batch_of,
    encode,
    final_answer,
    pad,
    padding_id,
    read_questions,
)


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """Estimate the probability that one of k samples is right, from n >= k samples.

    It is the unbiased estimate of Chen et al. (2021): the share of the subsets of k samples in
    which one is right.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: must be between 1 and the number of samples, {n}")
    return 1 - math.comb(n - n_right, k) / math.comb(n, k)


@torch.no_grad()
def loss_per_token(model: Any, examples: Sequence[Example], pad_id: int, batch_size: int) -> float:
    """Return the teacher-forced loss per token of the answers."""
    total = sum(
        float(answer_loss(model, batch_of(chosen, pad_id).to(model.device)))
        for chosen in _chunks(examples, batch_size)
    )
    return total / sum(len(each.answer) for each in examples)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    samples: int = 1,
    temperature: float | None = None,
) -> list[list[str]]:
    """Return texts that the model generates after each prompt, `samples` of them.

    Args:
        examples: only their prompts are used. The longest one must leave a position of the context.
        max_new_tokens: shortened for all prompts alike if the longest one leaves fewer positions.
        batch_size: sequences that are generated together.
        temperature: of samples, from the whole vocabulary. None generates greedily.
    """
    if context := context_length(model):
        longest = max(len(each.prompt) for each in examples)
        max_new_tokens = min(max_new_tokens, context - longest)
    pad_id = padding_id(tokenizer)
    how: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        **{"num_beams": 1, "repetition_penalty": 1.0, **how},
        **{"max_new_tokens": max_new_tokens, "num_return_sequences": samples},
        **{"pad_token_id": pad_id, "eos_token_id": tokenizer.eos_token_id},
    )
    texts: list[str] = []
    for chosen in _chunks(examples, max(1, batch_size // samples)):
        prompts = [each.prompt for each in chosen]
        ids = pad(prompts, pad_id, "left")  # (B, T), so that every answer begins at T
        mask = pad([[1] * len(prompt) for prompt in prompts], 0, "left")
        ids, mask = ids.to(model.device), mask.to(model.device)
        output = model.generate(ids, attention_mask=mask, generation_config=config)
        answers = output[:, ids.shape[1] :]  # (B * samples, new tokens)
        texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def grade(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    samples: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Return the grades of a model in eval mode that the module's text explains.

    The samples depend on the seed and on `batch_size`. pass@k has k = 1, 2, 4, ... up to `samples`.
    """
    examples = encode(questions, tokenizer, context_length(model))
    right = [final_answer(each.answer) for each in questions]
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}

    def n_right(**how: Any) -> list[int]:
        """Return how many answers to each question are right."""
        texts = generate(model, tokenizer, examples, **sizes, **how)
        return [
            sum(final_answer(text) == answer for text in own)
            for own, answer in zip(texts, right, strict=True)
        ]

    grades = {"loss": loss_per_token(model, examples, padding_id(tokenizer), batch_size)}
    grades["greedy"] = sum(n_right()) / len(questions)
    if samples:
        torch.manual_seed(seed)
        counts = n_right(samples=samples, temperature=temperature)
        grades["sampled"] = sum(counts) / (samples * len(questions))
        for k in (2**i for i in range(samples.bit_length())):
            grades[f"pass@{k}"] = sum(pass_at_k(samples, c, k) for c in counts) / len(counts)
    return grades


def _chunks(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("studies.finetune.grade", __doc__)
    add = parser.add_argument
    add("model", type=Path, help="folder of a Hugging Face model, or of its adapters")
    add("--data", type=Path, required=True, help="JSON lines")
    add("--question_key", default="question")
    add("--answer_key", default="answer")
    add("--samples", type=int, default=0, help="samples of an answer to each question")
    add("--temperature", type=float, default=1.0, help="of the samples")
    add("--max_new_tokens", type=int, default=256, help="of an answer")
    add("--batch_size", type=int, default=64, help="sequences that are generated together")
    add("--seed", type=int, default=0, help="of the samples")
    add("--device", choices=DEVICES, default="auto")
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        print(json.dumps(run(**vars(arguments)), indent=1))


def run(
    model: Path, data: Path, question_key: str, answer_key: str, device: str, **how: Any
) -> dict[str, float]:
    """Grade the model in a folder as the command line says."""
    at_least(0, samples=how["samples"], seed=how["seed"])
    at_least(1, max_new_tokens=how["max_new_tokens"], batch_size=how["batch_size"])
    if not how["temperature"] > 0:
        raise ValueError(f"--temperature={how['temperature']}: must be positive")
    questions = read_questions(data, question_key, answer_key)
    loaded, tokenizer = load(model, with_adapters=True)
    return grade(loaded.to(pick_device(device)), tokenizer, questions, **how)


if __name__ == "__main__":
    main(sys.argv[1:])
