"""The directory that a run writes into: it can be written, and nothing is in it that the run would spoil."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dil_kernels.training.checkpoints import checkpoint_directories
from dil_kernels.training.held_out import BEFORE_NAME
from dil_kernels.training.run_lock import LOCK_NAME, OutputDirError, only_run

# What a run writes beside checkpoints: weights, adapters, tokenizers; states and reports of its own.
MODEL = re.compile(
    r"(generation_|adapter_)?config\.json|(pytorch_|adapter_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|training_args\.bin|tokenizer(_config)?\.json|(tokenizer|spiece|spm|sentencepiece\.bpe)\.model"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt|bpe)|merges\.txt|chat_template\.(jinja|json)"
    r"|additional_chat_templates"
)
REPORTS = re.compile(
    r"trainer_state\.json|README\.md|training_curves\.png|before_after\.json|held_out_before\.json|generations\.(md|jsonl)"
)
CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
NAMED = 8  # entries of a directory that a message lists


@contextlib.contextmanager
def output_directory(
    output_dir: str | os.PathLike[str],
    *,
    overwrite: bool | None = False,
    checkpoint: str | os.PathLike[str] | None = None,
    inputs: Mapping[str, str | None] | None = None,
) -> Iterator[None]:
    """Make the directory of a run, or refuse it; on leaving, what was made and is still empty is removed again.

    Args:
        output_dir: of the run; checked on the main process alone, which writes to it.
        overwrite: accept a directory that holds something, and say what will be overwritten; None where the user has
            no option for that.
        checkpoint: from which the run goes on; that of a run in this directory may be continued in it.
        inputs: directories that the run reads from, by the names that messages have for them.

    Raises:
        OutputDirError: it holds what this run did not write, is an input, cannot be written, or another run is in it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path, made, lock = Path(output_dir), [], contextlib.ExitStack()
    try:
        try:
            if path.exists() and not path.is_dir():
                raise OutputDirError(f"output_dir={path}: it is a file, not a directory")
            made = [directory for directory in (path, *path.parents) if not directory.exists()]
            path.mkdir(parents=True, exist_ok=True)
            lock.enter_context(only_run(path))
            if not continues(path, checkpoint):
                _refuse_inputs(path, {**(inputs or {}), "resume_from_checkpoint": checkpoint})
                _refuse_entries(path, overwrite)
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"can be written")
        except OSError as error:
            raise OutputDirError(f"output_dir={path}: it cannot be written to: {error.strerror}") from error
        yield
    finally:
        lock.close()
        for directory in made:
            with contextlib.suppress(OSError):  # it was not made, or is not empty
                directory.rmdir()


class RemoveEarlier(TrainerCallback):
    """Removes what an earlier run left, of which nothing must pass for this one's.

    Checkpoints and reports go once training begins, the model when this one's is to be saved.

    Attributes:
        removed: whether training has begun.
    """

    removed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove checkpoints and reports; where training begins anew (auto_find_batch_size), reports are this run's."""
        if state.is_world_process_zero:
            kinds = (CHECKPOINT,) if self.removed else (CHECKPOINT, REPORTS)
            _remove(Path(str(args.output_dir)), *kinds)
        self.removed = True

    def before_saving(self, args: TrainingArguments) -> None:
        """Remove the model: of an adapter or another number of shards some files would stay, and be loaded."""
        if args.process_index == 0:
            _remove(Path(str(args.output_dir)), MODEL)


def _remove(directory: Path, *kinds: re.Pattern[str]) -> None:
    """Remove what a run writes; of a link, the link alone."""
    for path in directory.iterdir():
        if _is_written(path, *kinds):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_written(path: Path, *kinds: re.Pattern[str]) -> bool:
    """Whether a run writes this: an entry of such a name that is a directory, or none, as the run's is."""
    is_directory = CHECKPOINT.fullmatch(path.name) or path.name == "additional_chat_templates"
    return path.is_dir() == bool(is_directory) and any(kind.fullmatch(path.name) for kind in kinds)


def continues(output_dir: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None) -> bool:
    """Whether a run goes on from a checkpoint of its own directory."""
    return checkpoint is not None and _same(Path(checkpoint).parent, Path(output_dir))


def _same(one: Path, other: Path) -> bool:
    return one.is_dir() and other.is_dir() and os.path.samefile(one, other)


def _refuse_inputs(path: Path, inputs: Mapping[str, str | os.PathLike[str] | None]) -> None:
    for name, value in inputs.items():
        if value is None:
            continue
        if _same(Path(value), path):
            raise OutputDirError(f"output_dir={path} is the directory of {name}, which would be overwritten")
        within = Path(value).resolve()
        for directory in checkpoint_directories(path):
            if directory.resolve() in (within, *within.parents):
                raise OutputDirError(f"output_dir={path} holds {name} in {directory.name}, which would be overwritten")


def _refuse_entries(path: Path, overwrite: bool | None) -> None:
    entries = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK_NAME)
    if not {*entries} - {BEFORE_NAME}:  # that alone is of a run that ended before it had made anything
        return
    replaced = [name for name in entries if _is_written(path / name, CHECKPOINT, MODEL, REPORTS)]
    if overwrite:
        kept = [name for name in entries if name not in replaced]
        print(f"{path}: to be overwritten: {', '.join(replaced) or 'nothing'}; left as they are: {_listed(kept)}")
        return
    holds = f"output_dir={path} holds "
    if overwrite is None:
        raise OutputDirError(f"{holds}what this run did not write ({_listed(entries)}): name another directory")
    if checkpoint_directories(path):
        holds += "checkpoints of an earlier run: continue it with resume_from_checkpoint, "
    elif "trainer_state.json" in entries:
        holds += f"an earlier run ({_listed(entries)}): "
    else:
        holds += f"what this run did not write ({_listed(entries)}): "
    overwritten = "all of it" if replaced == entries else _listed(replaced)
    raise OutputDirError(
        f"{holds}name another directory, or give overwrite_output_dir=True, which overwrites {overwritten}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more" * (len(names) > NAMED) or "nothing"
