"""Evaluate a model on tasks of EleutherAI's lm-evaluation-harness.

    python -m eval.harness out/run --tasks hellaswag,lambada_openai --data DIR
    python -m eval.harness out/run --tasks hellaswag --limit 200 --out hellaswag.json

With --data nothing is downloaded: DIR must contain hellaswag_val.jsonl and lambada_test.jsonl as
their authors publish them. Without --data all tasks of the harness are available, and it downloads
their data from the Hugging Face hub. The model is exported to a temporary Hugging Face folder, so
that prompts, likelihoods and metrics are the harness's own. Texts longer than block_size are
truncated on the left; the output says how many were scored that way.
"""

import argparse
import difflib
import importlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from data.files import sha256_of, write_atomic
from data.hub import is_offline, silent_endpoint
from data.schema import OpenSchema, read_json_lines
from eval.command import (
    DEVICES,
    at_least,
    command_parser,
    output_file,
    pick_device,
    reported_errors,
)
from eval.hf import export_hf
from eval.run import Run, load_run

Ending = Annotated[str, Field(pattern=r"\S")]  # holds more than white space


class LocalRow(OpenSchema):
    """A row of a dataset file as its authors publish it, and the harness task that reads it."""

    file: ClassVar[str]
    definition: ClassVar[str]  # path of the task's definition below lm_eval/tasks
    split: ClassVar[str]


class HellaSwagRow(LocalRow):
    file = "hellaswag_val.jsonl"
    definition = "hellaswag/hellaswag.yaml"
    split = "validation"

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Annotated[list[Ending], Field(min_length=4, max_length=4)]
    # An integer in the authors' file, a string on the hub.
    label: Annotated[int, Field(ge=0, le=3)] | Literal["0", "1", "2", "3"]


class LambadaRow(LocalRow):
    file = "lambada_test.jsonl"
    definition = "lambada/lambada_openai.yaml"
    split = "test"

    text: Annotated[str, Field(pattern=r"\S\s+\S")]  # at least two words


LOCAL: dict[str, type[LocalRow]] = {"hellaswag": HellaSwagRow, "lambada_openai": LambadaRow}


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


def harness_model(folder: Path, device: str, batch_size: int) -> Any:
    """Load a Hugging Face folder in float32 as the harness's model, which counts `n_truncated`."""

    class Model(harness("lm_eval.models.huggingface").HFLM):
        n_truncated = 0

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            for texts, context, continuation in requests:
                if not 1 <= len(continuation) <= self.max_length:
                    raise ValueError(
                        f"continuation {texts[1][:60]!r} has {len(continuation)} tokens; this "
                        f"model can score 1 to block_size={self.max_length} tokens"
                    )
                self.n_truncated += len(context) + len(continuation) > self.max_length + 1
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    return Model(str(folder), device=device, dtype="float32", batch_size=batch_size)


def local_files(tasks: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return the file of each task in `folder`; raise ValueError if there is none."""
    if unknown := [task for task in tasks if task not in LOCAL]:
        raise ValueError(f"--data supports {', '.join(LOCAL)}, but not {', '.join(unknown)}")
    files = {task: folder / LOCAL[task].file for task in tasks}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise ValueError(f"no such file: {', '.join(missing)}; get it from the dataset's authors")
    return files


def read_rows(path: Path, schema: type[LocalRow]) -> list[dict[str, Any]]:
    """Read the rows of a local file, without the columns that the harness does not need.

    Raises:
        ValueError: the file is empty, or a row does not fit. The message names the line.
    """
    rows = [row.model_dump() for _, row in read_json_lines(path, schema, ValueError)]
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def local_manager(files: dict[str, Path], folder: Path) -> Any:
    """Return a task manager whose tasks read `files`; write rows and definitions to `folder`."""
    library = harness("lm_eval.tasks")
    for task, path in files.items():
        rows = read_rows(path, LOCAL[task])
        data = folder / path.name
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        content = {
            "include": str(Path(library.__file__).parent / LOCAL[task].definition),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "training_split": None,  # the harness needs it for few-shot examples only
            "dataset_kwargs": {"data_files": {LOCAL[task].split: str(data)}},
        }
        write_atomic(folder / f"{task}.yaml", json.dumps(content))  # JSON is YAML
    return library.TaskManager(include_path=str(folder), include_defaults=False)


def hub_manager(tasks: Sequence[str]) -> Any:
    """Return the harness's task manager, whose tasks download their data.

    Raises ValueError at once, and not late, if the hub cannot be reached or a task is unknown.
    """
    if not is_offline() and (endpoint := silent_endpoint()):
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
    device: str = "cpu",
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
        ValueError: a task is not available, a row of `data` does not fit, or a text cannot be
            scored by this model.
    """
    library, files = harness(), local_files(tasks, data) if data else {}
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would fork this multi-threaded process
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manager = local_manager(files, folder) if data else hub_manager(tasks)
        export_hf(run.model, run.tokenizer, folder / "model")
        model = harness_model(folder / "model", device, batch_size)
        try:
            found = library.simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
            )
        except AssertionError as error:  # for example more new tokens than block_size
            raise ValueError(f"the harness cannot evaluate this model: {error}") from error
    return {
        "run": str(run.path),
        "step": run.step,
        "lm_eval": library.__version__,
        "data": {path.name: sha256_of(path) for path in files.values()},
        "limit": limit,
        "n_truncated": model.n_truncated,
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
    add("run", type=Path, help="a run's out_dir, a checkpoint's or a Hugging Face folder")
    add("--tasks", default="hellaswag,lambada_openai", help="task names, separated by commas")
    add("--data", type=Path, help="folder with the published files; default: download the data")
    add("--limit", type=int, help="evaluate only the first rows of each task")
    add("--out", type=output_file, help="a JSON file for the report")
    add("--batch_size", type=int, default=8, help="texts that are scored at once")
    add("--device", choices=DEVICES, default="auto")
    add("--ema", action="store_true", help="use the averaged weights")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, arguments = parse(argv)
    limits = {"limit": arguments.limit, "batch_size": arguments.batch_size}
    with reported_errors(parser):
        at_least(1, **limits)
        tasks, device = arguments.tasks.replace(" ", "").split(","), pick_device(arguments.device)
        run = load_run(arguments.run, ema=arguments.ema)
        report = evaluate(run, tasks, data=arguments.data, device=device, **limits)
        if arguments.out:
            write_atomic(arguments.out, json.dumps(report, indent=2) + "\n")
        for task, metrics in report["results"].items():
            print(task, *(f"{key}={value:.6g}" for key, value in metrics.items()), sep="  ")
        print(f"{report['n_truncated']} texts were longer than block_size and were truncated")


if __name__ == "__main__":
    main()
