"""Check what a run asks of this machine: its devices, its number of processes, its out_dir."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch

from optim.dopr.settings import settings_problems
from optim.kernels.dispatch import triton_problem
from trainer.optimizers import optimizer_problems
from trainer.parallel import parallel_problems
from trainer.settings import ConfigError
from trainer.torchrun import environment_number, environment_problems


def device_of(setting: str) -> torch.device:
    """Return the device that the setting `device` names; auto prefers CUDA."""
    if setting != "auto":
        return torch.device(setting)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def missing_device(setting: str) -> str:
    """Return an error message if torch does not find the device that `device` names, or ""."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if has.get(setting, True):
        return ""
    name = setting.upper()
    return f"device={setting}: torch finds no {name} device here; use device=cpu or auto"


def machine_problems(settings: dict[str, Any]) -> list[str]:
    """List what the settings ask of this machine that it does not have."""
    if problems := environment_problems():
        return problems
    problems = optimizer_problems(settings)
    problems += settings_problems(settings) if settings["dopr"] else []
    problems += filter(None, [missing_device(settings["device"])])
    if settings["device"] == "mps":
        problems += _mps_problems(settings)
    n_processes, n_cuda = environment_number("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
    if device_of(settings["device"]).type == "cuda" and 0 < n_cuda < n_processes:
        problems.append(
            f"{n_processes} processes on this machine, but torch finds {n_cuda} CUDA devices: "
            "start as many processes as there are devices"
        )
    if settings["backend"] == "triton":
        problems += filter(None, [triton_problem(device_of(settings["device"]))])
    return problems + parallel_problems(settings)


def _mps_problems(settings: dict[str, Any]) -> list[str]:
    """List what the settings ask of a GPU of Apple that it does not have."""
    problems = []
    is_bfloat16 = settings["dtype"] == "bfloat16" and torch.backends.mps.is_available()
    if is_bfloat16 and not torch.backends.mps.is_macos_or_newer(14, 0):
        problems.append("dtype=bfloat16: needs macOS 14 with device=mps; use dtype=float32")
    if settings["dopr"]:
        problems.append("device=mps: DoPr needs float64, which MPS does not have; use device=cpu")
    if environment_number("WORLD_SIZE", 1) > 1:
        problems.append("device=mps: several processes cannot share it; start one process")
    return problems


@contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Create `out_dir`, and lock it for this process inside the context.

    Raises:
        ConfigError: another run writes to the folder, or it is not writable.
    """
    lock = filelock.FileLock(out_dir / ".lock", blocking=False)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise ConfigError(f"out_dir={out_dir}: another run is writing to it") from None
    except OSError as error:
        raise ConfigError(f"out_dir={out_dir}: not writable ({error})") from None
    try:
        yield
    finally:
        lock.release()
