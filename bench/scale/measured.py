"""Compare the cost model with measurements of bench/step_overhead.py on one device."""

from collections.abc import Iterator
from pathlib import Path

from bench.scale.calls import Placement
from bench.scale.hardware import Hardware
from bench.scale.shapes import DoprMode, ModelShape
from bench.scale.step import estimate
from bench.step_overhead import PRESETS, StepPreset
from data.schema import OpenSchema, read_json
from data.shards import DataError

ONE_DEVICE = Placement("ddp", 1)


class ModeTimes(OpenSchema):
    """Milliseconds per step, without DoPr and in each mode."""

    base: float
    exact: float
    sampled: float


class ModeRatios(OpenSchema):
    """The step times relative to the step without DoPr."""

    exact: float
    sampled: float


class MeasuredRow(OpenSchema):
    """The keys of a row that are compared with the model."""

    width: int
    optimizer: str
    inverse: str = "cholesky"
    tokens: int | None = None
    step_ms: ModeTimes
    ratio: ModeRatios


class Measurements(OpenSchema):
    """A result of bench.step_overhead. In older ones, all rows have the same tokens."""

    tokens: int | None = None
    rows: list[MeasuredRow]


def comparison(path: Path, hardware: Hardware) -> Iterator[str]:
    """Yield a line for each row and mode: milliseconds, and the ratio to the step without DoPr.

    Raises ValueError if the file is not a result of step_overhead, or if no preset has its batch.
    """
    try:
        result = read_json(path, Measurements)
    except DataError as problem:
        command = "python -m bench.step_overhead --out FILE"
        raise ValueError(f"{problem}; write a measurement with {command}") from None
    for row in result.rows:
        preset = preset_of(row.tokens or result.tokens, path)
        label = f"{hardware.name}, width {row.width} {row.optimizer}"
        for mode in modes(preset, row.inverse):
            shape = shape_of(preset, row.width)
            one = estimate(shape, ONE_DEVICE, row.optimizer, mode, hardware, min_tokens=1)
            base_ms = 1e3 * sum(one.base_s.values())
            yield (
                f"{label}  base: model {base_ms:.3g} ms, measured {row.step_ms.base:.3g}  "
                f"{mode.name}: model {base_ms * (1 + one.added):.3g} ms ({1 + one.added:.3f}), "
                f"measured {getattr(row.step_ms, mode.name):.3g} "
                f"({getattr(row.ratio, mode.name):.3f})"
            )


def preset_of(tokens: int | None, path: Path) -> StepPreset:
    """Return the preset whose steps have that many tokens."""
    presets = {p.micro_batch_size * p.accumulation * p.block_size: p for p in PRESETS.values()}
    if tokens not in presets:
        known = ", ".join(map(str, presets))
        raise ValueError(f"{path}: tokens={tokens}, but the presets have {known}")
    return presets[tokens]


def shape_of(preset: StepPreset, width: int) -> ModelShape:
    micro = preset.micro_batch_size * preset.block_size
    sizes = (preset.n_layer, width // preset.head_width, width, preset.block_size)
    return ModelShape(
        f"{width} wide", *sizes, micro * preset.accumulation, micro, preset.vocab_size
    )


def modes(preset: StepPreset, inverse: str) -> list[DoprMode]:
    """Return the modes of bench.step_overhead."""
    every = preset.refresh_every
    sampling = (every, every, preset.token_stride)
    return [
        DoprMode("exact", inverse=inverse),
        DoprMode("sampled", *sampling, blocks_of_width=True, inverse=inverse),
    ]
