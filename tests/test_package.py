"""`pip install .` gives one package, dopr, that needs torch alone and trains."""

import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.xdist_group("package")  # its fixtures are slow

ROOT = Path(__file__).parent.parent
TEN_STEPS = """
import torch
import dopr
from dopr import ActivationPreconditioner, AdaMuon, Muon, Signum

for kind in (torch.optim.AdamW, Signum, Muon, AdaMuon):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4, bias=False)]
    model = torch.nn.Sequential(*layers)
    optimizer = kind(model.parameters(), lr=1e-2)
    ActivationPreconditioner(model, gamma=0.1).attach(optimizer)
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    losses = []
    for step in range(10):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (kind, losses)
print(dopr.__version__, dopr.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy, so that the build writes nothing into the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("optim", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", ROOT / name, target], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*command, source], check=True)
    (found,) = folder.glob("dopr-*.whl")
    return found


def test_the_wheel_holds_one_package_and_needs_torch_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        head = Parser().parsestr(archive.read(metadata).decode())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"dopr"}
    assert {"dopr/py.typed", "dopr/kernels/gram.py", "dopr/dopr/preconditioner.py"} | {
        "dopr/integrations/lightning.py"
    } <= {*names}
    required = [each for each in head.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert [each.split(">")[0] for each in required] == ["torch"]
    assert head["License-Expression"] == "MIT"


def test_the_installed_package_trains_from_any_folder(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    torchs = Path(torch.__file__).parents[1]  # this interpreter's torch, without a second download
    (site / "torch.pth").write_text(f"{torchs}\n")
    done = subprocess.run(
        [python, "-W", "ignore", "-c", TEN_STEPS], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert str(site / "dopr") in done.stdout
