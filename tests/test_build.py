"""The choices of setup.py, with stand-ins for the tools; the package without its extension; every SIMD level."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pybind11
import pytest
import torch

from dil_kernels import _C as compiled
from dil_kernels import backends

ROOT = Path(__file__).parent.parent

FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools, release 12.8, V12.8.93';;
  *) printf 'compute_80\\ncompute_90\\ncompute_100\\n'
esac
"""
FAKE_NINJA = """#!/bin/sh
case "$2" in *cuda) [ -n "$FAKE_CUDA_FAILS" ] && exit 1; esac
touch "$2/_C.so" "$2/_cuda.so"
"""


@pytest.fixture
def build(tmp_path: Path):
    """Run build_ext, or another command of setup.py, with only the given tools on the PATH."""

    build_ext = ["build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path / "lib")]

    def run(*tools: str, command: list[str] = build_ext, **environment: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for tool in tools:
            script = folder / tool
            script.write_text({"nvcc": FAKE_NVCC, "ninja": FAKE_NINJA}.get(tool, "#!/bin/sh\n"))
            script.chmod(0o755)
        clean = {
            k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
        }
        # /usr/bin holds sh; it may hold compilers too, so PATH is the folder alone and the scripts name /bin/sh
        # themselves.
        clean |= {"PATH": str(folder), **environment}
        process = [sys.executable, "setup.py", *command]
        return subprocess.run(process, cwd=ROOT, env=clean, capture_output=True, text=True)

    return run


def report(tmp_path: Path) -> dict[str, str]:
    scope: dict = {}
    exec((tmp_path / "lib" / "dil_kernels" / "_build_report.py").read_text(), scope)
    return scope["REPORT"]


STAND_INS = pytest.mark.skipif(not Path("/bin/sh").exists(), reason="the stand-ins are shell scripts")


def test_unknown_choice(build) -> None:
    result = build(DIL_KERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "DIL_KERNELS_BUILD must be auto, cuda, cpu or none, got 'gpu'" in result.stderr


def test_none(build, tmp_path: Path) -> None:
    assert build("g++", "nvcc", DIL_KERNELS_BUILD="none").returncode == 0
    assert report(tmp_path) == dict.fromkeys(("extension", "cuda"), "DIL_KERNELS_BUILD=none left it out")
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_auto_without_a_compiler(build, tmp_path: Path) -> None:
    result = build()
    assert result.returncode == 0
    assert "extension: no C++ compiler was found" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith("dil_kernels: NO EXTENSION IN THIS BUILD: no C++ compiler was found")
    assert report(tmp_path)["cuda"] == "the extension itself was not built"


@STAND_INS
@pytest.mark.parametrize("tools", [(), ("g++", "ninja")])
def test_a_wheel_without_the_extension_is_for_any_machine(build, tmp_path: Path, tools: tuple[str, ...]) -> None:
    folders = ["build", "-b", str(tmp_path), "egg_info", "-e", str(tmp_path), "bdist_wheel", "-d", str(tmp_path)]
    path = f"{tmp_path / 'bin'}:/bin"
    result = build(*tools, command=folders, PATH=path, CUDA_HOME=str(tmp_path), CXX="g++" if tools else "none")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") == (not tools)
    assert ("NO EXTENSION" in result.stdout) == (not tools)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"dil_kernels/_build_report.py", "dil_kernels_programs.py"} <= {*names}
    assert any(name.endswith(".so") for name in names) == bool(tools)


@STAND_INS
def test_auto_without_nvcc(build, tmp_path: Path) -> None:
    result = build("g++", "ninja", PATH=f"{tmp_path / 'bin'}:/bin", CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert report(tmp_path) == {"extension": "built", "cuda": f"nvcc was not found in $CUDA_HOME/bin ({tmp_path}/bin)"}
    # torch brings a pybind11 of its own, which in some versions does not compile for the stable ABI.
    plan = (tmp_path / "dil_kernels" / "extension" / "build.ninja").read_text()
    for includes in re.findall(r"-isystem .*", plan):
        folders = includes.replace("-isystem", "").split()
        (first, *_) = (folder for folder in folders if (Path(folder) / "pybind11" / "pybind11.h").exists())
        assert Path(first) == Path(pybind11.get_include())


@pytest.mark.parametrize("choice", ["cuda", "cpu"])
def test_a_forced_choice_that_cannot_be_met_fails(build, choice: str) -> None:
    result = build(DIL_KERNELS_BUILD=choice)
    assert result.returncode != 0
    assert f"DIL_KERNELS_BUILD={choice} cannot be met: no C++ compiler was found" in result.stderr


@STAND_INS
@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        (
            None,
            ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_100,code=[sm_100,compute_100]"],
        ),  # knows no 120
        ("9.0", ["compute_90,code=sm_90"]),
        ("8.6;9.0a+PTX", ["compute_86,code=sm_86", "compute_90a,code=[sm_90a,compute_90a]"]),
    ],
)
def test_architectures(build, tmp_path: Path, arch_list: str | None, expected: list[str]) -> None:
    environment = {"TORCH_CUDA_ARCH_LIST": arch_list} if arch_list else {}
    result = build("g++", "nvcc", "ninja", PATH=f"{tmp_path / 'bin'}:/bin", DIL_KERNELS_BUILD="cuda", **environment)
    assert result.returncode == 0, result.stderr
    plan = (tmp_path / "dil_kernels" / "cuda" / "build.ninja").read_text()
    (flags,) = {line for line in plan.splitlines() if "-gencode" in line}
    assert [word.removeprefix("-gencode=arch=") for word in flags.split() if "-gencode" in word] == expected
    assert report(tmp_path)["cuda"] == "built by CUDA 12.8"


@STAND_INS
@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_cuda_sources_that_do_not_compile(build, tmp_path: Path, choice: str) -> None:
    path = f"{tmp_path / 'bin'}:/bin"
    result = build("g++", "nvcc", "ninja", PATH=path, FAKE_CUDA_FAILS="1", DIL_KERNELS_BUILD=choice)
    if choice == "cuda":
        assert result.returncode != 0
        assert "cuda did not compile" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert report(tmp_path)["extension"] == "built"
        assert "did not compile" in report(tmp_path)["cuda"]


@pytest.mark.parametrize("choice", ["auto", "cpu"])
def test_a_compiler_that_does_not_exist(build, tmp_path: Path, choice: str) -> None:
    result = build("g++", CXX="clang++-99", DIL_KERNELS_BUILD=choice)
    assert (result.returncode == 0) == (choice == "auto")
    assert "CXX=clang++-99 was not found" in (result.stdout if choice == "auto" else result.stderr)


@STAND_INS
def test_a_malformed_architecture(build, tmp_path: Path) -> None:
    result = build("g++", "nvcc", "ninja", PATH=f"{tmp_path / 'bin'}:/bin", TORCH_CUDA_ARCH_LIST="9.0;hopper")
    assert result.returncode != 0
    assert "'hopper' is not of the form 9.0 or 9.0+PTX" in result.stderr


def test_the_oldest_versions_tested_are_those_admitted() -> None:
    admitted = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    admitted.pop("trl")  # tested by installing it: see docs/from_trl.md
    pins = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "tests" / "versions" / "oldest.txt").read_text(), re.MULTILINE)
    )
    assert pins.keys() == admitted.keys()
    for name, version in admitted.items():
        assert f"{pins[name]}.0".startswith(f"{version}."), name


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["dil_kernels._C"] = None
import torch
from dil_kernels import backends, dil_loss, fused_dil_loss, token_logps
logits, labels = torch.randn(2, 4, 9, requires_grad=True), torch.randint(0, 9, (2, 4))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        fused_dil_loss(logits, labels, ref_logits=logits.detach()).loss.backward()
(warning,) = caught
assert "no fast log-probs for torch.float32 on cpu (not found, though it was built" in str(warning.message)
try:
    token_logps(logits, labels, backend="cpp")
