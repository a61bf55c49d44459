"""Estimate the time that DoPr adds to a step on many GPUs. This command measures nothing.

    python -m bench.scale_model [--hardware h200] [--network 25e9] [--models 1.5B] [--out FOLDER]
    python -m bench.scale_model --measured bench/results/gpu_step_adamw.json    # compare with it

Collectives and bytes come from the code that trains (plan.py and base_plan.py); tests count them in
real runs. Times follow from the numbers in bench/scale/hardware.py, each of which has an option.
The GPUs share a model's batch, but each gets at least --tokens_per_gpu. Exact mode computes P every
step. Sampled mode computes P every 10 steps from one token in 8, in blocks as wide as the model.
Fresh mean is sampled mode with fresh_mean=True, the settings of config/gpt2_dopr.py. Statistics are
sharded under FSDP2 and HSDP, unless --statistics=replicated.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.scale import fits
from bench.scale.calls import Placement
from bench.scale.figure import draw
from bench.scale.hardware import HARDWARE, NUMBERS, Hardware
from bench.scale.measured import comparison
from bench.scale.shapes import MODES, SHAPES, DoprMode, ModelShape
from bench.scale.step import StepEstimate, estimate
from bench.scale.tables import details, overview, sensitivity
from eval.command import command_parser
from optim.dopr.settings import INVERSES, STATISTICS, Sharing
from studies.report.style import save_png

SIZES = (1, 8, 16, 64, 128, 512, 1024, 4096)
SHOWN = (1, 8, 64, 512, 4096)  # sizes in the tables
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
    parser.add_argument(
        "--batch_tokens", type=int, help="tokens per step; default: the model's own"
    )
    parser.add_argument(
        "--tokens_per_gpu", type=int, default=4096, help="least tokens per GPU and step"
    )
    parser.add_argument("--inverse", choices=INVERSES, default="cholesky")
    parser.add_argument("--statistics", choices=STATISTICS[:2], default=STATISTICS[0])
    parser.add_argument(
        "--measured", type=Path, help="compare with a result of bench.step_overhead"
    )
    parser.add_argument("--out", type=Path, default=Path("out/scale_model"), help="folder")
    parser.add_argument("--hardware", choices=HARDWARE, default="h100")
    for name in NUMBERS:
        parser.add_argument(
            f"--{name}", type=float, metavar="X", help="see bench/scale/hardware.py"
        )
    return parser.parse_args(argv)


def hardware_of(arguments: argparse.Namespace) -> Hardware:
    """Return the chosen hardware with the numbers given as options.

    Raises ValueError if a number is not positive.
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
        if given["per_node"] % 1:
            raise ValueError(f"per_node={given['per_node']:g}: must be a whole number")
        given["per_node"] = int(given["per_node"])
    return replace(HARDWARE[arguments.hardware], **given)


def placements(
    names: list[str], sizes: list[int], per_node: int, statistics: Sharing = "auto"
) -> list[Placement]:
    """Return the placements that differ: one GPU counts as ddp, and hsdp needs two nodes."""
    min_size = {"ddp": 1, "fsdp": 2, "hsdp": 2 * per_node}
    return [
        Placement(name, size, per_node, statistics)
        for name in names
        for size in sorted(sizes)
        if size >= min_size[name] and (name != "hsdp" or size % per_node == 0)
    ]


def estimates(arguments: argparse.Namespace, hardware: Hardware) -> list[StepEstimate]:
    batch = {"batch_tokens": arguments.batch_tokens} if arguments.batch_tokens else {}
    shapes: list[ModelShape] = [replace(SHAPES[name], **batch) for name in arguments.models]
    all_placements = placements(
        arguments.placements, arguments.gpus, hardware.per_node, arguments.statistics
    )
    return [
        estimate(shape, placement, base, mode, hardware, arguments.tokens_per_gpu)
        for shape in shapes
        for placement in all_placements
        for base in arguments.bases
        for mode in modes(arguments)
    ]


def modes(arguments: argparse.Namespace) -> list[DoprMode]:
    return [mode._replace(inverse=arguments.inverse) for mode in MODES]


def report(arguments: argparse.Namespace, hardware: Hardware) -> None:
    """Print the tables, and write the numbers and the figure."""
    rows = estimates(arguments, hardware)
    shown = [size for size in SHOWN if size in arguments.gpus] or sorted(arguments.gpus)
    for base in arguments.bases:
        base_rows = [row for row in rows if row.base == base]
        names = " / ".join(mode.name for mode in MODES)
        print(f"\nDoPr-{base} on {hardware.name}: {names}, in % of the step without DoPr;")
        print("x: does not fit in memory with DoPr, -: does not fit even without DoPr\n")
        print(overview(base_rows, shown))
        print()
        print(details([row for row in base_rows if (row.shape, *row.placement[:2]) in DETAILED]))
    print("\nSensitivity, with AdamW\n")
    print(sensitivity(modes(arguments), hardware, arguments.tokens_per_gpu))
    needs = [need for name in arguments.models for need in fits.needs(SHAPES[name])]
    print("\nGB per GPU with micro-batches of one sequence, by number of GPUs with FSDP2\n")
    print(fits.gigabytes(needs, list(SHOWN)))
    print("\nThe fewest GPUs on which a model fits, with FSDP2\n")
    print(fits.fewest(needs, [HARDWARE["h100"], HARDWARE["h200"]]))
    write(arguments.out, hardware, arguments, rows, needs)


def write(
    out: Path,
    hardware: Hardware,
    arguments: argparse.Namespace,
    rows: list[StepEstimate],
    needs: list[fits.Need],
) -> None:
    """Write estimates.json, with one row per line, and estimates.png."""
    out.mkdir(parents=True, exist_ok=True)
    keys = ("tokens_per_gpu", "batch_tokens", "inverse", "statistics")
    header = {"hardware": asdict(hardware)} | {key: getattr(arguments, key) for key in keys}
    text = json.dumps(header, indent=1)[:-2]
    parts = {"rows": map(row_of, rows), "memory": (rounded(fits.row_of(each)) for each in needs)}
    for name, part in parts.items():
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in part)
        text += f',\n "{name}": [\n{lines}\n]'
    (out / "estimates.json").write_text(text + "\n}\n")
    save_png(draw(rows), out / "estimates.png")
    print(f"\n{out}/estimates.json, {out}/estimates.png")


def row_of(one: StepEstimate) -> dict[str, Any]:
    """Return the estimate as a dict, with every number rounded to three digits."""
    row = asdict(one) | {"placement": one.placement.parallel, "gpus": one.placement.size}
    return rounded(row | {"added": one.added, "largest": one.largest})


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
