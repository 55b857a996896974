"""Answers of the policy to held-out prompts, before training and at each evaluation."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dil_kernels.data.json_text import parse_json
from dil_kernels.models.evaluation import evaluating
from dil_kernels.models.tensor_parallel import is_loaded_in_parts
from dil_kernels.training.agreement import told_by_all
from dil_kernels.training.markdown import escaped
from dil_kernels.training.model_checks import pad_token_id, position_limit, vocabulary_size

GENERATIONS_NAME, RECORD_NAME = "generations.md", "generations.jsonl"
COLUMNS = ("step", "prompt", "completion")


class SampleGenerations(TrainerCallback):
    """Answers the first prompts of the evaluation data greedily: when training begins, at each evaluation, at its end.

    Every answer is a line of generations.jsonl in the output directory, and in generations.md; TensorBoard and
    Weights & Biases get them as a table, where the trainer reports to them. Random numbers drawn afterwards, and with
    them the training, are those of a run without answers.

    Args:
        trainer: a `DILTrainer`.

    Raises:
        ValueError: the trainer has no evaluation data, or the model too few positions for its prompts and answers.
    """

    def __init__(self, trainer: Trainer) -> None:
        datasets: Any = trainer.eval_dataset
        dataset = next(iter(datasets.values()), None) if isinstance(datasets, dict) else datasets
        args: Any = trainer.args
        if dataset is None:
            raise ValueError(
                f"num_generations_at_eval={args.num_generations_at_eval} was given, but there is no eval_dataset to "
                "take the prompts from"
            )
        self._trainer = trainer
        self._prompts = _first_different(dataset, args.num_generations_at_eval)
        self._last_step: int | None = None
        positions = position_limit(trainer.model)
        longest = max(map(len, self._prompts), default=0)
        if positions is not None and longest + args.generate_max_new_tokens - 1 > positions:  # the last one is not read
            raise ValueError(
                f"generate_max_new_tokens={args.generate_max_new_tokens} after a prompt of {longest} tokens go beyond "
                f"the {positions} positions of model"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the answers of another run, or those after the step that this one is resumed at; without any, answer."""
        kept = []
        if state.is_world_process_zero:
            path = Path(str(args.output_dir)) / RECORD_NAME
            kept = [row for row in _read(path) if row["step"] <= state.global_step > 0]
            steps = [row["step"] for row in kept]
            if steps and steps.count(steps[-1]) < len(self._prompts):  # of which a killed run wrote a part
                kept = [row for row in kept if row["step"] != steps[-1]]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        self._last_step = told_by_all(kept[-1]["step"] if kept else None)[0]
        if self._last_step is None:
            self._answer(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer, within training."""
        if self._trainer.is_in_train:
            self._answer(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Answer, if the last step was not evaluated."""
        self._answer(state)

    def _answer(self, state: TrainerState) -> None:
        """Once a step, on every process that the model needs."""
        if state.global_step == self._last_step:
            return
        self._last_step = state.global_step
        answers = _generate(self._trainer, self._prompts)
        if not state.is_world_process_zero:
            return
        tokenizer: Any = self._trainer.processing_class
        prompts = [tokenizer.decode(prompt) for prompt in self._prompts]
        rows = [
            dict(zip(COLUMNS, (state.global_step, *texts), strict=True)) for texts in zip(prompts, answers, strict=True)
        ]
        directory = Path(str(self._trainer.args.output_dir))
        with (directory / RECORD_NAME).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / GENERATIONS_NAME).write_text(_as_markdown(_read(directory / RECORD_NAME)), encoding="utf-8")
        _report(self._trainer, rows)


def _first_different(dataset: Any, count: int) -> list[list[int]]:
    """Prompts in the order of the rows, each once: unpaired responses to one prompt are rows of their own."""
    found: dict[tuple[int, ...], None] = {}
    for row in dataset.select_columns(["prompt_ids"]):
        if len(found) == count:
            break
        found[tuple(row["prompt_ids"])] = None
    return [list(prompt) for prompt in found]


def _generate(trainer: Any, prompts: Sequence[list[int]]) -> list[str]:
    """The greedy answer to each prompt; nothing on a process whose copy of the model is not needed for it."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_loaded_in_parts(trainer.model)
    if not sharded and not trainer.is_world_process_zero():
        return []
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    # Caches of some of these models are rebuilt by the width of the batch.
    size = 1 if trainer.lengths_kept_apart else trainer.args.per_device_eval_batch_size
    answers = []
    with evaluating(model), torch.random.fork_rng(), torch.no_grad(), trainer.compute_loss_context_manager():
        for start in range(0, len(prompts), size):
            answers += _generate_batch(trainer, model, prompts[start : start + size], sharded)
    return answers


def _generate_batch(trainer: Any, model: Any, prompts: Sequence[list[int]], sharded: bool) -> list[str]:
    tokenizer = trainer.processing_class
    options = copy.deepcopy(model.generation_config)
    # An answer is the likeliest, and of this length, whatever the model's own settings for sampling.
    options.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, min_p=None, max_length=None)
    options.update(max_new_tokens=trainer.args.generate_max_new_tokens, use_cache=True)
    if options.eos_token_id is None:
        options.eos_token_id = tokenizer.eos_token_id
    options.pad_token_id = pad_token_id(tokenizer, vocabulary_size(model))
    width = max(map(len, prompts))
    device = trainer.args.device
    padded = [[options.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = model.generate(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=options,
        synced_gpus=sharded,  # a process that is done must go on gathering weights with the others
    )
    answers: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return answers


def _read(path: Path) -> list[dict[str, Any]]:
    """The answers that a run has recorded, without lines that are damaged, as a killed run leaves its last one."""
    rows = []
    # Text has other ends of lines than those of the record.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, LookupError):
            row = parse_json(line)
            if [type(row[name]) for name in COLUMNS] == [int, str, str]:
                rows.append(row)
    return rows


def _as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A section a prompt, in it a line a step."""
    parts = ["# Greedy answers to held-out prompts"]
    for number, prompt in enumerate(dict.fromkeys(row["prompt"] for row in rows), start=1):
        lines = [f"| {row['step']} | {escaped(row['completion'])} |" for row in rows if row["prompt"] == prompt]
        table = "\n".join(["| step | answer |", "|---:|---|", *lines])
        parts.append(f"## Prompt {number}\n\n> {escaped(prompt)}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _report(trainer: Any, rows: list[dict[str, Any]]) -> None:
    """Hand the answers to TensorBoard and Weights & Biases, where the trainer reports to them."""
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_text("generations", _as_markdown(rows), rows[0]["step"])
        wandb = getattr(callback, "_wandb", None)
        if wandb is not None:
            table = wandb.Table(columns=list(COLUMNS), data=[[row[name] for name in COLUMNS] for row in rows])
            wandb.log({"generations": table, "train/global_step": rows[0]["step"]})
