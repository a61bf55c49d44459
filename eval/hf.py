"""Export GPT-2 models as local Hugging Face folders; eval/hf_import.py loads such folders.

    python -m eval.hf export out/demo/text DIR

writes a folder that `AutoModelForCausalLM.from_pretrained(DIR)` and `AutoTokenizer` load directly.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.files import fsync
from data.imported_tokenizers import HFTokenizer, byte_letters
from data.tokenizer import END_OF_TEXT, Tokenizer
from eval.command import command_parser, output_folder, reported_errors
from eval.hf_import import TRANSPOSED, HFConfig
from eval.mup_export import folded_weights
from eval.run import load_run
from model import GPT, GPTConfig

WEIGHTS = "model.safetensors"
BYTE_LETTERS = {byte: letter for letter, byte in byte_letters().items()}


def export_hf(
    model: GPT, tokenizer: Tokenizer, directory: str | Path, *, overwrite: bool = False
) -> None:
    """Write the model and its tokenizer as a Hugging Face folder with the same logits and ids.

    The result is a standard GPT-2: the multipliers of muP are folded into the weights. Hugging
    Face's GPT-2 always has biases, so a model without biases gets zeros. The exported tokenizer
    reads "<|endoftext|>" in a text as ordinary text, like `data.tokenizer.Tokenizer`.

    The files are written to a temporary folder in `directory` and moved when all are complete, so
    that an export that fails leaves an earlier one intact.

    Args:
        overwrite: replace an earlier export in `directory`; its other files are kept.
    Raises:
        ValueError: the model has fewer ids than the tokenizer, `directory` contains a run, or it is
            not empty and `overwrite` is False.
        ImportError: the package `tokenizers` is not installed.
        OSError: a file could not be written.
    """
    if model.config.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"the model has {model.config.vocab_size} ids, but tokenizer {tokenizer.name!r} has "
            f"{tokenizer.n_vocab}; export a model with its own tokenizer"
        )
    directory = Path(directory)
    check_target(directory, overwrite=overwrite)
    texts = {
        "tokenizer_config.json": _to_json(_tokenizer_config(model.config)),
        "config.json": _to_json(_model_config(model.config, tokenizer.eot)),
        "generation_config.json": _to_json(_end_of_text_ids(tokenizer.eot)),
    }
    is_theirs = isinstance(tokenizer, HFTokenizer)
    if not is_theirs:
        texts["tokenizer.json"] = _tokenizer_json(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    with _moved_when_complete(directory) as partial:
        if is_theirs:
            tokenizer.save(partial / "tokenizer.json")
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        try:
            save_file(_hf_weights(model), partial / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # for example a full disk
            raise OSError(f"{directory / WEIGHTS} could not be written: {error}") from error


def export_run(source: Path, target: Path, *, ema: bool, overwrite: bool = False) -> None:
    """Export a run's newest checkpoint, or a checkpoint's folder, and print what was done.

    Raises what `load_run` and `export_hf` raise.
    """
    check_target(target, overwrite=overwrite)  # before the weights are loaded
    run = load_run(source, ema=ema)
    export_hf(run.model, run.tokenizer, target, overwrite=overwrite)
    print(f"step {run.step} of {source} exported to {target}")


def check_target(directory: Path, *, overwrite: bool) -> None:
    """Raise ValueError if `directory` contains a run, or files and `overwrite` is False."""
    if (directory / "checkpoints").exists() or (directory / "manifest.json").exists():
        raise ValueError(f"{directory} contains a run; export to another folder")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise ValueError(
            f"{directory} is not empty; export to another folder, or replace an earlier export "
            "with `python -m eval.hf export ... --overwrite`"
        )


@contextmanager
def _moved_when_complete(directory: Path) -> Iterator[Path]:
    """Create a temporary folder in `directory`; without an error, move its files up."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as name:
        yield Path(name)
        files = [*Path(name).iterdir()]
        for path in files:
            fsync(path)
        for path in files:
            path.replace(directory / path.name)
    fsync(directory)


def _hf_weights(model: GPT) -> dict[str, Tensor]:
    weights = {}
    for key, tensor in folded_weights(model).items():
        weights[key] = (tensor.T if TRANSPOSED.search(key) else tensor).contiguous()
        if not model.config.bias and re.search(r"\.(ln_\w|c_\w+)\.weight$", key):
            weights[key.removesuffix("weight") + "bias"] = torch.zeros(weights[key].shape[-1])
    return weights


def _model_config(config: GPTConfig, eot: int) -> dict[str, Any]:
    settings = HFConfig(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        tie_word_embeddings=config.tie_weights,
    )
    return {
        "architectures": ["GPT2LMHeadModel"],
        **settings.model_dump(),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
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
        from tokenizers import Tokenizer as LibraryTokenizer
    except ImportError:
        raise ImportError("the export needs tokenizers: pip install 'tokenizers>=0.22'") from None
    vocab = {_letters(token): rank for token, rank in tokenizer.ranks.items()}
    vocab[END_OF_TEXT] = tokenizer.eot
    bpe = models.BPE(vocab=vocab, merges=_merges(tokenizer.ranks), ignore_merges=True)
    result: Any = LibraryTokenizer(bpe)
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


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("eval.hf", __doc__)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("run", type=Path, help="a run's out_dir or a checkpoint's folder")
    parser.add_argument("directory", type=output_folder, help="the folder to write")
    parser.add_argument("--ema", action="store_true", help="export the averaged weights")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier export in the folder, whose other files are kept",
    )
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        export_run(
            *(arguments.run, arguments.directory), ema=arguments.ema, overwrite=arguments.overwrite
        )


if __name__ == "__main__":
    main()
