"""What docs/losses.md says of each loss; make_losses.py writes the page, and tests/test_docs.py evaluates every formula."""

from __future__ import annotations

from dataclasses import dataclass


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
