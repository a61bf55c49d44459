"""The estimates as Markdown, for people."""

from __future__ import annotations

from dataclasses import replace

from bench.scale.hardware import Hardware
from bench.scale.plan import Placement
from bench.scale.shapes import SHAPES, Mode
from bench.scale.step import Estimate, estimate
from eval.tables import markdown

POINTS = (  # where the sensitivity is shown: model, placement, GPUs, mode
    ("124M", "ddp", 8, 0),
    ("124M", "ddp", 8, 1),
    ("1.5B", "fsdp", 64, 0),
    ("1.5B", "fsdp", 64, 1),
    ("6.7B", "hsdp", 512, 1),
)
KNOBS = {
    "network bandwidth": ("network",),
    "NVLink bandwidth": ("nvlink",),
    "hop latency": ("nvlink_hop", "network_hop"),
    "speed of inverses": ("cholesky_fraction", "newton_fraction"),
    "speed of Σ z zᵀ": ("gram_fraction",),
    "speed of G P": ("apply_fraction",),
    "speed of memory": ("memory_fraction",),
    "speed of forward, backward": ("mfu",),
    "tokens": (),
}


def percent(share: float) -> str:
    """Two digits."""
    value = 100 * share
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"


def overview(found: list[Estimate], sizes: list[int]) -> str:
    """What DoPr adds, in %, exact / fast, by model, placement and number of GPUs."""
    cells = {(e.shape, e.placement.parallel, e.placement.size, e.mode): e for e in found}
    rows = []
    for shape, parallel in dict.fromkeys((e.shape, e.placement.parallel) for e in found):
        row = [f"{shape} {parallel}"]
        for size in sizes:
            pair = [cells.get((shape, parallel, size, mode)) for mode in ("exact", "fast")]
            row.append(" / ".join(map(cell, pair)) if all(pair) else "")
        rows.append(row)
    return markdown(["% of a step", *(f"{size} GPU{'s' * (size > 1)}" for size in sizes)], rows)


def cell(one: Estimate | None) -> str:
    """The share; x: does not fit because of DoPr, -: not even without."""
    if one is None or one.fits == "no":
        return "-"
    return percent(one.added) if one.fits == "yes" else "x"


def details(found: list[Estimate]) -> str:
    """Times, bytes and the largest term of each estimate."""
    header = ["", "GPUs", "mode", "ms without", "DoPr, ms", "largest term", "GB sent", "GB held"]
    return markdown(
        header,
        [
            [
                f"{e.shape} {e.placement.parallel}",
                str(e.placement.size),
                e.mode,
                f"{1e3 * sum(e.base_s.values()):.0f}",
                f"{1e3 * sum(e.dopr_s.values()):.1f}",
                f"{e.largest} {percent(e.dopr_s[e.largest] / sum(e.dopr_s.values()))} %",
                f"{e.base_sent / 1e9:.1f} + {e.dopr_sent / 1e9:.2f}",
                f"{e.base_bytes / 1e9:.0f} -> {e.dopr_bytes / 1e9:.0f}",
            ]
            for e in found
        ],
    )


def sensitivity(modes: list[Mode], hardware: Hardware, least: int) -> str:
    """What DoPr-AdamW adds at POINTS, in %, if a number is half or twice what is assumed."""
    header = [
        "half ... twice the assumed",
        *(f"{shape} {how} {size} {modes[mode].name}" for shape, how, size, mode in POINTS),
    ]
    rows = [["as assumed", *(percent(added(p, modes, hardware, least)) for p in POINTS)]]
    for name in KNOBS:
        ends = [
            [added(p, modes, *scaled(name, f, hardware, least)) for p in POINTS] for f in (0.5, 2)
        ]
        rows.append([name, *(f"{percent(a)} ... {percent(b)}" for a, b in zip(*ends, strict=True))])
    return markdown(header, rows)


def scaled(name: str, factor: float, hardware: Hardware, least: int) -> tuple:
    """The hardware with one number changed, the least tokens of a GPU, and the batch's factor."""
    changed = {key: getattr(hardware, key) * factor for key in KNOBS[name]}
    of_batch = factor if name == "tokens" else 1.0
    return replace(hardware, **changed), int(least * of_batch), of_batch


def added(
    point: tuple[str, str, int, int],
    modes: list[Mode],
    hardware: Hardware,
    least: int,
    of_batch: float = 1.0,
) -> float:
    name, parallel, size, mode = point
    shape = SHAPES[name]
    shape = replace(shape, batch_tokens=int(shape.batch_tokens * of_batch))
    placement = Placement(parallel, size, hardware.per_node)
    return estimate(shape, placement, "adamw", modes[mode], hardware, least).added
