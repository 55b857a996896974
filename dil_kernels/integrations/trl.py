"""`DILTrainer` on top of TRL's `DPOTrainer`, for TRL 1.0 and later.

TRL keeps what it does well: data, collators, PEFT, reference models, precomputed reference log-probs, callbacks. The
log-probs, the loss and what is averaged over are ours: a step with gradient accumulation, on any number of processes,
has the gradients of one large batch, and so have the metrics.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

try:
    from accelerate.utils import is_peft_model
    from trl import DPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import use_adapter
except ImportError as error:
    raise ImportError(f"this DILTrainer needs the extra [trl]: pip install 'dil-kernels[trl]' ({error})") from error

from dil_kernels.backends import resolve_backend
from dil_kernels.data.batches import IGNORE_INDEX
from dil_kernels.functional import DILOutput
from dil_kernels.functional.loss import loss_of_token_logps
from dil_kernels.integrations.token_metrics import COLUMNS, token_means, token_sums
from dil_kernels.integrations.trl_config import DILConfig
from dil_kernels.losses import FusedLossOptions
from dil_kernels.models.fused_head import UnsupportedHeadError, install_fused_head
from dil_kernels.models.rotary_lengths import keep_lengths_apart
from dil_kernels.models.scoring import Scores, score
from dil_kernels.reference import accumulation_dtype
from dil_kernels.training.loss_watch import NonFinitePairs
from dil_kernels.training.metrics import METRICS, counted_pairs, means, pair_metrics
from dil_kernels.training.model_checks import check_rows

__all__ = ["DILConfig", "DILTrainer"]

logger = logging.getLogger(__name__)

NOT_FOR_THE_MODEL = frozenset({"completion_mask", "num_scored", "ref_chosen_logps", "ref_rejected_logps"})


@dataclass
class CountingCollator:
    """Another collator whose batches also say num_scored, so that the fused head need not ask the device.

    Attributes:
        collate: makes batches as TRL's collators do.
    """

    collate: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of TRL, and num_scored: how many tokens of its responses are scored."""
        batch: dict[str, Any] = self.collate(examples)
        return {**batch, "num_scored": int(batch["completion_mask"][:, 1:].sum())}


class DILTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with Direct Imitation Learning (arXiv 2503.05079) in place of DPO.

    The loss is the mean over the pairs whose responses both have a scored token, over all micro-batches and processes
    of an optimizer step together. TRL averages the means of micro-batches instead, which weighs a pair by how many
    others happened to be beside it.

    Metrics have TRL's names and are means over pairs, in training since the last log, in evaluation over the data set;
    they stay on the device until they are logged. rewards/* are log ratios, times beta.

    Args:
        model, ref_model: as of `trl.DPOTrainer`.
        args: a `DILConfig`.
        rest, kwargs: the other arguments of `trl.DPOTrainer`.

    Raises:
        TypeError: args are not a `DILConfig`.
        NotImplementedError: a set-up in which the loss would not be exact.
    """

    args: DILConfig
    data_collator: Any
    loss_is_scaled_for_ga = True  # by the number of pairs, in compute_loss

    _tag_names = ("trl", "dil")
    _name = "DIL"
    _paper = {  # noqa: RUF012, as TRL has it
        "title": "On a Connection Between Imitation Learning and RLHF",
        "id": "2503.05079",
        "citation": textwrap.dedent("""\
            @inproceedings{xiao2025connection,
                title        = {{On a Connection Between Imitation Learning and RLHF}},
                author       = {Teng Xiao and Yige Yuan and Mingxiao Li and Zhengyu Chen and Vasant Honavar},
                year         = 2025,
                booktitle    = {International Conference on Learning Representations},
            }"""),
    }

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: nn.Module | None = None,
        args: DILConfig | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        args = DILConfig("dil_output") if args is None else args
        if not isinstance(args, DILConfig):
            raise TypeError(f"args must be a dil_kernels.integrations.trl.DILConfig, got {type(args).__name__}")
        self._fused_heads: dict[nn.Module, bool] = {}
        super().__init__(model, ref_model, args, *rest, **kwargs)
        if self.args.n_gpu > 1:
            raise NotImplementedError(
                f"{self.args.n_gpu} GPUs in one process would split a batch across its pairs; use torchrun, or make "
                "one GPU visible with CUDA_VISIBLE_DEVICES"
            )
        if getattr(self.accelerator, "parallelism_config", None) is not None:
            raise NotImplementedError("DILTrainer supports data parallelism only, no tensor or context parallelism")
        self.data_collator = CountingCollator(self.data_collator)
        # Versions of transformers without `loss_is_scaled_for_ga` go by this instead.
        self.model_accepts_loss_kwargs = True
        self.loss_options = FusedLossOptions(
            **args.loss_options(), average_log_prob=args.average_log_prob, reduction="sum"
        )
        self.beta = self.loss_options.factor
        self._has_router = getattr(self, "aux_loss_enabled", False)  # a mixture of experts, in TRL 1.8 or later
        self._train_tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._start_record()

    def _start_record(self) -> None:
        self._train_sums, self._eval_sums = self._no_sums(), self._no_sums()
        self._non_finite = NonFinitePairs(self.args.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`."""
        self._start_record()
        return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one optimizer step, and how many pairs count in it over all processes."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        num_pairs = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            scored = batch["completion_mask"][:, 1:].any(1)
            num_pairs += torch.logical_and(*scored.chunk(2)).sum().to(device)
        return batches, self.accelerator.reduce(num_pairs, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The share of a micro-batch in the loss of its optimizer step.

        Args:
            model: the policy as the trainer wrapped it.
            inputs: a batch of TRL's collators, on the device.
            return_outputs: return what the model returned, too, logits included.
            num_items_in_batch: the pairs that count in the step over all processes; those of this batch if None.

        Returns:
            The loss []. Its sum over the micro-batches, averaged over the processes, is the mean over the pairs.
        """
        labels = _labels(inputs)
        with_router = {"output_router_logits": True} if self._has_router else {}
        policy = self._score(model, inputs, labels, return_statistics=True, keep_logits=return_outputs, **with_router)
        ref_token_logps = ref_logps = None
        if self.precompute_ref_logps:
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            ref_token_logps = self._score_reference(None, inputs, labels)
        output = loss_of_token_logps(
            policy.token_logps,
            labels,
            None,
            ref_token_logps,
            ref_logps,
            self.loss_options,
            backend=resolve_backend(self.args.backend, labels.device, policy.token_logps.dtype),
        )
        if num_items_in_batch is None:
            loss = output.loss / counted_pairs(output).sum().clamp(min=1)
        else:
            # Gradients are averaged over the processes, but the mean is over the pairs of all of them.
            loss = output.loss * self.accelerator.num_processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self._has_router:
            num_batches = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + self.router_aux_loss_coef * policy.outputs.aux_loss / num_batches
        self._record(inputs, policy, output)
        return (loss, policy.outputs) if return_outputs else loss

    def _score(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        labels: Tensor,
        *,
        return_statistics: bool = False,
        keep_logits: bool = False,
        **kwargs: Any,
    ) -> Scores:
        """The log-probs of the labels [2B, T] of a batch, and what else is asked for."""
        model_inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
        return score(
            model,
            {**model_inputs, "use_cache": False, **kwargs},
            labels,
            fused_head=self._has_fused_head(model),
            backend=self.args.backend,
            stash_bytes=self.args.stash_bytes,
            max_scored_tokens=inputs.get("num_scored"),
            return_statistics=return_statistics,
            keep_logits=keep_logits,
            virtual_tokens=_adds_virtual_tokens(self.accelerator.unwrap_model(model)),
        )

    def _has_fused_head(self, model: nn.Module) -> bool:
        """Whether the model scores labels without logits; teaches it on the first call, if it can.

        That call also makes it take each sequence by its own length, and checks that it does.
        """
        model = self.accelerator.unwrap_model(model)
        if model not in self._fused_heads:
            keep_lengths_apart(model)
            check_rows(model)
            problem = self._fused_head_problem(model)
            if problem is not None and self.args.fused_head:
                raise UnsupportedHeadError(f"fused_head=True was given, but {problem}")
            if problem is not None and self.args.fused_head is None:
                logger.warning("log-probs are taken from logits, since %s", problem)
            self._fused_heads[model] = problem is None
        return self._fused_heads[model]

    def _fused_head_problem(self, model: Any) -> str | None:
        """Why the model does not score labels without logits; None if it does."""
        if self.args.fused_head is False:
            return "fused_head=False was given"
        if _adds_virtual_tokens(model):
            return "prompt tuning adds virtual tokens, which have no label"
        try:
            install_fused_head(model)
        except UnsupportedHeadError as error:
            return str(error)
        return None

    def _score_reference(self, model: nn.Module | None, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """Log-probs of the labels under the reference: `model`, or the one that the trainer holds."""
        adapter: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            # The adapters off give a new adapter's reference; TRL keeps a copy of one that was loaded.
            adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        if model is None:
            model = self.model if self.ref_model is None else self.ref_model
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter,
            self.accelerator.autocast(),
        ):
            return self._score(model, inputs, labels).token_logps

    def compute_ref_log_probs(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Summed log-probs [B] of chosen and rejected responses under the reference, for TRL's precomputation.

        Args:
            args: (model, inputs), in TRL before 1.9 only (inputs,).
        """
        *model, inputs = args
        logps = self._score_reference(model[0] if model else None, inputs, _labels(inputs))
        chosen, rejected = logps.sum(1).chunk(2)
        return chosen, rejected

    def _no_sums(self) -> Tensor:
        """Nothing to log yet: the sums of `pair_metrics`, COLUMNS and the router's loss."""
        size = len(METRICS) + 1 + len(COLUMNS) + 1
        return torch.zeros(size, dtype=accumulation_dtype(self.args.device), device=self.args.device)

    def _record(self, inputs: dict[str, Any], policy: Scores, output: DILOutput) -> None:
        """Add a micro-batch to what is logged next; nothing waits for the device."""
        assert policy.statistics is not None
        rewards = {name: self.beta * getattr(output, name) for name in ("chosen_rewards", "rejected_rewards")}
        pairs = pair_metrics(output._replace(**rewards))
        aux_loss = pairs[:, -1:] * (policy.outputs.aux_loss.detach() if self._has_router else 0.0)
        sums = torch.cat([pairs, token_sums(policy.statistics, output), aux_loss], dim=1)
        if self.model.training:
            self._train_sums += sums.sum(0)
            self._train_tokens += inputs["attention_mask"].sum()
            self._non_finite.add(output, None, self.state.global_step + 1)
        else:
            self._eval_sums += self.accelerator.gather_for_metrics(sums).sum(0)

    def _means(self, sums: Tensor) -> dict[str, float]:
        """What TRL logs, from the sums over pairs of all processes, to be called by all of them."""
        pairs, tokens, (aux_loss,) = sums.split([len(METRICS) + 1, len(COLUMNS), 1])
        metrics = means(pairs) | token_means(tokens)
        if self._has_router:
            metrics["aux_loss"] = (aux_loss / pairs[-1]).item()
            metrics["loss"] += self.router_aux_loss_coef * metrics["aux_loss"]
        metrics["num_tokens"] = self.accelerator.reduce(self._train_tokens, reduction="sum").item()
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, in training with the means of the metrics since the last log, which waits for the device."""
        if "loss" in logs:
            self._non_finite.check(self.accelerator.gather, self.args.output_dir)
            metrics = self._means(self.accelerator.reduce(self._train_sums, reduction="sum"))
            logs |= {name: value for name, value in metrics.items() if name != "loss"}
            self._train_sums = self._no_sums()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._non_finite.check(self.accelerator.gather, self.args.output_dir)
        super()._save_checkpoint(model, trial)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate; the loss and the metrics are means over all pairs of the data set, whatever the batches."""
        self._eval_sums = self._no_sums()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = self._means(self._eval_sums)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output


def _adds_virtual_tokens(model: Any) -> bool:
    """Whether the forward puts tokens of its own before the inputs."""
    return is_peft_model(model) and model.active_peft_config.is_prompt_learning


def _labels(inputs: dict[str, Any]) -> Tensor:  # [2B, T]
    labels: Tensor = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
    return labels
