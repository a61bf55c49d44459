"""Train a GPT-2: settings, data, model, optimizers, resume, loop. Read it top to bottom.

Usage:
    python train.py config/demo.py
    python train.py config/gpt2_adamw.py --lr=3e-4 --max_steps=2e3
    torchrun --nproc_per_node=8 train.py config/gpt2_dopr.py
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data.dataset import DataError, Dataset
from data.loader import Batch, ValBatches, train_batches, val_batches
from eval.hf import load_hf
from eval.loss import evaluate
from eval.mup_export import unfolded_weights
from eval.rollout.tasks import Task, open_data, task_of
from eval.rollout.ttf import check_fits, grade_model
from model import GPT, GPTConfig
from optim import ActivationPreconditioner
from optim.build import MATRIX_OPTIMIZERS, build_optimizers, describe_groups
from optim.dopr.layer import settings_problems
from optim.kernels.dispatch import describe_backend, triton_problem
from optim.mup import forward_mults
from optim.schedule import lr_scale
from trainer.checkpoint.read import (
    CheckpointError,
    candidates,
    load_into,
    write_atomic,
)
from trainer.checkpoint.resume import (
    check_agreement,
    check_same_function,
    find_checkpoint,
    fingerprint,
)
from trainer.checkpoint.state import TrainState
from trainer.config import describe, describe_changes, load_config, to_json
from trainer.failures import ProcessLost
from trainer.metrics import MetricsLog, environment, mfu
from trainer.parallel import Parallel, parallel_problems
from trainer.settings import ConfigError, TrainConfig
from trainer.sharding import full
from trainer.signals import StopRequest

EXIT_DIVERGED = 3  # the exit code of a run that ended with TrainingDiverged


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


USER_ERRORS = (ConfigError, DataError, CheckpointError, TrainingDiverged, ProcessLost, OSError)


def train(config: TrainConfig, parallel: Parallel, stop: StopRequest) -> int:
    """One run, from settings to the last checkpoint; returns the exit code."""
    device, mine = parallel.device, {"rank": parallel.rank, "world_size": parallel.size}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    out_dir = Path(config.out_dir)

    # -- data
    dataset = parallel.main_process_first(lambda: open_data(config.dataset))
    check_agreement(config, dataset, parallel)
    tokenizer_json = (dataset.dir / "tokenizer.json").read_bytes()
    task = task_of(config.dataset) if config.ttf_every else None
    if task:
        check_fits(task, config.block_size)
    validation = val_batches(
        dataset,
        batch_size=config.micro_batch_size,
        block_size=config.block_size,
        limit=config.eval_batches * config.batch_size,
        **mine,
    )

    # -- model, with the same initial weights in every process
    resumed = find_checkpoint(config, dataset, parallel)
    torch.manual_seed(config.seed)
    model, ema = build_model(config, dataset, is_new=resumed is None), None
    if config.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        parallel.place(ema.module)
    parallel.place(model)

    # -- optimizers, and DoPr in front of them
    optimizers = build_optimizers(
        model, **optimizer_settings(config), process_group=parallel.group()
    )
    print(describe_groups(optimizers))
    if config.dopr or config.optimizer in MATRIX_OPTIMIZERS:
        print(describe_backend(config.backend, device))
    preconditioner = None
    if config.dopr:
        preconditioner = build_preconditioner(config, model)
        preconditioner.attach(*optimizers, process_group=parallel.group())
        print(preconditioner.summary())
    forward = parallel.wrap(model, is_compiled=config.compile)

    # -- resume: from here on, `state` is all that changes
    state = TrainState(model, optimizers, preconditioner, ema)
    if resumed:
        check_same_function(resumed, asdict(model.config))
        state.restore(resumed)
        print(f"resumed {resumed.path} at step {state.step}")
        print(describe_changes(resumed.manifest["config"], config), end="")
        resumed = None  # its tensors are as large as the state
    batches = train_batches(
        dataset,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        block_size=config.block_size,
        seed=config.seed,
        start_step=state.step,
        workers=config.loader_workers,
        **mine,
    )

    # -- records
    log = MetricsLog(out_dir, state.step, config.max_steps, is_writer=parallel.is_main)
    if parallel.is_main:
        write_atomic(out_dir / "config.json", to_json(config))
        log.start_wandb(out_dir, config.wandb, config.wandb_project, asdict(config))
    facts = environment(device, parallel.size)
    log.write("run", state.step, event="start", **facts, config=asdict(config))
    manifest = {"config": asdict(config), "model": asdict(model.config), **facts}
    manifest["tokenizer_sha256"] = dataset.tokenizer.sha256
    manifest["dataset_sha256"] = fingerprint(dataset)

    def save() -> None:
        """A checkpoint of this step. A failure is loud; it ends the run only if it was the last."""
        try:
            state.save(
                out_dir / "checkpoints",
                parallel,
                manifest=manifest,
                tokenizer=tokenizer_json,
                keep=config.keep_checkpoints,
                is_sharded=config.checkpoint_format == "sharded",
            )
        except CheckpointError as error:
            if stop or state.step == config.max_steps:
                raise
            log.say(f"WARNING: {error}; training goes on, the checkpoint before it is kept")

    accumulation = config.batch_size // (config.micro_batch_size * parallel.size)
    tokens_per_step = config.batch_size * config.block_size
    busy_s, busy_steps = 0.0, 0  # since the last logged step, without validation and saving

    with closing(log):
        while True:
            is_last = state.step == config.max_steps
            stop.poll()
            try:
                if not stop and (is_last or state.step % config.eval_every == 0):
                    results = validate(state, validation, dataset, parallel, autocast, stop)
                    log.val(state.step, results)
                if task and not stop and state.step % config.ttf_every == 0:
                    metrics = grade_rollouts(state, task, parallel, n=config.ttf_episodes)
                    log.ttf(state.step, task.primary, metrics)
                is_due = state.step % config.save_every == 0 and not state.skipped_in_row
                if stop or is_last or is_due:
                    save()
                if stop or is_last:
                    break
                started = time.perf_counter()
                micro_batches = parallel.raise_on_all_ranks(lambda: next_step(batches), DataError)
            except DataError:  # a shard vanished, say: nothing that was trained is lost
                save()
                raise

            # ---------------------------------------------------------------- one optimizer step
            torch.manual_seed(dropout_seed(config.seed, state.step, parallel.rank))
            loss = torch.zeros((), device=device)
            for i, (x, y) in enumerate(micro_batches, start=1):  # (micro_batch_size, block_size)
                parallel.sync_gradients(forward, is_last=i == accumulation)
                with autocast:
                    x, y = parallel.to_device(x), parallel.to_device(y)
                    _, micro_loss = forward(x, y, return_logits=False)
                    micro_loss = micro_loss / accumulation
                micro_loss.backward()
                loss += micro_loss.detach()
            loss = parallel.mean(loss)
            parameters = [p for p in model.parameters() if p.grad is not None]
            grad_norm = full(get_total_norm([p.grad for p in parameters]))
            if config.grad_clip:
                clip_grads_with_norm_(parameters, config.grad_clip, grad_norm)
            scale = lr_scale(state.step, **schedule_settings(config))
            is_finite = bool(torch.isfinite(loss + grad_norm))
            if is_finite:
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["base_lr"] * scale
                    optimizer.step()
                if ema:
                    ema.update_parameters(model)
            elif preconditioner:
                preconditioner.discard()
            model.zero_grad()
            state.count_step(is_finite)
            # ----------------------------------------------------------------

            is_logged = state.step % config.log_every == 0 or state.step == config.max_steps
            loss = loss.item() if is_logged else loss  # waits for the step, whose time is measured
            busy_s, busy_steps = busy_s + time.perf_counter() - started, busy_steps + 1
            if not is_finite:
                log.say(f"step {state.step}: loss or gradient is not finite; step skipped")
                give_up_if_diverged(state, config)
            if is_logged:
                tokens_per_s = tokens_per_step * busy_steps / busy_s
                log.train(
                    state.step,
                    loss=loss,
                    lr=config.lr * scale,
                    grad_norm=grad_norm.item(),
                    tokens_per_s=tokens_per_s,
                    mfu=mfu(model.flops_per_token() * tokens_per_s, facts["device"], config.dtype),
                    step_ms=1e3 * busy_s / busy_steps,
                    skipped=state.skipped,
                )
                busy_s, busy_steps = 0.0, 0

        reason = f"stopped by {stop}" if stop else "finished"
        log.write("run", state.step, event="end", reason=reason)
        log.say(f"{reason} at step {state.step}; everything is in {out_dir}")
    return stop.exit_code


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's random numbers, which are the only ones, and others in every process."""
    return (seed * 1_000_003 + step + rank * 2_654_435_761) % 2**32


