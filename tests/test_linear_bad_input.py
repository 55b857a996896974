"""What the head without the logits refuses."""

from __future__ import annotations

import pytest
import torch

from dil_kernels import fused_linear_dil_loss, linear_token_logps

pytestmark = pytest.mark.usefixtures("nan_poisoned")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": torch.ones(3)}, ValueError, r"hidden_states must be \[B, T, D\] or \[N, D\], got \[3\]"),
        ({"lm_head_weight": torch.ones(7, 3)}, ValueError, r"lm_head_weight must be \[V, 4\].*got \[7, 3\]"),
        ({"lm_head_weight": torch.ones(7, 4).bfloat16()}, TypeError, "lm_head_weight must be torch.float32"),
        ({"lm_head_bias": torch.ones(6)}, ValueError, r"lm_head_bias must be \[7\]"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"labels must be \[2, 5\].*got \[2, 4\]"),
        ({"labels": torch.zeros(2, 5)}, TypeError, "labels must be int64"),
        ({"labels": torch.full((2, 5), 7)}, ValueError, r"labels must be in \[0, 7\)"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale"),
        ({"final_logit_softcapping": -1.0}, ValueError, "final_logit_softcapping"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": None}, TypeError, "temperature must be a number, got None"),
        ({"logit_scale": None}, TypeError, "logit_scale must be a number, got None"),
        ({"ignore_index": -100.0}, TypeError, "ignore_index must be an integer, got -100.0"),
        ({"labels": [[0] * 5] * 2}, TypeError, "labels must be a Tensor, got list"),
        ({"lm_head_weight": [[1.0]]}, TypeError, "lm_head_weight must be a Tensor, got list"),
        ({"lm_head_bias": [1.0]}, TypeError, "lm_head_bias must be a Tensor, got list"),
        (
            {"temperature": 1e-40},
            ValueError,
            r"temperature must be between 7.9e-31 and 1.3e\+30 in size for logits of fp32",
        ),
        ({"logit_scale": -1e-40}, ValueError, "logit_scale must be between .* got -1e-40"),
        ({"final_logit_softcapping": 1e39}, ValueError, "final_logit_softcapping must be between"),
        ({"logit_scale": 1e20, "temperature": 1e-20}, ValueError, "logit_scale / temperature must be between"),
        ({"stash_bytes": -1}, ValueError, "stash_bytes"),
        ({"stash_bytes": 1.5}, ValueError, "stash_bytes"),
        ({"stash_bytes": True}, ValueError, "stash_bytes"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an integer, got True"),
        ({"max_scored_tokens": 3}, ValueError, "max_scored_tokens=3, but labels score 8"),
        ({"backend": "nope"}, ValueError, "unknown backend"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {
        "hidden_states": torch.ones(2, 5, 4),
        "lm_head_weight": torch.ones(7, 4),
        "labels": torch.zeros(2, 5, dtype=torch.int64),
    }
    arguments |= change
    with pytest.raises(error, match=message):
        linear_token_logps(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_lm_head_weight": None}, "must be given together"),
        ({"ref_hidden_states": None, "ref_lm_head_weight": None}, "give the reference either as"),
        ({"ref_hidden_states": torch.ones(4, 4, 3)}, r"ref_hidden_states must be \[4, 5, 'D'\]"),
        ({"ref_lm_head_weight": torch.ones(8, 3)}, "must have the vocabulary of lm_head_weight"),
        ({"ref_lm_head_weight": torch.ones(7, 9)}, r"ref_lm_head_weight must be \[V, 3\]"),
        ({"hidden_states": torch.ones(3, 5, 4), "labels": torch.zeros(3, 5).long()}, "ref_hidden_states must be"),
        ({"power": 0.3}, "power=0.3 was given"),
        ({"hidden_states": [1.0]}, "hidden_states must be a Tensor, got list"),
        ({"ref_hidden_states": [1.0]}, "ref_hidden_states must be a Tensor, got list"),
        ({"labels": [1]}, "labels must be a Tensor, got list"),
        ({"cu_seqlens": [0, 5]}, "cu_seqlens must be a Tensor, got list"),
    ],
)
def test_bad_input_of_the_loss(change: dict[str, object], message: str) -> None:
    arguments = {
        "hidden_states": torch.ones(4, 5, 4),
        "lm_head_weight": torch.ones(7, 4),
        "labels": torch.zeros(4, 5, dtype=torch.int64),
        "ref_hidden_states": torch.ones(4, 5, 3),
        "ref_lm_head_weight": torch.ones(7, 3),
    }
    arguments |= change
    with pytest.raises((ValueError, TypeError), match=message):
        fused_linear_dil_loss(**arguments)


@pytest.mark.parametrize("temperature", [0, "x", None])
def test_a_temperature_is_checked_before_what_is_made_of_it(temperature) -> None:
    hidden, weight = torch.zeros(2, 3, 4), torch.zeros(7, 4)
    with pytest.raises((ValueError, TypeError), match="temperature must be a"):
        linear_token_logps(hidden, weight, torch.zeros(2, 3).long(), logit_scale=2.0, temperature=temperature)
