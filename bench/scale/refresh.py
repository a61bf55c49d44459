"""Estimate the time of a refresh.

Sums of z zᵀ travel while layers whose sums have arrived are inverted. Nothing else overlaps.
"""

from bench.scale import work
from bench.scale.hardware import Hardware
from bench.scale.network import broadcasts, seconds, total
from bench.scale.plan import Placement, layers_by_owner, refresh_calls
from bench.scale.shapes import DoprMode, ModelShape, layers
from optim.dopr.layer import Layer
from optim.dopr.refresh import chunks


def refresh_seconds(
    shape: ModelShape, placement: Placement, mode: DoprMode, hardware: Hardware
) -> dict[str, float]:
    """Return the seconds of a refresh: sums, inversions by the owners, and P to all processes."""
    calls = refresh_calls(shape, mode, placement)
    packing = work.repacking(shape, mode, placement, hardware)
    if calls is None:
        all_chunks = chunks(layers(shape, mode), lambda layer: (layer.sigma,))
        inversions = sum(work.inverse(chunk, mode, hardware) for chunk in all_chunks)
        return {"inverses": inversions, "packing": packing}
    arrival, clock = {}, 0.0
    for call, message in calls.sums:
        clock += seconds(call, placement, hardware)
        arrival |= dict.fromkeys(message, clock)
    small_calls = [calls.counts_and_traces, calls.failures, *calls.norms]
    finish = max(
        inversion_end(owned, arrival, mode, hardware)
        for owned in layers_by_owner(shape, mode, placement.size).values()
    )
    return {
        "sums of Σ": clock,
        "inverses": finish - clock,
        "P to all": broadcasts(calls.inverses, placement, hardware),
        "packing": packing,
        "agreement": total(small_calls, placement, hardware) + 3 * hardware.host_read,
    }


def inversion_end(
    owned: list[Layer], arrival: dict[Layer, float], mode: DoprMode, hardware: Hardware
) -> float:
    """Return the time at which a process has inverted its layers.

    It inverts each chunk of layers as soon as all sums of the chunk have arrived.
    """
    clock = 0.0
    for chunk in chunks(owned, lambda layer: (layer.sigma,)):
        clock = max(clock, *(arrival[layer] for layer in chunk))
        clock += work.inverse(chunk, mode, hardware)
    return clock
