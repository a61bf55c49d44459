"""Kill training runs at random instants, resume them, and check that nothing is lost or changed.

    python -m bench.kills [--kills 1000] [--seed 0] [--out FILE]

Each run trains a tiny model with DoPr on a CPU, saves every second step, and is killed (SIGKILL) a
random time of 0 to 2 s after its first step; one in ten attempts is killed within the first second
after its start, while it resumes. The next attempt has resume=auto. Half of the runs write full
checkpoints, half sharded ones. After every kill this checks that

    no damaged checkpoint stands under a final name
    the newest checkpoint is the last one that had been published, or a later one
    the next attempt resumes from this checkpoint

and at the end of every run that its weights equal those of an uninterrupted run bit for bit.
Processes are forked from one that has imported torch.
"""

import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from eval.command import command_parser, positive_int

PRELOAD = ["torch.distributed.checkpoint", "train"]
FORMATS = ("full", "sharded")
LIMIT_S = 600.0  # for one attempt
RUN = {
    **{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "bias": "false"},
    **{"batch_size": 4, "micro_batch_size": 4, "max_steps": 300, "warmup_steps": 10, "lr": 3e-3},
    **{"dopr": "true", "sigma_beta": 0.9, "refresh_every": 3, "device": "cpu", "log_every": 1},
    **{"eval_every": 10_000, "eval_batches": 1, "ema_decay": 0.9},
}


