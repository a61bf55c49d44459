"""Every setting of a run, with its default, its meaning, and what it must not be."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal


class ConfigError(ValueError):
    """Settings that cannot be used; the message lists every problem found."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    # -- run
    out_dir: str = "out/run"  # everything the run writes: config, metrics, checkpoints
    resume: str = "auto"  # auto: newest good checkpoint in out_dir | never | a checkpoint's path
    init_from: str = ""  # local Hugging Face GPT-2 folder to start the weights from; empty: random
    seed: int = 1337  # weights, data order and dropout are functions of (seed, step)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward pass; weights are fp32
    compile: bool = False  # torch.compile the model
    deterministic: bool = False  # deterministic algorithms only (slower on a GPU)
    backend: Literal["auto", "torch", "triton"] = "auto"  # DoPr, muon; auto: triton on a GPU
    # -- processes, which torchrun starts
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"  # weights: copies | shards | copies of shards
    shard_size: int | None = None  # hsdp: processes that hold one copy together
    timeout_s: int = 600  # that a process waits for the others before the run ends
    # -- data
    dataset: str = "pystdlib"  # a name under data/, task:NAME,knob=value,... or a folder
    loader_workers: int = 0  # processes that read ahead
    # -- model
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # tokens of context
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms
    tie_weights: bool = True  # output head = token embedding
    # -- width rules: what was tuned at one width holds at others (mup.py)
    mup: bool = False  # maximal update parametrisation; false: the standard one
    mup_base_width: int = 768  # n_embd at which lr and init suit; there mup changes nothing
    mup_base_head_dim: int | None = None  # n_embd / n_head there; none: as many heads as here
    wd_scaling: Literal["independent", "constant", "sqrt", "inv_width"] = "independent"  # with mup
    # -- batch
    batch_size: int = 512  # sequences per optimizer step, over all devices
    micro_batch_size: int = 16  # sequences per device per forward; accumulation is derived
    # -- optimizer
    optimizer: Literal["adamw", "sgd", "signum", "muon", "adamuon"] = "adamw"
    lr: float = 6e-4
    aux_lr: float | None = None  # of the AdamW beside muon and adamuon; none: 6e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # sgd, signum, muon, adamuon
    nesterov: bool = True  # muon, adamuon
    adjust_lr: Literal["spectral", "match_rms_adamw", "original"] = (
        "match_rms_adamw"  # of muon's update
    )
    ns_coefficients: Literal["polar_express", "quintic"] = "polar_express"  # of muon and adamuon
    ns_steps: int = 5  # Newton-Schulz steps of muon and adamuon
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of these steps
    grad_clip: float = 1.0  # global norm of the raw gradient; 0: off
    # -- DoPr: activation preconditioning in front of the optimizer (optim/dopr/preconditioner.py says it all)
    dopr: bool = False
    gamma: float = 0.1  # damping relative to the mean eigenvalue of Σ
    sigma_beta: float | None = None  # average of Σ over refreshes; none: only the newest
    refresh_every: int = 1  # steps between two inverses
    collect_every: int = 1  # steps between two that add to Σ
    token_stride: int = 1  # one token in so many adds to Σ; embeddings count every one
    exponent: int = 1  # p of (Σ + γ̄ I)^(-1/p): 1, 2 or 4
    inverse: Literal["cholesky", "newton_schulz"] = "cholesky"
    trace_normalized: bool = True  # P times tr(Σ)/d_in: M keeps the scale of G; false: the paper
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
    eval_batches: int = 0  # batches of batch_size, evenly spread and the same; 0: all of it
    ttf_every: int = 0  # steps between two gradings of the model's own rollouts; 0: off
    ttf_episodes: int = 128  # rollouts of such a grading
    ema_decay: float = 0.0  # moving average of the weights, evaluated beside them; 0: off
    log_every: int = 10  # steps
    save_every: int = 1000  # steps; the last step is always saved
    keep_checkpoints: int = 2  # newest ones kept
    checkpoint_format: Literal["full", "sharded"] = "full"  # sharded: what fits nowhere whole
    max_skipped: int = 20  # non-finite steps in a row before the run gives up
    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: str = "dopr"

    def __post_init__(self) -> None:
        problems = [*_range_problems(self), *_cross_field_problems(self)]
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def width_mult(self) -> float:
        """m of mup.py: the width relative to the base's; 1 without muP."""
        return self.n_embd / self.mup_base_width if self.mup else 1.0

    @property
    def head_mult(self) -> float:
        """The same of the width of a head."""
        if not self.mup or self.mup_base_head_dim is None:
            return self.width_mult
        return self.n_embd / self.n_head / self.mup_base_head_dim


