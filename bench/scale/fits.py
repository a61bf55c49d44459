"""Find the fewest GPUs on which a model fits, with and without DoPr.

Memory is the least with which it trains: AdamW and micro-batches of one sequence, on up to 8 GPUs,
some nodes of 8, and powers of two. Several GPUs share the weights by FSDP2.
"""

from typing import Any, NamedTuple

from bench.scale.calls import Placement
from bench.scale.hardware import Hardware
from bench.scale.memory import base_bytes, dopr_bytes, peaks
from bench.scale.shapes import MODES, ModelShape
from bench.scale.work import Batch
from eval.tables import markdown
from optim.dopr.settings import Sharing

SIZES = (*range(1, 9), *range(16, 136, 8), *(2**i for i in range(8, 13)))
MARGIN = 1.1  # the rule to test: DoPr fits if a GPU has 10 % more than training without it needs
ALONE, WITH_MARGIN = "AdamW", "AdamW + 10 %"


class Need(NamedTuple):
    """The peak bytes of a GPU, by setting: without DoPr, with a margin, and with each mode."""

    shape: str
    placement: Placement
    n_bytes: dict[str, float]


def needs(shape: ModelShape) -> list[Need]:
    """Return the needs of a model with FSDP2, and with HSDP over 8 GPUs per copy."""
    sharded = [Placement("fsdp" if size > 1 else "ddp", size) for size in SIZES]
    return [need(shape, placement) for placement in (*sharded, Placement("hsdp", 16))]


def need(shape: ModelShape, placement: Placement) -> Need:
    batch = Batch(shape, placement.size, min_tokens=1, max_micro_tokens=shape.block_size)
    base = base_bytes(shape, placement, "adamw", batch)
    choices: dict[str, Sharing] = {"": "auto", ", replicated": "replicated"}
    found: dict[str, float] = {}
    for suffix, statistics in choices.items():
        placed = placement._replace(statistics=statistics)
        for mode in MODES:
            alone, with_dopr = peaks(base, dopr_bytes(shape, mode, placed), batch.n_micro)
            found |= {ALONE: alone, WITH_MARGIN: MARGIN * alone, mode.name + suffix: with_dopr}
    return Need(shape.name, placement, found)


def fewest(found: list[Need], hardware: list[Hardware]) -> str:
    """Tabulate the fewest GPUs with FSDP2 on which each setting fits, by model and hardware."""
    rows = []
    for shape in dict.fromkeys(each.shape for each in found):
        own = [each for each in found if each.shape == shape and each.placement.parallel != "hsdp"]
        for gpu in hardware:
            room = gpu.memory * gpu.usable_memory
            sizes = (
                next((n.placement.size for n in own if n.n_bytes[key] <= room), "none")
                for key in own[0].n_bytes
            )
            rows.append([f"{shape} {gpu.name}", *map(str, sizes)])
    return markdown(["", *found[0].n_bytes], rows)


def gigabytes(found: list[Need], sizes: list[int]) -> str:
    """Tabulate GB without DoPr and with each mode, at some numbers of GPUs with FSDP2."""
    keys = [ALONE, *(mode.name for mode in MODES)]
    rows: dict[str, list[str]] = {}
    for each in found:
        if each.placement.size in sizes and each.placement.parallel != "hsdp":
            cell = " / ".join(f"{each.n_bytes[key] / 1e9:.3g}" for key in keys)
            rows.setdefault(each.shape, [each.shape]).append(cell)
    return markdown([" / ".join(keys), *map(str, sizes)], list(rows.values()))


def row_of(each: Need) -> dict[str, Any]:
    """Return the need as a dict, in GB."""
    gb = {key: n_bytes / 1e9 for key, n_bytes in each.n_bytes.items()}
    place = {"placement": each.placement.parallel, "gpus": each.placement.size}
    return {"shape": each.shape} | place | {"GB": gb}
