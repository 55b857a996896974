"""How far the log ratios of a bf16 model are off, over the length of a response, and what that does to LSIF.

    python -m experiments.exactness --pairs pairs.jsonl            # SmolLM2-135M in bf16; minutes
    python -m experiments.exactness --quick                        # a tiny random model; seconds

Policy and reference are the model with a little noise in its weights, and the model. All ways to log-probs get the same
hidden states and weights in bf16, as the models made them; the truth is computed from these in fp64. So the error is
that of the head alone; that of the layers below it, whatever the head, is a row of its own: hidden states of the model
in bf16 against those of the same weights in fp32, both with the exact head. LSIF on sums multiplies the gradient of a
response by r or r^2 of its ratio r = exp(u): an error of d nats in u is a factor exp(d) in that.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dil_kernels import linear_sequence_logps, sequence_logps
from experiments.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    finish_panel,
    new_figure,
    save,
)
from experiments.tables import RESULTS, mean_and_sd, write_csv

NOISE = 0.02  # of the policy's weights, in their standard deviations
SEED = 20261126


class Head(NamedTuple):
    """What the log-probs of one response are computed from."""

    hidden_states: Tensor  # [T, D] bf16 or, for the truth alone, fp32; at the tokens before those of the response
    weight: Tensor  # [V, D] likewise
    labels: Tensor  # [T]


Method = Callable[[Head], Tensor]


def _labelled(head: Head) -> dict[str, Any]:
    """Keywords of scoring rows that are not shifted, in one sequence."""
    return {"labels": head.labels, "cu_seqlens": torch.tensor([0, len(head.labels)], dtype=torch.int32), "shift": False}


def from_hidden_states(head: Head) -> Tensor:
    """`linear_sequence_logps`."""
    return linear_sequence_logps(head.hidden_states, head.weight, **_labelled(head))


def from_logits(head: Head) -> Tensor:
    """`sequence_logps`, of logits that the model has rounded to bf16."""
    return sequence_logps(functional.linear(head.hidden_states, head.weight), **_labelled(head))


def of_trl(head: Head) -> Tensor:
    """The function under TRL 1.16's `DPOTrainer`, as it calls it; summed."""
    from trl.kernels import ChunkedLogProbFunction

    logps, *_ = ChunkedLogProbFunction.apply(*head[:2], None, head.labels, 1.0, 32768, None, 1.0, ("log_probs",))
    return logps.sum().unsqueeze(0)


