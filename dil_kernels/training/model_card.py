"""The model card of a trained model: what it is, its recipe, what training changed, how to do it again."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCardData

from dil_kernels.losses import LossOptions
from dil_kernels.training.held_out import BeforeAfter
from dil_kernels.training.markdown import code, escaped, fenced, table
from dil_kernels.training.plots import plot_training_curves
from dil_kernels.training.sharding import share_of_batches

CARD_NAME, PLOT_NAME = "README.md", "training_curves.png"
TAGS = ("dil", "preference-learning", "generated_from_trainer")
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft")
ALWAYS_SAID = ("loss_type", "average_log_prob", "max_length", "max_prompt_length", "truncation_mode", "learning_rate")
# Where it ran and what it wrote, not what was trained; tokens are secret.
NOT_THE_RECIPE = re.compile(
    r"output_dir|do_.*|hub_.*|push_to_hub.*|run_name|logging_dir|local_rank|disable_tqdm|dataloader_pin_memory|_.*"
)
METHODS = {
    "imitation": ("Direct Imitation Learning", "2503.05079"),
    "ratio": ("Bregman Preference Optimization", "2505.19601"),
    "f_dpo": ("f-DPO", "2309.16240"),
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
CITATION = """@inproceedings{xiao2025connection,
  title     = {On a Connection Between Imitation Learning and {RLHF}},
  author    = {Teng Xiao and Yige Yuan and Mingxiao Li and Zhengyu Chen and Vasant G. Honavar},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2503.05079},
}"""


@dataclass(frozen=True)
class CardNotes:
    """What a model card says that the trainer does not know.

    Attributes:
        sources: where model and data came from: options of `dil-train` by name.
        results: what training changed on held-out responses.
    """

    sources: Mapping[str, Any] = field(default_factory=dict)
    results: BeforeAfter | None = None


def write_model_card(trainer: Any, notes: CardNotes, **given: Any) -> Path:
    """Write README.md and, if training steps were logged, training_curves.png into the output directory.

    Args:
        trainer: a `DILTrainer`.
        notes: what it does not know.
        given: as of `Trainer.create_model_card`; these win over what is known otherwise.

    Returns:
        The path of the card.
    """
    directory = Path(trainer.args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    has_plot = plot_training_curves(trainer.state.log_history, directory / PLOT_NAME)
    given = {name: value for name, value in given.items() if value}
    title = given.get("model_name") or directory.resolve().name
    sections = [
        f"---\n{_metadata(trainer, notes, given)}\n---",
        f"# {escaped(title)}",
        _introduction(trainer, notes, given),
        "## Results\n\n" + _results(trainer, notes, has_plot),
        "## Data\n\n" + _data(trainer, notes),
        "## Training\n\n" + _training(trainer),
        "## How to reproduce\n\n" + _reproduction(trainer, notes),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    path = directory / CARD_NAME
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _metadata(trainer: Any, notes: CardNotes, given: Mapping[str, Any]) -> ModelCardData:
    """The header that the hub reads; what is not known is left out, the licence above all."""
    mixed = [entry["path"] for entry in notes.sources.get("datasets", ())]
    sources = (notes.sources.get("train_file"), *mixed, notes.sources.get("eval_file"))
    data = [name for name in dict.fromkeys(sources) if _is_on_hub(name)]
    return ModelCardData(
        library_name="peft" if hasattr(trainer.model, "peft_config") else "transformers",
        pipeline_tag="text-generation",
        base_model=given.get("finetuned_from") or _base_model(trainer, notes),
        datasets=_listed(given.get("dataset_tags")) or _listed(given.get("dataset")) or data or None,
        language=given.get("language"),
        license=given.get("license"),
        tags=[*TAGS, *_listed(given.get("tags"))],
    )


def _listed(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _base_model(trainer: Any, notes: CardNotes) -> str | None:
    """The name on the hub of the model that was trained; None for a local one."""
    candidates = (notes.sources.get("model"), getattr(trainer.model.config, "_name_or_path", None))
    return next((name for name in candidates if _is_on_hub(name)), None)


def _is_on_hub(name: Any) -> bool:
    return isinstance(name, str) and HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _public(source: str) -> str:
    """A name on the hub, or that of a file without its directory."""
    return source if _is_on_hub(source) else Path(source).name


def _introduction(trainer: Any, notes: CardNotes, given: Mapping[str, Any]) -> str:
    base = given.get("finetuned_from") or _base_model(trainer, notes)
    model = f"[{escaped(base)}](https://huggingface.co/{quote(base)})" if base else "A language model"
    if base is None and "model" in notes.sources:
        model = f"The local model {code(Path(notes.sources['model']).name)}"
    return (
        f"{model}, trained on preference data {_method(LossOptions(**trainer.args.loss_options()))} and "
        f"`dil_kernels` {_version('dil-kernels')}."
    )


def _method(loss: LossOptions) -> str:
    """How a loss puts preference data to work, by its name in the literature."""
    if not (loss.divergence.separable and loss.divergence.bregman):
        return f"with the loss `{loss.loss_type}` ({loss.divergence.source})"
    name, paper = METHODS[loss.link]
    return f"by {name} ([arXiv {paper}](https://arxiv.org/abs/{paper})) with the loss `{loss.loss_type}`"


def _results(trainer: Any, notes: CardNotes, has_plot: bool) -> str:
    parts = []
    if notes.results is not None:
        head, *rows = notes.results.rows()
        parts.append(table([head, *rows]))
        parts.append("Log-probs in nats, over the scored tokens of the responses.")

    def last_log(*names: str) -> dict[str, Any]:
        history = trainer.state.log_history
        return next((log for name in names for log in reversed(history) if name in log), {})

    logged = [("training", "", last_log("loss", "train_loss")), ("held out", "eval_", last_log("eval_loss"))]
    names = [
        name
        for name in dict.fromkeys(key.removeprefix(prefix) for _, prefix, log in logged for key in log)
        if name == "loss" or name.startswith(("loss/", "rewards/", "logps/"))
    ]
    sides = [(title, prefix, log) for title, prefix, log in logged if log]
    if sides:
        head = ("last logged", *(f"{title}, step {log['step']}" for title, _, log in sides))
        rows = [(f"`{name}`", *(_number(log.get(prefix + name)) for _, prefix, log in sides)) for name in names]
        parts.append(table([head, *rows]))
        parts.append("Rewards are log ratios of policy and reference, times beta.")
    if has_plot:
        parts.append(f"![training curves]({PLOT_NAME})")
    return "\n\n".join(parts) or "Nothing was logged."


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else "-"


def _data(trainer: Any, notes: CardNotes) -> str:
    lines = []
    for title, key, dataset in (
        ("Training", "train", trainer.train_dataset),
        ("Held out", "eval", trainer.eval_dataset),
    ):
        for name, part in (dataset if isinstance(dataset, dict) else {"": dataset}).items():
            if part is None:
                continue
            rows = f"{len(part):,} {'responses' if 'label' in part.column_names else 'pairs'}"
            source, split = notes.sources.get(f"{key}_file"), notes.sources.get(f"{key}_split")
            where = "" if source is None else f" of {code(_public(source))}"
            if key == "train" and "datasets" in notes.sources:
                where = " of " + ", ".join(code(_public(entry["path"])) for entry in notes.sources["datasets"])
            where += "" if split is None or source is None else f", split {code(split)}"
            lines.append(f"- {title}{f' ({escaped(name)})' if name else ''}: {rows}{where}.")
    reports = getattr(trainer, "data_report", {})  # what truncation did to each data set, where that was counted
    lines += [f"- Tokenised ({code(name)}): {report}." for name, report in reports.items()]
    return "\n".join(lines or ["Not known."])


def _training(trainer: Any) -> str:
    args, state = trainer.args, trainer.state
    processes, _ = share_of_batches(trainer.accelerator)
    batch = args.per_device_train_batch_size, args.gradient_accumulation_steps, processes
    unit = ""
    if args.max_tokens_per_batch is not None:
        batch, unit = (args.max_tokens_per_batch, *batch[1:]), " tokens at most"
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    # beta and the loss's own parameters are said even if they were not given: losses differ in what they are then.
    loss = LossOptions(**args.loss_options())
    own = {parameter.name: getattr(loss.parameters, parameter.name) for parameter in loss.divergence.parameters}
    own |= {} if loss.factor == 1.0 else {"beta": loss.factor}
    options = ", ".join(
        f"{name}={value}"
        for name, value in (args.loss_options() | own).items()
        if name in ("loss_type", *own) or value != defaults[name]
    )
    # ZeRO-3 keeps the whole size of a parameter beside it.
    parameters = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    trained = sum(count for count, requires_grad in parameters if requires_grad)
    rows = [
        ("option", "value"),
        ("loss", options + f", average_log_prob={args.average_log_prob}"),
        ("lengths", f"{args.max_length} tokens, prompt {args.max_prompt_length}, {args.truncation_mode}"),
        (
            "global batch",
            f"{batch[0] * batch[1] * batch[2]}{unit} = {batch[0]} x {batch[1]} accumulated x {batch[2]} "
            + ("process" if batch[2] == 1 else "processes"),
        ),
        ("steps, epochs", f"{state.global_step}, {state.epoch or 0:.4g}"),
        ("learning rate", f"{args.learning_rate:g}, {_plain(args.lr_scheduler_type)}, warm-up {args.warmup_steps:g}"),
        ("optimizer", f"{_plain(args.optim)}, weight decay {args.weight_decay:g}"),
        (
            "precision",
            "bf16" if args.bf16 else "fp16" if args.fp16 else str(next(trainer.model.parameters()).dtype)[6:],
        ),
        ("trained parameters", f"{trained:,} of {sum(count for count, _ in parameters):,}"),
        ("seed", str(args.seed)),
        ("log-probs", "from the fused output head" if trainer.uses_fused_head else "from logits"),
        ("device", _device(trainer)),
        ("versions", ", ".join(f"{name} {_version(name)}" for name in ("dil-kernels", *PACKAGES) if _version(name))),
    ]
    return table(rows)


def _device(trainer: Any) -> str:
    if trainer.args.device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(trainer.args.device)
    return f"{trainer.args.device.type} ({platform.machine()})"


def _reproduction(trainer: Any, notes: CardNotes) -> str:
    sources: dict[str, Any] = {
        name: _public(value) if name.endswith(("model", "file", "path")) else value
        for name, value in notes.sources.items()
    }
    for name in ("model", "ref_model"):
        if name in sources and not _is_on_hub(notes.sources[name]):
            sources[name] = f"./{sources[name]}"  # which nobody takes for a name on the hub
    if "datasets" in sources:
        sources["datasets"] = [{**entry, "path": _public(entry["path"])} for entry in sources["datasets"]]
    recipe = yaml.safe_dump({**sources, **recipe_of(trainer.args)}, sort_keys=False)
    processes, _ = share_of_batches(trainer.accelerator)
    launch = "" if processes == 1 else f"accelerate launch --num_processes {processes} -m dil_kernels.cli "
    command = (launch or "dil-train ") + "--config recipe.yaml --output-dir out"
    return (
        f"{fenced(command)}\n\nwith this `recipe.yaml`, in which local files and directories stand by their names, "
        f"without their paths:\n\n{fenced(recipe, 'yaml')}"
    )


def recipe_of(args: Any) -> dict[str, Any]:
    """The options of a `DILConfig` that are not the defaults, and those that a recipe should always say."""
    recipe = {}
    for option in dataclasses.fields(args):
        if not option.init or NOT_THE_RECIPE.fullmatch(option.name):
            continue
        value, default = _plain(getattr(args, option.name)), _plain(option.default)
        changed = value != default and not (default is None and not value)
        if (
            (changed or option.name in ALWAYS_SAID)
            and isinstance(value, str | int | float | list | dict)
            and value != []
        ):
            recipe[option.name] = value
    if "activation_checkpointing" in recipe:
        recipe.pop("gradient_checkpointing", None)  # the same under its former name
    return recipe


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
