"""Decide when and how the state of a run is saved, and end a run that diverged."""

import time
from pathlib import Path
from typing import Any

from trainer.checkpoint.background import CheckpointWriter
from trainer.checkpoint.read import CheckpointError, candidates, load_checkpoint, step_of
from trainer.checkpoint.state import TrainState
from trainer.failures import TrainingDiverged
from trainer.metrics import MetricsLog
from trainer.parallel import Parallel
from trainer.settings import TrainConfig
from trainer.signals import StopRequest

NOTABLE_WAIT_S = 1.0  # a save says so if it waited longer for the previous one


class CheckpointSaver:
    """Save a run, and end it if it diverged.

    With async_save=true, checkpoints are written in the background, one at a time, except for the
    first one of a new run and the last one, which are complete when `save` returns. A failure in
    the background is reported by the next save, or at the end of the run.

    Used as a context manager, which waits for the write in progress on exit. All processes must
    create it and call its methods together.
    """

    def __init__(
        self,
        state: TrainState,
        config: TrainConfig,
        parallel: Parallel,
        files: dict[str, Any],
        log: MetricsLog,
        stop: StopRequest,
    ) -> None:
        self._state, self._config, self._parallel = state, config, parallel
        self._log, self._stop = log, stop
        self._root = Path(config.out_dir) / "checkpoints"
        is_sharded = config.checkpoint_format == "sharded"
        files = files | {"keep": config.keep_checkpoints, "is_sharded": is_sharded}
        self._writer = CheckpointWriter(state, self._root, parallel, **files)

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, *exc: object) -> None:
        if problem := self._writer.close():
            self._log.say(f"WARNING: {problem}")

    def save(self, *, is_last: bool) -> None:
        """Save this step, unless the loss of its weights is known not to be finite.

        A failure to write is a warning if an earlier checkpoint of the run exists and the run is
        neither done nor stopped.

        Args:
            is_last: whether the run ends with this save, which is then complete on return.
        Raises:
            CheckpointError: the first or the last checkpoint could not be written.
            TrainingDiverged: a tensor, or the loss after the last step, is not finite.
        """
        state, is_done = self._state, self._state.step == self._config.max_steps
        self._wait()
        if state.is_loss_finite is False:
            if is_done and not self._stop:
                raise self._diverged("the loss after the last step is not finite")
            self._log.say(
                f"step {state.step} is not saved, because its loss or gradient was not finite"
            )
            return
        broken = state.non_finite()
        if self._parallel.all_reduce_flag(bool(broken)):
            raise self._diverged(f"after step {state.step}, {broken or 'a tensor'} is not finite")
        must_succeed = self._stop or is_done or state.saved_step < 0  # none written, none resumed
        is_background = self._config.async_save and not (must_succeed or is_last)
        write = self._writer.start if is_background else self._writer.write
        try:
            write()
        except CheckpointError as error:
            if must_succeed:
                raise
            self._log.say(f"WARNING: {error}" + ("" if is_last else "; training goes on"))

    def give_up_if_diverged(self) -> None:
        """Raise TrainingDiverged after `max_skipped` skipped steps in a row."""
        n = self._state.skipped_in_row
        if n >= self._config.max_skipped:
            self._wait()
            raise self._diverged(f"{n} steps in a row had a loss or gradient that was not finite")

    def _wait(self) -> None:
        """Wait for the write in the background, and report its failure or a long wait."""
        started = time.monotonic()
        try:
            self._writer.wait()
        except CheckpointError as error:
            self._log.say(f"WARNING: {error}")
        waited = time.monotonic() - started
        if waited > NOTABLE_WAIT_S:
            step = self._state.step
            self._log.say(f"step {step}: waited {waited:.1f} s for the previous checkpoint")

    def _diverged(self, what: str) -> TrainingDiverged:
        """Return the error, which names the newest undamaged checkpoint before the divergence."""
        state = self._state
        first_broken = state.step - state.skipped_in_row  # the loss of its weights is not finite
        for path in candidates(self._root):
            if step_of(path) < first_broken:
                try:
                    load_checkpoint(path)
                except CheckpointError:
                    continue
                return TrainingDiverged(
                    f"{what}; the newest checkpoint from before that is {path}. Start from it with "
                    f"--resume={path} --lr=<smaller> --out_dir=<new>"
                )
        return TrainingDiverged(f"{what}; start again with --lr=<smaller> --out_dir=<new>")
