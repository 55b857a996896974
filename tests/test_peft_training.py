"""DILTrainer on adapters: the reference is the policy as it was at the start, and only the adapter changes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from plain_training import RELATIVE, GradientRecorder, assert_all_close, plain_logps, plain_pairs
from tiny_lora import TARGETS, assert_reference_is, batch_on, lora_config, new_lora, reference_logps, trained_lora
from tiny_model import make_model, make_pairs
from tiny_trainer import assert_bitwise_equal, batch_of, make_trainer, trained_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dil_kernels.data.batches import Batch
from dil_kernels.trainer import DILTrainer
from dil_kernels.training.metrics import METRICS

STARTS: dict[str, Any] = {
    "new": lambda: new_lora(),
    "new, with lm_head": lambda: new_lora(target_modules=[*TARGETS, "lm_head", "embed_tokens"]),
    "new, whole lm_head": lambda: new_lora(modules_to_save=["lm_head"]),
    "new, whole tied lm_head": lambda: new_lora(make_model(), modules_to_save=["lm_head"]),
    "new, whole tied embeddings": lambda: new_lora(
        make_model(), modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "new, DoRA": lambda: new_lora(use_dora=True),
    "new, PiSSA": lambda: new_lora(init_lora_weights="pissa"),
    "new, with biases": lambda: new_lora(make_model(attention_bias=True), bias="lora_only"),
    "trained": lambda: trained_lora(),
    "trained, with lm_head": lambda: trained_lora(target_modules=[*TARGETS, "lm_head", "embed_tokens"]),
    "trained, whole lm_head": lambda: trained_lora(modules_to_save=["lm_head"]),
    "trained, PiSSA": lambda: trained_lora(init_lora_weights="pissa", use_rslora=True),
    "trained, layers twice": lambda: trained_lora(layer_replication=[[0, 2], [1, 2]]),
    "trained, with biases": lambda: trained_lora(bias="all"),
    "trained, DoRA": lambda: trained_lora(use_dora=True),
    "IA3": lambda: get_peft_model(
        make_model(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
}
# Where the policy's weights cannot serve.
SECOND_MODEL = {"new, with biases", "trained, with biases", "trained, DoRA", "IA3"}
COPIED_ADAPTER = {
    "new, PiSSA",
    "trained",
    "trained, with lm_head",
    "trained, whole lm_head",
    "trained, PiSSA",
    "trained, layers twice",
}


def trainable_names(model: Any) -> set[str]:
    """Of all weights that are trained, those of tied ones, too."""
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}


@pytest.mark.parametrize("fused_head", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("start", STARTS)
def test_the_reference_stays_the_policy_at_the_start(tmp_path: Path, start: str, fused_head: bool) -> None:
    model = STARTS[start]()
    initial = copy.deepcopy(model)
    trainable = trainable_names(model)
    options = {"fused_head": fused_head, "train_sampling_strategy": "sequential", "max_steps": 3}
    trainer = make_trainer(tmp_path, model=model, **options)
    assert (trainer.ref_model is not None) == (start in SECOND_MODEL)
    assert ("dil_reference" in trainer.model.peft_config) == (start in COPIED_ADAPTER)
    assert_reference_is(trainer, initial)
    trainer.train()
    assert abs(trainer.state.log_history[0]["rewards/chosen"]) < 1e-6  # DoRA rounds where LoRA adds nothing
    assert_reference_is(trainer, initial)
    # The policy is not the reference any more, and nothing but the adapter has changed.
    moved = trainer.batch_loss.token_logps(trainer.model.eval(), Batch.of(batch_on(trainer))) - reference_logps(trainer)
    assert moved.abs().max() > 0.01
    assert trainable_names(model) == trainable
    before = initial.state_dict()
    changed = {name for name, value in model.state_dict().items() if name in before and not value.equal(before[name])}
    assert changed <= trainable
    assert any("lora_A" in name or "ia3" in name for name in changed)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_step_of_an_adapter_is_that_of_plain_pytorch(tmp_path: Path, reentrant: bool | None) -> None:
    policy, pairs, recorder = trained_lora(lora_dropout=0.0), make_pairs(5, seed=3), GradientRecorder()
    policy.add_adapter("reference", lora_config(r=2, target_modules=["o_proj"], lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B.reference" in name:
                parameter.fill_(0.05)
    recorder.on_pre_optimizer_step = lambda args, state, control, model, **_: recorder.steps.append(
        {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
    )
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(policy),
        train_dataset=pairs,
        callbacks=[recorder],
        per_device_train_batch_size=5,
        max_steps=1,
        max_grad_norm=0.0,
        ref_adapter_name="reference",
        gradient_checkpointing=reentrant is not None,
        gradient_checkpointing_kwargs=None if reentrant is None else {"use_reentrant": reentrant},
    )
    trainer.train()
    ref = copy.deepcopy(policy)
    ref.set_adapter("reference")
    truth = plain_pairs(policy.double(), ref.double(), batch_of(pairs))
    for metric in METRICS:
        assert trainer.state.log_history[0][metric] == pytest.approx(
            truth[metric].mean().item(), rel=RELATIVE, abs=RELATIVE
        ), metric
    named = {name: value for name, value in policy.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(truth["loss"].mean(), list(named.values()))
    assert_all_close(recorder.steps[0], dict(zip(named, gradients, strict=True)))


class ShapesMade(TorchDispatchMode):
    """The shapes of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(tensor.shape) for tensor in tree_leaves(output) if isinstance(tensor, Tensor)}
        return output


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_head_makes_no_gradient_of_its_weight(tmp_path: Path, frozen: bool) -> None:
    trainer = make_trainer(tmp_path, model=new_lora(), fused_head=True)
    head = trainer.model.get_output_embeddings()
    head.weight.requires_grad_(not frozen)
    loss = trainer.compute_loss(trainer.model, batch_on(trainer))
    with ShapesMade() as made:
        loss.backward()
    assert (head.weight.grad is None) == frozen
    assert (tuple(head.weight.shape) in made.shapes) == (not frozen)


