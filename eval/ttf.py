"""Grade trained models on their own rollouts: what test-time feedback costs.

    python -m eval.ttf out/run [out/run2 ...]            newest checkpoint of each
    python -m eval.ttf out/run --all                     every checkpoint that was kept

The task is the one that the run was trained on: its dataset `task:NAME,...`, pystdlib, or any other
text. A grade is written to out/run/ttf/step-N.json and not computed again. One line a checkpoint.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import CheckpointError, candidates
from data.shards import DataError
from eval.grade import Grade
from eval.predictor import GPTPredictor
from eval.record import make_record, readable, write_record
from eval.run import Run, load_run
from eval.sample import pick_device
from eval.tasks import Task, TaskError, task_of
from model import GPT, eval_mode


def grade_model(task: Task, model: GPT, *, n: int, seed: int, batch_size: int = 512) -> Grade:
    """n episodes of the task. Raises TaskError if the model's context cannot hold one."""
    if model.config.block_size < task.context_tokens:
        raise TaskError(
            f"{task.spec}: an episode needs {task.context_tokens} tokens of context, but the model "
            f"has block_size={model.config.block_size}; use a shorter horizon"
        )
    with eval_mode(model):
        return task.grade(GPTPredictor(model, batch_size), n=n, seed=seed)


def grade_checkpoint(
    path: Path, *, n: int, seed: int, batch_size: int = 512, device: str = "cpu"
) -> dict[str, Any]:
    """The record of one checkpoint; from its ttf/ folder if it was graded like this before."""
    run = load_run(path, device=device)
    out_dir = run.path.parent.parent
    target = out_dir / "ttf" / f"step-{run.step:08d}.json"
    task = task_of(run.config["dataset"])
    grading = {"n": n, "seed": seed, "git": run.environment["git"], "spec": task.spec}
    if target.exists() and (record := json.loads(target.read_text()))["grading"] == grading:
        return record
    _check_tokenizer(task, run)
    started = time.perf_counter()
    grade = grade_model(task, run.model, n=n, seed=seed, batch_size=batch_size)
    record = make_record(
        task,
        run.config,
        steps=run.step,
        val_loss=_val_loss(out_dir, run.step),
        grade=readable(grade, run.tokenizer.decode),
        grading=grading,
        command=_command(run.config),
        environment=run.environment,
        seconds=time.perf_counter() - started,
    )
    write_record(target, record)
    return record


def _check_tokenizer(task: Task, run: Run) -> None:
    """TaskError if the run's ids are not those of the task."""
    if task.open().tokenizer.sha256 != run.tokenizer.sha256:
        raise TaskError(f"{run.path}: its tokenizer is not that of {task.spec}")


def _val_loss(out_dir: Path, step: int) -> float | None:
    """Validation loss at `step`, if it was computed there."""
    rows = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if row["kind"] == "val" and row["step"] == step]
    return losses[-1] if losses else None


def _command(config: dict[str, Any]) -> str:
    return "python train.py " + " ".join(f"--{key}={value}" for key, value in config.items())


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
    parser = argparse.ArgumentParser(
        prog="python -m eval.ttf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="out_dirs, or folders of checkpoints")
    add("--all", action="store_true", help="every checkpoint, not only the newest")
    add("--episodes", type=int, default=512, help="rollouts a checkpoint")
    add("--seed", type=int, default=0, help="of the episodes: the same for all that is compared")
    add("--batch_size", type=int, default=512, help="episodes that go through the model at once")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, arguments = parse(argv)
    if min(arguments.episodes, arguments.batch_size) < 1 or arguments.seed < 0:
        parser.exit(2, "error: --episodes and --batch_size must be at least 1, --seed at least 0\n")
    try:
        device = pick_device(arguments.device)
        paths = [
            path
            for run in arguments.runs
            for path in (candidates(run / "checkpoints")[::-1] if arguments.all else [run])
        ]
        how = {"n": arguments.episodes, "seed": arguments.seed, "device": device}
        for path in tqdm(paths, unit="checkpoint", disable=not sys.stderr.isatty()):
            record = grade_checkpoint(path, batch_size=arguments.batch_size, **how)
            tqdm.write(line(record), file=sys.stdout)
    except (CheckpointError, DataError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
