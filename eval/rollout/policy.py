"""Predict next-token distributions step by step, the only interface that grading needs."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from eval.generate import KVCache, next_logits
from eval.sampling import wide_device
from model import GPT
from trainer.parallel import Parallel


class Predictor(ABC):
    """Read a batch of token sequences piece by piece and predict each next token."""

    @abstractmethod
    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        """Reset the state, read the prompts and return the next token's log-probabilities.

        Args:
            prompts: (B, P) int64.
            length: the tokens that will be read per row, including the prompt. Defaults to as many
                as the model can read.
        Returns:
            (B, V) float64 on the model's device, or on the CPU if that is MPS.
        """

    @abstractmethod
    def read(self, tokens: Tensor) -> Tensor:  # (B, t) int64 -> (B, V) float64
        """Read t more tokens per row and return the next token's log-probabilities."""


class GPTPredictor(Predictor):
    """Predict with a GPT and its key-value cache.

    The caller is responsible for putting the model in eval mode.

    Args:
        batch_size: the most rows that go through the model at once. The keys and values of all rows
            stay in memory.
    Raises:
        ValueError: `start` or `read` is asked to exceed the model's block_size.
    """

    def __init__(self, model: GPT, batch_size: int = 512) -> None:
        self.model = model
        self.batch_size = batch_size
        self._caches: list[KVCache] = []

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        block_size = self.model.config.block_size
        if length is not None and length > block_size:
            raise ValueError(f"cannot read {length} tokens per row with block_size={block_size}")
        sizes = [len(rows) for rows in prompts.split(self.batch_size)]
        self._caches = [KVCache(self.model, size, length) for size in sizes]
        return self.read(prompts)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        device = self._caches[0].kv.device
        rows = tokens.to(device).split(self.batch_size)
        pairs = zip(rows, self._caches, strict=True)
        logits = [next_logits(self.model, ids, cache)[:, -1] for ids, cache in pairs]  # (b, V) each
        return torch.cat(logits).to(wide_device(device)).log_softmax(-1, dtype=torch.float64)


class SharedPredictor(Predictor):
    """Split the rows of a batch among all processes and gather the predictions for all rows."""

    def __init__(self, own: Predictor, parallel: Parallel) -> None:
        self.own = own
        self.parallel = parallel

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        share = self.own.start(self.parallel.shard_rows(prompts), length)
        return self.parallel.gather_rows(share, len(prompts))

    def read(self, tokens: Tensor) -> Tensor:
        share = self.own.read(self.parallel.shard_rows(tokens))
        return self.parallel.gather_rows(share, len(tokens))
