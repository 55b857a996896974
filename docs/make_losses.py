"""Write docs/losses.md and its pictures from the table below and the registry of losses.

    python docs/make_losses.py          writes docs/losses.md and docs/losses/*.png
    python docs/make_losses.py --check  fails if docs/losses.md is not what it would write

The formulas are evaluated by tests/test_docs.py against the compiled losses, and every registered loss must have a row.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from dil_kernels.losses import LossOptions, LossParameters, divergence_names, get_divergence
from dil_kernels.losses.scalar import pair_losses

DOCS = Path(__file__).parent
CHOSEN, REJECTED = "#1b7837", "#b2182b"


@dataclass(frozen=True)
class Entry:
    """What the page says of a loss.

    Formulas are Python over w (chosen log ratio), l (rejected), u, r, and k (power), beta and e (label smoothing).
    """

    title: str
    h: str | None
    A: str | None
    P: str | None
    loss: str
    grad_w: str
    grad_l: str
    bounded: str
    use: str
    hazard: str
    family: str


ENTRIES = {
    "lsif": Entry(
        title="Least-squares importance fitting",
        h="(r - 1)**2 / 2",
        A="exp(u)",
        P="exp(2*u) / 2",
        loss="-exp(w) + exp(2*l) / 2",
        grad_w="-exp(w)",
        grad_l="exp(2*l)",
        bounded="no: -exp(w) falls without end; with `alpha` > 0 by -1/(2 alpha)",
        use="The paper's default, with length-averaged log ratios. Puts most weight on what the policy already prefers.",
        hazard="Overflows first: the gradient is infinite in fp32 at l > 44.36. On summed log ratios it overflows or "
        "diverges easily, from lower learning rates on than on averages: averaging is the default. `alpha` = 1/2 on sums "
        "did not help in [the stability experiment](../experiments/results/stability_summary.csv).",
        family="Fits r in squares under the reference: Pearson's chi-squared divergence (up to a factor) in its "
        "variational form.",
    ),
    "ukl": Entry(
        title="Unnormalised Kullback-Leibler",
        h="r*log(r) - r",
        A="u",
        P="exp(u)",
        loss="-w + exp(l)",
        grad_w="-1",
        grad_l="exp(l)",
        bounded="no: -w falls without end; with `alpha` > 0 by 1 + log(alpha)",
        use="Every chosen response pulls alike: supervised fine-tuning on the chosen ones, with a penalty on mass that "
        "the policy puts on the rejected ones.",
        hazard="The rejected term is infinite in fp32 at l > 88.72.",
        family="Variational form of KL(pi_chosen || pi_ref) (KLIEP with a soft normalisation); its chosen term is "
        "SFT, its optimum the maximum-likelihood ratio.",
    ),
    "bce": Entry(
        title="Binary cross-entropy",
        h="r*log(r) - (1 + r)*log(1 + r)",
        A="-log1p(exp(-u))",
        P="log1p(exp(u))",
        loss="log1p(exp(-w)) + log1p(exp(l))",
        grad_w="-1 / (1 + exp(w))",
        grad_l="1 / (1 + exp(-l))",
        bounded="below by 0, gradients by 1",
        use="The safe choice: gradients never exceed 1, so sums of log ratios and outliers are harmless. Least biased "
        "of the paper's three when rejected responses stand in for the reference.",
        hazard="Saturates: a pair that is told apart gives no gradient.",
        family="Jensen-Shannon divergence in its variational form (a GAN's discriminator). TRL's `bco_pair` with its "
        "beta and summed log-probs; `alpha` = 1/2 is `nca_pair`.",
    ),
    "power": Entry(
        title="Power divergence (Basu), exponent `power` = k >= -1",
        h="(r**(1 + k) - r) / (k * (1 + k))",
        A="(exp(k*u) - 1) / k",
        P="exp((1 + k)*u) / (1 + k)",
        loss="-(exp(k*w) - 1) / k + exp((1 + k)*l) / (1 + k)",
        grad_w="-exp(k*w)",
        grad_l="exp((1 + k)*l)",
        bounded="below only for -1 < k < 0 (by 1/k); with `alpha` > 0 for every k > -1",
        use="A dial between the others: k = 1 is lsif (plus 1), 0 is ukl, -1 is is (minus 1). Default 1/2.",
        hazard="Larger k overflows sooner and listens to outliers more; smaller k pushes harder on chosen responses "
        "that the policy finds unlikely. For k < 0 the constant of P is ((1 + k)**2 - 1) / (1 + k) more, so that the "
        "loss stays finite at k = -1.",
        family="alpha-divergences of order 1 + k (Cressie-Read) in their variational form.",
    ),
    "is": Entry(
        title="Itakura-Saito",
        h="-log(r)",
        A="-exp(-u)",
        P="u",
        loss="exp(-w) + l",
        grad_w="-exp(-w)",
        grad_l="1",
        bounded="no: l falls without end, and so does the loss for every alpha < 1",
        use="Where chosen responses must not become unlikely: their pull grows as exp(-w). Mostly a limit to compare "
        "with.",
        hazard="Pushes every rejected response down with force 1 for ever (unlearning), and explodes at w < -88.72 in "
        "fp32. No non-negative correction, as P has no lower bound.",
        family="The reverse KL(pi_ref || pi_chosen) in its variational form.",
    ),
    "brier": Entry(
        title="Brier score",
        h="1 / (1 + r)",
        A="-1 / (1 + exp(u))**2",
        P="1 / (1 + exp(-u))**2",
        loss="1 / (1 + exp(w))**2 + 1 / (1 + exp(-l))**2",
        grad_w="-2 * exp(w) / (1 + exp(w))**3",
        grad_l="2 * exp(-l) / (1 + exp(-l))**3",
        bounded="between 0 and 2, gradients by 8/27",
        use="The most robust: a mislabelled pair far from the boundary has no say at all.",
        hazard="Not convex in u: a chosen response that starts very unlikely stays there.",
        family="Squared loss of the classifier sigmoid(u): the triangular (Vincze-Le Cam) divergence in its variational "
        "form.",
    ),
    "sppo_hard": Entry(
        title="Self-play preference optimisation, hard labels, `beta`",
        h=None,
        A="-(u - 1/(2*beta))**2",
        P="(u + 1/(2*beta))**2",
        loss="(w - 1/(2*beta))**2 + (l + 1/(2*beta))**2",
        grad_w="2 * (w - 1/(2*beta))",
        grad_l="2 * (l + 1/(2*beta))",
        bounded="below by 0",
        use="Each log ratio has a target of its own: 1/(2 beta) for chosen, -1/(2 beta) for rejected responses. Also of "
        "unpaired data.",
        hazard="No Bregman divergence: no `alpha`, no other link, no claim on a density ratio. beta is the paper's 1/eta "
        "and no factor of the log ratios. Gradients grow with the distance from the targets.",
        family="TRL's `sppo_hard` is of sums.",
    ),
    "apo_zero": Entry(
        title="Anchored preference optimisation, zero, `beta`",
        h=None,
        A="-1 / (1 + exp(beta*u))",
        P="1 / (1 + exp(-beta*u))",
        loss="1 / (1 + exp(beta*w)) + 1 / (1 + exp(-beta*l))",
        grad_w="-beta * exp(beta*w) / (1 + exp(beta*w))**2",
        grad_l="beta * exp(-beta*l) / (1 + exp(-beta*l))**2",
        bounded="between 0 and 2, gradients by beta / 4",
        use="Chosen responses that are better than the model: pushes them up and the rejected ones down, each by itself. "
        "Also of unpaired data.",
        hazard="No Bregman divergence: no `alpha`, no other link. Its pushes fade on both sides of 0.",
        family="Absolute error of a classifier of chosen against rejected, where brier has its square and bce its "
        "logarithm. TRL's `apo_zero` is of sums.",
    ),
    "dpo": Entry(
        title="Direct preference optimisation (contrastive), temperature `beta`, `label_smoothing` = e",
        h=None,
        A=None,
        P=None,
        loss="(1 - e)*log1p(exp(-beta*(w - l))) + e*log1p(exp(beta*(w - l)))",
        grad_w="beta * (e / (1 + exp(-beta*(w - l))) - (1 - e) / (1 + exp(beta*(w - l))))",
        grad_l="-beta * (e / (1 + exp(-beta*(w - l))) - (1 - e) / (1 + exp(beta*(w - l))))",
        bounded="below by 0, gradients by beta",
        use="The baseline. At beta = 1 it is the paper's CPC estimator with one negative.",
        hazard="Only the difference counts: both log-probs may fall together. Couples the pair, so no unpaired data, "
        "no `alpha`, no weights. For beta other than 1 its optimum is not pi_chosen.",
        family="InfoNCE with one negative. With `label_smoothing` > 0 conservative DPO (cDPO), whose optimum is finite; "
        "with `nll_weight` RPO.",
    ),
    "robust": Entry(
        title="Robust DPO, for labels that are wrong with probability `label_smoothing` = e < 1/2",
        h=None,
        A=None,
        P=None,
        loss="((1 - e)*log1p(exp(-beta*(w - l))) - e*log1p(exp(beta*(w - l)))) / (1 - 2*e)",
        grad_w="-beta * ((1 - e) / (1 + exp(beta*(w - l))) + e / (1 + exp(-beta*(w - l)))) / (1 - 2*e)",
        grad_l="beta * ((1 - e) / (1 + exp(beta*(w - l))) + e / (1 + exp(-beta*(w - l)))) / (1 - 2*e)",
        bounded="only for e = 0, where it is dpo",
        use="Pairs some of which are labelled the wrong way round, at a known rate: in expectation over the labels it is "
        "dpo of the right ones.",
        hazard="For e > 0 the loss falls without end as the margin grows, with a push of at least beta e / (1 - 2 e).",
        family="dpo with the same `label_smoothing` (cDPO) moves the optimum instead and is bounded.",
    ),
    "hinge": Entry(
        title="Hinge (SLiC), `beta`",
        h=None,
        A=None,
        P=None,
        loss="max(0, 1 - beta*(w - l))",
        grad_w="-beta if beta*(w - l) < 1 else 0",
        grad_l="beta if beta*(w - l) < 1 else 0",
        bounded="below by 0, gradients by beta",
        use="Every pair is pushed alike until its margin is 1 / beta, and then let go.",
        hazard="Has a kink at that margin, and no gradient beyond it. As for dpo, both log-probs may fall together.",
        family="Sequence likelihood calibration; TRL's `hinge` is of summed log ratios.",
    ),
    "ipo": Entry(
        title="Identity preference optimisation, `beta` (the paper's tau)",
        h=None,
        A=None,
        P=None,
        loss="(w - l - 1/(2*beta))**2",
        grad_w="2 * (w - l - 1/(2*beta))",
        grad_l="-2 * (w - l - 1/(2*beta))",
        bounded="below by 0",
        use="A margin of 1/(2 beta) is the target, and a larger one costs: it does not overfit pairs that are told apart.",
        hazard="Its gradient grows with the distance from the target. On sums the target does not depend on the length; "
        "averages are what TRL takes, and what is taken here by default.",
        family="Squared error of the difference; sppo_hard and cal_dpo have targets for each side.",
    ),
    "exo_pair": Entry(
        title="Exact preference optimisation of a pair, `beta`, `label_smoothing` = e",
        h=None,
        A=None,
        P=None,
        loss="(-log1p(exp(-beta*(w - l))) - log(1 - e)) / (1 + exp(-beta*(w - l))) "
        "+ (-log1p(exp(beta*(w - l))) - log(e)) / (1 + exp(beta*(w - l)))",
        grad_w="beta * (beta*(w - l) - log((1 - e)/e)) / ((1 + exp(beta*(w - l))) * (1 + exp(-beta*(w - l))))",
        grad_l="-beta * (beta*(w - l) - log((1 - e)/e)) / ((1 + exp(beta*(w - l))) * (1 + exp(-beta*(w - l))))",
        bounded="between 0 and -log(e)",
        use="The reverse KL from the policy's preference to the label's, (1 - e, e): where dpo covers the modes, this "
        "seeks one. The optimum is the margin log((1 - e)/e) / beta. Default e = 0.001.",
        hazard="Not convex in the margin: the push on a pair that is far on the wrong side vanishes.",
        family="cDPO is the forward KL of the same two distributions, up to a constant. TRL's `exo_pair` is of sums.",
    ),
    "apo_down": Entry(
        title="Anchored preference optimisation, down, `beta`",
        h=None,
        A=None,
        P=None,
        loss="1 / (1 + exp(-beta*w)) + 1 / (1 + exp(beta*(w - l)))",
        grad_w="beta * exp(-beta*w) / (1 + exp(-beta*w))**2 "
        "- beta * exp(-beta*(w - l)) / (1 + exp(-beta*(w - l)))**2",
        grad_l="beta * exp(-beta*(w - l)) / (1 + exp(-beta*(w - l)))**2",
        bounded="between 0 and 2, gradients by beta / 4 a term",
        use="A model that is better than its chosen responses: pushes them down, and the rejected ones further.",
        hazard="Lowers the likelihood of the chosen responses, by design. apo_zero is for chosen responses that are "
        "better than the model.",
        family="TRL's `apo_down` is of sums.",
    ),
    "cal_dpo": Entry(
        title="Calibrated DPO, `beta`",
        h=None,
        A=None,
        P=None,
        loss="log1p(exp(l - w)) + (w - 1/(2*beta))**2 + (l + 1/(2*beta))**2",
        grad_w="-1 / (1 + exp(w - l)) + 2 * (w - 1/(2*beta))",
        grad_l="1 / (1 + exp(w - l)) + 2 * (l + 1/(2*beta))",
        bounded="below by 0",
        use="dpo at beta = 1 with a target for each side: beta times the log ratio of the chosen response is 1/2, of the "
        "rejected one -1/2, so that the chosen likelihood cannot fall with the margin growing.",
        hazard="beta is in the targets only. Gradients grow with the distance from them.",
        family="sppo_hard plus dpo at beta = 1.",
    ),
}  # fmt: skip

INTRODUCTION = """# The losses

