"""Sample text from a trained model.

    python -m eval.sample out/demo/text --prompt "def " --num_samples=3
    python -m eval.sample out/demo/text --prompts prompts.jsonl --out samples.jsonl

A file of prompts has one prompt per line. If its name ends in .jsonl, each line is a JSON object
with the key "prompt". An empty prompt is replaced by the end-of-text token, with which every
document starts.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import Tokenizer
from eval.command import command_parser
from eval.generate import Sampling, generate
from eval.run import load_run
from model import GPT
from trainer.checkpoint.read import CheckpointError


def sample(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    how: Sampling,
    seed: int,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
) -> Iterator[dict[str, Any]]:
    """Continue each prompt and yield rows {prompt, completion, ids} in the order of the prompts.

    A single generator, seeded once, serves all batches. The random numbers of a row therefore
    depend on the seed, on the position of its prompt and on max_new_tokens, but not on batch_size.
    `ids` are the new tokens, with end-of-text as the last one if the model produced it.

    Args:
        how: temperature, top-k, top-p or greedy decoding.
        max_new_tokens: defaults to the number of tokens that fit after the longest prompt.
    Raises:
        ValueError: a prompt is too long to be continued. It is raised before any sampling.
    """
    encoded = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in prompts]
    longest = max(map(len, encoded), default=0)
    room = model.config.block_size - longest
    if room < (max_new_tokens or 1):
        row = [len(ids) for ids in encoded].index(longest)
        raise ValueError(
            f"prompt {row + 1} has {longest} tokens and block_size is {model.config.block_size}: "
            f"{max(room, 0)} new tokens fit, but {max_new_tokens or 1} are needed; "
            "shorten the prompt or set a smaller --max_new_tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        new = generate(
            model,
            encoded[rows],
            room if max_new_tokens is None else max_new_tokens,
            generator=generator,
            stop_token=tokenizer.eot,
            **asdict(how),
        )
        for prompt, ids in zip(prompts[rows], new, strict=True):
            text = tokenizer.decode(ids[:-1] if ids[-1] == tokenizer.eot else ids)
            yield {"prompt": prompt, "completion": text, "ids": ids}


def read_prompts(path: Path) -> list[str]:
    """Read the prompts in a file.

    Raises:
        ValueError: the file cannot be read, or a line of a .jsonl file has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    if path.suffix != ".jsonl":
        return lines
    return [_prompt_of(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(
            f'{where}: expected an object like {{"prompt": "def "}}, but got {line[:60]!r}'
        )
    return prompt


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("eval.sample", __doc__)
    add = parser.add_argument
    add("run", help="a run's out_dir or a checkpoint's folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", help="one prompt; default: start from end-of-text")
    source.add_argument("--prompts", type=Path, help="a file of prompts")
    add("--out", type=Path, help="a file for the samples, as JSON lines; default: print them")
    add("--num_samples", type=int, default=1, help="samples per prompt")
    add("--max_new_tokens", type=int, help="length limit; default: as many as fit into block_size")
    add("--temperature", type=float, default=1.0, help="divides the logits")
    add("--top_k", type=int, help="sample from the k likeliest tokens only")
    add("--top_p", type=float, help="sample from the fewest likeliest tokens with this total mass")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--seed", type=int, default=1337, help="seed of the random numbers")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--batch_size", type=int, default=16, help="samples that are generated at once")
    add("--ema", action="store_true", help="use the averaged weights")
    return parser, parser.parse_args(argv)


def pick_device(name: str) -> str:
    """Resolve "auto" to "cuda" where a CUDA device is available and to "cpu" elsewhere.

    Raises:
        ValueError: "cuda" was requested, but torch finds no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: torch finds no CUDA device; use --device=cpu")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def check(arguments: argparse.Namespace) -> Sampling:
    """Validate the command line and return its sampling settings.

    Raises:
        ValueError: an option is out of range.
    """
    for key in ("num_samples", "batch_size", "max_new_tokens"):
        if (value := getattr(arguments, key)) is not None and value < 1:
            raise ValueError(f"--{key}={value}: must be at least 1")
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed={arguments.seed}: must be in [0, 2^63)")
    if arguments.out and not arguments.out.parent.is_dir():
        raise ValueError(f"--out={arguments.out}: the folder {arguments.out.parent} does not exist")
    sampling = ("temperature", "top_k", "top_p", "greedy")
    return Sampling(**{key: getattr(arguments, key) for key in sampling})


def samples(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of `sample` for a command line, each with the settings that reproduce it."""
    how = check(arguments)
    prompts = read_prompts(arguments.prompts) if arguments.prompts else [arguments.prompt]
    run = load_run(arguments.run, device=pick_device(arguments.device), ema=arguments.ema)
    limit, seed = arguments.max_new_tokens, arguments.seed
    settings = asdict(how) | {"max_new_tokens": limit, "ema": arguments.ema}
    for row in sample(
        run.model,
        run.tokenizer,
        [prompt for prompt in prompts for _ in range(arguments.num_samples)],
        how=how,
        seed=seed,
        max_new_tokens=limit,
        batch_size=arguments.batch_size,
    ):
        yield row | {"step": run.step, "seed": seed, "settings": settings}


def main(argv: list[str] | None = None) -> None:
    parser, arguments = parse(argv)
    try:
        rows = samples(arguments)
        if arguments.out:
            lines = [json.dumps(row) + "\n" for row in rows]
            arguments.out.write_text("".join(lines), encoding="utf-8")
            print(f"{len(lines)} samples written to {arguments.out}")
        else:
            for row in rows:
                print(row["prompt"] + row["completion"], end="\n---\n")
    except (CheckpointError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
