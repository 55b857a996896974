"""What the examples share: options, a model, preference pairs."""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dil_kernels.data import PreferenceCollator, tokenize_dataset
from dil_kernels.quickstart.embedded import load_embedded_pairs

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def parse_options(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="a model with a chat template; a tiny random one if not given")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument(
        "--learning-rate", type=float, default=3e-3, help="1e-6 suits a model of billions of parameters"
    )
    return parser.parse_args(sys.argv[1:] if argv is None else argv)


def load_model(name: str | None) -> tuple[Any, Any]:
    """A model and its tokenizer; without a name, two random layers and a byte-pair tokenizer of the embedded pairs."""
    torch.manual_seed(0)
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = (pair[side][0]["content"] for pair in load_embedded_pairs("train") for side in ("prompt", "chosen"))
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=fast.pad_token_id,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), fast


def tokenized_pairs(tokenizer: Any) -> Dataset:
    """The embedded training pairs as prompt_ids, chosen_ids and rejected_ids."""
    pairs = load_embedded_pairs("train")
    return tokenize_dataset(pairs, tokenizer, max_length=256, max_prompt_length=128, truncation_mode="keep_end")


def batches(dataset: Dataset, tokenizer: Any, batch_size: int, steps: int) -> Any:
    """`steps` batches: B chosen sequences, then B rejected ones, with labels of -100 on prompt and padding."""
    torch.manual_seed(0)
    collate = PreferenceCollator(tokenizer.pad_token_id)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps)
