"""The harness's questions, answered by our model: against a direct computation, and end to end."""

import json
import math
import warnings

import pytest
import torch

from data.tokenizer import byte_tokenizer, train_bpe
from eval import harness as adapter
from eval.harness import local_files, main
from eval.run import Run
from eval.scorer import Scorer
from model import GPT, GPTConfig

ATOL = 1e-5  # float32 logits, padded and unpadded: another order of summation; sums of order 10
TEXT = "the cat sat on the mat; the other cat sat on the first cat.\n" * 4
PAIRS = [
    ("the cat", " sat"),
    ("the cat sat on", " the mat; the other"),
    ("", "the"),
    ("ends with spaces  ", "cat"),
    ("the other cat sat on the first cat " * 4, " sat"),  # longer than the context
]
ENDINGS = ["is on the mat.", "sat [title] the cat.", "on the first cat.", "the other"]
ROOF = {"ind": 24, "activity_label": "Roof", "ctx_a": "A man is on a roof.", "ctx_b": "he"}
ROOF |= {"ctx": "A man is on a roof. he", "split": "val", "split_type": "indomain"}
ROOF |= {"endings": ENDINGS, "source_id": "activitynet~v_1"}
STORIES = ["the cat sat on the mat", "the other cat sat", "the first cat sat on the other cat"]


def scorer(tokenizer=None, block_size=32, batch_size=3):
    torch.manual_seed(0)
    tokenizer = tokenizer or train_bpe([TEXT], 277)
    shape = {"block_size": block_size, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that a wrong position shows
    return Scorer(model.eval(), tokenizer, batch_size)


@torch.no_grad()
def direct(scorer, ids, n):
    """log p of the last n of ids and whether each is the likeliest, token by token, unpadded."""
    total, greedy = 0.0, True
    for end in range(len(ids) - n, len(ids)):
        context = ids[:end][-scorer.model.config.block_size :]
        logits = scorer.model(torch.tensor([context]))[0][0, -1].double()
        total += logits.log_softmax(-1)[ids[end]].item()
        greedy &= logits.argmax().item() == ids[end]
    return total, greedy


def memorise(model, text):
    """Train until the text is what greedy decoding yields."""
    ids = torch.tensor([[*text.encode()]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:].contiguous())[1].backward()
        optimizer.step()


# -- likelihoods


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_likelihoods_are_those_of_the_model_whatever_the_batch(batch_size):
    subject = scorer(batch_size=batch_size)
    for pair, (value, greedy) in zip(PAIRS, subject.loglikelihood(PAIRS), strict=True):
        context, continuation = subject.encode_pair(*pair)
        ids = (context + continuation)[-33:]  # block_size inputs and the last target
        wanted = direct(subject, ids, len(continuation))
        assert value == pytest.approx(wanted[0], abs=ATOL)
        assert greedy == wanted[1]


def test_a_greedy_continuation_is_recognised():
    subject = scorer(byte_tokenizer())
    prompt = [*b"the cat"]
    best = subject.model.generate([prompt], 1, greedy=True)[0]
    other = [(best[0] + 1) % 256]
    for ids, wanted in ((best, True), (other, False)):
        assert subject._score([(prompt, ids)])[0][1] is wanted


def test_a_long_context_loses_its_beginning_and_is_counted():
    subject = scorer(byte_tokenizer())
    long, kept = "x" * 40 + "y" * 30, "y" * 30  # 30 + 3 bytes: block_size inputs and a target
    assert subject.loglikelihood([(long, "cat")]) == subject.loglikelihood([(kept, "cat")])
    assert subject.n_truncated == 1


def test_spaces_at_the_end_of_the_context_belong_to_the_continuation():
    subject = scorer()
    encode = subject.tokenizer.encode
    assert subject.encode_pair("the cat ", "sat") == (encode("the cat"), encode(" sat"))
    assert subject.encode_pair("", "sat") == ([subject.tokenizer.eot], encode("sat"))


@pytest.mark.parametrize(("continuation", "message"), [("", "has 0 tokens"), ("x" * 33, "has 33")])
def test_a_continuation_that_cannot_be_scored_is_an_error(continuation, message):
    with pytest.raises(ValueError, match=message):
        scorer(byte_tokenizer()).loglikelihood([("a", continuation)])


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64, 77])
def test_a_rolling_likelihood_predicts_every_token_once(length):
    subject = scorer(byte_tokenizer())
    text = (TEXT * 2)[:length]
    ids, T, total = [subject.tokenizer.eot, *text.encode()], 32, 0.0
    for start in range(1, len(ids), T):
        end = min(start + T, len(ids))
        window = ids[max(0, end - T - 1) : end]  # the last one reaches back for a full context
        total += direct(subject, window, end - start)[0]
    assert subject.loglikelihood_rolling([text, "a"])[0] == pytest.approx(total, abs=1e-4)


# -- generation


def test_generation_is_greedy_by_default_and_cut_before_a_stop_string():
    subject = scorer(byte_tokenizer())
    new = subject.model.generate([[*b"the cat"]], 9, greedy=True)[0]
    text = subject.tokenizer.decode(new)
    whole, cut = subject.generate_until(
        [("the cat", {"max_gen_toks": 9}), ("the cat", {"max_gen_toks": 9, "until": [text[4]]})]
    )
    assert whole == text
    assert cut == text[: text.index(text[4])]


