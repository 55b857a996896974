"""The adapters inside stand-ins with the signatures of the trainers; `make trainers` runs the trainers themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_case import OPTIONS, Case, make_case
from tiny_model import make_model, make_pairs, make_tokenizer

from dil_kernels import fused_dil_loss, token_logps
from dil_kernels.integrations.hooks import HookOptions

ROOT = Path(__file__).parents[1]
STAND_INS = Path(__file__).parent / "stand_ins"
PACKAGES = ("swift", "llamafactory", "openrlhf", "axolotl", "nemo_rl", "torchtune")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The packages of the trainers; afterwards the modules are those that there were before."""
    before = {name: module for name, module in sys.modules.items() if name.startswith("dil_kernels.integrations")}
    monkeypatch.syspath_prepend(str(STAND_INS))
    monkeypatch.delenv("DIL_OPTIONS", raising=False)
    yield
    for name in list(sys.modules):
        parts = name.split(".")
        if parts[0] in PACKAGES or (parts[:2] == ["dil_kernels", "integrations"] and parts[2:3] != ["hooks"]):
            del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def case() -> Case:
    return make_case()


def swift_trainer(case: Case, loss_type: Any, template: dict[str, Any] | None = None, **options: Any) -> Any:
    from dil_kernels.integrations.swift.dpo_trainer import DILTrainer

    names = [loss_type] if isinstance(loss_type, str) else loss_type
    args = {"loss_type": names, "loss_weights": [1.0, 0.5][: len(names)], "beta": 0.1, **options}
    layout = {"padding_free": False, "sequence_parallel_size": 1, "is_encoder_decoder": False, **(template or {})}
    return DILTrainer(case.policy, case.ref, args=SimpleNamespace(**args), template=SimpleNamespace(**layout))


