"""The compiled Triton kernels, for GPU architectures that this host need not have."""

from itertools import product

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed; it supports Linux only")
if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from bench.kernel_report import SHARED_LIMIT, usage, variants  # noqa: E402

SHARED_RESERVED = 1024  # bytes of the limit that the system reserves

VARIANTS = {variant.name: variant for variant in variants()}
TENSOR_CORES = [name for name in VARIANTS if "ieee" not in name and "reduce" not in name]
SOME = [
    "gram bf16",
    "gram bf16 + columns",
    "gram_reduce 128",
    "symmetric bf16x3 + C",
    "apply tf32x3",
]


def some(*quick):
    """Return the names in SOME, slow except for some."""
    return [pytest.param(x, marks=[] if x in quick else [pytest.mark.slow]) for x in SOME]


def check(use, arch):
    assert use.spilled == 0
    assert use.registers <= 255
    assert use.shared + SHARED_RESERVED <= SHARED_LIMIT[arch]


QUICK = {*product(SOME, [90]), ("gram bf16", 80), ("symmetric bf16x3 + C", 80)}


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in product(VARIANTS, SHARED_LIMIT)
    ],
)
def test_a_shipped_configuration_fits_and_does_not_spill(name, arch):
    use = usage(VARIANTS[name], arch)
    check(use, arch)
    if name in TENSOR_CORES:
        assert use.hgmma if arch == 90 else use.hmma
    if "reduce" not in name:
        assert use.ldgsts  # loads are pipelined


@pytest.mark.parametrize("name", some("gram bf16 + columns", "symmetric bf16x3 + C"))
def test_sizes_that_are_multiples_of_nothing_compile_without_spills(name):
    variant = VARIANTS[name]
    types = {k: t.split(":")[0] if t.startswith("i") else t for k, t in variant.types.items()}
    check(usage(variant._replace(types=types), 90), 90)


@pytest.mark.parametrize("name", some("gram bf16", "apply tf32x3"))
def test_sizes_of_one_which_are_constants_compile(name):
    variant = VARIANTS[name]
    ones = dict.fromkeys((k for k, t in variant.types.items() if t.startswith("i")), 1)
    types = {k: t for k, t in variant.types.items() if k not in ones}
    check(usage(variant._replace(types=types, constants=variant.constants | ones), 90), 90)


def test_a_configuration_that_spills_is_seen():
    deep = VARIANTS["symmetric bf16x3 + C"]
    deep = deep._replace(constants=deep.constants | {"DEPTH": 64})
    assert usage(deep, 80).spilled > 0
