"""Arguments that several benches share. Without torch: bench/gpu.py only starts others."""

import argparse
from collections.abc import Collection
from pathlib import Path

from eval.command import command_parser


def at_least_one(text: str) -> int:
    """A number of rounds."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def nanogpt_checkout(text: str) -> Path:
    """A folder with nanoGPT's sources."""
    if not (Path(text) / "train.py").is_file():
        raise argparse.ArgumentTypeError(f"{text}: no train.py there; wants a checkout of nanoGPT")
    return Path(text)


def operations_parser(
    name: str, about: str | None, operations: Collection[str], *, rounds: int, tiny: str
) -> argparse.ArgumentParser:
    """The parser of a bench of the kernels' operations; see `parse_operations`."""
    parser = command_parser(name, about)
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=", ".join(operations))
    parser.add_argument("--rounds", type=at_least_one, default=rounds)
    parser.add_argument("--tiny", action="store_true", help=tiny)
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    return parser


def parse_operations(
    parser: argparse.ArgumentParser, operations: Collection[str], *, has_gpu: bool
) -> argparse.Namespace:
    """The arguments, `operations` being all if none were given, and `rounds` 1 if tiny."""
    arguments = parser.parse_args()
    unknown = set(arguments.operations) - set(operations)
    if unknown:
        parser.error(f"no operation {', '.join(unknown)}; there are {', '.join(operations)}")
    require_gpu(parser, arguments.tiny or has_gpu)
    arguments.operations = arguments.operations or list(operations)
    arguments.rounds = 1 if arguments.tiny else arguments.rounds
    return arguments


def require_gpu(parser: argparse.ArgumentParser, can_run: bool) -> None:
    """End with an error unless the bench can run here."""
    if not can_run:
        parser.error("needs a CUDA GPU; --tiny with TRITON_INTERPRET=1 runs without one")
