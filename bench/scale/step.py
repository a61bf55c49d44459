"""A step in seconds, bytes sent and bytes held, with DoPr and without.

What runs at the same time, in the code: FSDP2's gathers and scatters beside forward and backward of
other blocks, DDP's all-reduces beside the last backward; in a refresh, sums of Σ that are under way
beside the inverses of layers whose sums have arrived. Nothing else: the sums wait for the end of
the backward, P travels after the last inverse, G P and the base optimizer come after that.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.scale import memory, work
from bench.scale.hardware import Hardware
from bench.scale.network import broadcasts, seconds, total
from bench.scale.plan import (
    Call,
    Placement,
    gradient_calls,
    micro_batch_calls,
    muon_calls,
    owned,
    refresh_calls,
    sent_bytes,
)
from bench.scale.shapes import Mode, Shape, layers
from bench.scale.work import Batch
from optim.dopr.refresh import chunks


@dataclass(frozen=True)
class Estimate:
    """One model on so many GPUs; seconds and bytes are of a step, averaged over refreshes."""

    shape: str
    placement: Placement
    base: str
    mode: str
    base_s: dict[str, float]
    dopr_s: dict[str, float]
    base_sent: float  # bytes that a GPU sends
    dopr_sent: float
    base_bytes: float  # at most, on a GPU
    dopr_bytes: float  # with DoPr
    fits: str  # yes | base: only without DoPr | no: not even then

    @property
    def added(self) -> float:
        """What DoPr adds to a step, as a share of the step without it."""
        return sum(self.dopr_s.values()) / sum(self.base_s.values())

    @property
    def largest(self) -> str:
        """The largest term of what DoPr adds."""
        return max(self.dopr_s, key=self.dopr_s.__getitem__)


def estimate(
    shape: Shape, placement: Placement, base: str, mode: Mode, hardware: Hardware, least: int
) -> Estimate:
    """Each of the two steps with the largest micro-batches that fit, if any do."""
    kept = memory.dopr_bytes(shape, mode, placement)
    room = hardware.memory * hardware.usable_memory

    def fitting(which: int, first: int) -> tuple[Batch, float]:
        """The batch, and the bytes at most, without (0) or with DoPr (1)."""
        sizes = [n for n in halves(shape) if n <= first]
        batches = [Batch(shape, placement.size, least, n) for n in sizes]
        held = [memory.base_bytes(shape, placement, base, batch) for batch in batches]
        peaks = [memory.peaks(each, kept)[which] for each in held]
        fits = [i for i, peak in enumerate(peaks) if peak <= room]
        return (batches[fits[0]], peaks[fits[0]]) if fits else (batches[0], peaks[0])

    batch, base_bytes = fitting(0, first=shape.micro_tokens)
    smaller, dopr_bytes = fitting(1, first=batch.most)
    base_s = base_seconds(shape, placement, base, batch, hardware)
    in_smaller = base_seconds(shape, placement, base, smaller, hardware)
    dopr_s = dopr_seconds(shape, placement, mode, smaller, hardware)
    dopr_s["smaller micro-batches"] = sum(in_smaller.values()) - sum(base_s.values())
    found = refresh_calls(shape, mode, placement)
    refresh = sum(sent_bytes(call, placement) for call in found.calls) if found else 0.0
    sent = sum(sent_bytes(each, placement) for each in base_calls(shape, placement, base, batch))
    more = sum(sent_bytes(each, placement) for each in base_calls(shape, placement, base, smaller))
    return Estimate(
        shape=shape.name,
        placement=placement,
        base=base,
        mode=mode.name,
        base_s=base_s,
        dopr_s=dopr_s,
        base_sent=sent,
        dopr_sent=refresh / mode.refresh_every + more - sent,
        base_bytes=base_bytes,
        dopr_bytes=dopr_bytes,
        fits="yes" if dopr_bytes <= room else "base" if base_bytes <= room else "no",
    )


def halves(shape: Shape) -> list[int]:
    """Tokens of a micro-batch, from the most to one sequence."""
    sizes = [shape.micro_tokens]
    while sizes[-1] >= 2 * shape.block_size:
        sizes.append(sizes[-1] // 2)
    return sizes


def base_calls(shape: Shape, placement: Placement, base: str, batch: Batch) -> list[Call]:
    micro = batch.n_micro * micro_batch_calls(shape, placement)
    own = muon_calls(shape, placement) if base == "muon" else []
    return micro + gradient_calls(shape, placement) + own


def base_seconds(
    shape: Shape, placement: Placement, base: str, batch: Batch, hardware: Hardware
) -> dict[str, float]:
    compute = work.forward_backward(shape, batch.tokens, hardware)
    whole = backward_seconds(shape, placement, batch, hardware, more=0.0)
    own = {"update": work.update(shape, placement, base, hardware)}
    if base == "muon":
        own["Muon's matrices"] = work.orthogonalisation(shape, placement, hardware)
        own["Muon's messages"] = total(muon_calls(shape, placement), placement, hardware)
    return {"forward, backward": compute, "weights, gradients": whole - compute} | own


def backward_seconds(
    shape: Shape, placement: Placement, batch: Batch, hardware: Hardware, more: float
) -> float:
    """Forward and backward of a step, whose backward computes for `more` seconds besides.

    A third of the work is the forward's. Of FSDP2 the first gather is waited for, of DDP the last
    all-reduce.
    """
    compute = work.forward_backward(shape, batch.micro_tokens, hardware)
    forward, backward = compute / 3, compute * 2 / 3 + more / batch.n_micro
    gradients = [seconds(each, placement, hardware) for each in gradient_calls(shape, placement)]
    if placement.shards == 1:
        hidden = min(sum(gradients[:-1]), backward)
        return batch.n_micro * (forward + backward) + sum(gradients) - hidden
    times: dict[str, list[float]] = {"all_gather": [], "reduce_scatter": []}
    for call in micro_batch_calls(shape, placement):
        times[call.kind].append(seconds(call, placement, hardware))
    first, *rest = times["all_gather"]
    gathers, scatters = sum(rest) / 2, sum(times["reduce_scatter"])
    one = first + max(forward, gathers) + max(backward, gathers + scatters)
    last = first + max(forward, gathers) + max(backward, gathers + scatters + sum(gradients))
    return (batch.n_micro - 1) * one + last


def dopr_seconds(
    shape: Shape, placement: Placement, mode: Mode, batch: Batch, hardware: Hardware
) -> dict[str, float]:
    """Every term of what DoPr adds to a step, averaged over the steps from refresh to refresh."""
    gram = work.gram(shape, mode, batch, hardware)
    with_gram = backward_seconds(shape, placement, batch, hardware, more=gram)
    without = backward_seconds(shape, placement, batch, hardware, more=0.0)
    refresh = refresh_seconds(shape, placement, mode, hardware)
    return {
        "Σ z zᵀ": (with_gram - without) / mode.collect_every,
        **{name: value / mode.refresh_every for name, value in refresh.items()},
        "G P": work.apply(shape, mode, placement, hardware),
    }


def refresh_seconds(
    shape: Shape, placement: Placement, mode: Mode, hardware: Hardware
) -> dict[str, float]:
    """Of one refresh: sums to all, inverses by their owners, P to all, and the rest."""
    found = refresh_calls(shape, mode, placement)
    repacking = work.repacking(shape, mode, placement, hardware)
    if found is None:
        own = [chunk for chunk in chunks(layers(shape, mode), lambda each: (each.sigma,))]
        inverses = sum(work.inverse(chunk, mode, hardware) for chunk in own)
        return {"inverses": inverses, "packing": repacking}
    arrival, clock = {}, 0.0
    for call, message in found.sums:
        clock += seconds(call, placement, hardware)
        arrival |= dict.fromkeys(message, clock)
    small = total([found.token_counts_and_traces, found.outcome, *found.norms], placement, hardware)
    finish = max(
        finished(held, arrival, mode, hardware)
        for held in owned(shape, mode, placement.size).values()
    )
    return {
        "sums of Σ": clock,
        "inverses": finish - clock,
        "P to all": broadcasts(found.made, placement, hardware),
        "packing": repacking,
        "agreement": small + 3 * hardware.host_read,
    }


def finished(held: list, arrival: dict, mode: Mode, hardware: Hardware) -> float:
    """When a process has inverted its layers, each chunk once all its sums are there."""
    clock = 0.0
    for chunk in chunks(held, lambda layer: (layer.sigma,)):
        clock = max(clock, *(arrival[layer] for layer in chunk))
        clock += work.inverse(chunk, mode, hardware)
    return clock
