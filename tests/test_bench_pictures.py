"""The pictures of a benchmark, drawn after a run and again without one."""

from __future__ import annotations

import dataclasses

import pytest
from test_bench_runs import count_builds, of_providers, run_quick

from families.loss import LOSS, LossCase
from harness.family import OURS

pytest.importorskip("matplotlib")


def test_pictures_are_drawn_again_without_a_run(tmp_path):
    grid = tuple(LossCase(pairs, 16) for pairs in (1, 2, 3))
    ours, built = count_builds(LOSS.providers[OURS])
    family = dataclasses.replace(of_providers(LOSS, ours), grids={"quick": grid})
    assert run_quick(family, tmp_path) == 0
    names = {"loss.png", "loss-memory.png", "loss-curves.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert run_quick(family, tmp_path, "--redraw") == 0
    assert {path.name for path in tmp_path.glob("*.png")} == names
    assert len(built) == len(grid)
