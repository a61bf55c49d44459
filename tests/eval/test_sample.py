"""Test `python -m eval.sample`: its output, its files and its error messages."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch

import train
from data.tokenizer import byte_tokenizer
from eval.command import command_parser, pick_device
from eval.generate import generate
from eval.hf import export_hf
from eval.run import load_run
from eval.sample import main, read_prompts, sample
from eval.sampling import Sampling
from model import GPT, GPTConfig
from tests.tiny import argv

TOKENIZER = byte_tokenizer()
PROMPTS = ["alpha ", "", "b", "gamma beta"]


@pytest.fixture(scope="module")
def out_dir(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "run"
    assert train.main(argv(dataset, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16))


def rows(model, prompts=PROMPTS, **changes):
    return list(sample(model, TOKENIZER, prompts, **{"how": Sampling(), "seed": 1} | changes))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_does_not_change_the_samples(model, batch_size):
    assert rows(model, batch_size=batch_size) == rows(model, batch_size=4)


def test_the_seed_decides(model):
    assert rows(model) == rows(model) != rows(model, seed=2)


def test_samples_of_the_same_prompt_differ(model):
    assert len({row["completion"] for row in rows(model, ["a"] * 8)}) > 1


def test_without_a_limit_the_longest_prompt_fills_the_context(model):
    settings = {"prompts": ["a", "gamma beta"], "how": Sampling(greedy=True)}
    assert [len(row["ids"]) for row in rows(model, **settings)] == [6, 6]  # 16 - len("gamma beta")
    assert [len(row["ids"]) for row in rows(model, **settings, max_new_tokens=3)] == [3, 3]


def test_end_of_text_ends_a_sample_and_is_no_part_of_its_text(model, monkeypatch):
    answer = [[*b"xy", TOKENIZER.eot], [*b"xyz"]]
    monkeypatch.setattr("eval.sample.generate", lambda *args, stop_token, **rest: answer)
    assert [row["completion"] for row in rows(model, ["a", "b"])] == ["xy", "xyz"]


def test_an_empty_prompt_starts_from_end_of_text(model, monkeypatch):
    seen = []

    def record(model, prompts, *args, **rest):
        seen.extend(prompts)
        return generate(model, prompts, *args, **rest)

    monkeypatch.setattr("eval.sample.generate", record)
    rows(model, ["", "a"])
    assert seen == [[TOKENIZER.eot], [ord("a")]]


def test_a_prompt_that_is_too_long_is_named(model):
    with pytest.raises(ValueError, match="prompt 2 has 16 tokens and block_size is 16"):
        rows(model, ["a", "b" * 16])
    with pytest.raises(ValueError, match="prompt 2 has 17 tokens and block_size is 16"):
        rows(model, ["a", "b" * 17], max_new_tokens=4)


def test_a_sliding_window_is_announced_in_one_line(model, capsys):
    assert rows(model, ["b" * 16], max_new_tokens=3)
    assert rows(model, ["b"] * 3, max_new_tokens=16, batch_size=1)
    note = capsys.readouterr().err
    assert note.count("continues from its last 8 tokens") == note.count("\n") == 2
    rows(model, ["b"], max_new_tokens=15)
    assert capsys.readouterr().err == ""


def test_prompts_come_one_a_line_or_as_json(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb"}\n{"prompt": ""}\n')
    assert read_prompts(tmp_path / "p.txt") == ["one", "", " two "]
    assert read_prompts(tmp_path / "p.jsonl") == ["a\nb", ""]


@pytest.mark.parametrize("line", ["[1]", '{"text": "a"}', '{"prompt": 3}', "{"])
def test_a_line_without_a_prompt_is_named(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: "):
        read_prompts(path)


def test_the_command_prints_the_prompt_with_its_completions(out_dir, capsys):
    main([str(out_dir), "--prompt=alph", "--num_samples=2", "--max_new_tokens=4", "--greedy"])
    samples = capsys.readouterr().out.split("\n---\n")[:-1]
    assert samples[0] == samples[1]
    assert samples[0].startswith("alph")
    assert len(samples[0]) > 4


def test_initial_weights_are_announced_in_one_line(out_dir, dataset, tmp_path, capsys):
    out = tmp_path / "diverged"
    changes = {"lr": 1e30, "warmup_steps": 0, "max_steps": 1}
    assert train.main(argv(dataset, out, **changes)) == train.EXIT_DIVERGED
    for folder, n_lines in ((out, 1), (out_dir, 0)):
        capsys.readouterr()
        main([str(folder), "--max_new_tokens=3"])
        note = capsys.readouterr().err
        assert note.count("\n") == note.count("initial weights") == n_lines


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_is_accepted_where_torch_has_it(monkeypatch, name):
    module = {"cuda": torch.cuda, "mps": torch.backends.mps}[name]
    monkeypatch.setattr(module, "is_available", lambda: True)
    assert pick_device(name) == name
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device={name}: torch finds no"):
        pick_device(name)


def test_a_temperature_of_zero_on_the_command_line_is_greedy(out_dir, capsys):
    line = [str(out_dir), "--max_new_tokens=5", "--prompt=a"]
    main([*line, "--temperature=0"])
    found = capsys.readouterr().out
    main([*line, "--greedy"])
    assert capsys.readouterr().out == found


def test_the_weights_may_be_bfloat16(out_dir, tmp_path, monkeypatch):
    seen, out = [], tmp_path / "samples.jsonl"

    def record(model, *args, **rest):
        seen.extend({p.dtype for p in model.parameters()})
        return generate(model, *args, **rest)

    monkeypatch.setattr("eval.sample.generate", record)
    main([str(out_dir), "--dtype=bfloat16", "--max_new_tokens=5", f"--out={out}"])
    assert seen == [torch.bfloat16]
    assert json.loads(out.read_text())["settings"]["dtype"] == "bfloat16"


def test_help_into_a_closed_pipe_is_silent():
    read, write = os.pipe()
    os.close(read)
    code = "from eval.command import command_parser as p; p('x', 'y').parse_args(['--help'])"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # buffered, as in a shell
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_without_unicode_shows_escapes(model, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    command_parser("eval.sample", None)
    print("caf\u00e9", flush=True)
    assert raw.getvalue() == b"caf\\xe9\n"


def test_a_hugging_face_folder_is_sampled_like_the_run_it_came_from(out_dir, tmp_path, capsys):
    run = load_run(out_dir)
    export_hf(run.model, run.tokenizer, tmp_path / "hf")
    found = []
    for source in (out_dir, tmp_path / "hf"):
        main([str(source), "--prompt=alph", "--num_samples=3", "--max_new_tokens=30"])
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    with pytest.raises(SystemExit):
        main([str(tmp_path / "hf"), "--ema"])
    assert "no averaged weights" in capsys.readouterr().err
    (tmp_path / "hf/tokenizer.json").unlink()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "hf")])
    assert "tokenizer.json: cannot" in capsys.readouterr().err


def test_the_command_writes_rows_that_say_how_to_make_them_again(out_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("alpha\nbeta\n")
    out = tmp_path / "samples.jsonl"
    line = [str(out_dir), f"--prompts={tmp_path / 'prompts.txt'}", f"--out={out}", "--top_k=5"]
    main([*line, "--num_samples=2", "--seed=3", "--batch_size=3"])
    found = [json.loads(row) for row in out.read_text().splitlines()]
    assert [row["prompt"] for row in found] == ["alpha", "alpha", "beta", "beta"]
    assert {row["step"] for row in found} == {12}
    assert {row["seed"] for row in found} == {3}
    assert found[0]["settings"]["top_k"] == 5
    assert all(TOKENIZER.decode(row["ids"]).startswith(row["completion"]) for row in found)


BAD_LINES = {
    "out/none": [],
    "--batch_size=0: must be at least 1": ["--batch_size=0"],
    "--seed=-1: must be in": ["--seed=-1"],
    "--temperature=2: no effect with --greedy": ["--greedy", "--temperature=2"],
    "--temperature=1, --top_k=5, --top_p=0.9: no effect": [
        *("--greedy", "--top_p=0.9", "--top_k=5", "--temperature=1")
    ],
    "--top_k=5: no effect with --temperature=0": ["--temperature=0", "--top_k=5"],
    "invalid choice: 'float16'": ["--dtype=float16"],
    "top_p=0.0: must be in (0, 1]": ["--top_p=0"],
    "prompt 1 has 16 tokens and block_size is 16": ["--prompt=0123456789abcdef"],
    "no averaged weights": ["--ema"],
    "none.txt: No such file": ["--prompts=none.txt"],
    "the folder nowhere does not exist": ["--out=nowhere/samples.jsonl"],
    "tests is a folder": ["--out=tests"],
    "the path is empty": ["--out="],
    "invalid int value": ["--top_k=many"],
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(out_dir, message, capsys):
    run = "out/none" if message == "out/none" else str(out_dir)
    with pytest.raises(SystemExit) as stop:
        main([run, *BAD_LINES[message]])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
