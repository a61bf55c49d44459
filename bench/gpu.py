"""All that is to be measured on a GPU, in stages that each end within ten minutes.

    python -m bench.gpu [STAGE ...] [--out FOLDER] [--tiny]

Stages, in this order: tests (of the Triton kernels), report (what the compiler makes of them),
kernels (each against torch), and step time and memory of GPT-2 124M at 0.5M tokens a step:
step_adamw and step_muon with the kernels, step_muon_torch without. A stage that fails or takes
longer is reported and the others run; what was measured until then is in its file. --tiny runs the
logic of every stage in Triton's interpreter, without a GPU.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from eval.command import command_parser

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 590


class Stage(NamedTuple):
    """A module to run, its arguments at full size and tiny, and whether it writes a result."""

    module: str
    full: list[str]
    tiny: list[str]
    has_result: bool = True
    is_compiled: bool = False  # even if tiny: not in the interpreter


def step(*arguments: str) -> Stage:
    module = "bench.step_overhead"
    full, tiny = ["--preset", "gpt2", "--rounds", "3"], ["--preset", "tiny", "--rounds", "1"]
    return Stage(module, [*full, *arguments], [*tiny, *arguments])


def test_files() -> list[str]:
    """The tests that run on a GPU; without one they are run by test_triton_interpreted.py."""
    files = sorted((ROOT / "tests/kernels").glob("test_triton_*.py"))
    return [str(file) for file in files if file.stem != "test_triton_interpreted"]


PYTEST = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
NEWTON_SCHULZ = ["--inverse", "newton_schulz"]
STAGES = {
    "tests": Stage(
        *("pytest", [*PYTEST, *test_files()]),
        [*PYTEST, str(ROOT / "tests/kernels/test_triton_gram.py"), "-k", "integer_valued"],
        has_result=False,
    ),
    "report": Stage(
        *("bench.kernel_report", [], ["--archs", "90", "--kernels", "reduce"]),
        has_result=False,
        is_compiled=True,
    ),
    "kernels": Stage("bench.kernels", [], ["--tiny"]),
    "step_adamw": step("--optimizers", "adamw", *NEWTON_SCHULZ),
    "step_muon": step("--optimizers", "muon", *NEWTON_SCHULZ),
    "step_muon_torch": step("--optimizers", "muon", "--kernel", "torch"),
}


def run(name: str, out: Path, *, tiny: bool) -> bool:
    """Whether the stage came to its end; its output passes through."""
    stage = STAGES[name]
    command = [sys.executable, "-m", stage.module, *(stage.tiny if tiny else stage.full)]
    if stage.has_result:
        result = out / f"gpu_{name}.json"
        result.unlink(missing_ok=True)  # one of an earlier run would pass for this one's
        command += ["--out", str(result)]
    environment = {**os.environ}
    if tiny and not stage.is_compiled:
        environment["TRITON_INTERPRET"] = "1"
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    started = time.perf_counter()
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT_S).returncode
        how = "ok" if code == 0 else f"FAILED with exit code {code}"
    except subprocess.TimeoutExpired:
        how = f"STOPPED after {LIMIT_S} s"
    print(f"== {name}: {how}, {time.perf_counter() - started:.0f} s", flush=True)
    return how == "ok"


def main() -> None:
    parser = command_parser("gpu", __doc__, "bench")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, help="a folder: bench/results, or if tiny out/gpu_tiny")
    parser.add_argument("--tiny", action="store_true", help="the logic alone, on any machine")
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - STAGES.keys()
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    default = ROOT / ("out/gpu_tiny" if arguments.tiny else "bench/results")
    out = (arguments.out or default).resolve()
    done = [run(name, out, tiny=arguments.tiny) for name in arguments.stages or STAGES]
    raise SystemExit(not all(done))


if __name__ == "__main__":
    main()
