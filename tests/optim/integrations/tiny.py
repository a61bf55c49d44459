"""Tiny language models and fixed data, without downloads."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
VOCABULARY, LENGTH, PAD = 32, 12, -100


def gpt2(**changes):
    """Return a GPT-2 of one layer with fixed weights; its linear layers are Conv1D."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": VOCABULARY}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes | tokens | changes)
    return transformers.GPT2LMHeadModel(config)


def examples(n: int = 32, *, padded: bool = False) -> list[dict[str, torch.Tensor]]:
    """Return n sequences of tokens; if padded, half of their labels are -100."""
    tokens = torch.randint(1, VOCABULARY, (n, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    if padded:
        labels[:, LENGTH // 2 :] = PAD
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def tokenizer():
    """Return a tokenizer of nine words."""
    words = ["<eos>", *"abcdefgh"]
    model = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="<eos>"
    )
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>", unk_token="<eos>"
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different
