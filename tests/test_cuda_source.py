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

from dil_kernels.losses import LossParameters, divergence_names, get_divergence
from dil_kernels.losses.options import LINKS

pytestmark = pytest.mark.xdist_group("CUDA source")  # which is compiled once, not once a worker
EMULATION = Path(__file__).parent / "emulation"
LSIF = LossParameters("lsif")
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
    unpaired, shift = data.draw(st.booleans()), data.draw(st.booleans())
    S = data.draw(st.integers(1, 4)) if unpaired else 2 * data.draw(st.integers(1, 2))
    is_chosen = torch.rand(S, generator=gen) < 0.5 if unpaired else None
    cu_seqlens = None
    if data.draw(st.booleans()):
        lengths = data.draw(boundaries(num_sequences=S, max_length=400))
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        shape: tuple[int, ...] = (sum(lengths),)
    else:
        shape = (S, data.draw(st.integers(2, 600)))
    labels = torch.randint(-1, data.draw(st.sampled_from((0, 1, 3))), shape, generator=gen)
    token_logps = torch.randn(*shape[:-1], shape[-1] - shift, generator=gen, dtype=dtype)
    ref = (
        torch.randn(token_logps.shape, generator=gen, dtype=dtype),
        torch.randn(S, generator=gen, dtype=torch.float64),
    )
    ref = (ref[0], None) if data.draw(st.booleans()) else (None, ref[1])
    losses = [name for name in divergence_names() if not unpaired or get_divergence(name).separable]
    name, bound = data.draw(st.sampled_from((*losses, "none"))), data.draw(st.sampled_from((0.0, 2.0)))
    link = "imitation" if unpaired else data.draw(st.sampled_from(LINKS))
    parameters = LossParameters(name, 0.8, 0.3, 0.2, 0.25, bound, 1.5, 0.5, -0.2, 0.1, 3.0, link)
    flags = [data.draw(st.booleans()) for _ in range(3)]
    options = (is_chosen, *parameters, *flags, -1, shift)
    expected = ops.density_ratio_fwd(token_logps, labels, cu_seqlens, *ref, *options)
    actual = emulated.density_ratio_fwd(token_logps, labels, cu_seqlens, *ref, *options)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    grads = [torch.randn(t.shape, generator=gen, dtype=dtype) for t in expected[:4]]
    given_grads = [g if data.draw(st.booleans()) else None for g in grads]
    _, _, _, _, lengths_, counts, coefs = expected
    inputs = (*given_grads, token_logps, labels, cu_seqlens, is_chosen, lengths_, counts, coefs, *flags, -1, shift)
    torch.testing.assert_close(emulated.density_ratio_bwd(*inputs), ops.density_ratio_bwd(*inputs))


@pytest.mark.parametrize("unpaired", [True, False])
def test_more_items_than_threads_in_a_block(emulated, unpaired: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    S = 259 if unpaired else 2 * 259
    token_logps, ref = (torch.randn(S, 2, generator=gen) for _ in range(2))
    labels = torch.randint(-1, 2, (S, 2), generator=gen)
    is_chosen = torch.rand(S, generator=gen) < 0.3 if unpaired else None
    inputs = (token_logps, labels, None, ref, None, is_chosen, *LSIF, True, False, True, -1, False)
    torch.testing.assert_close(emulated.density_ratio_fwd(*inputs), torch.ops.dil_kernels.density_ratio_fwd(*inputs))


@pytest.mark.parametrize("unpaired", [True, False])
@pytest.mark.parametrize(
    "bad", [[0, 5, 3, 8, 8], [0, 2, 4, 6, 9], [1, 4, 5, 6, 8], [0, 4, 900, 2, 8], [0, -3, 1, 2, 8]]
)
def test_invalid_boundaries_give_nan_everywhere(emulated, bad: list[int], unpaired: bool) -> None:
    cu_seqlens = torch.tensor(bad, dtype=torch.int32)
    token_logps, labels = torch.randn(8), torch.zeros(8, dtype=torch.int64)
    is_chosen = torch.tensor([True, False, False, True]) if unpaired else None
    flags = (True, False, True, -1, False)
    out = emulated.density_ratio_fwd(token_logps, labels, cu_seqlens, torch.randn(8), None, is_chosen, *LSIF, *flags)
    loss, losses, logratios, logps, lengths, counts, coefs = out
    for values in (loss, losses, logratios, logps, coefs):
        assert values.isnan().all()
    saved = (is_chosen, lengths, counts, coefs)
    inputs = (torch.ones(()), None, None, None, token_logps, labels, cu_seqlens, *saved, *flags)
    assert emulated.density_ratio_bwd(*inputs).isnan().all()


@pytest.mark.parametrize("unpaired", [True, False])
def test_overflow_in_both_directions_is_inf(emulated, unpaired: bool) -> None:
    # Infinite in fp64, and in fp32 alone with the larger number the negative one.
    for u_w, u_l in ((900.0, 900.0), (200.0, 60.0)):
        ref = torch.tensor([-u_w, 0.0, 0.0, -u_l], dtype=torch.float64)
        _check_overflow_in_both_directions(emulated, ref, unpaired)


def _check_overflow_in_both_directions(emulated, ref: torch.Tensor, unpaired: bool) -> None:
    token_logps, is_chosen = torch.zeros(4, 1), torch.tensor([True, True, False, False]) if unpaired else None
    inputs = (token_logps, None, None, None, ref, is_chosen, *LSIF, False, False, True, -1, False)
    for ops in (emulated, torch.ops.dil_kernels):
        loss, losses, *_ = ops.density_ratio_fwd(*inputs)
        assert losses.tolist() == ([-torch.inf, -1.0, 0.5, torch.inf] if unpaired else [-torch.inf, torch.inf])
        assert loss == torch.inf
