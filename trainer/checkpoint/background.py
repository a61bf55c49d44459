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
from trainer.failures import memory_errors
from trainer.parallel import Parallel

NO_COPY = "async_save=false saves without a copy of the state, but training then waits"


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
        self._group = parallel.group(backend="gloo") if is_sharded else None
        self._executor = ThreadPoolExecutor(1, "checkpoint", _use_device, (parallel.device,))
        self._in_progress: tuple[int, Future[str]] | None = None  # the step and the write

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
            MemoryExhausted: the memory does not suffice for the copy.
        """
        if self._state.step == self._state.saved_step:
            return
        with evaluation_weights(self._state.optimizers), memory_errors(NO_COPY):
            write = self._prepare(is_copied=True)
        self._in_progress = self._state.step, self._executor.submit(partial(_problem, write))

    def wait(self) -> None:
        """Wait for the write in the background, if there is one.

        Raises:
            CheckpointError: one of the processes could not write; all of them raise it.
        """
        if self._in_progress is None:
            return
        (step, future), self._in_progress = self._in_progress, None

        def check() -> None:
            if problem := future.result():
                raise CheckpointError(problem)

        self._parallel.raise_on_all_ranks(check, CheckpointError)
        self._state.saved_step = step

    def close(self) -> str:
        """Wait for the write in the background without the other processes; return its problem."""
        self._executor.shutdown()
        if self._in_progress is None:
            return ""
        future = self._in_progress[1]
        error = future.exception()
        return f"{type(error).__name__}: {error}" if error else future.result()

    def _prepare(self, *, is_copied: bool) -> Callable[[], object]:
        """Return the function that writes this state; if `is_copied`, the state may then change."""
        state, parallel, is_main = self._state, self._parallel, self._parallel.is_main
        train = state.to_dict(is_sharded=self._is_sharded)
        tensors: Any = {"model": plain_state(state.model), "train": train}
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


def _problem(write: Callable[[], object]) -> str:
    """Call `write`; return the message of its CheckpointError, or "".

    The error itself would keep the copy of the state in memory, through its traceback.
    """
    try:
        write()
    except CheckpointError as error:
        return str(error)
    return ""


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    """Copy a tensor. Rows of a sharded one on a GPU are left, because gathering copies them."""
    if not hasattr(tensor, "full_tensor"):
        return tensor.detach().to("cpu", copy=True)
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor


def _use_device(device: torch.device) -> None:
    """Make the GPU of this process the current one, as every new thread starts with GPU 0."""
    if device.index is not None:
        torch.cuda.set_device(device)
