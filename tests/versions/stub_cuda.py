"""Stand-ins for the CUDA libraries that a CUDA build of torch wants before it can be imported on a machine without any.

    python tests/versions/stub_cuda.py      in the environment whose torch was installed with --no-deps

PyPI has no CPU build of torch for Linux, and its CUDA build draws some gigabytes of libraries that a test on the CPU
never calls. Every function here returns 100, CUDA's "no device", but for those in ANSWERS. Needs a C compiler and
binutils.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import defaultdict
from pathlib import Path

CUDA_LIBRARY = re.compile(r"lib(cu|nv|nccl)\S*\.so\.\d+$")
CUDA_FUNCTION = re.compile(r"_*(cu|nv|nccl)\w+$")
ANSWERS = {
    "cudaStreamIsCapturing": "long cudaStreamIsCapturing(void* stream, int* status) { return *status = 0; }",
    "cudaGetErrorName": 'const char* cudaGetErrorName(int error) { return "cudaErrorNoDevice"; }',
    "cudaGetErrorString": 'const char* cudaGetErrorString(int error) { return "no device (a stand-in for CUDA)"; }',
}


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    libraries = [path for path in folder.glob("lib*.so*") if "torch" in path.name or "c10" in path.name]
    functions: dict[str, set[str]] = defaultdict(set)  # by the version that they are asked for in, "" for none
    versions: dict[str, set[str]] = defaultdict(set)  # by library
    for path in libraries:
        headers = output_of("objdump", "-p", path)
        for library in re.findall(r"NEEDED\s+(\S+)", headers):
            versions[library] |= set()
        for library, names in re.findall(r"required from (\S+):\n((?:    .*\n)+)", headers):
            versions[library] |= {line.split()[-1] for line in names.splitlines()}
        for line in output_of("nm", "-D", "--undefined-only", path).splitlines():
            name, _, version = line.split()[-1].partition("@")
            if CUDA_FUNCTION.match(name):
                functions[version.lstrip("@")].add(name)
    missing = sorted(name for name in versions if CUDA_LIBRARY.match(name) and not (folder / name).exists())
    for library in missing:
        # What is asked for without a version may come from any library.
        nodes = {version: functions[version] for version in versions[library]}
        anywhere = functions[""] if library == missing[0] else set()
        source, script = folder / "stub.c", folder / "stub.map"
        names = sorted(anywhere.union(*nodes.values()))
        source.write_text("\n".join(ANSWERS.get(name, f"long {name}(void) {{ return 100; }}") for name in names))
        script.write_text(
            "".join(f"{node} {{ {' '.join(f'{n};' for n in nodes[node])} }};\n" for node in nodes) or "{ };"
        )
        options = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
        subprocess.run(["gcc", *options, source, "-o", folder / library], check=True)
        source.unlink()
        script.unlink()
    print(f"{folder}: stand-ins for {', '.join(missing)}")


if __name__ == "__main__":
    main()
