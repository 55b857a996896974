"""A tokenizer, a language model and data that are small, deterministic and need no network; and files of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [f"w{i}" for i in range(180)]
SPECIAL = ["<pad>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
# Of models of any family.
SMALL = {
    "vocab_size": 160,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Every word is a token; so is every character that is in no word."""
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: index for index, token in enumerate(SPECIAL + WORDS + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
    )
    fast.chat_template = chat_template
    return fast


def make_model(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    options = {
        "vocab_size": 288,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # far from uniform, so that every pair has its own loss
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **config}))


def make_text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def make_pairs(count: int, seed: int = 0) -> Dataset:
    """Plain pairs whose prompts and responses all differ in length."""
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {"prompt": make_text(rng, 2, 9) + " ", "chosen": make_text(rng, 1, 12), "rejected": make_text(rng, 1, 12)}
            for _ in range(count)
        ]
    )


def make_responses(count: int, seed: int = 0) -> Dataset:
    """Responses that do not come in pairs: two chosen for each rejected one."""
    rows = make_pairs(count, seed).to_list()
    return Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 != 1} for i, row in enumerate(rows)]
    )


def save_model(directory: Path, model: Any = None) -> Path:
    """Write a model, that of `make_model` unless given, with its tokenizer."""
    (make_model() if model is None else model).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def write_lines(path: Path, *lines: Any) -> Path:
    """A line of JSON for each; strings are lines as they are."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path
