"""Where the quickstart writes, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dil_kernels.quickstart import run as quickstart


def test_the_quickstart_overwrites_its_own_runs_only(tmp_path: Path, monkeypatch, capsys) -> None:
    runs = []
    monkeypatch.setattr(quickstart, "_run", runs.append)
    (tmp_path / "README.md").write_text("mine")
    options = ["--output-dir", str(tmp_path)]
    assert quickstart.main(options) == 1
    assert capsys.readouterr().err == (
        f"quickstart: error: --output-dir {tmp_path} holds what this run did not write (README.md): name another "
        "directory\n"
    )
    (tmp_path / "trainer_state.json").write_text("{}")
    assert quickstart.main(options) == 0
    assert len(runs) == 1
    monkeypatch.chdir(tmp_path)  # in its own directory, whatever an interrupted run has left
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "model.safetensors").write_text("x")
    assert quickstart.main([]) == 0

    def interrupted(options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "_run", interrupted)
    capsys.readouterr()
    assert quickstart.main([]) == 130
    assert capsys.readouterr().err == "quickstart: interrupted; run it again\n"
