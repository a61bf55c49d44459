"""Train a GPT-2: settings, data, model, optimizers, resume, loop. Read it from top to bottom.

Usage:
    python train.py config/demo.py
    python train.py config/gpt2_adamw.py --lr=3e-4 --max_steps=2e3
    torchrun --nproc_per_node=8 train.py config/gpt2_dopr.py
"""

import sys

from trainer.config import describe, describe_changes, load_config, to_json

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without UTF-8
    if {"-h", "--help"} & {*sys.argv}:
        load_config(["--help"])  # exits before importing torch, which is slow

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data.dataset import DataError
from data.files import write_atomic
from data.loader import Batch, next_step, train_batches, val_batches
from eval.hf_import import missing_shape
from eval.in_training import grade_rollouts, load_initial_weights, validate
from eval.rollout.tasks import open_data, task_of
from eval.rollout.ttf import check_fits
from model import IGNORE
from optim.build import MATRIX_OPTIMIZERS, describe_groups
from optim.kernels.dispatch import describe_backend
from optim.probe import seed_all
from optim.schedule import lr_scale
from optim.third_party import is_third_party
from trainer.build import (
    SCHEDULE_KEYS,
    chosen,
    draw_shards,
    make_model,
    make_optimizers,
    make_preconditioner,
)
from trainer.checkpoint.read import CheckpointError
from trainer.checkpoint.resume import (
    check_agreement,
    check_same_function,
    find_checkpoint,
    fingerprint,
)
from trainer.checkpoint.state import TrainState
from trainer.failures import (
    MemoryExhausted,
    ProcessLost,
    TrainingDiverged,
    memory_errors,
    smaller_run,
)
from trainer.machine import device_of, locked, machine_problems
from trainer.metrics import MetricsLog, mfu
from trainer.parallel import Parallel
from trainer.provenance import provenance
from trainer.saving import CheckpointSaver
from trainer.settings import ConfigError, TrainConfig
from trainer.sharding import full_tensor
from trainer.signals import StopRequest

EXIT_DIVERGED = 3  # the exit code of a run that ended with TrainingDiverged
USER_ERRORS = (ConfigError, DataError, CheckpointError, OSError)
USER_ERRORS += (TrainingDiverged, ProcessLost, MemoryExhausted)


