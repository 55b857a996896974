"""What the checks of rows of several sequences take for rounding, and that they see what is more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_model import SMALL, make_model
from tiny_trainer import make_trainer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from dil_kernels.models.packed_attention import UnsupportedPackingError, install_packed_attention
from dil_kernels.models.prefix_sharing import install_prefix_sharing
from dil_kernels.models.probes import coarsest_rounding, difference, embeddings_as_leaves, in_fp32, matmul_precision
from dil_kernels.training.precompute import trainer_ref_cache

INSTALL = pytest.mark.parametrize("install", [install_packed_attention, install_prefix_sharing])


class Nudged(LlamaForCausalLM):
    """Computes a little otherwise in rows that are longer than the sequences of the checks."""

    nudge = 0.0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[0].mlp.register_forward_hook(lambda _m, _a, x: x * (1 + self.nudge) if x.shape[1] > 9 else x)


@INSTALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_thousandth_is_not_rounding_in_any_dtype(install: Any, dtype: torch.dtype) -> None:
    model = Nudged(make_model().config).to(dtype)
    install(model)
    model = Nudged(make_model().config).to(dtype)
    model.nudge = 1e-3
    with pytest.raises(UnsupportedPackingError, match=r"Nudged computes other logits for .*relative difference"):
        install(model)


@INSTALL
@pytest.mark.parametrize("layers", [2, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_rounding_does_is_taken(install: Any, layers: int, dtype: torch.dtype) -> None:
    for seed in range(4):
        install(make_model(seed, num_hidden_layers=layers).to(dtype))


class AsksForSdpa(LlamaForCausalLM):
    """Goes by the name of its attention, as some models' own code does."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.register_forward_hook(
            lambda _m, _a, x: x if self.config._attn_implementation == "sdpa" else x + x.roll(1, -1)
        )


def opt() -> nn.Module:
    config = AutoConfig.for_model("opt", **{**SMALL, "word_embed_proj_dim": 32, "ffn_dim": 48})
    return AutoModelForCausalLM.from_config(config)


def falcon() -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **{**SMALL, "alibi": False}))


def doge() -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", **SMALL))


OWN_CODE = "attends by code of its own, not through transformers' interface of attention"


@pytest.mark.parametrize(
    ("make", "install", "reason"),
    [
        (
            lambda: AsksForSdpa(make_model().config),
            install_packed_attention,
            "AsksForSdpa computes otherwise where its",
        ),
        (lambda: AsksForSdpa(make_model().config), install_prefix_sharing, "AsksForSdpa computes otherwise where its"),
        pytest.param(
            falcon,
            install_packed_attention,
            rf"lets a sequence depend on the one before it in its row \(it {OWN_CODE}",
            marks=pytest.mark.skipif(
                Version(transformers.__version__) >= Version("5.24"), reason="Falcon keeps sequences apart since 5.24"
            ),
        ),
        (falcon, install_prefix_sharing, f"prefixes cannot be shared in FalconForCausalLM: it {OWN_CODE}"),
        (doge, install_packed_attention, "one row: its own code reads the mask of its attention"),
        (doge, install_prefix_sharing, "shares prefixes: its own code reads the mask of its attention"),
        (opt, install_prefix_sharing, r"OPTForCausalLM does not call its base model \(OPTModel\)"),
    ],
    ids=[
        "asks, packed",
        "asks, shared",
        "falcon, packed",
        "falcon, shared",
        "doge, packed",
        "doge, shared",
        "opt, shared",
    ],
)
def test_the_reason_is_the_models_own(make: Any, install: Any, reason: str) -> None:
    model = make().eval()
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    with pytest.raises(UnsupportedPackingError, match=reason):
        install(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("install", [install_packed_attention, install_prefix_sharing])
def test_no_gradient_is_asked_of_the_embedding_of_padding(install: Any) -> None:
    """Which is 0, where Gemma 3n's AltUp has a gradient that is no number."""
    few = {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2, "intermediate_size": [48] * 2}
    narrow = {"vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
    config = {
        **SMALL,
        **few,
        **narrow,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 2,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3n_text", **config))
    assert not model.get_input_embeddings().weight[0].any()
    install(model.eval())


def test_a_model_may_change_its_embeddings_in_place() -> None:
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    with embeddings_as_leaves(model) as leaves:
        model.get_input_embeddings().register_forward_hook(lambda _m, _i, x: x.mul_(2.0))
        logits = model(input_ids=ids).logits
    assert torch.autograd.grad(logits.sum(), leaves[0])[0].any()


def test_embeddings_are_rounded_once_more() -> None:
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    embedded = model.get_input_embeddings()(ids)
    found = []
    for rounded in (0.0, 0.25, 0.25):
        with embeddings_as_leaves(model, rounded) as leaves:
            model(input_ids=ids)
        found.append(leaves[0].detach())
    assert torch.equal(found[0], embedded)
    assert torch.equal(found[1], found[2])
    assert len({*(found[1] / embedded > 1).flatten().tolist()}) == 2
    torch.testing.assert_close((found[1] / embedded - 1).abs(), torch.full_like(embedded, 0.25))
    assert difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, -4.0])) == 7 / 4


def test_only_coarse_and_small_models_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    assert in_fp32(model) is model
    model.bfloat16()
    copied = in_fp32(model)
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    monkeypatch.setattr("dil_kernels.models.probes.LARGEST_COPY", 1000)
    assert in_fp32(model) is model


@pytest.fixture
def precision() -> Iterator[Any]:
    yield torch.backends
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_the_precision_of_matrix_products_counts(precision: Any, tmp_path: Path, datasets_cache: None) -> None:
    """As TrainingArguments sets it for tf32=True."""
    model = make_model()
    assert matmul_precision("cpu") == matmul_precision("cuda") == "ieee"
    assert coarsest_rounding(model) == torch.finfo(torch.float32).eps
    precision.fp32_precision = "tf32"
    assert matmul_precision("cuda") == "tf32"
    precision.mkldnn.matmul.fp32_precision = "bf16"
    assert coarsest_rounding(model) == torch.finfo(torch.bfloat16).eps
    trainer = make_trainer(tmp_path, model=model, ref_cache_dir=str(tmp_path / "refs"))
    assert trainer_ref_cache(trainer, model).identity["settings"]["matmul_precision"] == "bf16"
