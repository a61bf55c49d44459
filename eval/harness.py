"""Evaluate a run on tasks of EleutherAI's lm-evaluation-harness.

    python -m eval.harness out/run --tasks hellaswag,lambada_openai --data DIR
    python -m eval.harness out/run --tasks hellaswag --limit 200 --out hellaswag.json

With --data nothing is downloaded: DIR must contain hellaswag_val.jsonl and lambada_test.jsonl as
their authors publish them. Without --data all tasks of the harness are available, and it downloads
their data from the Hugging Face hub. Prompts and metrics are the harness's own in both cases. Texts
longer than block_size are truncated on the left; the output says how many.
"""

import argparse
import difflib
import importlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import is_reachable, sha256_of, write_atomic
from eval.command import command_parser
from eval.run import Run, load_run
from eval.sample import pick_device
from eval.scorer import Scorer
from trainer.checkpoint.read import CheckpointError


@dataclass(frozen=True)
class Published:
    """A dataset file as its authors publish it, and the harness task that reads it."""

    file: str
    config: str  # path of the task's definition below lm_eval/tasks
    split: str
    columns: dict[str, tuple[type, ...]]  # the types allowed in each column


HELLASWAG = {"activity_label": (str,), "ctx_a": (str,), "ctx_b": (str,), "endings": (list,)}
LOCAL = {
    "hellaswag": Published(
        "hellaswag_val.jsonl",
        "hellaswag/hellaswag.yaml",
        "validation",
        HELLASWAG | {"label": (int, str)},  # an int in the authors' file, a string on the hub
    ),
    "lambada_openai": Published(
        "lambada_test.jsonl", "lambada/lambada_openai.yaml", "test", {"text": (str,)}
    ),
}


def harness(module: str = "lm_eval") -> Any:
    """Import a module of lm-evaluation-harness.

    Raises:
        ImportError: the package is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install '.[eval]'"
        ) from None


def as_harness_lm(scorer: Scorer) -> Any:
    """Wrap the scorer in a subclass of the harness's `LM`."""

    class GPTLM(harness("lm_eval.api.model").LM):
        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return scorer.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return scorer.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Any) -> list[str]:
            return scorer.generate_until([request.args for request in requests])

    return GPTLM()


def local_files(tasks: Sequence[str], folder: Path) -> dict[str, Path]:
    """Find the file of each task in `folder` and check its rows.

    Raises:
        ValueError: a task has no local file, a file is missing or empty, or a row is malformed.
    """
    if unknown := [task for task in tasks if task not in LOCAL]:
        raise ValueError(f"--data supports {', '.join(LOCAL)}, but not {', '.join(unknown)}")
    files = {task: folder.resolve() / LOCAL[task].file for task in tasks}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise ValueError(f"no such file: {', '.join(missing)}; get it from the dataset's authors")
    for task, path in files.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            _check_row(line, LOCAL[task].columns, f"{path}:{number}")
        if not lines:
            raise ValueError(f"{path} is empty")
    return files


def _check_row(line: str, columns: dict[str, tuple[type, ...]], where: str) -> None:
    try:
        row = json.loads(line)
        bad = [key for key, kinds in columns.items() if not isinstance(row[key], kinds)]
        if "label" in row and not bad and int(row["label"]) not in range(len(row["endings"])):
            bad = ["label"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: expected a JSON object with {', '.join(columns)}: {error!r}"
        ) from None
    if bad:
        raise ValueError(f"{where}: {bad[0]}={row[bad[0]]!r} is invalid; use the published file")


def local_manager(files: dict[str, Path], folder: Path) -> Any:
    """Return a task manager whose tasks read `files`; write their definitions to `folder`."""
    library = harness("lm_eval.tasks")
    for task, path in files.items():
        content = {
            "include": str(Path(library.__file__).parent / LOCAL[task].config),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "training_split": None,  # the harness needs it for few-shot examples only
            "dataset_kwargs": {"data_files": {LOCAL[task].split: str(path)}},
        }
        write_atomic(folder / f"{task}.yaml", [json.dumps(content).encode()])  # JSON is YAML
    return library.TaskManager(include_path=str(folder), include_defaults=False)


