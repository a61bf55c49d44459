"""Grade trained models on their own rollouts and measure the cost of test-time feedback.

    python -m eval.rollout.ttf out/run [out/run2 ...]     grade the newest checkpoint of each run
    python -m eval.rollout.ttf out/run --all              grade every checkpoint of a run

A model is graded on the task that it was trained on: its dataset `task:NAME,...`, pystdlib, or any
other text. The command prints one line per checkpoint and writes the grade to
out/run/ttf/step-N.json, or step-N-ema.json for averaged weights. If a checkpoint is in no run's
folder, ttf/ is in its own. A checkpoint that has a grade from the same code version and settings is
not graded again.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.command import (
    DEVICES,
    at_least,
    command_parser,
    output_folder,
    pick_device,
    reported_errors,
)
from eval.rollout.metrics import Grade
from eval.rollout.policy import GPTPredictor, SharedPredictor
from eval.rollout.record import (
    make_record,
    read_record,
    readable,
    train_command,
    write_record,
)
from eval.rollout.tasks import Task, TaskError, task_of
from eval.rollout.tasks.task import TaskBase
from eval.run import Run, run_of
from eval.summary import read_metrics
from model import GPT, eval_mode
from trainer.checkpoint.read import Checkpoint, CheckpointError, candidates, open_checkpoint
from trainer.parallel import Parallel

AVERAGED = "+ema"  # suffix of a variant's name for averaged weights
# Raise this number when a change of the code shared by all tasks changes the grades. Stored grades
# of older versions are then computed again. A task's own code has `TaskBase.grading_version`.
GRADING_VERSION = 1


def check_fits(task: Task, block_size: int) -> None:
    """Raise TaskError if an episode does not fit into `block_size` tokens."""
    if block_size < task.context_tokens:
        raise TaskError(
            f"{task.spec}: an episode needs {task.context_tokens} tokens of context, but the model "
            f"has block_size={block_size}; use a shorter horizon"
        )


def grade_model(
    task: Task,
    model: GPT,
    *,
    n: int,
    seed: int,
    batch_size: int = 512,
    parallel: Parallel | None = None,
) -> Grade:
    """Grade a model on n episodes of a task.

    Args:
        seed: seed of the episodes. Use the same one for all models that are compared.
        batch_size: the most episodes that go through the model at once.
        parallel: if given, its processes share the work, and all of them must call this function.
    Raises:
        TaskError: an episode does not fit into the model's block_size.
    """
    check_fits(task, model.config.block_size)
    predictor = GPTPredictor(model, batch_size)
    with eval_mode(model):
        return task.grade(
            SharedPredictor(predictor, parallel) if parallel else predictor, n=n, seed=seed
        )


def grade_checkpoint(
    path: Path,
    *,
    n: int,
    seed: int,
    batch_size: int = 512,
    device: str = "cpu",
    ema: bool = False,
) -> dict[str, Any]:
    """Grade one checkpoint and return its record, or read the record if it is in the ttf/ folder.

    The weights, or their moving average if `ema` is true, are graded in float32, even if the model
    was trained in another precision.
    """
    found = open_checkpoint(path)
    out_dir, name = _out_dir(found.path), f"step-{found.step:08d}"
    target = out_dir / "ttf" / (f"{name}-ema.json" if ema else f"{name}.json")
    task = task_of(found.manifest["config"]["dataset"])
    grading = {"n": n, "seed": seed, "spec": task.spec, "device": str(device)}
    grading |= {"checkpoint": weights_of(found), "ema": ema, "code": grading_version(task)}
    if target.exists() and (record := read_record(target))["grading"] == grading:
        return record
    output_folder(target.parent)  # before the work
    val_loss = _val_loss(out_dir, found.step, "ema_loss" if ema else "loss")
    run = run_of(found, device=device, ema=ema)
    _check_tokenizer(task, run)
    started, threads = time.perf_counter(), run.environment["threads"]
    grade = grade_model(task, run.model, n=n, seed=seed, batch_size=batch_size)
    record = make_record(
        task,
        run.config,
        steps=run.step,
        val_loss=val_loss,
        grade=readable(grade, run.tokenizer.decode),
        grading=grading,
        command=f"{train_command(run.config, threads)} && OMP_NUM_THREADS={threads} "
        f"python -m eval.rollout.ttf NEW --episodes {n} --seed {seed} --device {device}"
        + (" --ema" if ema else ""),
        environment=run.environment,
        seconds=time.perf_counter() - started,
    )
    if ema:
        record["variant"] += AVERAGED
    write_record(target, record)
    return record


def weights_of(found: Checkpoint) -> str:
    """Return a hash of a checkpoint's contents."""
    files = json.dumps(found.manifest["files"], sort_keys=True)  # includes the hash of every file
    return hashlib.sha256(files.encode()).hexdigest()


