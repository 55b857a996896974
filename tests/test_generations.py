"""Answers to held-out prompts: equal to plain greedy decoding, without a trace in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from tiny_model import make_model, make_pairs, make_tokenizer
from tiny_trainer import assert_bitwise_equal, make_trainer, trained_weights
from transformers import PreTrainedTokenizerFast, TrainerCallback
from two_processes import run_on_two_processes

from dil_kernels.trainer import DILConfig

OPTIONS: dict[str, Any] = {
    "num_generations_at_eval": 4,
    "generate_max_new_tokens": 5,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_steps": 3,
}


def records(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "generations.jsonl").read_text().splitlines()]


def greedy(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    """The likeliest token after the whole sequence, again and again; no cache, no padding."""
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == make_tokenizer().eos_token_id:
            break
    return ids[len(prompt) :]


class Snapshots(TrainerCallback):
    """What the model answers at each step, greedily and one at a time."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompts = prompts
        self.answers: dict[int, list[str]] = {}

    def look(self, state: Any, model: Any) -> None:
        tokenizer, training = make_tokenizer(), model.training
        model.eval()
        ids = [greedy(model, prompt, OPTIONS["generate_max_new_tokens"]) for prompt in self.prompts]
        self.answers[state.global_step] = tokenizer.batch_decode(ids, skip_special_tokens=True)
        model.train(training)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.look(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.look(state, model)


def lora_model() -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False)
    return peft.get_peft_model(make_model(tie_word_embeddings=False), config)


