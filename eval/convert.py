"""Convert a checkpoint between the full and the sharded format, or export it to Hugging Face.

    python -m eval.convert out/run out/run_full --to full
    python -m eval.convert out/run/checkpoints/step-00000100 hf_model --to hf

`--to full` and `--to sharded` write TARGET/checkpoints/step-N. To resume from it, pass that folder
to train.py as --resume.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from eval.command import command_parser, output_folder, reported_errors
from eval.hf import export_run
from trainer.checkpoint.read import Checkpoint, CheckpointError, candidates, open_checkpoint
from trainer.checkpoint.sharded import read_all
from trainer.checkpoint.write import save_checkpoint, save_sharded
from trainer.parallel import Parallel

WRITER_FIELDS = ("schema", "step", "files", "format")  # manifest fields that the writer sets anew


def convert(source: Checkpoint, root: Path, *, to_shards: bool) -> Path:
    """Write `source` as `root/step-N`, full or in shards, and return the new folder."""
    facts = {key: value for key, value in source.manifest.items() if key not in WRITER_FIELDS}
    tensors = {"model": source.model, "ema": source.ema, "train": source.train}
    arguments: dict[str, Any] = read_all(tensors) | {"manifest": facts, "keep": 1}
    arguments["tokenizer_json"] = (source.path / "tokenizer.json").read_bytes()
    if to_shards:
        parallel = Parallel(torch.device("cpu"))
        return save_sharded(root, source.step, parallel, **arguments)
    return save_checkpoint(root, source.step, **arguments)


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("eval.convert", __doc__)
    add = parser.add_argument
    add("source", type=Path, help="a run's out_dir (newest checkpoint) or a checkpoint's folder")
    add("target", type=output_folder, help="the folder to write; it must not contain checkpoints")
    add("--to", choices=["full", "sharded", "hf"], required=True, help="the format to write")
    add("--ema", action="store_true", help="export the averaged weights (with --to hf only)")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, arguments = parse(argv)
    source, target, to = arguments.source, arguments.target, arguments.to
    with reported_errors(parser):
        if arguments.ema and to != "hf":
            raise ValueError(f"--ema has no effect with --to {to}, which writes both weights")
        if to == "hf":
            export_run(source, target, ema=arguments.ema)
            return
        if candidates(target / "checkpoints"):
            raise CheckpointError(f"{target} already contains checkpoints; choose another folder")
        found = open_checkpoint(source)
        written = convert(found, target / "checkpoints", to_shards=to == "sharded")
        print(f"step {found.step} of {source} written to {written}")


if __name__ == "__main__":
    main()