def pick_device(config: TrainConfig) -> torch.device:
    """The device of the run, with torch's determinism switch set."""
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    return device_of(config.device)


def make_parallel(config: TrainConfig) -> Parallel:
    return Parallel(
        pick_device(config),
        mode=config.parallel,
        shard_size=config.shard_size,
        timeout_s=config.timeout_s,
    )


def device_of(setting: str) -> torch.device:
    """The device that the setting `device` means here."""
    if setting != "auto":
        return torch.device(setting)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_model(config: TrainConfig, dataset: Dataset, *, is_new: bool) -> GPT:
    """The GPT that the settings describe, from random weights or a Hugging Face folder."""
    keys = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "tie_weights")
    shape = {key: getattr(config, key) for key in keys}
    mults = forward_mults(config.width_mult, config.head_mult)
    model = GPT(GPTConfig(vocab_size=dataset.tokenizer.n_vocab, **shape, **mults))
    if config.init_from and is_new:
        try:
            weights = unfolded_weights(load_hf(config.init_from).state_dict(), model.config)
        except (ValueError, OSError) as error:
            raise ConfigError(f"init_from={config.init_from}: {error}") from error
        load_into(model, weights, Path(config.init_from))
    return model


def build_preconditioner(config: TrainConfig, model: GPT) -> ActivationPreconditioner:
    """DoPr as the settings describe it; an untied output head is left out unless they say more."""
    keys = ("gamma", "sigma_beta", "refresh_every", "collect_every", "token_stride", "exponent")
    keys += ("inverse", "trace_normalized", "block_diagonal", "embeddings", "backend")
    numbers = {key: getattr(config, key) for key in keys}
    head = None if config.tie_weights else ["lm_head"]
    include = config.include.split(",") if config.include else None
    exclude = config.exclude.split(",") if config.exclude else head
    try:
        return ActivationPreconditioner(model, include=include, exclude=exclude, **numbers)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def optimizer_settings(config: TrainConfig) -> dict[str, Any]:
    keys = ("optimizer", "lr", "aux_lr", "weight_decay", "beta1", "beta2", "eps", "momentum")
    keys += ("nesterov", "adjust_lr", "ns_coefficients", "ns_steps", "ns_dtype", "backend")
    keys += ("width_mult", "wd_scaling", "dopr")
    return {key: getattr(config, key) for key in keys}