@pytest.mark.parametrize("start", ["new", "trained", "trained, whole lm_head"])
def test_a_checkpoint_holds_the_adapter_alone_and_resumes_exactly(tmp_path: Path, start: str) -> None:
    def run(folder: str, **options: Any) -> DILTrainer:
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "cosine"}
        return make_trainer(tmp_path / folder, model=STARTS[start](), **saving, **options)

    whole = run("whole", disable_dropout=False)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert not [path for path in checkpoint.iterdir() if path.is_dir()], "more than one adapter was saved"
    assert not (checkpoint / "model.safetensors").exists()
    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoint-2")
    resumed = run("resumed", disable_dropout=False)
    resumed.train(resume_from_checkpoint=True)
    assert_bitwise_equal(trained_weights(resumed), trained_weights(whole))
    assert_reference_is(resumed, STARTS[start]())
    for actual, expected in zip(resumed.state.log_history[:4], whole.state.log_history[:4], strict=True):
        assert {name: actual[name] for name in METRICS} == {name: expected[name] for name in METRICS}
    # What is saved is loaded by peft, onto the base alone.
    whole.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(make_model(tie_word_embeddings=False), tmp_path / "saved")
    logps, _ = plain_logps(loaded.double(), batch_on(whole))
    policy = whole.batch_loss.token_logps(whole.model.eval(), Batch.of(batch_on(whole)))
    torch.testing.assert_close(policy.double(), logps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["new", "trained"])
def test_precomputed_references_train_an_adapter_alike(tmp_path: Path, start: str) -> None:
    runs = []
    for precompute in (False, True):
        trainer = make_trainer(tmp_path, model=STARTS[start](), precompute_ref_log_probs=precompute, optim="sgd")
        trainer.train()
        runs.append({n: v for n, v in trained_weights(trainer).items() if "dil_reference" not in n})
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("start", STARTS)
def test_a_run_is_resumed_with_references_precomputed_or_not(tmp_path: Path, start: str) -> None:
    def run(**options: Any) -> DILTrainer:
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        return make_trainer(tmp_path, model=STARTS[start](), **saving, **options)

    run().train()
    for precompute in (True, False):
        shutil.rmtree(tmp_path / "checkpoint-2")
        run(precompute_ref_log_probs=precompute).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize(
    "names", [("policy",), ("default", "policy"), ("reference", "policy"), ("reference", "default")]
)
def test_the_best_policy_is_that_of_its_checkpoint(tmp_path: Path, names: tuple[str, ...], precompute: bool) -> None:
    *others, trained = names
    torch.manual_seed(1)
    model = get_peft_model(make_model(tie_word_embeddings=False), lora_config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora_config())
    model.set_adapter(trained)
    trainer = make_trainer(
        tmp_path,
        model=model,
        ref_adapter_name=others[0] if others else None,
        precompute_ref_log_probs=precompute,
        eval_dataset=make_pairs(5, seed=3),
        learning_rate=0.3,  # too high: the last is not the best
        max_steps=4,
        load_best_model_at_end=True,
        **{f"{what}_strategy": "steps" for what in ("eval", "save")},
        **{f"{what}_steps": 1 for what in ("eval", "save")},
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert losses[4] > min(losses.values())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-6)
    checkpoint = Path(trainer.state.best_model_checkpoint)
    assert checkpoint.parent == tmp_path
    held = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("adapter_model*")}
    assert held == {"adapter_model.safetensors" if trained == "default" else f"{trained}/adapter_model.safetensors"}


