"""Compare the cost model with measurements of bench/step_overhead.py on one device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.scale.hardware import Hardware
from bench.scale.plan import Placement
from bench.scale.shapes import DoprMode, ModelShape
from bench.scale.step import estimate
from bench.step_overhead import PRESETS, StepPreset

ONE_DEVICE = Placement("ddp", 1)


def comparison(path: Path, hardware: Hardware) -> Iterator[str]:
    """Yield a line for each row and mode: milliseconds, and the ratio to the step without DoPr.

    Raises ValueError if the file is not a result of step_overhead, or if no preset has its batch.
    """
    for row in read_rows(path):
        preset = preset_of(row, path)
        label = f"{hardware.name}, width {row['width']} {row['optimizer']}"
        for mode in modes(preset, row.get("inverse", "cholesky")):
            shape = shape_of(preset, row["width"])
            one = estimate(shape, ONE_DEVICE, row["optimizer"], mode, hardware, min_tokens=1)
            base_ms = 1e3 * sum(one.base_s.values())
            measured_ms = row["step_ms"]
            yield (
                f"{label}  base: model {base_ms:.3g} ms, measured {measured_ms['base']:.3g}  "
                f"{mode.name}: model {base_ms * (1 + one.added):.3g} ms ({1 + one.added:.3f}), "
                f"measured {measured_ms[mode.name]:.3g} ({row['ratio'][mode.name]:.3f})"
            )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a result of bench.step_overhead."""
    try:
        content = json.loads(path.read_text())
        rows = content["rows"]
        return [{"tokens": content.get("tokens")} | row for row in rows if row["step_ms"]["base"]]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a result of bench.step_overhead ({type(error).__name__}: {error}); "
            "write one with python -m bench.step_overhead --out FILE"
        ) from error


def preset_of(row: dict[str, Any], path: Path) -> StepPreset:
    """Return the preset whose steps have the tokens of the row."""
    presets = {p.micro_batch_size * p.accumulation * p.block_size: p for p in PRESETS.values()}
    if row["tokens"] not in presets:
        tokens = ", ".join(map(str, presets))
        raise ValueError(f"{path}: tokens={row['tokens']}, but the presets have {tokens}")
    return presets[row["tokens"]]


def shape_of(preset: StepPreset, width: int) -> ModelShape:
    micro = preset.micro_batch_size * preset.block_size
    sizes = (preset.n_layer, width // preset.head_width, width, preset.block_size)
    return ModelShape(
        f"{width} wide", *sizes, micro * preset.accumulation, micro, preset.vocab_size
    )


def modes(preset: StepPreset, inverse: str) -> list[DoprMode]:
    """Return the modes of bench.step_overhead."""
    every = preset.refresh_every
    return [
        DoprMode("exact", inverse=inverse),
        DoprMode("fast", every, every, preset.token_stride, blocks_of_width=True, inverse=inverse),
    ]
