"""Estimate the time of a refresh.

Sums of z zᵀ travel while layers whose sums have arrived are inverted. Nothing else overlaps. With
sharded statistics only HSDP sends sums here: a backward has brought those of one copy to its owner.
"""

from bench.scale import work
from bench.scale.calls import Placement
from bench.scale.hardware import Hardware
from bench.scale.network import broadcasts, seconds, total
from bench.scale.plan import layers_by_owner, norm_calls, refresh_calls
from bench.scale.shapes import DoprMode, ModelShape
from optim.dopr.layer import Layer
from optim.dopr.refresh import chunks


def refresh_seconds(
    shape: ModelShape, placement: Placement, mode: DoprMode, hardware: Hardware
) -> dict[str, float]:
    """Return the seconds of a refresh: sums, inversions by the owners, and P to all processes.

    They are those of the process that finishes last.
    """
    finish, sums_end = 0.0, 0.0
    for rank, owned in layers_by_owner(shape, mode, placement).items():
        calls = refresh_calls(shape, mode, placement, rank)
        arrival, clock = dict.fromkeys(owned, 0.0), 0.0
        for call, message in calls.sums if calls else []:
            clock += seconds(call, placement, hardware)
            arrival |= dict.fromkeys(message, clock)
        sums_end = max(sums_end, clock)
        finish = max(finish, inversion_end(owned, arrival, mode, hardware))
    found = {
        "inverses": finish - sums_end,
        "packing": work.repacking(shape, mode, placement, hardware),
    }
    calls = refresh_calls(shape, mode, placement, 0)
    if calls is None:
        return found
    small_calls = [calls.counts_and_traces, calls.flags, *norm_calls(shape, mode, placement)]
    found["agreement"] = total(small_calls, placement, hardware) + 3 * hardware.host_read
    if sums_end:
        found["sums of Σ"] = sums_end
    if calls.inverses:
        found["P to all"] = broadcasts(calls.inverses, placement, hardware)
    return found


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