_AT_LEAST = {  # smallest value that makes sense
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "batch_size"), 1),
    **dict.fromkeys(("micro_batch_size", "max_steps", "eval_every", "log_every"), 1),
    **dict.fromkeys(("save_every", "ttf_episodes", "keep_checkpoints"), 1),
    **dict.fromkeys(("max_skipped", "ns_steps", "timeout_s", "mup_base_width"), 1),
    **dict.fromkeys(("seed", "warmup_steps", "eval_batches", "ttf_every", "loader_workers"), 0),
    **dict.fromkeys(("weight_decay", "grad_clip", "min_lr_ratio", "eps"), 0.0),
    **dict.fromkeys(("dropout", "beta1", "beta2", "momentum", "ema_decay"), 0.0),
}
_BELOW_ONE = ("dropout", "beta1", "beta2", "momentum", "ema_decay")


def _range_problems(config: TrainConfig) -> list[str]:
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
    problems += [
        f"{key}={value}: must be finite"
        for key, value in vars(config).items()
        if isinstance(value, float) and math.isinf(value)
    ]
    for key in ("lr", "aux_lr"):
        value = getattr(config, key)
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"{key}={value}: must be positive and finite")
    if config.min_lr_ratio > 1:
        problems.append(f"min_lr_ratio={config.min_lr_ratio}: must be at most 1")
    return problems


def _cross_field_problems(config: TrainConfig) -> list[str]:
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
            f"warmup_steps={config.warmup_steps}: must be below max_steps={config.max_steps}; "
            "give both"
        )
    if (config.parallel == "hsdp") != (config.shard_size is not None):
        problems.append(
            f"shard_size={config.shard_size}: parallel=hsdp needs it, and nothing else takes it"
        )
    if config.shard_size is not None and config.shard_size < 1:
        problems.append(f"shard_size={config.shard_size}: must be at least 1")
    if config.aux_lr is not None and config.optimizer not in ("muon", "adamuon"):
        problems.append(
            f"aux_lr={config.aux_lr}: only muon and adamuon have an auxiliary AdamW, "
            f"optimizer={config.optimizer} has not; take it out or add --aux_lr=none, and mind lr"
        )
    return problems + _mup_problems(config)


def _mup_problems(config: TrainConfig) -> list[str]:
    """Width rules that nothing would follow, or that the weights do not fit."""
    problems = []
    if config.mup_base_head_dim is not None and config.mup_base_head_dim < 1:
        problems.append(f"mup_base_head_dim={config.mup_base_head_dim}: must be at least 1")
    for key in ("mup_base_head_dim", "wd_scaling"):
        value = getattr(config, key)
        if not config.mup and value != FIELDS[key].default:
            problems.append(f"{key}={value}: means nothing without mup=true")
    if config.mup and config.dopr and config.optimizer == "sgd":
        problems += [
            f"{key}={getattr(config, key)}: sgd has one rule of muP for all matrices; take it out"
            for key in ("include", "exclude")
            if getattr(config, key)
        ]
    return problems


# What does not change the results of a run.
RUN_ONLY = {"out_dir", "resume", "log_every", "ttf_every", "ttf_episodes", "wandb", "wandb_project"}
RUN_ONLY |= {"parallel", "shard_size", "timeout_s", "checkpoint_format"}
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
