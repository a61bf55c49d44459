"""What grading asks of a model: the distribution of the next token, token after token."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from model import GPT, KVCache
from trainer.parallel import Parallel


class Predictor(ABC):
    """Reads a batch of token sequences piece by piece and predicts what comes next."""

    @abstractmethod
    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        """Forget everything, read the prompts, return log-probabilities of the next token.

        (B, P) int64 -> (B, V) float64, on the device that the model is on.
        length: tokens of a row that will be read, prompts included (none given: as many as it can).
        """

    @abstractmethod
    def read(self, tokens: Tensor) -> Tensor:  # (B, t) int64 -> (B, V) float64
        """Read t more tokens of every row, return log-probabilities of the next token."""


class GPTPredictor(Predictor):
    """A GPT with its key-value cache; at most `batch_size` rows go through the model at once.

    The model stays in the mode (train or eval) that it is in: the caller sets it. Raises ValueError
    if more is to be read than its block_size.
    """

    def __init__(self, model: GPT, batch_size: int = 512) -> None:
        self.model = model
        self.batch_size = batch_size
        self._caches: list[KVCache] = []

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        block_size = self.model.config.block_size
        if length is not None and length > block_size:
            raise ValueError(f"{length} tokens a row are to be read, but block_size={block_size}")
        sizes = [len(rows) for rows in prompts.split(self.batch_size)]
        self._caches = [self.model.make_cache(size, length) for size in sizes]
        return self.read(prompts)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        device = self._caches[0].kv.device
        rows = tokens.to(device).split(self.batch_size)
        pairs = zip(rows, self._caches, strict=True)
        logits = [self.model.step(ids, cache)[:, -1] for ids, cache in pairs]  # (b, V) each
        return torch.cat(logits).log_softmax(-1, dtype=torch.float64)


class SharedPredictor(Predictor):
    """Every process of a world predicts for some of the rows, and gets the predictions for all."""

    def __init__(self, own: Predictor, parallel: Parallel) -> None:
        self.own = own
        self.parallel = parallel

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        share = self.own.start(self.parallel.shard_rows(prompts), length)
        return self.parallel.gather_rows(share, len(prompts))

    def read(self, tokens: Tensor) -> Tensor:
        share = self.own.read(self.parallel.shard_rows(tokens))
        return self.parallel.gather_rows(share, len(tokens))
