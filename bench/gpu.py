"""All that is to be measured on a GPU, in stages that each end within ten minutes.

    python -m bench.gpu [STAGE ...] [--out FOLDER] [--nanogpt CHECKOUT] [--tiny]

Stages, in this order:
    tests            of the Triton kernels
    report           what the compiler makes of them
    kernels          each against torch
    tiles            their configurations against each other
    head             of 50,257 ids, as it is and over whole tiles
    step_adamw       time and memory of a step of GPT-2 124M, 0.5M tokens, with DoPr and without
    step_muon        the same
    step_muon_torch  the same without the kernels
    throughput       of our loop, and with --nanogpt of nanoGPT's
    pretraining      a real run: Muon, DoPr-Muon and precisions; call it again to go on with it
    suite            every test but the slow
A stage that fails or takes longer is reported and the others run; what was measured until then is
in its file. --tiny runs the logic of every stage in Triton's interpreter, without a GPU.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench.arguments import nanogpt_checkout
from eval.command import command_parser, leave_on_signals

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 590
GRACE_S = 10


class GpuStage(NamedTuple):
    """A module to run, its arguments at full size and tiny, and whether it writes a result."""

    module: str
    full: list[str]
    tiny: list[str]
    has_result: bool = True
    is_compiled: bool = False  # even if tiny: not in the interpreter
    continues: bool = False  # from the result of an earlier call


def step(*arguments: str) -> GpuStage:
    module = "bench.step_overhead"
    full, tiny = ["--preset", "gpt2", "--rounds", "3"], ["--preset", "tiny", "--rounds", "1"]
    return GpuStage(module, [*full, *arguments], [*tiny, *arguments])


def test_files() -> list[str]:
    """The tests that run on a GPU; without one they are run by test_triton_interpreted.py."""
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
        is_compiled=True,
    ),
    "kernels": GpuStage("bench.kernels", [], ["--tiny"]),
    "tiles": GpuStage("bench.tiles", [], ["--tiny"]),
    "head": GpuStage("bench.head", [], ["--tiny"]),
    "step_adamw": step("--optimizers", "adamw", *NEWTON_SCHULZ),
    "step_muon": step("--optimizers", "muon", *NEWTON_SCHULZ),
    "step_muon_torch": step("--optimizers", "muon", "--backend", "torch"),
    "throughput": GpuStage(
        *("bench.train_throughput", ["--preset", "gpt2", "--rounds", "2"]),
        ["--preset", "tiny", "--rounds", "1"],
    ),
    "pretraining": GpuStage("bench.pretraining", [], ["--tiny", "--seconds", "1"], continues=True),
    "suite": GpuStage(
        *("pytest", SUITE, [*PYTEST, str(ROOT / "tests/trainer/test_signals.py")]),
        has_result=False,
        is_compiled=True,
    ),
}


def run(name: str, out: Path, *, tiny: bool, more: list[str] | None = None) -> bool:
    """Whether the stage, with `more` arguments, came to its end; its output passes through."""
    stage = STAGES[name]
    command = [sys.executable, "-m", stage.module, *(stage.tiny if tiny else stage.full)]
    command += more or []
    if stage.has_result:
        result = out / f"gpu_{name}.json"
        if tiny or not stage.continues:
            result.unlink(missing_ok=True)  # one of an earlier run would pass for this one's
        command += ["--out", str(result)]
    environment = {**os.environ}
    if tiny and not stage.is_compiled:
        environment["TRITON_INTERPRET"] = "1"
    if stage.module == "pytest":
        environment["OMP_NUM_THREADS"] = "1"
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    started = time.perf_counter()
    code = exit_code(command, environment)
    how = "ok" if code == 0 else f"FAILED with exit code {code}"
    how = f"STOPPED after {LIMIT_S} s" if code is None else how
    print(f"== {name}: {how}, {time.perf_counter() - started:.0f} s", flush=True)
    return code == 0


def exit_code(command: list[str], environment: dict[str, str]) -> int | None:
    """None if it took longer than LIMIT_S; nothing that it started runs on, whatever happens."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # to clean up after itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = command_parser("bench.gpu", __doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, help="a folder: bench/results, or if tiny out/gpu_tiny")
    parser.add_argument("--nanogpt", type=nanogpt_checkout, help="a checkout of nanoGPT")
    parser.add_argument("--tiny", action="store_true", help="the logic alone, on any machine")
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - STAGES.keys()
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    default = ROOT / ("out/gpu_tiny" if arguments.tiny else "bench/results")
    out = (arguments.out or default).resolve()
    more = {}
    if arguments.nanogpt:
        more["throughput"] = ["--nanogpt", str(arguments.nanogpt.resolve())]
    names = arguments.stages or list(STAGES)
    done = [run(name, out, tiny=arguments.tiny, more=more.get(name)) for name in names]
    raise SystemExit(not all(done))


if __name__ == "__main__":
    leave_on_signals()
    main()
