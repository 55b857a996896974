"""Whatever goes wrong in a run of dil-train, nothing is lost: the table of docs/faults.md, cell by cell.

A part of the cells runs in `make test`, all of them in `make faults`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fault_runs import EXPECTED, FAULTS, MOMENTS, OUTCOMES, Run, Runner, damage, make_inputs, result, table

DOCS = Path(__file__).parents[1] / "docs"
QUICK = {
    ("kill -9", "checkpointing"),
    ("SIGINT", "final save"),
    ("disk full", "checkpointing"),
    ("read-only directory", "evaluating"),
    ("damaged checkpoint", "precomputing"),
    ("damaged cache", "precomputing"),
    ("two runs in one directory", "training"),
    ("clock moved back", "training"),
}
pytestmark = pytest.mark.xdist_group("runs of dil-train")  # in `make test`, where one process forks all of them


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(make_inputs(tmp_path_factory.mktemp("faults") / "inputs"))


@pytest.fixture(scope="module")
def undisturbed(runner: Runner) -> Path:
    """The folder of a run in which nothing goes wrong, with its caches."""
    folder = runner.folder("undisturbed")
    run = runner.run(folder, folder / "out")
    assert run.status == 0, run.said
    return folder


def cells() -> list[Any]:
    return [
        pytest.param(fault, moment, marks=() if (fault, moment) in QUICK else pytest.mark.faults)
        for fault in FAULTS
        for moment in MOMENTS
    ]


@pytest.mark.parametrize(("fault", "moment"), cells())
def test_nothing_is_lost(fault: str, moment: str, runner: Runner, undisturbed: Path) -> None:
    folder = runner.folder(f"{fault} {moment}")
    out, whole = folder / "out", result(undisturbed / "out")
    outcome = {
        "damaged checkpoint": damaged_checkpoint,
        "damaged cache": damaged_cache,
        "two runs in one directory": two_runs,
        "data file changed": data_changed,
    }.get(fault, ended)(fault, moment, folder, out, runner, undisturbed)
    assert result(out) == whole
    assert outcome == EXPECTED[fault, moment]
    shutil.rmtree(folder)


def goes_on(run: Run) -> str:
    assert run.status == 0, run.said
    return "goes on"


def ended(fault: str, moment: str, folder: Path, out: Path, runner: Runner, undisturbed: Path) -> str:
    run = runner.run(folder, out, fault, moment)
    if run.status == 0:
        return goes_on(run)
    allow_writing(folder)
    if fault == "kill -9":
        assert run.status == -9, run.said
    else:
        assert run.status == (130 if fault == "SIGINT" else 1), run.said
    return go_on(run, folder, out, runner, said=fault != "kill -9")


def go_on(run: Run, folder: Path, out: Path, runner: Runner, said: bool) -> str:
    """Resume a run that ended, or start it again where it had no checkpoint, as the line in which it ended says."""
    checkpoints = sorted(path for path in out.glob("checkpoint-*") if (path / "trainer_state.json").is_file())
    if said:
        line = run.error
        if checkpoints:
            assert line.endswith(f"the last good checkpoint is {checkpoints[-1]}")
        else:
            assert line.endswith(("no checkpoint had been written before it", "interrupted before training began")), (
                line
            )
    more: dict[str, Any] = {"resume_from_checkpoint": True} if checkpoints else {"overwrite_output_dir": True}
    second = runner.run(folder, out, **more)
    assert second.status == 0, second.said
    return "resumed" if checkpoints else "again"


def allow_writing(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def damaged_checkpoint(fault: str, moment: str, folder: Path, out: Path, runner: Runner, undisturbed: Path) -> str:
    """Of a run that ended after its fourth step and is resumed: its last checkpoint is damaged meanwhile."""
    goes_on(runner.run(folder, out, save_total_limit=3))
    shutil.rmtree(out / "checkpoint-6")
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    shutil.rmtree(folder / "caches")
    (folder / "caches").mkdir()
    run = runner.run(folder, out, fault, moment, resume_from_checkpoint=True)
    if run.status == 0:
        return goes_on(run)
    assert run.status == 2, run.said
    assert f"{out / 'checkpoint-4'} cannot be resumed from: model.safetensors is not as it was written" in run.error
    assert run.error.endswith(f"the last good checkpoint is {out / 'checkpoint-2'}")
    run = runner.run(folder, out, resume_from_checkpoint=out / "checkpoint-2")
    assert run.status == 0, run.said
    return "refused"


def damaged_cache(fault: str, moment: str, folder: Path, out: Path, runner: Runner, undisturbed: Path) -> str:
    """The run is killed, and a byte of every file that it has kept is another one before it goes on."""
    run = runner.run(folder, out, "kill -9", moment)
    assert run.status == -9, run.said
    damage(folder / "caches")
    return go_on(run, folder, out, runner, said=False)


def two_runs(fault: str, moment: str, folder: Path, out: Path, runner: Runner, undisturbed: Path) -> str:
    with runner.start(folder, out, fault, moment) as first:
        here, _ = first.meeting
        assert here.wait(120), first.said
        for more in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": True}):
            second = runner.run(folder, out, **more)
            assert second.status == 2, second.said
            if "resume_from_checkpoint" not in more or list(out.glob("checkpoint-*")):
                assert f"--output-dir {out}: process " in second.error
                assert second.error.endswith("is training in it: wait for its end, or name another directory")
    return goes_on(first)


def data_changed(fault: str, moment: str, folder: Path, out: Path, runner: Runner, undisturbed: Path) -> str:
    """The run has read them; one that resumes with the others is told so."""
    outcome = goes_on(runner.run(folder, out, fault, moment))
    resumed = runner.run(folder, out, resume_from_checkpoint=out / "checkpoint-4")
    assert resumed.status == 2, resumed.said
    assert "was trained with training data: 12 rows, " in resumed.error
    return outcome


def test_the_table_of_the_documentation_is_what_is_tested() -> None:
    page = (DOCS / "faults.md").read_text()
    assert table() in page
    for name, meaning in OUTCOMES.items():
        assert f"- **{name}**: {meaning}" in page.replace("\n  ", " ")
