"""Pretrain a small GPT on easy arithmetic, and export it as a Hugging Face folder.

    python -m studies.finetune.pretrain --out FOLDER --seed 0

FOLDER/data has the files of arithmetic.py, FOLDER/run the run of train.py, and FOLDER/model the
exported model. Extra words are settings of train.py, such as --n_embd=128.
"""

import sys
from pathlib import Path
from typing import Any

import train
from data.text.prepare import main as prepare_text
from eval.command import command_parser, output_folder, reported_errors
from eval.hf import export_run
from studies.finetune.arithmetic import write_data

SETTINGS: dict[str, Any] = {
    **{"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 96, "device": "cpu"},
    **{"optimizer": "muon", "lr": 1.6e-2, "aux_lr": 4e-3, "batch_size": 16, "micro_batch_size": 16},
    **{"max_steps": 3500, "warmup_steps": 100, "min_lr_ratio": 0, "weight_decay": 0.1},
    **{"eval_every": 1000, "log_every": 500, "save_every": 100_000, "keep_checkpoints": 1},
}


def pretrain(out: Path, seed: int, changes: list[str]) -> Path:
    """Write the data, train and export; return the folder of the exported model.

    Raises what train.run raises, and ValueError if the training ends early.
    """
    data, dataset, run = out / "data", out / "dataset", out / "run"
    write_data(data, seed)
    source = ["--input", str(data / "pretrain.jsonl"), "--out", str(dataset)]
    prepare_text([*source, "--tokenizer", "byte", "--num_proc", "1"])
    settings = SETTINGS | {"dataset": dataset, "out_dir": run, "seed": seed}
    code = train.run([*(f"--{key}={value}" for key, value in settings.items()), *changes])
    if code:
        raise ValueError(f"the pretraining in {run} ended with exit code {code}")
    export_run(run, out / "model", ema=False, overwrite=True)
    return out / "model"


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("studies.finetune.pretrain", __doc__)
    parser.add_argument("--out", type=output_folder, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments, changes = parser.parse_known_args(argv)
    with reported_errors(parser):
        pretrain(arguments.out, arguments.seed, changes)


if __name__ == "__main__":
    main(sys.argv[1:])
