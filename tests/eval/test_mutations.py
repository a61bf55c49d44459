"""Mutate the JSON files that eval/ reads: each is refused by its name or read as it says."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data.tokenizer import byte_tokenizer
from eval.harness import LOCAL, read_rows
from eval.hf import export_hf
from eval.hf_import import HFConfig, load_hf
from eval.rollout.record import read_record
from eval.rollout.ttf import line
from eval.summary import summarize, table
from tests.tiny_gpt import gpt

EXAMPLES = pytest.mark.parametrize("n", [60, pytest.param(1450, marks=pytest.mark.slow)])
NUMBERS = st.sampled_from([0, -1, 1.0, 2**31, 2**63, 10**400, 1e308, 0.5])
OTHERS = st.sampled_from([None, True, False, "", "4", "\x00", "é", [], [[]], {}, {"": None}])
DEEP = '{"a":' * 100_000 + "0" + "}" * 100_000


def places(content):
    """Yield (container, key) of every value in nested JSON."""
    keys = content if isinstance(content, dict) else range(len(content))
    for key in keys:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from places(content[key])


def mutated(draw, content):
    """Return the text of `content` after one change of its values, its keys or its bytes."""
    content = copy.deepcopy(content)
    kind = draw(st.sampled_from(["value", "delete", "rename", "copy", "twice", "bytes", "deep"]))
    container, key = draw(st.sampled_from([*places(content)]))
    if kind == "value":
        container[key] = draw(NUMBERS | OTHERS)
    elif kind == "delete":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[key + "x"] = container.pop(key)
    elif kind == "copy":
        container[key] = copy.deepcopy(draw(st.sampled_from([*places(content)])))
        container[key] = container[key][0][container[key][1]]
    text = json.dumps(content).encode()
    if kind == "twice":
        return text[:-1] + b", " + text[1:]
    if kind == "bytes":
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        return text[:start] + draw(st.binary(max_size=4)) + text[min(end, start + 4) :]
    return DEEP.encode() if kind == "deep" else text


def check(name, read, use=lambda result: None):
    """Read a file that was mutated; the only error is a ValueError of one line that names it."""
    message = None
    try:
        result = read()
    except ValueError as error:
        message = str(error)
    if message is None:
        use(result)
    else:
        assert name in message
        assert "\n" not in message


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A Hugging Face folder whose weights are in two shards."""
    folder = tmp_path_factory.mktemp("hf")
    export_hf(gpt(vocab_size=257, n_layer=1, n_embd=8), byte_tokenizer(), folder)
    weights = load_file(folder / "model.safetensors")
    for i in range(2):
        save_file({key: weights[key] for key in [*weights][i::2]}, folder / f"{i}.safetensors")
    shards = {key: f"{i % 2}.safetensors" for i, key in enumerate(weights)}
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@EXAMPLES
def test_a_hugging_face_folder(hf, name, n):
    path = hf / name
    original, expected = path.read_bytes(), load_hf(hf)

    def use(model):  # n_head is free: no weight shows it
        stated = json.loads((hf / "config.json").read_text(encoding="utf-8"))
        assert model.config == HFConfig(**stated).to_gpt()
        for key, tensor in model.state_dict().items():
            assert tensor.equal(expected.state_dict()[key])

    @settings(max_examples=n)
    @given(st.data())
    def run(data):
        path.write_bytes(mutated(data.draw, json.loads(original)))
        check(str(hf), lambda: load_hf(hf), use)

    try:
        run()
    finally:
        path.write_bytes(original)


ENDINGS = ["sat on the mat", "a", "b", "c"]
HELLASWAG = {"activity_label": "A", "ctx_a": "a", "ctx_b": "", "endings": ENDINGS, "label": 3}
ROWS = {"hellaswag": HELLASWAG | {"ind": 1}, "lambada_openai": {"text": "a b c", "more": [1]}}


@pytest.mark.parametrize("task", ROWS)
@EXAMPLES
def test_a_row_of_a_data_set(tmp_path, task, n):
    path, schema = tmp_path / "rows.jsonl", LOCAL[task]

    def use(rows):
        assert all(row.keys() == schema.model_fields.keys() for row in rows)
        if task == "hellaswag":
            assert all(len(row["endings"]) == 4 and "".join(row["endings"]) for row in rows)
            assert all(int(row["label"]) in range(4) for row in rows)
        else:
            assert all(len(row["text"].split()) > 1 for row in rows)

    @settings(max_examples=n)
    @given(st.data())
    def run(data):
        path.write_bytes(mutated(data.draw, ROWS[task]) + b"\n")
        check(path.name, lambda: read_rows(path, schema), use)

    run()


ESTIMATE = {"mean": 0.5, "lo": 0.25, "hi": None, "n": 8}
RECORD = {"task": "pdfa", "primary": "gap", "higher_is_better": False, "variant": "adamw"}
RECORD |= {"steps": 4, "val_loss": 1.5, "settings": {"out_dir": "x"}, "grading": {"n": 8}}
RECORD |= {"grade": {"metrics": {"gap": ESTIMATE, "C": ESTIMATE}, "curves": {}}, "seed": 0}


@EXAMPLES
def test_a_record(tmp_path, n):
    path = tmp_path / "step-00000004.json"

    @settings(max_examples=n)
    @given(st.data())
    def run(data):
        path.write_bytes(mutated(data.draw, RECORD))
        check(path.name, lambda: read_record(path), line)

    run()


CONFIG = {"optimizer": "muon", "dopr": True, "muon_scale": "match_rms", "lr": 0.1}
VAL = {"kind": "val", "step": 3, "loss": 1.5, "bits_per_byte": None}
TRAIN = {"kind": "train", "step": 3, "loss": 1.5, "tokens_per_s": 10.0}


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
@EXAMPLES
def test_the_files_of_a_run(tmp_path, name, n):
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in (VAL, TRAIN))
    files = {"config.json": json.dumps(CONFIG).encode(), "metrics.jsonl": rows}
    for each, content in files.items():
        (tmp_path / each).write_bytes(content)
    original = CONFIG if name == "config.json" else VAL

    @settings(max_examples=n)
    @given(st.data())
    def run(data):
        more = b"\n" + rows if name == "metrics.jsonl" else b""
        (tmp_path / name).write_bytes(mutated(data.draw, original) + more)
        check(str(tmp_path), lambda: table([summarize(tmp_path)]))

    run()
