"""DILTrainer on TRL's DPOTrainer: the real TRL, against plain PyTorch and against TRL's own losses.

Passes with TRL 1.0 to 1.16; another version is tested by `pip install --no-deps --target DIR trl==1.0.0` and then
`PYTHONPATH=DIR python -m pytest tests/test_trl.py`.
"""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import make_model, make_pairs, make_tokenizer
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback
from two_processes import run_on_two_processes

trl = pytest.importorskip("trl", reason="needs the extra [trl]")
peft = pytest.importorskip("peft", reason="needs peft")

from datasets import Dataset, load_from_disk  # noqa: E402
from packaging.version import Version  # noqa: E402

from dil_kernels.integrations.trl import DILConfig, DILTrainer  # noqa: E402
from dil_kernels.integrations.trl_config import UNUSED_OPTIONS  # noqa: E402
from dil_kernels.training.metrics import METRICS  # noqa: E402

RELATIVE = 1e-5  # fp32 against fp64, of the largest entry: two layers, a few hundred terms a sum
EXACT = 1e-9  # fp64 against fp64
PLAIN = {
    "learning_rate": 1e-2,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
}


def make_trainer(
    output_dir: Path,
    trainer_class: Any = DILTrainer,
    config_class: Any = DILConfig,
    model: Any = None,
    ref_model: Any = None,
    train_dataset: Any = None,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer whose reference is not its policy, so that every loss and gradient depends on both."""
    arguments = arguments or {}
    if ref_model is None and "peft_config" not in arguments and not isinstance(model, peft.PeftModel):
        ref_model = make_model(1)
    return trainer_class(
        model=make_model(0) if model is None else model,
        ref_model=ref_model,
        args=config_class(str(output_dir), **{**PLAIN, **options}),
        train_dataset=make_pairs(7) if train_dataset is None else train_dataset,
        processing_class=make_tokenizer(),
        **arguments,
    )


def near(model: torch.nn.Module, scale: float = 0.02) -> Any:
    """A copy so near that the exponentials of a whole sequence's log ratio stay finite."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return model


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def logs_of(trainer: Any) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


class GradientRecorder(TrainerCallback):
    """The gradients of each optimizer step, before it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        self.steps.append({name: value.clone() for name, value in gradients.items() if value is not None})


def assert_close(actual: dict[str, Tensor], truth: dict[str, Tensor], relative: float = RELATIVE) -> None:
    assert actual.keys() == truth.keys()
    scale = max(value.abs().max().item() for value in truth.values())
    assert scale > 1e-3, "values that vanish prove nothing"
    for name, value in truth.items():
        error = (actual[name].double() - value.double()).abs().max().item()
        assert error <= relative * scale, f"{name}: {error / scale:.2e} of the largest"


PLAIN_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lsif": lambda u_w, u_l: -u_w.exp() + (2 * u_l).exp() / 2,
    "ukl": lambda u_w, u_l: -u_w + u_l.exp(),
    "bce": lambda u_w, u_l: softplus(-u_w) + softplus(u_l),
    "dpo": lambda u_w, u_l: softplus(-0.3 * (u_w - u_l)),
    "power": lambda u_w, u_l: -torch.expm1(0.25 * u_w) / 0.25 + (1.25 * u_l).exp() / 1.25,
}
OPTIONS = {"dpo": {"beta": 0.3}, "power": {"power": 0.25}}
WAYS = {"fused head": {}, "logits": {"fused_head": False}, "eager": {"fused_head": False, "backend": "eager"}}


def plain_pairs(
    policy: torch.nn.Module, ref: torch.nn.Module, batch: dict[str, Tensor], name: str = "lsif", average: bool = True
) -> dict[str, Tensor]:
    """METRICS of every pair [B] in plain PyTorch, for a batch of TRL's collator."""
    labels, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]

    def logps_of(model: torch.nn.Module) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits[:, -mask.shape[1] - 1 : -1].double()
        return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * mask

    logps = logps_of(policy)
    with torch.no_grad():
        u_ref = logps_of(ref).sum(1)
    u = (logps.sum(1) - u_ref) / (mask.sum(1) if average else 1)
    (u_w, u_l), (chosen, rejected) = u.chunk(2), logps.sum(1).chunk(2)
    beta = 0.3 if name == "dpo" else 1.0
    return {
        "loss": PLAIN_LOSSES[name](u_w, u_l),
        "rewards/chosen": beta * u_w,
        "rewards/rejected": beta * u_l,
        "rewards/margins": beta * (u_w - u_l),
        "rewards/accuracies": (u_w > u_l).double(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


def batch_of(trainer: Any, dataset: Any = None) -> dict[str, Tensor]:
    dataset = trainer.train_dataset if dataset is None else dataset
    return trainer.data_collator(dataset.to_list())


def plain_gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("average", [True, False], ids=["average", "sum"])
@pytest.mark.parametrize("name", PLAIN_LOSSES)
def test_a_step_is_that_of_plain_pytorch(tmp_path: Path, name: str, average: bool, way: dict[str, Any]) -> None:
    ref, recorder = make_model(0).double(), GradientRecorder()
    policy = near(ref)
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(ref),
        arguments={"callbacks": [recorder]},
        per_device_train_batch_size=7,
        max_steps=1,
        loss_type=name,
        average_log_prob=average,
        **OPTIONS.get(name, {}),
        **way,
    )
    trainer.train()
    truth = plain_pairs(policy, ref, batch_of(trainer), name, average)
    (logged,) = logs_of(trainer)
    for metric in METRICS:
        relative = RELATIVE if metric == "loss" else EXACT  # transformers sums the loss in fp32
        assert logged[metric] == pytest.approx(truth[metric].mean().item(), rel=relative), metric
    assert_close(recorder.steps[0], plain_gradients(truth["loss"].mean(), policy), EXACT)


SAME_AS_TRL = {
    "dpo is sigmoid": ({"loss_type": "dpo", "beta": 0.2}, {"loss_type": "sigmoid", "beta": 0.2}),
    "bce is bco_pair": ({"loss_type": "bce"}, {"loss_type": "bco_pair", "beta": 1.0}),
    "bce with alpha=1/2 is nca_pair": ({"loss_type": "bce", "alpha": 0.5}, {"loss_type": "nca_pair", "beta": 1.0}),
}


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
@pytest.mark.parametrize(("ours", "theirs"), SAME_AS_TRL.values(), ids=SAME_AS_TRL)
def test_a_loss_is_that_of_trl_step_by_step(
    tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], precompute: bool
) -> None:
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "train_dataset": make_pairs(20),  # every micro-batch is full, where TRL's mean of means is the mean
        "precompute_ref_log_probs": precompute,
    }
    initial = make_model(0).state_dict()
    mine = make_trainer(tmp_path / "dil", average_log_prob=False, **ours, **options)
    mine.train()
    own = make_trainer(tmp_path / "trl", trl.DPOTrainer, trl.DPOConfig, **theirs, **options)
    own.train()
    assert_close(
        {name: value - initial[name] for name, value in weights_of(mine).items()},
        {name: value - initial[name] for name, value in weights_of(own).items()},
        1e-3,  # what two fp32 runs may differ by after five steps
    )
    for actual, expected in zip(logs_of(mine), logs_of(own), strict=True):
        for metric in METRICS:
            assert actual[metric] == pytest.approx(expected[metric], rel=1e-4, abs=1e-4), metric


STATISTICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "num_tokens")


def test_the_statistics_are_those_of_trl(tmp_path: Path) -> None:
    """With one micro-batch a step, where TRL's mean of means is the mean."""

    def run(**options: Any) -> Any:
        trainer = make_trainer(
            tmp_path,
            arguments={"eval_dataset": make_pairs(4, seed=1)},
            per_device_train_batch_size=3,
            per_device_eval_batch_size=4,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=2,
            **options,
        )
        trainer.train()
        return [log for log in trainer.state.log_history if "train_runtime" not in log]

    ours = run(loss_type="dpo", average_log_prob=False)
    theirs = run(trainer_class=trl.DPOTrainer, config_class=trl.DPOConfig)
    for actual, expected in zip(ours, theirs, strict=True):
        prefix = "" if "loss" in actual else "eval_"
        for metric in (*METRICS, *STATISTICS):
            assert actual[prefix + metric] == pytest.approx(expected[prefix + metric], rel=1e-4, abs=1e-5), metric
        assert expected.keys() <= actual.keys()


def accumulated(output_dir: Path, batch_size: int, accumulation: int, **options: Any) -> dict[str, Tensor]:
    trainer = make_trainer(
        output_dir,
        model=make_model(0).double(),
        ref_model=make_model(1).double(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        **options,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    return weights_of(trainer)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 4), (3, 3), (1, 7)])
