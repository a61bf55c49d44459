"""What grading asks of a model: the distribution of the next token, token after token."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from model import GPT, KVCache


class Predictor(ABC):
    """Reads a batch of token sequences piece by piece and predicts what comes next."""

    @abstractmethod
    def start(self, prompts: Tensor) -> Tensor:  # (B, P) int64 -> (B, V) float64
        """Forget everything, read the prompts, return log-probabilities of the next token."""

    @abstractmethod
    def read(self, tokens: Tensor) -> Tensor:  # (B, t) int64 -> (B, V) float64
        """Read t more tokens of every row, return log-probabilities of the next token."""


class GPTPredictor(Predictor):
    """A GPT with its key-value cache; at most `batch_size` rows go through the model at once.

    The model stays in the mode (train or eval) that it is in: the caller sets it.
    """

    def __init__(self, model: GPT, batch_size: int = 512) -> None:
        self.model = model
        self.batch_size = batch_size
        self._caches: list[KVCache] = []

    def start(self, prompts: Tensor) -> Tensor:
        sizes = [len(rows) for rows in prompts.split(self.batch_size)]
        self._caches = [self.model.make_cache(size) for size in sizes]
        return self.read(prompts)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        device = self._caches[0].kv.device
        rows = tokens.to(device).split(self.batch_size)
        pairs = zip(rows, self._caches, strict=True)
        logits = [self.model.step(ids, cache)[:, -1] for ids, cache in pairs]  # (b, V) each
        return torch.cat(logits).cpu().double().log_softmax(-1)
