"""Which package may import which, checked on the syntax tree of every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": set(),
    "model": set(),
    "data": set(),
    "optim": {"kernels"},
    "trainer": {"optim", "data", "model"},
    "eval": {"trainer", "optim", "data", "model"},
    "train": {"eval", "trainer", "optim", "data", "model"},
    "studies": {"train", "eval", "trainer", "optim", "data", "model"},
    "bench": {"studies", "train", "eval", "trainer", "optim", "kernels", "data", "model"},
}


def files_of(part: str) -> list[Path]:
    """The source files of a package or a module of the root."""
    module = ROOT / f"{part}.py"
    found = [module] if module.exists() else sorted((ROOT / part).rglob("*.py"))
    return [path for path in found if "optim/kernels" not in str(path)]


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, inside functions too; relative ones too."""
    folder = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            names.add(".".join([*above, *([node.module] if node.module else [])]))
    return names


def parts_imported(path: Path) -> set[str]:
    """The packages and root modules of this project that a file imports.

    `optim.kernels` is a link to the folder kernels/.
    """
    names = {name.replace("optim.kernels", "kernels") for name in imports(path)}
    return {name.partition(".")[0] for name in names} & MAY_IMPORT.keys()


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_package_imports_only_the_packages_below_it(part):
    for path in files_of(part):
        allowed = MAY_IMPORT[part] | {part}
        if "optim" in allowed:
            allowed |= {"kernels"}
        assert parts_imported(path) <= allowed, path


def test_every_package_has_a_place_in_the_order():
    parts = {path.stem for path in ROOT.glob("*.py")}
    parts |= {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"kernels"}
    assert parts - {"tests"} == MAY_IMPORT.keys()


def test_the_root_holds_the_trainer_and_the_model_alone():
    assert {path.name for path in ROOT.glob("*.py")} == {"train.py", "model.py"}


def test_what_is_installed_uses_relative_imports_and_needs_torch_alone():
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for part in ("optim", "kernels"):
        for path in files_of(part):
            outside = {name for name in imports(path) if not name.startswith(part)}
            is_integration = path.parent == ROOT / "optim" / "integrations"
            theirs = {"transformers", "accelerate", "lightning"} if is_integration else set()
            assert {name.partition(".")[0] for name in outside} <= allowed | theirs, path


def test_the_settings_need_only_the_standard_library():
    for name in ("settings", "config"):
        outside = {name.partition(".")[0] for name in imports(ROOT / "trainer" / f"{name}.py")}
        assert outside <= {*sys.stdlib_module_names, "trainer", "optim"}


def test_the_model_needs_only_torch():
    assert {name.partition(".")[0] for name in imports(ROOT / "model.py")} <= {
        *sys.stdlib_module_names,
        "torch",
    }


def test_no_reference_kernel_imports_triton():
    for path in (ROOT / "kernels").glob("[!_]*.py"):
        assert "triton" not in {name.partition(".")[0] for name in imports(path)}


LIGHT = {  # module: what importing it, after the modules above it, must not import
    "train": {"scipy", "matplotlib"},
    "studies.sweep.compare": {"mujoco", "gymnasium"},
    "studies.report.__main__": {"matplotlib.pyplot", "mujoco", "gymnasium"},
}


def test_a_module_does_not_load_what_it_seldom_needs():
    code = "import importlib, sys\n"
    for module, absent in LIGHT.items():
        code += f"importlib.import_module({module!r})\n"
        code += f"assert not {absent} & {{*sys.modules}}, {module!r}\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_other_packages_import_from_the_root_of_the_project():
    code = (
        "import transformers, datasets, wandb, tiktoken; from transformers import GPT2LMHeadModel"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)