def test_accumulation_gives_the_weights_of_the_full_batch(tmp_path: Path, batch_size: int, accumulation: int) -> None:
    full = accumulated(tmp_path, 7, 1)
    assert_close(accumulated(tmp_path, batch_size, accumulation), full, 1e-12)
    moved = max((value - make_model(0).double().state_dict()[name]).abs().max() for name, value in full.items())
    assert moved > 1e-3


def test_what_accumulation_is_compared_with_in_the_readme(tmp_path: Path) -> None:
    """TRL weighs the pair of a micro-batch of one as much as the two of another together."""
    options = {"trainer_class": trl.DPOTrainer, "config_class": trl.DPOConfig, "learning_rate": 1.0}
    full, split = accumulated(tmp_path, 7, 1, **options), accumulated(tmp_path, 2, 4, **options)
    assert max((full[name] - split[name]).abs().max() for name in full) > 1e-3


class HostReads(TorchDispatchMode):
    """The files in which a value of a tensor is read by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            callers = (Path(frame.filename) for frame in reversed(traceback.extract_stack()[:-1]))
            self.files.append(next(path.name for path in callers if "torch" not in path.parts))
        return func(*args, **(kwargs or {}))


def test_a_micro_batch_does_not_wait_for_the_device(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    batch = batch_of(trainer)
    trainer.model.train()
    with HostReads() as reads:
        trainer.get_batch_samples(iter([batch, batch]), 2, torch.device("cpu"))
        trainer.compute_loss(trainer.model, batch)
    # transformers looks for padding; the rest is checked on the CPU only
    assert set(reads.files) <= {"masking_utils.py", "checks.py", "logit_processing.py", "linear.py"}


def test_a_head_that_cannot_be_fused_is_scored_from_logits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(model: Any) -> dict[str, Tensor]:
        trainer = make_trainer(tmp_path, model=model.double(), ref_model=make_model(1).double(), max_steps=2)
        trainer.train()
        return weights_of(trainer)

    model = make_model(0)
    model.lm_head.forward = functools.partial(torch.nn.Linear.forward, model.lm_head)
    actual = run(model)
    assert "taken from logits, since LlamaForCausalLM: the forward of its output head was replaced" in caplog.text
    assert_close(actual, run(make_model(0)), EXACT)
    model = make_model(0)
    model.lm_head.forward = functools.partial(torch.nn.Linear.forward, model.lm_head)
    with pytest.raises(ValueError, match="fused_head=True was given, but LlamaForCausalLM: the forward"):
        make_trainer(tmp_path, model=model, fused_head=True, max_steps=2).train()


class Unscored:
    """TRL's collator, but the rejected responses of pairs with an odd prompt have no scored token."""

    def __init__(self) -> None:
        self.collate = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=0)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.collate(examples)
        unscored = [len(examples) + index for index, row in enumerate(examples) if len(row["prompt_ids"]) % 2]
        batch["completion_mask"][unscored] = 0
        return batch


def test_pairs_without_a_scored_token_are_left_out_of_the_mean(tmp_path: Path) -> None:
    arguments = {"data_collator": Unscored()}
    actual = accumulated(tmp_path, 1, 7, arguments=arguments)
    counted = [pair for pair in make_pairs(7).to_list() if len(pair["prompt"].split()) % 2 == 0]
    assert 2 <= len(counted) <= 5
    assert_close(actual, accumulated(tmp_path, len(counted), 1, train_dataset=Dataset.from_list(counted)), 1e-12)


