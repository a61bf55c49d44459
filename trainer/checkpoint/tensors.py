"""Check every tensor of a checkpoint against what it belongs to, before anything is loaded."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig
from optim import AdaMuon, Muon, Signum
from optim.third_party import is_third_party
from trainer.checkpoint.sharded import StoredTensor, read_all

STEP = "step"  # of torch's optimizers: a scalar that counts steps
STATE_KEYS: dict[type[Optimizer], set[str]] = {  # the state of a parameter
    AdamW: {STEP, "exp_avg", "exp_avg_sq"},
    SGD: {"momentum_buffer"},
    Signum: {"momentum_buffer"},
    Muon: {"momentum_buffer"},
    AdaMuon: {"momentum_buffer", "second_moment"},
}


def tensor_problem(
    value: Any, shape: Iterable[int], dtype: torch.dtype, *, must_be_finite: bool = True
) -> str:
    """Return why `value` cannot be used as a tensor of this shape and dtype, or "".

    Args:
        value: a tensor of the checkpoint, or a `StoredTensor`, which is read if necessary.
    """
    if not isinstance(value, (Tensor, StoredTensor)):
        return f"is a {type(value).__name__}, but must be a tensor"
    if tuple(value.shape) != tuple(shape):
        return f"is {tuple(value.shape)}, but must be {tuple(shape)}"
    if value.dtype != dtype:
        return f"is {value.dtype}, but must be {dtype}"
    if isinstance(value, Tensor) and (value.layout, value.device.type) != (torch.strided, "cpu"):
        return f"is a {value.layout} tensor on {value.device}, but must be dense, on the CPU"
    if not must_be_finite:
        return ""
    tensor = value if isinstance(value, Tensor) else value.read()
    return "" if tensor.isfinite().all() else "is not finite"


def weight_problems(weights: Mapping[str, Any], config: GPTConfig) -> list[str]:
    """List why these weights are not those of a GPT of this configuration."""
    sizes = {"wte": config.vocab_size, "wpe": config.block_size}
    for name, rows in sizes.items():  # first, because they bound the model to compare with
        key, shape = f"transformer.{name}.weight", (rows, config.n_embd)
        if key not in weights:
            return [f"missing {key}"]
        if problem := tensor_problem(weights[key], shape, torch.float32, must_be_finite=False):
            return [f"{key} {problem}"]
    if config.n_layer > len(weights):
        return [f"there are {len(weights)} tensors for {config.n_layer} layers"]
    with torch.device("meta"), _NoRandomNumbers():
        own = GPT(config).state_dict()
    problems = [f"missing {key}" for key in sorted(own.keys() - weights.keys())]
    problems += [f"unexpected {key}" for key in sorted(weights.keys() - own.keys())]
    for key in own.keys() & weights.keys():
        problem = tensor_problem(weights[key], own[key].shape, torch.float32)
        problems += [f"{key} {problem}"] if problem else []
    return problems


class _NoRandomNumbers(TorchFunctionMode):
    """Leave out `normal_`, for which the meta device imports torch's compiler, in two seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, nn.init.normal_):
            return None
        return func(*args, **(kwargs or {}))


def optimizer_state_problems(
    saved: dict[int, dict[str, Any]], optimizer: Optimizer, *, may_be_empty: bool
) -> list[str]:
    """List why an optimizer cannot load the state of its parameters, {index: {key: value}}.

    The state of a class of another package may be any tree of finite tensors.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if is_third_party(optimizer):
        if unknown := saved.keys() - {*range(len(params))}:
            return [f"there is a state of parameters {_few(unknown)}, but only {len(params)} exist"]
        return [
            f"{key} of parameter {index} {problem}"
            for index, values in saved.items()
            for key, value in values.items()
            for problem in _tree_problems(value)
        ]
    if may_be_empty and not any(saved.values()):
        return []
    if saved.keys() != {*range(len(params))}:
        return [f"there is a state of parameters {_few(saved)}, but must be of {len(params)}"]
    problems = []
    for index, values in saved.items():
        wanted = STATE_KEYS[type(optimizer)]
        if values.keys() != wanted:
            problems.append(f"parameter {index} has {_few(values)}, but must have {_few(wanted)}")
            continue
        for key, value in values.items():
            shape, dtype = params[index].shape, params[index].dtype
            if key == STEP:
                shape, dtype = (), torch.float32
            problem = tensor_problem(value, shape, dtype)
            if key == STEP and not problem and read_all(value) < 0:
                problem = "is negative"
            problems += [f"{key} of parameter {index} {problem}"] if problem else []
    return problems


def _tree_problems(tree: Any) -> list[str]:
    """List the problems of the tensors in nested dicts, lists and tuples."""
    if isinstance(tree, (Tensor, StoredTensor)):
        problem = tensor_problem(tree, tree.shape, tree.dtype)
        return [problem] if problem else []
    parts = tree.values() if isinstance(tree, dict) else tree
    is_nested = isinstance(tree, (dict, list, tuple))
    return [problem for part in parts for problem in _tree_problems(part)] if is_nested else []


def layer_problems(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> list[str]:
    """List the tensors in a layer's part of a preconditioner's state that have another type.

    Its `load_state_dict` checks the shapes and values.
    """
    problems = []
    for key in own.keys() & state.keys():
        shape = getattr(state[key], "shape", ())
        problem = tensor_problem(state[key], shape, own[key].dtype, must_be_finite=False)
        problems += [f"{key} {problem}"] if problem else []
    return problems


def _few(keys: Iterable[Any]) -> str:
    """List at most eight keys."""
    listed = sorted(map(str, keys))
    return ", ".join(listed[:8]) + (" ..." if len(listed) > 8 else "")
