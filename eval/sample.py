"""Sample text from a trained model.

    python -m eval.sample out/demo/text --prompt "def " --num_samples=3
    python -m eval.sample out/demo/text --prompts prompts.jsonl --out samples.jsonl
    python -m eval.sample hf_model --greedy --max_new_tokens=100

The model is a run, one of its checkpoints or a local Hugging Face folder of a GPT-2.
A file of prompts has one prompt per line. If its name ends in .jsonl, each line is a JSON object
with the key "prompt". An empty prompt is replaced by the end-of-text token, with which every
document starts.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.files import write_atomic
from data.schema import OpenSchema, read_json_lines
from data.tokenizer import Tokenizer
from eval.command import (
    DEVICES,
    at_least,
    command_parser,
    output_file,
    pick_device,
    reported_errors,
)
from eval.generate import generate
from eval.run import load_run
from eval.sampling import Sampling
from model import GPT


class PromptRow(OpenSchema):
    prompt: str


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
        max_new_tokens: defaults to the number of tokens that fit after the longest prompt. More
            are generated from a sliding window, see `eval.generate.generate`; a line on stderr
            says so.
    Raises:
        ValueError: a prompt is too long to be continued. It is raised before any sampling.
    """
    encoded = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in prompts]
    longest = max(map(len, encoded), default=0)
    T = model.config.block_size
    n_new = T - longest if max_new_tokens is None else max_new_tokens
    if n_new < 1 or longest > T:
        row = [len(ids) for ids in encoded].index(longest)
        raise ValueError(
            f"prompt {row + 1} has {longest} tokens and block_size is {T}: shorten the prompt, or "
            "set --max_new_tokens if it just fills block_size"
        )
    if longest + n_new > T:
        print(
            f"note: prompt and new tokens exceed block_size={T}; where the context is full, "
            f"generation continues from its last {max(T // 2, 1)} tokens",
            file=sys.stderr,
        )
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        new = generate(
            model,
            encoded[rows],
            n_new,
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
        ValueError: the file cannot be read, a .jsonl file has no line, or a line has no prompt.
    """
    if path.suffix == ".jsonl":
        rows = [row.prompt for _, row in read_json_lines(path, PromptRow, ValueError)]
        if not rows:
            raise ValueError(f"{path}: no prompts")
        return rows
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("eval.sample", __doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run's out_dir, a checkpoint's or a Hugging Face folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", help="one prompt; default: start from end-of-text")
    source.add_argument("--prompts", type=Path, help="a file of prompts")
    add(
        "--out", type=output_file, help="a file for the samples, as JSON lines; default: print them"
    )
    add("--num_samples", type=int, default=1, help="samples per prompt")
    add("--max_new_tokens", type=int, help="length limit; default: until block_size is full")
    add("--temperature", type=float, help="divides the logits; 0 is greedy; default: 1")
    add("--top_k", type=int, help="sample from the k likeliest tokens only")
    add("--top_p", type=float, help="sample from the fewest likeliest tokens with this total mass")
    add("--greedy", action="store_true", help="take the likeliest token; not with the three above")
    add("--seed", type=int, default=1337, help="seed of the random numbers")
    add("--device", choices=DEVICES, default="auto")
    add("--batch_size", type=int, default=16, help="samples that are generated at once")
    add("--ema", action="store_true", help="use the averaged weights")
    dtype_help = "of the weights; CPUs without bfloat16 instructions are slow at it"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    return parser, parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> Sampling:
    """Validate the command line and return its sampling settings.

    Raises:
        ValueError: an option is out of range, or has no effect because of --greedy or
            --temperature=0.
    """
    counts = ("num_samples", "batch_size", "max_new_tokens")
    at_least(1, **{key: getattr(arguments, key) for key in counts})
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed={arguments.seed}: must be in [0, 2^63)")
    found = {key: getattr(arguments, key) for key in ("temperature", "top_k", "top_p")}
    given = {key: value for key, value in found.items() if value is not None}
    is_zero = given.get("temperature") == 0 and not arguments.greedy
    unused = {key: value for key, value in given.items() if not (is_zero and key == "temperature")}
    if unused and (arguments.greedy or is_zero):
        listed = ", ".join(f"--{key}={value:g}" for key, value in unused.items())
        cause = "--temperature=0" if is_zero else "--greedy"
        raise ValueError(
            f"{listed}: no effect with {cause}, which takes the likeliest token; leave out either"
        )
    return Sampling(greedy=arguments.greedy, **given)


def samples(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of `sample` for a command line, each with the settings that reproduce it."""
    how = check(arguments)
    prompts = read_prompts(arguments.prompts) if arguments.prompts else [arguments.prompt]
    run = load_run(arguments.run, device=pick_device(arguments.device), ema=arguments.ema)
    if run.step == 0 and run.config:  # a folder of Hugging Face has no config
        print(
            f"note: checkpoint {run.path} is of step 0, it holds the initial weights",
            file=sys.stderr,
        )
    limit, seed, dtype = arguments.max_new_tokens, arguments.seed, arguments.dtype
    settings = asdict(how) | {"max_new_tokens": limit, "ema": arguments.ema, "dtype": dtype}
    for row in sample(
        run.model.to(getattr(torch, dtype)),
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
    with reported_errors(parser):
        rows = samples(arguments)
        if arguments.out:
            lines = [json.dumps(row) + "\n" for row in rows]
            write_atomic(arguments.out, "".join(lines))
            print(f"{len(lines)} samples written to {arguments.out}")
        else:
            for row in rows:
                print(row["prompt"] + row["completion"], end="\n---\n")


if __name__ == "__main__":
    main()