def test_generation_answers_in_the_order_of_the_requests():
    subject = scorer(byte_tokenizer(), batch_size=2)
    requests = [(text, {"max_gen_toks": 3 + row % 2}) for row, text in enumerate("abcdef")]
    alone = [subject.generate_until([request])[0] for request in requests]
    assert subject.generate_until(requests) == alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_gen_toks": 32}, "leave no room"), ({"num_beams": 4}, "'num_beams'.* not supported")],
)
def test_a_generation_setting_that_cannot_be_met_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        scorer(byte_tokenizer()).generate_until([("a", settings)])


# -- local files


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_bad_local_file_is_named_with_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*lambada_test.jsonl"):
        local_files(["lambada_openai"], tmp_path)
    write(tmp_path, "lambada_test.jsonl", [{"text": "a b"}, {"words": "a b"}])
    with pytest.raises(ValueError, match=r"lambada_test.jsonl:2: wanted an object with text"):
        local_files(["lambada_openai"], tmp_path)
    write(tmp_path, "hellaswag_val.jsonl", [ROOF | {"label": 4}])
    with pytest.raises(ValueError, match=r"hellaswag_val.jsonl:1: label=4"):
        local_files(["hellaswag"], tmp_path)
    with pytest.raises(ValueError, match=r"--data serves .*, not piqa"):
        local_files(["piqa"], tmp_path)


# -- the command


@pytest.mark.parametrize(
    ("line", "message"),
    [(["--limit=0"], "--limit=0: must be at least 1"), ([], "no checkpoint at")],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path, line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "none"), *line])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_without_the_harness_the_remedy_is_named(monkeypatch):
    def missing(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(adapter.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"No module named 'lm_eval'.*pip install '\.\[eval\]'"):
        adapter.harness()


def test_without_a_network_and_data_it_fails_at_once(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody answers
    with pytest.raises(ValueError, match=r"127.0.0.1:9 does not answer: put hellaswag_val.jsonl"):
        adapter.hub_manager(["hellaswag"])


# -- the harness itself


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """The harness, its own warnings ignored, caching below tmp_path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra: eval)")
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setenv("DISABLE_MULTIPROC", "1")
        yield module


def evaluate(subject, folder, tasks, **limits):
    run = Run(folder, 12, subject.model, subject.tokenizer, {}, {})
    return adapter.evaluate(run, tasks, data=folder, **limits)


def test_pairs_are_cut_as_the_harness_cuts_them(harness):
    subject = scorer()
    from lm_eval.api.model import TemplateLM

    class Theirs:
        backend = "causal"
        tok_encode = staticmethod(subject.tokenizer.encode)

    for pair in PAIRS:
        if pair[0]:  # an empty context is its caller's business
            assert subject.encode_pair(*pair) == TemplateLM._encode_pair(Theirs(), *pair)


@pytest.mark.parametrize("as_label", [int, str])  # the authors' file, and the hub's
def test_hellaswag_from_a_file_has_the_accuracy_computed_by_hand(harness, tmp_path, as_label):
    subject = scorer(byte_tokenizer(), block_size=64)
    endings = [" is on the mat.", " sat.  the cat.", " on the first cat.", " the other"]
    context = [*b"Roof: A man is on a roof. He"]  # as the harness writes it
    values = [direct(subject, [*context, *end.encode()], len(end))[0] for end in endings]
    labels = [0, 1, 2, 3, 0]
    write(tmp_path, "hellaswag_val.jsonl", [ROOF | {"label": as_label(i)} for i in labels])
    found = evaluate(subject, tmp_path, ["hellaswag"])["results"]["hellaswag"]
    assert found["n"] == 5
    assert found["acc"] == labels.count(values.index(max(values))) / 5
    means = [value / (len(end) - 1) for value, end in zip(values, endings, strict=True)]
    assert found["acc_norm"] == labels.count(means.index(max(means))) / 5


def test_lambada_from_a_file_has_the_numbers_computed_by_hand(harness, tmp_path):
    subject = scorer(byte_tokenizer(), block_size=64)
    memorise(subject.model, STORIES[0])
    write(tmp_path, "lambada_test.jsonl", [{"text": text} for text in STORIES])
    lengths = [len(text) - text.rindex(" ") for text in STORIES]  # of the last word and its space
    scores = [direct(subject, [*t.encode()], n) for t, n in zip(STORIES, lengths, strict=True)]
    found = evaluate(subject, tmp_path, ["lambada_openai"])["results"]["lambada_openai"]
    mean = sum(value for value, _ in scores) / 3
    assert found["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)  # float32 logits
    right = [greedy for _, greedy in scores]
    assert right[0]
    assert not all(right)
    assert found["acc"] == sum(right) / 3


def test_the_record_says_what_was_read_and_how_much(harness, tmp_path):
    write(tmp_path, "lambada_test.jsonl", [{"text": text} for text in STORIES])
    record = evaluate(
        scorer(byte_tokenizer(), block_size=16), tmp_path, ["lambada_openai"], limit=2
    )
    assert record["results"]["lambada_openai"]["n"] == record["limit"] == 2
    assert record["n_truncated"] == 1  # of 22 and 17 bytes, 17 = block_size + 1 fit
    assert record["data"].keys() == {"lambada_test.jsonl"}
