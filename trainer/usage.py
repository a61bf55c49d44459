"""Format and print what `train.py --help` says, from the declarations in settings.py."""

import os
import re
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

from trainer.settings import FIELDS

DECLARATION = re.compile(
    r"^    (?:# (-- .*)|(\w+): ([^#\n]+?)(?:  # (.*(?:\n    # (?!-- ).*)*))?)$", re.MULTILINE
)
NEW_LINE = "\n    # "  # of a comment that continues


def print_help(usage: str) -> None:
    """Print the usage and all settings. It is no error if the reader, `head` say, stops early."""
    try:
        print(help_text(usage), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit


def help_text(usage: str) -> str:
    """Return the usage, and every setting with its type, default and declaration's comment."""
    source = Path(__file__).with_name("settings.py").read_text(encoding="utf-8")
    source = source.partition("class TrainConfig:")[2].partition("def ")[0]
    lines = [usage.strip(), ""]
    for match in DECLARATION.finditer(source):
        section, key, _, comment = match.groups("")
        lines.append(section or f"  --{key}={_choices(key)}  {comment.replace(NEW_LINE, ' ')}")
    return "\n".join(line.rstrip() for line in lines)


def _choices(key: str) -> str:
    kind, default = FIELDS[key].type, FIELDS[key].default
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind)) + f" [{default}]"
    return f"{getattr(kind, '__name__', kind)} [{'none' if default is None else default}]"
