"""Compare the speed of our generation with Hugging Face's, in tokens per second.

    python -m bench.generation [--sizes demo gpt2] [--dtypes float32 bfloat16]
                               [--batches 1 16 64] [--rounds 9] [--out FILE]

Both sides run the same weights in one process and in the same dtype: a GPT with random weights,
because speed does not depend on their values, and its export through eval/hf.py. Both get the same
prompts and use no stop token and no truncation of the distribution. The two sides alternate, and
the order within a round alternates too. Size gpt2 runs a third of the rounds. The result has the
median tokens per second, and the median and the quartiles over rounds of the ratio within a round.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from bench.arguments import bench_parser
from bench.results import write_rows
from data.tokenizer import byte_tokenizer
from eval.generate import generate
from eval.hf import export_hf
from model import GPT, GPTConfig
from trainer.provenance import provenance

SIZES: dict[str, dict[str, Any]] = {
    "demo": {"vocab_size": 8192, "block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 128},
    "gpt2": {"vocab_size": 50304, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768},
}
TOKENS = {"demo": (16, 64), "gpt2": (4, 8)}  # prompt tokens, new tokens
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Generate = Callable[[list[list[int]], int, bool], list[list[int]]]


def make_pair(size: str, dtype: torch.dtype) -> dict[str, Generate]:
    """Return our function and Hugging Face's to generate with the same random weights."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES[size], bias=False)).eval()
    with tempfile.TemporaryDirectory() as folder:
        export_hf(model, byte_tokenizer(), folder)
        exported: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(dtype)
    exported.generation_config.eos_token_id = None  # so that no row stops early

    def ours(prompts: list[list[int]], n: int, greedy: bool) -> list[list[int]]:
        return generate(model, prompts, n, greedy=greedy)

    def hugging_face(prompts: list[list[int]], n: int, greedy: bool) -> list[list[int]]:
        x = torch.tensor(prompts)
        options = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        mask = torch.ones_like(x)
        y = exported.generate(x, attention_mask=mask, max_new_tokens=n, pad_token_id=0, **options)
        return y[:, x.size(1) :].tolist()

    return {"ours": ours, "hugging_face": hugging_face}


def agreement(pair: dict[str, Generate], prompts: list[list[int]], n: int) -> float:
    """Return the share of equal greedy tokens: 1 except where rounding changes the likeliest."""
    ours, theirs = (torch.tensor(side(prompts, n, True)) for side in pair.values())
    return (ours == theirs).double().mean().item()


def measure(
    pair: dict[str, Generate], prompts: list[list[int]], n: int, greedy: bool, rounds: int
) -> dict[str, Any]:
    """Return the tokens per second of both sides and their ratio."""
    speeds: dict[str, list[float]] = {side: [] for side in pair}
    for round_number in range(rounds + 1):
        sides = list(pair) if round_number % 2 else list(pair)[::-1]
        for side in sides:
            started = time.perf_counter()
            new_tokens = pair[side](prompts, n, greedy)
            seconds = time.perf_counter() - started
            lengths = [len(row) for row in new_tokens]
            if lengths != [n] * len(prompts):
                found = sorted({*lengths})
                raise RuntimeError(f"{side}: generated rows of {found} tokens, expected {n}")
            if round_number:  # the first round warms up
                speeds[side].append(len(prompts) * n / seconds)
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]  # > 1: ours is faster
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "tokens_per_s": {side: round(statistics.median(s)) for side, s in speeds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
    }


def main() -> None:
    parser = bench_parser("generation", __doc__, rounds=9)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds={arguments.rounds}: must be at least 2, for the quartiles")
    transformers.logging.set_verbosity_error()
    rows = []
    for size, dtype in itertools.product(arguments.sizes, arguments.dtypes):
        pair, (prompt, n) = make_pair(size, DTYPES[dtype]), TOKENS[size]
        rounds = arguments.rounds if size == "demo" else max(2, arguments.rounds // 3)
        for batch in arguments.batches:
            prompts = torch.randint(SIZES[size]["vocab_size"], (batch, prompt)).tolist()
            equal = agreement(pair, prompts, n)
            for name, greedy in (("sampled", False), ("greedy", True)):
                row = {"size": size, "dtype": dtype, "batch": batch, "mode": name}
                row["rounds"] = rounds
                row |= measure(pair, prompts, n, greedy, rounds) | {"greedy_agreement": equal}
                rows.append(row)
                print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
    result = provenance(torch.device("cpu")) | {"transformers": transformers.__version__}
    result |= {"load_average": os.getloadavg(), "sizes": SIZES, "tokens": TOKENS}
    write_rows(arguments.out, result, rows)


if __name__ == "__main__":
    main()
