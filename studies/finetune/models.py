"""Load a local causal language model of Hugging Face, prepare it for training, and save it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


def load(folder: Path, *, with_adapters: bool = False) -> tuple[Any, Any]:
    """Return the model in float32 and the tokenizer. Nothing is downloaded.

    Args:
        with_adapters: also accept a folder of adapters, which names the folder of their model.
    Raises:
        ValueError, OSError: the folder holds no such model.
    """
    names = (CONFIG, ADAPTER_CONFIG) if with_adapters else (CONFIG,)
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"{folder} has no {' or '.join(names)}: expected a Hugging Face model")
    path = str(folder.resolve())  # an adapter's folder stores the path of its model
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    kwargs: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval(), tokenizer


def context_length(model: Any) -> int | None:
    """Return the number of positions of the model; None if its configuration does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def add_lora(model: Any, rank: int) -> Any:
    """Freeze the model and put adapters beside all its linear layers except the output head."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(each, Conv1D) for each in model.modules()),
    )
    return get_peft_model(model, config)


def replace_conv1d(model: nn.Module) -> None:
    """Replace the layers of GPT-2 that store (d_in, d_out) by linear layers, in place.

    `build_optimizers` knows linear layers only: Muon needs q, k and v stacked by rows.
    """
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, Conv1D):
            d_in, d_out = layer.weight.shape
            linear = nn.Linear(d_in, d_out, device="meta")
            linear.weight, linear.bias = nn.Parameter(layer.weight.T.contiguous()), layer.bias
            model.set_submodule(name, linear)
            linear.is_from_conv1d = True  # type: ignore[assignment]


def head_name(model: Any) -> list[str]:
    """Return the name of the output head, in a list that is empty if there is none."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a folder that `load` and `AutoModelForCausalLM` read. Adapters are saved alone."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        weights = model.state_dict()
        for name, layer in model.named_modules():
            if hasattr(layer, "is_from_conv1d"):
                weights[f"{name}.weight"] = layer.weight.detach().T.contiguous()
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
