"""What the commands `python -m eval...` share: a parser whose help is the module's docstring."""

import argparse


def command_parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The empty parser of `python -m eval.<name>`; the help keeps the lines of `about`."""
    return argparse.ArgumentParser(
        prog=f"python -m eval.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
