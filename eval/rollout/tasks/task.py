"""A task: a source of training documents, an exact grader, a horizon.

A task is also a dataset: `--dataset=task:pdfa,states=32` trains on its documents, and any
checkpoint of such a run can be graded (eval/rollout/ttf.py).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from filelock import FileLock
from torch import Tensor

from data.dataset import Dataset
from data.meta import META, TOKENIZER, empty_split, write_meta
from data.shards import DataError, write_shard
from data.tokenizer import Tokenizer, symbol_tokenizer
from eval.rollout.environment import Environment, draw, rollout
from eval.rollout.metrics import Grade, oracle_grade
from eval.rollout.policy import Predictor

PREPARED = Path(__file__).parents[3] / "data" / "task" / "prepared"


class TaskError(DataError):
    """A task that does not exist, or that cannot be what its knobs ask for."""


@dataclass(frozen=True, kw_only=True)
class TaskBase(ABC):
    """The name, the knobs and the ranking metric of a task.

    The dataclass fields are the knobs: `task:NAME,field=value,...` sets them.
    """

    name: ClassVar[str]
    primary: ClassVar[str]  # the metric that ranks
    higher_is_better: ClassVar[bool] = False
    # Raise it when a change of the code changes the grades: stored grades are then computed anew.
    grading_version: ClassVar[int] = 1

    @property
    def spec(self) -> str:
        """The name with every knob: equal specs are equal tasks."""
        knobs = "".join(f",{key}={value}" for key, value in asdict(self).items())
        return f"task:{self.name}{knobs}"


class Task(TaskBase):
    """A task for language models: documents to train on, and a grader of next-token predictors."""

    @property
    @abstractmethod
    def context_tokens(self) -> int:
        """What a model must be able to read to live through an episode."""

    @abstractmethod
    def open(self) -> Dataset:
        """The training and validation documents, made at the first call and kept on disk."""

    @abstractmethod
    def grade(self, predictor: Predictor, *, n: int, seed: int) -> Grade:
        """How the model does on n episodes of its own, and on the data's contexts."""


@dataclass(frozen=True, kw_only=True)
class OracleTask(Task):
    """A task whose source is a `World`: its documents are the episodes that the oracle lives.

    A document is the prompt, then `horizon` decisions, each followed by the world's answer of
    `answer_tokens`, without the last answer. `seed` names a stream of episodes; "train" and "val"
    are those of the dataset, numbers are for grading, so that nothing is graded on training data.
    """

    instance: int = 0  # which automaton, graph or plant is drawn
    horizon: int = 64  # decisions in an episode
    n_documents: int = 65_536  # for training

    prompt_tokens: ClassVar[int] = 1
    answer_tokens: ClassVar[int] = 0
    n_validation: ClassVar[int] = 2048  # documents
    # Raise it when a change of the code changes the documents: prepared ones are then made anew.
    documents_version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        problems = [claim for claim, holds in self.claims().items() if not holds]
        if problems:
            raise TaskError(f"task {self.name}: {'; '.join(problems)}")

    def claims(self) -> dict[str, bool]:
        """What must hold of the knobs, in words, and whether it does."""
        sizes = ("horizon", "n_documents")
        return {f"{k}={getattr(self, k)}: must be at least 1": getattr(self, k) >= 1 for k in sizes}

    @abstractmethod
    def symbols(self) -> list[str]:
        """The name of every id, in order; end-of-text comes after the last."""

    def unscored(self) -> list[int]:
        """Ids that no loss counts: the world's part."""
        return []

    @abstractmethod
    def environment(self, n: int, seed: str | int) -> Environment:
        """n episodes at their beginning, a function of the knobs and of the seed alone."""

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Random numbers that depend on the task's instance and on their purpose only."""
        name = " ".join(map(str, (self.name, self.instance, *purpose)))
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(seed)

    def uniforms(self, n: int, seed: str | int) -> Tensor:  # (n, horizon) float64
        """The random number of every decision: the same for every model (common random numbers)."""
        generator = self.generator(seed, "decisions")
        return torch.rand(n, self.horizon, generator=generator, dtype=torch.float64)

    @property
    def document_tokens(self) -> int:
        between = self.horizon * (1 + self.answer_tokens) - self.answer_tokens
        return self.prompt_tokens + between

    @property
    def context_tokens(self) -> int:
        return self.document_tokens - 1  # the last token is never read

    def documents(self, n: int, seed: str | int) -> Tensor:  # (n, document_tokens) int64
        """Episodes in which the oracle decides."""
        environment = self.environment(n, seed)
        parts = [environment.prompts]
        for u in self.uniforms(n, seed).unbind(1):
            token = draw(environment.oracle(), u)
            parts += [token[:, None], environment.step(token)]
        return torch.cat(parts, dim=1)[:, : self.document_tokens]

    def grade(self, predictor: Predictor, *, n: int, seed: int) -> Grade:
        """Oracle KL on the data's contexts and on the model's own; outcomes of the own episodes."""
        uniforms = self.uniforms(n, seed)
        data = rollout(self.environment(n, seed), predictor, uniforms, "oracle")
        own = rollout(self.environment(n, seed), predictor, uniforms, "model")
        return oracle_grade(data, own)

    def open(self) -> Dataset:
        folder = PREPARED / f"{self.name}-{self._fingerprint()}"
        with FileLock(PREPARED.parent / f"{folder.name}.lock", mode=0o644):
            if not (folder / META).exists():
                self._write(folder)
        return Dataset(folder)

    def _fingerprint(self) -> str:
        """A hash of the knobs and of the version of the code that makes the documents."""
        content = json.dumps([self.spec, self.documents_version])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def _write(self, folder: Path) -> None:
        tokenizer = symbol_tokenizer(self.name, self.symbols())
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / TOKENIZER)
        splits = {}
        for name, n in (("train", self.n_documents), ("val", self.n_validation)):
            splits[name] = _write_split(folder, name, self.documents(n, name), tokenizer)
        sizes = {"length": self.document_tokens, "prompt": self.prompt_tokens}
        layout = sizes | {"unscored": self.unscored()}
        write_meta(folder, {"task": self.spec}, tokenizer, splits, layout=layout)


def _write_split(folder: Path, name: str, documents: Tensor, tokenizer: Tokenizer) -> dict:
    tokens = documents.numpy().astype("uint16")  # (n, L)
    text_bytes = int(tokenizer.token_bytes()[tokens].sum())
    entry = write_shard(folder / f"{name}_000000.bin", list(tokens))
    sizes = {"tokens": tokens.size, "documents": len(tokens), "text_bytes": text_bytes}
    return empty_split() | sizes | {"files": [entry]}
