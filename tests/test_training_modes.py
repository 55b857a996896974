"""Recomputed activations, torch.compile and bf16 change how a step is computed, and its numbers by rounding only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_training import plain_pairs
from tiny_model import make_model, make_pairs
from tiny_trainer import batch_of, make_trainer, trained_weights
from torch import Tensor

ROUNDING = 1e-5  # fp32, in another order, after two steps
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}  # traces all that inductor would, quickly
MODES: dict[str, dict[str, Any]] = {
    "recomputed, reentrant": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "recomputed": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "compiled": COMPILED,
    "compiled, recomputed": {**COMPILED, "activation_checkpointing": True},
}


def run(folder: Path, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    trainer = make_trainer(
        folder,
        model=make_model(),
        ref_model=make_model(1),
        train_sampling_strategy="sequential",
        optim="sgd",
        max_steps=2,
        **options,
    )
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history[:2]], trained_weights(trainer)


@pytest.mark.parametrize("fused_head", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_execution_changes_nothing(tmp_path: Path, mode: str, fused_head: bool) -> None:
    losses, weights = run(tmp_path, fused_head=fused_head, **MODES[mode])
    expected_losses, expected = run(tmp_path, fused_head=fused_head)
    assert losses == pytest.approx(expected_losses, rel=ROUNDING)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=ROUNDING, atol=ROUNDING, msg=name)


@pytest.mark.parametrize("option", ["padding_free", "prefix_sharing"])
def test_a_compiled_model_takes_joined_rows_of_any_lengths(
    tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve batches, no two of the same lengths, and ten layers: more graphs than torch makes would be an error."""
    layer_graphs, compile_graph = [], torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        layer_graphs.extend(node.name for node in graph.graph.nodes if "silu" in str(node.target))
        return compile_graph(graph, inputs, **options)

    torch._dynamo.reset()
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "aot_eager", backend)
    options = {"train_dataset": make_pairs(24, seed=3), "per_device_train_batch_size": 2, "max_steps": 12}

    def losses(**more: Any) -> list[float]:
        models = {"model": make_model(num_hidden_layers=10), "ref_model": make_model(1, num_hidden_layers=10)}
        trainer = make_trainer(tmp_path, **models, optim="sgd", logging_steps=1, **options, **{option: True}, **more)
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = losses(**COMPILED)
    assert 1 <= len(layer_graphs) <= 8
    assert compiled == pytest.approx(losses(), rel=ROUNDING, abs=ROUNDING)


def test_recomputing_really_recomputes(tmp_path: Path) -> None:
    """The layers run twice for the policy, and once for the reference, which has no backward."""
    calls = {"policy": 0, "reference": 0}
    policy, ref = make_model(), make_model(1)
    for name, model in (("policy", policy), ("reference", ref)):
        model.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    trainer = make_trainer(tmp_path, model=policy, ref_model=ref, max_steps=1, activation_checkpointing=True)
    calls.update(policy=0, reference=0)  # the checks at construction run the models, too
    trainer.train()
    assert calls == {"policy": 2, "reference": 1}


@pytest.mark.parametrize("fused_head", [True, False], ids=["fused", "logits"])
def test_bf16_is_as_near_to_the_truth_as_plain_autocast(tmp_path: Path, fused_head: bool) -> None:
    pairs = make_pairs(16, seed=5)
    options = {"train_dataset": pairs, "per_device_train_batch_size": 16, "max_steps": 1, "bf16": True}
    trainer = make_trainer(tmp_path, model=make_model(), ref_model=make_model(1), fused_head=fused_head, **options)
    trainer.train()
    batch = batch_of(pairs)
    with torch.autocast("cpu", torch.bfloat16):
        plain = plain_pairs(make_model(), make_model(1), batch)
    truth = plain_pairs(make_model().double(), make_model(1).double(), batch)
    logged = trainer.state.log_history[0]
    for metric in ("logps/chosen", "logps/rejected", "rewards/margins"):
        exact = truth[metric].mean().item()
        error, plain_error = abs(logged[metric] - exact), abs(plain[metric].mean().item() - exact)
        assert 0.0 < error <= 2 * plain_error, (metric, error, plain_error)
