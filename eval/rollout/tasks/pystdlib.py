"""Grade continuations of real text without an oracle.

The model continues the beginnings of validation documents. On `pystdlib`, the sources of Python's
standard library, models are ranked by whether their text still parses (eval/rollout/viability.py);
on any other text they are ranked by how far the entropy drifts.

Metrics of the text are given for the model's rollouts (temperature 1, untruncated) and, with the
prefix data_, for the documents' own continuations: text in a docstring, for example, always parses.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from data.dataset import Dataset, open_dataset
from data.tokenizer import Tokenizer
from eval.rollout.environment import decide
from eval.rollout.intervals import bootstrap_weights
from eval.rollout.metrics import Grade, curve, entropy_drift, estimate, magnitude
from eval.rollout.policy import Predictor
from eval.rollout.repetition import distinct, ends_in_loop, seq_rep, zipf
from eval.rollout.tasks.task import Task, TaskError
from eval.rollout.viability import hazard, survivors


@dataclass(frozen=True, kw_only=True)
class Continue(Task):
    """Continue documents that have at least prompt_tokens + horizon tokens."""

    prompt_tokens: int = 32
    horizon: int = 64

    is_python: ClassVar[bool] = False
    grading_version: ClassVar[int] = 2

    def claims(self) -> dict[str, bool]:
        return self.at_least(prompt_tokens=1, horizon=1)

    @property
    def context_tokens(self) -> int:
        return self.prompt_tokens + self.horizon - 1  # the last token is never read

    def grade(self, predictor: Predictor, *, n: int, seed: int) -> Grade:
        """Grade n rollouts. If there are fewer documents than n, some are continued repeatedly."""
        texts = choose_texts(self.open(), self.prompt_tokens, self.horizon, n, seed)
        return grade_text(predictor, texts, seed=seed, is_python=self.is_python)


@dataclass(frozen=True, kw_only=True)
class TextTask(Continue):
    """Continue any prepared text dataset."""

    dataset: str  # a dataset's name or folder

    name: ClassVar[str] = "text"
    primary: ClassVar[str] = "abs_entropy_drift"

    def open(self) -> Dataset:
        return open_dataset(self.dataset)


@dataclass(frozen=True, kw_only=True)
class PyStdlib(Continue):
    """Continue the sources of Python's standard library."""

    name: ClassVar[str] = "pystdlib"
    primary: ClassVar[str] = "survival"
    higher_is_better: ClassVar[bool] = True
    is_python: ClassVar[bool] = True

    def open(self) -> Dataset:
        return open_dataset(self.name)


@dataclass(frozen=True)
class Texts:
    """The beginnings of D documents, and the document that each of n rollouts continues."""

    dataset: Dataset
    prompts: Tensor  # (D, P) int64
    truth: Tensor  # (D, H) int64, the documents' own continuations
    document: Tensor  # (n,) int64, index of each rollout's document


def choose_texts(dataset: Dataset, n_prompt: int, horizon: int, n: int, seed: int) -> Texts:
    """Choose validation documents in random order and repeat them if there are fewer than n.

    Raises:
        TaskError: no document has n_prompt + horizon tokens.
    """
    split, length = dataset.split("val"), n_prompt + horizon
    places = []  # (shard, first token) of each document that is long enough
    for number, shard in enumerate(split.shards):
        tokens = shard.tokens()
        ends = np.append(np.flatnonzero(tokens == dataset.tokenizer.eot), len(tokens))
        starts = np.append(0, ends[:-1] + 1)
        places += [(number, start) for start in starts[ends - starts >= length]]
    if not places:
        raise TaskError(
            f"{dataset.dir}: no validation document has {length} tokens; "
            "use a smaller prompt_tokens or horizon"
        )
    chosen = np.random.default_rng(seed).permutation(places)[:n]  # (D, 2)
    rows = torch.from_numpy(split.rows(chosen[:, 0], chosen[:, 1], length))
    return Texts(dataset, rows[:, :n_prompt], rows[:, n_prompt:], torch.arange(n) % len(rows))


@dataclass(frozen=True)
class Continuation:
    """H tokens after each of B prompts. After end-of-text, tokens are -1 and the others NaN."""

    tokens: Tensor  # (B, H) int64
    nll: Tensor  # (B, H) -log p_model(token), nats
    entropy: Tensor  # (B, H) entropy of the model's distribution, nats


def grade_text(
    predictor: Predictor, texts: Texts, *, seed: int, is_python: bool, batch_size: int = 256
) -> Grade:
    """Grade the model's continuations and the documents' own.

    Rollouts of one document are not independent, so the bootstrap resamples documents: n of every
    metric is their number. n_t counts rollouts.

    Args:
        is_python: whether to compute survival, the share of texts that still parse.
        batch_size: rows read at once; memory is one (batch_size, V) float64 tensor.
    """
    rows, end = texts.document, texts.dataset.tokenizer.eot
    generator, shape = torch.Generator().manual_seed(seed), (len(rows), texts.truth.shape[1])
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
    read = _continue(predictor, texts.prompts, texts.truth, end, batch_size)  # D rows
    data = Continuation(read.tokens[rows], read.nll[rows], read.entropy[rows])
    own = _continue(predictor, texts.prompts[rows], uniforms, end, batch_size)
    weights = bootstrap_weights(len(texts.prompts))[:, rows]  # (R, n)
    values = _metrics(weights, data, own, end)
    curves = _survival(weights, texts, own.tokens) if is_python else {}
    values |= {name: each[:, -1] for name, each in curves.items() if name != "hazard"}
    metrics = {name: estimate(each, len(texts.prompts)) for name, each in values.items()}
    return Grade(
        metrics=metrics | {"abs_entropy_drift": magnitude(metrics["entropy_drift"])},
        curves={name: curve(each) for name, each in curves.items()},
        n_t={"data": _count_graded(data), "own": _count_graded(own)},
        samples=_samples(texts, own.tokens),
    )


