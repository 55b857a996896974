"""Write docs/losses.md and its pictures from loss_entries.py and the registry of losses.

    python docs/make_losses.py          writes docs/losses.md and docs/losses/*.png
    python docs/make_losses.py --check  fails if docs/losses.md is not what it would write

The formulas are evaluated by tests/test_docs.py against the compiled losses, and every registered loss must have a row.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

from dil_kernels.losses import LossOptions, LossParameters, divergence_names, get_divergence
from dil_kernels.losses.scalar import pair_losses

sys.path.insert(0, str(Path(__file__).parent))
from formulas import latex
from loss_entries import ENTRIES

DOCS = Path(__file__).parent
CHOSEN, REJECTED = "#1b7837", "#b2182b"


INTRODUCTION = r"""# The losses

*Written by `docs/make_losses.py`; tests/test_docs.py evaluates the formulas of every loss on this page.*

All losses are functions of the log ratio

$$u = \log \frac{\pi_\theta(y \mid x)}{\pi_\mathrm{ref}(y \mid x)},$$

$w$ of the chosen response, $l$ of the rejected one (per token with `average_log_prob=True`, the default of the fused calls and the trainer). A Bregman
divergence with a strictly convex $h(r)$, $r = e^u$, gives $A(u) = h'(e^u)$, $P(u) = e^u h'(e^u) - h(e^u)$ and

$$\mathrm{loss} = c_w (-A(w) + \alpha P(w)) + c_l (1 - \alpha) P(l)$$

with $c_w$ the `chosen_weight` and $c_l$ the `rejected_weight`
([DIL](https://arxiv.org/abs/2503.05079), eq. 19; constants are dropped). Always $P'(u) = e^u A'(u)$. `sppo_hard` and `apo_zero`
have the same form with an A and a P of no h (then without `alpha`); the losses from `dpo` on couple the two responses of a pair. All
of these have a `beta` of their own, 0.1 if not given, which their papers take on **sums** of log ratios: with averages, the default here, the same beta
asks for margins and targets per token (5 nats for sppo_hard, ipo and cal_dpo, 10 for hinge) that no training reaches. Give `average_log_prob=False`, or a
larger beta.

In the formulas $\beta$ is `beta`, $k$ is `power`, and $\varepsilon$, e in the text, is `label_smoothing`. The section of each loss has its gradients and its source.

"""

LINKS = r"""## Links

What a Bregman divergence is put to. With $d = w - l$, and A and P of the loss:

| `link` | loss of a pair | gradient in w, and the opposite in l | `beta` if not given | source |
|---|---|---|---|---|
| `imitation` (default) | $-A(v_w) + P(v_l)$, $v = \beta u + \mathrm{offset}$ | each side by itself | 1 | DIL (arXiv 2503.05079) eq. 19 |
| `ratio` (BPO) | $\frac{P(-x) - A(x)}{\mathrm{scale}}$, $x = \beta d$ | $-\frac{\beta}{\mathrm{scale}} (A'(x) + e^{-x} A'(-x))$ | 0.1 | BPO (arXiv 2505.19601) |
| `f_dpo` | $\log(1 + e^{-x})$, $x = \beta (A(w) - A(l))$ | $-\frac{\beta}{1 + e^x} A'(w)$; in l with $A'(l)$ | 0.1 | f-DPO (arXiv 2309.16240) |

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
| `alpha` in [0, 1] | Takes the reference expectation over chosen (share alpha) and rejected responses together. 0 is the paper. Where the reference is the mixture of both, alpha = 1/2 is unbiased; 0 is not. Every divergence then has a finite optimum, `r_w = 1/alpha`, and a chosen term that is bounded below. The gradient of the chosen term is `A'(w) (alpha e^w - 1)`. |
| `max_log_ratio` = M | Evaluates the loss at `M tanh(u/M)` instead of u; the gradient is multiplied by `1/cosh(u/M)^2`, 0 where the bound has saturated. For sums of log ratios, which overflow otherwise. Rewards and log-probs stay unbounded. Off by default. |
| `non_negative` = C, 0 < C < 1 | The correction of Kato and Teshima (2021): with `Q = P - P(-inf)`, the loss is `mean[-A(w) + C Q(w)] + max(0, (1 - alpha) mean[Q(l)] + (alpha - C) mean[Q(w)])`. C is below 1 / (largest density ratio). It stops the fit from driving rejected mass to nothing in order to overshoot on the chosen responses of a sample. It couples a batch: **exact only for the responses of one call**, not for a mean over micro-batches or processes, so the trainer does not offer it. Needs `reduction="mean"` and a finite `P(-inf)`: not is, power at -1, or what is no Bregman divergence. For alpha >= C it changes nothing. |
| `chosen_weight`, `rejected_weight` | Factors of the two terms. 0 leaves a term out. |
| `is_chosen` [S] | Unpaired responses, each chosen or rejected. The mean is that over the chosen ones plus that over the rejected ones. Exact under gradient accumulation and data parallelism through `DILOutput.counts` and `DILOutput.share`. |

An option that a loss does not use is an error. [A loss of your own](own_loss.md) has them, too.

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
"""


def table() -> str:
    """One row a loss."""
    lines = [
        "| `loss_type` | loss (constants dropped) | bounded |",
        "|---|---|---|",
    ]
    for name, e in ENTRIES.items():
        loss = f"${latex(e.loss)}$"
        lines.append(f"| [`{name}`](#{anchor(name)}) | {loss} | {e.bounded} |")
    return "\n".join(lines) + "\n"


def anchor(name: str) -> str:
    """Of the section of a loss, as GitHub and the site make it of the title."""
    return re.sub(r"[^\w\- ]", "", f"{name}: {ENTRIES[name].title}".lower()).replace(" ", "-")


def section(name: str) -> str:
    """All there is to say of one loss."""
    e = ENTRIES[name]
    rows = [(label, formula) for label, formula in (("h(r)", e.h), ("A(u)", e.A), ("P(u)", e.P)) if formula]
    rows += [("loss", e.loss), ("gradient in w", e.grad_w), ("gradient in l", e.grad_l)]
    text = [f"## `{name}`: {e.title}\n", "| | |\n|---|---|"]
    text += [f"| {label} | ${latex(formula)}$ |" for label, formula in rows]
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