def test_a_configuration_makes_the_adapter(tmp_path: Path) -> None:
    def run() -> DILTrainer:
        options = {"train_sampling_strategy": "sequential", "max_steps": 2}
        return make_trainer(tmp_path, model=make_model(), peft_config=lora_config(), **options)

    trainer, again = run(), run()
    assert trainer.ref_model is None
    assert_reference_is(trainer, make_model())
    trainer.train(), again.train()
    assert_bitwise_equal(trained_weights(again), trained_weights(trainer))


def test_a_reference_model_goes_before_the_adapter(tmp_path: Path) -> None:
    ref = make_model(1)
    trainer = make_trainer(tmp_path, model=new_lora(), ref_model=ref, max_steps=1)
    assert trainer.ref_model is ref
    assert_reference_is(trainer, make_model(1))


@pytest.mark.parametrize("trained", ["biases", "norms"])
def test_a_reference_adapter_does_not_follow_base_weights_that_are_trained(tmp_path: Path, trained: str) -> None:
    model = new_lora(make_model(attention_bias=True), bias="all" if trained == "biases" else "none")
    model.add_adapter("reference", lora_config(r=2, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if trained == "norms" and "norm" in name:
            parameter.requires_grad_(True)
    truth = copy.deepcopy(model)
    truth.set_adapter("reference")
    options = {"ref_adapter_name": "reference", "learning_rate": 0.05, "max_steps": 3}
    trainer = make_trainer(tmp_path, model=model, **options)
    assert_reference_is(trainer, truth)
    trainer.train()
    assert_reference_is(trainer, truth)


def test_a_reference_that_training_would_change_is_refused(tmp_path: Path) -> None:
    base = make_model()
    with pytest.raises(ValueError, match="ref_model shares weights with the model that training changes: base_model"):
        make_trainer(tmp_path, model=new_lora(base), ref_model=base)
    model, ref_model = make_model(), make_model(1)
    ref_model.set_input_embeddings(model.get_input_embeddings())
    with pytest.raises(ValueError, match=r"training changes: model\.embed_tokens\.weight; leave it out"):
        make_trainer(tmp_path, model=model, ref_model=ref_model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.get_input_embeddings().requires_grad_(False)
    make_trainer(tmp_path, model=model, ref_model=ref_model, max_steps=1).train()


def test_a_second_stage_starts_where_the_first_ended(tmp_path: Path) -> None:
    model = trained_lora()
    first = make_trainer(tmp_path / "first", model=model, max_steps=2)
    start = copy.deepcopy(model)
    first.train()
    middle = copy.deepcopy(model)
    second = make_trainer(tmp_path / "second", model=model, max_steps=2)
    assert_reference_is(second, middle)
    second.train()
    assert_reference_is(second, middle)
    assert_reference_is(first, start)
    second.save_model()
    assert [path.name for path in (tmp_path / "second").iterdir() if path.is_dir()] == []


def merged() -> PeftModel:
    model = trained_lora()
    model.merge_adapter()
    return model


PROMPTS = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"peft_config": {"r": 4}}, TypeError, "peft_config must be a peft.PeftConfig such as LoraConfig, got dict"),
        ({"peft_config": lora_config(), "model": new_lora()}, ValueError, "model has an adapter already"),
        ({"peft_config": PROMPTS}, NotImplementedError, "adapter 'default' is of peft_type PROMPT_TUNING"),
        ({"ref_adapter_name": "r"}, ValueError, "ref_adapter_name='r' was given, but model is not a PeftModel"),
        (
            {"ref_adapter_name": "r", "model": new_lora()},
            ValueError,
            r"not an adapter of model, which has \['default'\]",
        ),
        ({"ref_adapter_name": "default", "model": new_lora()}, ValueError, "the adapter that training changes"),
        (
            {"ref_adapter_name": "default", "model": new_lora(), "ref_model": make_model()},
            ValueError,
            "ref_adapter_name='default' was given, and ref_model, too",
        ),
        ({"model": merged()}, ValueError, "adapter 'default' is merged into the weights of model"),
        ({"model": new_lora(inference_mode=True)}, ValueError, "load its adapter with is_trainable=True"),
    ],
)
def test_an_adapter_that_could_not_be_right_is_refused(tmp_path: Path, options: Any, error: Any, problem: str) -> None:
    with pytest.raises(error, match=problem):
        make_trainer(tmp_path, **{name: copy.deepcopy(value) for name, value in options.items()})
