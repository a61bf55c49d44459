"""Build the model, the optimizers and the preconditioner that the settings describe."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model import GPT, GPTConfig
from optim import ActivationPreconditioner
from optim.build import build_optimizers
from optim.mup import forward_mults
from trainer.presets import DOPR_KEYS
from trainer.settings import ConfigError, TrainConfig, split_names
from trainer.sharding import shard_like

MODEL_KEYS = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "tie_weights")
OPTIMIZER_KEYS = (
    *("optimizer", "optimizer_args", "optimizer_roles", "lr", "aux_lr", "embedding_lr"),
    *("weight_decay", "beta1", "beta2", "eps"),
    *("momentum", "nesterov", "adjust_lr", "ns_coefficients", "ns_dtype", "backend"),
    *("width_mult", "wd_scaling", "dopr"),
)
SCHEDULE_KEYS = ("schedule", "warmup_steps", "max_steps", "min_lr_ratio")
MAPPED_NUMEL = 2**23 + 1  # more than 32 MiB of fp32


def chosen(config: TrainConfig, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings with these names."""
    return {key: getattr(config, key) for key in keys}


def make_model(config: TrainConfig, vocab_size: int, *, is_empty: bool = False) -> GPT:
    """Build a GPT with random weights, the same in every process.

    If `is_empty`, it is on the meta device and has no weights: shard it, then call `draw_shards`.
    """
    torch.manual_seed(config.seed)
    mults: dict[str, Any] = forward_mults(config.width_mult, config.head_mult)
    with torch.device("meta" if is_empty else "cpu"):
        return GPT(GPTConfig(vocab_size=vocab_size, **chosen(config, MODEL_KEYS), **mults))


@torch.no_grad()
def draw_shards(model: GPT, seed: int) -> None:
    """Draw the weights of a sharded model: those that `make_model` gives a model with this seed.

    They do not depend on the number of processes. Holds one whole parameter at a time.
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        template = GPT(model.config)
    for module in template.modules():  # torch draws weights first, which GPT draws again
        if isinstance(module, (nn.Linear, nn.Embedding)):
            for name, parameter in module.named_parameters():
                setattr(module, name, nn.Parameter(_memory_for(parameter)))
            module.reset_parameters()
            module.to("meta")  # frees the memory
    for name, parameter in model.named_parameters():
        whole = _memory_for(parameter)
        model.draw_(name, whole)
        parameter.copy_(shard_like(whole, parameter))


def _memory_for(parameter: Tensor) -> Tensor:
    """Return an empty tensor of the whole shape on the CPU, which leaves no hole when it is freed.

    From 32 MiB on, glibc's malloc returns freed memory at once. Smaller tensors of several sizes
    between the shards fragmented it to twice the memory of the shards.
    """
    numel = parameter.numel()
    return torch.empty(max(numel, MAPPED_NUMEL), device="cpu")[:numel].view(parameter.shape)


def make_optimizers(config: TrainConfig, model: GPT, process_group: Any) -> list[Optimizer]:
    """Build the optimizers; together they hold every trainable parameter once.

    Raises:
        ConfigError: the settings cannot be used with this model.
    """
    settings = chosen(config, OPTIMIZER_KEYS)
    try:
        return build_optimizers(model, **settings, process_group=process_group)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def make_preconditioner(config: TrainConfig, model: GPT) -> ActivationPreconditioner:
    """Build DoPr's preconditioner.

    An untied output head is excluded unless `include` or `exclude` is set.

    Raises:
        ConfigError: the settings cannot be used with this model.
    """
    include = split_names(config.include) or None
    head = None if config.tie_weights or include else ["lm_head"]
    exclude = split_names(config.exclude) or head
    try:
        return ActivationPreconditioner(
            model, include=include, exclude=exclude, **chosen(config, (*DOPR_KEYS, "backend"))
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