def train(config: TrainConfig, parallel: Parallel, stop: StopRequest) -> int:
    """Run the training that the settings describe; return the exit code."""
    device, out_dir = parallel.device, Path(config.out_dir)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

    # -- data
    dataset = parallel.main_process_first(lambda: open_data(config.dataset))
    check_agreement(config, dataset, parallel)
    tokenizer_json = (dataset.dir / "tokenizer.json").read_bytes()  # kept with every checkpoint
    task = task_of(config.dataset) if config.ttf_every else None
    if task:
        check_fits(task, config.block_size)
    of_rank = {"block_size": config.block_size, "rank": parallel.rank, "world_size": parallel.size}
    validation = val_batches(
        dataset,
        batch_size=config.micro_batch_size,
        limit=config.eval_batches * config.batch_size,
        **of_rank,
    )

    # -- model
    checkpoint = find_checkpoint(config, dataset, parallel)
    is_empty = parallel.is_sharded  # no process holds the whole model
    model, ema = make_model(config, dataset.tokenizer.n_vocab, is_empty=is_empty), None
    if config.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    models = [model, *([ema.module] if ema else [])]
    for each in models:
        parallel.place(each)
        if is_empty and not (checkpoint or config.init_from):
            draw_shards(each, config.seed)
    if config.init_from and not checkpoint:
        load_initial_weights(models, config, dataset.tokenizer)

    # -- optimizers, and DoPr in front of them
    optimizers = make_optimizers(config, model, parallel.group())
    print(describe_groups(optimizers))
    if config.dopr or config.optimizer in MATRIX_OPTIMIZERS:
        print(describe_backend(config.backend, device))
    preconditioner = None
    if config.dopr:
        preconditioner = make_preconditioner(config, model)
        preconditioner.attach(*optimizers, process_group=parallel.group())
        print(preconditioner.summary())
    forward = parallel.wrap(model, is_compiled=config.compile)

    # -- resume; from here on, `state` holds everything that changes
    state = TrainState(model, optimizers, preconditioner, ema)
    if checkpoint:
        check_same_function(checkpoint, asdict(model.config))
        state.restore(checkpoint)
        if checkpoint.is_of(out_dir):
            state.saved_step = state.step  # it need not be saved again
        print(f"resumed {checkpoint.path} at step {state.step}")
        print(describe_changes(checkpoint.manifest["config"], config), end="")
        checkpoint = None  # frees its tensors, which are as large as the state
    batches = train_batches(
        dataset,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        seed=config.seed,
        start_step=state.step,
        workers=config.loader_workers,
        **of_rank,
    )

    # -- records
    log = MetricsLog(out_dir, state.step, config.max_steps, is_writer=parallel.is_main)
    if parallel.is_main:
        write_atomic(out_dir / "config.json", to_json(config))
        log.start_wandb(out_dir, config.wandb, config.wandb_project, asdict(config))
    facts = provenance(device, parallel.size)
    log.write("run", state.step, event="start", **facts, config=asdict(config))
    manifest = {"config": asdict(config), "model": asdict(model.config), **facts}
    manifest["tokenizer_sha256"] = dataset.tokenizer.sha256
    manifest["dataset_sha256"] = fingerprint(dataset)
    files = {"manifest": manifest, "tokenizer": tokenizer_json}
    saver = CheckpointSaver(state, config, parallel, files, log, stop)

    parameters = [*model.parameters()]
    may_draw = any(map(is_third_party, optimizers))  # some classes draw random numbers

    def start_read() -> Callable[[], tuple[list[Batch], int]]:
        """Read the micro-batches of the next step; the returned function gives them."""
        return parallel.start_on_all_ranks(lambda: next_step(batches), DataError, count_scored)

    # A step ahead, so that the processes agree whether all could read while they compute.
    finish_read = start_read()
    tokens_per_step = config.batch_size * config.block_size
    busy_s, busy_steps = 0.0, 0  # since the last logged step, without validation and saving

    with closing(log), saver:
        while True:
            is_done = state.step == config.max_steps
            stop.poll()
            try:
                if not stop and (is_done or state.step % config.eval_every == 0):
                    results = validate(state, validation, dataset, parallel, autocast, stop)
                    log.val(state.step, results)
                    state.count_validation(results)
                if task and state.step % config.ttf_every == 0 and not stop.poll():
                    metrics = grade_rollouts(state, task, parallel, n=config.ttf_episodes)
                    log.ttf(state.step, task.primary, metrics)
                is_last = is_done or bool(stop)
                if is_last or state.step % config.save_every == 0:
                    saver.save(is_last=is_last)
                if is_last:
                    break
                started = time.perf_counter()
                micro_batches, n_scored = finish_read()
                finish_read = start_read()
            except DataError:  # the data became unreadable: save what was trained
                saver.save(is_last=True)
                raise

            # ---------------------------------------------------------------- one optimizer step
            parallel.seed(random_seed(config.seed, state.step, parallel.rank))
            loss = torch.zeros((), device=device)
            for i, (x, y) in enumerate(micro_batches, start=1):  # (micro_batch_size, block_size)
                parallel.sync_gradients(forward, is_last=i == len(micro_batches))
                with autocast:
                    x, y = parallel.to_device(x), parallel.to_device(y)
                    _, nats = forward(x, y, reduction="sum", return_logits=False)
                    micro_loss = nats / max(1, n_scored)  # its share of the loss of the step
                (micro_loss * parallel.size).backward()  # DDP and FSDP average over ranks
                loss += micro_loss.detach()
            loss = parallel.sum(loss)
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
            grad_norm = full_tensor(norm)
            if config.grad_clip:
                clip_grads_with_norm_(parameters, config.grad_clip, grad_norm)
            scale = lr_scale(state.step, **chosen(config, SCHEDULE_KEYS))
            is_finite = bool(torch.isfinite(loss + grad_norm))
            if is_finite:
                if may_draw:
                    seed_all(random_seed(config.seed, state.step, rank=-1))  # the same on all ranks
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["base_lr"] * scale
                    optimizer.step()  # with DoPr, attach() made it precondition the gradients first
                if ema:
                    ema.update_parameters(model)
            elif preconditioner:
                preconditioner.discard()  # the inputs since the last refresh; some are broken
            for parameter in parameters:
                parameter.grad = None
            state.count_step(is_finite)
            # ----------------------------------------------------------------

            is_logged = state.step % config.log_every == 0 or state.step == config.max_steps
            loss = loss.item() if is_logged else loss  # waits for the device, so the time is right
            busy_s, busy_steps = busy_s + time.perf_counter() - started, busy_steps + 1
            if not is_finite:
                log.say(f"step {state.step}: loss or gradient is not finite; step skipped")
                saver.give_up_if_diverged()  # raises TrainingDiverged after max_skipped in a row
            if is_logged:
                tokens_per_s = tokens_per_step * busy_steps / busy_s
                flops = model.flops_per_token() * tokens_per_s / parallel.size  # of one device
                log.train(
                    state.step,
                    loss=loss,
                    lr=config.lr * scale,
                    grad_norm=grad_norm.item(),
                    tokens_per_s=tokens_per_s,
                    mfu=mfu(flops, facts["device"], config.dtype),
                    step_ms=1e3 * busy_s / busy_steps,
                    skipped=state.skipped,
                )
                busy_s, busy_steps = 0.0, 0

        reason = f"stopped by {stop}" if stop else "finished"
        log.write("run", state.step, event="end", reason=reason)
        log.say(f"{reason} at step {state.step}; everything is in {out_dir}")
    return stop.exit_code


