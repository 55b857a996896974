"""What a model's reference log-probs are found by: all that they depend on, and nothing where nobody knows that."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ref_cache import precomputed, sums_of
from tiny_model import make_model
from torch import nn

from dil_kernels.training.ref_cache import model_description, model_fingerprint


def test_a_model_is_known_by_what_it_computes() -> None:
    expected = model_fingerprint(make_model())
    moved = make_model()
    moved.config._name_or_path = "elsewhere"
    assert model_fingerprint(moved) == expected
    assert model_fingerprint(make_model().train().requires_grad_(False)) == expected
    buffer = make_model()
    buffer.model.rotary_emb.inv_freq[-1] *= 2  # in no checkpoint
    swapped = make_model()
    swapped.model.layers[0].mlp.act_fn = nn.GELU()
    rounder = make_model()
    rounder.model.norm.variance_epsilon *= 2  # in no config
    scaled = make_model()
    scaled.model.layers[1].self_attn.scaling *= 2
    others = buffer, swapped, rounder, scaled, make_model(1), make_model().half()
    assert len({expected, *map(model_fingerprint, others)}) == 7
    without_noise = make_model()
    without_noise.model.layers[0].self_attn.attention_dropout = 0.5
    without_noise.enable_input_require_grads()  # a hook that changes nothing
    assert model_fingerprint(without_noise) == expected


def test_another_forward_of_a_class_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, norm = model_fingerprint(make_model()), type(make_model().model.norm)
    monkeypatch.setattr(norm, "forward", lambda self, x: x)
    assert model_fingerprint(make_model()) != expected


@pytest.mark.parametrize("kind", ["hook", "pre_hook", "forward"])
def test_references_of_a_model_with_code_of_the_users_are_not_kept(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(factor: float) -> Any:
        model = make_model()
        part = model.model.layers[0].mlp
        if kind == "forward":
            own = part.forward
            part.forward = functools.wraps(own)(lambda x: own(x) * factor)
        elif kind == "hook":
            part.register_forward_hook(lambda module, args, out: out * factor)
        else:
            part.register_forward_pre_hook(lambda module, args: (args[0] * factor,))
        return model

    sums = [sums_of(precomputed(tmp_path, model=changed(factor))[0].train_dataset) for factor in (2.0, 3.0)]
    assert sums[0] != sums[1]
    said = f"computed and not kept: model.layers.0.mlp has a forward hook, or a forward of its own, of {__name__}"
    assert capsys.readouterr().out.count(said) == 2
    assert model_description(changed(2.0)) != model_description(changed(2.0))


def test_weights_that_are_not_here_have_no_fingerprint(tmp_path: Path) -> None:
    sharded = make_model()
    sharded.lm_head.weight.ds_id = 0  # as DeepSpeed's ZeRO-3 marks them
    with pytest.raises(NotImplementedError, match=r"embed_tokens\.weight is sharded over processes"):
        model_fingerprint(sharded)
    with torch.device("meta"):
        absent = nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match="weight is on the meta device"):
        model_fingerprint(absent)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        layer = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(NotImplementedError, match="weight is sharded over processes"):
            model_fingerprint(layer)
    finally:
        torch.distributed.destroy_process_group()
