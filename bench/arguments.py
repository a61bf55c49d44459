"""Command-line arguments that several benchmarks share. Imports no torch."""

import argparse
from collections.abc import Collection
from pathlib import Path

from eval.command import command_parser, positive_int


def nanogpt_checkout(text: str) -> Path:
    """Parse the path of a folder that contains nanoGPT's sources."""
    if not (Path(text) / "train.py").is_file():
        raise argparse.ArgumentTypeError(f"{text}: contains no train.py; give a nanoGPT checkout")
    return Path(text)


def bench_parser(name: str, about: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Make the parser of `bench.<name>`, with the arguments --rounds and --out."""
    parser = command_parser(f"bench.{name}", about)
    parser.add_argument("--rounds", type=positive_int, default=rounds, help=f"default: {rounds}")
    parser.add_argument("--out", type=Path, help="write the result to this file, as JSON")
    return parser


def parse_operations(
    name: str,
    about: str | None,
    operations: Collection[str],
    *,
    rounds: int,
    tiny: str,
    has_gpu: bool,
) -> argparse.Namespace:
    """Parse the command line of a benchmark of single operations.

    `operations` defaults to all operations, and --tiny sets `rounds` to 1. `tiny` is the help text
    of --tiny.
    """
    parser = bench_parser(name, about, rounds=rounds)
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=", ".join(operations))
    parser.add_argument("--tiny", action="store_true", help=tiny)
    arguments = parser.parse_args()
    unknown = set(arguments.operations) - set(operations)
    if unknown:
        names = ", ".join(operations)
        parser.error(f"unknown operation {', '.join(sorted(unknown))}; choose from {names}")
    require_gpu(parser, arguments.tiny or has_gpu)
    arguments.operations = arguments.operations or list(operations)
    arguments.rounds = 1 if arguments.tiny else arguments.rounds
    return arguments


def require_gpu(parser: argparse.ArgumentParser, can_run: bool) -> None:
    """Exit with an error unless the benchmark can run on this machine."""
    if not can_run:
        parser.error("needs a CUDA GPU; use --tiny and TRITON_INTERPRET=1 to run without one")
