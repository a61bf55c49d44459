"""GPT-2 models from and to Hugging Face folders on this machine; nothing is ever downloaded.

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

# GPT-2's own settings: what model.py computes. A folder that says otherwise is another model.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # Conv1D keeps (d_in, d_out)
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$")  # the causal mask, in old files


def load_hf(directory: str | Path) -> GPT:
    """The GPT-2 in a local Hugging Face folder (config.json, model.safetensors), in float32.

    Dropout is a choice of training, so it is 0 here.
    Raises ValueError: what is missing, unexpected, of another shape, or not GPT-2.
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
        raise ValueError(f"{path}: no such file; wanted a folder written by save_pretrained()")
    try:
        given = json.loads(path.read_text())
        sizes = {key: given[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        block_size = given.get("n_positions", 1024)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the config of a GPT-2 ({error!r})") from None
    allowed = SUPPORTED | {"n_inner": (None, 4 * sizes["n_embd"])}
    problems = [
        f"{path}: {key}={given[key]!r} is not supported; wanted {' or '.join(map(repr, values))}"
        for key, values in allowed.items()
        if key in given and given[key] not in values
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return GPTConfig(
        **sizes, block_size=block_size, tie_weights=given.get("tie_word_embeddings", True)
    )


def _read_weights(path: Path, tie_weights: bool) -> dict[str, Tensor]:
    """The file's tensors under our names and in our orientation."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; one unsharded safetensors file is wanted: "
            "model.save_pretrained(folder, max_shard_size='100GB') writes it"
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


def _check_weights(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    problems = [f"missing {key}" for key in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected {key}" for key in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{key} is {tuple(found[key].shape)}, config.json says {tuple(wanted[key].shape)}"
        for key in sorted(found.keys() & wanted.keys())
        if found[key].shape != wanted[key].shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit its config: " + "; ".join(problems))


def export_hf(model: GPT, tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write the model and its tokenizer as a Hugging Face folder, same logits and same ids.

    The factors of muP are folded into the weights: what is written is a standard GPT-2.
    Hugging Face's GPT-2 always has biases: a model without gets zeros, which is exact. The exported
    tokenizer takes "<|endoftext|>" in a text for ordinary text, as ours does.
    Raises ValueError if they do not belong together; ImportError without the package `tokenizers`.
    """
    if model.config.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"the model has {model.config.vocab_size} ids, tokenizer {tokenizer.name!r} has "
            f"{tokenizer.n_vocab}: they do not belong together"
        )
    directory = Path(directory)
    if (directory / "checkpoints").exists() or (directory / "manifest.json").exists():
        raise ValueError(f"{directory} holds a run; export into a folder of its own")
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
        "tokenizer_class": "PreTrainedTokenizerFast",  # GPT2Tokenizer ignores the pattern
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "model_max_length": config.block_size,
        "split_special_tokens": True,  # end-of-text comes as an id, never out of a text
        "clean_up_tokenization_spaces": False,
    }


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """tokenizer.json: cut the text by our pattern, map bytes to letters, merge by our ranks."""
    try:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as HFTokenizer
    except ImportError:
        raise ImportError(
            "the export needs transformers: pip install 'transformers>=5.0'"
        ) from None
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
    """Every way to put a token together from two others, lowest rank first: what tiktoken does."""
    return [
        (_letters(token[:cut]), _letters(token[cut:]))
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]


def _letters(token: bytes) -> str:
    """Bytes as GPT-2's files spell them: a printable letter for each byte."""
    return "".join(map(BYTE_LETTERS.__getitem__, token))


def _byte_letters() -> list[str]:
    """The letter of each byte: itself where Latin-1 prints it, else the next one from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b if b in printable else 256 + others.index(b)) for b in range(256)]


BYTE_LETTERS = _byte_letters()


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("eval.hf", __doc__)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("run", help="an out_dir, or one checkpoint's folder")
    parser.add_argument("directory", help="the folder to write")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    arguments = parser.parse_args(argv)
    try:
        run = load_run(arguments.run, ema=arguments.ema)
        export_hf(run.model, run.tokenizer, arguments.directory)
    except (CheckpointError, ImportError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"step {run.step} of {arguments.run} exported to {arguments.directory}")


if __name__ == "__main__":
    main()
