"""The Hopper kernels of attention with shared keys and values, on the emulator."""

import re
import shutil
import subprocess

import emulator
import machine_code
import pytest
import torch
from kernels import backends
from kernels.shared_kv_attention import H100, Emulator, case
from tolerances import RELATIVE, relative_error

F16, BF16 = torch.float16, torch.bfloat16
backend = backends(emulator=Emulator)


def expected(q, kv, dout, scale):
    """Return out, lse and the gradients by the formula, in float64."""
    q, kv = (x.double().requires_grad_() for x in (q, kv))
    scores = q @ kv.mT * scale
    out = scores.softmax(3) @ kv
    return out.detach(), scores.logsumexp(3).detach(), torch.autograd.grad(out, (q, kv), dout.double())


def assert_close(name, actual, wanted, slack=1.0):
    error, allowed = relative_error(actual, wanted), slack * RELATIVE[actual.dtype]
    assert error <= allowed, f"{name}: relative error {error:.2e} > {allowed:.2e} ({actual.dtype})"


def assert_right(backend, q, kv, dout, scale=None):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wanted_out, wanted_lse, wanted_grads = expected(q, kv, dout, scale)
    out, lse = backend.forward(q, kv, scale)
    assert_close("out", out, wanted_out)
    torch.testing.assert_close(lse, wanted_lse.float(), rtol=1e-5, atol=1e-5)
    for name, grad, wanted in zip(("q", "kv"), backend.backward(dout, q, kv, out, lse, scale), wanted_grads, strict=True):
        if float(wanted.abs().max()) < 1e-12:  # with one key its weight is 1 for any q, and with a scale of 0 for any kv
            assert float(grad.abs().max()) < 2 * RELATIVE[grad.dtype]
        else:
            assert_close(f"gradient of {name}", grad, wanted, 2)


# (batch, heads, queries, keys, head size), multiprocessors. Few multiprocessors make blocks walk over several row tiles, and many
# make them share row tiles.
SHAPES = {
    "one-token": ((2, 1, 1, 1, 128), 132),
    "one-key": ((1, 1, 50, 1, 256), 132),
    "one-query": ((1, 1, 1, 200, 512), 132),
    "whole-tiles": ((1, 1, 64, 128, 512), 1),
    "odd-stages": ((1, 1, 64, 192, 512), 1),
    "primes": ((1, 1, 67, 131, 512), 132),
    "several-tiles-per-block": ((1, 2, 130, 150, 256), 2),
    "shared-row-tiles": ((1, 1, 100, 200, 512), 16),
    "images-and-heads": ((2, 3, 70, 40, 128), 5),
}


@pytest.mark.parametrize("shape, multiprocessors", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=lambda dtype: str(dtype)[6:])
def test_forward_and_backward_match_the_formula(backend, shape, multiprocessors, dtype):
    backend.device["multiprocessors"] = multiprocessors
    assert_right(backend, *case(*shape, dtype))


def test_maps_in_channels_last_are_read_in_place(backend):
    """q and kv are halves of one (batch, tokens, 2 * heads * C) tensor."""
    fused = torch.randn(2, 70, 2 * 2 * 128).to(BF16)
    q, kv = (x.unflatten(2, (2, 128)).transpose(1, 2) for x in fused.chunk(2, dim=2))
    assert not q.is_contiguous()
    assert_right(backend, q, kv, torch.randn(2, 70, 2, 128).to(BF16).transpose(1, 2))


@pytest.mark.parametrize("scale", [0.0, -0.05, 1.0, 2.0**-12])
def test_scales(backend, scale):
    assert_right(backend, *case(1, 1, 40, 100, 128, F16), scale=scale)


def test_scores_that_rise_from_stage_to_stage(backend):
    """The maximum of each row rises in every stage, which rescales the sums of both warpgroups."""
    q, kv, dout = case(1, 1, 64, 64 * 6, 128, BF16)
    q = q.abs()
    kv = (kv.abs() * torch.arange(1, 7).repeat_interleave(64)[:, None]).to(BF16)
    assert_right(backend, q, kv, dout, scale=0.25)


