"""Declare the settings of a run with their defaults, and check their values."""

import dataclasses
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal


class ConfigError(ValueError):
    """The settings cannot be used. The message lists every problem."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a run. The comments below are the text of `train.py --help`."""

    # -- run
    out_dir: str = "out/run"  # folder for everything the run writes
    resume: str = "auto"  # auto: newest good checkpoint in out_dir | never | path of a checkpoint
    init_from: str = ""  # local Hugging Face GPT-2 folder with initial weights; empty: random
    allow_tokenizer_mismatch: bool = False  # between the folder init_from and the dataset
    seed: int = 1337  # weights, data order and dropout are functions of (seed, step)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one, or cpu
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward pass; weights are float32
    compile: bool = False  # torch.compile the model
    backend: Literal["auto", "torch", "triton"] = "auto"  # of DoPr and muon; auto: triton on a GPU
    # -- processes started by torchrun
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"  # ddp replicates, fsdp shards,
    # hsdp shards within groups and replicates between them
    shard_size: int | None = None  # hsdp: number of processes that hold one copy of the weights
    timeout_s: int = 600  # seconds that a process waits for the others before the run fails
    # -- data
    dataset: str = "pystdlib"  # a name under data/, task:NAME,key=value,... or a folder
    loader_workers: int = 0  # number of processes that read ahead
    # -- model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # context length in tokens
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms
    tie_weights: bool = True  # use the token embedding as output head
    # -- width rules (muP), which transfer settings tuned at one width to others (optim/mup.py)
    mup: bool = False  # maximal update parametrisation; false: standard parametrisation
    mup_base_width: int = 768  # n_embd at which the settings were tuned; muP changes nothing there
    mup_base_head_dim: int | None = None  # n_embd / n_head at the base; none: same n_head as here
    wd_scaling: Literal["independent", "constant", "sqrt", "inv_width"] = "independent"  # with mup
    # -- batch
    batch_size: int = 512  # sequences per optimizer step, over all devices
    micro_batch_size: int = 16  # sequences per device and forward; sets gradient accumulation
    # -- optimizer
    optimizer: str = "adamw"  # adamw, sgd, signum, muon, adamuon, or a class of torch.optim,
    # pytorch_optimizer or another package: lion, torch:muon, package.module:Class
    optimizer_args: str = ""  # arguments of such a class: name=value,...; beta1, beta2, eps
    # and momentum are not for it
    optimizer_roles: Literal["auto", "matrices", "all"] = "auto"  # what such a class trains;
    # matrices: AdamW trains the rest; auto: matrices if the class orthogonalizes
    lr: float = 6e-4
    aux_lr: float | None = None  # of the AdamW beside an optimizer of matrices; none: 6e-4
    embedding_lr: float | None = None  # none: that of the optimizer that holds the embeddings
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # of sgd, signum, muon and adamuon
    nesterov: bool = True  # of muon and adamuon
    adjust_lr: Literal["unit_rms_norm", "match_rms_adamw", "original"] = "match_rms_adamw"  # muon
    ns_coefficients: Literal["polar_express", "quintic"] = "polar_express"  # of Newton-Schulz
    ns_dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of its products; auto: float32 on
    # CPUs, bfloat16 elsewhere
    grad_clip: float = 1.0  # maximum global norm of the raw gradient; 0: off
    # -- DoPr: activation preconditioning before the optimizer (optim/dopr/preconditioner.py)
    dopr: bool = False  # exact mode, unless sigma_beta and refresh_every are set: docs/faq.md
    gamma: float = 0.1  # damping relative to the mean eigenvalue of Σ
    sigma_beta: float | None = None  # decay of the average of Σ over refreshes; none: no average
    refresh_every: int = 1  # steps between updates of the inverse
    collect_every: int = 1  # steps between samples of Σ
    token_stride: int = 1  # use every n-th token for Σ; embeddings use every token
    exponent: int = 1  # p of (Σ + γ̄ I)^(-1/p): 1, 2 or 4
    inverse: Literal["cholesky", "newton_schulz"] = "cholesky"
    trace_normalized: bool = True  # scale P so that M keeps the scale of G; false: the paper
    fresh_mean: bool = False  # use the mean of the inputs of every step, also between updates
    block_diagonal: int | None = None  # largest width of a block of Σ; none: full Σ
    embeddings: bool = False  # also precondition embeddings, by token frequency
    statistics: Literal["auto", "replicated", "sharded"] = "auto"  # auto: sharded if weights are
    include: str | None = None  # comma-separated names of layers, with * and ?; none: all
    exclude: str | None = None  # names of layers to exclude; none: an untied
    # output head, unless include is set
    # -- schedule
    max_steps: int = 10_000
    warmup_steps: int = 500
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    min_lr_ratio: float = 0.1  # final lr / peak lr
    # -- evaluation and records
    eval_every: int = 250  # steps
    eval_batches: int = 0  # batches of batch_size, evenly spaced and always the same; 0: all
    ttf_every: int = 0  # steps between evaluations of the model's own rollouts; 0: off
    ttf_episodes: int = 128  # rollouts per evaluation
    ema_decay: float = 0.0  # of an average of the weights, which is also evaluated; 0: off
    log_every: int = 10  # steps
    save_every: int = 1000  # steps; the last step is always saved
    keep_checkpoints: int = 2  # number of newest checkpoints to keep
    checkpoint_format: Literal["full", "sharded"] = "full"  # sharded: one file per process
    async_save: bool = True  # train on while a checkpoint is written, from a copy in host memory
    max_skipped: int = 20  # non-finite steps in a row after which the run fails
    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: str = "dopr"

    def __post_init__(self) -> None:
        problems = [*_text_problems(self), *_range_problems(self), *_cross_field_problems(self)]
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def width_mult(self) -> float:
        """The width relative to the base width, m in optim/mup.py; 1 without muP."""
        return self.n_embd / self.mup_base_width if self.mup else 1.0

    @property
    def head_mult(self) -> float:
        """The width of a head relative to the base's; 1 without muP."""
        if not self.mup or self.mup_base_head_dim is None:
            return self.width_mult
        return self.n_embd / self.n_head / self.mup_base_head_dim