def of_linear_cross_entropy(head: Head) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` with reduction="none", summed."""
    return -functional.linear_cross_entropy(*head, reduction="none").sum().unsqueeze(0)


def of_liger(head: Head) -> Tensor:
    """The log-probs of `LigerFusedLinearDPOLoss`, by its own function, summed."""
    from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase

    twice = torch.stack([head.hidden_states] * 2), torch.stack([head.labels] * 2)  # a pair
    chosen, *_ = LigerFusedLinearPreferenceBase.chunk_forward(twice[0], head.weight, twice[1], average_log_prob=False)
    return chosen


def of_the_authors(head: Head) -> Tensor:
    """The authors' way: log_softmax of the logits in their dtype, gathered and summed."""
    logps = functional.linear(head.hidden_states, head.weight).log_softmax(-1)
    return logps.gather(-1, head.labels.unsqueeze(-1)).sum().unsqueeze(0)


METHODS: dict[str, tuple[Method, str, str]] = {  # what computes it, the package that it needs, colour
    "ours, from hidden states": (from_hidden_states, "torch", BLUE),
    "ours, from logits": (from_logits, "torch", SKY),
    "TRL 1.16": (of_trl, "trl", VERMILLION),
    "F.linear_cross_entropy": (of_linear_cross_entropy, "torch", GREEN),
    "Liger, chunked DPO": (of_liger, "liger_kernel", ORANGE),
    "log_softmax in bf16": (of_the_authors, "torch", PURPLE),
}
BODY = "the layers below, in bf16"


def truth(head: Head) -> float:
    """The log-prob in fp64."""
    total = 0.0
    for rows, labels in zip(head.hidden_states.double().split(256), head.labels.split(256), strict=True):
        logits = rows @ head.weight.double().T
        total += float((logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).sum())
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything; write table and figure."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.exactness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a tiny random model, short responses")
    parser.add_argument("--model", type=Path, help="a model directory (default: SmolLM2-135M, prepared under runs/)")
    parser.add_argument("--pairs", type=Path, help="preference pairs (default: the embedded ones)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 200, 400, 1000, 2000, 4000], help="tokens")
    parser.add_argument("--responses", type=int, default=8, help="of each length (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of exactness.csv and exactness.png")
    options = parser.parse_args(argv)
    if options.quick:
        options.lengths, options.responses = [16, 64], 2
    rows = []
    for row in measure(options):
        print(
            f"{row['method']:<26}{row['tokens']:>6} tokens: off by {row['rms_error']:.3g} nats (rms), "
            f"{row['largest_error']:.3g} at most: a factor of {row['largest_lsif_factor']:.5g} in LSIF's gradient",
            flush=True,
        )
        rows.append(row)
    write_csv(options.output / "exactness.csv", rows)
    draw(rows, options.output / "exactness.png")
    return 0


@torch.no_grad()
def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of each length and method."""
    methods = {name: method for name, (method, package, _) in METHODS.items() if importlib.util.find_spec(package)}
    for name in METHODS.keys() - methods:
        print(f"{name}: {METHODS[name][1]} is not installed; left out")
    reference, stream = load(options)
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(SEED)
    for parameter in policy.parameters():
        noise = torch.empty_like(parameter, dtype=torch.float32).normal_(generator=generator)
        parameter += (NOISE * parameter.float().std(correction=0) * noise).to(parameter.dtype)
    models = policy, reference
    models_in_fp32 = [copy.deepcopy(model).float() for model in models]
    for tokens in options.lengths:
        errors: dict[str, list[float]] = {name: [] for name in (*methods, BODY)}
        ratios = []
        for number in range(options.responses):
            start = number * len(stream) // options.responses
            ids = (stream[start:] + stream)[: tokens + 1]
            heads = [head_of(model, ids) for model in models]
            exact = truth(heads[0]) - truth(heads[1])
            ratios.append(exact)
            whole = [truth(head_of(model, ids)) for model in models_in_fp32]
            errors[BODY].append(exact - (whole[0] - whole[1]))
            for name, method in methods.items():
                found = [method(head).double().item() for head in heads]
                errors[name].append(found[0] - found[1] - exact)
        for name, of_method in errors.items():
            rms = math.sqrt(sum(error**2 for error in of_method) / len(of_method))
            yield {
                "method": name,
                "tokens": tokens,
                "responses": len(of_method),
                "mean_log_ratio": mean_and_sd(ratios)[0],
                "mean_error": mean_and_sd(of_method)[0],
                "rms_error": rms,
                "largest_error": max(map(abs, of_method)),
                "largest_lsif_factor": math.exp(max(map(abs, of_method))),
            }


def head_of(model: Any, ids: Sequence[int]) -> Head:
    """The head's inputs for all but the first of the tokens."""
    hidden_states = model.model(torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state[0]
    return Head(hidden_states, model.get_output_embeddings().weight, torch.tensor(ids[1:]))


def load(options: argparse.Namespace) -> tuple[Any, list[int]]:
    """The reference in bf16, and the tokens of the responses of the pairs, one after another."""
    from dil_kernels.data import load_preference_pairs
    from dil_kernels.quickstart.embedded import load_embedded_pairs
    from experiments.beside_trl_runs import load_model

    model, tokenizer = load_model(options.model, quick=options.quick)
    pairs = load_embedded_pairs("train") if options.pairs is None else load_preference_pairs(options.pairs)
    needed, stream = max(options.lengths) * options.responses, []
    for pair in pairs:
        stream += tokenizer(pair["chosen"][-1]["content"], add_special_tokens=False)["input_ids"]
        if len(stream) > needed:
            break
    return model.to(torch.bfloat16).eval(), stream


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The error of a log ratio over the length of the response."""
    figure = new_figure(9.0, 4.2)
    axes = figure.subplots()
    looks = {name: colour for name, (*_, colour) in METHODS.items()} | {BODY: GREY}
    for number, (name, colour) in enumerate(looks.items()):
        points = [(row["tokens"], row["rms_error"]) for row in rows if row["method"] == name]
        if points:
            width = 5 - 0.6 * number  # some lie on one another
            axes.loglog(*zip(*points, strict=True), color=colour, linewidth=width, solid_capstyle="round", label=name)
    axes.axhline(0.01, color=BLACK, linewidth=0.8, linestyle=":")
    axes.annotate("1% in LSIF's gradient", (0.99, 0.0105), xycoords=("axes fraction", "data"), ha="right", fontsize=8)
    finish_panel(axes, "Error of a log ratio of a bf16 model", "tokens of the response", "nats, rms over responses")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


if __name__ == "__main__":
    raise SystemExit(main())