def test_rows_of_scores_that_are_minus_infinity(backend):
    """-inf in one element of q makes a row's scores -inf where kv is positive."""
    q, kv, _ = case(1, 1, 64, 130, 128, F16)
    q[..., 0] = 0
    q[0, 0, 3, 0] = -torch.inf
    kv[..., 0] = 1
    kv[0, 0, 129, 0] = 0.25  # the score is -inf as well
    out, lse = backend.forward(q, kv, 0.1)
    assert not out[0, 0, 3].any() and lse[0, 0, 3] == -torch.inf
    others = torch.arange(64) != 3
    wanted = expected(q[:, :, others], kv, q[:, :, others], 0.1)[0]
    assert_close("out", out[:, :, others], wanted)


def test_other_problems_are_refused(backend):
    q, kv, _ = case(1, 1, 8, 8, 64, F16)
    with pytest.raises(emulator.EmulatorError, match="expected a head size of 128, 256 or 512, got 64"):
        backend.forward(q, kv, 1.0)
    q, kv, _ = case(1, 1, 8, 8, 128, torch.float32)
    with pytest.raises(emulator.EmulatorError, match="expected float16 or bfloat16"):
        backend.forward(q, kv, 1.0)


# --- The budget in shared_kv_tile.cuh


def test_forward_costs(backend):
    backend.seeds, backend.device["multiprocessors"] = (0,), 1
    q, kv, _ = case(1, 1, 64, 128, 512, BF16)
    backend.forward(q, kv, 512**-0.5)
    (walk,) = backend.cost.launches
    assert walk.wgmma_flops == 2 * (2 * 64 * 128 * 512)
    assert walk.wgmma_flops / 4096 == 4096  # cycles
    assert walk.wgmma == 2 * 32 + 2 * 2 * 4  # scores of two stages, and values of both in two halves
    assert walk.wgmma_shared_bytes == 400 << 10  # 5 KB for each wgmma
    assert (walk.wgmma_shared_bytes + 128 * 512 * 2) / 128 == 4224  # cycles, with the copies
    assert walk.tma_bytes == (64 + 128) * 512 * 2
    assert backend.cost.buffers["kv"].read_bytes == 128 * 512 * 2  # from L2: 1.6 KB for each wgmma
    assert walk.wgmma_flops / (128 * 512 * 2) == 128  # per byte
    assert walk.shared_bytes == 214_688 <= H100["shared_limit"]  # as benchmarks/results/resources.md has it
    assert walk.bank_conflicts == 0


def test_backward_costs(backend):
    backend.seeds, backend.device["multiprocessors"] = (0,), 1
    q, kv, dout = case(1, 1, 64, 64, 512, BF16)
    backend.backward(dout, q, kv, *backend.forward(q, kv, 512**-0.5), 512**-0.5)
    _, dq, dkv = backend.cost.launches
    product = 2 * 64 * 64 * 512
    assert (dq.wgmma_flops, dkv.wgmma_flops) == (3 * product, 4 * product)
    assert dkv.wgmma_shared_bytes == 400 << 10  # as forward: two stages of 64 rows
    assert dq.wgmma_flops / (64 * 512 * 2) == 192  # per byte of kv
    cycles = dq.wgmma_flops / 4096, (dq.wgmma_shared_bytes + 64 * 512 * 2) / 128
    assert cycles == (3072, 4160)  # of the tensor cores and of shared memory: at most 74% of the peak
    assert max(dq.shared_bytes, dkv.shared_bytes) <= H100["shared_limit"]
    assert dq.bank_conflicts == dkv.bank_conflicts == 0


def test_blocks_that_share_rows_leave_few_parts(backend):
    """1024 tokens are 128 pairs of stages. With one pair per block, 16.8 MB of parts would pass through L2 twice, twice as many
    bytes as the stages."""
    backend.seeds = (0,)
    backend.device["run_blocks"] = {"shared_kv forward": (0, 1), "shared_kv combine": (0, 0)}
    q, kv, _ = case(1, 1, 1024, 1024, 512, BF16)
    backend.forward(q, kv, 512**-0.5)
    walk, buffers = backend.cost.launches[0], backend.cost.buffers
    assert walk.grid[0] == 64
    assert buffers["kv"].read_bytes == 4 * 64 * 512 * 2
    assert buffers["workspace"].written_bytes == 64 * (512 + 1) * 4