def test_swift(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DIL_OPTIONS", json.dumps({"alpha": 0.5, "nll_weight": 2.0}))
    trainer = swift_trainer(case, ["ukl", "sft"])
    assert "dil_kernels in ms-swift 4.6.0: loss ukl (alpha=0.5, " in capsys.readouterr().out
    loss, metrics = trainer.loss(case.batch)
    case.assert_is(loss, OPTIONS, nll=0.5)
    assert metrics.keys() >= {"mean_chosen_logits", "mean_rejected_logits", "nll_loss", "chosen_logps"}


def test_swift_without_padding(case: Case) -> None:
    trainer = swift_trainer(case, "lsif", {"padding_free": True})
    kept = case.mask.bool()
    positions = (case.mask.cumsum(1) - 1)[kept][None]
    row = {"input_ids": case.ids[kept][None], "position_ids": positions, "labels": case.labels[kept][None]}
    from dil_kernels.models.packed_attention import install_packed_attention

    install_packed_attention(case.policy, case.ref)
    loss, _ = trainer.loss(row)
    case.assert_is(loss, {"loss_type": "lsif"})


def test_names_that_swift_has_too(case: Case) -> None:
    loss, _ = swift_trainer(case, "dil.hinge").loss(case.batch)
    case.assert_is(loss, {"loss_type": "hinge"})
    assert swift_trainer(case, "hinge")._hook is None


def test_what_swift_would_ignore_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for options, message in (
        ({"loss_type": "lsif", "beta": 0.3}, "beta=0.3 was given"),
        ({"loss_type": "lsif", "label_smoothing": 0.1}, "label_smoothing=0.1 was given"),
        ({"loss_type": ["lsif", "sigmoid"], "ld_alpha": 0.1}, "ld_alpha=0.1 was given"),
        ({"loss_type": ["lsif", "ukl"]}, "takes one loss of dil_kernels, got lsif, ukl"),
    ):
        with pytest.raises(ValueError, match=message):
            swift_trainer(case, **options)
    with pytest.raises(NotImplementedError, match="neither sequence parallelism"):
        swift_trainer(case, "lsif", {"sequence_parallel_size": 2})
    swift_trainer(case, ["lsif", "sigmoid"], beta=0.3)
    monkeypatch.setenv("DIL_OPTIONS", '{"loss_type": "ukl"}')
    with pytest.raises(ValueError, match="give it as --loss_type"):
        swift_trainer(case, "lsif")
    for text in ('{"alpha": 0.5', "[1]", "null", '{"alpha": 0.1, "alpha": 0.9}'):
        monkeypatch.setenv("DIL_OPTIONS", text)
        with pytest.raises(ValueError, match=f"^DIL_OPTIONS must be a JSON object, got {re.escape(repr(text))}"):
            swift_trainer(case, "lsif")
    monkeypatch.setenv("DIL_OPTIONS", "")  # as a variable that is empty
    swift_trainer(case, "lsif")
    capsys.readouterr()
    swift_trainer(case, "sigmoid", beta=0.3)
    assert "--loss_type sigmoid names no loss of dil_kernels; ms-swift's own" in capsys.readouterr().out


def test_the_plugin_of_swift() -> None:
    command = [sys.executable, "-m", "dil_kernels.integrations.swift"]
    file = Path(subprocess.check_output(command, text=True, cwd=ROOT).strip())
    from swift.trainers.trainer_factory import TrainerFactory

    exec(file.read_text(), {})
    assert TrainerFactory.TRAINER_MAPPING["dpo"] == "dil_kernels.integrations.swift.dpo_trainer.DILTrainer"
    assert not {path.stem for path in file.parent.glob("*.py")} & {"swift", "trl", "transformers"}


def test_llamafactory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from dil_kernels.integrations.llamafactory import DILTrainer

    monkeypatch.setattr(DILTrainer, "options", HookOptions(**OPTIONS))
    defaults = {"pref_loss": "sigmoid", "pref_beta": 0.1, "pref_ftx": 0.5, "pref_bco_weight": 0.0, "ld_alpha": None}
    trainer = DILTrainer(
        model=case.policy, ref_model=case.ref, finetuning_args=SimpleNamespace(**defaults), processor=None
    )
    loss, metrics = trainer.loss(case.batch)
    case.assert_is(loss, OPTIONS, nll=0.5, nll_of="responses")
    assert metrics.keys() >= {"chosen_logits", "rejected_logits", "chosen_logps", "rejected_logps"}
    for name, value in (("pref_loss", "orpo"), ("pref_beta", 0.3), ("ld_alpha", 0.5)):
        with pytest.raises(ValueError, match=f"{name}={value!r} was given"):
            DILTrainer(case.policy, case.ref, SimpleNamespace(**{**defaults, name: value}), None)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_of_llamafactory(processes: int, tmp_path: Path) -> None:
    config = tmp_path / "train.json"
    config.write_text(json.dumps({"stage": "dpo", "dil": {"loss_type": "ukl"}}))
    result = run_module("llamafactory", config, FORCE_TORCHRUN=str(processes - 1))
    lines = [line for line in result.stdout.splitlines() if line.startswith("process")]
    assert len(lines) == processes, result.stderr
    for line in lines:
        assert "DILTrainer, ukl of log ratios averaged over tokens, {'stage': 'dpo'}" in line


def test_what_llamafactory_would_not_reach_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "train.json"
    for content, environment, message in (
        ({"stage": "kto"}, {}, "stage must be dpo, got 'kto'"),
        ({"stage": "dpo"}, {"USE_RAY": "1"}, "USE_RAY is set"),
        ({"stage": "dpo", "dil": {"beta": -1}}, {}, "beta must be a finite number > 0"),
    ):
        config.write_text(json.dumps(content))
        result = run_module("llamafactory", config, **environment)
        assert result.returncode != 0
        assert message in result.stderr


def run_module(name: str, *words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (STAND_INS, ROOT)))
    command = [sys.executable, "-m", f"dil_kernels.integrations.{name}", *map(str, words)]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True
    )


def openrlhf_trainer(case: Case, model: dict[str, Any], ds: dict[str, Any]) -> Any:
    from dil_kernels.integrations.openrlhf import DILTrainer

    args = SimpleNamespace(model=SimpleNamespace(**{"beta": 0.1, **model}), ds=SimpleNamespace(**ds))
    strategy = SimpleNamespace(args=args, _unwrap_model=lambda actor: actor.model)
    actors = (SimpleNamespace(model=model) for model in (case.policy, case.ref))
    return DILTrainer(*actors, strategy, *[None] * 5)