def count_scored(micro_batches: list[Batch]) -> int:
    """Count the targets that the loss scores."""
    return sum(int((y != IGNORE).sum()) for _, y in micro_batches)  # batches are on the CPU


def random_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step.

    Dropout uses a different seed on each rank; optimizers that draw random numbers use rank=-1, the
    same on all ranks.
    """
    return (seed * 1_000_003 + step + rank * 2_654_435_761) % 2**32


def run(argv: list[str]) -> int:
    """Run `python train.py argv...` as a function; return the exit code.

    Raises:
        USER_ERRORS: the settings, the data or a checkpoint cannot be used, the run diverged
            (TrainingDiverged), the memory does not suffice, or another process failed.
    """
    config, origins = load_config(argv, machine_problems, missing_shape)
    with ExitStack() as stack:
        parallel = Parallel(
            device_of(config.device),
            mode=config.parallel,
            shard_size=config.shard_size,
            timeout_s=config.timeout_s,
        )
        stack.enter_context(parallel)
        print(describe(config, origins))
        if parallel.is_main:
            stack.enter_context(locked(Path(config.out_dir)))
        stack.enter_context(memory_errors(smaller_run(config.micro_batch_size)))
        start_max = parallel.start_all_reduce_flag if parallel.size > 1 else None
        stop = StopRequest(start_max)  # a signal to one process stops all
        return train(config, parallel, stack.enter_context(stop))


def main(argv: list[str]) -> int:
    """Like `run`, but print USER_ERRORS as one message and return an exit code."""
    try:
        return run(argv)
    except USER_ERRORS as error:
        rank = os.environ.get("RANK")
        print(f"error{(rank and f' on rank {rank}') or ''}: {error}", file=sys.stderr)
        return EXIT_DIVERGED if isinstance(error, TrainingDiverged) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
