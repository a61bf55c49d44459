"""Describe where a result comes from. Needs no package besides torch."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device, world_size: int = 1) -> dict[str, Any]:
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
