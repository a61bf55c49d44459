"""Load a GPT-2 from a local Hugging Face folder, without downloading anything."""

import dataclasses
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import is_zipfile

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.schema import MAX_PROBLEMS, OpenSchema, read_json
from data.tokenizer import Tokenizer
from eval.deferred import DeferredTensors
from model import GPT, GPTConfig
from trainer.checkpoint.tensors import weight_problems
from trainer.settings import ConfigError

TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # Conv1D stores (d_in, d_out)
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask, which old files contain
WPE = "transformer.wpe.weight"
TABLES = ("transformer.wte.weight", "lm_head.weight")  # one row for each id
INDEX = ".index.json"  # ends the name of the file that lists the shards
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each in one file, or in shards with an index
SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "tie_weights")

Size = Annotated[int, Field(gt=0)]


class HFConfig(OpenSchema):
    """The settings in config.json of a GPT-2 that model.py can compute; others are refused."""

    model_type: Literal["gpt2"] = "gpt2"
    vocab_size: Size
    n_positions: Size = 1024
    n_layer: Size
    n_head: Size
    n_embd: Size
    n_inner: int | None = None
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh"] = "gelu_new"
    layer_norm_epsilon: Annotated[float, Field(ge=1e-5, le=1e-5)] = 1e-5
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _check_widths(self) -> "HFConfig":
        if self.n_inner not in (None, 4 * self.n_embd):
            raise ValueError(f"n_inner={self.n_inner}: must be null or 4 * n_embd")
        self.to_gpt()  # raises ValueError unless n_head divides n_embd
        return self

    def to_gpt(self) -> GPTConfig:
        keys = ("vocab_size", "n_layer", "n_head", "n_embd")
        sizes: dict[str, Any] = {key: getattr(self, key) for key in keys}
        sizes |= {"block_size": self.n_positions, "tie_weights": self.tie_word_embeddings}
        return GPTConfig(**sizes)


class ShardIndex(OpenSchema):
    weight_map: dict[str, Annotated[str, Field(pattern=r"^\w[^/\\\x00]*$")]]  # tensor: file


def is_hf_folder(path: Path) -> bool:
    """Return whether `path` has the files of a Hugging Face model and is no checkpoint or run."""
    is_ours = (path / "manifest.json").exists() or (path / "checkpoints").exists()
    return not is_ours and (path / "config.json").is_file() and _weights_file(path) is not None


def load_hf(
    folder: str | Path, block_size: int | None = None, vocab_size: int | None = None
) -> GPT:
    """Load a GPT-2 from a folder with config.json and weights; see `open_hf`.

    Dropout is 0, whatever config.json says.
    """
    config, weights = open_hf(folder, block_size, vocab_size)
    model = GPT(config)
    model.load_state_dict(weights)
    return model


