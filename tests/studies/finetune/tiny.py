"""Write a tiny Llama, a tiny GPT-2 and a tokenizer of characters as Hugging Face folders."""

from pathlib import Path

import tokenizers
import torch
import transformers

from studies.finetune.questions import Question, encode

QUESTIONS = [
    Question("2+3", "2+3=5 #### 5"),
    Question("4*2+1", "4*2=8 #### 9"),
    Question("7", "7"),
]
LENGTH = 32  # positions of the models
SIZES = {"vocab_size": 24, "bos_token_id": 0, "eos_token_id": 1}


def tokenizer(pad_token=None):
    """Return a tokenizer of one token per character; it has no padding token by default."""
    letters = ["<s>", "</s>", "?", *"0123456789+-*=# \n"]
    model = tokenizers.models.WordLevel({x: i for i, x in enumerate(letters)}, unk_token="?")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    plain.decoder = tokenizers.decoders.Fuse()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token=pad_token
    )


def gpt2(seed=0):
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": LENGTH, **SIZES}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return _scaled(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout)))


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, **SIZES, max_position_embeddings=LENGTH)
    return _scaled(transformers.LlamaForCausalLM(config))


def _scaled(model):
    """Make the weights large enough for logits that differ between tokens."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model.eval()


MODELS = {"gpt2": gpt2, "llama": llama}


def folder_of(kind: str, folder: Path) -> Path:
    """Write a model with its tokenizer, and return the folder."""
    MODELS[kind]().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def examples():
    return encode(QUESTIONS, tokenizer(), LENGTH)


def logits(model):
    """Return the logits of fixed tokens."""
    ids = torch.randint(24, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids).logits
