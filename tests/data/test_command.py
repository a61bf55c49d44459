"""Commands expand paths, print in any encoding, and end with one message."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

import data.text.prepare
from data.command import run
from data.dataset import open_dataset

ROOT = Path(__file__).parents[2]


def test_a_command_ends_with_one_message(tmp_path):
    command = [sys.executable, "-m", "data.text.prepare", "--input", str(tmp_path / "absent")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'absent'}: no such file or folder\n"


def test_a_home_directory_is_expanded_and_an_empty_path_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in.txt").write_text("text " * 50, encoding="utf-8")
    data.text.prepare.main(["--input=~/in.txt", "--out=~/out", "--tokenizer=byte"])
    assert open_dataset("~/out").dir == tmp_path / "out"
    for empty in ("--out=", "--input="):
        with pytest.raises(SystemExit):
            data.text.prepare.main(["--input=~/in.txt", "--out=~/out", empty])
        assert "expected the name of a file or a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "memory of this machine does not suffice"),
        (OSError(28, "No space left on device", "a.bin"), "No space left on device: 'a.bin'"),
    ],
)
def test_a_machine_that_is_full_gives_one_line(error, message, monkeypatch):
    def main():
        raise error

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit, match=message) as caught:
        run(main)
    assert "\n" not in str(caught.value)


def test_characters_that_a_terminal_lacks_are_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    run(lambda: print("é", flush=True))
    assert terminal.buffer.getvalue() == b"\\xe9\n"


def test_patterns_for_a_single_file_are_refused(tmp_path, capsys):
    (tmp_path / "in.txt").touch()
    with pytest.raises(SystemExit):
        data.text.prepare.main(["--input", str(tmp_path / "in.txt"), "--include=*.txt"])
    assert "choose the files of a folder" in capsys.readouterr().err
