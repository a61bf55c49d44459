"""Read questions with answers, encode them as tokens, and pad them into batches."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, create_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.schema import OpenSchema, read_json_lines

MARK = "####"  # comes before the final answer, as in GSM8K
IGNORE = -100  # the label of a token that is not scored
Text = Annotated[str, Field(min_length=1)]


class Question(NamedTuple):
    question: str
    answer: str


class Example(NamedTuple):
    """The tokens of a question and of its answer, which ends with the end-of-text token."""

    prompt: list[int]
    answer: list[int]


class Batch(NamedTuple):
    """Examples of T tokens, padded on the right."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T), 0 for padding
    labels: Tensor  # (B, T), IGNORE for prompts and padding

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(each.to(device) for each in self))


def read_questions(
    path: Path, question_key: str = "question", answer_key: str = "answer"
) -> list[Question]:
    """Read a file with one JSON object per line. Other keys than these two are ignored.

    Raises:
        DataError: the file cannot be read, or a line lacks one of the texts.
        ValueError: the file has no lines.
    """
    row: Any = create_model(
        "Row",
        __base__=OpenSchema,
        question=(Text, Field(alias=question_key)),
        answer=(Text, Field(alias=answer_key)),
    )
    questions = [Question(each.question, each.answer) for _, each in read_json_lines(path, row)]
    if not questions:
        raise ValueError(f"{path}: has no questions; expected one JSON object per line")
    return questions


def final_answer(text: str) -> str:
    """Return the text after the first "####", or the whole text without it, stripped."""
    _, mark, tail = text.partition(MARK)
    return (tail if mark else text).strip()


def encode(
    questions: Sequence[Question], tokenizer: Any, max_tokens: int | None = None
) -> list[Example]:
    """Encode questions, each followed by a line break, and their answers separately.

    The prompt has the special tokens that the tokenizer puts before a text, such as Llama's first
    token. Its tokens are the same in training and in grading, whatever the answer.

    Args:
        max_tokens: the length of the model's context. None does not limit it.
    Raises:
        ValueError: the tokenizer has no end-of-text token, or an example exceeds the context.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token), which ends answers")
    examples = []
    for number, (question, answer) in enumerate(questions, start=1):
        prompt = tokenizer(f"{question}\n")["input_ids"]
        tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
        example = Example(prompt, [*tokens, tokenizer.eos_token_id])
        n = len(example.prompt) + len(example.answer)
        if max_tokens is not None and n > max_tokens:
            raise ValueError(
                f"question {number} has {n} tokens with its answer, but the model's context has "
                f"{max_tokens}; remove it"
            )
        examples.append(example)
    return examples


def padding_id(tokenizer: Any) -> int:
    """Return the id that fills up batches: end-of-text if the tokenizer has none for padding.

    It is masked in the attention and in the loss, so that it does not matter which one it is.
    """
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:  # (B, T)
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def batch_of(examples: Sequence[Example], pad_id: int) -> Batch:
    rows = [each.prompt + each.answer for each in examples]
    labels = [[IGNORE] * len(each.prompt) + each.answer for each in examples]
    mask = [[1] * len(row) for row in rows]
    return Batch(pad(rows, pad_id), pad(mask, 0), pad(labels, IGNORE))


def training_batches(
    examples: Sequence[Example], batch_size: int, steps: int, seed: int
) -> Iterator[list[Example]]:
    """Yield the examples of each step: a new random order in each epoch, without a remainder."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // len(examples))
    order = torch.cat([torch.randperm(len(examples), generator=generator) for _ in range(epochs)])
    for indices in order.split(batch_size)[:steps]:
        yield [examples[i] for i in indices.tolist()]


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Return the sum of the cross-entropy over the scored tokens.

    The logits that predict a prompt or padding have gradients of exactly zero. DoPr counts a token
    in Σ of a layer only where its output has a gradient, so padding never counts. A token of the
    prompt counts where the answer depends on that output through the attention: not in the last
    block's MLP, for example.
    """
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    predicted, target = logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
    return F.cross_entropy(predicted.float(), target, ignore_index=IGNORE, reduction="sum")