def open_hf(
    folder: str | Path, block_size: int | None = None, vocab_size: int | None = None
) -> tuple[GPTConfig, Mapping[str, Tensor]]:
    """Check a GPT-2 in a folder with config.json and weights; return its sizes and its weights.

    The weights are in model.safetensors or pytorch_model.bin, in one file or in shards. They are
    read and converted to float32 when they are asked for.

    Args:
        block_size: keep only this many of the first positions. Defaults to all.
        vocab_size: keep only this many of the first ids. Defaults to all.
    Raises:
        ValueError: a file is missing or damaged, the model is not a GPT-2, or weights are missing,
            unexpected, of another shape or not finite.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", HFConfig, ValueError).to_gpt()
    path, tensors = _read_tensors(folder)
    weights = _renamed(tensors, config.tie_weights)
    if problems := weight_problems(weights, config):
        listed = "; ".join(problems[:MAX_PROBLEMS])
        raise ValueError(f"{path} does not fit its config.json: {listed}")
    T = min(block_size or config.block_size, config.block_size)
    V = min(vocab_size or config.vocab_size, config.vocab_size)
    n_rows = {WPE: T} | dict.fromkeys(TABLES, V)
    cropped = DeferredTensors(weights, lambda key, weight: weight[: n_rows.get(key)])
    return dataclasses.replace(config, block_size=T, vocab_size=V), cropped


def _weights_file(folder: Path) -> Path | None:
    """Return the file of the weights, or the index of their shards; None without either."""
    paths = (folder / f"{name}{end}" for name in WEIGHTS for end in ("", INDEX))
    return next((path for path in paths if path.is_file()), None)


def _read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    path = _weights_file(folder)
    if path is None:
        raise ValueError(f"{folder}: has no {' or '.join(WEIGHTS)}, nor {INDEX} of either")
    if not path.name.endswith(INDEX):
        return path, _read_file(path)
    places = read_json(path, ShardIndex, ValueError).weight_map
    shards = {name: _read_file(folder / name) for name in sorted({*places.values()})}
    if absent := sorted(key for key, name in places.items() if key not in shards[name]):
        raise ValueError(f"{path}: lists {absent[0]} in {places[absent[0]]}, which lacks it")
    return path, {key: shards[name][key] for key, name in places.items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one file; a pickle is read without running code from it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mmap = is_zipfile(path)  # what torch wrote before version 1.6 is no zip file
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged ({error})") from None
    except Exception as error:  # torch raises many types for a pickle that it refuses
        raise ValueError(f"{path}: not a file of tensors, or damaged ({error!r:.200})") from None
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise ValueError(f"{path}: expected a dict of tensors")
    return found


def _renamed(tensors: Mapping[str, Tensor], tie_weights: bool) -> Mapping[str, Tensor]:
    """Convert tensors to the names, the orientation and the type of model.py."""
    renamed = {}
    for key, tensor in tensors.items():
        if BUFFERS.search(key) or (tie_weights and key == "lm_head.weight"):
            continue
        ours = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
        renamed[ours] = tensor
    return DeferredTensors(renamed, _converted)


def _converted(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():  # any other type is refused
        tensor = tensor.float()
    return tensor.T if TRANSPOSED.search(name) and tensor.dim() == 2 else tensor


def missing_shape(folder: str, given: Container[str]) -> dict[str, Any]:
    """Return the sizes of the model in a Hugging Face folder that are not among the given settings.

    Raises:
        ConfigError: the folder has no config.json of a GPT-2.
    """
    missing = [key for key in SHAPE_KEYS if key not in given]
    if not missing:
        return {}
    try:
        found = read_json(Path(folder) / "config.json", HFConfig, ValueError).to_gpt()
    except ValueError as error:
        raise ConfigError(f"init_from={folder}: {error}") from None
    return {key: getattr(found, key) for key in missing}


def check_shape(folder: Path, found: GPTConfig, wanted: GPTConfig) -> None:
    """Raise ValueError if weights of a model `found` are another function in a model `wanted`."""
    listed = [
        f"{key}={getattr(wanted, key)} (there {getattr(found, key)})"
        for key in SHAPE_KEYS
        if getattr(found, key) != getattr(wanted, key)
    ]
    if listed:
        raise ValueError(
            f"{folder} holds another function than these settings: {', '.join(listed)}; leave "
            "them out, and they are taken from the folder"
        )


def check_tokenizer(folder: Path, wanted: Tokenizer) -> None:
    """Raise ValueError unless every id of the folder's tokenizer stands for the same bytes."""
    cure = (
        "prepare the data with the folder's tokenizer, or add --allow_tokenizer_mismatch=true if "
        "the difference is meant"
    )
    try:
        found = Tokenizer.load(folder / "tokenizer.json")
    except ValueError as error:
        raise ValueError(f"the tokenizers cannot be compared: {error}; {cure}") from None
    tokens = [[each.decode_bytes([i]) for i in range(each.n_vocab)] for each in (found, wanted)]
    if tokens[0] != tokens[1] or found.eot != wanted.eot:
        differing = [i for i, (a, b) in enumerate(zip(*tokens, strict=False)) if a != b]
        i = differing[0] if differing else min(found.n_vocab, wanted.n_vocab)
        raise ValueError(
            f"its tokenizer ({found.n_vocab} ids) is not the data's, {wanted.name!r} "
            f"({wanted.n_vocab} ids): they differ at id {i}; {cure}"
        )
