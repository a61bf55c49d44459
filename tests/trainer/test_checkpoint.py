"""Checkpoints are written atomically and verified before use."""

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from data.tokenizer import byte_tokenizer
from tests.trainer.tiny_checkpoint import FILES, MANIFEST, TRAIN, change_manifest, gpt
from trainer.checkpoint import read as ck
from trainer.checkpoint.write import save_checkpoint


def save(root: Path, step: int, model: nn.Module | None = None, **changes) -> Path:
    arguments = {**FILES, "model": ck.plain_state(gpt() if model is None else model)}
    return save_checkpoint(root, step, **arguments | changes)


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    model, state = gpt(), {0: {"exp_avg": torch.arange(3)}}
    ema, train = ck.plain_state(AveragedModel(model)), TRAIN | {"optimizers": [state]}
    path = save(tmp_path, 20, model, ema=ema, train=train)
    loaded = ck.load_checkpoint(path)
    assert path.name == "step-00000020"
    assert loaded.step == 20
    assert loaded.manifest["config"]["seed"] == 1
    assert torch.equal(loaded.model["transformer.wte.weight"], model.transformer.wte.weight)
    assert loaded.ema is not None
    assert set(loaded.ema) == set(model.state_dict())
    assert torch.equal(loaded.train["optimizers"][0][0]["exp_avg"], torch.arange(3))
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
    assert "trying the previous one" in warnings[0]


def test_it_is_an_error_if_every_checkpoint_is_damaged(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "train.pt").write_bytes(b"")
    warnings = []
    with pytest.raises(ck.CheckpointError, match="no older checkpoint is left") as caught:
        ck.newest_good(tmp_path, warnings.append)
    assert "step-00000001" in str(caught.value)
    assert "Start again" not in str(caught.value)  # the caller may only want to sample
    assert "step-00000002" not in str(caught.value)  # each is reported once
    assert ["step-00000002" in each for each in warnings] == [True]


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
    loaded = ck.load_checkpoint(save(tmp_path, 1))
    model = gpt(vocab_size=6, bias=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ck.CheckpointError, match=r"missing .*bias; .*wte.weight is \(5, 4\).*\(6, 4"
    ):
        ck.load_into(model, loaded.model, loaded.path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_prefixes_of_wrappers_are_neither_saved_nor_wanted(tmp_path):
    plain, compiled = gpt(), torch.compile(gpt())
    loaded = ck.load_checkpoint(save(tmp_path, 1, compiled))
    assert set(loaded.model) == set(plain.state_dict())
    ck.load_into(plain, loaded.model, loaded.path)
    assert torch.equal(plain.transformer.wte.weight, compiled.transformer.wte.weight)
    wrapped = ck.plain_state(nn.DataParallel(compiled))  # as of DDP and torch.compile together
    assert wrapped.keys() == plain.state_dict().keys()
    ck.load_into(compiled, wrapped, loaded.path)


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
    with pytest.raises(ck.CheckpointError, match=r"no space left in .*00001 is intact"):
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
    path = save(tmp_path, 1, manifest=MANIFEST | {"config": config})
    with pytest.warns(FutureWarning, match="settings of an earlier release: .*kernel") as warned:
        found = ck.load_checkpoint(path)
    assert len(warned) == 1
    expected = {"backend": "torch", "adjust_lr": "match_rms_adamw", "seed": 1, "lr": 6e-4}
    assert found.manifest["config"].items() >= expected.items()  # lr was missing
    assert not config.keys() - {"seed"} & found.manifest["config"].keys()
    assert found.digest == json.loads((path / "manifest.json").read_text())["sha256"]


def test_old_names_in_settings_and_in_the_preconditioner_are_one_warning(tmp_path):
    numbers = {"step": 1, "next_refresh": 1, "n_refreshes": 1, "n_mended": 0, "made_with": {}}
    manifest = MANIFEST | {"config": {"kernel": "torch"}}
    path = save(tmp_path, 1, manifest=manifest, train=TRAIN | {"dopr": {"layer": numbers}})
    with pytest.warns(FutureWarning, match="kernel, keys of the preconditioner") as warned:
        found = ck.load_checkpoint(path)
    assert len(warned) == 1
    assert found.train["dopr"]["layer"]["n_fallbacks"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    path = save(tmp_path, 1)
    weights = load_file(path / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"][1, 2] = value
    save_file(weights, path / "model.safetensors")
    change_manifest(path, lambda manifest: None)
    with pytest.raises(ck.CheckpointError, match=r"h\.0\.mlp\.c_fc\.weight is not finite"):
        ck.load_checkpoint(path)


def test_the_tokenizer_of_another_run_is_refused(tmp_path):
    path = save(tmp_path, 1)
    (path / "tokenizer.json").write_bytes(byte_tokenizer()._to_json())
    change_manifest(path, lambda manifest: None)
    with pytest.raises(ck.CheckpointError, match="is not the tokenizer that the run was trained"):
        ck.load_checkpoint(path)


def test_a_checkpoint_in_a_folder_of_another_step_is_refused(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(ck.CheckpointError, match="is of step 1"):
        ck.load_checkpoint(path.rename(tmp_path / "step-00000002"))
    ck.load_checkpoint((tmp_path / "step-00000002").rename(tmp_path / "best"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_folder_that_cannot_be_created_is_named(tmp_path, monkeypatch, number):
    save(tmp_path, 1)

    def fail(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(ck.CheckpointError, match=f"(?i){os.strerror(number)[:13]}.* is intact"):
        save(tmp_path, 2)


def test_a_disk_that_is_full_for_torch_is_said_to_be_full(tmp_path):
    """torch's own message is about inline_container.cc."""
    tensors = {"optimizers": [{0: {"exp_avg": torch.zeros(2**20)}}]}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    try:
        with pytest.raises(ck.CheckpointError, match="no space left in") as caught:
            save(tmp_path, 1, train=TRAIN | tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "inline_container" not in str(caught.value)
    assert not list(tmp_path.iterdir())
