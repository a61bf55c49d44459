"""How long a collective takes: alpha-beta, on rings that run through nodes, as NCCL's do.

A ring leaves and enters a node over all of its network cards at once, so between nodes its rate is
the slower of NVLink and of the cards of those GPUs of a node that take part. A ring has as many
hops as processes; an all-reduce may take a tree, which has about log2(nodes) of the slow ones. No
collective disturbs another.
"""

from __future__ import annotations

from math import ceil, log2
from typing import NamedTuple

from bench.scale.hardware import Hardware
from bench.scale.plan import Call, Placement


class Group(NamedTuple):
    """The processes of a collective: in how many nodes, and how many in each."""

    nodes: int
    per_node: int

    @property
    def n(self) -> int:
        return self.nodes * self.per_node


def group_of(call: Call, placement: Placement, hardware: Hardware) -> Group:
    """Ranks are consecutive in a node and in a shard; copies are `shards` ranks apart."""
    n = placement.ranks(call.over)
    apart = placement.shards if call.over == "replicate" else 1
    per_node = min(n, max(1, hardware.per_node // apart))
    return Group(ceil(n / per_node), per_node)


def seconds(call: Call, placement: Placement, hardware: Hardware) -> float:
    """From the first byte to the last, if nothing else is sent."""
    group = group_of(call, placement, hardware)
    if group.n == 1:
        return 0.0
    if call.kind == "all_to_all":
        return all_to_all_seconds(call.n_bytes, group, hardware)
    rounds = 2 if call.kind == "all_reduce" else 1
    share = 1.0 if call.kind == "broadcast" else rounds * (group.n - 1) / group.n
    hops = rounds * ring_latency(group, hardware)
    if call.kind == "all_reduce":
        hops = min(hops, tree_latency(group, hardware))
    return hardware.start + hops + share * call.n_bytes / ring_rate(group, hardware)


def ring_rate(group: Group, hardware: Hardware) -> float:
    inside = hardware.nvlink * hardware.nvlink_fraction
    across = group.per_node * hardware.network * hardware.network_fraction
    if group.nodes == 1:
        return inside
    return across if group.per_node == 1 else min(inside, across)


def ring_latency(group: Group, hardware: Hardware) -> float:
    inside = (group.n - group.nodes) * hardware.nvlink_hop
    return inside + (group.nodes - 1) * hardware.network_hop


def tree_latency(group: Group, hardware: Hardware) -> float:
    """Up and down: a chain within a node, a binary tree between nodes."""
    inside = (group.per_node - 1) * hardware.nvlink_hop
    return 2 * (inside + log2(group.nodes) * hardware.network_hop)


def all_to_all_seconds(n_bytes: float, group: Group, hardware: Hardware) -> float:
    """n_bytes of one process, evenly from the others; eight messages at a time (assumed)."""
    inside = n_bytes * (group.per_node - 1) / group.n
    across = n_bytes * (group.n - group.per_node) / group.n
    rate = hardware.nvlink * hardware.nvlink_fraction
    slower = max(inside / rate, across / (hardware.network * hardware.network_fraction))
    hop = hardware.nvlink_hop if group.nodes == 1 else hardware.network_hop
    return hardware.start + ceil((group.n - 1) / 8) * hop + slower


def total(calls: list[Call], placement: Placement, hardware: Hardware) -> float:
    """One after the other."""
    return sum(seconds(call, placement, hardware) for call in calls)


def broadcasts(calls: list[Call], placement: Placement, hardware: Hardware) -> float:
    """Broadcasts over one group: each follows the one before it around the ring, so that the way
    around is waited for once (assumed; waited for each time, it would be `total`)."""
    again = ring_latency(group_of(calls[0], placement, hardware), hardware) * (len(calls) - 1)
    return total(calls, placement, hardware) - again
