"""Every bad input is refused with a message that names the argument."""

from __future__ import annotations

import re

import pytest
import torch

from dil_kernels import dil_loss, fused_dil_loss, sequence_logps, token_logps, unpaired_dil_loss
from dil_kernels.losses import LossParameters

LOGITS = torch.zeros(2, 4, 7)
LABELS = torch.zeros(2, 4, dtype=torch.int64)
PACKED = torch.zeros(6, 7)
PACKED_LABELS = torch.zeros(6, dtype=torch.int64)
REF = torch.zeros(1)
SIDES = torch.tensor([True, False])


def cu(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


TOKEN_CASES = [
    ({"logits": LOGITS[0, 0]}, ValueError, "logits must be [B, T, V] or [N, V], got [7]"),
    ({"logits": LOGITS.int()}, TypeError, "logits must be fp32, bf16, fp16 or fp64, got torch.int32"),
    ({"labels": LABELS.int()}, TypeError, "labels must be int64, got torch.int32"),
    ({"labels": LABELS[:, :3]}, ValueError, "labels must be [2, 4] to match logits [2, 4, 7], got [2, 3]"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels are on meta, but logits are on cpu"),
    ({"logits": LOGITS[..., :0]}, ValueError, "logits have an empty vocabulary: [2, 4, 0]"),
    ({"logits": LOGITS[:, :1], "labels": LABELS[:, :1]}, ValueError, "at least 2 are needed"),
    ({"labels": LABELS + 7}, ValueError, "labels must be in [0, 7) or ignore_index=-100, got 7"),
    ({"labels": LABELS - 1}, ValueError, "labels must be in [0, 7) or ignore_index=-100, got -1"),
    ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be a finite number > 0, got nan"),
    ({"final_logit_softcapping": -30.0}, ValueError, "final_logit_softcapping must be a finite number > 0, got -30.0"),
    ({"final_logit_softcapping": torch.ones(())}, TypeError, "final_logit_softcapping must be a number, got a Tensor"),
    ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'; available: auto, triton, cpp, eager"),
    ({"temperature": None}, TypeError, "temperature must be a number, got None"),
    ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
    ({"final_logit_softcapping": "30"}, TypeError, "final_logit_softcapping must be a number, got '30'"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
    ({"shift": 2}, TypeError, "shift must be true or false, got 2"),
    ({"ignore_index": 2**63}, ValueError, f"ignore_index must be an int64 as the labels are, got {2**63}"),
    ({"labels": LABELS.tolist()}, TypeError, "labels must be a Tensor, got list"),
    ({"logits": LOGITS.numpy()}, TypeError, "logits must be a Tensor, got ndarray"),
    # 1 / 1e-40 and log2(e) 1e38 are not in fp32, which computes.
    ({"temperature": 1e-40}, ValueError, "temperature must be between 7.9e-31 and 1.3e+30 in size for logits of fp32"),
    ({"temperature": 1e38}, ValueError, "temperature must be between 7.9e-31 and 1.3e+30 in size for logits of fp32"),
    ({"final_logit_softcapping": 1e-46}, ValueError, "final_logit_softcapping must be between 7.9e-31 and 1.3e+30"),
    ({"final_logit_softcapping": 1e39}, ValueError, "final_logit_softcapping must be between 7.9e-31 and 1.3e+30"),
    ({"final_logit_softcapping": 1e20, "temperature": 1e-20},
     ValueError, "final_logit_softcapping / temperature must be between 7.9e-31 and 1.3e+30"),
    ({"logits": LOGITS.double(), "temperature": 1e-305},
     ValueError, "temperature must be between 9.3e-302 and 1.1e+301 in size for logits of fp64, got 1e-305"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), TOKEN_CASES)
@pytest.mark.parametrize("backend", ["cpp", "eager", "triton"])
def test_token_logps(change, error, message, backend) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("a CUDA device is visible: the interpreter is off, and CPU tensors are refused first")
    arguments = {"logits": LOGITS, "labels": LABELS, "backend": backend} | change
    with pytest.raises(error, match=re.escape(message)):
        token_logps(arguments.pop("logits"), arguments.pop("labels"), **arguments)


PACKED_CASES = [
    ({"cu_seqlens": cu(1, 6)}, ValueError, "cu_seqlens must start at 0, got 1"),
    ({"cu_seqlens": cu(0, 4, 3, 6)}, ValueError, "cu_seqlens must not decrease, got [0, 4, 3, 6]"),
    ({"cu_seqlens": cu(0, 5)}, ValueError, "cu_seqlens must end at the number of tokens, 6, got 5"),
    ({"cu_seqlens": cu(0, 9)}, ValueError, "cu_seqlens must end at the number of tokens, 6, got 9"),
    ({"cu_seqlens": cu(0, 6).long()}, TypeError, "cu_seqlens must be int32, got torch.int64"),
    ({"cu_seqlens": cu(0)}, ValueError, "cu_seqlens must be [S + 1] with S >= 1, got [1]"),
    ({"cu_seqlens": cu(0, 6).to("meta")}, ValueError, "cu_seqlens are on meta, but logits are on cpu"),
    (
        {"logits": LOGITS, "labels": LABELS},
        ValueError,
        "logits must be [N, V] or [1, N, V] with cu_seqlens, got [2, 4, 7]",
    ),
    ({"cu_seqlens": None}, ValueError, "logits must be [B, T, V] (or pass cu_seqlens for packed [N, V]), got [6, 7]"),
    ({"labels": PACKED_LABELS[:5]}, ValueError, "labels must be [6] to match logits [6, 7], got [5]"),
    ({"labels": PACKED_LABELS.tolist()}, TypeError, "labels must be a Tensor, got list"),
    ({"average_log_prob": 0}, TypeError, "average_log_prob must be true or false, got 0"),
    ({"cu_seqlens": [0, 2, 6]}, TypeError, "cu_seqlens must be a Tensor, got list"),
    ({"ignore_index": 0.0}, TypeError, "ignore_index must be an integer, got 0.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), PACKED_CASES)
@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_sequence_logps(change, error, message, backend) -> None:
    arguments = {"logits": PACKED, "labels": PACKED_LABELS, "cu_seqlens": cu(0, 2, 6)} | change
    with pytest.raises(error, match=re.escape(message)):
        sequence_logps(arguments.pop("logits"), arguments.pop("labels"), backend=backend, **arguments)


FUSED_CASES = [
    ({"logits": LOGITS.new_zeros(3, 4, 7), "labels": LABELS.new_zeros(3, 4), "ref_logits": LOGITS.new_zeros(3, 4, 7)},
     ValueError, "pairs need an even number of sequences, got 3 rows in logits [3, 4, 7]"),
    ({"logits": LABELS, "labels": LOGITS, "ref_logits": LOGITS},
     TypeError, "logits must be fp32, bf16, fp16 or fp64, got torch.int64"),
    ({"average_log_prob": "no"}, TypeError, "average_log_prob must be true or false, got 'no'"),
    ({"beta": True}, TypeError, "beta must be a number, got True"),
    ({"loss_type": "kl"}, ValueError, "unknown loss_type 'kl'; available: lsif, ukl, bce, power, is, brier"),
    ({"beta": -0.1}, ValueError, "beta must be a finite number > 0, got -0.1"),
    ({"loss_type": "dpo", "beta": -1.0}, ValueError, "beta must be a finite number > 0, got -1.0"),
    ({"loss_type": "dpo", "alpha": 0.5}, ValueError, "alpha=0.5 was given, but loss_type='dpo' is not separable"),
    ({"power": 0.5}, ValueError, "power=0.5 was given, but loss_type='lsif' has no power"),
    ({"loss_type": "dpo", "power": 0.5}, ValueError, "power=0.5 was given, but loss_type='dpo' has no power"),
    ({"loss_type": "power", "power": -1.5}, ValueError, "power must be a finite number >= -1, got -1.5"),
    ({"max_log_ratio": 0.0}, ValueError, "max_log_ratio must be a finite number > 0, got 0.0"),
    ({"chosen_weight": -1.0}, ValueError, "chosen_weight must be a finite number >= 0, got -1.0"),
    ({"loss_type": "dpo", "rejected_weight": 2.0},
     ValueError, "rejected_weight=2.0 was given, but loss_type='dpo' is not separable"),
    ({"non_negative": 1.0}, ValueError, "non_negative must be between 0 and 1"),
    ({"non_negative": 0.5, "reduction": "sum"}, ValueError, "reduction must be 'mean', got 'sum'"),
    ({"non_negative": 0.5, "loss_type": "is"}, ValueError, "loss_type='is' has no non-negative part"),
    ({"non_negative": 0.5, "loss_type": "dpo"}, ValueError, "loss_type='dpo' has no non-negative part"),
    ({"is_chosen": SIDES, "loss_type": "dpo"}, ValueError, "couples the chosen and the rejected response of a pair"),
    ({"is_chosen": SIDES, "pair_layout": "interleaved"}, ValueError, "with is_chosen there are no pairs"),
    ({"is_chosen": SIDES[:1]}, ValueError, "is_chosen must be [2], got [1]"),
    ({"is_chosen": SIDES.int()}, TypeError, "is_chosen must be bool, got torch.int32"),
    ({"is_chosen": SIDES.to("meta")}, ValueError, "is_chosen is on meta, but cpu is needed"),
    ({"is_chosen": SIDES, "ref_logits": None}, ValueError, "either as ref_logits, or as ref_logps"),
    ({"is_chosen": SIDES, "ref_chosen_logps": REF}, ValueError, "are for pairs; with is_chosen give ref_logps"),
    ({"is_chosen": SIDES, "ref_logits": None, "ref_logps": REF}, ValueError, "ref_logps must be [2], got [1]"),
    ({"ref_logps": torch.zeros(2)}, ValueError, "ref_logps is for unpaired responses (is_chosen)"),
    ({"alpha": 1.5}, ValueError, "alpha must be in [0, 1], got 1.5"),
    ({"alpha": float("nan")}, ValueError, "alpha must be in [0, 1], got nan"),
    ({"reduction": "avg"}, ValueError, "unknown reduction 'avg'; available: mean, sum, none"),
    ({"pair_layout": "zip"}, ValueError, "unknown pair_layout 'zip'; available: concatenated, interleaved"),
    ({"ref_logits": None}, ValueError, "give the reference either as ref_logits, or as both"),
    ({"ref_chosen_logps": REF, "ref_rejected_logps": REF},
     ValueError, "give the reference either as ref_logits, or as both"),
    ({"ref_logits": None, "ref_chosen_logps": REF}, ValueError, "ref_rejected_logps is missing"),
    ({"ref_logits": None, "ref_rejected_logps": REF}, ValueError, "ref_chosen_logps is missing"),
    ({"ref_logits": None, "ref_chosen_logps": torch.zeros(2), "ref_rejected_logps": REF},
     ValueError, "ref_chosen_logps must be [1], got [2]"),
    ({"ref_logits": None, "ref_chosen_logps": REF, "ref_rejected_logps": REF.bfloat16()},
     TypeError, "ref_rejected_logps must be fp32 or fp64"),
    ({"ref_logits": LOGITS[:, :3]}, ValueError, "ref_logits must be [2, 4, 7] as logits, got [2, 3, 7]"),
    ({"ref_logits": LOGITS.to("meta")}, ValueError, "ref_logits are on meta, but logits are on cpu"),
    ({"labels": LABELS + 9}, ValueError, "labels must be in [0, 7)"),
    ({"cu_seqlens": cu(0, 4)}, ValueError, "logits must be [N, V] or [1, N, V] with cu_seqlens, got [2, 4, 7]"),
    ({"cu_seqlens": [0, 4]}, TypeError, "cu_seqlens must be a Tensor, got list"),
    ({"labels": LABELS.tolist()}, TypeError, "labels must be a Tensor, got list"),
    ({"ref_logits": LOGITS.tolist()}, TypeError, "ref_logits must be a Tensor, got list"),
    ({"ref_logits": None, "ref_chosen_logps": [0.0], "ref_rejected_logps": REF},
     TypeError, "ref_chosen_logps must be a Tensor, got list"),
    ({"is_chosen": [True, False]}, TypeError, "is_chosen must be a Tensor, got list"),
    ({"temperature": None}, TypeError, "temperature must be a number, got None"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), FUSED_CASES)
@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_fused_dil_loss(change, error, message, backend) -> None:
    arguments = {"logits": LOGITS, "labels": LABELS, "ref_logits": LOGITS} | change
    with pytest.raises(error, match=re.escape(message)):
        fused_dil_loss(arguments.pop("logits"), arguments.pop("labels"), backend=backend, **arguments)


@pytest.mark.parametrize("odd", [cu(0, 2, 4, 6)])
def test_an_odd_number_of_packed_sequences(odd) -> None:
    with pytest.raises(ValueError, match=re.escape("got 3 in cu_seqlens [4]")):
        fused_dil_loss(PACKED, PACKED_LABELS, ref_logits=PACKED, cu_seqlens=odd)


DIL_LOSS_CASES = [
    ({"policy_rejected_logps": torch.zeros(2)}, ValueError, "policy_rejected_logps must be [3], got [2]"),
    ({"policy_chosen_logps": torch.zeros(3, 1)}, ValueError, "policy_chosen_logps must be [3], got [3, 1]"),
    ({"ref_chosen_logps": torch.zeros(3).half()}, TypeError, "ref_chosen_logps must be fp32 or fp64"),
    ({"ref_rejected_logps": torch.zeros(3, device="meta")}, ValueError, "ref_rejected_logps is on meta"),
    ({"loss_type": ["lsif"]}, ValueError, "unknown loss_type ['lsif']"),
    ({"loss_type": "bce", "scale": 2.0}, ValueError, "scale=2.0 was given, but link='imitation' has no scale"),
    ({"reduction": "batchmean"}, ValueError, "unknown reduction 'batchmean'"),
    ({"backend": "fast"}, ValueError, "unknown backend 'fast'"),
    ({"policy_chosen_logps": [0.0]}, TypeError, "policy_chosen_logps must be a Tensor, got list"),
    ({"ref_rejected_logps": [0.0]}, TypeError, "ref_rejected_logps must be a Tensor, got list"),
]


@pytest.mark.parametrize(("change", "error", "message"), DIL_LOSS_CASES)
def test_dil_loss(change, error, message) -> None:
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    arguments = dict.fromkeys(names, torch.zeros(3)) | change
    with pytest.raises(error, match=re.escape(message)):
        dil_loss(*[arguments.pop(name) for name in names], **arguments)


def test_unpaired_dil_loss() -> None:
    logps = torch.zeros(2)
    with pytest.raises(ValueError, match=re.escape("is_chosen must be [2], got [2, 1]")):
        unpaired_dil_loss(logps, logps, SIDES[:, None])
    with pytest.raises(ValueError, match=re.escape("ref_logps must be [2], got [1]")):
        unpaired_dil_loss(logps, REF, SIDES)
    with pytest.raises(ValueError, match="couples the chosen and the rejected"):
        unpaired_dil_loss(logps, logps, SIDES, loss_type="dpo")
    for arguments, name in (
        (([0.0], logps, SIDES), "policy_logps"),
        ((logps, [0.0], SIDES), "ref_logps"),
        ((logps, logps, [True]), "is_chosen"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a Tensor, got list"):
            unpaired_dil_loss(*arguments)


def test_ops_called_directly_keep_memory_safe() -> None:
    ops = torch.ops.dil_kernels
    labels = LABELS.clone()
    labels[1, 2] = 7
    with pytest.raises(RuntimeError, match=re.escape("labels must be in [0, 7) or ignore_index=-100, got 7 at [1, 2]")):
        ops.logps_fwd(LOGITS, labels, -100, True, 0.0, 1.0, False)
    token_logps = torch.zeros(6)
    options = (None, *LossParameters("lsif"), True, False, True, -100, False)
    for bad in (cu(0, 7, 6), cu(0, 6, 9), cu(-1, 3, 6), cu(0, 2, 5)):
        with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, not decrease"):
            ops.density_ratio_fwd(token_logps, PACKED_LABELS, bad, token_logps, None, *options)
    for sides in (SIDES.int(), SIDES[:1]):
        with pytest.raises(RuntimeError, match="is_chosen must be a contiguous bool"):
            ops.density_ratio_fwd(token_logps, PACKED_LABELS, cu(0, 2, 6), token_logps, None, sides, *options[1:])
    with pytest.raises(RuntimeError, match="dpo needs pairs"):
        ops.density_ratio_fwd(token_logps, PACKED_LABELS, cu(0, 2, 6), token_logps, None, SIDES, "dpo", *options[2:])
    with pytest.raises(RuntimeError, match="loss_type nope is not compiled"):
        ops.density_ratio_fwd(
            token_logps[None].repeat(2, 1), None, None, None, torch.zeros(2).double(), None, "nope", *options[2:]
        )


def test_tiles_take_any_label_without_overflow() -> None:
    """A label far outside is in no tile: the sum is over all of it, and its own logit is never seen."""
    ops = torch.ops.dil_kernels
    extremes = torch.tensor([-(2**63), -1, 2**63 - 1])
    for start in (0, 5, 2**40):
        tile, state = torch.randn(3, 4), torch.zeros(7, 3)
        state[0], state[2] = -torch.inf, torch.nan
        options = (start, 1.0, 0.0, 1.0)
        expected = (tile - tile.amax(1, keepdim=True)).exp().sum(1)
        ops.head_tile(tile.clone(), None, extremes, state, None, None, *options, 4.0, True)
        torch.testing.assert_close(state[1], expected)
        assert state[2].isnan().all()
        grad = torch.zeros(3, 4)
        ops.head_tile_grad(tile.clone(), None, extremes, state, grad, *options)
        torch.testing.assert_close(-grad.sum(1), expected)
    with pytest.raises(RuntimeError, match="start must be >= 0, got -1"):
        ops.head_tile(tile, None, extremes, state, None, None, -1, 1.0, 0.0, 1.0, 4.0, True)


def test_the_backward_op_checks_what_the_forward_handed_on() -> None:
    token_logps, good = torch.zeros(4, 3), (torch.ones(4).int(), torch.ones(2).int(), torch.ones(4))
    for index, bad in (
        (0, torch.ones(1).int()),
        (1, torch.ones(0).int()),
        (2, torch.ones(0)),
        (2, torch.ones(4).double()),
    ):
        saved = [bad if i == index else tensor for i, tensor in enumerate(good)]
        with pytest.raises(RuntimeError, match="must be those of the forward"):
            torch.ops.dil_kernels.density_ratio_bwd(
                torch.ones(()), None, None, None, token_logps, None, None, None, *saved, True, False, True, -1, False
            )
    expanded = torch.zeros(1, 4, 7).expand(2, 4, 7)
    rest = (torch.zeros(2, 3), torch.zeros(2, 3), -100, True, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="no expanded dimension"):
        torch.ops.dil_kernels.logps_bwd_(torch.zeros(2, 3), expanded, LABELS, *rest)


def test_an_explicit_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="Triton kernels do not take fp64"):
        token_logps(LOGITS.double(), LABELS, backend="triton")
    with pytest.raises(RuntimeError, match="the C\\+\\+ kernels take CPU tensors, not meta"):
        token_logps(LOGITS.to("meta"), LABELS.to("meta"), backend="cpp")