DISTRIBUTED = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from test_trl import distributed_run
distributed_run(Path(sys.argv[1]), per_device_train_batch_size=2, ddp_backend="gloo")
"""


def distributed_run(output_dir: Path, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The run that one and two processes must make alike: 3 micro-batches an epoch, two of them a step.

    Each process meets another number of pairs that do not count, and the evaluation set leaves one a pair short.
    """
    recorder = GradientRecorder()
    # TRL shares precomputed log-probs between processes through the cache beside the files of a data set.
    pairs = {split: load_from_disk(str(output_dir / split)) for split in ("train", "test")}
    trainer = make_trainer(
        output_dir,
        model=make_model(0).double(),
        ref_model=make_model(1).double(),
        train_dataset=pairs["train"],
        arguments={"callbacks": [recorder], "eval_dataset": pairs["test"], "data_collator": Unscored()},
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        precompute_ref_log_probs=True,
        per_device_eval_batch_size=2,
        **options,
    )
    trainer.train()
    trainer.evaluate()
    result = (recorder.steps[0], trainer.state.log_history)
    if trainer.is_world_process_zero():
        torch.save(result, output_dir / "result.pt")
    return result


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for run in ("one", "two"):
        make_pairs(12, seed=3).save_to_disk(tmp_path / run / "train")
        make_pairs(5, seed=2).save_to_disk(tmp_path / run / "test")
    run_on_two_processes(DISTRIBUTED, tmp_path, tmp_path / "two")
    gradients, history = torch.load(tmp_path / "two" / "result.pt")
    expected_gradients, expected_history = distributed_run(tmp_path / "one", per_device_train_batch_size=4)
    assert_close(gradients, expected_gradients, 1e-7)  # the reference sums are stored in fp32
    metrics = (*METRICS, *STATISTICS)
    compared = {*metrics, *(f"eval_{metric}" for metric in metrics)}
    for actual, expected in zip(history, expected_history, strict=True):
        for key in expected.keys() & compared:
            assert actual[key] == pytest.approx(expected[key], rel=1e-5), key


def test_lora_takes_the_model_without_the_adapter_as_reference(tmp_path: Path) -> None:
    base, recorder = make_model(0).double(), GradientRecorder()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(base),
        arguments={"peft_config": lora, "callbacks": [recorder]},
        per_device_train_batch_size=7,
        max_steps=2,
    )
    policy = peft.get_peft_model(copy.deepcopy(base), lora)
    policy.load_state_dict(trainer.model.state_dict())
    trainer.train()
    truth = plain_pairs(policy, base, batch_of(trainer))
    for metric in set(METRICS) - {"loss"}:
        assert logs_of(trainer)[0][metric] == pytest.approx(truth[metric].mean().item(), rel=RELATIVE), metric
    gradients = plain_gradients(truth["loss"].mean(), policy)
    assert all("lora_" in name for name in gradients)
    assert_close(recorder.steps[0], gradients, RELATIVE)  # peft keeps adapters in fp32


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
def test_an_adapter_that_was_trained_before_is_its_own_reference(tmp_path: Path, precompute: bool) -> None:
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(0), lora)
    trainer = make_trainer(
        tmp_path, model=model, per_device_train_batch_size=7, max_steps=2, precompute_ref_log_probs=precompute
    )
    trainer.train()
    first, second = logs_of(trainer)
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert first["loss"] == pytest.approx(-0.5, abs=1e-6)
    assert second["rewards/margins"] > 1e-4


def test_prompt_tuning_scores_the_real_tokens(tmp_path: Path) -> None:
    """Virtual tokens precede the prompt, so the model returns more logits than there are labels."""
    base, recorder = make_model(0).double(), GradientRecorder()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    arguments = {"peft_config": config, "callbacks": [recorder]}
    trainer = make_trainer(
        tmp_path, model=copy.deepcopy(base), arguments=arguments, per_device_train_batch_size=7, max_steps=1
    )
    policy = peft.get_peft_model(copy.deepcopy(base), config)
    policy.load_state_dict(trainer.model.state_dict())
    trainer.train()
    truth = plain_pairs(policy, base, batch_of(trainer))
    assert_close(recorder.steps[0], plain_gradients(truth["loss"].mean(), policy))


