"""Grade trained models on their own rollouts: what test-time feedback costs.

    python -m eval.rollout.ttf out/run [out/run2 ...]            newest checkpoint of each
    python -m eval.rollout.ttf out/run --all                     every checkpoint that was kept

The task is the one that the run was trained on: its dataset `task:NAME,...`, pystdlib, or any other
text. A grade is written to out/run/ttf/step-N.json, of averaged weights to step-N-ema.json, and not
computed again. One line a checkpoint.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.shards import DataError
from eval.command import command_parser
from eval.rollout.metrics import Grade
from eval.rollout.policy import GPTPredictor, SharedPredictor
from eval.rollout.record import make_record, readable, train_command, write_record
from eval.rollout.tasks import Task, TaskError, task_of
from eval.rollout.tasks.task import TaskBase
from eval.run import Run, run_of
from eval.sample import pick_device
from model import GPT, eval_mode
from trainer.checkpoint.read import Checkpoint, CheckpointError, candidates, open_checkpoint
from trainer.parallel import Parallel

AVERAGED = "+ema"  # of the variant of averaged weights
GRADING_VERSION = 1  # raise it when a change outside of a task changes the grades


def check_fits(task: Task, block_size: int) -> None:
    """TaskError if a context of `block_size` tokens cannot hold an episode."""
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
    """n episodes of the task; the processes of a world, which all call this, share the work.

    Raises TaskError if the model's context cannot hold an episode.
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
    """The record of one checkpoint; from its ttf/ folder if it was graded like this before.

    Its weights, or with `ema` their average, are graded in float32, whatever they were trained in.
    """
    found = open_checkpoint(path)
    out_dir, name = found.path.parent.parent, f"step-{found.step:08d}"
    target = out_dir / "ttf" / (f"{name}-ema.json" if ema else f"{name}.json")
    task = task_of(found.manifest["config"]["dataset"])
    grading = {"n": n, "seed": seed, "spec": task.spec, "device": str(device)}
    grading |= {"checkpoint": weights_of(found), "ema": ema, "code": grading_version(task)}
    if target.exists() and (record := json.loads(target.read_text()))["grading"] == grading:
        return record
    run = run_of(found, device=device, ema=ema)
    _check_tokenizer(task, run)
    started, threads = time.perf_counter(), run.environment["threads"]
    grade = grade_model(task, run.model, n=n, seed=seed, batch_size=batch_size)
    record = make_record(
        task,
        run.config,
        steps=run.step,
        val_loss=_val_loss(out_dir, run.step, "ema_loss" if ema else "loss"),
        grade=readable(grade, run.tokenizer.decode),
        grading=grading,
        command=f"{train_command(run.config, threads)} && OMP_NUM_THREADS={threads} "
        f"python -m eval.rollout.ttf NEW --episodes {n} --seed {seed} --device {device}"
        + " --ema"
        * ema,
        environment=run.environment,
        seconds=time.perf_counter() - started,
    )
    if ema:
        record["variant"] += AVERAGED
    write_record(target, record)
    return record


def weights_of(found: Checkpoint) -> str:
    """A hash that changes with what is in a checkpoint."""
    files = json.dumps(found.manifest["files"], sort_keys=True)  # with their hashes
    return hashlib.sha256(files.encode()).hexdigest()


def grading_version(task: TaskBase) -> str:
    """The version of the code that grades this task: the common part, then the task's own."""
    return f"{GRADING_VERSION}.{task.grading_version}"


def _check_tokenizer(task: Task, run: Run) -> None:
    """TaskError if the run's ids are not those of the task."""
    if task.open().tokenizer.sha256 != run.tokenizer.sha256:
        raise TaskError(f"{run.path}: its tokenizer is not that of {task.spec}")


def _val_loss(out_dir: Path, step: int, key: str) -> float | None:
    """Validation loss at `step`, if it was computed there."""
    rows = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    losses = [row[key] for row in rows if row["kind"] == "val" and row["step"] == step]
    return losses[-1] if losses else None


def checkpoints(run: Path, *, every: bool) -> list[Path]:
    """What to load: the run itself, for its newest, or every checkpoint, the oldest first.

    Raises CheckpointError if all are wanted and there are none.
    """
    if not every:
        return [run]
    if not (found := candidates(run / "checkpoints")):
        raise CheckpointError(f"no checkpoint at {run}: --all wants a run's out_dir")
    return found[::-1]


def line(record: dict[str, Any]) -> str:
    """One line: the run, its validation loss, and the metric that ranks, with its interval."""
    best = record["grade"]["metrics"][record["primary"]]
    loss = "n/a" if record["val_loss"] is None else f"{record['val_loss']:.4f}"
    direction = "higher" if record["higher_is_better"] else "lower"
    return (
        f"{record['settings']['out_dir']}  {record['variant']}  step {record['steps']}  "
        f"val loss {loss}  {record['task']} {record['primary']} {best['mean']:.4f} "
        f"[{best['lo']:.4f}, {best['hi']:.4f}] ({direction} is better, {best['n']} episodes)"
    )


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("eval.rollout.ttf", __doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="out_dirs, or folders of checkpoints")
    add("--all", action="store_true", help="every checkpoint, not only the newest")
    add("--episodes", type=int, default=512, help="rollouts a checkpoint")
    add("--seed", type=int, default=0, help="of the episodes: the same for all that is compared")
    add("--batch_size", type=int, default=512, help="episodes that go through the model at once")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--ema", action="store_true", help="the averaged weights")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, arguments = parse(argv)
    if min(arguments.episodes, arguments.batch_size) < 1 or arguments.seed < 0:
        parser.exit(2, "error: --episodes and --batch_size must be at least 1, --seed at least 0\n")
    try:
        device = pick_device(arguments.device)
        paths = [p for run in arguments.runs for p in checkpoints(run, every=arguments.all)]
        how = {key: getattr(arguments, key) for key in ("seed", "batch_size", "ema")}
        for path in tqdm(paths, unit="checkpoint", disable=not sys.stderr.isatty()):
            record = grade_checkpoint(path, n=arguments.episodes, device=device, **how)
            tqdm.write(line(record), file=sys.stdout)
    except (CheckpointError, DataError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