def grading_version(task: TaskBase) -> str:
    """Return the version of the grading code as "SHARED.TASK", see `GRADING_VERSION`."""
    return f"{GRADING_VERSION}.{task.grading_version}"


def _check_tokenizer(task: Task, run: Run) -> None:
    """Raise TaskError if the run's tokenizer is not the task's."""
    if task.open().tokenizer.sha256 != run.tokenizer.sha256:
        raise TaskError(f"{run.path}: its tokenizer differs from the tokenizer of {task.spec}")


def _out_dir(checkpoint: Path) -> Path:
    """Return the run's folder; for a checkpoint that was copied elsewhere, the checkpoint's."""
    path = checkpoint.resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _val_loss(out_dir: Path, step: int, key: str) -> float | None:
    """Return the validation loss at `step`, or None if there is no record of one."""
    if not (out_dir / "metrics.jsonl").exists():
        return None
    losses = [getattr(row, key) for row in read_metrics(out_dir, "val") if row.step == step]
    return losses[-1] if losses else None


def checkpoints(run: Path, *, every: bool) -> list[Path]:
    """Return the paths to grade: the run, which stands for its newest checkpoint, or all of them.

    All checkpoints are returned with the oldest first.

    Raises:
        CheckpointError: `every` is true, and the run has no checkpoint.
    """
    if not every:
        return [run]
    if not (found := candidates(run / "checkpoints")):
        raise CheckpointError(f"no checkpoint at {run}: --all needs a run's out_dir")
    return found[::-1]


def line(record: dict[str, Any]) -> str:
    """Format a record as one line with its validation loss and its ranking metric."""
    primary = record["grade"]["metrics"][record["primary"]]
    mean, lo, hi = (_number(primary[key]) for key in ("mean", "lo", "hi"))
    direction = "higher" if record["higher_is_better"] else "lower"
    return (
        f"{record['settings'].get('out_dir')}  {record['variant']}  step {record['steps']}  "
        f"val loss {_number(record['val_loss'])}  {record['task']} {record['primary']} {mean} "
        f"[{lo}, {hi}] ({direction} is better, {primary['n']} episodes)"
    )


def _number(value: float | None) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.4f}"


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("eval.rollout.ttf", __doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="out_dirs of runs, or folders of checkpoints")
    add("--all", action="store_true", help="grade every checkpoint, not only the newest")
    add("--episodes", type=int, default=512, help="rollouts per checkpoint")
    add("--seed", type=int, default=0, help="seed of the episodes; compare models at equal seeds")
    add("--batch_size", type=int, default=512, help="episodes that go through the model at once")
    add("--device", choices=DEVICES, default="auto")
    add("--ema", action="store_true", help="grade the averaged weights")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, arguments = parse(argv)
    with reported_errors(parser):
        at_least(1, episodes=arguments.episodes, batch_size=arguments.batch_size)
        at_least(0, seed=arguments.seed)
        device = pick_device(arguments.device)
        paths = [p for run in arguments.runs for p in checkpoints(run, every=arguments.all)]
        how = {key: getattr(arguments, key) for key in ("seed", "batch_size", "ema")}
        for path in tqdm(paths, unit="checkpoint", disable=not sys.stderr.isatty()):
            record = grade_checkpoint(path, n=arguments.episodes, device=device, **how)
            tqdm.write(line(record), file=sys.stdout)


if __name__ == "__main__":
    main()
