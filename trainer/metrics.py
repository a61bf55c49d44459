"""Record a run's metrics: metrics.jsonl, a progress line or bar, and optionally wandb.

Every row of metrics.jsonl has a `kind` (run, train, val or ttf) and a `step`. A failure of wandb
does not stop the run: it is reported once, and wandb is switched off.
"""

import json
import math
import os
import platform
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

PEAK_BF16_FLOPS = {  # dense peak by a part of the device's name
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def mfu(flops_per_s: float, device_name: str, dtype: str) -> float | None:
    """Return the model FLOP/s as a fraction of the device's bf16 peak; None if it is unknown."""
    peaks = [peak for part, peak in PEAK_BF16_FLOPS.items() if part in device_name]
    return flops_per_s / peaks[0] if peaks and dtype == "bfloat16" else None


def environment(device: torch.device, world_size: int = 1) -> dict[str, Any]:
    """Describe the environment of a result: device, processes, versions and git revision."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git": revision,
        "world": world_size,
    }


class MetricsLog:
    """Write a run's records.

    Args:
        out_dir: the run's folder. If it has a metrics.jsonl, the rows that a run resumed at
            `start_step` will write again are removed.
        is_writer: whether this process writes; the other processes discard their records.
    """

    def __init__(
        self, out_dir: Path, start_step: int, max_steps: int, *, is_writer: bool = True
    ) -> None:
        path = out_dir / "metrics.jsonl" if is_writer else Path(os.devnull)
        if is_writer and path.exists():
            _remove_rows_after(path, start_step)
        self._file = path.open("a", buffering=1)
        self._max_steps = max_steps
        self._wandb: Any = None
        self._bar = tqdm(
            total=max_steps,
            initial=start_step,
            unit="step",
            disable=not (is_writer and sys.stderr.isatty()),
        )

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
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._wandb is not None and kind != "run":
            try:
                self._wandb.log({f"{kind}/{key}": value for key, value in values.items()}, step)
            except Exception as error:
                self.say(f"warning: wandb is off from step {step} on ({error})")
                self._wandb = None

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
        """Print a line without breaking the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                print(f"warning: wandb did not finish ({error})")


def _wandb_id(out_dir: Path) -> str:
    """Return the run's wandb id, which stays the same when the run is resumed."""
    path = out_dir / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text()


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove_rows_after(path: Path, step: int) -> None:
    """Remove the rows that a resumed run will write again, and a line truncated by a crash."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] < step or (row["step"] == step and row["kind"] not in ("val", "ttf")):
            kept.append(line + "\n")
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(kept))
    partial.replace(path)
