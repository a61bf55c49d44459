"""Compare log-likelihoods and continuations of texts with direct computation."""

import pytest
import torch

from data.tokenizer import byte_tokenizer, train_bpe
from eval.generate import generate
from eval.scorer import Scorer
from model import GPT, GPTConfig

ATOL = 1e-5  # float32 sums of order 10; padding changes the order of summation
TEXT = "the cat sat on the mat; the other cat sat on the first cat.\n" * 4
PAIRS = [
    ("the cat", " sat"),
    ("the cat sat on", " the mat; the other"),
    ("", "the"),
    ("ends with spaces  ", "cat"),
    ("the other cat sat on the first cat " * 4, " sat"),  # longer than the context
]


def scorer(tokenizer=None, block_size=32, batch_size=3):
    torch.manual_seed(0)
    tokenizer = tokenizer or train_bpe([TEXT], 277)
    shape = {"block_size": block_size, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that a wrong position is noticed
    return Scorer(model.eval(), tokenizer, batch_size)


@torch.no_grad()
def direct(scorer, ids, n):
    """Compute log p of the last n ids and whether each is the likeliest, one token at a time."""
    total, greedy = 0.0, True
    for end in range(len(ids) - n, len(ids)):
        context = ids[:end][-scorer.model.config.block_size :]
        logits = scorer.model(torch.tensor([context]))[0][0, -1].double()
        total += logits.log_softmax(-1)[ids[end]].item()
        greedy &= logits.argmax().item() == ids[end]
    return total, greedy


# -- likelihoods


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_likelihoods_are_those_of_the_model_whatever_the_batch(batch_size):
    subject = scorer(batch_size=batch_size)
    for pair, (value, greedy) in zip(PAIRS, subject.loglikelihood(PAIRS), strict=True):
        context, continuation = subject.encode_pair(*pair)
        ids = (context + continuation)[-33:]  # block_size inputs and the last target
        expected = direct(subject, ids, len(continuation))
        assert value == pytest.approx(expected[0], abs=ATOL)
        assert greedy == expected[1]


def test_a_greedy_continuation_is_recognised():
    subject = scorer(byte_tokenizer())
    prompt = [*b"the cat"]
    best = generate(subject.model, [prompt], 1, greedy=True)[0]
    other = [(best[0] + 1) % 256]
    for ids, expected in ((best, True), (other, False)):
        assert subject._score([(prompt, ids)])[0][1] is expected


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
        window = ids[max(0, end - T - 1) : end]  # the last window has a full context, too
        total += direct(subject, window, end - start)[0]
    assert subject.loglikelihood_rolling([text, "a"])[0] == pytest.approx(total, abs=1e-4)


# -- generation


def test_generation_is_greedy_by_default_and_cut_before_a_stop_string():
    subject = scorer(byte_tokenizer())
    new = generate(subject.model, [[*b"the cat"]], 9, greedy=True)[0]
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