def test_openrlhf(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from dil_kernels.integrations.openrlhf import DILTrainer

    monkeypatch.setattr(DILTrainer, "options", HookOptions(**OPTIONS))
    trainer = openrlhf_trainer(case, {}, {})
    case.labels[:] = torch.where(case.mask.bool(), case.ids, -100)  # both responses have the prompt of the chosen one
    for row, prompt in enumerate([2, 3, 5] * 2):
        case.labels[row, :prompt] = -100
    case.labels[2] = case.labels[5] = -100
    loss, nll = trainer.loss(case.ids[:3], case.mask[:3], case.ids[3:], case.mask[3:], [2, 3, 9])
    case.assert_is(loss, OPTIONS)
    logps, lengths = token_logps(case.logits()[0], case.labels)[:2].sum(1), (case.labels[:2, 1:] != -100).sum(1)
    torch.testing.assert_close(nll, -(logps / lengths).mean())
    with pytest.raises(ValueError, match="ipo_enable=True was given"):
        openrlhf_trainer(case, {"ipo_enable": True}, {})
    with pytest.raises(NotImplementedError, match=r"--ds\.packing_samples does not go"):
        openrlhf_trainer(case, {}, {"packing_samples": True})


def test_the_command_of_openrlhf() -> None:
    words = [
        "--local_rank=0",
        "--dil.loss_type",
        "ukl",
        "--dil.offset",
        "0.1",
        "-0.2",
        "--x",
        "1",
        "--dil.padding_free",
    ]
    result = run_module("openrlhf", *words, "--dil.alpha=0.5", "--y")
    options = "ukl (offset=[0.1, -0.2], alpha=0.5) of log ratios averaged over tokens"
    assert result.stdout == f"DILTrainer {options} ['--local_rank=0', '--x', '1', '--y']\n", result.stderr
    assert "unknown option 'los'" in run_module("openrlhf", "--dil.los", "1").stderr


def test_the_options_of_openrlhf() -> None:
    from dil_kernels.integrations.openrlhf import split_arguments

    words = ["--dil.beta", ".1", "--dil.alpha=1e-1", "--dil.loss_type", "nan"]
    assert split_arguments(words)[0] == {"beta": 0.1, "alpha": 0.1, "loss_type": "nan"}
    for words, problem in (
        (["--dil.alpha", "0.5", "--dil.alpha=0.7"], "--dil.alpha stands twice, and only one value would be read"),
        (["--dil.alpha="], "--dil.alpha: the value is empty"),
        (["--dil.link", ""], "--dil.link: the value is empty"),
    ):
        with pytest.raises(ValueError, match=f"^{problem}$"):
            split_arguments(words)


def axolotl_config(**options: Any) -> dict[str, Any]:
    return {"rl": "dpo", "dil": {"loss_type": "ukl", "alpha": 0.5}, **options}


def test_axolotl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="needs the extra [trl]")
    from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
    from axolotl.integrations.base import PluginManager
    from trl import DPOConfig

    from dil_kernels.integrations.axolotl import DILPlugin

    PluginManager.cfg = axolotl_config()
    DILPlugin().register(PluginManager.cfg)
    module, name = PluginManager.cfg["trainer_cls"].rsplit(".", 1)
    kind = getattr(__import__(module, fromlist=[name]), name)
    args = DPOConfig(str(tmp_path), max_steps=2, logging_steps=1, bf16=False, use_cpu=True, report_to=[])
    data = {"train_dataset": make_pairs(4), "processing_class": make_tokenizer()}
    trainer = kind(make_model(0), make_model(0), args=args, dataset_tags=["x"], **data)
    assert isinstance(trainer, AxolotlDPOTrainer)
    assert trainer.dataset_tags == ["x"]
    assert (trainer.args.loss_type, trainer.args.alpha) == (["ukl"], 0.5)
    assert trainer.model_accepts_loss_kwargs, "the loss is divided by the pairs of the step"
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(1.0)
    assert (
        capsys.readouterr().out.count("dil_kernels in axolotl 0.21.0: loss ukl (alpha=0.5) of log ratios averaged") == 1
    )


