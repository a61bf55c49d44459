"""Base classes of the tasks: a source of training documents and a grader of models.

A task is also a dataset. `train.py --dataset=task:pdfa,states=32` trains on its documents, and
eval/rollout/ttf.py grades the checkpoints of such a run.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

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
from eval.rollout.tasks.references import reference

PREPARED = Path(__file__).parents[3] / "data" / "task" / "prepared"


class TaskError(DataError):
    """Raised for an unknown task, for invalid knobs, and for a model that a task cannot grade."""


def later_knob(default: Any) -> Any:
    """Declare a knob that a task did not have at first; stored specs without it remain valid."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True, kw_only=True)
class TaskBase(ABC):
    """The name, the knobs and the ranking metric of a task.

    The dataclass fields are the knobs; `task:NAME,field=value,...` sets them. Raises TaskError that
    lists every invalid knob.
    """

    name: ClassVar[str]
    primary: ClassVar[str]  # the metric that ranks models
    higher_is_better: ClassVar[bool] = False  # the direction of the ranking metric
    default_episodes: ClassVar[int] = 512  # graded rollouts of a run, unless others are asked for
    # Raise this number when a change of the task's code changes its grades. Stored grades of older
    # versions are then computed again.
    grading_version: ClassVar[int] = 1
    references: ClassVar[tuple[str, ...]] = ()  # policies that no optimizer trained

    def __post_init__(self) -> None:
        problems = [requirement for requirement, holds in self.claims().items() if not holds]
        if problems:
            raise TaskError(f"task {self.name}: {'; '.join(problems)}")

    def claims(self) -> dict[str, bool]:
        """Return the requirements on the knobs as messages, and whether each is met."""
        return {}

    def at_least(self, **minimum: int) -> dict[str, bool]:
        """Return the requirements that knobs are not below a minimum, for `claims`."""
        return {
            f"{knob}={getattr(self, knob)}: must be at least {low}": getattr(self, knob) >= low
            for knob, low in minimum.items()
        }

    @property
    def spec(self) -> str:
        """The task's name with its knobs, less each later knob that has its default.

        Equal specs denote equal tasks.
        """
        words = [f"task:{self.name}"]
        for knob in fields(self):
            value = getattr(self, knob.name)
            if value != knob.default or not knob.metadata.get("later"):
                words.append(f"{knob.name}={value}")
        return ",".join(words)

    @property
    def has_instances(self) -> bool:
        """Whether the task has random instances, one of which the seed of a run selects."""
        return "instance" in {field.name for field in fields(self)}

    def grade_reference(self, name: str, *, n: int, seed: int) -> Grade:
        """Grade one of `references` on n episodes."""
        raise NotImplementedError


class Task(TaskBase):
    """A task for language models: documents to train on and a grader of next-token predictors.

    train.py trains on such tasks alone. The models of other tasks are policies without tokens,
    which a program of the studies trains.
    """

    @property
    @abstractmethod
    def context_tokens(self) -> int:
        """The number of tokens that a model must be able to read for one episode."""

    @abstractmethod
    def open(self) -> Dataset:
        """Open the dataset of training and validation documents and create it if necessary."""

    @abstractmethod
    def grade(self, predictor: Predictor, *, n: int, seed: int) -> Grade:
        """Grade a model on n of its own episodes and on the data's contexts."""


@dataclass(frozen=True, kw_only=True)
class OracleTask(Task):
    """A task whose documents are episodes of an `Environment` in which the oracle decides.

    A document is a prompt followed by `horizon` decisions. After each decision but the last, the
    environment's answer of `answer_tokens` tokens follows. The argument `seed` of the methods
    selects a stream of episodes: "train" and "val" are the splits of the dataset, and integers are
    for grading, so no model is graded on its training data. A stream whose name begins with "train"
    has other episodes, which start like the training documents.
    """

    instance: int = 0  # selects the random automaton, graph or plant
    horizon: int = 64  # decisions per episode
    n_documents: int = 65_536  # training documents

    prompt_tokens: ClassVar[int] = 1
    answer_tokens: ClassVar[int] = 0
    n_validation: ClassVar[int] = 2048  # validation documents
    # Raise this number when a change of the code changes the documents. Datasets of older versions
    # are then not used, and new ones are prepared.
    documents_version: ClassVar[int] = 1
    references: ClassVar[tuple[str, ...]] = ("oracle", "greedy", "uniform")

    def claims(self) -> dict[str, bool]:
        return self.at_least(horizon=1, n_documents=1)

    @abstractmethod
    def symbols(self) -> list[str]:
        """Return the names of all ids in order, without end-of-text, whose id follows the last."""

    def unscored(self) -> list[int]:
        """Return the ids that the loss ignores: the tokens of the environment's answers."""
        return []

    @abstractmethod
    def environment(self, n: int, seed: str | int) -> Environment:
        """Create n episodes at their beginning. They depend only on the knobs and the seed."""

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return a random generator seeded by the task's name, its instance and `purpose`."""
        name = " ".join(map(str, (self.name, self.instance, *purpose)))
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(seed)

    def uniforms(self, n: int, seed: str | int) -> Tensor:  # (n, horizon) float64
        """Draw one random number per decision, the same for all models (common random numbers)."""
        generator = self.generator(seed, "decisions")
        return torch.rand(n, self.horizon, generator=generator, dtype=torch.float64)

    @property
    def document_tokens(self) -> int:
        """The length of every document."""
        between = self.horizon * (1 + self.answer_tokens) - self.answer_tokens
        return self.prompt_tokens + between

    @property
    def context_tokens(self) -> int:
        return self.document_tokens - 1  # the last token is never read

    def documents(self, n: int, seed: str | int) -> Tensor:  # (n, document_tokens) int64
        """Generate n documents."""
        environment = self.environment(n, seed)
        parts = [environment.prompts]
        for u in self.uniforms(n, seed).unbind(1):
            token = draw(environment.oracle(), u)
            parts += [token[:, None], environment.step(token)]
        return torch.cat(parts, dim=1)[:, : self.document_tokens]

    def grade(self, predictor: Predictor, *, n: int, seed: int) -> Grade:
        how = predictor, self.uniforms(n, seed)
        data, own = (
            rollout(self.environment(n, seed), *how, actor, self.context_tokens)
            for actor in ("oracle", "model")
        )
        return oracle_grade(data, own)

    def grade_reference(self, name: str, *, n: int, seed: int) -> Grade:
        return self.grade(reference(name, self.environment(n, seed)), n=n, seed=seed)

    def open(self) -> Dataset:
        folder = PREPARED / f"{self.name}-{self._fingerprint()}"
        with FileLock(PREPARED.parent / f"{folder.name}.lock", mode=0o644):
            if not (folder / META).exists():
                self._write(folder)
        return Dataset(folder)

    def _fingerprint(self) -> str:
        """Return a hash of the knobs and of `documents_version`."""
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
