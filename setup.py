"""Build of the extension: two shared objects on PyTorch's stable ABI, compiled by ninja.

    dil_kernels/_C.*.so   pybind11 module, CPU kernels
    dil_kernels/_cuda.so  CUDA kernels, loaded only where torch has CUDA

Environment:
    DIL_KERNELS_BUILD     auto (default: what the machine can build), cuda, cpu or none; a forced choice that cannot
                          be met fails
    TORCH_CUDA_ARCH_LIST  CUDA architectures, e.g. "9.0" or "8.0;9.0+PTX" (default 8.0, 9.0, 10.0, 11.0, 12.0+PTX)
    MAX_JOBS              compile jobs in parallel
    CXX, CUDA_HOME        the C++ compiler, with arguments if need be ("ccache g++"; not for nvcc); where bin/nvcc is
    CXXFLAGS              more flags for the C++ compiler and the link of the CPU part, as of a sanitizer
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MINIMUM_TORCH = (2, 10)
DEFAULT_ARCHS = "8.0;9.0;10.0;11.0;12.0"
LIBTORCH_CUDA_SYMBOLS = (
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
)
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-maybe-uninitialized",  # these two: GCC's own AVX-512 headers
    "-Wno-uninitialized",
    "-Wno-unknown-warning-option",  # clang has not all of them
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {
    "bf16_product_avx512.cpp": [*AVX512, "-mavx512bf16"],
    "row_kernels_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "row_kernels_avx512.cpp": AVX512,
    "row_kernels_avx2.cpp": AVX2,
}


def repository() -> str | None:
    """Where a release is built from, as GitHub's workflows say; nothing is claimed of a build by hand."""
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    return f"{server}/{name}" if server and name else None


def long_description(url: str | None) -> str:
    """The README; its links and pictures lead to the repository, as there is nothing beside it on PyPI."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if url is None:
        return text
    version = os.environ.get("GITHUB_REF_NAME", "main") if os.environ.get("GITHUB_REF_TYPE") == "tag" else "main"
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{url}/raw/{version}/", text)
    return re.sub(r"((?<!!)\[[^\]!]*\]\()(?!https?:|#)", rf"\g<1>{url}/blob/{version}/", text)


class Unavailable(Exception):  # noqa: N818 - a state, not a failure
    """Why a part cannot be built here."""


def build_choice() -> str:
    choice = os.environ.get("DIL_KERNELS_BUILD", "auto")
    if choice not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"DIL_KERNELS_BUILD must be auto, cuda, cpu or none, got {choice!r}")
    return choice


def find_torch() -> Path:
    """The torch package whose headers to use; it is read, never imported.

    A build-isolated environment hides the one that pip installs into, where torch usually is already; the stable ABI
    makes its headers as good as any.
    """
    spec = importlib.util.find_spec("torch")
    candidates = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    candidates += [Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
    for path in candidates:
        if (path / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            break
    else:
        raise Unavailable("PyTorch was not installed when the package was built (install torch first, then reinstall)")
    match = re.search(r"__version__ = '(\d+)\.(\d+)", (path / "version.py").read_text())
    if match is None or tuple(map(int, match.groups())) < MINIMUM_TORCH:
        found = "unknown" if match is None else ".".join(match.groups())
        raise Unavailable(f"PyTorch {found} is older than {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}")
    return path


def find_cxx() -> str:
    """The C++ compiler, with its arguments if $CXX has some, quoted for a shell."""
    explicit = os.environ.get("CXX")
    for name, *arguments in [shlex.split(explicit)] if explicit else [["g++"], ["clang++"], ["c++"]]:
        path = shutil.which(name)
        if path:
            return " ".join(map(shell, [path, *arguments]))
    raise Unavailable(
        f"CXX={explicit} was not found" if explicit else "no C++ compiler was found (g++, clang++ or $CXX)"
    )


def find_ninja() -> str:
    path = shutil.which("ninja")
    if path is None and (spec := importlib.util.find_spec("ninja")) and spec.origin:
        import ninja

        path = str(Path(ninja.BIN_DIR) / "ninja")
    if path is None:
        raise Unavailable("ninja was not found (pip install ninja)")
    return path


def find_pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        raise Unavailable("pybind11 was not found (pip install pybind11)") from None
    return pybind11.get_include()


def find_python_headers() -> str:
    path = sysconfig.get_path("include")
    if not (Path(path) / "Python.h").exists():
        raise Unavailable(f"Python.h was not found in {path} (Debian: apt install python3-dev)")
    return path


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        path = shutil.which("nvcc", path=str(Path(home) / "bin"))
        place = f"in $CUDA_HOME/bin ({home}/bin)"
    else:
        path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        place = "on PATH or in /usr/local/cuda/bin"
    if path is None:
        raise Unavailable(f"nvcc was not found {place}")
    return path


def cuda_version(nvcc: str) -> str:
    """As "13.0"; "unknown" where nvcc says it in some other way."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else "unknown"


