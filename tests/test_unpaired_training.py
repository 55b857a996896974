"""Responses that do not come in pairs, from the file to the optimizer step: data, batches, trainer, command line."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from plain_training import RELATIVE, GradientRecorder, assert_all_close, plain_gradients, plain_logps
from tiny_model import make_model, make_responses, save_model, write_lines
from tiny_trainer import assert_trained_as, make_trainer, save_result, tokenized
from torch import Tensor
from two_processes import run_on_two_processes

from dil_kernels.cli import programs
from dil_kernels.cli.arguments import parse_arguments
from dil_kernels.data import PreferenceDataError, load_preference_pairs
from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.losses.registry import _REGISTRY

pytestmark = pytest.mark.usefixtures("datasets_cache")

PLAIN = {"prompt": "w1 w2 ", "completion": "w3 w4", "label": True}
CHAT = {
    "prompt": [{"role": "user", "content": "w1 w2"}],
    "completion": [{"role": "assistant", "content": "w3 w4"}],
    "label": False,
}


@pytest.mark.parametrize("record", [PLAIN, CHAT], ids=["plain", "conversational"])
def test_every_source_gives_the_same_responses(tmp_path: Path, record: dict[str, Any]) -> None:
    other = {**record, "label": not record["label"]}
    expected = [record, other]
    assert load_preference_pairs(write_lines(tmp_path / "a.jsonl", *expected)).to_list() == expected
    loaded = datasets.Dataset.from_list([{**row, "score": 1.0} for row in expected])
    loaded.to_parquet(tmp_path / "a.parquet")
    assert load_preference_pairs(tmp_path / "a.parquet").to_list() == expected
    directory = tmp_path / "set"
    directory.mkdir()
    write_lines(directory / "train.jsonl", *expected)
    assert load_preference_pairs(directory).to_list() == expected


def test_a_whole_conversation_is_split(tmp_path: Path) -> None:
    whole = {"completion": CHAT["prompt"] + CHAT["completion"], "label": False}
    assert load_preference_pairs(write_lines(tmp_path / "a.jsonl", whole)).to_list() == [CHAT]


PAIR = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
BROKEN = {
    "no label": ({**PLAIN, "label": None}, ": column 'label' is missing (columns with a value: prompt, completion)"),
    "a number": ({**PLAIN, "label": 1}, ", column 'label': expected true or false, got int"),
    "empty": ({**PLAIN, "completion": " "}, ", column 'completion': the response is empty"),
    "a pair": (PAIR, ": this record has prompt, chosen, rejected, but those before it have prompt, completion, label"),
    "a conversation": (CHAT, ": this response is lists of messages, but those before it are strings"),
}


@pytest.mark.parametrize(("record", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_broken_response_is_named(tmp_path: Path, record: Any, problem: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", PLAIN, record)
    with pytest.raises(PreferenceDataError) as caught:
        load_preference_pairs(path)
    assert str(caught.value) == f"{path}, line 2{problem}"


def test_token_ids_and_batches() -> None:
    rows = tokenized(datasets.Dataset.from_list([PLAIN, {**PLAIN, "completion": "w5", "label": False}])).to_list()
    paired = tokenized(
        datasets.Dataset.from_list([{"prompt": "w1 w2 ", "chosen": "w3 w4", "rejected": "w5"}])
    ).to_list()
    assert [row["completion_ids"] for row in rows] == [paired[0]["chosen_ids"], paired[0]["rejected_ids"]]
    batch, expected = PreferenceCollator(0)(rows), PreferenceCollator(0)(paired)
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name], expected[name])
    assert batch["is_chosen"].tolist() == [True, False]
    assert batch["rows"].tolist() == [1, 2]


def plain_sides(policy: torch.nn.Module, ref: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `DILTrainer` reports of LSIF with alpha 0.25."""
    logps, mask = plain_logps(policy, batch)
    with torch.no_grad():
        ref_logps, _ = plain_logps(ref, batch)
    u, w = (logps - ref_logps).sum(1) / mask.sum(1), batch["is_chosen"]
    losses = torch.where(w, -u.exp() + 0.25 * (2 * u).exp() / 2, 0.75 * (2 * u).exp() / 2)
    sides = {"loss": losses, "rewards": u, "logps": logps.sum(1)}
    values = {f"{name}/{side}": x[w if side == "chosen" else ~w].mean() for name, x in sides.items() for side in
              ("chosen", "rejected")}  # fmt: skip
    values["loss"] = values["loss/chosen"] + values["loss/rejected"]
    values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
    return values


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (3, 3), (1, 8)])
def test_accumulated_gradients_are_those_of_one_batch(
    tmp_path: Path, batch_size: int, accumulation: int, precompute: bool
) -> None:
    rows = tokenized(make_responses(8)).to_list()
    empty = rows.pop(2)
    rows.insert(3, {**empty, "completion_ids": []})  # left out of the mean
    policy, ref, recorder = make_model(0), make_model(1), GradientRecorder()
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(ref),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        callbacks=[recorder],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        max_grad_norm=0.0,
        alpha=0.25,
        precompute_ref_log_probs=precompute,
    )
    evaluated = trainer.evaluate()
    trainer.train()
    counted = [row for row in rows if row["completion_ids"]]
    truth = plain_sides(policy.double(), ref.double(), PreferenceCollator(0)(counted))
    logged = next(log for log in trainer.state.log_history if "loss" in log)
    assert trainer.state.global_step == 1
    assert "rewards/accuracies" not in logged
    for metric, value in truth.items():
        assert logged[metric] == pytest.approx(value.item(), rel=RELATIVE, abs=RELATIVE), metric
        assert evaluated[f"eval_{metric}"] == pytest.approx(value.item(), rel=RELATIVE, abs=RELATIVE), metric
    assert_all_close(recorder.steps[0], plain_gradients(truth["loss"], policy))


