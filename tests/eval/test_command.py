"""Test what the commands share: paths are checked before any work, and errors are one line."""

import errno
import sys
from pathlib import Path

import pytest

from eval import command, convert, harness, hf, sample
from eval.command import ArgumentError, command_parser, output_file, output_folder, reported_errors


def parse(*argv):
    parser = command_parser("eval.test", None)
    parser.add_argument("--path", type=Path)
    return parser.parse_args(argv).path


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse("--path=~/x") == Path("/home/someone/x")


@pytest.mark.parametrize("text", ["", " ", "~no-such-user/x"])
def test_a_path_that_names_nothing_is_one_line(capsys, text):
    with pytest.raises(SystemExit, match="2"):
        parse(f"--path={text}")
    error = capsys.readouterr().err
    assert error.startswith("error: argument --path: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("check", [output_file, output_folder])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, check):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(command.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ArgumentError, match="cannot be written: Read-only"):
        check(tmp_path / "new")


def test_an_output_file_needs_its_folder_and_an_output_folder_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert output_file(tmp_path / "file") == tmp_path / "file"
    assert output_folder(tmp_path / "a/b") == tmp_path / "a/b"
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]  # the checks leave nothing
    for check, name in ((output_file, ""), (output_file, "a/b"), (output_folder, "file/a")):
        with pytest.raises(ArgumentError):
            check(tmp_path / name)


WRITERS = {
    "sample": (sample.main, ["RUN", "--out=OUT"]),
    "harness": (harness.main, ["RUN", "--out=OUT"]),
    "convert": (convert.main, ["RUN", "OUT/x", "--to=full"]),
    "hf": (hf.main, ["export", "RUN", "OUT/x"]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_command_checks_its_output_before_it_loads_the_run(tmp_path, capsys, name):
    main, line = WRITERS[name]
    out = tmp_path if name in ("sample", "harness") else tmp_path / "file"
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main([word.replace("OUT", str(out)).replace("RUN", "no-run") for word in line])
    error = capsys.readouterr().err
    assert "no-run" not in error
    assert str(out) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("x"), 2), (KeyboardInterrupt(), 130), (BrokenPipeError(), 0)]
)
def test_a_command_ends_with_an_exit_code_and_no_traceback(monkeypatch, error, code):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a broken pipe replaces it
    with pytest.raises(SystemExit) as stop, reported_errors(command_parser("eval.test", None)):
        raise error
    assert stop.value.code == code
