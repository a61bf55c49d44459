"""What the commands of eval/ and bench/ share: a parser whose help is the module's docstring."""

import argparse


def command_parser(name: str, about: str | None, package: str = "eval") -> argparse.ArgumentParser:
    """The empty parser of `python -m <package>.<name>`; the help keeps the lines of `about`."""
    return argparse.ArgumentParser(
        prog=f"python -m {package}.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
