"""Report the registers, spills and shared memory of the compiled Triton kernels. Needs no GPU.

    python -m bench.kernel_report [--archs 80 90] [--kernels gram]

Compiles every default configuration ahead of time, for pointers and sizes that are multiples of 16.
The columns are: the tile and its depth; warps and stages; registers per thread; bytes per thread
spilled to the stack; bytes of dynamic shared memory per block; and the number of wgmma (HGMMA), mma
(HMMA) and asynchronous copy (LDGSTS) instructions in the machine code. Needs triton, which comes
with the CUDA wheels of torch.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eval.command import command_parser
from optim.kernels import _triton_apply, _triton_gram, _triton_symmetric
from optim.kernels._triton_tiles import TileConfig

SHARED_LIMIT = {
    80: 163 * 1024,
    90: 227 * 1024,
}  # bytes per block: CUDA C++ Programming Guide, table 15
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
ROW = "{:20} {:>4} {:>7} {:>5} {:>6} {:>9} {:>7} {:>7} {:>5} {:>4} {:>6}"


class KernelVariant(NamedTuple):
    """A kernel and its launch options.

    The types use Triton's notation; ":16" marks pointers and sizes that are multiples of 16.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


class KernelUsage(NamedTuple):
    """The resources of one compiled kernel, and counts of its instructions."""

    registers: int
    spilled: int  # bytes per thread
    shared: int  # bytes per block
    hgmma: int
    hmma: int
    ldgsts: int


def variants() -> Iterator[KernelVariant]:
    """Yield every kernel in every default configuration."""
    yield from _gram_variants()
    yield from _symmetric_variants()
    for precision, config in _triton_apply.CONFIGS.items():
        pointers = {"G_ptr": "*fp32:16", "P_ptr": "*fp32:16", "M_ptr": "*fp32:16"}
        types = pointers | _sizes("m b G_stride G_row_stride")
        constants = {"G_column_stride": 1, "PRECISION": precision}
        yield _variant("apply", precision, _triton_apply.apply_kernel, types, constants, config)


def _gram_variants() -> Iterator[KernelVariant]:
    kernels = _triton_gram
    for dtype in (torch.bfloat16, torch.float32):  # fp16 compiles like bf16
        precision, name = kernels.PRECISIONS[dtype], TYPES[dtype]
        config = kernels.CONFIGS[precision]
        types = {"z_ptr": f"*{name}:16", "partial_ptr": "*fp32:16", "offset_ptr": "*i64:16"}
        types |= _sizes("n:1 T:1 per_sequence:1 stride:1 chunk row_stride b")
        constants = {"PRECISION": precision}
        with_columns = types | {"columns_ptr": "*fp32:16"}
        without = constants | {"columns_ptr": None}
        kernel = kernels.partial_kernel
        yield _variant("gram", name, kernel, types, without, config)
        yield _variant("gram", f"{name} + columns", kernel, with_columns, constants, config)
    for config in kernels.CONFIGS.values():
        pointers = ("S_ptr", "partial_ptr", "beta_ptr", "alpha_ptr")
        types = dict.fromkeys(pointers, "*fp32:16") | _sizes("splits:1 b block_stride row_stride")
        constants = {"column_stride": 1, "TILE": config.tile, "ROWS": kernels.REDUCE_ROWS}
        name = f"gram_reduce {config.tile}"
        yield KernelVariant(name, kernels.reduce_kernel, types, constants, 4, 3)


def _symmetric_variants() -> Iterator[KernelVariant]:
    kernel = _triton_symmetric.symmetric_kernel
    for (dtype, precision), config in _triton_symmetric.CONFIGS.items():
        matrices = dict.fromkeys(("A_ptr", "B_ptr", "O_ptr"), f"*{TYPES[dtype]}:16")
        scalars = dict.fromkeys(("alpha_ptr", "beta_ptr", "gamma_ptr"), "*fp32:16")
        types, constants = matrices | scalars | _sizes("d k"), {"PRECISION": precision}
        with_C = types | {"C_ptr": matrices["A_ptr"]}
        yield _variant("symmetric", f"{precision} + C", kernel, with_C, constants, config)
        if precision in ("bf16", "bf16x3"):
            without = constants | {"C_ptr": None}
            yield _variant("symmetric", precision, kernel, types, without, config)


def _sizes(names: str) -> dict[str, str]:
    """Return the types of size arguments. In "d k:1", d is a multiple of 16 and k is any number."""
    pairs = (name.split(":") for name in names.split())
    return {name: "i32" if multiple else "i32:16" for name, *multiple in pairs}


def _variant(
    name: str,
    detail: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    config: TileConfig,
) -> KernelVariant:
    constants = {**constants, "TILE": config.tile, "DEPTH": config.depth}
    label = f"{name} {detail}"
    return KernelVariant(label, kernel, types, constants, config.num_warps, config.num_stages)


def usage(variant: KernelVariant, arch: int) -> KernelUsage:
    """Compile for compute capability arch / 10, and count in the machine code."""
    names, types = variant.kernel.arg_names, variant.types
    source = ASTSource(
        variant.kernel,
        {name: types[name].split(":")[0] if name in types else "constexpr" for name in names},
        variant.constants,
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name in types
            if types[name].endswith(":16")
        },
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert resources, listing[:1000]
    count = {name: len(re.findall(rf"\b{name}\b", listing)) for name in ("HGMMA", "HMMA", "LDGSTS")}
    return KernelUsage(
        int(resources[1]), int(resources[2]), compiled.metadata.shared, *count.values()
    )


def main() -> None:
    parser = command_parser("bench.kernel_report", __doc__)
    parser.add_argument("--archs", type=int, nargs="+", choices=SHARED_LIMIT, default=[80, 90])
    parser.add_argument(
        "--kernels",
        default="",
        metavar="TEXT",
        help="report only the kernels whose name contains TEXT",
    )
    arguments = parser.parse_args()
    chosen = [variant for variant in variants() if arguments.kernels in variant.name]
    if not chosen:
        names = ", ".join(variant.name for variant in variants())
        parser.error(f"no kernel's name contains {arguments.kernels!r}; the names are {names}")
    print(f"triton {triton.__version__}")
    print(ROW.format("kernel", "arch", "tile", "warps", "stages", *KernelUsage._fields))
    for variant in chosen:
        for arch in arguments.archs:
            tile = f"{variant.constants['TILE']}x{variant.constants.get('DEPTH', '-')}"
            launch = (tile, variant.num_warps, variant.num_stages)
            print(ROW.format(variant.name, arch, *launch, *usage(variant, arch)), flush=True)


if __name__ == "__main__":
    main()
