"""The model against what bench/step_overhead.py measured, on one GPU or CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.scale.hardware import Hardware
from bench.scale.plan import Placement
from bench.scale.shapes import Mode, Shape
from bench.scale.step import estimate
from bench.step_overhead import PRESETS, Preset

ALONE = Placement("ddp", 1)


def comparison(path: Path, hardware: Hardware) -> Iterator[str]:
    """A line for each row and mode: milliseconds, and the ratio to the step without DoPr.

    Raises ValueError for a file that is not step_overhead's, or of a batch that no preset has.
    """
    for row in rows_of(path):
        preset = preset_of(row, path)
        what = f"{hardware.name}, width {row['width']} {row['optimizer']}"
        for mode in modes(preset, row.get("inverse", "cholesky")):
            shape = shape_of(preset, row["width"])
            one = estimate(shape, ALONE, row["optimizer"], mode, hardware, least=1)
            base = 1e3 * sum(one.base_s.values())
            found = row["step_ms"]
            yield (
                f"{what}  base: model {base:.3g} ms, measured {found['base']:.3g}  {mode.name}: "
                f"model {base * (1 + one.added):.3g} ms ({1 + one.added:.3f}), "
                f"measured {found[mode.name]:.3g} ({row['ratio'][mode.name]:.3f})"
            )


def rows_of(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text())
        rows = content["rows"]
        return [{"tokens": content.get("tokens")} | row for row in rows if row["step_ms"]["base"]]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a result of bench.step_overhead ({type(error).__name__}: {error}); "
            "make one with python -m bench.step_overhead --out FILE"
        ) from error


def preset_of(row: dict[str, Any], path: Path) -> Preset:
    """The preset whose steps have as many tokens."""
    sizes = {p.micro_batch_size * p.accumulation * p.block_size: p for p in PRESETS.values()}
    if row["tokens"] not in sizes:
        raise ValueError(
            f"{path}: tokens={row['tokens']}; a preset has {', '.join(map(str, sizes))}"
        )
    return sizes[row["tokens"]]


def shape_of(preset: Preset, width: int) -> Shape:
    micro = preset.micro_batch_size * preset.block_size
    sizes = (preset.n_layer, width // preset.head_width, width, preset.block_size)
    return Shape(f"{width} wide", *sizes, micro * preset.accumulation, micro, preset.vocab_size)


def modes(preset: Preset, inverse: str) -> list[Mode]:
    """Those of step_overhead."""
    every = preset.refresh_every
    return [
        Mode("exact", inverse=inverse),
        Mode("fast", every, every, preset.token_stride, blocks_of_width=True, inverse=inverse),
    ]
