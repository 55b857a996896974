"""Every way to take a training step on pairs: trainers by their own `training_step`, and the authors' by hand."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from families.train_inputs import BETA, IGNORE_INDEX, Inputs
from harness.family import OURS, Provider
from harness.peers import not_run, our_version, peer_problem, peer_version

BASELINE = "authors"
# Forward of policy and reference, backward; the gradients are in the parameters, the loss [] is returned.
Step = Callable[[Inputs], Tensor]
Session = Callable[[], Tensor]


def authors_step(inputs: Inputs) -> Tensor:
    """As the authors' code does it: one forward of all sequences, fp32 log_softmax over the whole vocabulary."""
    batch = inputs.padded_batch()
    if inputs.case.reference == "model":
        with torch.no_grad():
            ref_logps = _whole_log_softmax(inputs.reference, batch)
    else:
        ref_logps = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    chosen, rejected = (_whole_log_softmax(inputs.model, batch) - ref_logps).chunk(2)
    loss = -logsigmoid(BETA * (chosen - rejected)).mean()
    loss.backward()
    return loss.detach()


def _whole_log_softmax(model: Any, batch: dict[str, Any]) -> Tensor:
    """Sums [2B] of the log-probs of the labels."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logits, labels = logits[:, :-1].float(), batch["labels"][:, 1:]
    scored = labels != IGNORE_INDEX
    logps = logits.log_softmax(-1).gather(-1, labels.masked_fill(~scored, 0).unsqueeze(-1)).squeeze(-1)
    return (logps * scored).sum(-1)


def _of_trainer(make: Callable[[Inputs, str], Any]) -> Step:
    """The `training_step` of a trainer, which is made on the first call with some inputs.

    The batch is on the device already; the trainer's own collator made it.
    """
    key = object()

    def step(inputs: Inputs) -> Tensor:
        if key not in inputs.sessions:
            inputs.sessions[key] = _session(make, inputs)
        return inputs.sessions[key]()

    return step


def _session(make: Callable[[Inputs, str], Any], inputs: Inputs) -> Session:
    folder = tempfile.TemporaryDirectory()
    silence = io.StringIO()  # trainers say much of themselves
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        trainer = make(inputs, folder.name)
    trainer.current_gradient_accumulation_steps = 1  # as Trainer.train sets it
    batch = trainer.data_collator([dict(example) for example in inputs.examples])
    batch = {name: x.to(inputs.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
    training = getattr(trainer, "benchmark_context", contextlib.nullcontext)

    def session() -> Tensor:
        assert folder  # lives as long as its trainer
        with training():
            return trainer.training_step(trainer.model, dict(batch))

    return session


def _options(inputs: Inputs, folder: str) -> dict[str, Any]:
    """What every trainer is told alike."""
    return {
        "output_dir": folder,
        "beta": BETA,
        "per_device_train_batch_size": inputs.case.pairs,
        "max_length": None,
        "precompute_ref_log_probs": inputs.case.reference == "precomputed",
        "bf16": False,  # the weights have the dtype of the case
        "gradient_checkpointing": False,
        "use_cpu": inputs.device.type == "cpu",
        "disable_tqdm": True,
        "report_to": [],
    }


def _make_trainer(trainer: type, config: type, inputs: Inputs, folder: str, **options: Any) -> Any:
    """Its data set is one pair of words, since the batch is made from token ids."""
    from datasets import Dataset

    return trainer(
        model=inputs.own_model(),
        ref_model=inputs.own_reference(),
        args=config(**{**_options(inputs, folder), **options}),
        train_dataset=Dataset.from_list([{"prompt": "yes ", "chosen": "yes", "rejected": "no"}]),
        processing_class=inputs.tokenizer,
        optimizers=(inputs.optimizer, None),
    )


def _ours(inputs: Inputs, folder: str, **options: Any) -> Any:
    from dil_kernels.trainer import DILConfig, DILTrainer

    return _make_trainer(DILTrainer, DILConfig, inputs, folder, loss_type="dpo", average_log_prob=False, **options)


def _ours_on_trl(inputs: Inputs, folder: str, **options: Any) -> Any:
    from dil_kernels.integrations.trl import DILConfig, DILTrainer

    return _make_trainer(DILTrainer, DILConfig, inputs, folder, loss_type="dpo", average_log_prob=False, **options)


def _trl(inputs: Inputs, folder: str, **options: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    return _make_trainer(DPOTrainer, DPOConfig, inputs, folder, loss_type="sigmoid", **options)


def _trl_with_liger(inputs: Inputs, folder: str) -> Any:
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.models.llama import modeling_llama

    trainer = _trl(inputs, folder, use_liger_kernel=True)
    before = dict(vars(modeling_llama))
    apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)  # as Trainer.train begins
    # Some of it changes the module for all models; that must not reach the other providers.
    changed = {name: value for name, value in vars(modeling_llama).items() if before.get(name) is not value}
    original = {name: before[name] for name in changed}
    _set_all(modeling_llama, original)

    @contextlib.contextmanager
    def with_liger() -> Iterator[None]:
        _set_all(modeling_llama, changed)
        try:
            yield
        finally:
            _set_all(modeling_llama, original)

    trainer.benchmark_context = with_liger
    return trainer


def _set_all(module: types.ModuleType, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def _trl_problem(device: torch.device) -> str | None:
    return peer_problem("trl", "trl", device.type)(device)


def _provider(name: str, description: str, make: Callable[[Inputs, str], Any], **fields: Any) -> Provider:
    return Provider(name, description, lambda: _of_trainer(make), **fields)


PROVIDERS = {
    provider.name: provider
    for provider in (
        _provider(
            OURS,
            "DILTrainer, fused head, padding_free=True",
            functools.partial(_ours, padding_free=True),
            version=our_version,
        ),
        _provider(
            f"{OURS}-shared",
            "DILTrainer, fused head, prefix_sharing=True",
            functools.partial(_ours, prefix_sharing=True),
            version=our_version,
        ),
        _provider(f"{OURS}-padded", "DILTrainer, fused head", _ours, version=our_version),
        _provider(
            f"{OURS}-logits",
            "DILTrainer, fused_head=False",
            functools.partial(_ours, fused_head=False),
            version=our_version,
        ),
        *(
            _provider(
                f"{OURS}-trl{suffix}",
                f"dil_kernels.integrations.trl.DILTrainer{''.join(f', {option}=True' for option in options)}",
                functools.partial(_ours_on_trl, **options),
                version=lambda: f"{our_version()}, {peer_version('trl')()}",
                problem=_trl_problem,
            )
            for suffix, options in {
                "": {},
                "-packed": {"padding_free": True},
                "-shared": {"prefix_sharing": True},
            }.items()
        ),
        Provider(BASELINE, "one forward, fp32 log_softmax of all logits, by hand", lambda: authors_step),
        _provider("trl", "trl.DPOTrainer", _trl, version=peer_version("trl"), problem=_trl_problem),
        _provider(
            "trl-liger",
            "trl.DPOTrainer, use_liger_kernel=True",
            _trl_with_liger,
            version=lambda: f"{peer_version('trl')()}, {peer_version('liger-kernel')()}",
            problem=peer_problem("liger-kernel", "liger_kernel"),
        ),
        not_run(
            "prefix-grouper",
            "PrefixGrouper 0.0.1.post1, each prompt once",
            "its attention takes FlashAttention alone (others are among its plans), and it has no trainer of pairs",
        ),
        not_run(
            "flash-pref",
            "flash-pref 0.1.1, FlashDPOTrainer",
            "it needs transformers below 4.52, whose FlashAttention it replaces; dil_kernels needs 5.0 or later",
        ),
    )
}
