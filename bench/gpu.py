"""Run every GPU benchmark and the GPU tests, in stages of at most ten minutes each.

    python -m bench.gpu first [--nanogpt CHECKOUT]    # on a new GPU: the most in eleven minutes
    python -m bench.gpu decide [FOLDER]               # what follows from the results of `first`
    python -m bench.gpu [STAGE ...] [--out FOLDER] [--nanogpt CHECKOUT] [--tiny]

`first --help` describes its steps. The stages, in this order:
    tests            test the Triton kernels
    report           report the registers and the shared memory of the Triton kernels
    kernels          compare each kernel with torch
    tiles            compare the tile configurations of each kernel
    head             compare a head of 50,257 ids with and without padding to whole tiles
    step_adamw       time and memory of a step of GPT-2 124M, 0.5M tokens, with and without DoPr
    step_muon        the same with Muon
    step_muon_torch  the same with Muon and without the Triton kernels
    throughput       speed of our training loop, and with --nanogpt also of nanoGPT's
    pretraining      train with Muon, DoPr-Muon and other precisions; repeat this stage to continue
    suite            run all tests that are not marked slow
If a stage fails or exceeds its time limit, the command reports it and runs the other stages. The
stage's file keeps the rows measured until then. --tiny runs the code of every stage on any
machine, in Triton's interpreter where it needs Triton.
"""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench.arguments import nanogpt_checkout
from bench.first import decide as decisions
from bench.first import run as first
from bench.process import ROOT, exit_code
from eval.command import command_parser, leave_on_signals

LIMIT_S = 590


class GpuStage(NamedTuple):
    """A module to run, with its arguments at full size and with --tiny."""

    module: str
    full: list[str]
    tiny: list[str]
    has_result: bool = True  # whether it writes a JSON file
    needs_compiler: bool = False  # whether --tiny runs it without Triton's interpreter, too
    continues: bool = False  # whether it continues the result of an earlier call


def step_stage(*arguments: str) -> GpuStage:
    module = "bench.step_overhead"
    full, tiny = ["--preset", "gpt2", "--rounds", "3"], ["--preset", "tiny", "--rounds", "1"]
    return GpuStage(module, [*full, *arguments], [*tiny, *arguments])


def test_files() -> list[str]:
    """Return the test files of the Triton kernels.

    Without a GPU, test_triton_interpreted.py runs these tests.
    """
    files = sorted((ROOT / "tests/kernels").glob("test_triton_*.py"))
    return [str(file) for file in files if file.stem != "test_triton_interpreted"]


PYTEST = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
SUITE = ["-q", "-n", "8", "--dist", "loadgroup", "-m", "not slow", str(ROOT / "tests")]
NEWTON_SCHULZ = ["--inverse", "newton_schulz"]
STAGES = {
    "tests": GpuStage(
        *("pytest", [*PYTEST, *test_files()]),
        [*PYTEST, str(ROOT / "tests/kernels/test_triton_gram.py"), "-k", "integer_valued"],
        has_result=False,
    ),
    "report": GpuStage(
        *("bench.kernel_report", [], ["--archs", "90", "--kernels", "reduce"]),
        has_result=False,
        needs_compiler=True,
    ),
    "kernels": GpuStage("bench.kernels", [], ["--tiny"]),
    "tiles": GpuStage("bench.tiles", [], ["--tiny"]),
    "head": GpuStage("bench.head", [], ["--tiny"]),
    "step_adamw": step_stage("--optimizers", "adamw", *NEWTON_SCHULZ),
    "step_muon": step_stage("--optimizers", "muon", *NEWTON_SCHULZ),
    "step_muon_torch": step_stage("--optimizers", "muon", "--backend", "torch"),
    "throughput": GpuStage(
        *("bench.train_throughput", ["--preset", "gpt2", "--rounds", "2"]),
        ["--preset", "tiny", "--rounds", "1"],
    ),
    "pretraining": GpuStage("bench.pretraining", [], ["--tiny", "--seconds", "1"], continues=True),
    "suite": GpuStage(
        *("pytest", SUITE, [*PYTEST, str(ROOT / "tests/trainer/test_signals.py")]),
        has_result=False,
        needs_compiler=True,
    ),
}


def run(name: str, out: Path, *, tiny: bool, extra: list[str] | None = None) -> bool:
    """Run a stage with `extra` arguments. Return whether it succeeded."""
    stage = STAGES[name]
    command = [sys.executable, "-m", stage.module, *(stage.tiny if tiny else stage.full)]
    command += extra or []
    if stage.has_result:
        result = out / f"gpu_{name}.json"
        if tiny or not stage.continues:
            result.unlink(missing_ok=True)  # so that no old result looks new
        command += ["--out", str(result)]
    environment = {**os.environ}
    if tiny and not stage.needs_compiler:
        environment["TRITON_INTERPRET"] = "1"
    if stage.module == "pytest":
        environment["OMP_NUM_THREADS"] = "1"
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    started = time.perf_counter()
    code = exit_code(command, environment, LIMIT_S)
    outcome = "ok" if code == 0 else f"FAILED with exit code {code}"
    outcome = f"STOPPED after {LIMIT_S} s" if code is None else outcome
    print(f"== {name}: {outcome}, {time.perf_counter() - started:.0f} s", flush=True)
    return code == 0


def decide(argv: list[str]) -> None:
    """Print what the results in a folder say."""
    parser = command_parser("bench.gpu decide", decisions.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "out/gpu_first")
    folder = parser.parse_args(argv).folder
    if not (results := decisions.read_results(folder)):
        parser.error(f"{folder} has no results; run python -m bench.gpu first")
    print(decisions.report(results))


def main() -> None:
    commands = {"first": first.main, "decide": decide}
    if command := commands.get("".join(sys.argv[1:2])):
        return command(sys.argv[2:])
    parser = command_parser("bench.gpu", __doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument(
        "--out", type=Path, help="default: bench/results; with --tiny, out/gpu_tiny"
    )
    parser.add_argument("--nanogpt", type=nanogpt_checkout, help="a folder with nanoGPT's sources")
    parser.add_argument("--tiny", action="store_true", help="run tiny versions on any machine")
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - STAGES.keys()
    if unknown:
        names = ", ".join(STAGES)
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {names}")
    default = ROOT / ("out/gpu_tiny" if arguments.tiny else "bench/results")
    out = (arguments.out or default).resolve()
    extra = {}
    if arguments.nanogpt:
        extra["throughput"] = ["--nanogpt", str(arguments.nanogpt.resolve())]
    names = arguments.stages or list(STAGES)
    succeeded = [run(name, out, tiny=arguments.tiny, extra=extra.get(name)) for name in names]
    raise SystemExit(not all(succeeded))


if __name__ == "__main__":
    leave_on_signals()
    main()