_AT_LEAST = {  # smallest valid value
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "batch_size", "timeout_s"), 1),
    **dict.fromkeys(("micro_batch_size", "max_steps", "eval_every", "log_every", "save_every"), 1),
    **dict.fromkeys(("ttf_episodes", "keep_checkpoints", "max_skipped", "mup_base_width"), 1),
    **dict.fromkeys(("seed", "warmup_steps", "eval_batches", "ttf_every", "loader_workers"), 0),
    **dict.fromkeys(("weight_decay", "grad_clip", "min_lr_ratio", "eps"), 0.0),
    **dict.fromkeys(("dropout", "beta1", "beta2", "momentum", "ema_decay"), 0.0),
}
_BELOW_ONE = ("dropout", "beta1", "beta2", "momentum", "ema_decay")
_AT_MOST = {  # largest valid value; any other whole number must be below 2**31
    "seed": 2**32 - 1,
    "max_steps": 99_999_999,  # names of checkpoints have eight digits
    **dict.fromkeys(("n_embd", "block_size", "batch_size", "micro_batch_size"), 2**24),
    **dict.fromkeys(("n_layer", "n_head"), 2**16),
    "loader_workers": 1024,
    "min_lr_ratio": 1.0,
}


def _text_problems(config: TrainConfig) -> list[str]:
    """Return a message for each text that is empty or cannot be written as UTF-8."""
    problems = [
        f"{key}='': must not be empty"
        for key in ("out_dir", "dataset", "resume", "optimizer")
        if not getattr(config, key).strip()
    ]
    problems += [
        f"{key}={value!r}: must be names separated by commas, none of them empty"
        for key in ("include", "exclude")
        if (value := getattr(config, key)) and "" in split_names(value)
    ]
    problems += [
        f"{key}={value!r}: must be text in UTF-8"
        for key, value in vars(config).items()
        if isinstance(value, str) and value.encode("utf-8", "ignore").decode() != value
    ]
    return problems


