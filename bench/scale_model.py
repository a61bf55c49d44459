"""What does DoPr add to a step on many GPUs? A model on paper; nothing here is measured.

    python -m bench.scale_model [--hardware h200] [--network 25e9] [--models 1.5B] [--out FOLDER]
    python -m bench.scale_model --measured bench/results/gpu_step_adamw.json    # model against it

Collectives and bytes follow the code (bench/scale/plan.py; tests count them in real processes);
times follow from bench/scale/hardware.py, whose every number can be given here. A GPU takes its
share of the model's batch, but at least --tokens_per_gpu. Exact mode makes P every step, fast mode
as config/gpt2_dopr.py does: every 10 steps, from one token in 8, in blocks as wide as the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.scale.figure import draw
from bench.scale.hardware import HARDWARE, NUMBERS, Hardware
from bench.scale.measured import comparison
from bench.scale.plan import Placement
from bench.scale.shapes import EXACT, FAST, SHAPES, Mode, Shape
from bench.scale.step import Estimate, estimate
from bench.scale.tables import details, overview, sensitivity
from eval.command import command_parser
from optim.dopr.layer import INVERSES
from studies.report.style import save_png

SIZES = (1, 8, 16, 64, 128, 512, 1024, 4096)
SHOWN = (1, 8, 64, 512, 4096)  # in the tables
PLACEMENTS, BASES = ("ddp", "fsdp", "hsdp"), ("adamw", "muon")
DETAILED = {("124M", "ddp", 8), ("124M", "ddp", 64), ("1.5B", "fsdp", 64), ("6.7B", "hsdp", 512)}
DETAILED |= {("13B", "fsdp", 512), ("65B", "fsdp", 512)}


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        hardware = hardware_of(arguments)
        if arguments.measured:
            print(*comparison(arguments.measured, hardware), sep="\n")
            return 0
        report(arguments, hardware)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("bench.scale_model", __doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=[*PLACEMENTS])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=[*BASES])
    parser.add_argument("--gpus", nargs="+", type=int, default=[*SIZES])
    parser.add_argument("--batch_tokens", type=int, help="of a step, instead of each model's own")
    parser.add_argument("--tokens_per_gpu", type=int, default=4096, help="at least, in a step")
    parser.add_argument("--inverse", choices=INVERSES, default="cholesky")
    parser.add_argument("--measured", type=Path, help="a result of bench.step_overhead")
    parser.add_argument("--out", type=Path, default=Path("bench/results/scale_model"))
    parser.add_argument("--hardware", choices=HARDWARE, default="h100")
    for name in NUMBERS:
        parser.add_argument(
            f"--{name}", type=float, metavar="X", help="see bench/scale/hardware.py"
        )
    return parser.parse_args(argv)


def hardware_of(arguments: argparse.Namespace) -> Hardware:
    """The row of the table, with the numbers that were given.

    Raises ValueError for numbers that are not positive.
    """
    given = {name: value for name in NUMBERS if (value := getattr(arguments, name)) is not None}
    counts = {f"gpus={n}": n for n in arguments.gpus} | {
        f"{key}={value}": value
        for key in ("batch_tokens", "tokens_per_gpu")
        if (value := getattr(arguments, key)) is not None
    }
    numbers = {f"{name}={value:g}": value for name, value in given.items()} | counts
    if problems := [text for text, value in numbers.items() if not value > 0]:
        raise ValueError(f"{', '.join(problems)}: must be above 0")
    if "per_node" in given:
        given["per_node"] = int(given["per_node"])
    return replace(HARDWARE[arguments.hardware], **given)


def placements(names: list[str], sizes: list[int], per_node: int) -> list[Placement]:
    """What makes a difference: one GPU is ddp's, hsdp needs two nodes."""
    least = {"ddp": 1, "fsdp": 2, "hsdp": 2 * per_node}
    return [
        Placement(name, size, per_node)
        for name in names
        for size in sorted(sizes)
        if size >= least[name] and (name != "hsdp" or size % per_node == 0)
    ]


def estimates(arguments: argparse.Namespace, hardware: Hardware) -> list[Estimate]:
    batch = {"batch_tokens": arguments.batch_tokens} if arguments.batch_tokens else {}
    shapes: list[Shape] = [replace(SHAPES[name], **batch) for name in arguments.models]
    where = placements(arguments.placements, arguments.gpus, hardware.per_node)
    return [
        estimate(shape, placement, base, mode, hardware, arguments.tokens_per_gpu)
        for shape in shapes
        for placement in where
        for base in arguments.bases
        for mode in modes(arguments)
    ]


def modes(arguments: argparse.Namespace) -> list[Mode]:
    return [mode._replace(inverse=arguments.inverse) for mode in (EXACT, FAST)]


def report(arguments: argparse.Namespace, hardware: Hardware) -> None:
    """Print the tables, write the numbers and the figure."""
    found = estimates(arguments, hardware)
    shown = [size for size in SHOWN if size in arguments.gpus] or sorted(arguments.gpus)
    for base in arguments.bases:
        own = [each for each in found if each.base == base]
        print(f"\nDoPr-{base} on {hardware.name}: exact / fast, in % of the step without DoPr;")
        print("x: does not fit in memory, -: nor does it without DoPr\n")
        print(overview(own, shown))
        print()
        print(details([e for e in own if (e.shape, *e.placement[:2]) in DETAILED]))
    print("\nSensitivity, with AdamW\n")
    print(sensitivity(modes(arguments), hardware, arguments.tokens_per_gpu))
    write(arguments.out, hardware, arguments, found)


def write(
    out: Path, hardware: Hardware, arguments: argparse.Namespace, found: list[Estimate]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    keys = ("tokens_per_gpu", "batch_tokens", "inverse")
    head = {"hardware": asdict(hardware)} | {key: getattr(arguments, key) for key in keys}
    rows = ",\n".join(json.dumps(row_of(each), ensure_ascii=False) for each in found)
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n]\n}}\n'
    (out / "estimates.json").write_text(text)
    save_png(draw(found), out / "estimates.png")
    print(f"\n{out}/estimates.json, {out}/estimates.png")


def row_of(one: Estimate) -> dict[str, Any]:
    """The estimate with three digits of every number; `added` is the share that DoPr adds."""
    row = asdict(one) | {"placement": one.placement.parallel, "gpus": one.placement.size}
    return rounded(row | {"added": one.added, "largest": one.largest})


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
