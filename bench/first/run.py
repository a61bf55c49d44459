"""Use the first minutes on a GPU: correctness, step times, the loop, the kernels, a real run.

    python -m bench.gpu first [STEP ...] [--out FOLDER] [--nanogpt CHECKOUT] [--limit_s 580]

Steps, in this order, each with a time limit:
    correctness      compare every Triton kernel with float64; meanwhile fill the compiler's caches
    steps            DoPr-Muon and DoPr-AdamW (recommended, sampled, exact) against Muon and AdamW:
                     step time and memory of GPT-2 124M
    loop             the training loop against nanoGPT's; needs --nanogpt
    kernels_gram, kernels_apply, kernels_inverse
                     covariances, G P and inverses by Triton against torch
    pretraining      bench.pretraining in the time that is left; every call continues it
The command ends before --limit_s. A second call skips the steps that are complete for these sources
on such a machine, and continues the others; --again repeats them. FOLDER gets STEP.json after every
row of a step, and STEP.log with its output. A step that fails does not stop the next one. At the
end the command prints what was measured and what follows from it; `python -m bench.gpu decide`
prints it again. --tiny runs everything small on any machine, in Triton's interpreter.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.arguments import nanogpt_checkout
from bench.first.decide import read_results, report
from bench.first.plan import COMPILE, COMPILE_S, STEPS, FirstStep
from bench.process import GRACE_S, ROOT, exit_code, running
from bench.results import read_result, write_result
from eval.command import command_parser

COMPLETE = "complete"
REPORT_S = 10  # what is left for the report, which may import the trainer
START_S = 120  # the time limit for importing torch and finding the GPU
LEAST = 0.5  # the part of a step's time limit that must be left to start it
PROBE = "import json; from bench.timing import *; print(json.dumps(facts(DEVICE)))"


@dataclass(frozen=True)
class FirstRun:
    """One call of the command: where it writes, where it runs, and when it must end."""

    out: Path
    is_tiny: bool
    nanogpt: Path | None
    facts: dict[str, Any]
    variables: dict[str, str]
    ends: float

    def left_s(self) -> float:
        """Return the seconds that a step may still take, when it has to be ended by force."""
        return self.ends - time.perf_counter() - GRACE_S - REPORT_S

    def command(self, step: FirstStep, limit_s: float) -> list[str]:
        arguments = [*(step.tiny if self.is_tiny else step.full)]
        if step.has_seconds:
            arguments.append(f"--seconds={1 if self.is_tiny else max(1, limit_s - 15):.0f}")
        if step.uses_nanogpt:
            arguments.append(f"--nanogpt={self.nanogpt}")
        return [sys.executable, "-m", step.module, *arguments]


def obstacle(step: FirstStep, run: FirstRun) -> str:
    """Return what the step lacks here, or "" if it can run."""
    missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}; see requirements-gpu.txt"
    return "needs --nanogpt CHECKOUT" if step.uses_nanogpt and run.nanogpt is None else ""


def perform(name: str, run: FirstRun) -> bool:
    """Run a step unless it is complete, and add its outcome to its result.

    Returns False if too little time is left to start it.
    """
    step, path, started = STEPS[name], run.out / f"{name}.json", time.perf_counter()
    facts = None if step.is_endless else run.facts
    earlier = read_result(path, facts)
    if earlier is None or not earlier["rows"]:
        path.unlink(missing_ok=True)  # so that no old result looks new
    elif earlier.get("outcome") == COMPLETE:
        print(f"== {name}: complete in an earlier call", flush=True)
        return True
    limit_s, problem = min(step.limit_s, run.left_s()), obstacle(step, run)
    if not problem and limit_s < LEAST * step.limit_s:
        needed = LEAST * step.limit_s
        left = f"{max(0, limit_s):.0f} s are left, and it needs {needed:.0f} s"
        print(f"== {name}: not started, {left}", flush=True)
        return False
    outcome = f"skipped: {problem}" if problem else outcome_of(name, step, run, limit_s)
    seconds = time.perf_counter() - started
    result = read_result(path) or {"environment": run.facts, "rows": []}
    if n_failed := sum("exception" in row for row in result["rows"]):
        outcome = f"failed: {n_failed} of {len(result['rows'])} measurements raised; see {name}.log"
    result |= {"outcome": outcome, "seconds": seconds}
    write_result(path, result)
    print(f"== {name}: {outcome}, {seconds:.0f} s", flush=True)
    return True


def outcome_of(name: str, step: FirstStep, run: FirstRun, limit_s: float) -> str:
    """Run the step's command for at most `limit_s` seconds and describe how it ended."""
    command = [*run.command(step, limit_s), f"--out={run.out / name}.json"]
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    log = run.out / f"{name}.log"
    with log.open("wb") as output:
        code = exit_code(command, run.variables, limit_s, output)
    lines = log.read_text(errors="replace").strip().splitlines()
    print("\n".join(lines[-12:]), flush=True)
    if code is None:
        return f"stopped after {limit_s:.0f} s"
    if code:
        return f"failed with exit code {code}: {lines[-1] if lines else 'it printed nothing'}"
    return "continued" if step.is_endless else COMPLETE


