"""What the fused head computes follows what the model is at the call, or the call is refused; compiled or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from fused_head_models import RELATIVE, V, assert_close, assert_same, batch, fused, largest, make, own, with_lora
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from dil_kernels.models.fused_head import fused_head_problem, install_fused_head


def test_config_that_changes_later_is_noticed():
    model = make("Gemma2ForCausalLM")
    inputs, labels, upstream = batch()
    install_fused_head(model)
    model.config.final_logit_softcapping = None
    with pytest.raises(RuntimeError, match="install it again"):
        fused(model, inputs, labels)
    assert install_fused_head(model).final_logit_softcapping is None
    assert_same(model, inputs, labels, upstream)


def test_head_that_is_replaced_later_is_noticed():
    model = make("LlamaForCausalLM")
    install_fused_head(model)
    model.resize_token_embeddings(V + 5)
    with pytest.raises(RuntimeError, match="install it again"):
        fused(model, *batch()[:2])


def test_a_head_that_is_sharded_already_takes_part(tmp_path):
    """Measuring it does not call FSDP2's hooks, which would leave it unable to call the model."""
    model = llama()
    inputs, labels, _ = batch()
    expected = own(model, inputs, labels)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in (model.lm_head, model):
            fully_shard(module, mesh=mesh)
        install_fused_head(model)
        torch.testing.assert_close(fused(model, inputs, labels), expected)
        torch.testing.assert_close(own(model, inputs, labels), expected)
    finally:
        dist.destroy_process_group()


def base(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def llama() -> PreTrainedModel:
    return make("LlamaForCausalLM", num_hidden_layers=0)


def granite() -> PreTrainedModel:
    return make("GraniteForCausalLM", num_hidden_layers=0)


def gemma() -> PreTrainedModel:
    return make("Gemma2ForCausalLM", num_hidden_layers=0)


def with_lora_on_the_head() -> nn.Module:
    return with_lora(granite(), target_modules=["lm_head"])


def config(name: str, value: float | None) -> Callable[[nn.Module], None]:
    return lambda model: setattr(base(model).config, name, value)


def adapter(*, active: list[str], **options: object) -> Callable[[nn.Module], None]:
    """Add another adapter, and activate some."""

    def change(model: nn.Module) -> None:
        settings = {"r": 4, "lora_alpha": 9, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
        model.add_adapter("second", LoraConfig(**settings, **options))
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                nn.init.normal_(parameter, std=0.3)
        model.base_model.set_adapter(active)

    return change


def scaling(model: nn.Module) -> None:
    base(model).lm_head.scaling["default"] *= 2


def disabled(model: nn.Module) -> None:
    model.base_model.disable_adapter_layers()


def merged(model: nn.Module) -> None:
    model.merge_adapter()


def wrapped_forward(around: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        head = base(model).lm_head
        forward = head.forward
        head.forward = (lambda x: 2 * forward(x)) if around == "output" else (lambda x: forward(2 * x))

    return change


def replaced_forward(part: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        module = base(model).get_submodule(part)
        module.forward = lambda x: 2 * nn.Linear.forward(module, x)

    return change


def hook(part: str) -> Callable[[nn.Module], None]:
    return lambda model: base(model).get_submodule(part).register_forward_hook(lambda module, args, output: 2 * output)


class DoubledLogits:
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def replaced_class(model: nn.Module) -> None:
    model.__class__ = type("Doubled", (DoubledLogits, type(model)), {})


def other_weight(model: nn.Module) -> None:
    base(model).lm_head.weight = nn.Parameter(torch.randn(V + 3, 32))


def other_bias(model: nn.Module) -> None:
    base(model).lm_head.bias = nn.Parameter(torch.randn(V))


def resized(model: nn.Module) -> None:
    model.resize_token_embeddings(V + 5, mean_resizing=False)


def double(model: nn.Module) -> None:
    model.double()


AGAIN, OTHER = "install it again", "other than plain LoRA"
# the model, what changes, what a call then says; None: the log-probs of the changed model
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], None], str | None]] = {
    "scale": (granite, config("logits_scaling", 0.35), AGAIN),
    "cap": (gemma, config("final_logit_softcapping", 5.0), AGAIN),
    "no cap": (gemma, config("final_logit_softcapping", None), AGAIN),
    "class of the model": (llama, replaced_class, AGAIN),
    "output of the head": (llama, wrapped_forward("output"), AGAIN),
    "hook of the head": (llama, hook("lm_head"), AGAIN),
    "input of the head": (llama, wrapped_forward("input"), None),
    "forward of the head": (llama, replaced_forward("lm_head"), "does not call the head"),
    "weight": (llama, other_weight, None),
    "tied weight": (lambda: make("Qwen2ForCausalLM", num_hidden_layers=0), other_weight, None),
    "bias": (llama, other_bias, None),
    "head": (llama, resized, AGAIN),
    "dtype": (llama, double, None),
    "scaling of LoRA": (with_lora_on_the_head, scaling, None),
    "LoRA": (with_lora_on_the_head, adapter(active=["second"]), None),
    "rsLoRA": (with_lora_on_the_head, adapter(active=["second"], use_rslora=True), None),
    "two adapters": (with_lora_on_the_head, adapter(active=["default", "second"]), None),
    "no adapter": (with_lora_on_the_head, disabled, None),
    "merged": (with_lora_on_the_head, merged, None),
    "DoRA": (with_lora_on_the_head, adapter(active=["second"], use_dora=True), OTHER),
    "DoRA among others": (with_lora_on_the_head, adapter(active=["default", "second"], use_dora=True), OTHER),
    "DoRA that is not active": (with_lora_on_the_head, adapter(active=["default"], use_dora=True), None),
    "bias of LoRA": (with_lora_on_the_head, adapter(active=["second"], lora_bias=True), OTHER),
    "forward of lora_A": (with_lora_on_the_head, replaced_forward("lm_head.lora_A.default"), None),
    "forward of lora_B": (
        with_lora_on_the_head,
        replaced_forward("lm_head.lora_B.default"),
        "lora_B of its output head",
    ),
    "hook of lora_B": (with_lora_on_the_head, hook("lm_head.lora_B.default"), "forward hooks"),
    "forward below LoRA": (
        with_lora_on_the_head,
        replaced_forward("lm_head.base_layer"),
        "base_layer of its output head",
    ),
}