@dataclass
class Tally:
    """What was counted and what went wrong, over all runs."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def check(self, claim: str, is_true: bool, details: str) -> None:
        self.counts[claim] += is_true
        if not is_true:
            self.failures.append(f"{claim}: {details}")


def attempt(arguments: list[str], log: Path, connection: Connection) -> None:
    """Train in this process, with the output in `log`; report each event as (event, step)."""
    import torch
    from tqdm import tqdm

    import train
    from trainer.checkpoint import write
    from trainer.checkpoint.read import step_of
    from trainer.checkpoint.state import TrainState

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own would outlive a killed process
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)

    publish, lock = write.publish, threading.Lock()

    def report(name: str, step: int) -> None:
        with lock:  # checkpoints are published in a thread
            connection.send((name, step))

    def reporting(name: str) -> Any:
        function = getattr(TrainState, name)

        def method(state: TrainState, *args: Any, **kwargs: Any) -> None:
            function(state, *args, **kwargs)
            report(name, state.step)

        return method

    def published(partial: Path, final: Path) -> None:
        publish(partial, final)
        report("publish", step_of(final))

    for name in ("restore", "count_step"):
        setattr(TrainState, name, reporting(name))
    write.publish = published
    report("exit", train.main(arguments))


class Attempt:
    """One process that trains until it is killed or finished."""

    def __init__(self, out: Path, **changes: object) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        settings = RUN | {"out_dir": out} | changes
        arguments = [f"--{key}={value}" for key, value in settings.items()]
        self._connection, child = context.Pipe()
        self.last: dict[str, int] = {}  # the newest step, or the exit code, by event
        self._process = context.Process(
            target=attempt, args=(arguments, out.with_suffix(".log"), child)
        )
        self._process.start()
        child.close()

    def wait(self, event: str, seconds: float) -> bool:
        """Wait until `event` is reported; return False if the time or the process ends first."""
        deadline = time.monotonic() + seconds
        while event not in self.last:
            left = deadline - time.monotonic()
            if left < 0 or not self._connection.poll(left):
                return False
            try:
                name, step = self._connection.recv()
            except EOFError:
                return False
            self.last[name] = step
        return True

    def kill(self) -> None:
        """Kill the process, and read everything it has reported."""
        self._process.kill()
        self._process.join()
        self.wait("nothing", LIMIT_S)


def killed_run(out: Path, form: str, rng: random.Random, n_left: int, tally: Tally) -> bool:
    """Kill a run up to `n_left` times; return whether it then finished."""
    from trainer.checkpoint.read import newest_good

    expected = None  # the step to resume from
    while True:
        current = Attempt(out, save_every=2, checkpoint_format=form)
        if n_left == 0:
            is_done = current.wait("exit", LIMIT_S)
        elif rng.random() < 0.1:
            is_done = current.wait("exit", rng.uniform(0, 1))
        else:
            current.wait("count_step", LIMIT_S)
            is_done = current.wait("exit", rng.uniform(0, 2))
        current.kill()
        if expected is not None and "restore" in current.last:
            details = f"{current.last}, but the newest checkpoint was of step {expected}"
            tally.check("resumed from the newest", current.last["restore"] == expected, details)
        if is_done or n_left == 0:
            return is_done and current.last["exit"] == 0
        n_left -= 1
        tally.counts["kills"] += 1
        tally.counts[f"kills of {form}"] += 1
        tally.counts["kills before the first step"] += "count_step" not in current.last
        root = out / "checkpoints"
        tally.counts["kills that left a temporary folder"] += bool([*root.glob("step-*.tmp")])
        damaged: list[str] = []
        found = newest_good(root, damaged.append)
        tally.check("without damage", not damaged, f"{out}: {damaged}")
        expected = found.step if found else None
        saved = current.last.get("publish", -1)
        is_kept = saved < 0 or (found is not None and found.step >= saved)
        tally.check("nothing lost", is_kept, f"{out}: {current.last}, found {expected}")


def weights_of(out: Path) -> dict[str, Any]:
    """Return the final weights and averaged weights of a run."""
    from trainer.checkpoint.read import open_checkpoint
    from trainer.checkpoint.sharded import read_all

    found = open_checkpoint(out)
    assert found.step == RUN["max_steps"], f"{out} ended at step {found.step}"
    tensors = read_all({"model": found.model, "ema": found.ema})
    return {f"{kind} {key}": value for kind in tensors for key, value in tensors[kind].items()}


def measure(n_kills: int, seed: int, folder: Path) -> Iterator[Tally]:
    """Kill runs, alternating between the formats, `n_kills` times; yield the tally after each."""
    import torch

    from data.dataset import open_dataset

    open_dataset("pystdlib")  # prepares it
    rng, tally = random.Random(seed), Tally()
    undisturbed = Attempt(folder / "undisturbed", save_every=100_000)
    assert undisturbed.wait("exit", LIMIT_S), "the uninterrupted run failed"
    undisturbed.kill()
    wanted = weights_of(folder / "undisturbed")
    quotas = {"full": n_kills - n_kills // 2, "sharded": n_kills // 2}
    for i in count():
        lacking = {form: n - tally.counts[f"kills of {form}"] for form, n in quotas.items()}
        form = max(lacking, key=lambda form: lacking[form])
        if not lacking[form]:
            return
        out = folder / f"run{i}"
        tally.check("finished", killed_run(out, form, rng, lacking[form], tally), str(out))
        found = weights_of(out)
        is_equal = found.keys() == wanted.keys() and all(
            torch.equal(found[key], wanted[key]) for key in wanted
        )
        tally.check("equal to the undisturbed run", is_equal, str(out))
        yield tally


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 if a claim failed."""
    parser = command_parser("bench.kills", __doc__)
    parser.add_argument("--kills", type=positive_int, default=1000, help="default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the instants; default: 0")
    parser.add_argument("--out", type=Path, help="write the result to this file, as JSON")
    arguments = parser.parse_args(argv)
    import torch

    from trainer.provenance import provenance

    facts = {
        "seed": arguments.seed,
        "settings": RUN,
        "environment": provenance(torch.device("cpu")),
    }
    started, tally = time.monotonic(), Tally()
    with tempfile.TemporaryDirectory() as folder:
        for tally in measure(arguments.kills, arguments.seed, Path(folder)):
            n, failed = tally.counts["kills"], len(tally.failures)
            print(f"{n}/{arguments.kills} kills, {failed} failures", flush=True)
            result = {"counts": dict(tally.counts), "failures": tally.failures, **facts}
            result["seconds"] = round(time.monotonic() - started)
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(dict(tally.counts), indent=2))
    print("\n".join(tally.failures) or "no failures")
    return int(bool(tally.failures))


if __name__ == "__main__":
    raise SystemExit(main())
