"""Read the settings of a run from config files and the command line.

    python train.py config/gpt2_adamw.py --lr=3e-4 --max_steps=2e3

Later sources override earlier ones: defaults, config files from left to right, `--key=value`. A
config file is Python code that assigns settings; it runs in a namespace of its own, in which every
name without a leading underscore, other than an imported module, must be a setting. A setting of an
earlier source that a later one makes pointless is adjusted, with one line printed.
"""

import dataclasses
import difflib
import json
import os
import runpy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, Literal, get_args, get_origin

from trainer.nanogpt_names import Given, nanogpt_hint
from trainer.presets import adjustments, damping_problems, moot_problems, moot_settings
from trainer.settings import FIELDS, RUN_ONLY, ConfigError, TrainConfig
from trainer.usage import print_help

PATHS = ("out_dir", "resume", "init_from", "dataset")  # a leading ~ is the home folder
COMMAND_LINE = "command line"


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
        parsed = _PARSERS[kind](value)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ConfigError(f"{key}={value!r}: must be {_TYPE_NAMES[kind]}") from None
    return os.path.expanduser(parsed) if key in PATHS else parsed


def _parse_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _parse_int(value: Any) -> int:
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)  # exact, unlike a float
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
    argv: list[str],
    check_machine: Callable[[dict[str, Any]], list[str]] = lambda values: [],
    missing_shape: Callable[[str, dict[str, str]], dict[str, Any]] = lambda folder, given: {},
) -> tuple[TrainConfig, dict[str, str]]:
    """Return the settings, and for every setting that was given, its source.

    Args:
        argv: config files (`*.py`) and `--key=value` overrides.
        check_machine: function that returns a message for each setting, in the complete dict of
            settings, that this machine does not support.
        missing_shape: function that returns the sizes of the model in the folder `init_from` that
            are not among the given settings.
    Raises:
        ConfigError: lists every problem of every source.
        SystemExit: after `--help`.
    """
    if "--help" in argv or "-h" in argv:
        print_help(__doc__ or "")
        raise SystemExit(0)
    settings: dict[str, Any] = {key: field.default for key, field in FIELDS.items()}
    origins: dict[str, str] = {}
    problems: list[str] = []
    assignments = _assignments(argv, problems)
    given = {key: raw for _, key, raw in assignments}
    for origin, key, raw in assignments:
        try:
            key, raw = _rename(origin, key, raw, given)
            settings[key], origins[key] = coerce(key, raw), origin
        except ConfigError as error:
            problems.append(f"{origin}: {error}")
    if settings["init_from"]:
        try:
            taken = missing_shape(settings["init_from"], origins)
            settings |= taken
            origins |= dict.fromkeys(taken, str(Path(settings["init_from"]) / "config.json"))
        except ConfigError as error:
            problems.append(str(error))
    _adjust(settings, origins, [origin for origin, *_ in assignments])
    typed = {key for key, origin in origins.items() if origin == COMMAND_LINE}
    problems += moot_problems(settings, typed) + damping_problems(settings)
    problems += check_machine(settings)
    try:
        config = TrainConfig(**settings)
    except ConfigError as error:
        problems = [*problems, *str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))
    return config, origins


def _adjust(settings: dict[str, Any], origins: dict[str, str], sources: list[str]) -> None:
    """Adjust what a later source made pointless, in place, and print one line for each change."""
    rank = {source: i for i, source in enumerate(sources, start=1)}  # 0: default
    for key, new, reason in [*adjustments(settings, lambda key: rank.get(origins.get(key, ""), 0))]:
        old = f"{key}={settings[key]} ({origins.get(key, 'default')})"
        print_once(f"note: {old} becomes {key}={new}, because {reason}")
        settings[key], origins[key] = new, "adjusted"


def print_once(text: str) -> None:
    """Print in one of the processes that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def _assignments(argv: list[str], problems: list[str]) -> list[tuple[str, str, Any]]:
    """Return (origin, key, raw value) of every assignment, the config files first."""
    from_files: list[tuple[str, str, Any]] = []
    from_command_line: list[tuple[str, str, Any]] = []
    for argument in argv:
        if argument.startswith("--") and "=" in argument:
            key, raw = argument[2:].split("=", 1)
            from_command_line.append((COMMAND_LINE, key, raw))
        elif "=" in argument and not Path(argument).is_file():
            problems.append(f"{COMMAND_LINE}: {argument!r}: write --{argument.lstrip('-')}")
        elif argument.startswith("-"):
            problems.append(f"{COMMAND_LINE}: {argument!r} has no value; write --key=value")
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
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's file may raise anything, SystemExit included
        problems.append(f"{path}: {type(error).__name__}: {error}")
        return []
    return [
        (path, key, value)
        for key, value in namespace.items()
        if not (key.startswith("_") or isinstance(value, ModuleType))
    ]


def _preset_names() -> str:
    folder = Path(__file__).parents[1] / "config"
    return ", ".join(sorted(path.name for path in folder.glob("*.py")))


def _rename(origin: str, key: str, raw: Any, given: Given) -> tuple[str, Any]:
    """Return the current name and value of a setting; warn if an earlier release named it.

    Raises ConfigError, with a hint that may depend on the `given` settings, if there is none.
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
        hint = nanogpt_hint(key, given)
        raise ConfigError(f"unknown key {key!r}{'; ' + hint if hint else _suggestion(key)}")
    if old_names:
        old, new = (key, new_key) if key != new_key else (f"{key}={raw}", f"{key}={value}")
        print_once(f"warning: {origin}: {old} is now called {new}; please rename it")
    return new_key, value


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, FIELDS, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; --help lists all keys"


def describe(config: TrainConfig, origins: dict[str, str]) -> str:
    """Format the settings that differ from their defaults and have an effect, with sources."""
    moot = moot_settings(dataclasses.asdict(config))
    rows = [
        f"  {key} = {getattr(config, key)!r}  ({origins[key]})"
        for key in FIELDS
        if key in origins and key not in moot and getattr(config, key) != FIELDS[key].default
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


def to_json(config: TrainConfig) -> str:
    """Return the settings as JSON, with the keys in the order of their declaration."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
