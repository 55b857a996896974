"""One binary serves every torch: the extension, built against the headers of another torch, runs under this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT_HERE = """
import sys
from dil_kernels import _C, backends
assert backends.extension_problem() is None, backends.extension_problem()
assert _C.__file__.startswith(sys.argv[1]), _C.__file__
"""


def test_an_extension_built_against_another_torch_is_exact(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    other_torch = pytestconfig.getoption("--other-torch")
    if other_torch is None:
        pytest.skip("no --other-torch: make test-oldest and make test-newest name one")
    headers, package = tmp_path / "headers", tmp_path / "lib"
    headers.mkdir()
    (headers / "torch").symlink_to(other_torch.resolve(strict=True), target_is_directory=True)
    environment = os.environ | {"PYTHONPATH": str(headers), "DIL_KERNELS_BUILD": "cpu"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-temp",
        str(tmp_path),
        "--build-lib",
        str(package),
    ]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert f"-isystem {headers}/torch/include" in (tmp_path / "dil_kernels" / "extension" / "build.ninja").read_text()

    sources = shutil.ignore_patterns("*.so", "_build_report.py", "__pycache__")
    shutil.copytree(ROOT / "dil_kernels", package / "dil_kernels", ignore=sources, dirs_exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(package)}
    subprocess.run([sys.executable, "-c", BUILT_HERE, str(package)], cwd=tmp_path, env=environment, check=True)
    # The oracle tests of what the extension computes.
    for name, selected in (("test_losses.py", "cpp"), ("test_logps.py", "cpp and not packed")):
        tests = ["-p", "no:cacheprovider", "-k", selected, str(ROOT / "tests" / name)]
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *tests],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout
