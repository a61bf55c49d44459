"""Estimate the time of a collective with an alpha-beta model of NCCL's rings and trees.

A ring enters and leaves a node through all of its network cards at once. Between nodes its rate is
therefore the lower of NVLink's and that of the cards of the participating GPUs of a node. A ring
has as many hops as processes. An all-reduce may use a tree instead, which has about log2(nodes)
slow hops. Collectives are assumed not to slow each other down.
"""

from math import ceil, log2
from typing import NamedTuple

from bench.scale.calls import CollectiveCall, Placement
from bench.scale.hardware import Hardware


class CollectiveGroup(NamedTuple):
    """The processes of a collective: the number of nodes, and the processes in each node."""

    nodes: int
    per_node: int

    @property
    def n(self) -> int:
        return self.nodes * self.per_node


def group_of(call: CollectiveCall, placement: Placement, hardware: Hardware) -> CollectiveGroup:
    """Return the group of a call.

    The ranks of a node and of a copy of the weights are consecutive. The ranks that hold the same
    rows are `shards` apart.
    """
    n = placement.ranks(call.over)
    distance = placement.shards if call.over == "replicate" else 1
    per_node = min(n, max(1, hardware.per_node // distance))
    return CollectiveGroup(ceil(n / per_node), per_node)


def seconds(call: CollectiveCall, placement: Placement, hardware: Hardware) -> float:
    """Return the duration of a collective while nothing else is sent."""
    group = group_of(call, placement, hardware)
    if group.n == 1:
        return 0.0
    if call.kind == "all_to_all":
        return all_to_all_seconds(call.n_bytes, group, hardware)
    rounds = 2 if call.kind == "all_reduce" else 1
    is_whole = call.kind in ("broadcast", "reduce")  # every byte passes every link of the ring
    share = 1.0 if is_whole else rounds * (group.n - 1) / group.n
    hops = rounds * ring_latency(group, hardware)
    if call.kind == "all_reduce":
        hops = min(hops, tree_latency(group, hardware))
    return hardware.start + hops + share * call.n_bytes / ring_rate(group, hardware)


def ring_rate(group: CollectiveGroup, hardware: Hardware) -> float:
    inside = hardware.nvlink * hardware.nvlink_fraction
    across = group.per_node * hardware.network * hardware.network_fraction
    if group.nodes == 1:
        return inside
    return across if group.per_node == 1 else min(inside, across)


def ring_latency(group: CollectiveGroup, hardware: Hardware) -> float:
    inside = (group.n - group.nodes) * hardware.nvlink_hop
    return inside + (group.nodes - 1) * hardware.network_hop


def tree_latency(group: CollectiveGroup, hardware: Hardware) -> float:
    """Return the latency up and down a tree: a chain within a node, binary between nodes."""
    inside = (group.per_node - 1) * hardware.nvlink_hop
    return 2 * (inside + log2(group.nodes) * hardware.network_hop)


def all_to_all_seconds(n_bytes: float, group: CollectiveGroup, hardware: Hardware) -> float:
    """Return the duration if a process gets n_bytes evenly from the others.

    Eight messages are assumed to travel at a time.
    """
    inside = n_bytes * (group.per_node - 1) / group.n
    across = n_bytes * (group.n - group.per_node) / group.n
    rate = hardware.nvlink * hardware.nvlink_fraction
    slower = max(inside / rate, across / (hardware.network * hardware.network_fraction))
    hop = hardware.nvlink_hop if group.nodes == 1 else hardware.network_hop
    return hardware.start + ceil((group.n - 1) / 8) * hop + slower


def total(calls: list[CollectiveCall], placement: Placement, hardware: Hardware) -> float:
    """Return the duration of several collectives, one after the other."""
    return sum(seconds(call, placement, hardware) for call in calls)


def broadcasts(calls: list[CollectiveCall], placement: Placement, hardware: Hardware) -> float:
    """Return the duration of pipelined broadcasts over one group.

    Each broadcast is assumed to follow the one before around the ring, so that the latency of the
    ring counts once. `total` counts it for each broadcast.
    """
    latency = ring_latency(group_of(calls[0], placement, hardware), hardware)
    return total(calls, placement, hardware) - latency * (len(calls) - 1)
