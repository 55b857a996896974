"""`DILConfig`: the options of `DILTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from dil_kernels.data.truncation import resolve_prompt_length
from dil_kernels.losses import LossOptions
from dil_kernels.training.loss_fields import FusedLossFields
from dil_kernels.training.ranges import check_numbers

JOINED_ROWS = ("prefix_sharing", "padding_free")  # the options, the one that implies the other first
OWN_FLAGS = (
    *JOINED_ROWS,
    "precompute_ref_log_probs",
    "sync_ref_model",
    "disable_dropout",
    "activation_offloading",
    "resume_with_changes",
)
SYNC_DEFAULTS = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512}


@dataclass
class DILConfig(FusedLossFields, TrainingArguments):
    """Options of `DILTrainer`, beside those of `transformers.TrainingArguments`; checked at construction.

    Raises:
        ValueError, TypeError: an option that is unknown, out of range, of another type, or not used by the loss.
    """

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Tokens of prompt and response beyond which a pair is truncated; None for no limit."},
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Tokens that the prompt of a truncated pair keeps; half of max_length if not given."},
    )
    truncation_mode: str = field(
        default="keep_end",
        metadata={
            "help": "Which end of a truncated prompt stays: keep_end or keep_start; drop leaves out pairs that are too "
            "long."
        },
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference log-probs once, before training, and keep no reference model."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of a batch when they are precomputed; max_tokens_per_batch, or else "
            "per_device_train_batch_size and per_device_eval_batch_size, if not given."
        },
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={
            "help": "Let the reference follow the policy (TR-DPO): every ref_model_sync_steps steps it becomes a mix "
            "of both; full fine-tuning only."
        },
    )
    ref_model_mixup_alpha: float | None = field(
        default=None,
        metadata={"help": "Share of the policy in that mix, up to 1 (0.6 if not given)."},
    )
    ref_model_sync_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps between two such mixes (512 if not given)."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Switch off every dropout of the model, and the jitter of its routers of experts."},
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where precomputed reference log-probs are kept for later runs: a directory, or none; "
            "dil_kernels/reference_log_probs in $HF_HOME if not given."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Run the sequences of a batch one after another in one row, without padding; an error where the "
            "model would attend from one to another."
        },
    )
    prefix_sharing: bool = field(
        default=False,
        metadata={
            "help": "Compute each prompt of a batch once for all responses to it, without padding; an error where the "
            "model would not give each response what it gives it alone."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Fill batches with as many rows as make at most this many tokens, in place of "
            "per_device_train_batch_size and per_device_eval_batch_size; with padding_free or prefix_sharing, whose "
            "tokens are counted as they are computed."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={"help": "Pad the sequences of a batch to a multiple of this many tokens."},
    )
    activation_offloading: bool = field(
        default=False,
        metadata={"help": "Keep activations in the memory of the host until the backward."},
    )
    ref_adapter_name: str | None = field(
        default=None,
        metadata={
            "help": "The adapter of a PeftModel with which it is the reference, beside the one that is trained; if not "
            "given, the model as it is before training."
        },
    )
    num_generations_at_eval: int = field(
        default=0,
        metadata={
            "help": "How many held-out prompts the model answers greedily before training and at each evaluation, into "
            "generations.md and the integrations of report_to; none if 0."
        },
    )
    generate_max_new_tokens: int = field(
        default=64,
        metadata={"help": "Tokens that such an answer may have."},
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata={"help": "Processes that tokenise the data; the main process alone if not given."},
    )
    resume_with_changes: bool = field(
        default=False,
        metadata={
            "help": "Resume from a checkpoint although options, data or reference differ from those that it was "
            "trained with; what differs is said either way."
        },
    )
    learning_rate: float = field(
        default=1e-6,
        metadata={"help": "The highest learning rate of the schedule; the paper's are between 3e-7 and 1e-6."},
    )
    logging_steps: float = field(
        default=10,
        metadata={"help": "Optimizer steps between two logs; below 1, their share of all steps."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Hide non-finite losses from the logged loss, which waits for the device every micro-batch."},
    )

    def __post_init__(self) -> None:
        LossOptions(**self.loss_options())
        check_numbers(self)
        self.check_fields(*OWN_FLAGS)
        if self.report_to is None:  # which transformers takes for the name of an integration
            self.report_to = "none"
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # of which torch warns where there is no accelerator
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} was given, which is of cross-entropy: losses of "
                "preference pairs that smooth labels have label_smoothing"
            )
        if self.length_column_name != "length":
            raise ValueError(
                f"length_column_name={self.length_column_name!r} was given, but the lengths of rows are counted here"
            )
        check_joined_rows(self)
        check_evaluation(self)
        if self.max_tokens_per_batch is not None:
            self._check_filling()
        if self.activation_offloading and self.device.type != "cuda":
            raise ValueError(f"activation_offloading=True was given, but activations are on the {self.device.type}")
        if self.activation_offloading and self.torch_compile:
            raise ValueError("activation_offloading=True was given, but torch_compile=True decides what is kept")
        self._check_reference()
        self.max_prompt_length = resolve_prompt_length(self.max_length, self.max_prompt_length, self.truncation_mode)

    def _check_filling(self) -> None:
        given = f"max_tokens_per_batch={self.max_tokens_per_batch} was given, but"
        if not (self.prefix_sharing or self.padding_free):
            raise ValueError(f"{given} rows are padded: give padding_free=True or prefix_sharing=True, too")
        strategy = getattr(self, "train_sampling_strategy", "random")
        if getattr(self, "group_by_length", False):  # of older transformers
            strategy = "group_by_length"
        if strategy not in ("random", "sequential"):
            raise ValueError(f"{given} {strategy} chooses the rows of a batch by their number")
        by_rows = ("dataloader_drop_last", "auto_find_batch_size", "batch_eval_metrics", "include_for_metrics")
        refused = [option for option in by_rows if getattr(self, option)]
        refused += [] if self.eval_do_concat_batches else ["eval_do_concat_batches"]
        for option in refused:
            raise ValueError(f"{given} {option}={getattr(self, option)} goes by the number of rows in a batch")

    def _check_reference(self) -> None:
        if self.precompute_ref_batch_size is not None and not self.precompute_ref_log_probs:
            raise ValueError(
                f"precompute_ref_batch_size={self.precompute_ref_batch_size} was given, but "
                "precompute_ref_log_probs=False"
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("sync_ref_model=True was given, but precompute_ref_log_probs=True keeps no reference")
        for name, default in SYNC_DEFAULTS.items():
            if self.sync_ref_model and getattr(self, name) is None:
                setattr(self, name, default)
            elif not self.sync_ref_model and getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)} was given, but sync_ref_model=False")


def check_joined_rows(args: Any) -> None:
    """Refuse what goes by padded rows beside an option of JOINED_ROWS.

    Raises:
        ValueError: names both.
    """
    for option in JOINED_ROWS:
        if not getattr(args, option):
            continue
        if args.pad_to_multiple_of is not None:
            raise ValueError(f"pad_to_multiple_of={args.pad_to_multiple_of} was given, but {option}=True pads nothing")
        if args.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha={args.neftune_noise_alpha} was given, but with {option}=True its noise goes by "
                "the length of the joined row"
            )


def check_evaluation(args: Any) -> None:
    """Refuse options of transformers whose evaluation would change the policy, or lose responses.

    Raises:
        ValueError: names the option.
    """
    for option in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, option, False):
            raise ValueError(
                f"{option}=True was given, but an evaluation outside of training rounds the trained weights for good, "
                f"and not those of the reference: take {option.removesuffix('_full_eval')}=True, which rounds none"
            )
    if "inputs" in args.include_for_metrics:
        raise ValueError(
            f"include_for_metrics={args.include_for_metrics} was given, but a batch has two responses a pair, of which "
            "transformers would keep as many as there are pairs"
        )
