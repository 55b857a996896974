"""What the providers of the family `train` are given: a model, its reference, a batch of pairs and an optimizer."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dil_kernels.data.batches import IGNORE_INDEX
from dil_kernels.data.collators import PreferenceCollator
from harness.family import DTYPE_NAMES
from harness.machine import REPOSITORY

BETA = 0.1
DATA_VARIABLE = "DIL_PREFERENCE_DATA"  # names a file of pairs; without it, those of the package are taken
SMOLLM2 = REPOSITORY / "runs" / "smollm2"
NOISE = 0.02  # of the policy's weights beside the reference's, in their standard deviations
PROBED_DIMENSIONS = 1  # gradients are compared of the norms, through which all others pass, and of the head

ModelName = Literal["smollm2-135m", "llama-1b", "tiny"]
# real: pairs of text, the first that are no longer than `tokens`. equal: random ids, all sequences of `tokens`, half of
# it prompt. ragged: random ids, sequences between an eighth of `tokens` and all of it.
# summary: random ids, nine tenths of all sequences prompt. prompt-512: random ids, all sequences of `tokens`, of which
# so many are prompt.
DataName = Literal["real", "equal", "ragged", "summary", "prompt-17", "prompt-512", "prompt-2048"]
ReferenceName = Literal["model", "precomputed"]


@dataclass(frozen=True)
class TrainCase:
    """One optimizer step on one batch of pairs.

    Attributes:
        model: which; see `make_model`.
        data: which pairs; see `DataName`.
        pairs: B.
        tokens: of the longest sequence, prompt included.
        reference: "model" runs a frozen second model in every step, "precomputed" takes its log-probs as given.
        dtype: of the weights and of all computation.
    """

    model: ModelName
    data: DataName
    pairs: int
    tokens: int
    reference: ReferenceName
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """By which the case is chosen on the command line."""
        sizes = f"{self.data}-{self.pairs}x{self.tokens}"
        return f"{self.model}-{sizes}-{self.reference}-{DTYPE_NAMES[self.dtype]}"

    @property
    def title(self) -> str:
        """For people."""
        reference = "a reference model" if self.reference == "model" else "precomputed references"
        return (
            f"{self.model}, {DTYPE_NAMES[self.dtype]}, {self.pairs} {self.data} pairs of at most {self.tokens} tokens, "
            f"{reference}"
        )

    @property
    def columns(self) -> dict[str, int | str]:
        """For the CSV; counts of tokens are without padding, both responses of a pair with their prompts."""
        lengths = [len(prompt) + len(response) for prompt, response in self.sequences]
        return {
            "model": self.model,
            "data": self.data,
            "pairs": self.pairs,
            "longest": max(lengths),
            "reference": self.reference,
            "dtype": DTYPE_NAMES[self.dtype],
            "tokens": sum(lengths),
            "padded_tokens": max(lengths) * len(lengths),
            "scored_tokens": sum(len(response) for _, response in self.sequences),
        }

    @property
    def rotated_bytes(self) -> int:
        """Of the weights, all of which a step reads."""
        return self.config_sizes["parameters"] * self.dtype.itemsize

    @cached_property
    def examples(self) -> list[dict[str, Any]]:
        """prompt_ids, chosen_ids and rejected_ids of every pair."""
        return _real_pairs(self) if self.data == "real" else _random_pairs(self)

    @property
    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and response, the chosen ones and then the rejected."""
        return [(e["prompt_ids"], e[side]) for side in ("chosen_ids", "rejected_ids") for e in self.examples]

    @cached_property
    def config_sizes(self) -> dict[str, int]:
        """Of the model: parameters, those outside the embedding, vocab, width of all heads together, layers."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(make_config(self.model))
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return {
            "parameters": model.num_parameters(),
            "body": model.num_parameters() - model.get_input_embeddings().weight.numel(),
            "head": config.vocab_size * config.hidden_size,
            "attention": config.num_hidden_layers * config.num_attention_heads * head_dim,
        }


def make_config(name: ModelName) -> Any:
    """Of a model by its name; "llama-1b" has the shape of Llama-3.2-1B, "tiny" is for tests."""
    from transformers import AutoConfig, LlamaConfig

    if name == "smollm2-135m":
        return AutoConfig.from_pretrained(_prepared_smollm2())
    sizes = {
        "llama-1b": (128256, 2048, 8192, 16, 32, 8, 64),
        "tiny": (288, 32, 48, 2, 4, 2, 8),
    }[name]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim")
    options = {"tie_word_embeddings": True, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1}
    # In 16 layers of 0.05, rounding to bf16 is three times the gradient, and no check could tell it from a fault.
    return LlamaConfig(
        **dict(zip(names, sizes, strict=True)), **options, initializer_range=0.05 if name == "tiny" else 0.02
    )


def _prepared_smollm2() -> Any:
    from dil_kernels.quickstart.smollm2 import prepare

    return prepare(SMOLLM2)


def _make_model(case: TrainCase, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    if case.model == "smollm2-135m":
        return AutoModelForCausalLM.from_pretrained(_prepared_smollm2(), dtype=case.dtype).to(device)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(make_config(case.model), dtype=case.dtype)


def make_tokenizer(name: ModelName) -> Any:
    """SmolLM2's; else one that knows two words, since trainers want one and are given token ids."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name == "smollm2-135m":
        return AutoTokenizer.from_pretrained(_prepared_smollm2())
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "yes": 2, "no": 3}, unk_token="yes"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<s>", eos_token="</s>")


