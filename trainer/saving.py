"""Decide when the state of a run is saved, and end a run that diverged."""

from pathlib import Path
from typing import Any

from trainer.checkpoint.read import CheckpointError, candidates, load_checkpoint, step_of
from trainer.checkpoint.state import TrainState
from trainer.failures import TrainingDiverged
from trainer.metrics import MetricsLog
from trainer.parallel import Parallel
from trainer.settings import TrainConfig
from trainer.signals import StopRequest


def save_checkpoint(
    state: TrainState,
    config: TrainConfig,
    parallel: Parallel,
    files: dict[str, Any],
    log: MetricsLog,
    stop: StopRequest,
) -> None:
    """Write a checkpoint of this step, unless the loss of the weights is known not to be finite.

    A failure to write is a warning if an earlier checkpoint of the run exists and this is not the
    last save. All processes must call this.

    Raises:
        CheckpointError: the first or the last checkpoint could not be written.
        TrainingDiverged: a tensor, or the loss after the last step, is not finite.
    """
    is_done = state.step == config.max_steps
    root = Path(config.out_dir) / "checkpoints"
    if state.is_loss_finite is False:
        if is_done and not stop:
            raise diverged(state, root, "the loss after the last step is not finite")
        log.say(f"step {state.step} is not saved, because its loss or gradient was not finite")
        return
    broken = state.non_finite()
    if parallel.all_reduce_flag(bool(broken)):
        raise diverged(
            state, root, f"after step {state.step}, {broken or 'a tensor'} is not finite"
        )
    is_sharded = config.checkpoint_format == "sharded"
    try:
        state.save(root, parallel, keep=config.keep_checkpoints, is_sharded=is_sharded, **files)
    except CheckpointError as error:
        if stop or is_done or state.saved_step < 0:  # none written, and none resumed
            raise
        log.say(f"WARNING: {error}; training goes on")


def give_up_if_diverged(state: TrainState, config: TrainConfig) -> None:
    """Raise TrainingDiverged after `max_skipped` skipped steps in a row."""
    if state.skipped_in_row >= config.max_skipped:
        what = f"{state.skipped_in_row} steps in a row had a loss or gradient that was not finite"
        raise diverged(state, Path(config.out_dir) / "checkpoints", what)


def diverged(state: TrainState, root: Path, what: str) -> TrainingDiverged:
    """Return the error, which names the newest undamaged checkpoint from before the divergence."""
    first_broken = state.step - state.skipped_in_row  # the loss of its weights is not finite
    for path in candidates(root):
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