def architectures(nvcc: str) -> list[str]:
    """-gencode flags. Defaults that this nvcc does not know are left out; an explicit list is taken as it is."""
    explicit = os.environ.get("TORCH_CUDA_ARCH_LIST")
    entries = re.split(r"[;,\s]+", (explicit or DEFAULT_ARCHS).strip())
    if not explicit:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        entries = [entry for entry in entries if f"compute_{entry.replace('.', '')}" in known]
        entries[-1:] = [f"{entries[-1]}+PTX"]  # for newer GPUs than any that this nvcc knows
    flags = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {entry!r} is not of the form 9.0 or 9.0+PTX")
        number = match[1] + match[2]
        code = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def shell(path: object) -> str:
    return shlex.quote(str(path)).replace("$", "$$")


def quote(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Ninja:
    """A build.ninja file in the making."""

    def __init__(self) -> None:
        self.lines = [
            "rule compile\n  command = $compiler $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $compiler -shared $in -o $out $flags",
        ]

    def edge(self, rule: str, out: Path, inputs: list[Path], compiler: str, flags: list[str]) -> Path:
        self.lines.append(f"build {quote(out)}: {rule} {' '.join(map(quote, inputs))}")
        self.lines.append(f"  compiler = {compiler}\n  flags = {' '.join(flags)}")
        return out

    def run(self, folder: Path) -> None:
        """Raise `CalledProcessError` where something does not compile."""
        (folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([find_ninja(), "-C", str(folder), *jobs], check=True)


class BuildExtension(build_ext):
    def run(self) -> None:
        choice = build_choice()
        target = Path(self.get_ext_fullpath("dil_kernels._C")).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        self.report: dict[str, str] = {}
        self.build_part("extension", target, self.plan_cpu, choice, forced=choice in ("cpu", "cuda"))
        self.build_part("cuda", target.parent / "_cuda.so", self.plan_cuda, choice, forced=choice == "cuda")
        (target.parent / "_build_report.py").write_text(f'"""Written by the build."""\n\nREPORT = {self.report!r}\n')

    def build_part(self, part: str, target: Path, plan: Callable[[], Path], choice: str, forced: bool) -> None:
        """Build one shared object, or record why not. What is asked for, and the CPU part, must not fail to compile."""
        self.folder = Path(self.build_temp).resolve() / "dil_kernels" / part
        self.folder.mkdir(parents=True, exist_ok=True)
        self.graph = Ninja()
        try:
            if choice == "none" or (part == "cuda" and choice == "cpu"):
                raise Unavailable(f"DIL_KERNELS_BUILD={choice} left it out")
            if part == "cuda" and self.report["extension"] != "built":
                raise Unavailable("the extension itself was not built")
            product = plan()
            try:
                self.graph.run(self.folder)
            except subprocess.CalledProcessError:
                if forced or part == "extension":
                    raise SystemExit(
                        f"dil_kernels: {part} did not compile (see above); DIL_KERNELS_BUILD=none installs without it"
                    ) from None
                raise Unavailable("its sources did not compile (see the output of the build)") from None
            fresh = target.with_name(f".{target.name}")
            shutil.copy2(product, fresh)
            os.replace(fresh, target)  # a process that has the old one loaded keeps it
            self.report[part] = "built" if part == "extension" else f"built by CUDA {cuda_version(find_nvcc())}"
        except Unavailable as reason:
            if forced:
                raise SystemExit(f"dil_kernels: DIL_KERNELS_BUILD={choice} cannot be met: {reason}") from None
            target.unlink(missing_ok=True)
            self.report[part] = str(reason)
        print(f"dil_kernels: {part}: {self.report[part]}", flush=True)

    def plan_cpu(self) -> Path:
        torch, cxx = find_torch(), find_cxx()
        find_ninja()
        # torch 2.10 to 2.12 bundle a pybind11 that refuses TORCH_TARGET_VERSION: ours comes first.
        includes = [find_pybind11(), torch / "include", find_python_headers()]
        x86 = platform.machine() in ("x86_64", "AMD64")
        more = shlex.split(os.environ.get("CXXFLAGS", ""))
        objects = []
        for source in [ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]:
            isa = ISA_FLAGS.get(source.name, [])
            if isa and not x86:
                continue
            flags = [*CXX_FLAGS, *DEFINES, *isa, *more, *(f"-isystem {shell(i)}" for i in includes)]
            objects.append(self.graph.edge("compile", self.folder / f"{source.stem}.o", [source], cxx, flags))
        return self.graph.edge("link", self.folder / "_C.so", objects, cxx, [*more, *self.link_flags(torch / "lib")])

    def plan_cuda(self) -> Path:
        torch, nvcc, cxx = find_torch(), find_nvcc(), find_cxx()
        if len(shlex.split(cxx)) > 1:
            raise Unavailable(f"nvcc takes a compiler without arguments, not CXX={os.environ['CXX']}")
        flags = [*DEFINES, "-DUSE_CUDA", "-std=c++17", "-O3", "-Xcompiler -fPIC,-fvisibility=hidden", "--threads 2"]
        flags += [*architectures(nvcc), f"-isystem {shell(torch / 'include')}", f"-ccbin {cxx}"]
        objects = [
            self.graph.edge("compile", self.folder / f"cuda_{source.stem}.o", [source], shell(nvcc), flags)
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        ]
        # A CPU-only torch has no libtorch_cuda to link with: an import library of that name records the dependency.
        imports = self.folder / "libtorch_cuda.cpp"
        imports.write_text("".join(f'extern "C" void {symbol}() {{}}\n' for symbol in LIBTORCH_CUDA_SYMBOLS))
        stand_in = self.graph.edge(
            "link", self.folder / "libtorch_cuda.so", [imports], cxx, ["-fPIC", "-Wl,-soname,libtorch_cuda.so"]
        )
        link = [f"-ccbin {cxx}", "-cudart static"]
        return self.graph.edge(
            "link",
            self.folder / "_cuda.so",
            [*objects, stand_in],
            shell(nvcc),
            [*link, *self.link_flags(torch / "lib")],
        )

    @staticmethod
    def link_flags(lib: Path) -> list[str]:
        # Python's own symbols come from the interpreter that loads the module.
        return [f"-L{shell(lib)}", "-ltorch_cpu", "-lc10"] + ["-undefined dynamic_lookup"] * (sys.platform == "darwin")


class Build(build):
    def get_sub_commands(self) -> list[str]:
        """With build_ext in any case: it records what was built, and why the rest was not."""
        return list(dict.fromkeys([*super().get_sub_commands(), "build_ext"]))


class Package(Distribution):
    """A wheel without the extension is tagged for any machine."""

    def has_ext_modules(self) -> bool:
        try:
            for find in (find_torch, find_cxx, find_ninja, find_pybind11, find_python_headers):
                find()
        except Unavailable:
            return False
        return build_choice() != "none"


def build_requirements() -> list[str]:
    """torch, for a build-isolated environment, where one is needed and none is installed."""
    if build_choice() == "none":
        return []
    try:
        find_cxx()
    except Unavailable:
        return []
    try:
        find_torch()
    except Unavailable:
        return ["torch>=" + ".".join(map(str, MINIMUM_TORCH))]
    return []


if sys.platform == "win32":
    os.environ.setdefault("DIL_KERNELS_BUILD", "none")

url = repository()
owner, _, name = os.environ.get("GITHUB_REPOSITORY", "").partition("/")
package = setup(
    long_description=long_description(url),
    long_description_content_type="text/markdown",
    project_urls={
        "Documentation": f"https://{owner.lower()}.github.io/{name}/",
        "Source": url,
        "Issues": f"{url}/issues",
        "Changelog": f"{url}/blob/main/CHANGELOG.md",
    }
    if url
    else {},
    distclass=Package,
    ext_modules=[Extension("dil_kernels._C", sources=[])],
    cmdclass={"build": Build, "build_ext": BuildExtension},
    setup_requires=build_requirements(),
)
outcome = getattr(package.get_command_obj("build_ext"), "report", {}).get("extension", "built")
if outcome != "built":
    print(
        f"dil_kernels: NO EXTENSION IN THIS BUILD: {outcome}. On the CPU plain PyTorch takes its place, several times "
        "slower. To have it, install what is missing and then this package again; dil-env says what runs.",
        flush=True,
    )