def _continue(
    predictor: Predictor, prompts: Tensor, choices: Tensor, end: int, batch_size: int
) -> Continuation:
    """Continue each prompt by H tokens.

    Args:
        choices: (B, H) the tokens (int64), or the uniform numbers to draw them with (float64).
    """
    batches = zip(prompts.split(batch_size), choices.split(batch_size), strict=True)
    parts = [_continue_batch(predictor, *batch, end) for batch in batches]
    return Continuation(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _continue_batch(
    predictor: Predictor, prompts: Tensor, choices: Tensor, end: int
) -> tuple[Tensor, ...]:  # tokens, nll, entropy: (B, H) each
    columns: list[tuple[Tensor, ...]] = []
    log_p = predictor.start(prompts, prompts.shape[1] + choices.shape[1] - 1)
    for choice in choices.unbind(1):
        if columns:
            log_p = predictor.read(columns[-1][0][:, None])  # (B, V)
        columns.append(decide(log_p, choice))  # (B,) each
    tokens, *graded = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    is_end = tokens == end
    ended = is_end.cumsum(1) > is_end  # whether end-of-text came before this token
    return tokens.masked_fill(ended, -1), *(each.masked_fill(ended, torch.nan) for each in graded)


def _metrics(
    weights: np.ndarray, data: Continuation, own: Continuation, end: int
) -> dict[str, np.ndarray]:  # (R,) each
    return {
        "val_ce": _mean(weights, data.nll.mean(1).numpy()),
        "entropy_drift": entropy_drift(weights, data.nll, own.entropy),
        "ended": _mean(weights, (own.tokens == end).any(1).numpy()),
        **_repetition(weights, own.tokens.masked_fill(own.tokens == end, -1).numpy(), ""),
        **_repetition(weights, data.tokens.numpy(), "data_"),
    }


def _repetition(weights: np.ndarray, ids: np.ndarray, prefix: str) -> dict[str, np.ndarray]:
    """Compute means over rollouts, and Zipf's coefficient of all rollouts together, (R,) each."""
    rows = {
        "seq_rep_4": seq_rep(ids, 4),
        "distinct_2": distinct(ids, 2),
        "loop_rate": ends_in_loop(ids, max(1, ids.shape[1] // 4)),
    }
    values = {name: _mean(weights, of_row) for name, of_row in rows.items()}
    seen, codes = np.unique(ids, return_inverse=True)
    counts = np.zeros((len(ids), len(seen)))
    np.add.at(counts, (np.arange(len(ids))[:, None], codes.reshape(ids.shape)), 1)
    parts = np.array_split(weights, 16)  # reduces the memory to a sixteenth of (R, V)
    slopes = np.concatenate([zipf(part @ counts[:, seen >= 0]) for part in parts])
    slopes[1:] += slopes[0] - slopes[1:].mean()  # correct for repeated documents in resamples
    values["zipf"] = slopes
    return {prefix + name: each for name, each in values.items()}


def _survival(weights: np.ndarray, texts: Texts, own: Tensor) -> dict[str, np.ndarray]:
    """Compute survival and hazard for l = 1..H, (R, H) each. Ended rollouts keep their state."""
    rows, tokenizer = texts.document, texts.dataset.tokenizer
    written = own.masked_fill(own == tokenizer.eot, -1)
    alive = {
        "survival": _alive_after(tokenizer, texts.prompts[rows], written),
        "data_survival": _alive_after(tokenizer, texts.prompts, texts.truth)[rows],
    }
    curves = {name: weights @ each / weights.sum(1)[:, None] for name, each in alive.items()}
    return curves | {"hazard": hazard(curves["survival"])}


def _alive_after(
    tokenizer: Tokenizer, prompts: Tensor, tokens: Tensor
) -> np.ndarray:  # (B, H) bool
    rows = torch.cat([prompts, tokens], dim=1)
    ids = [row[row >= 0].tolist() for row in rows]
    return survivors(tokenizer, ids, prompts.shape[1], tokens.shape[1])


def _mean(weights: np.ndarray, values: np.ndarray) -> np.ndarray:  # (R, n), (n,) -> (R,)
    """Average over the rollouts whose value is not NaN. The result is NaN if there are none."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return weights @ np.where(known, values, 0.0) / (weights @ known)


def _count_graded(texts: Continuation) -> list[int]:  # (H,) rollouts that reach each step
    return (~texts.nll.isnan()).sum(0).tolist()


def _samples(texts: Texts, own: Tensor, n: int = 4) -> list[dict[str, list[int]]]:
    """Return the ids of the first n rollouts, including end-of-text."""
    rows = zip(texts.document[:n], own[:n], strict=True)
    return [
        {
            "prompt": texts.prompts[document].tolist(),
            "data": texts.truth[document].tolist(),
            "own": row[row >= 0].tolist(),
        }
        for document, row in rows
    ]