@contextmanager
def compiling(run: FirstRun) -> Iterator[None]:
    """Compile the contenders of the step times meanwhile; wait for it at most COMPILE_S in all.

    This fills the caches of the compiler. It is not timed, and its failure is only in its log.
    """
    ends = time.perf_counter() + min(COMPILE_S, run.left_s())
    with ExitStack() as stack:
        output = stack.enter_context((run.out / "compile.log").open("wb"))
        processes = [
            stack.enter_context(running(run.command(step, COMPILE_S), run.variables, output))
            for step in COMPILE
        ]
        yield
        with suppress(subprocess.TimeoutExpired):  # the step that times them compiles the rest
            for process in processes:
                process.wait(max(0, ends - time.perf_counter()))


def perform_all(names: list[str], run: FirstRun) -> None:
    """Perform the steps in order, until too little time is left for one."""
    for name in names:
        result = read_result(run.out / f"{name}.json", run.facts)
        is_due = result is None or result.get("outcome") != COMPLETE
        with compiling(run) if name == "correctness" and is_due else nullcontext():
            is_done = perform(name, run)
        if not is_done:
            print("repeat the command to continue", flush=True)
            return


def probe(variables: dict[str, str]) -> dict[str, Any]:
    """Return the facts of this machine, from a process that imports torch.

    Raises RuntimeError if that fails or takes longer than START_S.
    """
    command = [sys.executable, "-c", PROBE]
    options: dict[str, Any] = {"cwd": ROOT, "env": variables, "timeout": START_S}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"torch does not run here: {error.stderr[-2000:]}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"torch did not find its device within {START_S} s") from None
    return json.loads(done.stdout)


def first_parser() -> argparse.ArgumentParser:
    parser = command_parser("bench.gpu first", __doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="default: all")
    parser.add_argument(
        "--out", type=Path, help="default: out/gpu_first, --tiny: out/gpu_tiny/first"
    )
    parser.add_argument("--nanogpt", type=nanogpt_checkout, help="a folder with nanoGPT's sources")
    parser.add_argument("--limit_s", type=float, default=580, help="time limit of this call")
    parser.add_argument("--again", action="store_true", help="repeat steps that are complete")
    parser.add_argument("--tiny", action="store_true", help="run small versions on any machine")
    return parser


def compiler_variables(cache: Path, *, is_tiny: bool) -> dict[str, str]:
    """Return the environment of the steps, which share the caches of inductor and Triton."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
    variables["TRITON_CACHE_DIR"] = str(cache / "triton")
    return variables | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if is_tiny else {})


def main(argv: list[str]) -> None:
    started, parser = time.perf_counter(), first_parser()
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.steps) - STEPS.keys():
        names = ", ".join(STEPS)
        parser.error(f"unknown step {', '.join(sorted(unknown))}; choose from {names}")
    out = arguments.out or ROOT / ("out/gpu_tiny/first" if arguments.tiny else "out/gpu_first")
    variables = compiler_variables(out.resolve() / "cache", is_tiny=arguments.tiny)
    try:
        facts = probe(variables)
    except RuntimeError as problem:
        parser.exit(2, f"error: {problem}\n")
    if "cuda" not in facts and not arguments.tiny:
        parser.error("needs a CUDA GPU; use --tiny to run without one")
    nanogpt = arguments.nanogpt and arguments.nanogpt.resolve()
    ends = started + arguments.limit_s
    run = FirstRun(out.resolve(), arguments.tiny, nanogpt, facts, variables, ends)
    run.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in STEPS if name in (arguments.steps or STEPS)]
    if arguments.again:
        for name in names:
            if not STEPS[name].is_endless:
                (run.out / f"{name}.json").unlink(missing_ok=True)
    perform_all(names, run)
    results = read_results(run.out)
    print(f"\n{report(results)}")
    found = [results[name] for name in names if name in results]
    has_failed = any(result["outcome"].startswith("failed") for result in found)
    is_wrong = any(row.get("is_right") is False for result in found for row in result["rows"])
    raise SystemExit(has_failed or is_wrong)
