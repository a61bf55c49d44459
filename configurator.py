"""The run's settings: a flat frozen dataclass, config files that assign to it, a command line.

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
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin


class ConfigError(ValueError):
    """Settings that cannot be used; the message lists every problem found."""


@dataclass(frozen=True, kw_only=True)
class Config:
    # -- run
    out_dir: str = "out/run"  # everything the run writes: config, metrics, checkpoints
    resume: str = "auto"  # auto: newest good checkpoint in out_dir | never | a checkpoint's path
    init_from: str = ""  # local Hugging Face GPT-2 folder to start the weights from; empty: random
    seed: int = 1337  # weights, data order and dropout are functions of (seed, step)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward pass; weights are fp32
    compile: bool = False  # torch.compile the model
    deterministic: bool = False  # deterministic algorithms only (slower on a GPU)
    # -- data
    dataset: str = "pystdlib"  # a name under data/ or a folder with meta.json
    loader_workers: int = 0  # processes that read ahead
    # -- model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # tokens of context
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms
    tie_weights: bool = True  # output head = token embedding
    # -- batch
    batch_size: int = 512  # sequences per optimizer step, over all devices
    micro_batch_size: int = 16  # sequences per device per forward; accumulation is derived
    # -- optimizer
    optimizer: Literal["adamw", "sgd", "signum", "muon", "adamuon"] = "adamw"
    lr: float = 6e-4
    aux_lr: float | None = (
        None  # AdamW on embeddings, head, gains beside muon and adamuon; none: 6e-4
    )
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # sgd, signum, muon, adamuon
    nesterov: bool = True  # muon, adamuon
    muon_scale: Literal["spectral", "match_rms", "original"] = "match_rms"  # of muon's update
    coefficients: Literal["polar_express", "quintic"] = "polar_express"  # of muon and adamuon
    ns_steps: int = 5  # Newton-Schulz steps of muon and adamuon
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of these steps
    grad_clip: float = 1.0  # global norm of the raw gradient; 0: off
    # -- DoPr: activation preconditioning in front of the optimizer (optim/dopr.py says it all)
    dopr: bool = False
    gamma: float = 0.1  # damping relative to the mean eigenvalue of Σ
    sigma_beta: float | None = None  # average of Σ over refreshes; none: only the newest
    refresh_every: int = 1  # steps between two inverses
    collect_every: int = 1  # steps between two that add to Σ
    token_stride: int = 1  # one token in so many adds to Σ
    exponent: int = 1  # p of (Σ + γ̄ I)^(-1/p): 1, 2 or 4
    inverse: Literal["cholesky", "newton_schulz"] = "cholesky"
    trace_normalized: bool = True  # M keeps the scale of G
    block_diagonal: int | None = None  # widest block of Σ; none: no blocks
    embeddings: bool = False  # also the rows of embeddings, by token frequency
    include: str | None = None  # names of layers to cover, comma-separated, with * and ?; none: all
    exclude: str | None = None  # names to leave alone; none: an untied output head
    # -- schedule
    max_steps: int = 10_000
    warmup_steps: int = 500
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    min_lr_ratio: float = 0.1  # final lr / peak lr
    # -- evaluation and records
    eval_every: int = 250  # steps
    eval_batches: int = 0  # validation batches, evenly spread and always the same; 0: all of it
    ema_decay: float = 0.0  # moving average of the weights, evaluated beside them; 0: off
    log_every: int = 10  # steps
    save_every: int = 1000  # steps; the last step is always saved
    keep_checkpoints: int = 2  # newest ones kept
    max_skipped: int = 20  # non-finite steps in a row before the run gives up
    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: str = "dopr"

    def __post_init__(self) -> None:
        problems = [*_range_problems(self), *_cross_field_problems(self)]
        if problems:
            raise ConfigError("\n".join(problems))


_AT_LEAST = {  # smallest value that makes sense
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "batch_size"), 1),
    **dict.fromkeys(("micro_batch_size", "max_steps", "eval_every", "log_every"), 1),
    **dict.fromkeys(("save_every", "keep_checkpoints", "max_skipped", "ns_steps"), 1),
    **dict.fromkeys(("seed", "warmup_steps", "eval_batches", "loader_workers"), 0),
    **dict.fromkeys(("weight_decay", "grad_clip", "min_lr_ratio", "eps"), 0.0),
    **dict.fromkeys(("dropout", "beta1", "beta2", "momentum", "ema_decay"), 0.0),
}
_BELOW_ONE = ("dropout", "beta1", "beta2", "momentum", "ema_decay")


def _range_problems(config: Config) -> list[str]:
    """Numbers outside the range in which they mean something."""
    problems = [
        f"{key}={getattr(config, key)}: must be at least {low}"
        for key, low in _AT_LEAST.items()
        if not getattr(config, key) >= low
    ]
    problems += [
        f"{key}={getattr(config, key)}: must be below 1"
        for key in _BELOW_ONE
        if getattr(config, key) >= 1
    ]
    if config.seed >= 2**32:
        problems.append(f"seed={config.seed}: must be below 2**32")
    for key in ("lr", "aux_lr"):
        value = getattr(config, key)
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"{key}={value}: must be positive and finite")
    if config.min_lr_ratio > 1:
        problems.append(f"min_lr_ratio={config.min_lr_ratio}: must be at most 1")
    return problems


def _cross_field_problems(config: Config) -> list[str]:
    """Settings that contradict each other."""
    problems = []
    if config.n_head > 0 and config.n_embd % config.n_head:
        problems.append(f"n_embd={config.n_embd}: must be divisible by n_head={config.n_head}")
    if config.micro_batch_size > 0 and config.batch_size % config.micro_batch_size:
        problems.append(
            f"batch_size={config.batch_size}: must be divisible by "
            f"micro_batch_size={config.micro_batch_size} (sequences per forward)"
        )
    if config.schedule != "constant" and config.warmup_steps >= config.max_steps:
        problems.append(
            f"warmup_steps={config.warmup_steps}: must be below max_steps={config.max_steps}"
        )
    if config.aux_lr is not None and config.optimizer not in ("muon", "adamuon"):
        problems.append(
            f"aux_lr={config.aux_lr}: only muon and adamuon have an auxiliary AdamW, "
            f"optimizer={config.optimizer} has not; leave it out"
        )
    return problems


RUN_ONLY = {"out_dir", "resume", "log_every", "wandb", "wandb_project"}  # do not change results
FIELDS = {field.name: field for field in dataclasses.fields(Config)}


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
) -> tuple[Config, dict[str, str]]:
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
        config = Config(**values)
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
    folder = Path(__file__).parent / "config"
    return ", ".join(sorted(path.name for path in folder.glob("*.py")))


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key, FIELDS, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; --help lists all keys"


def describe(config: Config, origins: dict[str, str]) -> str:
    """Every setting that is not at its default, one a line, with where it was set."""
    rows = [
        f"  {key} = {getattr(config, key)!r}  ({origins[key]})"
        for key in FIELDS
        if key in origins and getattr(config, key) != FIELDS[key].default
    ]
    return "\n".join(["settings (all others at their defaults, see config.json):", *rows])


def describe_changes(saved: dict[str, Any], config: Config) -> str:
    """The settings in which a resumed run differs from the one that wrote its checkpoint."""
    rows = [
        f"  warning: {key} was {saved.get(key)!r} and is {value!r} from here on\n"
        for key, value in dataclasses.asdict(config).items()
        if key not in RUN_ONLY and saved.get(key) != value
    ]
    return "".join(rows)


def help_text() -> str:
    """Usage, then every setting with its type, default and the comment beside its declaration."""
    source = Path(__file__).read_text().partition("class Config:")[2].partition("def ")[0]
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


def to_json(config: Config) -> str:
    """The resolved settings as JSON, keys in declaration order."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
