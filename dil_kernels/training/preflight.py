"""What of a configuration can be refused before data and model are loaded: what it asks of device and packages."""

from __future__ import annotations

import torch
import torch._inductor
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations import integration_utils
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from dil_kernels.backends import resolve_backend
from dil_kernels.training.agreement import refuse_lone_processes
from dil_kernels.training.config import DILConfig
from dil_kernels.training.metrics import METRICS, SIDE_METRICS
from dil_kernels.wording import describe_error

SPEED_METRICS = ("runtime", "samples_per_second", "steps_per_second")  # of `Trainer.evaluate`


def check_before_loading(config: DILConfig) -> None:
    """Refuse what cannot run, whatever data and model are.

    Raises:
        ValueError: names the option and says why.
        NotImplementedError: several processes were launched, but each would train alone.
    """
    refuse_lone_processes(config.world_size)
    try:
        resolve_backend(config.backend, config.device, torch.float32)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if config.use_liger_kernel and config.device.type == "cpu":
        raise ValueError("use_liger_kernel=True was given, but Liger's kernels need a GPU")
    _check_report_to(config)
    _check_best_metric(config)
    if config.torch_compile:
        _check_choice(
            "torch_compile_backend", config.torch_compile_backend, [kind.value.lower() for kind in DynamoBackend]
        )
        _check_choice("torch_compile_mode", config.torch_compile_mode, list(torch._inductor.list_mode_options()))
    _check_optimizer(config)


def _check_choice(name: str, value: str | None, choices: list[str]) -> None:
    if value is not None and value.lower() not in choices:
        raise ValueError(f"{name}={value}: unknown; available: {', '.join(choices)}")


def _check_report_to(config: DILConfig) -> None:
    available = (*integration_utils.get_available_reporting_integrations(), "flyte")  # which that function leaves out
    for name in config.report_to or ():
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(integration_utils.INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to={name}: unknown; available: {known}")
        if name not in available:
            raise ValueError(f"report_to={name}: its package is not installed")


def _check_best_metric(config: DILConfig) -> None:
    """Whether an evaluation will have the metric by which checkpoints are compared."""
    if config.metric_for_best_model is None:
        return
    name = config.metric_for_best_model.removeprefix("eval_")
    sides = [f"{metric}/{side}" for metric in SIDE_METRICS for side in ("chosen", "rejected")]
    known = dict.fromkeys((*METRICS, *sides, *SPEED_METRICS))
    if name not in known:
        raise ValueError(
            f"metric_for_best_model={config.metric_for_best_model}: evaluation has no such metric; available: "
            + ", ".join(known)
        )


def _check_optimizer(config: DILConfig) -> None:
    """Make optimizer and schedule for one parameter, as `Trainer` makes them for a model."""
    model = nn.Linear(1, 1)
    given = f"optim={OptimizerNames(config.optim).value}" + (
        f", optim_args={config.optim_args!r}" if config.optim_args else ""
    )
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(config, model)  # type: ignore[arg-type]
        if {"params", "model", "optimizer_dict"} & options.keys():
            return  # it goes by layers of the model
        optimizer = kind(model.parameters(), **options)
    except Exception as error:  # whatever the package raises that the optimizer comes from
        raise ValueError(f"{given}: {describe_error(error)}") from error
    steps = max(config.max_steps, 1)
    try:
        get_scheduler(
            config.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=config.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
    except Exception as error:
        given = f"lr_scheduler_type={SchedulerType(config.lr_scheduler_type).value}"
        if config.lr_scheduler_kwargs:
            given += f", lr_scheduler_kwargs={config.lr_scheduler_kwargs!r}"
        raise ValueError(f"{given}: {describe_error(error)}") from error