def assert_follows(model: nn.Module, called: nn.Module, change: Callable[[nn.Module], None], says: str | None) -> None:
    """The log-probs by `called` are those of the model before and after the change, or the call says why not."""
    inputs, labels, _ = batch()
    before = own(model, inputs, labels)
    assert_close(fused(called, inputs, labels), before, RELATIVE * largest(before), "log-probs before")
    change(model)
    if says is not None:
        with pytest.raises(Exception, match=says):
            fused(called, inputs, labels)
        return
    after = own(model, inputs, labels)
    assert_close(fused(called, inputs, labels), after, RELATIVE * largest(after), "log-probs after")


@pytest.mark.parametrize("name", CHANGES)
def test_change_after_the_installation(name):
    make_model, change, says = CHANGES[name]
    model = make_model().eval()
    install_fused_head(model)
    assert_follows(model, model, change, says)


# Not the hooks: Dynamo guards none, so they count as they were when a model was compiled, for its logits, too.
COMPILED = [
    *("scale", "cap", "class of the model", "output of the head", "weight", "tied weight", "head"),
    *("scaling of LoRA", "LoRA", "no adapter", "merged", "DoRA", "bias of LoRA", "forward below LoRA"),
]


@pytest.mark.parametrize("name", COMPILED)
def test_change_after_the_compilation(name):
    torch._dynamo.reset()
    make_model, change, says = CHANGES[name]
    model = make_model().eval()
    install_fused_head(model)
    assert_follows(model, torch.compile(model, backend="aot_eager", fullgraph=True), change, says)


class ScaledByBuffer(type(llama())):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.scale
        return output


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_scale_in_a_buffer(backend):
    """No guard sees a change in place, only the numbers show it."""
    torch._dynamo.reset()
    model = ScaledByBuffer(llama().config)
    install_fused_head(model)
    called = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    assert_follows(model, called, lambda model: model.scale.fill_(0.7), AGAIN)


def test_problem_is_that_of_the_model_as_it_is():
    model = with_lora_on_the_head()
    install_fused_head(model)
    assert fused_head_problem(model) is None
    adapter(active=["second"], use_dora=True)(model)
    assert OTHER in fused_head_problem(model)
