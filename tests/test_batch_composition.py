"""At learning rate 0 every log ratio is 0: a response has the same log-probs whatever else is in its batch.

The truth is a copy of the model that sees every sequence alone, for the first time, in fp64.
"""

from __future__ import annotations

import copy
import functools
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_model import make_tokenizer
from tiny_trainer import make_trainer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dil_kernels.models.packed_attention import UnsupportedPackingError
from dil_kernels.models.rotary_lengths import keep_lengths_apart
from dil_kernels.training.generations import _generate
from dil_kernels.training.held_out import score_held_out

RELATIVE = 2e-5  # fp32, of the log-prob of a token: two layers, a few hundred terms a sum
ORIGINAL = 24  # tokens that models with rotary embeddings for longer ones were "pretrained" on
LENGTHS = ((3, 9), (30, 6), (7, 24), (4, 5), (20, 40), (24, 25), (33, 31), (12, 8))  # of the sequences of each pair
BATCHES = ((0, 1), (2,), (1, 4, 6), (3, 5, 7), (0, 3), (5,), (7, 2))  # pairs; no batch is one of the reference
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ORIGINALLY_SHORT = {"max_position_embeddings": ORIGINAL}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama dynamic": {"rope_parameters": DYNAMIC, **ORIGINALLY_SHORT},
    "llama longrope": {"rope_parameters": LONG, **ORIGINALLY_SHORT},
    "phi3 longrope": {"rope_parameters": LONG, "original_max_position_embeddings": ORIGINAL},
    "phimoe longrope": {
        "rope_parameters": {**LONG, "short_mscale": 1.1, "long_mscale": 1.3},
        "original_max_position_embeddings": ORIGINAL,
        **EXPERTS,
    },
    "gemma3_text dynamic": {
        "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DYNAMIC},
        **WINDOW,
        **ORIGINALLY_SHORT,
    },
    "falcon dynamic": {"rope_parameters": DYNAMIC, "alibi": False, **ORIGINALLY_SHORT},
    "falcon": {"alibi": True},
    "bloom": GPT2,
    "cohere": {},
    "deepseek_v3": LATENT,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "glm4": {},
    "gpt2": GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gpt_neox": {},
    "gptj": {**GPT2, "rotary_dim": 4},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.3},
    "llama4_text": {
        "attention_chunk_size": 8,
        "attn_temperature_tuning": False,  # goes by the place in the row: refused when packed
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 48,
        **EXPERTS,
    },
    "mamba": {"state_size": 4},
    "mistral": {"sliding_window": 5},
    "mixtral": EXPERTS,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": {"sliding_window": 5},
}
UNPACKABLE = {
    "bloom": "lets a sequence depend on the one before it",
    "falcon": "lets a sequence depend on the one before it",
    "falcon dynamic": "lets a sequence depend on the one before it",
    "gemma2": "attends with 'eager'",
    "gpt_neo": "",
    "gptj": "attends with 'eager'",
    "mamba": "lets a sequence depend on the one before it",
    "mpt": "",
    "opt": "",
}


def make_family(name: str) -> Any:
    torch.manual_seed(0)
    config = {
        "vocab_size": 288,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        **FAMILIES[name],
    }
    if not name.startswith(("falcon", "gptj", "bloom", "gpt2", "phi", "stablelm", "gpt_neo", "opt", "mpt", "deepseek")):
        config["head_dim"] = 8
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split()[0], **config)).eval()


