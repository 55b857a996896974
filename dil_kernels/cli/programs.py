"""`dil-train` and `dil-env`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dil_kernels.wording import needs_extra

if TYPE_CHECKING:
    import datasets

    from dil_kernels.cli.run_options import RunOptions
    from dil_kernels.training.trainer import DILConfig

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
OF_ONE_RUN = ("resume_from_checkpoint", "overwrite_output_dir", "traceback")  # and of no other that repeats it


class InputError(Exception):
    """Something given to `dil-train` that it cannot start with."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dil-train`.

    Args:
        argv: the command line without the program; that of the process if None.

    Returns:
        The exit status: 0, 2 for bad input (nothing was written), 1 for a failed training.
    """
    argv = sys.argv[1:] if argv is None else argv
    # transformers imports peft, peft bitsandbytes, and that warns of a kernel for 4 bits on the CPU that it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if list(argv) in (["-h"], ["--help"]):
            from dil_kernels.cli.help_text import help_text

            print(help_text(), end="")
            raise SystemExit(0)
        from dil_kernels.cli.arguments import in_options, parse_arguments
        from dil_kernels.data import PreferenceDataError
        from dil_kernels.wording import describe_error

        options, config = parse_arguments(argv)
    except ImportError as error:
        return _fail(needs_extra("dil-train", "train", error), BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted before training began", INTERRUPTED)
    except Exception as error:  # whatever argparse, YAML and JSON raise beside their errors of syntax
        return _fail(f"the options cannot be read: {type(error).__name__}: {error}", BAD_INPUT)
    try:
        train(options, config)
    except KeyboardInterrupt as interrupt:
        return _fail(
            f"interrupted; {interrupt}" if str(interrupt) else "interrupted before training began", INTERRUPTED
        )
    except Exception as error:  # whatever models, data and packages raise
        if options.traceback:
            raise
        from dil_kernels.training.output_dir import OutputDirError
        from dil_kernels.training.run import SetupError, TrainingError

        if isinstance(error, PreferenceDataError):
            return _fail(" ".join(str(error).split()), BAD_INPUT)  # its names are columns, not options
        if isinstance(error, InputError | OutputDirError | SetupError | NotImplementedError):
            return _fail(in_options(str(error)), BAD_INPUT)
        expected = isinstance(error, TrainingError | FloatingPointError)
        message = str(error) if expected else f"{describe_error(error)} (--traceback shows where)"
        return _fail(in_options(message), FAILED)
    return 0


def env_main(argv: Sequence[str] | None = None) -> int:
    """Run `dil-env`: print what is installed, which backends are available, and why the others are not.

    Args:
        argv: no options but --help and --version; those of the process if not given.
    """
    from dil_kernels import __version__
    from dil_kernels.cli.environment import describe_environment

    parser = argparse.ArgumentParser(
        prog="dil-env", description="Say what is installed, which backends are available, and why the others are not."
    )
    parser.add_argument("--version", action="version", version=f"dil_kernels {__version__}")
    parser.parse_args(argv)
    print(describe_environment())
    return 0


def train(options: RunOptions, config: DILConfig) -> None:
    """Load data and models, check them, and train.

    Raises:
        InputError: a checkpoint, model, tokenizer or integration that cannot be used, or options that do not fit these.
        OutputDirError: the directory must not or cannot be written into.
        PreferenceDataError: a broken preference pair.
        SetupError: options, data and model do not make a run.
        NotImplementedError: a set-up that `DILTrainer` refuses, such as several GPUs in one process.
        TrainingError: training failed.
    """
    from dil_kernels.training.agreement import done_by_all
    from dil_kernels.training.output_dir import OutputDirError, output_directory
    from dil_kernels.training.preflight import check_before_loading

    try:
        check_before_loading(config)
    except ValueError as error:
        raise InputError(str(error)) from error
    checkpoint = _resolve_checkpoint(options, config)
    with contextlib.ExitStack() as stack:
        directory = output_directory(
            str(config.output_dir),
            overwrite=options.overwrite_output_dir,
            checkpoint=checkpoint,
            inputs={"--model": options.model, "--ref-model": options.ref_model},
        )
        done_by_all(lambda: stack.enter_context(directory), OutputDirError)
        _load_and_train(options, config, checkpoint)


def _load_and_train(options: RunOptions, config: DILConfig, checkpoint: str | None) -> None:
    from dil_kernels.training.agreement import done_by_all
    from dil_kernels.training.run import run_training

    done_by_all(lambda: _check_files(options), InputError)  # for a name that is wrong, nothing is loaded
    tokenizer = done_by_all(lambda: _load_tokenizer(options), InputError)  # which is small, before the data
    train_dataset, eval_dataset = done_by_all(lambda: _load_data(options, config), InputError)
    model = _with_lora(_load_model(options.model, options), options, config)
    ref_model = None if options.ref_model is None else _load_model(options.ref_model, options)
    run_training(
        model,
        tokenizer,
        config,
        train_dataset,
        eval_dataset,
        ref_model=ref_model,
        resume_from_checkpoint=checkpoint or False,
        sources={name: value for name, value in options.given().items() if name not in OF_ONE_RUN},
        overwrite=options.overwrite_output_dir,
    )


def _resolve_checkpoint(options: RunOptions, config: DILConfig) -> str | None:
    """The checkpoint to resume from, if any.

    Raises:
        InputError: there is none, it is not whole, or it was trained with other options.
    """
    from dil_kernels.training.agreement import done_by_all
    from dil_kernels.training.run_record import batch_record, options_record
    from dil_kernels.training.start import CannotStartError, agreed_checkpoint, check_same_run, rows_to_resume_with

    if options.resume_from_checkpoint is False:
        return None
    try:
        checkpoint = agreed_checkpoint(options.resume_from_checkpoint, str(config.output_dir))
        record = options_record(config) | batch_record(config, rows=rows_to_resume_with(checkpoint, config))
        done_by_all(lambda: check_same_run(checkpoint, record, config.resume_with_changes), CannotStartError)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"--resume-from-checkpoint: {error}") from error
    return str(checkpoint)


def _load_data(options: RunOptions, config: DILConfig) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    from dil_kernels.data.loading import is_local_file, load_preference_pairs
    from dil_kernels.data.mixture import data_sources, load_mixture, split_off_test

    def load(source: str, split: str) -> datasets.Dataset:
        name = None if is_local_file(source) else options.dataset_config
        return load_preference_pairs(source, split=split, name=name)

    if options.train_file is None:
        train_dataset = load_mixture(data_sources(options.datasets))
    else:
        train_dataset = load(options.train_file, options.train_split)
    if options.test_split_size is not None:
        return split_off_test(train_dataset, options.test_split_size, config.seed)
    if options.eval_file is None:
        return train_dataset, None
    split = options.eval_split or ("train" if is_local_file(options.eval_file) else "test")
    return train_dataset, load(options.eval_file, split)


def _check_files(options: RunOptions) -> None:
    """Of local data, that they are there."""
    from dil_kernels.data.files import check_file
    from dil_kernels.data.loading import is_local_file

    for name in (options.train_file, options.eval_file):
        if name is not None and is_local_file(name):
            check_file(Path(name))


def _load_tokenizer(options: RunOptions) -> Any:
    from jinja2 import TemplateSyntaxError
    from transformers import AutoTokenizer

    from dil_kernels.cli.run_options import read_chat_template

    _check_directories(options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, **_of_the_hub(options.model, options))
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        which = "" if os.path.isdir(options.model) else "there is no such directory, and by this name "
        raise InputError(f"--model {options.model}: {which}no tokenizer could be loaded: {problem}") from error
    if options.pad_token is not None:
        if options.pad_token not in tokenizer.get_vocab():
            raise InputError(f"--pad-token {options.pad_token}: the tokenizer of {options.model} has no such token")
        tokenizer.pad_token = options.pad_token
    if options.chat_template_path is not None:
        tokenizer.chat_template = read_chat_template(options.chat_template_path)
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateSyntaxError as error:
            where = f"--chat-template-path {options.chat_template_path}, line {error.lineno}"
            raise InputError(f"{where}: {error.message}") from error
        except Exception:  # a template may ask for other messages; those of the data are looked at one by one
            pass
    return tokenizer


def _check_directories(options: RunOptions) -> None:
    """Of models that are given by a path; of other names the hub says whether they are there."""
    for option, name in (("--model", options.model), ("--ref-model", options.ref_model)):
        if name is not None and name.startswith(("/", "./", "../", "~")) and not os.path.isdir(name):
            raise InputError(f"{option} {name}: there is no such directory")


def _of_the_hub(name: str, options: RunOptions) -> dict[str, Any]:
    """Arguments of `from_pretrained`, of tokenizer and model; the revision is that of --model."""
    revision = options.model_revision if name == options.model else None
    # Where this is not said, transformers asks at the terminal.
    return {**({} if revision is None else {"revision": revision}), "trust_remote_code": options.trust_remote_code}


def _load_model(name: str, options: RunOptions) -> Any:
    from transformers import AutoModelForCausalLM

    given: dict[str, Any] = {**_of_the_hub(name, options), **(options.model_init_kwargs or {})}
    quantization = options.quantization_config()
    if quantization is not None:
        given["quantization_config"] = quantization
    try:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=options.dtype, attn_implementation=options.attn_implementation, **given
        )
    except (OSError, ValueError, ImportError) as error:
        problem = " ".join(str(error).split())
        if isinstance(error, ImportError) and options.attn_implementation is not None:
            problem += " (--attn-implementation sdpa needs no further package)"
        raise InputError(f"model {name} could not be loaded: {problem}") from error
    except TypeError as error:
        if options.model_init_kwargs is None:
            raise
        raise InputError(f"model {name} could not be loaded with --model-init-kwargs: {error}") from error


def _with_lora(model: Any, options: RunOptions, config: DILConfig) -> Any:
    """The model with the adapters asked for; without any, as it is."""
    lora = options.lora_config()
    if lora is None:
        return model
    from dil_kernels.training.adapters import with_adapter

    try:
        return with_adapter(model, lora, config)
    except ValueError as error:
        raise InputError(f"--lora-rank {options.lora_rank}: {error}") from error


def _fail(message: str, status: int) -> int:
    shown = "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in message)
    print(f"dil-train: error: {shown}", file=sys.stderr)
    return status
