"""A configuration of torchtitan 0.3.0 that trains a tiny Llama on CPUs with torch 2.13.

What torchtitan lacks for CPUs is replaced here; nothing of it concerns the preconditioner.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torchtitan.tools import utils

# torchtitan expects an accelerator. Its other modules copy these two, so they are imported below.
utils.device_type = "cpu"
utils.device_module = SimpleNamespace(
    **dict.fromkeys(
        ["set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"], lambda *args: None
    ),
    current_device=lambda: 0,
    device_count=lambda: 1,
    get_device_name=lambda device: "CPU",
    get_device_properties=lambda device: SimpleNamespace(total_memory=1),
    memory_stats=lambda device: {},
)
vars(torch.distributed).setdefault("set_timeout", _set_pg_timeout)  # not in torch 2.13

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import DebugConfig, TrainingConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry, parallelize_llama
from torchtitan.trainer import Trainer


class Metrics(MetricsProcessor):
    """Also keeps the losses."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def log(self, step: int, global_avg_loss: float, *args, **kwargs) -> None:
        self.losses.append(global_avg_loss)
        super().log(step, global_avg_loss, *args, **kwargs)


def parallelized(model, **kwargs):
    """Do what torchtitan does, and let FSDP2 use only the reductions that gloo has."""
    model = parallelize_llama(model, **kwargs)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return model


def tiny() -> Trainer.Config:
    """Return the configuration of two layers of the debug model, in fp32."""
    spec = model_registry("debugmodel")
    spec.parallelize_fn = parallelized
    spec.model.layers = spec.model.layers[:2]
    for _, _, parent, name in [*spec.model.traverse(FlexAttention.Config)]:
        setattr(parent, str(name), ScaledDotProductAttention.Config())  # flex has no CPU backward
    loss = CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)
    return Trainer.Config(
        model_spec=spec,
        loss=ChunkedLossWrapper.Config(loss_fn=loss),
        optimizer=default_adamw(lr=1e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(steps=6, mixed_precision_param="float32", disable_cuda_graphs=True),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4_test"),
        metrics=Metrics.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(enable=True, interval=3, last_save_model_only=False),
        debug=DebugConfig(seed=0),
    )
