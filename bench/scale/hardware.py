"""What the GPUs and the wires between them can do. Every number has its source or is assumed."""

from __future__ import annotations

from dataclasses import dataclass, fields

T, G, MICRO = 1e12, 1e9, 1e-6


@dataclass(frozen=True)
class Hardware:
    """Peaks in operations/s and bytes/s, latencies in s; each achieved fraction is of a peak."""

    name: str
    bf16: float  # dense, on tensor cores
    tf32: float  # dense, on tensor cores
    fp32: float  # without tensor cores
    fp64: float  # the faster of the two units
    memory: float  # bytes of a GPU
    memory_rate: float
    nvlink: float  # of a GPU, one direction
    network: float = 50 * G  # of a GPU, one direction: 400 Gb/s, as in NVIDIA's DGX H100
    per_node: int = 8
    # achieved
    mfu: float = 0.40  # forward and backward, of bf16; 0.38 to 0.43 for Llama 3 (Dubey et al. 2024)
    gram_fraction: float = 0.5  # z zᵀ, of bf16; assumed
    apply_fraction: float = 0.5  # G P in three tf32 products, of tf32 / 3; assumed
    muon_fraction: float = 0.5  # Newton-Schulz of Muon, of bf16; assumed
    newton_fraction: float = 0.4  # inverse="newton_schulz", of bf16 / 3 or of fp32; assumed
    cholesky_fraction: float = 0.6  # of fp64, of a matrix without end; assumed
    cholesky_half: float = 16384  # the width that reaches half of it; assumed
    memory_fraction: float = 0.8  # of memory_rate; assumed
    nvlink_fraction: float = 0.8  # assumed
    network_fraction: float = 0.85  # assumed
    usable_memory: float = 0.92  # CUDA context, NCCL's buffers, fragments; assumed
    # latencies: NCCL, src/graph/tuning.cc, LL128
    start: float = 14 * MICRO  # of a collective
    nvlink_hop: float = 1.9 * MICRO
    network_hop: float = 4.0 * MICRO
    host_read: float = 30 * MICRO  # the host waits for the device, and launches again; assumed


# Peaks: NVIDIA's data sheets (A100 2021, H100 2023, H200 2024), without sparsity.
HARDWARE = {
    row.name: row
    for row in (
        Hardware(
            "a100", 312 * T, 156 * T, 19.5 * T, 19.5 * T, 80 * G, 2.04 * T, 300 * G, network=25 * G
        ),
        Hardware("h100", 989 * T, 494 * T, 67 * T, 67 * T, 80 * G, 3.35 * T, 450 * G),
        Hardware("h200", 989 * T, 494 * T, 67 * T, 67 * T, 141 * G, 4.8 * T, 450 * G),
    )
}
NUMBERS = {field.name: field.type for field in fields(Hardware) if field.name != "name"}
