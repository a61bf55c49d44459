"""The standard library is prepared as a dataset."""

import hashlib
import json
import platform
from pathlib import Path

import pytest

import data.pystdlib.prepare
from data.dataset import open_dataset
from data.preparation import MANIFEST
from data.pystdlib.prepare import EXCLUDED, stdlib_files


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """Create a small standard library that contains packages and tests."""
    root = tmp_path / "lib"
    kept = {f"pkg/m{i}.py": f"value = {i}\n" * 20 for i in range(40)} | {"b.py": "é = 1\n"}
    excluded = {f"{folder}/deep/x.py": "excluded" for folder in EXCLUDED}
    for name, text in {**kept, **excluded, "pkg/test/y.py": "excluded", "c.txt": "text"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "latin.py").write_bytes("é = 1\n".encode("latin-1"))
    monkeypatch.setattr(data.pystdlib.prepare.sysconfig, "get_paths", lambda: {"stdlib": root})
    return root


def test_tests_and_packages_are_excluded(stdlib):
    names = [path.relative_to(stdlib).as_posix() for path in stdlib_files(stdlib)]
    assert names == ["b.py", "latin.py", *sorted(f"pkg/m{i}.py" for i in range(40))]


def test_every_file_is_a_document_and_in_the_manifest(stdlib, tmp_path):
    arguments = ["--out", str(tmp_path / "out"), "--tokenizer=byte", "--val_fraction=0.3"]
    data.pystdlib.prepare.main(arguments)
    meta = open_dataset(tmp_path / "out").meta
    assert meta["source"]["python"] == platform.python_version()
    assert meta["documents_skipped"] == 1
    assert sum(split["documents"] for split in meta["splits"].values()) == 41
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert len(manifest) == 42
    for entry in manifest:
        raw = (stdlib / entry["path"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_the_real_library_is_megabytes_of_text():
    files = stdlib_files(Path(json.__file__).parents[1])
    assert len(files) > 300
    assert sum(path.stat().st_size for path in files) > 5e6
    assert not any(EXCLUDED & set(path.parts[-4:]) for path in files)


@pytest.mark.slow
def test_by_default_a_bpe_is_trained_on_the_sources(tmp_path):
    data.pystdlib.prepare.main(["--out", str(tmp_path)])
    dataset = open_dataset(tmp_path)
    assert dataset.tokenizer.n_vocab == 2048
    assert dataset.meta["splits"]["val"]["bytes_per_token"] > 2.5  # 2.90 with Python 3.11
    assert len(dataset.tokenizer.encode("    return self")) <= 4
