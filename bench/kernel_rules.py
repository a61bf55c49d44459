"""Which implementations bench.kernels judges, and by which error. Imports no torch."""

from typing import Any

SHIPPED = {  # the default implementation of each operation on a GPU, and its error tolerance
    "gram": ("triton", 2e-4),  # Tensor cores truncate the terms of an fp32 sum of up to n terms.
    "inverse": ("triton deflated", 1e-3),  # kernels.damped_root.WANTED_ERROR
    "apply": ("triton tf32x3", 1e-5),  # 21 bits
    "orthogonalize": ("triton", 0.1),  # five iterations in bf16, whose resolution is 2^-8
}
TORCH = {  # the implementation that backend="torch" uses
    "gram": "unfused",
    "inverse": "cholesky",
    "apply": "layer by layer",
    "orthogonalize": "torch",
}


def is_accurate(row: dict[str, Any]) -> bool:
    """Whether the error of the default implementation is within its tolerance, and not NaN."""
    operation = row["case"].split()[0]
    shipped, tolerance = SHIPPED[operation]
    return row["error"][shipped] <= tolerance


def ratio_to_torch(row: dict[str, Any]) -> float:
    """Return the time of the default implementation as a multiple of torch's."""
    operation = row["case"].split()[0]
    shipped, _ = SHIPPED[operation]
    return row["ratio"][shipped] / row["ratio"][TORCH[operation]]
