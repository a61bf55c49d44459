"""Write the checkpoints of a run while training goes on.

A write in the background starts from a copy of the state on the CPU, so the host needs memory for
one more state while it lasts. The copy, and the gathering of a full checkpoint, happen in the
calling thread. A thread then writes the files. It takes part in no collective, except that the
processes that write one sharded checkpoint communicate in a process group of their own.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from trainer.checkpoint import sharded
from trainer.checkpoint.read import CheckpointError, plain_state
from trainer.checkpoint.state import TrainState
from trainer.checkpoint.write import save_checkpoint, start_sharded
from trainer.evaluation_weights import evaluation_weights
from trainer.parallel import Parallel


class CheckpointWriter:
    """Write checkpoints of `state` under `root`, in the calling thread or in the background.

    At most one write is in progress: call `wait` before `write` and `start`. Both do nothing if the
    step was saved already. The weights in a checkpoint are those to evaluate (see
    evaluation_weights.py). All processes must call these three methods together.

    Args:
        manifest: JSON-serializable facts about the run.
        tokenizer: content of tokenizer.json.
        keep: number of checkpoints to keep.
    """

    def __init__(
        self,
        state: TrainState,
        root: Path,
        parallel: Parallel,
        *,
        manifest: dict[str, Any],
        tokenizer: bytes,
        keep: int,
        is_sharded: bool,
    ) -> None:
        self._state, self._root, self._parallel = state, root, parallel
        manifest = {**manifest, "optimizers": state.optimizer_names()}
        self._files: dict[str, Any] = {"manifest": manifest, "tokenizer_json": tokenizer}
        self._files["keep"] = keep
        self._is_sharded = is_sharded
        self._group = parallel.group() if is_sharded else None
        self._executor = ThreadPoolExecutor(1, "checkpoint", _use_device, (parallel.device,))
        self._in_progress: tuple[int, Future[Any]] | None = None  # and the step that it saves

    def write(self) -> None:
        """Write a checkpoint of this step.

        Raises:
            CheckpointError: one of the processes could not write; all of them raise it.
        """
        if self._state.step == self._state.saved_step:
            return
        with evaluation_weights(self._state.optimizers):
            write = self._prepare(is_copied=False)
            self._parallel.raise_on_all_ranks(write, CheckpointError)
        self._state.saved_step = self._state.step

    def start(self) -> None:
        """Copy the state of this step, and write the copy in the background.

        Raises:
            CheckpointError: the folder of a sharded checkpoint could not be created. `wait` raises
                later errors.
        """
        if self._state.step == self._state.saved_step:
            return
        with evaluation_weights(self._state.optimizers):
            write = self._prepare(is_copied=True)
        self._in_progress = self._state.step, self._executor.submit(write)

    def wait(self) -> None:
        """Wait for the write in the background, if there is one.

        Raises:
            CheckpointError: one of the processes could not write; all of them raise it.
        """
        if self._in_progress is None:
            return
        (step, future), self._in_progress = self._in_progress, None
        self._parallel.raise_on_all_ranks(future.result, CheckpointError)
        self._state.saved_step = step

    def close(self) -> BaseException | None:
        """Wait for the write in the background without the other processes; return its error."""
        self._executor.shutdown()
        return self._in_progress[1].exception() if self._in_progress else None

    def _prepare(self, *, is_copied: bool) -> Callable[[], object]:
        """Return the function that writes this state; if `is_copied`, the state may then change."""
        state, parallel, is_main = self._state, self._parallel, self._parallel.is_main
        tensors: Any = {"model": plain_state(state.model), "train": state.to_dict()}
        tensors["ema"] = plain_state(state.ema) if state.ema else None
        if self._is_sharded:
            tensors = sharded.copy_to_cpu(tensors) if is_copied else tensors
            files = self._files | {"tensors": tensors, "group": self._group}
            return start_sharded(self._root, state.step, parallel, **files)
        if is_copied and is_main:
            tensors = tree_map_only(Tensor, _copy_to_cpu, tensors)
        tensors = parallel.full_state_on_main(tensors)
        write = partial(save_checkpoint, self._root, state.step, **tensors, **self._files)
        return write if is_main else lambda: None


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    """Copy a tensor. Rows of a sharded one on a GPU are left, because gathering copies them."""
    if not hasattr(tensor, "full_tensor"):
        return tensor.detach().to("cpu", copy=True)
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor


def _use_device(device: torch.device) -> None:
    """Make the GPU of this process the current one, as every new thread starts with GPU 0."""
    if device.index is not None:
        torch.cuda.set_device(device)