def test_what_axolotl_would_ignore_is_refused() -> None:
    from dil_kernels.integrations.axolotl import DILPlugin

    for options, message in (
        ({"rl_beta": 0.3}, "rl_beta=0.3 was given"),
        ({"trl": {"beta": 0.3}}, "trl.beta=0.3 was given"),
        ({"dpo_loss_type": ["ukl"]}, r"dpo_loss_type=\['ukl'\] was given"),
        ({"rl": "kto"}, "rl must be dpo with a block dil, got 'kto'"),
        ({"trainer_cls": "a.B"}, "trainer_cls=a.B was given"),
        ({"dil": {"padding_free": True}}, "give axolotl's dpo_padding_free"),
        ({"dil": {"alpa": 1}}, "unknown option 'alpa' in dil"),
        ({"dil": None, "plugins": ["dil_kernels.integrations.axolotl.DILPlugin"]}, "there is no block dil"),
    ):
        with pytest.raises(ValueError, match=message):
            DILPlugin().register(axolotl_config(**options))
    config = {"rl": "kto"}  # of a run that has nothing to do with dil_kernels
    DILPlugin().register(config)
    assert config == {"rl": "kto"}


def test_nemo_rl(case: Case) -> None:
    from dil_kernels.integrations.nemo_rl import DILLossFn

    def make(**options: Any) -> Any:
        defaults = {"reference_policy_kl_penalty": 0.05, "preference_average_log_probs": True, "dil": dict(OPTIONS)}
        return DILLossFn(SimpleNamespace(**{**defaults, **options}), use_linear_ce_fusion=False)

    logits, ref_logits = case.logits()
    order = torch.tensor([0, 3, 1, 4, 2, 5])  # chosen and rejected in turns
    logps = torch.log_softmax(logits[:, :-1], -1).gather(2, case.ids[:, 1:, None]).squeeze(2)
    ref_logps = torch.log_softmax(ref_logits[:, :-1], -1).gather(2, case.ids[:, 1:, None]).squeeze(2)
    data = {
        "token_mask": (case.labels != -100).int()[order],
        "reference_policy_logprobs": torch.nn.functional.pad(ref_logps, (0, 1))[order],
        "sample_mask": torch.tensor([1, 1, 1, 1, 0, 0]),
    }
    data["token_mask"][4:] = 1  # which the mask of the samples overrules
    far = logps[order] + torch.tensor([0, 0, 0, 0, 120.0, 120.0])[:, None]
    loss, accuracy, chosen, rejected = make()._dpo_loss(far, data, torch.tensor(4))
    case.assert_is(loss, OPTIONS)
    truth = fused_dil_loss(*case.logits()[:1], case.labels, ref_logits=ref_logits, **OPTIONS)
    torch.testing.assert_close(chosen, truth.chosen_rewards[:2].mean())
    torch.testing.assert_close(rejected, truth.rejected_rewards[:2].mean())
    assert accuracy == (truth.chosen_rewards > truth.rejected_rewards)[:2].float().mean()
    for options, message in (
        ({"reference_policy_kl_penalty": 0.1}, "reference_policy_kl_penalty=0.1 was given"),
        ({"dil": {"average_log_prob": False}}, "average_log_prob=False was given"),
        ({"dil": {"padding_free": True}}, "padding_free=True was given"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)


@pytest.mark.parametrize("together", [True, False])
def test_torchtune(case: Case, together: bool) -> None:
    from torchtune import rlhf

    from dil_kernels.integrations.torchtune import DILLoss

    loss_fn = DILLoss(**OPTIONS)
    logps = []
    for logits in case.logits():
        parts = [slice(6)] if together else [slice(3), slice(3, 6)]
        sums = torch.cat([rlhf.get_batch_log_probs(logits[part], case.labels[part]) for part in parts])
        logps.extend(sums.chunk(2))
    losses, chosen_rewards, _ = loss_fn(*logps)
    assert chosen_rewards.shape == (3,)
    case.assert_is(losses.mean(), OPTIONS)
    with pytest.raises(ValueError, match="fused_head=True was given"):
        DILLoss(fused_head=True)
