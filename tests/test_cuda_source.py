"""The CUDA source of the density-ratio loss, run on CPU threads against the CPU op: no GPU is needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import boundaries

from dil_kernels.divergences import divergence_names

EMULATION = Path(__file__).parent / "emulation"
OPS = ("density_ratio_fwd", "density_ratio_bwd")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    root, output = Path(torch.__file__).parent, tmp_path_factory.mktemp("emulation") / "emulated.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-I{EMULATION}", "-isystem", str(root / "include")]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = [compiler, *flags, *includes, str(EMULATION / "density_ratio.cpp"), "-o", str(output), *libraries]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    library = torch.library.Library("dil_kernels_emulated", "DEF")
    for op in OPS:
        schema = str(getattr(torch.ops.dil_kernels, op).default._schema)
        library.define(schema.removeprefix("dil_kernels::"))
    torch.ops.load_library(str(output))
    yield torch.ops.dil_kernels_emulated
    del library


@given(data=st.data())
@settings(max_examples=25)
def test_matches_the_cpu_op(emulated, data: st.DataObject) -> None:
    ops = torch.ops.dil_kernels
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    B, shift = data.draw(st.integers(1, 2)), data.draw(st.booleans())
    cu_seqlens = None
    if data.draw(st.booleans()):
        lengths = data.draw(boundaries(num_sequences=2 * B, max_length=400))
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        shape: tuple[int, ...] = (sum(lengths),)
    else:
        shape = (2 * B, data.draw(st.integers(2, 600)))
    labels = torch.randint(-1, data.draw(st.sampled_from((0, 1, 3))), shape, generator=gen)
    token_logps = torch.randn(*shape[:-1], shape[-1] - shift, generator=gen, dtype=dtype)
    ref = (
        torch.randn(token_logps.shape, generator=gen, dtype=dtype),
        torch.randn(2 * B, generator=gen, dtype=torch.float64),
    )
    ref = (ref[0], None) if data.draw(st.booleans()) else (None, ref[1])
    loss_type = data.draw(st.sampled_from(divergence_names()))
    flags = [data.draw(st.booleans()) for _ in range(3)]
    options = (loss_type, 0.3, 0.25, *flags, -1, shift)
    expected = ops.density_ratio_fwd(token_logps, labels, cu_seqlens, *ref, *options)
    actual = emulated.density_ratio_fwd(token_logps, labels, cu_seqlens, *ref, *options)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    grads = [torch.randn(t.shape, generator=gen, dtype=dtype) for t in expected[:4]]
    given_grads = [g if data.draw(st.booleans()) else None for g in grads]
    _, _, _, _, lengths_, num_pairs, coefs = expected
    inputs = (*given_grads, token_logps, labels, cu_seqlens, lengths_, num_pairs, coefs, *flags, -1, shift)
    torch.testing.assert_close(emulated.density_ratio_bwd(*inputs), ops.density_ratio_bwd(*inputs))


def test_more_pairs_than_threads_in_a_block(emulated) -> None:
    gen = torch.Generator().manual_seed(0)
    token_logps, ref = (torch.randn(2 * 259, 2, generator=gen) for _ in range(2))
    labels = torch.randint(-1, 2, (2 * 259, 2), generator=gen)
    inputs = (token_logps, labels, None, ref, None, "lsif", 0.1, 0.0, True, False, True, -1, False)
    torch.testing.assert_close(emulated.density_ratio_fwd(*inputs), torch.ops.dil_kernels.density_ratio_fwd(*inputs))


@pytest.mark.parametrize(
    "bad", [[0, 5, 3, 8, 8], [0, 2, 4, 6, 9], [1, 4, 5, 6, 8], [0, 4, 900, 2, 8], [0, -3, 1, 2, 8]]
)
def test_invalid_boundaries_give_nan_everywhere(emulated, bad: list[int]) -> None:
    cu_seqlens = torch.tensor(bad, dtype=torch.int32)
    token_logps, labels = torch.randn(8), torch.zeros(8, dtype=torch.int64)
    flags = (True, False, True, -1, False)
    out = emulated.density_ratio_fwd(token_logps, labels, cu_seqlens, torch.randn(8), None, "lsif", 0.1, 0.0, *flags)
    loss, losses, logratios, logps, lengths, num_pairs, coefs = out
    for values in (loss, losses, logratios, logps, coefs):
        assert values.isnan().all()
    inputs = (torch.ones(()), None, None, None, token_logps, labels, cu_seqlens, lengths, num_pairs, coefs, *flags)
    assert emulated.density_ratio_bwd(*inputs).isnan().all()