@pytest.mark.parametrize("kind", ["plain", "logits", "lora", "checkpointed", "precomputed"])
def test_answers_are_those_of_plain_greedy_decoding(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {
        "logits": {"fused_head": False},
        "lora": {"model": lora_model()},
        "checkpointed": {"gradient_checkpointing": True},
        "precomputed": {"precompute_ref_log_probs": True},
    }.get(kind, {})
    trainer = make_trainer(tmp_path, eval_dataset=make_pairs(6, seed=5), **OPTIONS, **options)
    prompts = trainer.eval_dataset["prompt_ids"][:4]
    assert len(set(map(len, prompts))) > 1, "prompts of one length need no padding"
    snapshots = Snapshots(prompts)
    trainer.add_callback(snapshots)
    trainer.train()
    rows = records(tmp_path)
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [3] * 4  # also after the last, unevaluated step
    for step in (0, 2, 3):
        assert [row["completion"] for row in rows if row["step"] == step] == snapshots.answers[step]
    assert snapshots.answers[0] != snapshots.answers[3], "answers that never change prove nothing"
    assert rows[1]["prompt"] == make_tokenizer().decode(prompts[1])


def test_every_prompt_is_answered_once(tmp_path: Path) -> None:
    """Unpaired responses to one prompt are rows of their own."""
    rows = make_pairs(6, seed=5).to_list()
    responses = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    trainer = make_trainer(tmp_path, eval_dataset=Dataset.from_list(responses), **OPTIONS)
    trainer.train()
    answered = [row["prompt"] for row in records(tmp_path) if row["step"] == 0]
    assert answered == [row["prompt"].strip() for row in rows[:4]]


def test_training_is_bit_for_bit_that_without_answers(tmp_path: Path) -> None:
    runs = []
    for answered in (0, 3):
        trainer = make_trainer(
            tmp_path / str(answered),
            model=make_model(attention_dropout=0.3),
            disable_dropout=False,
            eval_dataset=make_pairs(6, seed=5),
            **{**OPTIONS, "num_generations_at_eval": answered},
        )
        trainer.train()
        runs.append(trained_weights(trainer))
    assert not (tmp_path / "0" / "generations.md").exists()
    assert_bitwise_equal(runs[1], runs[0])


def test_no_text_and_no_torn_line_breaks_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = PreTrainedTokenizerFast.decode

    def with_separators(*args: Any, **kwargs: Any) -> Any:
        decoded = decode(*args, **kwargs)
        return f"a\u2028b\x85{decoded}" if isinstance(decoded, str) else [f"a\u2028b\x85{text}" for text in decoded]

    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", with_separators)
    options = {**OPTIONS, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, eval_dataset=make_pairs(6, seed=5), **options).train()
    record = tmp_path / "generations.jsonl"
    rows = [json.loads(line) for line in record.read_text().strip().split("\n")]
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [3] * 4
    assert "a\u2028b\x85" in rows[0]["prompt"]
    # As a killed run leaves it, and damaged.
    record.write_text(record.read_text()[:-9] + '\n[]\n{"step": 2}\nnull\n' + 100_000 * "[")
    resumed = make_trainer(tmp_path, eval_dataset=make_pairs(6, seed=5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [json.loads(line) for line in record.read_text().strip().split("\n")] == rows


def test_a_resumed_run_goes_on_with_the_record(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 1}
    options = {**OPTIONS, **saving, "eval_dataset": make_pairs(6, seed=5)}
    make_trainer(tmp_path, **options).train()
    rows = records(tmp_path)
    make_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert records(tmp_path) == rows
    text = (tmp_path / "generations.md").read_text()
    assert text.count("## Prompt") == 4
    assert text.count("\n| 3 | ") == 4


def test_the_integrations_get_a_table(tmp_path: Path) -> None:
    class Writer:
        texts: list[tuple[str, str, int]] = []  # noqa: RUF012

        def add_text(self, *args: Any) -> None:
            self.texts.append(args)

    class Wandb:
        logged: list[dict[str, Any]] = []  # noqa: RUF012

        def Table(self, columns: list[str], data: list[list[Any]]) -> Any:  # noqa: N802
            return columns, data

        def log(self, values: dict[str, Any]) -> None:
            self.logged.append(values)

    class Integrations(TrainerCallback):
        tb_writer = Writer()
        _wandb = Wandb()

    trainer = make_trainer(
        tmp_path, eval_dataset={"a": make_pairs(6, seed=5), "b": make_pairs(2)}, callbacks=[Integrations()], **OPTIONS
    )
    trainer.train()
    assert [(tag, step) for tag, _, step in Writer.texts] == [("generations", step) for step in (0, 2, 3)]
    columns, data = Wandb.logged[0]["generations"]
    assert columns == ["step", "prompt", "completion"]
    assert [row[0] for row in data] == [0] * 4
    assert data[0][2] == records(tmp_path)[0]["completion"]


def test_tensorboard_has_metrics_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    make_trainer(tmp_path, eval_dataset=make_pairs(6, seed=5), report_to=["tensorboard"], **OPTIONS).train()
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {"train/loss", "train/rewards/margins", "eval/rewards/accuracies"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert "generations/text_summary" in events.Tags()["tensors"]


DISTRIBUTED = """
from test_generations import OPTIONS
from tiny_trainer import make_trainer
from tiny_model import make_pairs
trainer = make_trainer(Path(sys.argv[1]), eval_dataset=make_pairs(6, seed=5), ddp_backend="gloo", **OPTIONS)
trainer.train()
"""


def test_two_processes_answer_once(tmp_path: Path) -> None:
    run_on_two_processes(DISTRIBUTED, tmp_path, tmp_path / "two")
    assert [row["step"] for row in records(tmp_path / "two")] == [0] * 4 + [2] * 4 + [3] * 4


def test_what_cannot_be_answered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_generations_at_eval=2 was given, but there is no eval_dataset"):
        make_trainer(tmp_path, num_generations_at_eval=2)
    with pytest.raises(ValueError, match="num_generations_at_eval must be at least 0, got -1"):
        DILConfig(str(tmp_path), num_generations_at_eval=-1)
    with pytest.raises(ValueError, match="generate_max_new_tokens must be at least 1, got 0"):
        DILConfig(str(tmp_path), generate_max_new_tokens=0)
