"""The model card: what it states, that its recipe can be run again, and what is uploaded."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from plain_training import plain_logps
from tiny_model import make_model, make_pairs, make_responses, make_tokenizer
from tiny_trainer import batch_of, make_trainer, tokenized

from dil_kernels.cli.arguments import parse_arguments
from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.trainer import DILConfig, DILTrainer
from dil_kernels.training.held_out import BEFORE_NAME, _kept_scores
from dil_kernels.training.model_card import recipe_of
from dil_kernels.training.run import run_training


def config_of(output_dir: Path, **options: Any) -> DILConfig:
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "max_length": 24,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DILConfig(str(output_dir), **{**defaults, **options})


def table_of(card: str, head: str) -> dict[str, list[str]]:
    """The rows of the table whose first cell is `head`, by their first cells."""
    lines = card[card.index(f"| {head} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    sources = {
        "model": "org/base-7b",
        "train_file": "org/pairs",
        "train_split": "train_prefs",
        "eval_file": "a/b/h.jsonl",
    }
    config = config_of(directory / "my-model", hub_token="hf_secret", alpha=0.25, num_generations_at_eval=1)
    run_training(make_model(), make_tokenizer(), config, make_pairs(9), make_pairs(5, seed=1), sources=sources)
    return directory / "my-model"


def test_the_card_states_what_was_done(run_dir: Path) -> None:
    text = (run_dir / "README.md").read_text()
    header = ModelCard(text).data.to_dict()
    assert header["base_model"] == "org/base-7b"
    assert header["datasets"] == ["org/pairs"]
    assert header["library_name"] == "transformers"
    assert "dil" in header["tags"]
    assert "license" not in header
    assert "hf_secret" not in text
    assert "\n# my-model\n" in text
    assert "arXiv 2503.05079" in text
    assert "@inproceedings{xiao2025connection" in text
    assert "- Training: 9 pairs of `org/pairs`, split `train_prefs`." in text
    assert "- Held out: 5 pairs of `h.jsonl`." in text
    assert "4 = 2 x 2 accumulated x 1 process |" in text
    assert "![training curves](training_curves.png)" in text
    assert (run_dir / "training_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_results_are_those_of_the_run(run_dir: Path) -> None:
    text = (run_dir / "README.md").read_text()
    results = json.loads((run_dir / "before_after.json").read_text())
    rows = table_of(text, "5 held-out pairs")
    assert rows["chosen log-prob, per token"][:2] == [
        f"{results[when]['chosen_logps']:.3f}" for when in ("before", "after")
    ]
    from transformers import AutoModelForCausalLM

    for when, model in (("before", make_model()), ("after", AutoModelForCausalLM.from_pretrained(run_dir))):
        logps, mask = plain_logps(model.double(), batch_of(make_pairs(5, seed=1)))
        chosen, rejected = (logps.sum(1) / mask.sum(1)).chunk(2)
        assert results[when]["chosen_logps"] == pytest.approx(chosen.mean().item(), rel=1e-5)
        assert results[when]["rejected_logps"] == pytest.approx(rejected.mean().item(), rel=1e-5)
        assert results[when]["accuracy"] == (chosen > rejected).double().mean().item()
    history = json.loads((run_dir / "trainer_state.json").read_text())["log_history"]
    last = next(log for log in reversed(history) if "eval_loss" in log)
    assert table_of(text, "last logged")["`loss`"][1] == f"{last['eval_loss']:.4g}"


def test_the_recipe_of_the_card_parses_to_the_same_options(run_dir: Path, tmp_path: Path) -> None:
    text = (run_dir / "README.md").read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.split("```yaml\n")[1].split("```")[0])
    options, config = parse_arguments(["--config", str(recipe), "--output-dir", str(run_dir)])
    assert (options.model, options.train_split, options.eval_file) == ("org/base-7b", "train_prefs", "h.jsonl")
    expected = config_of(run_dir, alpha=0.25, num_generations_at_eval=1)
    for name, value in vars(expected).items():
        if name not in ("disable_tqdm", "logging_dir", "run_name") and not name.startswith("_"):
            actual = getattr(config, name)
            assert actual == value or str(actual) == str(value), name  # some are objects without equality


def test_the_recipe_of_the_card_has_options_of_options(tmp_path: Path) -> None:
    kwargs = {"min_lr": 1e-7}
    config = config_of(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=kwargs)
    assert recipe_of(config)["lr_scheduler_kwargs"] == kwargs


def test_before_is_that_of_the_first_run_when_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(output_dir: Path, rows: int = 5, **options: Any) -> Any:
        config = config_of(output_dir, save_strategy="steps", save_steps=2, eval_strategy="no")
        return run_training(make_model(), make_tokenizer(), config, make_pairs(9), make_pairs(rows, seed=1), **options)

    whole = run(tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-3"):
        path.rename(tmp_path / "gone")
    resumed = run(tmp_path / "run", resume_from_checkpoint=True)
    assert resumed == whole
    kept, checkpoint = tmp_path / "run" / BEFORE_NAME, str(tmp_path / "run" / "checkpoint-2")
    scores = json.loads(kept.read_text())
    for wrong in (None, [], {}, {**scores, "chosen": None}, {**scores, "rejected": ["1"]}):
        kept.write_text(json.dumps(wrong))
        assert _kept_scores(kept, scores["data"]) is None, wrong
    kept.write_text(json.dumps(scores))
    assert run(tmp_path / "run", rows=4, resume_from_checkpoint=checkpoint) is None
    assert f"{kept} cannot be used (it is not of this evaluation data)" in caplog.text
    kept.write_text(json.dumps(scores)[:40])
    assert run(tmp_path / "run", resume_from_checkpoint=checkpoint) is None
    assert f"{kept} cannot be used (" in caplog.text
    kept.unlink()
    assert run(tmp_path / "run", resume_from_checkpoint=checkpoint) is None


def test_unpaired_responses_have_a_table_of_sides(tmp_path: Path, capsys) -> None:
    held_out = make_responses(7, seed=3)
    results = run_training(make_model(), make_tokenizer(), config_of(tmp_path), make_responses(9), held_out)
    assert (len(results.after.chosen), len(results.after.rejected)) == (5, 2)
    rows = tokenized(held_out).to_list()
    batch = PreferenceCollator(0)(rows)
    logps, mask = plain_logps(make_model().double(), batch)
    expected = logps.sum(1) / mask.sum(1)
    summary = results.before.summary()
    assert summary["chosen_logps"] == pytest.approx(expected[batch["is_chosen"]].mean().item(), rel=1e-5)
    assert summary["rejected_logps"] == pytest.approx(expected[~batch["is_chosen"]].mean().item(), rel=1e-5)
    assert results.after.summary()["chosen_logps"] != summary["chosen_logps"]
    assert "accuracy" not in summary
    assert "5 chosen, 2 rejected" in capsys.readouterr().out
    assert "| 5 chosen, 2 rejected | before |" in (tmp_path / "README.md").read_text()


def test_scoring_changes_no_random_number(tmp_path: Path) -> None:
    weights = []
    for held_out in (None, make_pairs(5, seed=1)):
        config = config_of(tmp_path / str(held_out is None), eval_strategy="no", disable_dropout=False)
        model = make_model(attention_dropout=0.3)
        run_training(model, make_tokenizer(), config, make_pairs(9), held_out)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_predictions_are_log_probs_of_every_pair(tmp_path: Path) -> None:
    policy, ref = make_model(0), make_model(1)
    trainer = make_trainer(tmp_path, model=policy, ref_model=ref, average_log_prob=False)
    predictions = torch.from_numpy(trainer.predict(make_pairs(4, seed=9)).predictions).double()
    batch = batch_of(make_pairs(4, seed=9))
    logps, mask = plain_logps(policy.double(), batch)
    ref_logps, _ = plain_logps(ref.double(), batch)
    sums = torch.stack([*logps.sum(1).chunk(2), *(logps - ref_logps).sum(1).chunk(2), *mask.sum(1).chunk(2)], dim=1)
    torch.testing.assert_close(predictions, sums, rtol=1e-5, atol=1e-5)


def test_a_local_base_and_lora_are_named_as_such(tmp_path: Path) -> None:
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        type(make_model()).from_pretrained(tmp_path / "base"), peft.LoraConfig(target_modules=["q_proj"], r=2)
    )
    sources = {"model": str(tmp_path / "base"), "train_file": str(tmp_path / "pairs.jsonl")}
    run_training(
        model, make_tokenizer(), config_of(tmp_path / "out", eval_strategy="no"), make_pairs(4), sources=sources
    )
    text = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "peft"
    assert "base_model" not in header
    assert "The local model `base`" in text
    assert str(tmp_path) not in text
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_what_truncation_did_is_reported(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=make_pairs(3))
    trainer.data_report = {"train": "7 rows; none truncated", "eval": "3 rows; prompts cut: 2"}
    trainer.create_model_card(model_name="Named", license="mit", tags="mine", dataset=["a/b"])
    text = (tmp_path / "README.md").read_text()
    assert "- Tokenised (`eval`): 3 rows; prompts cut: 2." in text
    assert "# Named" in text
    header = ModelCard(text).data.to_dict()
    assert (header["license"], header["datasets"], header["tags"][-1]) == ("mit", ["a/b"], "mine")
    assert "Nothing was logged." in text
    assert not (tmp_path / "training_curves.png").exists()


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr(transformers.trainer.Trainer, "init_hf_repo", unreachable)
    with pytest.raises(OSError, match="the hub could not make the repository: Name or service not known"):
        DILTrainer(
            make_model(),
            args=config_of(tmp_path, push_to_hub=True, eval_strategy="no"),
            processing_class=make_tokenizer(),
        )


def test_what_is_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, **kwargs: Any) -> Any:
            return types.SimpleNamespace(repo_id=f"user/{name}")

        def upload_folder(self, folder_path: str, **kwargs: Any) -> Any:
            files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
            uploads.append({**kwargs, "files": files})

    monkeypatch.setattr("transformers.trainer.hf_api", Hub, raising=False)
    for name in ("create_repo", "upload_folder"):  # as earlier versions call them
        monkeypatch.setattr(f"transformers.trainer.{name}", getattr(Hub(), name), raising=False)
    config = config_of(tmp_path / "out", push_to_hub=True, hub_model_id="my-dil", hub_strategy="end")
    run_training(make_model(), make_tokenizer(), config, make_pairs(9), make_pairs(5, seed=1))
    (upload,) = uploads
    assert upload["repo_id"] == "user/my-dil"
    assert "checkpoint-*" in upload["ignore_patterns"]
    for name in ("model.safetensors", "config.json", "tokenizer.json", "training_curves.png", "before_after.json"):
        assert upload["files"][name]
    card = upload["files"]["README.md"].decode()
    assert "# my-dil" in card
    assert "| 5 held-out pairs | before | after | change |" in card