def test_precomputed_references_train_as_live_ones(tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        models = {"model": make_model(0).double(), "ref_model": make_model(1).double()}
        trainer = make_trainer(tmp_path, **models, per_device_train_batch_size=3, max_steps=3, **options)
        trainer.train()
        return trainer

    live, stored = run(), run(precompute_ref_log_probs=True)
    batch = batch_of(live)
    truth = plain_pairs(make_model(1).double(), make_model(1).double(), batch)
    for response in ("chosen", "rejected"):  # sums, which is what TRL caches
        sums = torch.tensor(stored.train_dataset[f"ref_{response}_logps"])
        torch.testing.assert_close(sums, truth[f"logps/{response}"].float(), rtol=1e-6, atol=0)
    assert_close(weights_of(stored), weights_of(live), 1e-6)  # the stored sums are fp32


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
def test_evaluation_is_the_mean_over_all_pairs(tmp_path: Path, precompute: bool) -> None:
    policy, ref, pairs = make_model(0), make_model(1), make_pairs(5, seed=1)
    trainer = make_trainer(
        tmp_path,
        model=policy,
        ref_model=ref,
        arguments={"eval_dataset": {"held_out": pairs}},
        per_device_eval_batch_size=2,
        precompute_ref_log_probs=precompute,
    )
    metrics = trainer.evaluate()
    truth = plain_pairs(
        make_model(0).double(), make_model(1).double(), batch_of(trainer, trainer.eval_dataset["held_out"])
    )
    for metric in METRICS:
        assert metrics[f"eval_held_out_{metric}"] == pytest.approx(truth[metric].mean().item(), rel=RELATIVE), metric


def test_compute_metrics_gets_the_logits(tmp_path: Path) -> None:
    shapes = []
    trainer = make_trainer(
        tmp_path,
        arguments={
            "eval_dataset": make_pairs(3, seed=1),
            "compute_metrics": lambda result: shapes.append(result.predictions.shape) or {"seen": 1.0},
        },
        per_device_eval_batch_size=3,
    )
    assert trainer.evaluate()["eval_seen"] == 1.0
    batch = batch_of(trainer, trainer.eval_dataset)
    assert shapes == [(*batch["input_ids"].shape, 288)]


def resumable(output_dir: Path, **options: Any) -> Any:
    return make_trainer(
        output_dir,
        per_device_train_batch_size=2,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        optim="adamw_torch",
        train_sampling_strategy="random",
        **options,
    )


def test_a_resumed_run_continues_exactly(tmp_path: Path) -> None:
    whole = resumable(tmp_path)
    whole.train()
    resumed = resumable(tmp_path, model=make_model(5))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for actual, expected in zip(logs_of(resumed), logs_of(whole), strict=True):
        assert {**actual, "num_tokens": 0} == {**expected, "num_tokens": 0}  # TRL counts them from the resumption
    for name, value in weights_of(whole).items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    card = (tmp_path / "README.md").read_text()
    assert "trained with DIL" in card
    assert "2503.05079" in card
    assert "xiao2025connection" in card


@pytest.mark.skipif(
    Version(trl.__version__) < Version("1.12"), reason="needs TRL 1.12 for the coefficient of the model"
)
def test_the_router_of_a_mixture_is_balanced_as_by_trl(tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        config = MixtralConfig(
            vocab_size=288,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
        )
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
        trainer = make_trainer(
            tmp_path,
            model=model,
            ref_model=copy.deepcopy(model),
            train_dataset=make_pairs(8),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            learning_rate=0.1,
            **options,
        )
        trainer.train()
        return trainer

    ours = run(loss_type="dpo", beta=0.1, average_log_prob=False)
    theirs = run(trainer_class=trl.DPOTrainer, config_class=trl.DPOConfig)
    for actual, expected in zip(logs_of(ours), logs_of(theirs), strict=True):
        for metric in ("loss", "aux_loss", "rewards/margins", "logps/chosen"):
            assert actual[metric] == pytest.approx(expected[metric], rel=1e-4, abs=1e-4), metric
    assert logs_of(ours)[0]["loss"] > 1.0  # log 2 and the router's half


def test_conversations_and_truncation_are_those_of_trl(tmp_path: Path) -> None:
    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content.strip()}]

    pairs = Dataset.from_list(
        [
            {
                "prompt": message("user", pair["prompt"]),
                "chosen": message("assistant", pair["chosen"]),
                "rejected": message("assistant", pair["rejected"]),
            }
            for pair in make_pairs(6)
        ]
    )
    options = {"train_dataset": pairs, "max_length": 14, "per_device_train_batch_size": 6, "max_steps": 2}
    ours = make_trainer(tmp_path / "dil", loss_type="bce", average_log_prob=False, **options)
    ours.train()
    theirs = make_trainer(tmp_path / "trl", trl.DPOTrainer, trl.DPOConfig, loss_type="bco_pair", beta=1.0, **options)
    theirs.train()
    assert batch_of(ours)["input_ids"].shape[1] == 14
    for actual, expected in zip(logs_of(ours), logs_of(theirs), strict=True):
        assert actual["logps/rejected"] == pytest.approx(expected["logps/rejected"], rel=1e-4)
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    model = make_model(0)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    trainer = make_trainer(tmp_path, model=model, per_device_train_batch_size=2, max_steps=2)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is not finite"):
        trainer.train()


