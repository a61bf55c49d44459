"""Format estimates as Markdown tables."""

from dataclasses import replace

from bench.scale.calls import Placement
from bench.scale.hardware import Hardware
from bench.scale.shapes import MODES, SHAPES, DoprMode
from bench.scale.step import StepEstimate, estimate
from eval.tables import markdown

# The points of the sensitivity table: model, placement, GPUs, mode (the index of one of MODES).
POINTS = (
    ("124M", "ddp", 8, 0),
    ("124M", "ddp", 8, 1),
    ("124M", "ddp", 8, 2),
    ("1.5B", "fsdp", 64, 0),
    ("1.5B", "fsdp", 64, 1),
    ("1.5B", "fsdp", 64, 2),
)
KNOBS = {  # row of the sensitivity table: fields of Hardware
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
    """Format a share in percent, with about two digits."""
    value = 100 * share
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"


def overview(estimates: list[StepEstimate], sizes: list[int]) -> str:
    """Tabulate the percentage that DoPr adds in each of MODES by model, placement and GPUs."""
    cells = {(e.shape, e.placement.parallel, e.placement.size, e.mode): e for e in estimates}
    rows = []
    for shape, parallel in dict.fromkeys((e.shape, e.placement.parallel) for e in estimates):
        row = [f"{shape} {parallel}"]
        for size in sizes:
            found = [cells.get((shape, parallel, size, mode.name)) for mode in MODES]
            row.append(" / ".join(map(cell, found)) if all(found) else "")
        rows.append(row)
    return markdown(["% of a step", *(f"{size} GPU{'s' * (size > 1)}" for size in sizes)], rows)


def cell(one: StepEstimate | None) -> str:
    """Format the share that DoPr adds; "x" if only DoPr does not fit, "-" if the model does not."""
    if one is None or one.fits == "no":
        return "-"
    return percent(one.added) if one.fits == "yes" else "x"


def details(estimates: list[StepEstimate]) -> str:
    """Tabulate times, bytes and the largest term of each estimate."""
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
            for e in estimates
        ],
    )


def sensitivity(modes: list[DoprMode], hardware: Hardware, min_tokens: int) -> str:
    """Tabulate the percentage that DoPr-AdamW adds if one number is halved or doubled."""
    header = [
        "half ... twice the assumed",
        *(
            f"{shape} {parallel} {size} {modes[mode].name}"
            for shape, parallel, size, mode in POINTS
        ),
    ]
    rows = [["as assumed", *(percent(added(p, modes, hardware, min_tokens)) for p in POINTS)]]
    for name in KNOBS:
        low, high = (
            [added(p, modes, *scaled(name, factor, hardware, min_tokens)) for p in POINTS]
            for factor in (0.5, 2)
        )
        cells = (f"{percent(a)} ... {percent(b)}" for a, b in zip(low, high, strict=True))
        rows.append([name, *cells])
    return markdown(header, rows)


def scaled(name: str, factor: float, hardware: Hardware, min_tokens: int) -> tuple:
    """Return the scaled hardware, the least tokens per GPU, and the factor of the batch size."""
    changed = {key: getattr(hardware, key) * factor for key in KNOBS[name]}
    batch_factor = factor if name == "tokens" else 1.0
    return replace(hardware, **changed), int(min_tokens * batch_factor), batch_factor


def added(
    point: tuple[str, str, int, int],
    modes: list[DoprMode],
    hardware: Hardware,
    min_tokens: int,
    batch_factor: float = 1.0,
) -> float:
    """Return the share that DoPr-AdamW adds at one of POINTS."""
    name, parallel, size, mode = point
    shape = SHAPES[name]
    shape = replace(shape, batch_tokens=int(shape.batch_tokens * batch_factor))
    placement = Placement(parallel, size, hardware.per_node)
    return estimate(shape, placement, "adamw", modes[mode], hardware, min_tokens).added