except RuntimeError as error:
    assert "backend='cpp' was asked for but cannot run: not found, though it was built" in str(error)
else:
    raise AssertionError("an explicit backend was replaced")
"""


def test_the_package_without_its_extension() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], check=True)


def test_the_source_distribution_holds_every_source(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.split("/", 1)[-1] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {name for name in tracked if not name.startswith((".ci/", ".git"))}
    assert wanted - packed == set()


def test_a_release_says_where_it_comes_from(build, tmp_path: Path) -> None:
    """PyPI shows the README alone: its links must lead somewhere."""
    origin = {"GITHUB_SERVER_URL": "https://example.org", "GITHUB_REPOSITORY": "some/where"}
    tag = {"GITHUB_REF_NAME": "v9", "GITHUB_REF_TYPE": "tag"}
    for environment in ({}, origin | tag):
        for name in (*origin, *tag):
            environment.setdefault(name, "")
        result = build(command=["-q", "egg_info", "-e", str(tmp_path)], **environment)
        assert result.returncode == 0, result.stderr
        text = (tmp_path / "dil_kernels.egg-info" / "PKG-INFO").read_text()
        targets = re.findall(r"\]\(([^)#][^)]*)\)", text.split("\n\n", 1)[1])
        relative = [target for target in targets if not target.startswith("https://")]
        assert bool(relative) != bool(environment["GITHUB_REPOSITORY"])
        assert ("Project-URL: Source, https://example.org/some/where" in text) == bool(environment["GITHUB_REPOSITORY"])
    for target in targets:
        if target.startswith("https://example.org/"):
            kind, version, path = target.removeprefix("https://example.org/some/where/").split("/", 2)
            assert (version, kind) == ("v9", "raw" if path.endswith(".png") else "blob")
            assert (ROOT / path.split("#")[0]).exists(), path


@pytest.mark.parametrize("capability", ["AVX-512", "AVX2", "baseline"])
def test_every_simd_level_is_exact(capability: str, tmp_path: Path) -> None:
    """The oracle tests of the C++ backend again, with the CPU's better instructions left unused."""
    levels = ["AVX-512 BF16", "AVX-512", "AVX2", "baseline"]
    current = compiled.build_info()["cpu_capability"]
    if current not in levels or levels.index(current) >= levels.index(capability):
        pytest.skip(f"this CPU offers {current}: {capability} is tested already, or cannot run")
    environment = os.environ | {"DIL_KERNELS_CPU_CAPABILITY": capability.lower().replace("-", "")}
    check = f"from dil_kernels import _C; assert _C.build_info()['cpu_capability'] == {capability!r}"
    subprocess.run([sys.executable, "-c", check], check=True, env=environment, cwd=tmp_path)
    unknown = environment | {"DIL_KERNELS_CPU_CAPABILITY": "AVX"}
    refused = subprocess.run([sys.executable, "-c", check], env=unknown, cwd=tmp_path, capture_output=True, text=True)
    assert "must be avx512_bf16, avx512, avx2 or baseline, got AVX" in refused.stderr
    tests = ["-k", "cpp and not packed", str(ROOT / "tests" / "test_logps.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@STAND_INS
def test_a_compiler_with_arguments(build, tmp_path: Path) -> None:
    environment = {"CXX": "g++ -m64 '-DA=\"b c\"'", "PATH": f"{tmp_path / 'bin'}:/bin"}
    assert build("g++", "nvcc", "ninja", **environment).returncode == 0
    plan = (tmp_path / "dil_kernels" / "extension" / "build.ninja").read_text()
    for line in plan.splitlines():
        if line.startswith("  compiler = "):
            assert shlex.split(line.removeprefix("  compiler = ")) == [
                str(tmp_path / "bin" / "g++"),
                "-m64",
                '-DA="b c"',
            ]
    assert report(tmp_path)["cuda"].startswith("nvcc takes a compiler without arguments, not CXX=g++ -m64")


@pytest.mark.parametrize(
    ("outcome", "driver", "problem"),
    [
        ("built by CUDA 13.0", 12080, "it was built by CUDA 13.0, and this driver is one for CUDA 12.8"),
        ("built by CUDA 13.1", 13000, None),  # a driver serves all of its major
        ("built by CUDA 12.8", 13000, None),
        ("built by CUDA 13.0", None, None),
        ("nvcc was not found on PATH", 12080, None),
    ],
)
def test_a_driver_that_is_too_old_is_named(monkeypatch, outcome: str, driver: int | None, problem: str | None) -> None:
    """No kernel would start, which is known before one is tried."""
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(backends, "build_report", lambda: {"cuda": outcome})
    monkeypatch.setattr(backends, "cuda_driver_version", lambda: driver)
    found = backends.cuda_extension_problem.__wrapped__()
    if problem is None:
        assert found in (None, f"not built: {outcome}")  # which this machine decides
    else:
        assert found.startswith(problem)