def _range_problems(config: TrainConfig) -> list[str]:
    """Return a message for each number that is out of range."""
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
    highest = {key: 2**31 - 1 for key, field in FIELDS.items() if field.type in (int, int | None)}
    problems += [
        f"{key}={value}: must be at most {high:,}"
        for key, high in (highest | _AT_MOST).items()
        if (value := getattr(config, key)) is not None and value > high
    ]
    problems += [
        f"{key}={value}: must be finite"
        for key, value in vars(config).items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    for key in ("lr", "aux_lr", "embedding_lr"):
        value = getattr(config, key)
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"{key}={value}: must be positive and finite")
    return problems


def _cross_field_problems(config: TrainConfig) -> list[str]:
    """Return a message for each contradiction between settings."""
    problems = []
    if config.n_head > 0 and config.n_embd % config.n_head:
        problems.append(f"n_embd={config.n_embd}: must be divisible by n_head={config.n_head}")
    if config.micro_batch_size > 0 and config.batch_size % config.micro_batch_size:
        problems.append(
            f"batch_size={config.batch_size}: must be divisible by "
            f"micro_batch_size={config.micro_batch_size} (sequences per forward)"
        )
    if config.schedule != "constant" and 0 < config.max_steps <= config.warmup_steps:
        problems.append(
            f"warmup_steps={config.warmup_steps}: must be below max_steps={config.max_steps}; "
            "set both"
        )
    if (config.parallel == "hsdp") != (config.shard_size is not None):
        problems.append(
            f"shard_size={config.shard_size}: must be set with parallel=hsdp, and only with it"
        )
    if config.shard_size is not None and config.shard_size < 1:
        problems.append(f"shard_size={config.shard_size}: must be at least 1")
    return problems + _tied_table_problems(config) + _mup_problems(config)


def split_names(names: str | None) -> list[str]:
    """Return the names of layers in the setting include or exclude; none: an empty list."""
    return [name.strip() for name in names.split(",")] if names else []


def _tied_table_problems(config: TrainConfig) -> list[str]:
    """Refuse DoPr on a token embedding that is also the output head."""

    def is_named(patterns: str | None) -> bool:  # as optim.dopr.weights.Weight.matches
        names = ("transformer.wte", "transformer.wte.weight")
        return any(fnmatchcase(name, each) for name in names for each in split_names(patterns))

    is_covered = not is_named(config.exclude) and (not config.include or is_named(config.include))
    if not (config.dopr and config.embeddings and config.tie_weights and is_covered):
        return []
    return [
        "embeddings=true: the token embedding is also the output head, whose gradient must not be "
        "preconditioned by token frequency; add --tie_weights=false, or "
        "--exclude=transformer.wte to precondition the position embedding only"
    ]


def _mup_problems(config: TrainConfig) -> list[str]:
    """Return a message for each muP setting that has no effect or cannot be used."""
    problems = []
    if config.mup_base_head_dim is not None and config.mup_base_head_dim < 1:
        problems.append(f"mup_base_head_dim={config.mup_base_head_dim}: must be at least 1")
    for key in ("mup_base_head_dim", "wd_scaling"):
        value = getattr(config, key)
        if not config.mup and value != FIELDS[key].default:
            problems.append(f"{key}={value}: has no effect without mup=true")
    if config.mup and config.dopr and config.optimizer == "sgd":
        problems += [
            f"{key}={getattr(config, key)}: must not be set with mup, dopr and optimizer=sgd, "
            "because muP has one rule for all matrices of sgd; remove it"
            for key in ("include", "exclude")
            if getattr(config, key)
        ]
    return problems


# Settings that do not change the results of a run.
RUN_ONLY = {"out_dir", "resume", "log_every", "ttf_every", "ttf_episodes", "wandb", "wandb_project"}
RUN_ONLY |= {"parallel", "shard_size", "timeout_s", "checkpoint_format", "async_save"}
RUN_ONLY |= {"loader_workers", "save_every", "keep_checkpoints"}
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