OTHER_VALUES = {
    "label_smoothing": 0.1,
    "label_smoothing_factor": 0.1,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.7,
    "use_weighting": True,
    "ld_alpha": 0.5,
    "loss_weights": [2.0],
    "discopop_tau": 0.1,
    "padding_free": True,
}


@pytest.mark.parametrize("name", UNUSED_OPTIONS)
def test_an_option_of_trl_that_no_loss_uses_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}="):
        DILConfig(str(tmp_path), bf16=False, use_cpu=True, **{name: OTHER_VALUES[name]})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"beta": 0.1}, "beta=0.1 was given, but loss_type='lsif' has no beta"),
        ({"loss_type": "dpo", "alpha": 0.5}, "not separable"),
        ({"loss_type": "ipo"}, "unknown loss_type 'ipo'; available: lsif"),
        ({"loss_type": "sigmoid"}, "loss_type='dpo' with average_log_prob=False"),
        ({"loss_type": "bco_pair"}, "loss_type='bce' with average_log_prob=False"),
        ({"loss_type": ["lsif", "bce"]}, "one loss"),
        ({"alpha": 1.5}, "alpha must be in"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DILConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


def test_a_reference_that_follows_the_policy(tmp_path: Path) -> None:
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    trainer = make_trainer(tmp_path, per_device_train_batch_size=7, max_steps=3, **options)
    trainer.train()
    rewards = [log["rewards/chosen"] for log in logs_of(trainer)]
    assert rewards[1] > 0.1
    assert rewards[2] == pytest.approx(0.0, abs=1e-6), "the reference became the policy after the second step"


def test_the_options_of_a_launcher_are_taken_over(tmp_path: Path) -> None:
    theirs = trl.DPOConfig(str(tmp_path), beta=0.3, max_length=77, bf16=False, use_cpu=True, seed=5)
    config = DILConfig.from_dpo_config(theirs, loss_type="dpo", beta=0.2, average_log_prob=False)
    assert (config.loss_type, config.beta, config.average_log_prob) == (["dpo"], 0.2, False)
    assert (config.max_length, config.seed, config.device) == (77, 5, theirs.device)
    assert (theirs.loss_type, theirs.beta) == (["sigmoid"], 0.3)
    with pytest.raises(TypeError, match="max_length"):
        DILConfig.from_dpo_config(theirs, max_length=5)
    with pytest.raises(ValueError, match=r"beta=0.2 was given, but loss_type='lsif' has no beta"):
        DILConfig.from_dpo_config(theirs, beta=0.2)
    theirs.label_smoothing = 0.1
    with pytest.raises(ValueError, match=r"label_smoothing=0.1"):
        DILConfig.from_dpo_config(theirs)


def test_arguments_of_dpo_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got DPOConfig"):
        make_trainer(tmp_path, config_class=trl.DPOConfig)


def test_the_command_line_of_trl_takes_the_options(tmp_path: Path) -> None:
    parser = trl.TrlParser((DILConfig,))
    line = ["--output_dir", str(tmp_path), "--loss_type", "dpo", "--beta", "0.3", "--average_log_prob", "False"]
    (args,) = parser.parse_args_and_config([*line, "--bf16", "False", "--use_cpu", "True"])
    assert (args.loss_type, args.beta, args.average_log_prob, args.alpha) == (["dpo"], 0.3, False, 0.0)
