"""The house has floors: who may import whom, checked on the syntax tree of every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOWER = {  # part of the house -> the parts that it may import
    "settings": set(),
    "configurator": {"settings"},
    "stopping": set(),
    "runlog": set(),
    "kernels": set(),
    "model": set(),
    "mup": set(),
    "optim": {"kernels", "mup"},
    "data": set(),
    "placement": set(),
    "aftermath": set(),
    "dist": {"aftermath", "placement"},
    "sharded": set(),
    "checkpoint": {"placement", "sharded"},
    "saving": {"checkpoint", "dist", "sharded"},
    "state": {"checkpoint", "saving", "optim", "dist", "placement", "sharded"},
    "resuming": {"checkpoint", "data", "dist", "settings"},
    "eval": {"dist", "sharded", "model", "data", "checkpoint", "optim", "runlog", "settings"}
    | {"configurator", "saving"},
    "train": {"settings", "configurator", "stopping", "runlog", "kernels", "model", "mup", "optim"}
    | {"aftermath", "dist", "placement", "data", "checkpoint", "state", "resuming", "eval"},
}


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("part", LOWER)
def test_a_part_imports_only_the_parts_below_it(part):
    files = [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else (ROOT / part).rglob("*.py")
    for path in files:
        above = (imports(path) & LOWER.keys()) - LOWER[part] - {part}
        assert not above, f"{path} imports {above}"


def test_every_part_of_the_house_has_a_floor():
    parts = {path.stem for path in ROOT.glob("*.py")}
    parts |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert parts - {"tests", "bench"} == LOWER.keys()


def test_the_settings_need_only_the_standard_library():
    for name in ("settings", "configurator", "mup"):
        assert imports(ROOT / f"{name}.py") <= {*sys.stdlib_module_names, "settings"}


def test_the_model_needs_only_torch():
    assert imports(ROOT / "model.py") <= {*sys.stdlib_module_names, "torch"}


def test_no_reference_kernel_imports_triton():
    for path in (ROOT / "kernels").glob("[!_]*.py"):
        assert "triton" not in imports(path)


def test_other_packages_import_from_the_root_of_the_project():
    code = (
        "import transformers, datasets, wandb, tiktoken; from transformers import GPT2LMHeadModel"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)