DISTRIBUTED = """
from test_unpaired_training import distributed_run
distributed_run(Path(sys.argv[1]), per_device_train_batch_size=2, ddp_backend="gloo")
"""


def distributed_run(output_dir: Path, **options: Any) -> Any:
    """A step of 8 responses: the two processes meet other numbers of chosen and rejected ones."""
    rows = tokenized(make_responses(8)).to_list()
    for row, label in zip(rows, (1, 1, 0, 0, 1, 0, 1, 0), strict=True):
        row["label"] = bool(label)
    trainer = make_trainer(
        output_dir,
        ref_model=make_model(1),
        train_dataset=datasets.Dataset.from_list(rows),
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        optim="sgd",
        **options,
    )
    trainer.train()
    save_result(trainer)
    return trainer


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    run_on_two_processes(DISTRIBUTED, tmp_path, tmp_path / "two")
    (tmp_path / "one").mkdir()
    one = distributed_run(tmp_path / "one", per_device_train_batch_size=4)
    assert_trained_as(tmp_path / "two", one, ("loss", "loss/chosen", "rewards/margins", "logps/rejected"))


def test_dpo_needs_pairs(tmp_path: Path) -> None:
    for options in ({"loss_type": "dpo"}, {"loss_type": "bce", "link": "ratio"}):
        with pytest.raises(ValueError, match="couples the chosen and the rejected response"):
            make_trainer(tmp_path, train_dataset=make_responses(4), **options)


def test_the_command_line_with_a_registered_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    save_model(tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", *make_responses(6).to_list())
    (tmp_path / "my_losses.py").write_text(
        "from dil_kernels import Divergence, register_divergence\n"
        "register_divergence(Divergence(name='cubic', source='', h=lambda r: r**3 / 6))\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "model", "--train-file", str(data), "--eval-file", str(data), "--output-dir", "out"]
    arguments += ["--loss-type", "cubic", "--max-steps", "2", "--logging-steps", "1", "--report-to", "none"]
    arguments += ["--use-cpu", "--save-strategy", "no", "--per-device-train-batch-size", "6"]
    with pytest.raises(SystemExit):
        programs.main(arguments)
    assert "invalid choice: 'cubic'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        programs.main([*arguments, "--import", "no_such_module"])
    assert "--import no_such_module: ModuleNotFoundError" in capsys.readouterr().err
    try:
        assert programs.main([*arguments, "--import", "my_losses"]) == 0
        _REGISTRY.pop("cubic", None)
        del sys.modules["my_losses"]
        card = (tmp_path / "out" / "README.md").read_text()
        (tmp_path / "recipe.yaml").write_text(card.split("```yaml\n")[1].split("```")[0])
        options, config = parse_arguments(["--config", "recipe.yaml", "--output-dir", "again"])
        assert (options.import_modules, config.loss_type) == (("my_losses",), "cubic")
    finally:
        _REGISTRY.pop("cubic", None)
        sys.modules.pop("my_losses", None)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(-1 / 2 + 1 / 3)  # A = r^2 / 2 and P = r^3 / 3 at r = 1
