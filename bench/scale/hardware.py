"""Peak rates and latencies of GPUs and their networks, each with its source or marked assumed."""

from dataclasses import dataclass, fields

T, G, MICRO = 1e12, 1e9, 1e-6


@dataclass(frozen=True)
class Hardware:
    """Peaks in FLOP/s and bytes/s, achieved fractions of these peaks, and latencies in seconds."""

    name: str
    bf16: float  # dense, on tensor cores
    tf32: float  # dense, on tensor cores
    fp32: float  # without tensor cores
    fp64: float  # with or without tensor cores, whichever is faster
    memory: float  # bytes per GPU
    memory_rate: float
    nvlink: float  # per GPU and direction
    network: float = 50 * G  # per GPU and direction: 400 Gb/s, as in NVIDIA's DGX H100
    per_node: int = 8  # GPUs
    # Achieved fractions
    mfu: float = 0.40  # forward and backward, of bf16; 0.38 to 0.43 for Llama 3 (Dubey et al. 2024)
    gram_fraction: float = 0.5  # Σ z zᵀ, of bf16; assumed
    apply_fraction: float = 0.5  # G P as three tf32 products, of tf32 / 3; assumed
    muon_fraction: float = 0.5  # Newton-Schulz of Muon, of bf16; assumed
    newton_fraction: float = 0.4  # inverse="newton_schulz", of bf16 / 3 or of fp32; assumed
    cholesky_fraction: float = 0.6  # of fp64, for an infinitely wide matrix; assumed
    cholesky_half: float = 16384  # the width with half of this fraction; assumed
    memory_fraction: float = 0.8  # of memory_rate; assumed
    nvlink_fraction: float = 0.8  # assumed
    network_fraction: float = 0.85  # assumed
    usable_memory: float = 0.92  # without CUDA context, NCCL buffers, fragments; assumed
    # Latencies: NCCL, src/graph/tuning.cc, LL128
    start: float = 14 * MICRO  # per collective
    nvlink_hop: float = 1.9 * MICRO
    network_hop: float = 4.0 * MICRO
    host_read: float = 30 * MICRO  # the host waits for the device, then launches again; assumed


# Peaks without sparsity: NVIDIA's data sheets (A100 2021, H100 2023, H200 2024).
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
