"""Small models with random weights and a tokenizer of their own, made on the spot: no download. Needs transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
VISIBLE = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
"""About 150 M parameters: a prefill that takes seconds on a CPU."""


def make_model(folder: Path, family: str = "llama", size: dict[str, int] | None = None, seed: int = 11) -> Path:
    """A model folder an engine can serve, as float32. `family`: llama, qwen3 or gemma3 (sliding and full layers in
    turns). Weights are wide enough that the prompt decides what comes next."""
    import torch
    import transformers

    torch.manual_seed(seed)
    shape: dict[str, Any] = dict(size or TINY)
    if family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=False))
    elif family == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, tie_word_embeddings=False))
    else:
        kinds = ["sliding_attention", "full_attention"] * 2
        shape["num_hidden_layers"] = len(kinds)
        config = transformers.Gemma3TextConfig(**shape, sliding_window=128, layer_types=kinds)
        model = transformers.Gemma3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08 if shape["hidden_size"] < 512 else 0.03)
    model.to(torch.float32).save_pretrained(folder)
    _tokenizer(shape["vocab_size"]).save_pretrained(folder)
    return folder


def _tokenizer(vocabulary: int) -> Any:
    """A word per id: "w17" is token 17."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words.update({f"w{number}": number for number in range(3, vocabulary)})
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def prompt(length: int, seed: int, vocabulary: int = 512) -> list[int]:
    """Token ids, the same for the same seed."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, vocabulary, length)]
