"""Read the settings of a run from config files and the command line.

    python train.py config/gpt2_adamw.py --lr=3e-4 --max_steps=2e3

Later sources override earlier ones: defaults, config files from left to right, `--key=value`. A
config file is Python code that assigns settings; it runs in a namespace of its own, in which every
name without a leading underscore must be a setting.
"""

import dataclasses
import difflib
import json
import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from trainer.settings import FIELDS, RUN_ONLY, ConfigError, TrainConfig


def coerce(key: str, value: Any) -> Any:
    """Convert `value` to the declared type of the setting `key`.

    Strings are parsed, floats without a fraction (`1e3`) become ints, and booleans must be true or
    false. Raises ConfigError if the value has the wrong type.
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
        raise ConfigError(f"{key}={value!r}: must be {_TYPE_NAMES[kind]}") from None


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
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def load_config(
    argv: list[str], check_machine: Callable[[dict[str, Any]], list[str]] = lambda values: []
) -> tuple[TrainConfig, dict[str, str]]:
    """Return the settings, and for every setting that was given, its source.

    Args:
        argv: config files (`*.py`) and `--key=value` overrides.
        check_machine: function that returns a message for each setting, in the complete dict of
            settings, that this machine does not support.
    Raises:
        ConfigError: lists every problem of every source.
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
            key, raw = _rename(origin, key, raw)
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
    """Return (origin, key, raw value) of every assignment, the config files first."""
    from_files: list[tuple[str, str, Any]] = []
    from_command_line: list[tuple[str, str, Any]] = []
    for argument in argv:
        if argument.startswith("--") and "=" in argument:
            key, raw = argument[2:].split("=", 1)
            from_command_line.append(("command line", key, raw))
        elif argument.startswith("-"):
            problems.append(f"command line: {argument!r} has no value; write --key=value")
        else:
            from_files += _run_file(argument, problems)
    return from_files + from_command_line


def _run_file(path: str, problems: list[str]) -> list[tuple[str, str, Any]]:
    """Run a config file and return its assignments."""
    if not Path(path).is_file():
        problems.append(f"{path}: no such config file; config/ has {_preset_names()}")
        return []
    try:
        namespace = runpy.run_path(path)
    except Exception as error:  # a user's file may raise anything
        problems.append(f"{path}: {type(error).__name__}: {error}")
        return []
    return [(path, key, value) for key, value in namespace.items() if not key.startswith("_")]


def _preset_names() -> str:
    folder = Path(__file__).parents[1] / "config"
    return ", ".join(sorted(path.name for path in folder.glob("*.py")))


def _rename(origin: str, key: str, raw: Any) -> tuple[str, Any]:
    """Return the current name and value of a setting; warn if an earlier release named it.

    Raises ConfigError if there is no such setting.
    """
    if key in FIELDS:
        try:
            coerce(key, raw)
            return key, raw
        except ConfigError:
            pass  # the value may be of an earlier release
    from optim.legacy_names import REMOVED, renamed_settings  # imports torch

    if key in REMOVED:
        raise ConfigError(f"{key} is no longer a setting: {REMOVED[key]}")
    settings, old_names = renamed_settings({key: raw})
    new_key, value = next(iter(settings.items()))
    if new_key not in FIELDS:
        raise ConfigError(f"unknown key {key!r}{_suggestion(key)}")
    if old_names and os.environ.get("RANK", "0") == "0":
        old, new = (key, new_key) if key != new_key else (f"{key}={raw}", f"{key}={value}")
        print(f"warning: {origin}: {old} is now called {new}; please rename it")
    return new_key, value


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, FIELDS, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; --help lists all keys"


def describe(config: TrainConfig, origins: dict[str, str]) -> str:
    """Format the settings that differ from their defaults, one per line, with their sources."""
    rows = [
        f"  {key} = {getattr(config, key)!r}  ({origins[key]})"
        for key in FIELDS
        if key in origins and getattr(config, key) != FIELDS[key].default
    ]
    return "\n".join(["settings (all others at their defaults, see config.json):", *rows])


def describe_changes(saved: dict[str, Any], config: TrainConfig) -> str:
    """Format a warning for each setting that differs from the run that saved the checkpoint.

    Args:
        saved: settings in the checkpoint's manifest, under their current names.
    """
    rows = [
        f"  warning: {key} was {saved.get(key)!r} and is {value!r} from here on\n"
        for key, value in dataclasses.asdict(config).items()
        if key not in RUN_ONLY and saved.get(key) != value
    ]
    return "".join(rows)


def help_text() -> str:
    """Return the usage, and every setting with its type, default and declaration's comment."""
    source = Path(__file__).with_name("settings.py").read_text()
    source = source.partition("class TrainConfig:")[2].partition("def ")[0]
    lines = [(__doc__ or "").strip(), ""]
    for match in re.finditer(r"^    (?:# (-- .*)|(\w+): ([^#\n]+?)(?:  # (.*))?)$", source, re.M):
        section, key, _, comment = match.groups()
        lines.append(section or f"  --{key}={_choices(key)}  {comment or ''}")
    return "\n".join(line.rstrip() for line in lines)


def _choices(key: str) -> str:
    kind, default = FIELDS[key].type, FIELDS[key].default
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind)) + f" [{default}]"
    return f"{getattr(kind, '__name__', kind)} [{'' if default is None else default}]"


def to_json(config: TrainConfig) -> str:
    """Return the settings as JSON, with the keys in the order of their declaration."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