# --- Launching


def test_a_shape_is_planned_and_its_tensor_maps_encoded_once(backend):
    """A later call of the same shapes and strides only sets the addresses, which the results show."""
    backend.seeds = (0,)
    backend.device["multiprocessors"] = 7  # of its own: plans last as long as the process
    for seed, count in enumerate([2, 0]):  # backward: boxes of 32 tokens of q, of dout's same shape, and of kv
        q, kv, dout = case(1, 1, 70, 90, 128, F16, seed)
        backend.queries = []
        out, lse = backend.forward(q, kv, 0.1)
        assert (backend.cost.encoded_tensor_maps, backend.queries) == (count, [count // 2, 0])
        wanted_out, _, wanted_grads = expected(q, kv, dout, 0.1)
        assert_close("out", out, wanted_out)
        grads = backend.backward(dout, q, kv, out, lse, 0.1)
        assert (backend.cost.encoded_tensor_maps, backend.queries[2:]) == (count, [count, 0])
        for name, grad, wanted in zip(("q", "kv"), grads, wanted_grads, strict=True):
            assert_close(f"gradient of {name}", grad, wanted, 2)


# --- What the compiler reports


@pytest.mark.parametrize("source", ["shared_kv_forward", "shared_kv_backward"])
def test_the_compiler_neither_spills_nor_serialises(source, tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        pytest.skip("no nvcc")

    def compile_for(code):
        command = [nvcc, "-std=c++20", "-O3", f"-I{emulator.KERNELS.parent}", f"-gencode=arch=compute_{code},code=sm_{code}",
                   "-Xptxas=-v", "-cubin", emulator.KERNELS / f"{source}.cu", "-o", tmp_path / "out"]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    hopper = compile_for("90a")
    assert set(re.findall(r"(\d+) bytes spill", hopper)) == {"0"}, hopper
    for loss in ("serialized", "setmaxnreg", "Potential Performance Loss"):  # "setmaxnreg ignored" is only an info
        assert loss not in hopper, hopper
    registers = dict(re.findall(r"entry function '\w*?(walk|combine|sum_dout_out)\w*'.*?Used (\d+) registers", hopper, re.S))
    assert registers["walk"] == "168"  # what 384 threads have before setmaxnreg
    walks = {name: code for name, code in machine_code.read_kernels(tmp_path / "out").items() if "4walkI" in name}
    assert len(walks) == (6 if source == "shared_kv_forward" else 12)
    for name, code in walks.items():
        # Each warpgroup has the scores of one stage, 16 elements of the head in each product, and the values of both.
        head, (products, stage) = int(re.search(r"Li(\d+)E", name)[1]), (2, 32) if "QueryGradient" in name else (1, 64)
        assert code.count("HGMMA") == 2 * (products * head // 16 + 2 * stage // 16), name
        assert code.count("WARPGROUP") < code.count("HGMMA"), f"{name} waits after each product"
        assert not {"LDL", "STL"} & set(code), f"{name} spills"
    walks = re.findall(r"entry function '\w*?walk\w*'.*?Used (\d+) registers", compile_for("90"), re.S)
    assert walks and max(map(int, walks)) < 64  # a trap: has_shared_kv_kernels() tells by it


def test_the_table_of_resources_has_the_hopper_kernels():
    """Kernel, registers, resident warps, spilled bytes, shared bytes, accesses to global and shared memory, tensor cores."""
    report = (machine_code.ROOT / "benchmarks/results/resources.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if "HGMMA" in line]
    assert len(rows) == 6 + 12  # three head sizes, two dtypes, one pass forward and two backward
    for kernel, registers, warps, spills, shared, *_, products in rows:
        assert (registers, warps, spills) == ("168", "12", "0"), kernel
        assert 96 << 10 < int(shared) <= H100["shared_limit"], kernel
        head = int(re.search(r", (\d+),", kernel)[1])
        assert f"HGMMA.64x{head // 2}x16" in products, kernel