def schedule_settings(config: TrainConfig) -> dict[str, Any]:
    keys = ("schedule", "warmup_steps", "max_steps", "min_lr_ratio")
    return {key: getattr(config, key) for key in keys}


def next_step(batches: Iterator[list[Batch]]) -> list[Batch]:
    """The micro-batches of the next step; DataError if they cannot be had."""
    try:
        return next(batches)
    except (RuntimeError, EOFError, OSError) as error:  # what a dead loader process looks like
        raise DataError(f"the data loader stopped: {error}") from error


def validate(
    state: TrainState,
    batches: ValBatches,
    dataset: Dataset,
    parallel: Parallel,
    autocast: torch.autocast,
    stop: StopRequest,
) -> dict[str, Any] | None:
    """Loss of the weights, and of their average, on the fixed validation set; None if stopped."""
    row: dict[str, Any] = {}
    read = [partial(batches.__getitem__, i) for i in range(len(batches))]
    for prefix, model in state.evaluated().items():
        result = evaluate(
            model,
            (parallel.raise_on_all_ranks(each, DataError) for each in read),
            dataset.tokenizer.token_bytes(),
            device=parallel.device,
            autocast=autocast,
            should_stop=stop.poll,
            total=parallel.sum,
        )
        parallel.reshard(model)
        if result is None:
            return None
        row |= {prefix + key: value for key, value in asdict(result).items()}
    return row


