"""Evaluate the validation loss and the model's own rollouts during training."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.dataset import DataError, Dataset
from data.loader import ValBatches
from data.tokenizer import Tokenizer
from eval.hf_import import check_shape, check_tokenizer, open_hf
from eval.loss import evaluate
from eval.mup_export import unfolded_weights
from eval.rollout.tasks import Task
from eval.rollout.ttf import grade_model
from model import GPT
from trainer.checkpoint.read import load_into
from trainer.checkpoint.state import TrainState
from trainer.evaluation_weights import evaluation_weights
from trainer.parallel import Parallel
from trainer.settings import ConfigError, TrainConfig
from trainer.signals import StopRequest


def validate(
    state: TrainState,
    batches: ValBatches,
    dataset: Dataset,
    parallel: Parallel,
    autocast: torch.autocast,
    stop: StopRequest,
) -> dict[str, Any] | None:
    """Evaluate the weights, and their moving average, on the validation set; None if stopped.

    All processes must call this; each evaluates some of the batches.
    """
    row: dict[str, Any] = {}
    reads = [partial(batches.__getitem__, i) for i in range(len(batches))]
    with evaluation_weights(state.optimizers):
        for prefix, model in state.evaluated().items():
            try:
                result = evaluate(
                    model,
                    (parallel.raise_on_all_ranks(read, DataError) for read in reads),
                    dataset.tokenizer.token_bytes(),
                    device=parallel.device,
                    autocast=autocast,
                    should_stop=stop.poll,
                    total=parallel.sum,
                )
            except ValueError as error:  # no target of these batches is scored
                raise DataError(f"validation: {error}; use more eval_batches") from error
            parallel.reshard(model)
            if result is None:
                return None
            row |= {prefix + key: value for key, value in asdict(result).items()}
    return row


def grade_rollouts(
    state: TrainState, task: Task, parallel: Parallel, *, n: int
) -> dict[str, float]:
    """Grade n rollouts of the weights and of their moving average. All processes must call this."""
    row: dict[str, float] = {}
    with evaluation_weights(state.optimizers):
        for prefix, model in state.evaluated().items():
            assert isinstance(model, GPT)
            whole = parallel.full_model(model, partial(GPT, model.config))
            assert isinstance(whole, GPT)
            grade = grade_model(task, whole, n=n, seed=0, parallel=parallel)
            row |= {prefix + name: value for name, value in grade.means().items()}
    return row


def load_initial_weights(models: Sequence[GPT], config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Load the weights of the Hugging Face folder `init_from` into models of one configuration.

    If they are sharded, a process copies only the rows that it holds.

    Raises:
        ConfigError: the folder cannot be used, its model is another function than theirs, or its
            tokenizer is not the data's `tokenizer` and `allow_tokenizer_mismatch` is false.
    """
    folder, wanted = Path(config.init_from), models[0].config
    try:
        found, weights = open_hf(folder, wanted.block_size)
        check_shape(folder, found, wanted)
        if not config.allow_tokenizer_mismatch:
            check_tokenizer(folder, tokenizer)
    except (ValueError, OSError) as error:
        raise ConfigError(f"init_from={folder}: {error}") from error
    for model in models:
        load_into(model, unfolded_weights(weights, wanted), folder)
