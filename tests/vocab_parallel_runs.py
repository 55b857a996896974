"""What each of several processes does for tests/test_vocab_parallel.py: `torchrun vocab_parallel_runs.py RUNS`."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import given, seed
from hypothesis import strategies as st
from linear_problems import make_problem
from problems import IGNORE, make_logits
from torch import Tensor
from vocab_parallel_case import (
    Split,
    assert_close,
    assert_same_on_all,
    check_linear,
    group,
    on_all_alike,
    splits,
)
from vocab_parallel_setups import another_group, bytes_sent, compiled, dtensors, errors, triton

from dil_kernels import (
    fused_dil_loss,
    fused_linear_dil_loss,
    linear_sequence_logps,
    linear_token_logps,
    sequence_logps,
    token_logps,
)


def linear_heads() -> None:
    @given(st.data())
    @seed(0)
    def as_one(data: st.DataObject) -> None:
        V = data.draw(st.sampled_from((dist.get_world_size(), 17, 301, 5003)))
        shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(2, 7)), data.draw(st.sampled_from((4, 24))), V)
        options = {"seed": data.draw(st.integers(0, 99)), "bias": data.draw(st.booleans())}
        scale = data.draw(st.sampled_from((0.1, 1.0, 5.0)))
        problem = make_problem(*shape, **options, shift=data.draw(st.booleans()), scale=scale)
        problem.labels[torch.rand(problem.labels.shape, generator=torch.Generator().manual_seed(V)) < 0.4] = IGNORE
        cap = data.draw(st.sampled_from((None, 10.0)))
        scaled = {"logit_scale": data.draw(st.sampled_from((1.0, 0.25))), "temperature": 0.7}
        problem.options.update(final_logit_softcapping=cap, **scaled)
        dtype, backend = data.draw(
            st.sampled_from(
                [(torch.float64, "cpp"), (torch.float32, "cpp"), (torch.float64, "eager"), (torch.bfloat16, "cpp"),
                 (torch.float16, "cpp")]
            )
        )  # fmt: skip
        check_linear(problem, data.draw(splits(V)), dtype, backend, data.draw(st.sampled_from((None, 0, 4096))))

    on_all_alike(as_one)


def logits_in_parts() -> None:
    @given(st.data())
    @seed(1)
    def as_one(data: st.DataObject) -> None:
        V = data.draw(st.sampled_from((dist.get_world_size(), 17, 1000, 5003)))
        B, T, shift = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6)), data.draw(st.booleans())
        kind = data.draw(st.sampled_from(("typical", "large", "certain", "masked")))
        dtype, backend = data.draw(
            st.sampled_from([(torch.float64, "cpp"), (torch.float32, "cpp"), (torch.float64, "eager"),
                             (torch.bfloat16, "cpp")])
        )  # fmt: skip
        gen = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
        logits = make_logits(gen, (B, T, V), kind, dtype)
        labels = torch.randint(0, V, (B, T), generator=gen)
        labels[torch.rand(B, T, generator=gen) < 0.3] = IGNORE
        grad = torch.randn(B, T - shift, generator=gen)
        how = {"shift": shift, "temperature": data.draw(st.sampled_from((1.0, 0.6)))}
        how["final_logit_softcapping"] = data.draw(st.sampled_from((None, 30.0)))
        own = data.draw(splits(V)).own
        results = []
        for values, more in ((logits[..., own], {"process_group": group()}), (logits, {})):
            x = values.detach().clone().requires_grad_()
            in_place = x * 1 if backend != "eager" and kind == "typical" else x
            logps, statistics = token_logps(
                in_place,
                labels,
                return_statistics=True,
                backend=backend,
                inplace_backward=in_place is not x,
                **how,
                **more,
            )
            (dx,) = torch.autograd.grad(logps, x, grad.to(logps.dtype))
            mean, entropy, hit = statistics
            results.append((logps.detach(), mean, entropy, hit.to(mean.dtype), dx))
        for name, one, other in zip(("log-probs", "mean", "entropy", "hit", "gradient"), *results, strict=True):
            other = other[..., own] if name == "gradient" else other
            # One piece adds what is next to nothing to the 1 of the largest.
            least = 1.0 if name == "entropy" else 0.0
            assert_close(one, other, f"{name} {dtype} {backend} {kind} {own} {how}", least)
            if name != "gradient":
                assert_same_on_all(one, name)

    on_all_alike(as_one)


def precise_where_certain() -> None:
    """log p = -log1p(rest) is exact in relative terms, wherever label and rivals are."""
    for place in (0, 6):
        logits = torch.zeros(1, 7, dtype=torch.float32)
        logits[0, place] = 30.0
        labels = torch.tensor([place])
        processes = dist.get_world_size()
        bounds = Split((*(7 * rank // processes for rank in range(processes)), 7))
        logps = token_logps(logits[:, bounds.own], labels, shift=False, process_group=group())
        exact = token_logps(logits.double(), labels, shift=False)
        torch.testing.assert_close(logps.double(), exact, rtol=5e-6, atol=0)
        weight = logits.t().contiguous()
        head = linear_token_logps(torch.ones(1, 1), weight[bounds.own], labels, shift=False, process_group=group())
        torch.testing.assert_close(head.double(), exact, rtol=5e-6, atol=0)


def losses() -> None:
    """The fused losses, of pairs, with reference tensors and with sums, padded and packed."""
    problem = make_problem(4, 6, 8, 101, shift=True, bias=True).to(torch.float64)
    reference = make_problem(4, 6, 8, 101, seed=5, shift=True).to(torch.float64)
    problem.labels[:, :2] = IGNORE
    cuts = [0, *(40 + 7 * n for n in range(dist.get_world_size() - 1)), 101]
    own = Split(tuple(cuts)).own

    def run(part: slice, **more: Any) -> tuple[Tensor, ...]:
        hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight[part].clone().requires_grad_()
        bias = problem.bias[part].clone().requires_grad_()
        heads = {"lm_head_bias": bias, "ref_hidden_states": reference.hidden}
        heads["ref_lm_head_weight"] = reference.weight[part]
        output = fused_linear_dil_loss(hidden, weight, problem.labels, **heads, **more)
        of_head = (output.loss, output.chosen_rewards, *torch.autograd.grad(output.loss, (hidden, weight, bias)))
        logits = (problem.hidden @ problem.weight.t())[..., part].clone().requires_grad_()
        sums = {f"ref_{side}_logps": torch.full((2,), -20.0, dtype=torch.float64) for side in ("chosen", "rejected")}
        output = fused_dil_loss(logits, problem.labels, **sums, **more)
        of_logits = (output.loss, output.chosen_logps, *torch.autograd.grad(output.loss, logits))
        ref = (reference.hidden @ reference.weight.t())[..., part]
        more_losses = fused_dil_loss(logits, problem.labels, ref_logits=ref, loss_type="ukl", **more).losses.detach()
        packed, boundaries = logits.detach().flatten(0, 1), torch.arange(0, 25, 6, dtype=torch.int32)
        sequences = sequence_logps(packed, problem.labels.flatten(), cu_seqlens=boundaries, **more)
        averages = linear_sequence_logps(
            hidden.detach(), weight.detach(), problem.labels, average_log_prob=True, **more
        )
        return *of_head, *of_logits, more_losses, sequences, averages

    actual, expected = run(own, process_group=group()), list(run(slice(None)))
    for number, dim in ((3, 0), (4, 0), (7, -1)):
        expected[number] = expected[number].movedim(dim, 0)[own].movedim(0, dim)
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(one, other, f"result {number}")


def not_finite() -> None:
    """NaN, infinities and rows that are masked in one part, or in all of them."""
    V, processes = 12, dist.get_world_size()
    own = Split(tuple(range(0, V + 1, V // processes))).own
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(9, V, generator=torch.Generator().manual_seed(3), dtype=dtype)
        labels = torch.full((9,), 1)
        logits[0, 11], logits[1, 1], logits[2, 11], logits[3, 1] = torch.nan, torch.nan, torch.inf, torch.inf
        logits[4], logits[5, : V // 2], logits[6, V // 2 :], logits[7, 1] = (-torch.inf,) * 4
        labels[8] = 11
        whole = token_logps(logits, labels, shift=False)
        part = token_logps(logits[:, own], labels, shift=False, process_group=group())
        assert_close(part, whole, f"not finite, {dtype}")
        weight = logits.t().contiguous()
        hidden = torch.eye(9, dtype=dtype).unsqueeze(0)
        usable = [5, 6, 7, 8]  # others make NaN of all rows in a product
        weight[:, [n for n in range(9) if n not in usable]] = 0
        weight = weight.nan_to_num(neginf=-1e30)
        whole = linear_token_logps(hidden, weight, labels[None], shift=False)
        part = linear_token_logps(hidden, weight[own], labels[None], shift=False, process_group=group())
        assert_close(part, whole, f"not finite, head, {dtype}")


RUNS = {
    run.__name__: run
    for run in (
        linear_heads, logits_in_parts, precise_where_certain, losses, dtensors, compiled, triton, not_finite, errors,
        another_group, bytes_sent,
    )
}  # fmt: skip


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in names:
        RUNS[name]()
        if dist.get_rank() == 0:
            print(f"{name}: passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
