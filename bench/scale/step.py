"""Estimate the time of a step, the bytes sent and the bytes held, with and without DoPr.

The model overlaps what the code overlaps. FSDP2 gathers and scatters weights during forward and
backward of other transformer blocks. DDP reduces gradients during the last backward. With sharded
statistics, sums of z zᵀ go to their owners during the backward, over the network that FSDP2 uses,
too. In a refresh, sums of z zᵀ travel while layers whose sums have arrived are inverted. Nothing
else overlaps: P is sent after the last inversion, or with sharded statistics the rows of G and M
travel in every step, and then follows the base optimizer. With `fresh_mean`, the sums of z of all
layers travel before everything else.
"""

from dataclasses import dataclass

from bench.scale import memory, work
from bench.scale.base_plan import gradient_calls, micro_batch_calls, muon_calls
from bench.scale.calls import CollectiveCall, Placement, sent_bytes
from bench.scale.hardware import Hardware
from bench.scale.network import seconds, total
from bench.scale.plan import exchange_calls, mean_calls, reduce_calls, step_calls
from bench.scale.refresh import refresh_seconds
from bench.scale.shapes import DoprMode, ModelShape
from bench.scale.work import Batch


@dataclass(frozen=True)
class StepEstimate:
    """The cost of a step for one model and placement, averaged over the steps between refreshes.

    Seconds and bytes are per GPU.
    """

    shape: str
    placement: Placement
    base: str
    mode: str
    base_s: dict[str, float]  # seconds without DoPr, by purpose
    dopr_s: dict[str, float]  # seconds that DoPr adds, by purpose
    base_sent: float  # bytes sent without DoPr
    dopr_sent: float  # bytes sent that DoPr adds
    base_bytes: float  # peak memory without DoPr
    dopr_bytes: float  # peak memory with DoPr
    fits: str  # yes, base (only without DoPr), or no (not even without DoPr)

    @property
    def added(self) -> float:
        """The time that DoPr adds to a step, as a share of the step without it."""
        return sum(self.dopr_s.values()) / sum(self.base_s.values())

    @property
    def largest(self) -> str:
        """The name of the largest term of the time that DoPr adds."""
        return max(self.dopr_s, key=self.dopr_s.__getitem__)


def estimate(
    shape: ModelShape,
    placement: Placement,
    base: str,
    mode: DoprMode,
    hardware: Hardware,
    min_tokens: int,
) -> StepEstimate:
    """Estimate a step with and without DoPr, each with the largest micro-batches that fit.

    A GPU gets at least `min_tokens` per step.
    """
    memory_of_dopr = memory.dopr_bytes(shape, mode, placement)
    room = hardware.memory * hardware.usable_memory

    def largest_batch(index: int, max_tokens: int) -> tuple[Batch, float]:
        """Return the batch and its peak bytes, without DoPr (index 0) or with DoPr (index 1)."""
        sizes = [n for n in micro_batch_sizes(shape) if n <= max_tokens]
        batches = [Batch(shape, placement.size, min_tokens, n) for n in sizes]
        held = [memory.base_bytes(shape, placement, base, batch) for batch in batches]
        peaks = [
            memory.peaks(n_bytes, memory_of_dopr, each.n_micro)[index]
            for n_bytes, each in zip(held, batches, strict=True)
        ]
        fitting = [i for i, peak in enumerate(peaks) if peak <= room]
        first = fitting[0] if fitting else 0
        return batches[first], peaks[first]

    batch, base_bytes = largest_batch(0, shape.micro_tokens)
    dopr_batch, dopr_bytes = largest_batch(1, batch.max_micro_tokens)
    base_s = base_seconds(shape, placement, base, batch, hardware)
    base_s_of_dopr = base_seconds(shape, placement, base, dopr_batch, hardware)
    dopr_s = dopr_seconds(shape, placement, mode, dopr_batch, hardware)
    dopr_s["smaller micro-batches"] = sum(base_s_of_dopr.values()) - sum(base_s.values())
    sent, sent_with_dopr = (
        total_sent(base_calls(shape, placement, base, each), placement)
        for each in (batch, dopr_batch)
    )
    return StepEstimate(
        shape=shape.name,
        placement=placement,
        base=base,
        mode=mode.name,
        base_s=base_s,
        dopr_s=dopr_s,
        base_sent=sent,
        dopr_sent=own_sent(shape, placement, mode, dopr_batch) + sent_with_dopr - sent,
        base_bytes=base_bytes,
        dopr_bytes=dopr_bytes,
        fits="yes" if dopr_bytes <= room else "base" if base_bytes <= room else "no",
    )