def hub_manager(tasks: Sequence[str]) -> Any:
    """Return the harness's task manager, whose tasks download their data.

    Raises:
        ValueError: the hub cannot be reached, or a task is unknown. Without this check the harness
            would fail late or wait for the network.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not os.environ.get("HF_HUB_OFFLINE") and not is_reachable(endpoint):
        raise ValueError(
            f"{endpoint} does not answer: put {', '.join(task.file for task in LOCAL.values())} "
            "into a folder and pass it as --data, or set HF_HUB_OFFLINE=1 to use cached downloads"
        )
    manager = harness("lm_eval.tasks").TaskManager()
    if unknown := sorted({*tasks} - {*manager.all_tasks}):
        near = difflib.get_close_matches(unknown[0], manager.all_tasks)
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise ValueError(f"the harness has no task {unknown[0]!r}{hint}")
    return manager


def evaluate(
    run: Run,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Evaluate `run` on tasks of the harness.

    Args:
        data: folder with local dataset files. Defaults to downloads from the Hugging Face hub.
        limit: use only the first rows of each task.
    Returns:
        A JSON-compatible report: {task: {metric: value}} under "results", and what is needed to
        reproduce it.
    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: see `local_files` and `hub_manager`.
    """
    library = harness()
    files = local_files(tasks, data) if data else {}
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would fork this multi-threaded process
    scorer = Scorer(run.model, run.tokenizer, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        found = library.simple_evaluate(
            model=as_harness_lm(scorer),
            tasks=list(tasks),
            task_manager=local_manager(files, Path(folder)) if data else hub_manager(tasks),
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
        )
    return {
        "run": str(run.path),
        "step": run.step,
        "lm_eval": library.__version__,
        "data": {path.name: sha256_of(path) for path in files.values()},
        "limit": limit,
        "n_truncated": scorer.n_truncated,
        "results": {task: _metrics(found, task) for task in found["results"]},
    }


def _metrics(found: dict[str, Any], task: str) -> dict[str, Any]:
    """Return a task's numeric metrics without the harness's filter names, and its row count n."""
    metrics = {
        key.removesuffix(",none"): value
        for key, value in found["results"][task].items()
        if "," in key and isinstance(value, int | float)
    }
    return metrics | {"n": found["n-samples"].get(task, {}).get("effective")}


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("eval.harness", __doc__)
    add = parser.add_argument
    add("run", help="a run's out_dir or a checkpoint's folder")
    add("--tasks", default="hellaswag,lambada_openai", help="task names, separated by commas")
    add("--data", type=Path, help="folder with the published files; default: download the data")
    add("--limit", type=int, help="evaluate only the first rows of each task")
    add("--out", type=Path, help="a JSON file for the report")
    add("--batch_size", type=int, default=8, help="texts that are scored at once")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--ema", action="store_true", help="use the averaged weights")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, arguments = parse(argv)
    limits = {"limit": arguments.limit, "batch_size": arguments.batch_size}
    try:
        for key, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"--{key}={value}: must be at least 1")
        if arguments.out and not arguments.out.parent.is_dir():
            raise ValueError(f"--out: the folder {arguments.out.parent} does not exist")
        run = load_run(arguments.run, device=pick_device(arguments.device), ema=arguments.ema)
        report = evaluate(run, arguments.tasks.split(","), data=arguments.data, **limits)
    except (CheckpointError, ImportError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    if arguments.out:
        write_atomic(arguments.out, [(json.dumps(report, indent=2) + "\n").encode()])
    for task, metrics in report["results"].items():
        print(task, *(f"{key}={value:.6g}" for key, value in metrics.items()), sep="  ")
    print(
        f"{report['n_truncated']} texts were longer than block_size and were truncated on the left"
    )


if __name__ == "__main__":
    main()