*Written by `docs/make_losses.py`; tests/test_docs.py evaluates every formula on this page.*

All losses are functions of the log ratio `u = log pi_theta(y|x) - log pi_ref(y|x)`: `w` of the chosen response, `l` of
the rejected one (per token with `average_log_prob=True`, the default of the fused calls and the trainer). A Bregman
divergence with a strictly convex `h(r)`, `r = e^u`, gives `A(u) = h'(e^u)`, `P(u) = e^u h'(e^u) - h(e^u)` and

    loss = chosen_weight * (-A(w) + alpha * P(w)) + rejected_weight * (1 - alpha) * P(l)

([DIL](https://arxiv.org/abs/2503.05079), eq. 19; constants are dropped). Always `P'(u) = e^u A'(u)`. `sppo_hard` and `apo_zero`
have the same form with an A and a P of no h (then without `alpha`); the losses from `dpo` on couple the two responses of a pair. All
of these have a `beta` of their own, 0.1 if not given, which their papers take on **sums** of log ratios: with averages, the default here, the same beta
asks for margins and targets per token (5 nats for sppo_hard, ipo and cal_dpo, 10 for hinge) that no training reaches. Give `average_log_prob=False`, or a
larger beta.

"""

LINKS = """## Links

What a Bregman divergence is put to. With `d = w - l`, and A and P of the loss:

| `link` | loss of a pair | d loss / d w, and the opposite in l | `beta` if not given | source |
|---|---|---|---|---|
| `imitation` (default) | `-A(v_w) + P(v_l)`, `v = beta u + offset` | each side by itself | 1 | DIL (arXiv 2503.05079) eq. 19 |
| `ratio` (BPO) | `(P(-x) - A(x)) / scale`, `x = beta d` | `-beta (A'(x) + e^-x A'(-x)) / scale` | 0.1 | BPO (arXiv 2505.19601) |
| `f_dpo` | `softplus(-beta (A(w) - A(l)))` | `-beta sigmoid(-beta (A(w) - A(l))) A'(w)`; in l with `A'(l)` | 0.1 | f-DPO (arXiv 2309.16240) |

- **ratio** fits the ratio of the two responses. `bce` is twice DPO; `power` with `scale=4` is BPO's SBA, whose gradient is DPO's where d = 0, as is
  that of every loss with A'(0) = 1. Unbounded below are `lsif`, `ukl`, `is` and `power` from 0 on and at -1; bounded are `bce`, `brier` and -1 < k < 0. (The entry of LSIF in
  BPO's table 2, `R**2 - 2*R`, has gradient 0 at d = 0, so training would never start; the general formula, here, is `(R**2 - 2/R) / 2` with `R = exp(-beta*d)`.)
- **f_dpo** is DPO under another divergence than the reverse KL: A of `ukl` is DPO itself, of `is` the forward KL, of `bce` Jensen-Shannon, of `power` the
  alpha divergences of order 1 + k, each up to constants.
- `alpha`, the weights, `offset`, `non_negative` and unpaired responses are the imitation link's; `scale` is the ratio's.

"""

OPTIONS = """## Options

| option | what it does |
|---|---|
| `beta` > 0 | Factor of the log ratios: a separable loss sees `v = beta u + offset`, and its gradient is multiplied by beta. TRL's `bco_pair` and `nca_pair` are bce with a beta (and `alpha` = 1/2). `sppo_hard` and the coupled losses have a beta of their own, 0.1 if not given. What `DILOutput` calls rewards stays u; the trainers log beta u. |
| `label_smoothing` in [0, 1/2) | How likely a label is wrong, of `dpo`, `robust` and `exo_pair`. |
| `nll_weight` >= 0 | Adds the negative log-likelihood of the chosen response, a mean over its scored tokens, times this to any loss (RPO, [arXiv 2404.19733](https://arxiv.org/abs/2404.19733), with `dpo`). `dil_loss`, which knows no lengths, takes minus the log-prob as given. |
| `offset` | Added to `beta u` (to u, where beta is the loss's own), one number or one for chosen and one for rejected responses. GSIL's Bernoulli, Brier, KLIEP and LSIF at `alpha u + delta` are bce, brier, ukl and lsif with `beta` = alpha and `offset` = delta; BCO's `beta u - delta` is bce with `offset` = -delta. Not of `link`s of pairs. |
| `alpha` in [0, 1] | Takes the reference expectation over chosen (share alpha) and rejected responses together. 0 is the paper. Where the reference is the mixture of both, alpha = 1/2 is unbiased; 0 is not. Every separable loss then has a finite optimum, `r_w = 1/alpha`, and a chosen term that is bounded below. The gradient of the chosen term is `A'(w) (alpha e^w - 1)`. |
| `max_log_ratio` = M | Evaluates the loss at `M tanh(u/M)` instead of u; the gradient is multiplied by `1/cosh(u/M)^2`, 0 where the bound has saturated. For sums of log ratios, which overflow otherwise. Rewards and log-probs stay unbounded. Off by default. |
| `non_negative` = C, 0 < C < 1 | The correction of Kato and Teshima (2021): with `Q = P - P(-inf)`, the loss is `mean[-A(w) + C Q(w)] + max(0, (1 - alpha) mean[Q(l)] + (alpha - C) mean[Q(w)])`. C is below 1 / (largest density ratio). It stops the fit from driving rejected mass to nothing in order to overshoot on the chosen responses of a sample. It couples a batch: **exact only for the responses of one call**, not for a mean over micro-batches or processes, so the trainer does not offer it. Needs `reduction="mean"` and a finite `P(-inf)`: not is, power at -1, or what is no Bregman divergence. For alpha >= C it changes nothing. |
| `chosen_weight`, `rejected_weight` | Factors of the two terms. 0 leaves a term out. |
| `is_chosen` [S] | Unpaired responses, each chosen or rejected. The mean is that over the chosen ones plus that over the rejected ones. Exact under gradient accumulation and data parallelism through `DILOutput.counts` and `DILOutput.share`. |

An option that a loss does not use is an error.

**Not here.** SimPO, CPO, ORPO and SimPER have no reference. "No reference" would be a third kind of reference in every function, config and cache, and of the
four it would carry one: SimPO's margin, ORPO's odds and SimPER's terms are none of the above. With reference log-probs of 0, `dil_loss` of `dpo` is CPO
on sums (with `nll_weight`), and SimPO without its margin on averages. KTO's baseline couples a batch, as do AOT's sorted log ratios: the mean over an
optimizer step would then depend on how it is cut into micro-batches. A loss of each token's log ratio (arXiv 2605.12288) has neither a loss nor a reward
of a response, which is what every function, metric and trainer here hands on.

## Overflow

Terms are computed in fp64 and returned in the precision of the log-probs. What overflows is an infinity of the right
sign, never NaN: where `-A(w)` and `P` overflow against each other, an infinite log ratio outweighs a finite one, and else
their logarithms are compared. (Only the losses and links that couple a pair may be NaN, of two log ratios that are the same infinity.) The gradient of an
overflowed term is the infinity of its sign; a gradient that is multiplied by 0 (a weight, a saturated bound, an upstream
gradient of 0) is 0. A batch whose losses overflow in both directions has the loss +inf. NaN log-probs give NaN.

## A loss of your own

```python
from dil_kernels import Divergence, register_divergence

register_divergence(Divergence(name="cubic", source="mine", h=lambda r: r**3 / 6))  # or A=..., P=..., or pair=...
fused_dil_loss(logits, labels, ref_logits=ref_logits, loss_type="cubic", alpha=0.5)
```

`h` is differentiated twice for A, P and their derivatives; A and P give more control over rounding and overflow. Both are
checked at registration (`P' = e^u A'`, `A' > 0` on a grid). Terms that cancel for large r, as those of bce's h, are not to be
had from h: registration says from which log ratio on. `parameters=(Parameter(name="beta", default=0.1, minimum=0.0), ...)` declares what the functions take after the log ratios, by the names
`beta`, `power` and `label_smoothing`; `bregman=False` is for A and P of no h. The compiled kernels still sum the log ratios; the loss itself, one
number a sequence, runs in torch. `dil-train --import my_losses --loss-type cubic` loads a module that registers one.
"""


def table() -> str:
    """One row a loss."""
    lines = [
        "| `loss_type` | loss (constants dropped) | d loss / d w | d loss / d l | bounded | source |",
        "|---|---|---|---|---|---|",
    ]
    for name, e in ENTRIES.items():
        formulas = (f"`{formula}`" for formula in (e.loss, e.grad_w, e.grad_l))
        lines.append(f"| [`{name}`](#{name}) | {' | '.join(formulas)} | {e.bounded} | {get_divergence(name).source} |")
    return "\n".join(lines) + "\n"


def section(name: str) -> str:
    """All there is to say of one loss."""
    e = ENTRIES[name]
    rows = [(label, formula) for label, formula in (("h(r)", e.h), ("A(u)", e.A), ("P(u)", e.P)) if formula]
    rows += [("loss", e.loss), ("d loss / d w", e.grad_w), ("d loss / d l", e.grad_l)]
    text = [f'<a id="{name}"></a>\n## `{name}`: {e.title}\n', "| | |\n|---|---|"]
    text += [f"| {label} | `{formula}` |" for label, formula in rows]
    text += [
        f"\n![loss and gradient of {name}](losses/{name}.png)\n",
        f"- **When**: {e.use}",
        f"- **Bounded**: {e.bounded}.",
        f"- **Beware**: {e.hazard}",
        f"- **Relatives**: {e.family}",
        f"- **Source**: {get_divergence(name).source}.\n",
    ]
    return "\n".join(text)


def page() -> str:
    """docs/losses.md."""
    missing = set(divergence_names()) ^ set(ENTRIES)
    if missing:
        raise SystemExit(f"docs/make_losses.py and the registry differ in: {', '.join(sorted(missing))}")
    ratio = "![how hard chosen and rejected responses are pushed](losses/gradients.png)\n\n"
    balance = (
        "What the losses differ in is how hard each side is pushed. DPO pushes both alike, always; of the separable ones\n"
        "the ratio of the two depends on where the responses are: `exp(w - 2 l)` for lsif, `exp(-l)` for ukl,\n"
        "`sigmoid(-w) / sigmoid(l)` for bce.\n\n"
    )
    return INTRODUCTION + table() + "\n" + balance + ratio + "\n".join(map(section, ENTRIES)) + "\n" + LINKS + OPTIONS


def default_parameters(name: str, **options: float) -> LossParameters:
    """The loss as it is without options; what has a beta at beta = 1, where the others stand."""
    return LossOptions(loss_type=name, beta=1.0, **options).parameters


def curves(name: str, u: torch.Tensor, alpha: float = 0.0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradient over the log ratio of each side, the other side held at 0."""
    zero = torch.zeros_like(u)
    out = {}
    for side in ("chosen", "rejected"):
        v = u.clone().requires_grad_()
        pair = (v, zero) if side == "chosen" else (zero, v)
        loss = pair_losses(*pair, default_parameters(name, alpha=alpha))
        (grad,) = torch.autograd.grad(loss.sum(), v)
        out[side] = (loss.detach() - pair_losses(zero, zero, default_parameters(name, alpha=alpha)), grad)
    return out


def draw() -> None:
    """docs/losses/*.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130}
    (DOCS / "losses").mkdir(exist_ok=True)
    u = torch.linspace(-4.0, 4.0, 401, dtype=torch.float64)
    for name in ENTRIES:
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.0), layout="constrained")
        plain = curves(name, u)
        for side, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
            for axis, values in zip(axes, plain[side], strict=True):
                axis.plot(u, values, color=color, label=side)
        if get_divergence(name).separable and get_divergence(name).bregman:
            for axis, values in zip(axes, curves(name, u, alpha=0.5)["chosen"], strict=True):
                axis.plot(u, values, color=CHOSEN, linestyle=":", label="chosen, alpha = 1/2")
        parameter = ", power = 1/2" if name == "power" else ", beta = 1" if get_divergence(name).own("beta") else ""
        for axis, what in zip(axes, ("loss - loss at 0", "gradient"), strict=True):
            axis.set(xlabel="log ratio u (the other side at 0)", title=f"{name}{parameter}: {what}")
            low, high = axis.get_ylim()
            axis.set_ylim(max(low, -4.2), min(high, 4.2))
            axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
            axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(DOCS / "losses" / f"{name}.png", metadata={"Software": None})
        plt.close(figure)

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    for name in (*(name for name in ENTRIES if get_divergence(name).bregman and get_divergence(name).separable), "dpo"):
        for axis, side in zip(axes, ("chosen", "rejected"), strict=True):
            axis.plot(u, curves(name, u)[side][1].abs(), label=name, linestyle="--" if name == "dpo" else "-")
            axis.set(title=f"push on the {side} response", xlabel="its log ratio u (the other side at 0)", ylim=(0, 3))
    for axis in axes:
        axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axes[0].set_ylabel("|d loss / d u|")
    axes[1].legend(frameon=False, loc="upper left", ncols=2)
    figure.savefig(DOCS / "losses" / "gradients.png", metadata={"Software": None})
    plt.close(figure)


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    path = DOCS / "losses.md"
    if parser.parse_args().check:
        if path.read_text() != page():
            print("docs/losses.md is stale: run python docs/make_losses.py", file=sys.stderr)
            return 1
        return 0
    path.write_text(page())
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