def grade_rollouts(
    state: TrainState, task: Task, parallel: Parallel, *, n: int
) -> dict[str, float]:
    """Metrics of n own rollouts of the weights, and of their average."""
    row: dict[str, float] = {}
    for prefix, model in state.evaluated().items():
        whole = parallel.whole(model, lambda model=model: GPT(model.config))
        grade = grade_model(task, whole, n=n, seed=0, parallel=parallel)
        row |= {prefix + name: value for name, value in grade.means().items()}
    return row


def give_up_if_diverged(state: TrainState, config: TrainConfig) -> None:
    if state.skipped_in_row >= config.max_skipped:
        last_good = [*candidates(Path(config.out_dir) / "checkpoints"), "none"][0]
        raise TrainingDiverged(
            f"{state.skipped_in_row} steps in a row were not finite; nothing was saved since the "
            f"first of them. Last checkpoint: {last_good}. Go on from it with a smaller lr."
        )


def machine_problems(settings: dict[str, Any]) -> list[str]:
    """What the settings ask of this machine and it does not have."""
    problems = settings_problems(settings) if settings["dopr"] else []
    if settings["device"] == "cuda" and not torch.cuda.is_available():
        problems.append("device=cuda: torch finds no CUDA device here; use device=cpu or auto")
    here, n_cuda = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if device_of(settings["device"]).type == "cuda" and 0 < n_cuda < here:
        problems.append(
            f"{here} processes on this machine, but torch finds {n_cuda} CUDA devices: start as "
            "many processes as there are devices"
        )
    if settings["backend"] == "triton":
        problems += filter(None, [triton_problem(device_of(settings["device"]))])
    return problems + parallel_problems(settings)


def own_out_dir(out_dir: Path) -> filelock.FileLock:
    """Create `out_dir` and lock it for this process, or say why that cannot be."""
    lock = filelock.FileLock(out_dir / ".lock", blocking=False)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise ConfigError(f"out_dir={out_dir}: another run is writing to it") from None
    except OSError as error:
        raise ConfigError(f"out_dir={out_dir}: not writable ({error})") from None
    return lock


def run(argv: list[str]) -> int:
    """`python train.py argv...` as a function. Returns the exit code.

    Raises one of USER_ERRORS: the settings, the data or a checkpoint cannot be used, the run
    diverged (TrainingDiverged), or another process failed.
    """
    config, origins = load_config(argv, machine_problems)
    with ExitStack() as stack:
        parallel = stack.enter_context(make_parallel(config))
        print(describe(config, origins))
        if parallel.is_main:
            stack.enter_context(own_out_dir(Path(config.out_dir)))
        flag = parallel.all_reduce_flag if parallel.size > 1 else None
        return train(config, parallel, stack.enter_context(StopRequest(flag)))


def main(argv: list[str]) -> int:
    """As `run`, but one of USER_ERRORS is one message and an exit code, not a traceback."""
    try:
        return run(argv)
    except USER_ERRORS as error:
        rank = os.environ.get("RANK")
        print(f"error{(rank and f' on rank {rank}') or ''}: {error}", file=sys.stderr)
        return EXIT_DIVERGED if isinstance(error, TrainingDiverged) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