def micro_batch_sizes(shape: ModelShape) -> list[int]:
    """Return the possible tokens per micro-batch: the most, then halves down to one sequence."""
    sizes = [shape.micro_tokens]
    while sizes[-1] >= 2 * shape.block_size:
        sizes.append(sizes[-1] // 2)
    return sizes


def base_calls(
    shape: ModelShape, placement: Placement, base: str, batch: Batch
) -> list[CollectiveCall]:
    """Return the collectives of a step without DoPr."""
    micro = batch.n_micro * micro_batch_calls(shape, placement)
    optimizer = muon_calls(shape, placement) if base == "muon" else []
    return micro + gradient_calls(shape, placement) + optimizer


def total_sent(calls: list[CollectiveCall], placement: Placement) -> float:
    return sum(sent_bytes(call, placement) for call in calls)


def own_sent(shape: ModelShape, placement: Placement, mode: DoprMode, batch: Batch) -> float:
    """Return the bytes that DoPr itself sends, averaged over the steps between refreshes.

    Where processes differ, they are those of the first one.
    """
    due, not_due = (
        total_sent(step_calls(shape, mode, placement, is_due=is_due, rank=0), placement)
        for is_due in (True, False)
    )
    reduced = batch.n_micro * total_sent(reduce_calls(shape, mode, placement), placement)
    return averaged(due, not_due, mode) + reduced / mode.collect_every


def averaged(due: float, not_due: float, mode: DoprMode) -> float:
    """Return the mean cost of a step, given that of a step with a refresh and without one."""
    return not_due + (due - not_due) / mode.refresh_every


def base_seconds(
    shape: ModelShape, placement: Placement, base: str, batch: Batch, hardware: Hardware
) -> dict[str, float]:
    """Return the seconds of a step without DoPr, by purpose."""
    compute = work.forward_backward(shape, batch.tokens, hardware)
    with_calls = forward_backward_seconds(shape, placement, batch, hardware)
    optimizer = {"update": work.update(shape, placement, base, hardware)}
    if base == "muon":
        optimizer["Muon's matrices"] = work.orthogonalization(shape, placement, hardware)
        optimizer["Muon's messages"] = total(muon_calls(shape, placement), placement, hardware)
    return {"forward, backward": compute, "weights, gradients": with_calls - compute} | optimizer


def forward_backward_seconds(
    shape: ModelShape,
    placement: Placement,
    batch: Batch,
    hardware: Hardware,
    extra_backward: float = 0.0,
    extra_calls: list[CollectiveCall] | None = None,
) -> float:
    """Return the seconds of forward and backward, including collectives that nothing hides.

    The forward is a third of the computation. `extra_backward` adds seconds of computation to the
    backwards of a step, and `extra_calls` adds collectives to each of them, with sharded weights.
    The first gather of FSDP2 and the last all-reduce of DDP are not hidden.
    """
    compute = work.forward_backward(shape, batch.micro_tokens, hardware)
    forward, backward = compute / 3, compute * 2 / 3 + extra_backward / batch.n_micro
    gradients = [seconds(call, placement, hardware) for call in gradient_calls(shape, placement)]
    if placement.shards == 1:
        hidden = min(sum(gradients[:-1]), backward)
        return batch.n_micro * (forward + backward) + sum(gradients) - hidden
    times: dict[str, list[float]] = {"all_gather": [], "reduce_scatter": []}
    for call in micro_batch_calls(shape, placement):
        times[call.kind].append(seconds(call, placement, hardware))
    first, *rest = times["all_gather"]
    gathers = sum(rest) / 2
    others = gathers + sum(times["reduce_scatter"]) + total(extra_calls or [], placement, hardware)
    before_last = first + max(forward, gathers) + max(backward, others)
    last = first + max(forward, gathers) + max(backward, others + sum(gradients))
    return (batch.n_micro - 1) * before_last + last


def dopr_seconds(
    shape: ModelShape, placement: Placement, mode: DoprMode, batch: Batch, hardware: Hardware
) -> dict[str, float]:
    """Return the seconds that DoPr adds, by purpose, averaged over the steps between refreshes."""
    collecting, not_collecting = (
        statistics_seconds(shape, placement, mode, batch, hardware, is_collecting=is_collecting)
        for is_collecting in (True, False)
    )
    refresh = refresh_seconds(shape, placement, mode, hardware)
    seconds_of = {
        "Σ z zᵀ": (collecting - not_collecting) / mode.collect_every,
        **{name: value / mode.refresh_every for name, value in refresh.items()},
        "G P": work.apply(shape, mode, placement, hardware),
    }
    if placement.shares_statistics:
        seconds_of["rows to owners"] = total(
            exchange_calls(shape, mode, placement), placement, hardware
        )
    if not mode.fresh_mean:
        return seconds_of
    due, not_due = (
        total(mean_calls(shape, mode, placement, is_due=is_due), placement, hardware)
        for is_due in (True, False)
    )
    return seconds_of | {
        "Σ z": not_collecting,
        "sums of z": averaged(due, not_due, mode),
        "correction of M": work.correction(shape, mode, placement, hardware),
    }


def statistics_seconds(
    shape: ModelShape,
    placement: Placement,
    mode: DoprMode,
    batch: Batch,
    hardware: Hardware,
    *,
    is_collecting: bool,
) -> float:
    """Return the seconds that statistics add to forward and backward of one step."""
    extra = work.statistics(shape, placement, mode, batch, hardware, is_collecting=is_collecting)
    calls = reduce_calls(shape, mode, placement) if is_collecting else []
    with_extra = forward_backward_seconds(shape, placement, batch, hardware, extra, calls)
    return with_extra - forward_backward_seconds(shape, placement, batch, hardware)
