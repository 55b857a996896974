"""`DILTrainer`: Direct Imitation Learning on the Hugging Face Trainer.

One forward of the wrapped model for both responses of a pair, one fused loss. The metrics and the search for non-finite
losses stay on the device until something is logged.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dil_kernels.wording import needs_extra

try:
    import datasets
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, EvalPrediction, TrainOutput
except ImportError as error:
    raise ImportError(needs_extra("DILTrainer", "train", error)) from error

from dil_kernels.data.batches import Batch
from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.data.token_columns import COLLATED_COLUMNS
from dil_kernels.data.truncation import DataReport
from dil_kernels.functional import DILOutput
from dil_kernels.models.rotary_lengths import keep_lengths_apart
from dil_kernels.training.adapters import best_is_adapter, hidden, with_adapter
from dil_kernels.training.batch_loss import BatchLoss
from dil_kernels.training.checkpoints import check_weights, last_complete_checkpoint, writing_checkpoint
from dil_kernels.training.config import DILConfig
from dil_kernels.training.generations import SampleGenerations
from dil_kernels.training.loss_watch import LogRatioRange, NonFinitePairs
from dil_kernels.training.metrics import batch_means, batch_metrics, predictions, zero_sums
from dil_kernels.training.model_card import TAGS, CardNotes, write_model_card
from dil_kernels.training.model_checks import check_rows, pad_token_id, vocabulary_size
from dil_kernels.training.offloading import OffloadedActivations
from dil_kernels.training.precompute import has_reference, precompute_reference, trainer_ref_cache
from dil_kernels.training.prepare import prepare_dataset
from dil_kernels.training.reference_policy import ReferencePolicy
from dil_kernels.training.reference_sync import ReferenceSync
from dil_kernels.training.run_record import given_to_learn_from, run_record, with_sizes, write_record
from dil_kernels.training.set_up import (
    choose_heads,
    disable_noise,
    join_rows,
    policy_and_reference,
    refuse_inexact_setups,
    tokenizer_of,
)
from dil_kernels.training.sharding import gather_each_once, gather_rows, is_sharded, prepare_processes, shard_again
from dil_kernels.training.start import (
    AtEveryStart,
    StopWhenFinished,
    checkpoint_to_resume,
    only_run_of_all,
    refuse_no_step,
)
from dil_kernels.training.token_loader import FilledByTokens

__all__ = ["DILConfig", "DILTrainer", "last_complete_checkpoint"]

logger = logging.getLogger(__name__)


class DILTrainer(FilledByTokens):
    """Trains a causal language model on preference pairs by Direct Imitation Learning (arXiv 2503.05079).

    The loss is the mean over the pairs whose responses both have a scored token, over all micro-batches and processes
    of an optimizer step together: gradient accumulation and data parallelism give the gradients of one large batch. Of
    unpaired responses (columns prompt, completion, label) it is the mean over the chosen ones plus that over the
    rejected ones, likewise.

    Metrics, in training averaged since the last log and in evaluation over all pairs: loss, rewards/chosen and
    rewards/rejected (log ratios times the loss's beta, per token with `average_log_prob`), rewards/margins,
    rewards/accuracies, logps/chosen and logps/rejected (sums over tokens). Unpaired responses have loss/chosen and
    loss/rejected, no accuracies, and margins of means.

    A training loss that is not finite ends training with a `FloatingPointError` that names the step, the rows of the
    data, their log ratios and the last good checkpoint: at the next log, before the next checkpoint or at the end,
    whichever is first. Log ratios that come near an overflow are warned of once.

    `data_report` says of every data set that was tokenised here ("train", "eval" or "eval_NAME") what was cut or left
    out, as a `DataReport`.

    Args:
        model: the policy, a causal language model or a `PeftModel`, which is trained in place; or its name on the hub,
            or its directory, from which it is loaded with weights in fp32.
        ref_model: the reference, likewise; None for the policy as it is now. Of it a frozen copy is kept; of a
            `PeftModel`, a copy of the adapter, or nothing where the adapter is new, and of `args.ref_adapter_name`
            nothing either. With precomputed log-probs no reference is kept. Resuming does not change the reference.
        args: the options.
        train_dataset: pairs in any form that `dil_kernels.data.load_preference_pairs` accepts, or tokenised ones; not
            a stream. Where precomputed reference log-probs are used, columns of them (ref_chosen_logps and
            ref_rejected_logps, or ref_logps: sums over the tokens of a response) stay as they are.
        eval_dataset: likewise, one data set or several by name.
        processing_class: the tokenizer; that of the model if this is given by name.
        data_collator: makes batches as `PreferenceCollator` does; that one if None.
        compute_metrics: as of `transformers.Trainer`: takes an `EvalPrediction`, whose predictions [pairs, 6] are
            the columns `dil_kernels.training.metrics.PREDICTIONS`, and whose label_ids [pairs] are the places of the
            rows in the data set, from 1 (0 where data that came tokenised do not say them).
        callbacks, optimizers: as of `transformers.Trainer`.
        peft_config: a `peft.PeftConfig`; the model gets this adapter, which alone is trained.

    Raises:
        PreferenceDataError: a broken pair.
        TypeError: a model that is no causal language model, or data that are no data set.
        ValueError: options or data that do not fit the models.
        NotImplementedError: a set-up in which the loss would not be exact.
    """

    args: DILConfig
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,  # nn.Module or its name
        ref_model: Any = None,
        args: DILConfig | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: Any = None,
    ) -> None:
        args = DILConfig("dil_output") if args is None else args
        if not isinstance(args, DILConfig):
            raise TypeError(f"args must be a DILConfig, got {type(args).__name__}")
        processing_class = tokenizer_of(model, processing_class)
        model, ref_model = policy_and_reference(model, ref_model, args.parallelism_config)
        if data_collator is not None and args.pad_to_multiple_of is not None:
            raise ValueError(f"pad_to_multiple_of={args.pad_to_multiple_of} was given, but data_collator pads")
        self.data_report: dict[str, DataReport] = {}
        model = with_adapter(model, peft_config, args)
        prepare = functools.partial(
            prepare_dataset, tokenizer=processing_class, args=args, reports=self.data_report, models=(model, ref_model)
        )
        pad = pad_token_id(processing_class, vocabulary_size(model, ref_model))
        super().__init__(
            model=model,
            args=args,
            train_dataset=prepare(train_dataset, name="train"),
            eval_dataset=prepare(eval_dataset, name="eval"),
            data_collator=data_collator or PreferenceCollator(pad, args.pad_to_multiple_of or 1),
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        refuse_inexact_setups(self)
        prepare_processes(self)
        # Versions of transformers without `loss_is_scaled_for_ga` go by this instead.
        self.model_accepts_loss_kwargs = True
        if hasattr(model, "add_model_tags"):
            model.add_model_tags([*TAGS])
        if args.disable_dropout:
            disable_noise(model, tell=self.is_world_process_zero())
        reference = ReferencePolicy(
            model, ref_model, args.ref_adapter_name, self.accelerator, lasting=not args.precompute_ref_log_probs
        )
        models = [model] if reference.model is None else [model, reference.model]
        self.lengths_kept_apart = keep_lengths_apart(*models)
        for each in models:
            check_rows(each)
        self.uses_fused_head = choose_heads(models, args.fused_head, tell=self.is_world_process_zero())
        self.batch_loss = BatchLoss(args, self.accelerator, self.uses_fused_head, reference)
        if args.padding_free or args.prefix_sharing:
            join_rows(self, data_collator, models)
        # Hashed while the weights are whole.
        self._given = given_to_learn_from(args, self.train_dataset, model, reference)
        self._left_out_of_saving = functools.partial(hidden, model, reference.adapter)
        cache = trainer_ref_cache(self, models[-1]) if args.precompute_ref_log_probs else ""
        reference.place(self.accelerator)
        self._reference_sync = None
        if args.sync_ref_model:
            self._reference_sync = ReferenceSync(model, reference.model, self.accelerator)
            self.add_callback(self._reference_sync)
        if args.precompute_ref_log_probs:
            precompute_reference(self, functools.partial(self.batch_loss.reference_token_logps, model), cache)
            self.batch_loss.reference = None
        self._start_record()
        self.add_callback(AtEveryStart(self._start_record))
        self._eval_sums = zero_sums(args.device)
        self.card_notes = CardNotes()
        self._finish = StopWhenFinished()
        self.add_callback(self._finish)
        if args.num_generations_at_eval:
            self.add_callback(SampleGenerations(self))

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference, where it has weights of its own and was not precomputed."""
        reference = self.batch_loss.reference
        return None if reference is None else reference.model

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLLATED_COLUMNS]  # type: ignore[assignment]

    def get_eval_dataloader(self, eval_dataset: str | datasets.Dataset | None = None) -> DataLoader[Any]:
        """The loader of an evaluation set; pairs that are not tokenised yet may be given, too."""
        return super().get_eval_dataloader(self._evaluable(eval_dataset))

    def get_test_dataloader(self, test_dataset: datasets.Dataset) -> DataLoader[Any]:
        """Likewise for `predict`."""
        return super().get_test_dataloader(self._evaluable(test_dataset))

    def _evaluable(self, dataset: Any) -> Any:
        if dataset is None or isinstance(dataset, str):
            return dataset
        models: Any = self.model, self.ref_model
        dataset = prepare_dataset(dataset, self.processing_class, self.args, "eval", self.data_report, models)
        if self.batch_loss.reference is None and not has_reference(dataset):
            raise ValueError(
                "the reference log-probs were precomputed, and the reference model is gone: give every evaluation set "
                "to the constructor, or set precompute_ref_log_probs=False"
            )
        return dataset

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last one in `output_dir` that was written to its end.
            args, kwargs: handed on.

        Raises:
            CannotStartError: there would be no step, or the checkpoint is not whole or was trained with other options,
                data or reference, on any process.
            OutputDirError: another run is writing into `output_dir`.
            SavingError: a checkpoint could not be written.
            FloatingPointError: a loss, or a weight that training left, is not finite.
        """
        refuse_no_step(self)
        shard_again(self.model)
        self._run_record = run_record(self, self._given)
        checkpoint = checkpoint_to_resume(self, resume_from_checkpoint, self._run_record)
        if checkpoint is not None and self._reference_sync is not None:
            self._reference_sync.load(Path(checkpoint))
        with only_run_of_all(self):
            output = super().train(checkpoint, *args, **kwargs)
        check_weights(self.model, self.state.global_step, self.accelerator.gather)
        return output

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one optimizer step, and `DILOutput.counts` of all of it over all processes."""
        batches = [] if self._finish.finished else list(itertools.islice(epoch_iterator, num_batches))
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batches:
            counts += Batch.of(batch).scored_counts().to(device)
        return batches, self.accelerator.reduce(counts, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, DILOutput]:
        """The share of a micro-batch in the loss of its optimizer step.

        Args:
            model: the wrapped policy.
            inputs: a batch as of `PreferenceCollator`, on the device.
            return_outputs: return the `DILOutput` of the batch, too.
            num_items_in_batch: the counts [2] of the step over all processes; those of this batch if None.

        Returns:
            The loss []. Its sum over the micro-batches, averaged over the processes, is the mean over the step.
        """
        batch = Batch.of(inputs)
        offloading = OffloadedActivations(model) if self.args.activation_offloading else contextlib.nullcontext()
        with offloading:
            output = self.batch_loss(model, batch)
        if num_items_in_batch is None:
            loss = output.share(output.counts)
        else:
            # DDP averages gradients over the processes, but the mean is over the responses of all of them.
            loss = output.share(torch.as_tensor(num_items_in_batch)) * self.accelerator.num_processes
        if model.training:
            self._train_sums += self._metrics_of(output, batch).sum(0)
            self._non_finite.add(output, batch.rows, self.state.global_step + 1)
            self._log_ratios.add(output)
        return (loss, output) if return_outputs else loss

    def _metrics_of(self, output: DILOutput, batch: Batch) -> Tensor:
        return batch_metrics(output, batch.is_chosen is not None, self.batch_loss.options.factor)

    def _start_record(self) -> None:
        self._train_sums = zero_sums(self.args.device)
        self._non_finite = NonFinitePairs(self.args.device)
        self._log_ratios = LogRatioRange(self.args.loss_options(), self.args.average_log_prob, self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, in training with the means of the metrics since the last log, which waits for the device."""
        if "train_loss" in logs and self._finish.finished:
            return  # of no step
        if self.is_in_train:
            self._non_finite.check(self.accelerator.gather, self.args.output_dir)
        if "loss" in logs or "train_loss" in logs:  # in training, and at its end
            warning = self._log_ratios.warning(self.accelerator.gather)
            if warning is not None and self.is_world_process_zero():
                logger.warning(warning)
            sums = self.accelerator.reduce(self._train_sums, reduction="sum")
            if "loss" in logs or sums.any():  # at the end, where steps have come since the last log
                logs |= {name: value for name, value in batch_means(sums).items() if name != "loss"}
            self._train_sums = zero_sums(self.args.device)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._left_out_of_saving():
            super()._save(output_dir, state_dict)

    def _load_best_model(self) -> None:
        with best_is_adapter(self):
            super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._non_finite.check(self.accelerator.gather, self.args.output_dir)
        check_weights(model, self.state.global_step, self.accelerator.gather)
        directory = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with writing_checkpoint(directory, self.accelerator.wait_for_everyone, main=self.args.should_save):
            if self.args.should_save:
                write_record(directory, with_sizes(self._run_record, self, self._train_batch_size))
                if self._reference_sync is not None:
                    self._reference_sync.save(directory)
            super()._save_checkpoint(model, trial)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository of `push_to_hub`; see `transformers.Trainer.init_hf_repo`.

        Raises:
            OSError: the hub cannot be reached, or refuses it.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of whatever HTTP client the hub's library stands on
            raise OSError(f"push_to_hub=True was given, but the hub could not make the repository: {error}") from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card, and the training curves, into the output directory; as `transformers.Trainer` does."""
        if self.is_world_process_zero():
            given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
            given.pop("self")
            write_model_card(self, self.card_notes, **given)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate; the metrics are means over all pairs of the data set, whatever the batches.

        Raises:
            NotImplementedError: FSDP2 has not sharded the model yet.
        """
        if self.accelerator.is_fsdp2 and not is_sharded(self.model):
            raise NotImplementedError("FSDP2 shards a model in train(): evaluate then (eval_on_start), or afterwards")
        self._eval_sums = zero_sums(self.args.device)
        gather_each_once(self)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in batch_means(self._eval_sums).items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The mean loss of a batch and, unless only the loss is asked for, what `compute_metrics` gets of its pairs."""
        batch = Batch.of(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            output = self.batch_loss(model, batch)
        metrics = self._metrics_of(output, batch)
        if self.args.max_tokens_per_batch is not None:  # processes have batches of other numbers of rows
            metrics = metrics.sum(0, keepdim=True)
        self._eval_sums += gather_rows(self.accelerator, metrics).sum(0)
        loss = output.share(output.counts)
        if prediction_loss_only:
            return loss, None, None
        rows = torch.zeros_like(output.chosen_lengths, dtype=torch.int64) if batch.rows is None else batch.rows
        return loss, self.pad_rows(predictions(output)), self.pad_rows(rows)
