"""Threads that share a model with the fused head, and copies of it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_head_models import RELATIVE, assert_close, assert_same, batch, fused, largest, make, own, with_lora
from torch import nn
from torch.multiprocessing.spawn import spawn

from dil_kernels.models.fused_head import install_fused_head, remove_fused_head

WAIT = 60.0  # seconds, of a thread for another


def test_scoring_does_not_show_in_other_threads():
    """One thread is kept inside the forward while it scores; the others call the model meanwhile."""
    model = make("Gemma2ForCausalLM").eval()
    inputs, labels, _ = batch()
    others = batch(seed=1)
    expected, expected_others = own(model, inputs, labels), own(model, others[0], others[1], temperature=0.5)
    logits = model(**inputs).logits
    generated = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    install_fused_head(model)
    inside, done = threading.Event(), threading.Event()

    def wait(module: nn.Module, args: Any) -> None:
        if threading.current_thread().name == "scoring":
            inside.set()
            assert done.wait(WAIT)

    handle = model.model.norm.register_forward_pre_hook(wait)
    result: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: result.append(fused(model, inputs, labels)), name="scoring")
    thread.start()
    try:
        assert inside.wait(WAIT)
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), generated)
        actual = fused(model, others[0], others[1], temperature=0.5)
        assert_close(actual, expected_others, RELATIVE * largest(expected_others), "log-probs of this thread")
    finally:
        done.set()
        thread.join()
        handle.remove()
    assert_close(result[0], expected, RELATIVE * largest(expected), "log-probs of the other thread")


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_at_work_at_once(compiled):
    torch._dynamo.reset()
    model = make("LlamaForCausalLM", num_hidden_layers=1).eval()
    install_fused_head(model)
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    problems = [batch(seed=seed) for seed in range(3)]
    expected = [(own(model, *problem[:2]), model(**problem[0]).logits) for problem in problems]
    with torch.no_grad():
        fused(called, *problems[0][:2]), called(**problems[0][0])

    @torch.no_grad()
    def work(index: int) -> tuple[float, float]:
        inputs, labels, _ = problems[index % 3]
        logps, logits = expected[index % 3]
        return largest(fused(called, inputs, labels) - logps), largest(called(**inputs).logits - logits)

    with ThreadPoolExecutor(4) as pool:
        errors = torch.tensor(list(pool.map(work, range(60))))
    assert errors.max() <= 1e-4, errors.max(0)


def test_a_call_within_a_call_that_scores():
    model, other = make("LlamaForCausalLM"), make("LlamaForCausalLM", seed=1)
    inputs, labels, _ = batch()
    expected = own(model, inputs, labels), model(**inputs).logits, other(**inputs).logits
    install_fused_head(model)
    install_fused_head(other)
    within: list[torch.Tensor] = []

    def call(module: nn.Module, args: Any) -> None:
        handle.remove()
        within.extend([model(**inputs).logits, other(**inputs).logits, fused(other, inputs, labels)])

    handle = model.model.norm.register_forward_pre_hook(call)
    assert_close(fused(model, inputs, labels), expected[0], RELATIVE * largest(expected[0]), "log-probs")
    assert torch.equal(within[0], expected[1])
    assert torch.equal(within[1], expected[2])
    assert torch.equal(within[2], fused(other, inputs, labels))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_deep_copy_has_its_own_head(name):
    model = make(name)
    inputs, labels, upstream = batch()
    install_fused_head(model)
    clone = copy.deepcopy(model)
    expected = own(model, inputs, labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(fused(clone, inputs, labels), expected, RELATIVE * largest(expected), "log-probs")
    assert_same(clone, inputs, labels, upstream)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_saved_checkpoint_is_as_without_the_head(tmp_path):
    model = make("Qwen2ForCausalLM")
    inputs, labels, _ = batch()
    keys = list(model.state_dict())
    install_fused_head(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert "forward" not in vars(loaded)
    install_fused_head(loaded)
    assert torch.equal(fused(loaded, inputs, labels), fused(model, inputs, labels))


def through_torch_save(model: nn.Module, directory: Path) -> nn.Module:
    torch.save(model, directory / "model.pt")
    return torch.load(directory / "model.pt", weights_only=False)


COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "torch.save": through_torch_save,
    "pickle": lambda model, directory: pickle.loads(pickle.dumps(model)),
    "deepcopy": lambda model, directory: copy.deepcopy(model),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": lambda: make("Qwen2ForCausalLM"),
    "LoRA": lambda: with_lora(make("GraniteForCausalLM"), target_modules=["q_proj", "lm_head"]),
    "another head": lambda: with_lora(make("LlamaForCausalLM"), target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", COPIES)
def test_copies_score_alike(way, name, tmp_path):
    model = MODELS[name]().eval()
    inputs, labels, upstream = batch()
    install_fused_head(model)
    expected = fused(model, inputs, labels)
    clone = COPIES[way](model, tmp_path)
    assert torch.equal(fused(clone, inputs, labels), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fused(clone, inputs, labels), expected)
    assert_same(clone, inputs, labels, upstream)
    remove_fused_head(clone)
    again = COPIES[way](clone, tmp_path)
    assert not any("forward" in vars(module) for module in again.modules())
    assert torch.equal(again(**inputs).logits, clone(**inputs).logits)


def _score(rank: int, model: nn.Module, path: str) -> None:
    inputs, labels, _ = batch()
    torch.save((fused(model, inputs, labels).detach(), model(**inputs).logits.detach()), path)


def test_another_process_scores_alike(tmp_path):
    model = make("Qwen2ForCausalLM").eval()
    inputs, labels, _ = batch()
    install_fused_head(model)
    spawn(_score, (model, str(tmp_path / "scores.pt")), nprocs=1)
    logps, logits = torch.load(tmp_path / "scores.pt")
    assert_close(logps, fused(model, inputs, labels), RELATIVE * largest(logps), "log-probs")
    assert_close(logits, model(**inputs).logits, RELATIVE * largest(logits), "logits")
