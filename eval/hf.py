"""Load and save GPT-2 models as local Hugging Face folders, without downloading anything.

    python -m eval.hf export out/demo/text DIR

writes a folder that `AutoModelForCausalLM.from_pretrained(DIR)` and `AutoTokenizer` load directly.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.tokenizer import END_OF_TEXT, Tokenizer
from eval.command import command_parser
from eval.mup_export import folded_weights
from eval.run import load_run
from model import GPT, GPTConfig
from trainer.checkpoint.read import CheckpointError

# The settings of GPT-2 that model.py implements. A folder with other values is rejected.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # Conv1D stores (d_in, d_out)
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask, which old files contain


def load_hf(directory: str | Path) -> GPT:
    """Load a GPT-2 from a folder with config.json and model.safetensors.

    The weights are converted to float32. Dropout is 0, whatever config.json says.

    Raises:
        ValueError: a file is missing or damaged, the model is not a GPT-2, or weights are missing,
            unexpected or of another shape.
    """
    directory = Path(directory)
    config = _read_config(directory / "config.json")
    model = GPT(config)
    weights = _read_weights(directory / "model.safetensors", config.tie_weights)
    _check_weights(directory / "model.safetensors", weights, model.state_dict())
    model.load_state_dict(weights)
    return model


def _read_config(path: Path) -> GPTConfig:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; pass a folder written by save_pretrained()")
    try:
        given = json.loads(path.read_text())
        sizes = {key: given[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        block_size = given.get("n_positions", 1024)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the configuration of a GPT-2 ({error!r})") from None
    allowed = SUPPORTED | {"n_inner": (None, 4 * sizes["n_embd"])}
    problems = [
        f"{path}: {key}={given[key]!r} is not supported; must be {' or '.join(map(repr, values))}"
        for key, values in allowed.items()
        if key in given and given[key] not in values
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return GPTConfig(
        **sizes, block_size=block_size, tie_weights=given.get("tie_word_embeddings", True)
    )


def _read_weights(path: Path, tie_weights: bool) -> dict[str, Tensor]:
    """Read a safetensors file and convert it to the names and orientation of model.py."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; the weights must be in one safetensors file, which "
            "model.save_pretrained(folder, max_shard_size='100GB') writes"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged ({error})") from None
    weights = {}
    for key, tensor in tensors.items():
        if BUFFERS.search(key) or (tie_weights and key == "lm_head.weight"):
            continue
        ours = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
        transposed = TRANSPOSED.search(ours) and tensor.dim() == 2
        weights[ours] = tensor.T if transposed else tensor
    return weights


def _check_weights(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    problems = [f"missing {key}" for key in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {key}" for key in sorted(found.keys() - expected.keys())]
    problems += [
        f"{key} is {tuple(found[key].shape)}, config.json says {tuple(expected[key].shape)}"
        for key in sorted(found.keys() & expected.keys())
        if found[key].shape != expected[key].shape
    ]
    if problems:
        raise ValueError(f"{path} does not match its config.json: " + "; ".join(problems))


def export_hf(model: GPT, tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write the model and its tokenizer as a Hugging Face folder with the same logits and ids.

    The result is a standard GPT-2: the multipliers of muP are folded into the weights. Hugging
    Face's GPT-2 always has biases, so a model without biases gets zeros. The exported tokenizer
    reads "<|endoftext|>" in a text as ordinary text, like `data.tokenizer.Tokenizer`.

    Raises:
        ValueError: the model has fewer ids than the tokenizer, or `directory` contains a run.
        ImportError: the package `tokenizers` is not installed.
    """
    if model.config.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"the model has {model.config.vocab_size} ids, but tokenizer {tokenizer.name!r} has "
            f"{tokenizer.n_vocab}; export a model with its own tokenizer"
        )
    directory = Path(directory)
    if (directory / "checkpoints").exists() or (directory / "manifest.json").exists():
        raise ValueError(f"{directory} contains a run; export to another folder")
    texts = {
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": _to_json(_tokenizer_config(model.config)),
        "config.json": _to_json(_model_config(model.config, tokenizer.eot)),
        "generation_config.json": _to_json(_end_of_text_ids(tokenizer.eot)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    save_file(_hf_weights(model), directory / "model.safetensors", metadata={"format": "pt"})


def _hf_weights(model: GPT) -> dict[str, Tensor]:
    weights = {}
    for key, tensor in folded_weights(model).items():
        weights[key] = (tensor.T if TRANSPOSED.search(key) else tensor).contiguous()
        if not model.config.bias and re.search(r"\.(ln_\w|c_\w+)\.weight$", key):
            weights[key.removesuffix("weight") + "bias"] = torch.zeros(weights[key].shape[-1])
    return weights


def _model_config(config: GPTConfig, eot: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in SUPPORTED.items()},
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "tie_word_embeddings": config.tie_weights,
        **_end_of_text_ids(eot),
    }


def _end_of_text_ids(eot: int) -> dict[str, int]:
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot)


def _tokenizer_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # GPT2Tokenizer would ignore the pattern
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "model_max_length": config.block_size,
        "split_special_tokens": True,  # so that no text is encoded as the end-of-text id
        "clean_up_tokenization_spaces": False,
    }


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return tokenizer.json: split by the pattern, map bytes to letters, merge by rank."""
    try:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as HFTokenizer
    except ImportError:
        raise ImportError("the export needs tokenizers: pip install 'tokenizers>=0.22'") from None
    vocab = {_letters(token): rank for token, rank in tokenizer.ranks.items()}
    vocab[END_OF_TEXT] = tokenizer.eot
    bpe = models.BPE(vocab=vocab, merges=_merges(tokenizer.ranks), ignore_merges=True)
    result = HFTokenizer(bpe)
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return result.to_str(pretty=True)


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Return every split of a token into two tokens, lowest rank first, as tiktoken merges."""
    return [
        (_letters(token[:cut]), _letters(token[cut:]))
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]


def _letters(token: bytes) -> str:
    """Spell bytes as GPT-2's vocabulary files do, with one printable letter for each byte."""
    return "".join(map(BYTE_LETTERS.__getitem__, token))


def _byte_letters() -> list[str]:
    """List GPT-2's letter for each byte: its Latin-1 character, or one from U+0100 on if none."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    unprintable = [byte for byte in range(256) if byte not in printable]
    return [chr(b if b in printable else 256 + unprintable.index(b)) for b in range(256)]


BYTE_LETTERS = _byte_letters()


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("eval.hf", __doc__)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("run", help="a run's out_dir or a checkpoint's folder")
    parser.add_argument("directory", help="the folder to write")
    parser.add_argument("--ema", action="store_true", help="export the averaged weights")
    arguments = parser.parse_args(argv)
    try:
        run = load_run(arguments.run, ema=arguments.ema)
        export_hf(run.model, run.tokenizer, arguments.directory)
    except (CheckpointError, ImportError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"step {run.step} of {arguments.run} exported to {arguments.directory}")


if __name__ == "__main__":
    main()
