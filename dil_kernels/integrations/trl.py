"""`DILTrainer` on top of TRL's `DPOTrainer`, for TRL 1.0 and later.

TRL keeps what it does well: data, collators, PEFT, reference models, precomputed reference log-probs, callbacks. The
log-probs, the loss and what is averaged over are ours: a step with gradient accumulation, on any number of processes,
has the gradients of one large batch, and so have the metrics.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dil_kernels.wording import needs_extra

try:
    from accelerate.utils import broadcast_object_list, is_peft_model
    from datasets import Dataset
    from datasets.fingerprint import Hasher
    from trl import DPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import use_adapter
except ImportError as error:
    raise ImportError(needs_extra("this DILTrainer", "trl", error)) from error

from dil_kernels.backends import resolve_backend
from dil_kernels.data.batches import Batch
from dil_kernels.functional import DILOutput
from dil_kernels.functional.loss import loss_of_token_logps
from dil_kernels.integrations.token_metrics import COLUMNS, token_means, token_sums
from dil_kernels.integrations.trl_adapters import REFERENCE, copyable, settle_reference
from dil_kernels.integrations.trl_config import DILConfig
from dil_kernels.integrations.trl_models import ScoredModels
from dil_kernels.integrations.trl_rows import RowCollator, batch_of, model_inputs, num_tokens, refuse_unpaired
from dil_kernels.losses import FusedLossOptions
from dil_kernels.models.evaluation import evaluating
from dil_kernels.models.scoring import Scores, score
from dil_kernels.reference import accumulation_dtype
from dil_kernels.training.checkpoints import check_weights
from dil_kernels.training.loss_watch import NonFinitePairs
from dil_kernels.training.metrics import METRICS, counted_pairs, means, pair_metrics
from dil_kernels.training.precompute import has_reference, how_taken
from dil_kernels.training.ref_cache import model_description, versions
from dil_kernels.training.set_up import install_joined_rows, joined_rows_of, refuse_split_batches, refuse_streams
from dil_kernels.training.sharding import keep_outputs_exact
from dil_kernels.training.start import AtEveryStart

__all__ = ["DILConfig", "DILTrainer"]


class DILTrainer(DPOTrainer):
    """TRL's `DPOTrainer` with Direct Imitation Learning (arXiv 2503.05079) in place of DPO.

    The loss is the mean over the pairs whose responses both have a scored token, over all micro-batches and processes
    of an optimizer step together. TRL averages the means of micro-batches instead, which weighs a pair by how many
    others happened to be beside it.

    Metrics have TRL's names, in training of the steps since the last log - of those after it in the final entry -, in
    evaluation of the data set; they stay on the device until they are logged. They are means over pairs, entropy,
    logits/* and mean_token_accuracy over tokens. rewards/* are log ratios, times beta.

    A loss that is not finite, or a weight that training left so, ends training with a `FloatingPointError`: at the
    next log, before the next checkpoint or at the end.

    With `padding_free` or `prefix_sharing` the sequences of TRL's batches are joined to one row; of batches whose
    logits are asked for (`compute_metrics`, `predict`) they are not.

    Args:
        model, ref_model: as of `trl.DPOTrainer`.
        args: a `DILConfig`.
        rest, kwargs: the other arguments of `trl.DPOTrainer`.

    Raises:
        TypeError: args are not a `DILConfig`.
        ValueError: responses are unpaired.
        UnsupportedPackingError: a model does not keep the sequences of a row apart.
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
        names = [*inspect.signature(DPOTrainer).parameters][3:]  # of those after args
        refuse_unpaired({**dict(zip(names, rest, strict=False)), **kwargs})
        self._joined_rows = joined_rows_of(args)
        padding_free, args.padding_free = args.padding_free, False  # TRL would say that it has none
        try:
            with copyable(model, ref_model):
                super().__init__(model, ref_model, args, *rest, **kwargs)
        finally:
            args.padding_free = padding_free
        # Versions of transformers without `loss_is_scaled_for_ga` go by this instead.
        self.model_accepts_loss_kwargs = True
        self.loss_options = FusedLossOptions(
            **args.loss_options(), average_log_prob=bool(args.average_log_prob), reduction="sum"
        )
        self.beta = self.loss_options.factor
        self._has_router = getattr(self, "aux_loss_enabled", False)  # a mixture of experts, in TRL 1.8 or later
        if self._has_router and self._joined_rows == "prefix_sharing":
            raise NotImplementedError(
                "prefix_sharing=True was given, but the router's loss would count the tokens of a shared prompt once; "
                "leave it out with router_aux_loss_coef=0, or take padding_free=True"
            )
        self._start_record()
        self.add_callback(AtEveryStart(self._start_record))

    def create_accelerator_and_postprocess(self) -> None:
        """As of `transformers.Trainer`; FSDP2 returns log-probs as exact as they are."""
        super().create_accelerator_and_postprocess()
        keep_outputs_exact(self.accelerator)

    @property
    def ref_model(self) -> Any:
        """The reference, where it has weights of its own, as TRL wrapped it."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        # TRL sets it, whatever it is, before it wraps models and precomputes log-probs.
        self._ref_model = model
        if not hasattr(self, "_models"):
            self._set_up()

    def _set_up(self) -> None:
        """Prepare the models and the collator, while the models are whole."""
        refuse_split_batches(self)
        if self._joined_rows is not None and getattr(self, "_is_vision_dataset", False):
            raise NotImplementedError(
                f"{self._joined_rows}=True was given, but the data have images, which go by padded rows"
            )
        if self.ref_model is None and is_peft_model(self.model):
            settle_reference(self.model)
        self._models = ScoredModels(self.args, self.accelerator)
        models = {name: each for name in ("model", "ref_model") if (each := getattr(self, name)) is not None}
        for name, each in models.items():
            self._models.prepare(each, name)
        install_joined_rows([*models.values()], self._joined_rows, self.accelerator)
        self.data_collator = RowCollator(self.data_collator, self._joined_rows)

    @contextlib.contextmanager
    def _padded_rows(self) -> Iterator[None]:
        """For loaders of batches whose logits are asked for."""
        collator = self.data_collator
        if isinstance(collator, RowCollator):
            self.data_collator = RowCollator(collator.collate)
        try:
            yield
        finally:
            self.data_collator = collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As of `transformers.Trainer`."""
        refuse_streams(eval_dataset, self.accelerator.num_processes)
        with contextlib.nullcontext() if self.compute_metrics is None else self._padded_rows():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As of `transformers.Trainer`."""
        refuse_streams(test_dataset, self.accelerator.num_processes)
        with self._padded_rows():
            return super().get_test_dataloader(test_dataset)

    def _start_record(self) -> None:
        self._train_sums, self._eval_sums = self._no_sums(), self._no_sums()
        self._train_tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._non_finite = NonFinitePairs(self.args.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`.

        Raises:
            FloatingPointError: a loss, or a weight that training left, is not finite.
        """
        output = super().train(*args, **kwargs)
        check_weights(self.model, self.state.global_step, self.accelerator.gather)
        return output

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one optimizer step, and how many pairs count in it over all processes."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        num_pairs = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            num_pairs += batch_of(batch).scored_counts()[0].to(device)
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
        batch = batch_of(inputs)
        with_router = {"output_router_logits": True} if self._has_router else {}
        policy = self._score(model, inputs, batch, return_statistics=True, keep_logits=return_outputs, **with_router)
        ref_token_logps = ref_logps = None
        if self.precompute_ref_logps:
            ref_logps = batch.ref_logps(self.loss_options)
        else:
            ref_token_logps = self._score_reference(None, inputs, batch)
        output = loss_of_token_logps(
            batch.of_rows(policy.token_logps),
            batch.labels,
            batch.layout.cu_seqlens,
            ref_token_logps,
            ref_logps,
            self.loss_options,
            backend=resolve_backend(self.args.backend, batch.labels.device, policy.token_logps.dtype),
        )
        if num_items_in_batch is None:
            loss = output.loss / counted_pairs(output).sum().clamp(min=1)
        else:
            # Gradients are averaged over the processes, but the mean is over the pairs of all of them.
            loss = output.loss * self.accelerator.num_processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self._has_router:
            num_batches = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + self.router_aux_loss_coef * policy.outputs.aux_loss / num_batches
        self._record(batch, policy, output)
        return (loss, policy.outputs) if return_outputs else loss

    def _score(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        batch: Batch,
        *,
        return_statistics: bool = False,
        keep_logits: bool = False,
        **kwargs: Any,
    ) -> Scores:
        """The log-probs of the labels of a batch, as its rows lie, and what else is asked for."""
        return score(
            model,
            {**model_inputs(inputs, batch), **kwargs},
            batch.row_labels,
            fused_head=self._models.has_fused_head(model),
            backend=self.args.backend,
            stash_bytes=self.args.stash_bytes,
            max_scored_tokens=batch.num_scored,
            return_statistics=return_statistics,
            keep_logits=keep_logits,
            virtual_tokens=self._models.adds_virtual_tokens(model),
        )

    def _score_reference(self, model: nn.Module | None, inputs: dict[str, Any], batch: Batch) -> Tensor:
        """Log-probs of the labels under the reference: `model`, or the one that the trainer holds."""
        adapter: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self._models.unwrapped(self.model)):
            policy = self._models.unwrapped(self.model)
            # The adapters off give a new adapter's reference; TRL keeps a copy of one that was loaded.
            adapter = use_adapter(policy, adapter_name=REFERENCE if REFERENCE in policy.peft_config else None)
        if model is None:
            model = self.model if self.ref_model is None else self.ref_model
        # FSDP2 computes in the precision of its own policy instead.
        autocast = contextlib.nullcontext() if self.accelerator.is_fsdp2 else self.accelerator.autocast()
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            evaluating(self._models.unwrapped(model)),
            adapter,
            autocast,
        ):
            return batch.of_rows(self._score(model, inputs, batch).token_logps)

    def compute_ref_log_probs(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Summed log-probs [B] of chosen and rejected responses under the reference, for TRL's precomputation.

        Args:
            args: (model, inputs), in TRL before 1.9 only (inputs,).
        """
        *model, inputs = args
        batch = batch_of(inputs)
        logps = batch.sums(self._score_reference(model[0] if model else None, inputs, batch))
        chosen, rejected = logps.float().chunk(2)
        return chosen, rejected

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, whose files go by the weights and by rows that are not truncated yet: by all else that counts, too.

        A data set that has reference log-probs is returned as it is.
        """
        if isinstance(dataset, Dataset):  # TRL refuses one that is streamed
            if has_reference(dataset):
                return dataset
            dataset = copy.copy(dataset)
            dataset._fingerprint = self._reference_fingerprint(dataset)
        return super()._precompute_ref_logps(dataset, *args, **kwargs)

    def _reference_fingerprint(self, dataset: Dataset) -> str:
        """Of a data set and of what its reference log-probs depend on beside the weights, for all processes."""
        model = self._models.unwrapped(self.model if self.ref_model is None else self.ref_model)
        truncation = self.args.max_length, self.args.truncation_mode
        how = versions(), model_description(model), how_taken(self, self._models.has_fused_head(model))
        fingerprint = Hasher.hash((dataset._fingerprint, truncation, self.data_collator.collate, how))
        return str(broadcast_object_list([fingerprint])[0])

    def _no_sums(self) -> Tensor:
        """Nothing to log yet: the sums of `pair_metrics`, COLUMNS and the router's loss."""
        size = len(METRICS) + 1 + len(COLUMNS) + 1
        return torch.zeros(size, dtype=accumulation_dtype(self.args.device), device=self.args.device)

    def _record(self, batch: Batch, policy: Scores, output: DILOutput) -> None:
        """Add a micro-batch to what is logged next; nothing waits for the device."""
        assert policy.statistics is not None
        pairs = pair_metrics(output, self.beta)
        aux_loss = pairs[:, -1:] * (policy.outputs.aux_loss.detach() if self._has_router else 0.0)
        sums = torch.cat([pairs, token_sums(policy.statistics, output, batch), aux_loss], dim=1)
        if self.model.training:
            self._train_sums += sums.sum(0)
            self._train_tokens += num_tokens(batch)
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
        if self.is_in_train:
            self._non_finite.check(self.accelerator.gather, self.args.output_dir)
        if "loss" in logs or "train_loss" in logs:  # in training, and at its end
            sums = self.accelerator.reduce(self._train_sums, reduction="sum")
            if "loss" in logs or sums.any():  # at the end, where steps have come since the last log
                logs |= {name: value for name, value in self._means(sums).items() if name != "loss"}
            self._train_sums = self._no_sums()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._non_finite.check(self.accelerator.gather, self.args.output_dir)
        check_weights(model, self.state.global_step, self.accelerator.gather)
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
