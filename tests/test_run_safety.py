"""What a run of dil-train must not spoil, and what it says of checkpoints: resumed, finished, changed, cut off."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_model import make_model, make_pairs, make_tokenizer, save_model, write_lines

from dil_kernels.cli import programs
from dil_kernels.trainer import DILConfig, DILTrainer
from dil_kernels.training.checkpoints import writing_checkpoint
from dil_kernels.training.run import run_training


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and two files of pairs."""
    directory = tmp_path_factory.mktemp("inputs")
    save_model(directory / "model")
    make_model(seed=1).save_pretrained(directory / "other-model")
    for name, seed in (("pairs", 0), ("others", 1)):
        write_lines(directory / f"{name}.jsonl", *make_pairs(12, seed))
    return directory


def arguments(inputs: Path, output_dir: Path, **options: Any) -> list[str]:
    given = {
        "model": inputs / "model",
        "train_file": inputs / "pairs.jsonl",
        "output_dir": output_dir,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def train(*args: Any, **options: Any) -> int:
    try:
        return programs.main(arguments(*args, **options))
    except SystemExit as end:
        return int(end.code or 0)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("dil-train: error: ")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_nothing_that_was_there_is_overwritten(inputs: Path, tmp_path: Path, capsys) -> None:
    before = contents(inputs)
    assert train(inputs, inputs / "model") == 2
    assert "is the directory of --model, which would be overwritten" in last_line(capsys)
    assert train(inputs, inputs / "model", overwrite_output_dir=True) == 2
    assert train(inputs, inputs / "other-model", ref_model=inputs / "other-model", overwrite_output_dir=True) == 2
    assert "is the directory of --ref-model" in last_line(capsys)
    assert contents(inputs) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("mine")
    (mine / "notes.txt").write_text("mine")
    assert train(inputs, mine) == 2
    message = last_line(capsys)
    assert "holds what this run did not write (README.md, notes.txt)" in message
    assert message.endswith("--overwrite-output-dir true, which overwrites README.md")
    assert contents(mine) == {"README.md": b"mine", "notes.txt": b"mine"}
    (mine / "trainer_state.json").write_text("{}")
    assert train(inputs, mine) == 2
    assert "holds an earlier run (README.md, notes.txt, trainer_state.json): name another" in last_line(capsys)
    (mine / "notes.txt").unlink()
    assert train(inputs, mine) == 2
    assert last_line(capsys).endswith("--overwrite-output-dir true, which overwrites all of it")
    (mine / "trainer_state.json").unlink()
    (mine / "notes.txt").write_text("mine")
    assert train(inputs, mine, overwrite_output_dir=True) == 0
    assert "to be overwritten: README.md; left as they are: notes.txt" in capsys.readouterr().out
    assert (mine / "notes.txt").read_text() == "mine"
    assert (mine / "README.md").read_text() != "mine"
    shutil.rmtree(mine / "checkpoint-1")
    shutil.rmtree(mine / "checkpoint-2")
    assert train(inputs, mine) == 2  # a finished run, of whose checkpoints none is left
    (mine / "checkpoint-9").mkdir()
    assert train(inputs, mine, overwrite_output_dir=True) == 0
    assert not (mine / "checkpoint-9").exists()  # from which this run would have been resumed


def test_overwriting_removes_what_a_run_writes_and_once_training_begins(inputs: Path, tmp_path: Path, capsys) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    assert train(inputs, out) == 0
    (out / "checkpoint-best").mkdir()
    (out / "checkpoint-best" / "weights").write_text("mine")
    (out / "checkpoint-notes.txt").write_text("mine")
    earlier = ("held_out_before.json", "generations.md", "adapter_config.json", "model-00001-of-00002.safetensors")
    for name in earlier:
        (out / name).write_text("of an earlier run")
    (out / "model.bin").mkdir()  # a directory of that name is not a run's
    (out / "tokenizer.txt").write_text("mine")
    (out / "checkpoint-2").rename(kept)
    (out / "checkpoint-2").symlink_to(kept)
    before = contents(out)
    for refused in (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 16},
        {"loss_type": "bce", "resume_from_checkpoint": out / "checkpoint-1"},
        {"output_dir": out / "checkpoint-1", "resume_from_checkpoint": out / "checkpoint-1"},
    ):
        assert train(inputs, refused.pop("output_dir", out), overwrite_output_dir=True, **refused) == 2
        assert contents(out) == before
    assert "is the directory of --resume-from-checkpoint, which would be overwritten" in last_line(capsys)
    assert train(inputs, out, overwrite_output_dir=True, max_steps=1) == 0
    said = capsys.readouterr().out
    assert "left as they are: checkpoint-best, checkpoint-notes.txt, model.bin, tokenizer.txt" in said
    assert "generations" not in said.partition("left as they are")[2]
    assert not [name for name in earlier if (out / name).exists()]
    assert (out / "checkpoint-best" / "weights").read_text() == (out / "checkpoint-notes.txt").read_text() == "mine"
    assert not (out / "checkpoint-2").exists()
    assert (kept / "trainer_state.json").is_file()
    # A run that goes on from elsewhere does not take over what an earlier one had left here.
    longer = {"max_steps": 2, "resume_with_changes": True, "overwrite_output_dir": True}
    (out / "checkpoint-9").mkdir()
    assert train(inputs, out, resume_from_checkpoint=kept, **longer) == 0
    assert not (out / "checkpoint-9").exists()


