"""Record a run's metrics: metrics.jsonl, a progress line or bar, and optionally wandb.

Every row of metrics.jsonl has a `kind` (run, train, val or ttf) and a `step`. No failure to record
stops the run. A failure of wandb is reported once, and wandb is switched off. Rows that cannot be
written, because the disk is full, say, are kept in memory and written later.
"""

import errno
import json
import math
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.schema import OpenSchema, parse_json
from data.shards import DataError

PEAK_BF16_FLOPS = {  # dense peak by a part of the device's name
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class Row(OpenSchema):
    """A row of metrics.jsonl, which has further keys that depend on its kind."""

    kind: str
    step: int


def mfu(flops_per_s: float, device_name: str, dtype: str) -> float | None:
    """Return the model FLOP/s as a fraction of the device's bf16 peak; None if it is unknown."""
    peaks = [peak for part, peak in PEAK_BF16_FLOPS.items() if part in device_name]
    return flops_per_s / peaks[0] if peaks and dtype == "bfloat16" else None


class MetricsLog:
    """Write a run's records.

    Args:
        out_dir: the run's folder. If it has a metrics.jsonl, the rows after `start_step` are
            removed. A validation or grading of this step replaces its earlier row.
        is_writer: whether this process writes; the other processes discard their records.
    """

    def __init__(
        self, out_dir: Path, start_step: int, max_steps: int, *, is_writer: bool = True
    ) -> None:
        self._path = out_dir / "metrics.jsonl" if is_writer else Path(os.devnull)
        self._start_step = start_step
        self._unwritten: list[str] = []
        self._is_terminal_gone = False
        self._keep_rows(
            lambda row: row.step <= start_step and (start_step > 0 or row.kind == "run"),
            "rows of later steps",
        )
        self._max_steps = max_steps
        self._wandb: Any = None
        self._bar = tqdm(
            total=max_steps,
            initial=start_step,
            unit="step",
            disable=not (is_writer and sys.stderr.isatty()),
        )

    def _keep_rows(self, is_kept: Callable[[Row], bool], others: str) -> None:
        """Remove the other rows, and damaged lines. If that fails, warn and keep them."""
        if not self._path.is_file():  # the first run in a folder, or not the writer
            return
        kept, n_damaged = [], 0
        try:
            for line in self._path.read_bytes().splitlines(keepends=True):
                try:
                    row = parse_json(line, str(self._path), Row, DataError)
                except DataError:
                    n_damaged += line.endswith(b"\n") and bool(line.strip())  # or cut by a crash
                    continue
                kept += [line] if is_kept(row) else []
            partial = self._path.with_suffix(".tmp")
            partial.write_bytes(b"".join(kept))
            partial.replace(self._path)
        except OSError as error:
            self.say(f"WARNING: {self._path} keeps {others} ({error.strerror})")
        else:
            if n_damaged:
                self.say(f"warning: {n_damaged} damaged lines of {self._path} were removed")

    def start_wandb(self, out_dir: Path, mode: Any, project: str, config: dict[str, Any]) -> None:
        """Also send rows to Weights & Biases from now on; `mode` is off, online or offline."""
        if mode == "off":
            return
        try:
            import wandb

            if mode == "online" and not wandb.api.api_key:
                raise PermissionError("no API key: set WANDB_API_KEY, or use wandb=offline")
            self._wandb = wandb.init(
                project=project,
                name=out_dir.name,
                id=_wandb_id(out_dir),
                resume="allow",
                dir=str(out_dir),
                mode=mode,
                config=config,
                settings=wandb.Settings(init_timeout=30),
            )
        except Exception as error:
            self.say(f"warning: wandb is off ({type(error).__name__}: {error})")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a row to metrics.jsonl; rows of other kinds than "run" also go to wandb."""
        values = {key: _finite(value) for key, value in values.items()}
        row = {"kind": kind, "step": step, **values}
        if step == self._start_step and kind in ("val", "ttf"):  # again, by a resumed run
            others = f"the {kind} row that step {step} had before"
            self._keep_rows(lambda row: (row.kind, row.step) != (kind, step), others)
        self._append(json.dumps(row, allow_nan=False) + "\n")
        if self._wandb is not None and kind != "run":
            try:
                self._wandb.log({f"{kind}/{key}": value for key, value in values.items()}, step)
            except Exception as error:
                self.say(f"warning: wandb is off from step {step} on ({error})")
                self._wandb = None

    def _append(self, line: str) -> None:
        """Write the line, after those that could not be written; warn at the first failure."""
        self._unwritten.append(line)
        content = "".join(self._unwritten).encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(content) != len(content):
                    file.truncate(end)  # no part of a line stays
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten = []
        except OSError as error:
            if len(self._unwritten) == 1:
                self.say(f"WARNING: {self._path} cannot be written now ({error.strerror})")

    def train(self, step: int, **values: Any) -> None:
        """Write a training row, and print progress, speed and remaining time."""
        self.write("train", step, **values)
        utilization = "n/a" if values["mfu"] is None else f"{values['mfu']:.1%}"
        text = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  |g| {values['grad_norm']:.2f}  "
            f"{values['tokens_per_s']:,.0f} tok/s  mfu {utilization}  {values['step_ms']:.0f} ms"
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        percent = 100 * step // self._max_steps
        eta = tqdm.format_interval((self._max_steps - step) * values["step_ms"] / 1e3)
        self.say(f"step {step}/{self._max_steps} ({percent}%)  {text}  eta {eta}")

    def val(self, step: int, results: dict[str, Any] | None) -> None:
        """Write and print a validation result; do nothing if it is None (interrupted)."""
        if results is None:
            return
        self.write("val", step, **results)
        averaged = (
            f"  (averaged weights {results['ema_loss']:.4f})" if "ema_loss" in results else ""
        )
        self.say(
            f"step {step}  val loss {results['loss']:.4f}{averaged}  "
            f"{results['bits_per_byte']:.4f} bits/byte  {results['n_tokens']:,} tokens"
        )

    def ttf(self, step: int, primary: str, metrics: dict[str, float]) -> None:
        """Write the metrics of the model's own rollouts, and print the task's primary metric."""
        self.write("ttf", step, **metrics)
        self.say(f"step {step}  rollouts: {primary} {metrics[primary]:.4f}")

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar, until the terminal or pipe is closed."""
        if self._is_terminal_gone:
            return
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            self._is_terminal_gone = True

    def close(self) -> None:
        self._bar.close()
        if self._unwritten:
            self.say(f"WARNING: {len(self._unwritten)} rows of {self._path} were not written")
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                print(f"warning: wandb did not finish ({error})")


def _wandb_id(out_dir: Path) -> str:
    """Return the run's wandb id, which stays the same when the run is resumed."""
    path = out_dir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