def _real_pairs(case: TrainCase) -> list[dict[str, Any]]:
    from dil_kernels.data import check_pair, load_preference_pairs
    from dil_kernels.data.tokenization import tokenize_pair
    from dil_kernels.quickstart.embedded import load_embedded_pairs

    path = os.environ.get(DATA_VARIABLE)
    pairs = load_embedded_pairs("train") if path is None else load_preference_pairs(path)
    tokenizer, examples = make_tokenizer(case.model), []
    for number, pair in enumerate(pairs, start=1):
        prompt, chosen, rejected = tokenize_pair(check_pair(pair, f"row {number}"), tokenizer, f"row {number}")
        if len(prompt) + max(len(chosen), len(rejected)) <= case.tokens:
            examples.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        if len(examples) == case.pairs:
            return examples
    raise ValueError(f"{case.name}: only {len(examples)} pairs are no longer than {case.tokens} tokens")


def _random_pairs(case: TrainCase) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    vocab = case.config_sizes["head"] // make_config(case.model).hidden_size

    def draw(count: int) -> list[int]:
        return torch.randint(2, vocab, (count,), generator=generator).tolist()

    examples = []
    for index in range(case.pairs):
        if case.data == "equal":
            prompt, chosen, rejected = (case.tokens // 2,) * 3
        elif case.data == "summary":
            response = case.tokens // 10
            prompt, chosen, rejected = case.tokens - response, response, response
        elif case.data.startswith("prompt-"):
            prompt = int(case.data.removeprefix("prompt-"))
            chosen = rejected = case.tokens - prompt
        else:
            # The first pair has the longest sequence, so that it is `tokens` whatever is drawn.
            longest = case.tokens if index == 0 else int(case.tokens * 8 ** -torch.rand((), generator=generator).item())
            prompt, chosen, rejected = longest // 4, longest - longest // 4, max(longest // 3, 1)
        examples.append({"prompt_ids": draw(prompt), "chosen_ids": draw(chosen), "rejected_ids": draw(rejected)})
    return examples


@dataclass(eq=False)
class Inputs:
    """What a step is taken on.

    All providers share the parameters, their gradients and the optimizer, and each has modules of its own around them
    (`own_model`), since trainers change these. The learning rate is 0: every call does all the work of a step and finds
    the weights as they were.
    """

    case: TrainCase
    model: nn.Module
    reference: nn.Module
    optimizer: torch.optim.Optimizer
    examples: Sequence[dict[str, Any]]  # with ref_chosen_logps and ref_rejected_logps, where these are precomputed
    tokenizer: Any
    device: torch.device
    sessions: dict[object, Callable[[], Tensor]] = field(default_factory=dict)  # the trainers, by provider

    def own_model(self) -> nn.Module:
        """New modules around the policy's parameters."""
        return _around_the_same_parameters(self.model)

    def own_reference(self) -> nn.Module | None:
        """Likewise of the reference; None where its log-probs are precomputed."""
        return _around_the_same_parameters(self.reference) if self.case.reference == "model" else None

    def padded_batch(self) -> dict[str, Any]:
        """input_ids, attention_mask and labels [2B, T] on the device, and what else the examples have."""
        batch = PreferenceCollator(self.tokenizer.pad_token_id)(self.examples)
        return {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in batch.items()}

    @property
    def probed(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are checked."""
        head = self.model.get_output_embeddings().weight
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.ndim == PROBED_DIMENSIONS or parameter is head
        }


def _around_the_same_parameters(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def make_inputs(case: TrainCase, device: torch.device) -> Inputs:
    """A reference as it was loaded or drawn, a policy near it, and an AdamW whose state exists already."""
    reference = _make_model(case, device).eval().requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True).train()
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.empty_like(parameter, dtype=torch.float32).normal_(generator=generator)
            parameter += (NOISE * parameter.float().std(correction=0) * noise).to(parameter.dtype)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    examples: list[dict[str, Any]] = [dict(example) for example in case.examples]
    if case.reference == "precomputed":
        sums = [sum_logps(reference, *sequence, device).item() for sequence in case.sequences]
        for index, example in enumerate(examples):
            example["ref_chosen_logps"], example["ref_rejected_logps"] = sums[index], sums[case.pairs + index]
    return Inputs(case, policy, reference, optimizer, examples, make_tokenizer(case.model), device)


def sum_logps(model: nn.Module, prompt: list[int], response: list[int], device: torch.device) -> Tensor:
    """Log-prob [] of a response after its prompt, by the eager reference of the package; the sequence runs alone."""
    from dil_kernels import reference

    ids = torch.tensor([prompt + response], device=device)
    labels = ids.clone()
    labels[:, : len(prompt)] = IGNORE_INDEX
    with torch.set_grad_enabled(next(model.parameters()).requires_grad):
        logps = reference.token_logps(model(input_ids=ids, use_cache=False).logits, labels)
    return logps.double().sum()