def test_a_run_that_is_resumed_is_not_overwritten(tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        config = DILConfig(
            str(tmp_path),
            max_steps=2,
            save_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            ref_cache_dir="none",
        )
        return run_training(make_model(), make_tokenizer(), config, make_pairs(4), make_pairs(2), **options)

    first = run()
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert run(overwrite=True, resume_from_checkpoint=True).before == first.before
    assert (tmp_path / "checkpoint-1").is_dir()
    assert run(overwrite=True).before == first.before
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_directory_that_cannot_be_written_is_refused_at_once(
    inputs: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(programs, "_load_data", lambda options: pytest.fail("data was read"))
    file = tmp_path / "file"
    file.write_text("")
    for path, reason in (
        (file, "it is a file, not a directory"),
        (file / "below", "it cannot be written to: Not a directory"),
        (Path("/proc/nowhere/out"), "it cannot be written to: No such file or directory"),
        (tmp_path / ("x" * 300), "it cannot be written to: File name too long"),
    ):
        assert train(inputs, path) == 2
        assert last_line(capsys) == f"--output-dir {path}: {reason}"


def test_a_refused_run_leaves_no_directory(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    assert train(inputs, out, padding_free=True, attn_implementation="eager") == 2
    assert train(inputs, out, train_file=inputs / "nowhere.jsonl") == 2
    assert train(inputs, out, dataloader_drop_last=True, per_device_train_batch_size=16) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_no_step_is_an_error(inputs: Path, tmp_path: Path, capsys) -> None:
    assert train(inputs, tmp_path / "out", dataloader_drop_last=True, per_device_train_batch_size=16) == 2
    message = last_line(capsys)
    assert message.startswith("there would be no step: --dataloader-drop-last true and 12 rows of training data")
    assert "--per-device-train-batch-size 16" in message
    assert train(inputs, tmp_path / "lora", lora_rank=2, max_steps=1) == 0
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "lora")
    assert train(inputs, tmp_path / "out", model=tmp_path / "lora") == 2  # transformers loads an adapter frozen
    assert last_line(capsys).startswith("no weight of the model takes a gradient")
    trainer = DILTrainer(make_model(), args=DILConfig(str(tmp_path), use_cpu=True), processing_class=tokenizer)
    with pytest.raises(ValueError, match="train_dataset must be given to train, got None"):
        trainer.train()


def test_a_finished_run_is_not_trained_further(inputs: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert train(inputs, out) == 0
    trained = {name: data for name, data in contents(out).items() if name.endswith(("safetensors", "optimizer.pt"))}
    capsys.readouterr()
    assert train(inputs, out, resume_from_checkpoint=True) == 0
    assert "finished: step 2 of 2 was the last; there is nothing to train" in capsys.readouterr().out
    after = contents(out)
    assert {name: after[name] for name in trained} == trained
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    history = json.loads(after["trainer_state.json"])["log_history"]
    assert [log["step"] for log in history if "loss" in log] == [1, 2]
    assert train(inputs, out, resume_from_checkpoint=True, save_strategy="epoch") == 0  # nor saved again
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2


def test_what_changed_since_a_checkpoint_is_named(inputs: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert train(inputs, out, max_steps=2) == 0
    for options, message in (
        ({"learning_rate": 2e-3}, "--learning-rate 0.001, now 0.002"),
        ({"loss_type": "bce"}, "--loss-type lsif, now bce"),
        ({"max_length": 64}, "--max-length 1024, now 64"),
        ({"max_steps": 3}, "--max-steps 2, now 3"),
        ({"gradient_accumulation_steps": 2}, "global batch: 4, now 8"),
        ({"train_file": inputs / "others.jsonl"}, "training data: 12 rows, "),
        ({"ref_model": inputs / "other-model"}, "weights of the reference: "),
    ):
        assert train(inputs, out, resume_from_checkpoint=out / "checkpoint-1", **options) == 2, options
        line = last_line(capsys)
        assert f"{out / 'checkpoint-1'} was trained with " in line
        assert message in line
        assert line.endswith("--resume-with-changes true")
    assert train(inputs, tmp_path / "lora", lora_rank=2) == 0
    for options, message in (
        ({"lora_rank": 4, "lora_alpha": 4}, "trained with r of adapter default: 2, now 4: give"),
        ({}, "trained with names of the adapters: ['default'], now []: give"),
    ):
        assert train(inputs, tmp_path / "lora", resume_from_checkpoint=True, **options) == 2
        assert message in last_line(capsys)
    # What decides how a run is computed and told of may differ.
    free = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "save_total_limit": 3,
    }
    assert train(inputs, out, resume_from_checkpoint=out / "checkpoint-1", **free) == 0
    longer = {"max_steps": 3, "learning_rate": 2e-3, "resume_with_changes": True}
    assert train(inputs, out, resume_from_checkpoint=True, **longer) == 0
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3


def test_a_checkpoint_that_is_not_whole_is_named(inputs: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert train(inputs, out, max_steps=1) == 0
    whole = out / "checkpoint-1"
    for name, damage, message in (
        ("trainer_state.json", None, "trainer_state.json, which is written last, is missing or broken"),
        ("trainer_state.json", b"{}", "trainer_state.json, which is written last, is missing or broken"),
        ("trainer_state.json", b'{"global_', "trainer_state.json, which is written last, is missing or broken"),
        (
            "trainer_state.json",
            b'{"global_step": "1"}',
            "trainer_state.json, which is written last, is missing or broken",
        ),
        (
            "trainer_state.json",
            b'{"log_history": 1}',
            "trainer_state.json, which is written last, is missing or broken",
        ),
        ("dil_checksums.json", b"null", "dil_checksums.json is not as it was written"),
        ("dil_run.json", b"[]", "dil_run.json is damaged"),
        ("dil_run.json", b"{", "dil_run.json is damaged"),
        ("dil_run.json", b"[" * 100_000, "dil_run.json is damaged"),  # beyond Python's recursion limit
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("scheduler.pt", b"", "scheduler.pt is damaged"),
        ("model.safetensors", None, "it holds no weights"),
        ("model.safetensors", b"\0" * 9, "model.safetensors is damaged"),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(whole, broken)
        if damage is None:
            (broken / name).unlink()
        else:
            (broken / name).write_bytes(damage)
        assert train(inputs, tmp_path / "again", max_steps=1, resume_from_checkpoint=broken) == 2
        assert f"{broken} cannot be resumed from: {message}" in last_line(capsys)
        shutil.rmtree(broken)
    assert not (tmp_path / "again").exists()


def test_a_full_disk_names_the_last_good_checkpoint(inputs: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    save, limits = DILTrainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_in_little_room(self: DILTrainer, *args: Any) -> None:
        if self.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
        save(self, *args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(DILTrainer, "_save_checkpoint", save_in_little_room)
        try:
            status = train(inputs, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    line = last_line(capsys)
    assert line.startswith(f"{out / 'checkpoint-2'} could not be written: ")
    assert line.endswith(f"the last good checkpoint is {out / 'checkpoint-1'}")
    assert train(inputs, out, resume_from_checkpoint=True) == 0
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("saved", [False, True])
def test_an_interrupted_run_promises_no_more_than_there_is(
    saved: bool, inputs: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "out"
    step = DILTrainer.training_step

    def interrupt_second(self: DILTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == int(saved):
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DILTrainer, "training_step", interrupt_second)
    assert train(inputs, out) == 130
    where = (
        f"the last good checkpoint is {out / 'checkpoint-1'}" if saved else "no checkpoint had been written before it"
    )
    assert last_line(capsys) == f"interrupted; {where}"


@pytest.mark.parametrize(
    ("owner", "name", "error", "said"),
    [
        (programs, "_load_model", KeyboardInterrupt, "interrupted before training began"),
        (DILTrainer, "train", KeyboardInterrupt, "interrupted; no checkpoint had been written before it"),
        (DILTrainer, "train", RuntimeError, "RuntimeError; no checkpoint had been written before it"),
        (DILTrainer, "training_step", KeyboardInterrupt, "interrupted; no checkpoint had been written before it"),
    ],
)
def test_an_overwriting_run_names_no_checkpoint_of_the_earlier_one(
    owner: Any, name: str, error: type[BaseException], said: str, inputs: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise error

    earlier = tmp_path / "checkpoint-7"
    earlier.mkdir()
    (earlier / "trainer_state.json").write_text('{"global_step": 7}')
    monkeypatch.setattr(owner, name, stop)
    assert train(inputs, tmp_path, overwrite_output_dir=True) == (130 if error is KeyboardInterrupt else 1)
    assert last_line(capsys) == said
    assert earlier.exists() == (name != "training_step")  # removed once training begins


def test_a_failure_in_training_has_no_traceback_unless_asked_for(
    inputs: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def fail(self: DILTrainer, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory\n on two lines")

    monkeypatch.setattr(DILTrainer, "training_step", fail)
    assert train(inputs, tmp_path / "out") == 1
    assert last_line(capsys) == ("RuntimeError: out of memory on two lines; no checkpoint had been written before it")
    with pytest.raises(Exception, match="out of memory"):
        programs.main(arguments(inputs, tmp_path / "other", traceback=True))


def test_memory_is_pinned_only_where_there_is_a_device_to_copy_to(tmp_path: Path) -> None:
    config = DILConfig(str(tmp_path))  # torch warns of it otherwise
    assert config.dataloader_pin_memory == (config.device.type != "cpu")


def test_a_run_that_ended_before_it_had_made_anything_is_started_again(inputs: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "held_out_before.json").write_text("{}")
    assert train(inputs, output) == 0


def test_the_oldest_checkpoint_is_that_of_the_first_step_whatever_the_files_say(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    os.utime(tmp_path / "checkpoint-2", (1000, 1000))  # as copied from an old backup
    with writing_checkpoint(tmp_path / "checkpoint-4", lambda: None, main=True):
        pass
    times = [(tmp_path / f"checkpoint-{step}").stat().st_mtime for step in (1, 2, 3)]
    assert times == sorted(times)
    assert len(set(times)) == 3
