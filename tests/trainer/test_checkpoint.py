"""Checkpoints are written atomically and verified before use."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from trainer.checkpoint import read as ck
from trainer.checkpoint.write import save_checkpoint


def save(root: Path, step: int, model: nn.Module | None = None, **changes) -> Path:
    arguments = {
        "model": ck.plain_state(nn.Linear(4, 3) if model is None else model),
        "ema": None,
        "train": {"skipped": 0, "tensor": torch.arange(3)},
        "tokenizer_json": b"{}",
        "manifest": {"config": {"seed": 1}},
        "keep": 2,
    }
    return save_checkpoint(root, step, **arguments | changes)


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    model = nn.Linear(4, 3)
    path = save(tmp_path, 20, model, ema=ck.plain_state(AveragedModel(model)))
    loaded = ck.load_checkpoint(path)
    assert path.name == "step-00000020"
    assert loaded.step == 20
    assert loaded.manifest["config"] == {"seed": 1}
    assert torch.equal(loaded.model["weight"], model.weight)
    assert loaded.ema is not None
    assert set(loaded.ema) == {"weight", "bias"}
    assert torch.equal(loaded.train["tensor"], torch.arange(3))
    assert (tmp_path / "latest").read_text() == "step-00000020\n"


@pytest.mark.parametrize("name", ["model.safetensors", "train.pt", "manifest.json"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path, name, share):
    path = save(tmp_path, 1)
    os.truncate(path / name, int((path / name).stat().st_size * share))
    with pytest.raises(ck.CheckpointError, match=rf"damaged \({name}"):
        ck.load_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "train.pt", "tokenizer.json"])
def test_one_flipped_byte_is_refused_by_name(tmp_path, name):
    path = save(tmp_path, 1)
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(ck.CheckpointError, match=rf"{name} does not match its sha256"):
        ck.load_checkpoint(path)


def test_the_newest_good_checkpoint_is_found_behind_a_damaged_one(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "train.pt").write_bytes(b"")
    warnings = []
    found = ck.newest_good(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 1
    assert "train.pt has 0 bytes" in warnings[0]


def test_it_is_an_error_if_every_checkpoint_is_damaged(tmp_path):
    (save(tmp_path, 1) / "train.pt").write_bytes(b"")
    with pytest.raises(ck.CheckpointError, match="no usable checkpoint"):
        ck.newest_good(tmp_path, lambda text: None)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = save(tmp_path, 1, train={"evil": Evil()})
    with pytest.raises(ck.CheckpointError, match=r"train\.pt refused"):
        ck.load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_another_schema_is_refused_by_number(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text()) | {"schema": 99}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ck.CheckpointError, match="schema 99, but this version reads schema 1"):
        ck.load_checkpoint(path)


def test_a_checkpoint_of_another_shape_lists_all_differences_and_changes_nothing(tmp_path):
    loaded = ck.load_checkpoint(save(tmp_path, 1, nn.Linear(4, 3, bias=False)))
    model = nn.Linear(4, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ck.CheckpointError, match=r"missing bias; weight is \(3, 4\).*\(2, 4\)"):
        ck.load_into(model, loaded.model, loaded.path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_prefixes_of_wrappers_are_neither_saved_nor_wanted(tmp_path):
    plain, compiled = nn.Linear(4, 3), torch.compile(nn.Linear(4, 3))
    loaded = ck.load_checkpoint(save(tmp_path, 1, compiled))
    assert set(loaded.model) == {"weight", "bias"}
    ck.load_into(plain, loaded.model, loaded.path)
    assert torch.equal(plain.weight, compiled.weight)
    ck.load_into(compiled, ck.plain_state(nn.DataParallel(plain)), loaded.path)


def test_only_the_newest_are_kept_and_leftovers_are_removed(tmp_path):
    (tmp_path / "step-00000009.tmp").mkdir()
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000002",
        "step-00000003",
    ]


def test_a_run_resumed_from_an_earlier_step_ignores_later_checkpoints(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=9)
    for step in (15, 25, 35):  # the run was resumed from step 10
        save(tmp_path, step, keep=9)
        found = ck.newest_good(tmp_path)
        assert found is not None
        assert found.step == step
    assert [path.name for path in ck.candidates(tmp_path)] == [
        f"step-{step:08d}" for step in (35, 25, 15, 10)
    ]
    assert (tmp_path / "abandoned-step-00000030").is_dir()  # nothing is lost


@pytest.mark.parametrize("content", ["", "nonsense", "step-00000001"])
def test_resume_does_not_read_the_file_latest(tmp_path, content):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "latest").write_text(content)
    (tmp_path / "step-00000009.bak").mkdir()
    found = ck.newest_good(tmp_path)
    assert found is not None
    assert found.step == 2


def test_a_changed_manifest_is_refused(tmp_path):
    path = save(tmp_path, 40) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 40', '"step": 30'))
    with pytest.raises(ck.CheckpointError, match=r"manifest\.json has a wrong sha256"):
        ck.load_checkpoint(path.parent)


def test_a_failed_save_keeps_the_previous_one_and_removes_its_own_folder(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(ck.CheckpointError, match="No space left"):
        save(tmp_path, 2)
    found = ck.newest_good(tmp_path)
    assert found is not None
    assert found.step == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ck.CheckpointError, match="expected a run's out_dir"):
        ck.open_checkpoint(tmp_path)


def test_settings_of_an_earlier_release_are_renamed_with_one_warning(tmp_path):
    config = {"kernel": "torch", "muon_scale": "match_rms", "seed": 1}
    path = save(tmp_path, 1, manifest={"config": config})
    with pytest.warns(FutureWarning, match="settings of an earlier release: .*kernel") as warned:
        found = ck.load_checkpoint(path)
    assert len(warned) == 1
    assert found.manifest["config"] == {
        "backend": "torch",
        "adjust_lr": "match_rms_adamw",
        "seed": 1,
    }
    assert found.digest == json.loads((path / "manifest.json").read_text())["sha256"]