def make_rows(seed: int = 0) -> datasets.Dataset:
    """Tokenised pairs; their prompts are short."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(2, 160) for _ in range(count)]

    pairs = [{"prompt_ids": ids(2), "chosen_ids": ids(w - 2), "rejected_ids": ids(r - 2)} for w, r in LENGTHS]
    return datasets.Dataset.from_list(pairs).add_column("length", [max(lengths) for lengths in LENGTHS])


def logps_alone(model: nn.Module, prompt: list[int], response: list[int]) -> float:
    """Of a response, from a model that has seen nothing else."""
    model, ids = copy.deepcopy(model).double(), torch.tensor([prompt + response])
    model.set_experts_implementation("eager")  # the others have no fp64
    with torch.no_grad():
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()


@functools.cache
def truth_of(name: str) -> Tensor:
    """Log-probs [pairs, 2] of the responses of `make_rows`."""
    model, sides = make_family(name), ("chosen_ids", "rejected_ids")
    return torch.tensor([[logps_alone(model, row["prompt_ids"], row[side]) for side in sides] for row in make_rows()])


def assert_own_logps(trainer: Any, truth: Tensor, batches: Any = BATCHES) -> None:
    """Rewards of 0, and the log-probs of each sequence alone, in batches of every composition."""
    rows = trainer.train_dataset
    tokens = torch.tensor(LENGTHS).double() - 2
    for batch in batches:
        inputs = trainer._prepare_inputs(trainer.data_collator([rows[index] for index in batch]))
        _, output = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
        for side, name in enumerate(("chosen", "rejected")):
            expected, counts = truth[list(batch), side], tokens[list(batch), side]
            logps, rewards = (getattr(output, f"{name}_{what}").double() for what in ("logps", "rewards"))
            assert ((logps - expected).abs() <= RELATIVE * expected.abs()).all(), f"{batch}: {logps} for {expected}"
            scale = expected.abs() / counts  # of a token
            assert (rewards.abs() <= RELATIVE * scale).all(), f"{batch}: rewards {rewards}"


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_those_of_each_sequence_alone(tmp_path: Path, name: str) -> None:
    truth = truth_of(name)
    assert truth.std() > 1, "log-probs that are all alike prove nothing"
    for padding_free in (False, True):
        options = {
            "model": make_family(name),
            "train_dataset": make_rows(),
            "max_length": None,
            "precompute_ref_log_probs": True,
            "padding_free": padding_free,
        }
        if padding_free and name in UNPACKABLE:
            with pytest.raises(UnsupportedPackingError, match=UNPACKABLE[name]):
                make_trainer(tmp_path, **options)
        else:
            assert_own_logps(make_trainer(tmp_path, **options), truth)


SIDES = ("rewards/chosen", "rewards/rejected")
ADAPTER = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
OPTIONS: dict[str, dict[str, Any]] = {
    "frozen copy": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "precomputed, other batch sizes": {
        "precompute_ref_log_probs": True,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2,
    },
    "precomputed, by length": {"precompute_ref_log_probs": True, "train_sampling_strategy": "group_by_length"},
    "packed": {"padding_free": True},
    "packed, precomputed": {"padding_free": True, "precompute_ref_log_probs": True},
    "of evaluations the loss alone": {"prediction_loss_only": True, "eval_do_concat_batches": False},
    "from logits": {"precompute_ref_log_probs": True, "fused_head": False},
    "checkpointing": {"precompute_ref_log_probs": True, "gradient_checkpointing": True},
    "LoRA": {"peft_config": ADAPTER},
    "LoRA, precomputed": {"peft_config": ADAPTER, "precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["llama dynamic", "phi3 longrope"])
def test_rewards_stay_zero_at_learning_rate_0(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    if "peft_config" in options:
        options = {**options, "peft_config": pytest.importorskip("peft").LoraConfig(**options["peft_config"])}
    truth, counts = truth_of(name), torch.tensor(LENGTHS).double() - 2
    trainer = make_trainer(
        tmp_path,
        model=make_family(name),
        train_dataset=make_rows(),
        eval_dataset=make_rows(),
        max_length=None,
        learning_rate=0.0,
        num_train_epochs=2,
        eval_strategy="epoch",
        **options,
    )
    trainer.train()
    rewards = [value for log in trainer.state.log_history for key, value in log.items() if key.endswith(SIDES)]
    assert len(rewards) >= 8
    assert max(map(abs, rewards)) <= RELATIVE * (truth / counts).abs().max()
    scores = score_held_out(trainer)
    for side, values in enumerate((scores.chosen, scores.rejected)):
        expected = (truth / counts)[:, side].tolist()
        assert sorted(values) == pytest.approx(sorted(expected), rel=RELATIVE)  # the sampler may have moved them


@pytest.mark.parametrize("options", [{}, {"fused_head": False}, {"peft_config": ADAPTER}], ids=["", "logits", "LoRA"])
@pytest.mark.parametrize("name", ["llama dynamic", "phi3 longrope"])
def test_rewards_stay_zero_in_trl(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    pytest.importorskip("trl", reason="needs the extra [trl]")
    from dil_kernels.integrations.trl import DILConfig, DILTrainer

    options, arguments = dict(options), {}
    if "peft_config" in options:
        arguments = {"peft_config": pytest.importorskip("peft").LoraConfig(**options.pop("peft_config"))}
    texts = [[" ".join(f"w{row + n}" for n in range(length - 3)) for length in LENGTHS[row]] for row in range(8)]
    pairs = [{"prompt": "w7 w9 ", "chosen": chosen, "rejected": rejected} for chosen, rejected in texts]
    for precompute in (True, False):
        args = DILConfig(
            str(tmp_path / str(precompute)),
            max_length=None,
            precompute_ref_log_probs=precompute,
            per_device_train_batch_size=2,
            learning_rate=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            **options,
        )
        trainer = DILTrainer(
            make_family(name),
            None if arguments or precompute else make_family(name),
            args,
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=make_tokenizer(),
            **arguments,
        )
        trainer.train()
        rewards = [value for log in trainer.state.log_history for key, value in log.items() if key in SIDES]
        assert len(rewards) == 2 * 4 * 3
        assert max(map(abs, rewards)) <= 10 * RELATIVE, "of some nats a token"


@pytest.mark.parametrize("name", ["llama dynamic", "phi3 longrope"])
def test_an_answer_is_that_to_its_prompt_alone(tmp_path: Path, name: str) -> None:
    """Prompts of other lengths; all but one of the answers cross the original length."""
    rng = random.Random(0)
    prompts = [[rng.randrange(2, 288) for _ in range(length)] for length in (22, 20, 5, 30)]
    rows = [{"prompt_ids": prompt, "chosen_ids": [3], "rejected_ids": [4]} for prompt in prompts]
    trainer = make_trainer(
        tmp_path,
        model=make_family(name),
        train_dataset=make_rows(),
        eval_dataset=datasets.Dataset.from_list(rows),
        max_length=None,
        num_generations_at_eval=4,
        generate_max_new_tokens=10,
        per_device_eval_batch_size=4,
    )
    expected = []
    for prompt in prompts:
        options = {"attention_mask": torch.ones(1, len(prompt)), "do_sample": False, "pad_token_id": 0}
        ids = make_family(name).generate(torch.tensor([prompt]), max_new_tokens=10, **options)
        expected.append(make_tokenizer().decode(ids[0, len(prompt) :], skip_special_tokens=True))
    assert len(set(expected)) == 4
    assert _generate(trainer, prompts) == expected


def logits_alone(model: nn.Module, sequences: list[Tensor]) -> list[Tensor]:
    """Of sequences [1, T], each the first that its copy of the model sees."""
    with torch.no_grad():
        return [copy.deepcopy(model)(input_ids=ids, use_cache=False).logits[0] for ids in sequences]


ROTARY = [name for name in FAMILIES if name.endswith(("dynamic", "longrope"))]


@pytest.mark.parametrize("name", ROTARY)
def test_no_call_depends_on_the_ones_before_it(name: str) -> None:
    """Grown, shrunk, of exactly the original length; right and left padding, packed, a copy."""
    model = make_family(name)
    sequences = [torch.randint(2, 288, (1, length)) for length in (40, ORIGINAL, 30, 6, ORIGINAL, 1)]
    alone = logits_alone(model, sequences)
    assert keep_lengths_apart(model)
    assert keep_lengths_apart(model)  # a second time changes nothing
    model = copy.deepcopy(model)
    with torch.no_grad():
        for ids, expected in zip(sequences, alone, strict=True):
            actual = model(input_ids=ids, use_cache=False).logits[0]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        for left in (False, True):
            padded, mask = torch.zeros(2, len(sequences), 40, dtype=torch.int64).unbind()
            for row, ids in enumerate(sequences):
                start = 40 - ids.shape[1] if left else 0
                padded[row, start : start + ids.shape[1]], mask[row, start : start + ids.shape[1]] = ids[0], 1
            logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
            for row, expected in enumerate(alone):
                actual = logits[row, mask[row] == 1]
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_other_models_and_checkpoints_stay_as_they_were(tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "gemma3_text", "mamba"):
        model = make_family(name)
        assert not keep_lengths_apart(model)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model = make_family("phi3 longrope")
    saved = model.state_dict().keys()
    assert keep_lengths_apart(make_family("llama"), model)
    assert model.state_dict().keys() == saved
    torch.save(model, tmp_path / "model.pt")
    ids = torch.arange(2, 42).unsqueeze(0)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


class Growing(LlamaRotaryEmbedding):
    """Keeps the frequencies of the longest sequence for good, as models with code of their own do."""

    longest = 0

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        self.longest = max(self.longest, int(position_ids.max()))
        cos, sin = super().forward(x, position_ids / (1 + self.longest / ORIGINAL))
        return cos, sin


def test_a_model_that_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    model = make_family("llama")
    model.model.rotary_emb = Growing(model.config)
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM \(Growing\) goes by the longest sequence that it"):
        make_trainer(tmp_path, model=model)
    assert not model.model.rotary_emb._forward_hooks
    with torch.device("meta"):
        unloaded = make_family("llama")
    with pytest.raises(NotImplementedError, match="LlamaRotaryEmbedding is on the meta device"):
        keep_lengths_apart(unloaded)


def test_positions_of_another_shape_are_refused() -> None:
    model = make_family("phi3 longrope")
    keep_lengths_apart(model)
    with pytest.raises(NotImplementedError, match=r"Phi3RotaryEmbedding .* \[rows, tokens\] only; got \[3, 1, 5\]"):
        model.model.rotary_emb(torch.zeros(1, 5, 32), torch.arange(5).expand(3, 1, 5))
