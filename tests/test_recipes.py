"""Every recipe of the package: what it says, and all that it leads to but the weights."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from tiny_model import make_model, make_pairs, make_tokenizer, save_model, write_lines
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Trainer, get_scheduler

from dil_kernels.cli import programs
from dil_kernels.cli.arguments import RunOptions, parse_arguments
from dil_kernels.data import load_preference_pairs
from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.data.tokenization import tokenize_dataset
from dil_kernels.functional import linear_memory_bytes
from dil_kernels.models.fused_head import fused_head_problem, install_fused_head
from dil_kernels.recipes import packaged_recipes
from dil_kernels.training.config import DILConfig

TRAIN_PREFS = 61_135  # rows of HuggingFaceH4/ultrafeedback_binarized, split train_prefs
# The configurations of the two models, as published.
MISTRAL_7B = MistralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    sliding_window=4096,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
PAPER = {
    "mistral-7b-base-dil": (MISTRAL_7B, 7_241_732_096, "alignment-handbook/zephyr-7b-sft-full", 1024, 512, 3e-7, 4),
    "llama-3-8b-base-dil": (LLAMA_3_8B, 8_030_261_248, "princeton-nlp/Llama-3-Base-8B-SFT", 2048, 1800, 6e-7, 4),
    "mistral-7b-base-dil-lora": (
        MISTRAL_7B,
        7_241_732_096,
        "alignment-handbook/zephyr-7b-sft-full",
        1024,
        512,
        5e-6,
        1,
    ),
}
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def parsed(name: str, *more: str) -> tuple[RunOptions, DILConfig]:
    return parse_arguments(["--config", name, "--use-cpu", *more])  # bf16 asks for a GPU otherwise


def meta_model(config: PreTrainedConfig) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", PAPER)
def test_the_recipe_states_the_set_up_of_the_paper(name: str) -> None:
    _, _, model, max_length, max_prompt_length, learning_rate, processes = PAPER[name]
    options, config = parsed(name)
    assert (options.model, options.train_split, options.eval_split) == (model, "train_prefs", "test_prefs")
    assert options.train_file == options.eval_file == "HuggingFaceH4/ultrafeedback_binarized"
    assert options.attn_implementation == "flash_attention_2"
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    assert batch == 128
    expected = {
        "loss_type": "lsif",
        "alpha": 0.0,
        "average_log_prob": True,
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "truncation_mode": "keep_end",
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "num_train_epochs": 1,
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "seed": 42,
        "bf16": True,
        "activation_checkpointing": True,
        "disable_dropout": True,
        "precompute_ref_log_probs": True,
    }
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize("name", PAPER)
def test_all_but_the_weights_is_built(name: str) -> None:
    model_config, parameters, *_, processes = PAPER[name]
    options, config = parsed(name)
    model = meta_model(model_config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert fused_head_problem(model) is None
    trained = programs._with_lora(model, options, config)
    fused = install_fused_head(trained)
    assert (fused.logit_scale, fused.final_logit_softcapping) == (1.0, None)
    adapters = 7 * 32 * 2 if options.lora_rank else 0
    trainable = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    assert len(trainable) == (adapters or len(list(model.parameters())))

    optimizer_class, keywords = Trainer.get_optimizer_cls_and_kwargs(config, trained)
    optimizer = optimizer_class(trainable, **keywords)
    assert type(optimizer) is torch.optim.AdamW
    micro_batches = math.ceil(TRAIN_PREFS / (config.per_device_train_batch_size * processes))
    steps = math.ceil(micro_batches / config.gradient_accumulation_steps)
    assert steps == math.ceil(TRAIN_PREFS / 128) == 478
    warmup = config.get_warmup_steps(steps)
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, warmup, steps)
    rates = [scheduler.lr_lambdas[0](step) for step in range(steps + 1)]
    assert warmup == rates.index(1.0) == 48
    assert rates[0] == rates[steps] == pytest.approx(0.0, abs=1e-12)

    # A micro-batch at its longest: what the fused head takes beside the logits that it does not make.
    vocab_size, hidden_size = model_config.vocab_size, model_config.hidden_size
    tokens = 2 * config.per_device_train_batch_size * (config.max_length - 1)
    head = linear_memory_bytes(tokens, hidden_size, vocab_size, torch.bfloat16, lm_head_weight_grad=not adapters)
    logits = tokens * vocab_size * 4
    print(f"{name}: head {head / 2**30:.2f} GiB for {tokens} tokens, fp32 logits {logits / 2**30:.2f} GiB")
    assert head < logits


@pytest.mark.parametrize("name", PAPER)
def test_rows_of_ultrafeedback_are_tokenised(name: str, tmp_path: Path) -> None:
    def conversation(prompt: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    _, config = parsed(name)
    rows = []
    for index, pair in enumerate(make_pairs(4)):
        prompt = pair["prompt"] * (600 if index == 2 else 1)  # truncated
        chosen, rejected = (conversation(prompt, pair[side]) for side in ("chosen", "rejected"))
        scores = {"score_chosen": 8.0, "score_rejected": 3.5}
        rows.append(
            {"prompt": prompt, "prompt_id": "f0", "chosen": chosen, "rejected": rejected, "messages": chosen, **scores}
        )
    path = tmp_path / "train_prefs.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    tokenizer = make_tokenizer(ZEPHYR_TEMPLATE)
    tokenized = tokenize_dataset(
        load_preference_pairs(path),
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation_mode=config.truncation_mode,
    )
    assert tokenizer.decode(tokenized[0]["prompt_ids"]).startswith("<|user|>")
    assert tokenizer.decode(tokenized[0]["chosen_ids"]) == f"{rows[0]['chosen'][1]['content']} </s>"
    cut = tokenized[2]["prompt_ids"]
    assert len(cut) == config.max_prompt_length
    assert tokenizer.decode(cut).endswith("</s> <|assistant|>")  # keep_end
    batch = PreferenceCollator(tokenizer.pad_token_id)(tokenized.to_list())
    assert batch["input_ids"].shape[0] == 8


def test_the_small_recipe_runs(tmp_path: Path, capsys) -> None:
    save_model(tmp_path / "model")
    pairs = write_lines(tmp_path / "pairs.jsonl", *make_pairs(12))
    files = ["--train-file", str(pairs), "--eval-file", str(pairs), "--output-dir", str(tmp_path / "out")]
    model = ["--model", str(tmp_path / "model"), "--learning-rate", "1e-3"]
    assert programs.main(["--config", "smollm2-135m-dil", *model, *files, "--use-cpu", "--disable-tqdm"]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert "12 held-out pairs" in capsys.readouterr().out


def test_lora_from_the_command_line(tmp_path: Path, capsys) -> None:
    save_model(tmp_path / "model", make_model(tie_word_embeddings=False))
    pairs = write_lines(tmp_path / "pairs.jsonl", *make_pairs(4))
    argv = ["--config", "smollm2-135m-dil", "--model", str(tmp_path / "model"), "--train-file", str(pairs)]
    argv += ["--output-dir", str(tmp_path / "out"), "--use-cpu", "--disable-tqdm"]
    assert programs.main([*argv, "--lora-rank", "3", "--lora-target-modules", "q_proj", "up_proj"]) == 0
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (3, 6)
    assert set(adapter["target_modules"]) == {"q_proj", "up_proj"}
    capsys.readouterr()
    argv[argv.index("--output-dir") + 1] = str(tmp_path / "other")
    assert programs.main([*argv, "--lora-rank", "3", "--lora-target-modules", "query"]) == 2
    assert "--lora-rank 3: Target modules {'query'} not found" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        programs.main([*argv, "--lora-alpha", "16"])
    assert "--lora-alpha: needs --lora-rank" in capsys.readouterr().err


def test_flash_attention_that_is_not_installed_is_one_line(tmp_path: Path, capsys) -> None:
    save_model(tmp_path / "model")
    pairs = write_lines(tmp_path / "pairs.jsonl", *make_pairs(1))
    argv = ["--config", "mistral-7b-base-dil", "--model", str(tmp_path / "model"), "--train-file", str(pairs)]
    argv += ["--train-split", "train", "--eval-file", str(pairs), "--eval-split", "train", "--use-cpu"]
    assert programs.main([*argv, "--output-dir", str(tmp_path / "out")]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"^dil-train: error: model .* FlashAttention2 .*--attn-implementation sdpa needs no further", line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_recipe_says_whose_choices_it_makes(name: str) -> None:
    text = packaged_recipes()[name].read_text()
    assert f"--config {name}" in text
    assert yaml.safe_load(text)["output_dir"] == f"runs/{name}"
    assert "ours" in text
    assert name in (Path(programs.__file__).parents[1] / "recipes" / "README.md").read_text()
    if name in PAPER and "lora" not in name:
        assert {"[paper]", "[authors]", "[ours]"} <= set(re.findall(r"\[\w+\]", text))


def test_either_name_of_a_renamed_option_serves(tmp_path: Path, recwarn) -> None:
    for option in ("--gradient-checkpointing", "--activation-checkpointing"):
        _, config = parsed("smollm2-135m-dil", "--train-file", "x", option)
        assert config.activation_checkpointing is True
    assert not [warning for warning in recwarn if "activation_checkpointing" in str(warning.message)]


def test_the_paths_of_recipes_and_configs_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from dil_kernels.recipes.__main__ import main

    assert main(["fsdp2"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.name == "fsdp2.yaml"
    assert "fsdp_version: 2" in path.read_text()
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*packaged_recipes(), "ddp", "deepspeed_zero3"))
    assert main(["fsdp3"]) == 2
    assert "no file is called fsdp3; there are" in capsys.readouterr().err
