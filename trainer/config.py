"""From config files and the command line to the run's settings (settings.py).

    python train.py config/gpt2_adamw.py --lr=3e-4 --max_steps=2e3

Precedence: defaults, config files left to right, `--key=value`. A config file is plain assignments
run in a namespace of its own; every name that it leaves behind must be a setting of `Config`.
"""

import dataclasses
import difflib
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from trainer.settings import FIELDS, RUN_ONLY, ConfigError, TrainConfig


def coerce(key: str, value: Any) -> Any:
    """`value` as the declared type of setting `key`; ConfigError says what was wanted.

    Integral floats become ints (`1e3`), strings are parsed, booleans are true or false only.
    """
    kind: Any = FIELDS[key].type
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ConfigError(f"{key}={value!r}: must be one of {', '.join(get_args(kind))}")
    if NoneType in get_args(kind):  # float | None
        if value is None or str(value).lower() == "none":
            return None
        kind = get_args(kind)[0]
    try:
        return _PARSERS[kind](value)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ConfigError(f"{key}={value!r}: must be {_WANTED[kind]}") from None


def _parse_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _parse_int(value: Any) -> int:
    number = _parse_float(value)
    if not number.is_integer():
        raise ValueError
    return value if isinstance(value, int) else int(number)


def _parse_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_PARSERS = {
    bool: lambda value: {"true": True, "false": False}[str(value).lower()],
    int: _parse_int,
    float: _parse_float,
    str: _parse_str,
}
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def load_config(
    argv: list[str], check_machine: Callable[[dict[str, Any]], list[str]] = lambda values: []
) -> tuple[TrainConfig, dict[str, str]]:
    """The resolved settings and, per setting that was given, where its value comes from.

    Args:
        argv: config files (`*.py`) and `--key=value` overrides; the command line wins over files.
        check_machine: further problems of the settings that only this machine can tell.
    Raises:
        ConfigError: one error with every problem of every source.
        SystemExit: after `--help`.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for origin, key, raw in _assignments(argv, problems):
        try:
            if key not in FIELDS:
                raise ConfigError(f"unknown key {key!r}{_nearest(key)}")
            values[key], origins[key] = coerce(key, raw), origin
        except ConfigError as error:
            problems.append(f"{origin}: {error}")
    settings = {key: field.default for key, field in FIELDS.items()} | values
    problems += check_machine(settings)
    try:
        config = TrainConfig(**values)
    except ConfigError as error:
        problems = [*problems, *str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    return config, origins


def _assignments(argv: list[str], problems: list[str]) -> list[tuple[str, str, Any]]:
    """(origin, key, raw value) , weakest first: config files, then the command line."""
    from_files: list[tuple[str, str, Any]] = []
    from_line: list[tuple[str, str, Any]] = []
    for argument in argv:
        if argument.startswith("--") and "=" in argument:
            key, raw = argument[2:].split("=", 1)
            from_line.append(("command line", key, raw))
        elif argument.startswith("-"):
            problems.append(f"command line: {argument!r} has no value; write --key=value")
        else:
            from_files += _run_file(argument, problems)
    return from_files + from_line


def _run_file(path: str, problems: list[str]) -> list[tuple[str, str, Any]]:
    """The assignments that a config file leaves behind."""
    if not Path(path).is_file():
        problems.append(f"{path}: no such config file; config/ holds {_ready_configs()}")
        return []
    try:
        namespace = runpy.run_path(path)
    except Exception as error:  # whatever a user's file may raise belongs into the one message
        problems.append(f"{path}: {type(error).__name__}: {error}")
        return []
    return [(path, key, value) for key, value in namespace.items() if not key.startswith("_")]


def _ready_configs() -> str:
    folder = Path(__file__).parents[1] / "config"
    return ", ".join(sorted(path.name for path in folder.glob("*.py")))


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key, FIELDS, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; --help lists all keys"


def describe(config: TrainConfig, origins: dict[str, str]) -> str:
    """Every setting that is not at its default, one a line, with where it was set."""
    rows = [
        f"  {key} = {getattr(config, key)!r}  ({origins[key]})"
        for key in FIELDS
        if key in origins and getattr(config, key) != FIELDS[key].default
    ]
    return "\n".join(["settings (all others at their defaults, see config.json):", *rows])


def describe_changes(saved: dict[str, Any], config: TrainConfig) -> str:
    """The settings in which a resumed run differs from the one that wrote its checkpoint."""
    rows = [
        f"  warning: {key} was {saved.get(key)!r} and is {value!r} from here on\n"
        for key, value in dataclasses.asdict(config).items()
        if key not in RUN_ONLY and saved.get(key) != value
    ]
    return "".join(rows)


def help_text() -> str:
    """Usage, then every setting with its type, default and the comment beside its declaration."""
    source = Path(__file__).with_name("settings.py").read_text()
    source = source.partition("class TrainConfig:")[2].partition("def ")[0]
    lines = [(__doc__ or "").strip(), ""]
    for match in re.finditer(r"^    (?:# (-- .*)|(\w+): ([^#\n]+?)(?:  # (.*))?)$", source, re.M):
        section, key, _, comment = match.groups()
        lines.append(f"{section}" if section else f"  --{key}={_choices(key)}  {comment or ''}")
    return "\n".join(line.rstrip() for line in lines)


def _choices(key: str) -> str:
    kind, default = FIELDS[key].type, FIELDS[key].default
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind)) + f" [{default}]"
    return f"{getattr(kind, '__name__', kind)} [{'' if default is None else default}]"


def to_json(config: TrainConfig) -> str:
    """The resolved settings as JSON, keys in declaration order."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
