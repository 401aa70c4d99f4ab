"""The kernels of attention: the same cases on the emulator everywhere, and on a GPU if there is one."""

import emulator
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import backends, usable
from kernels.attention import Emulator, Gpu, case
from tolerances import RELATIVE, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel

import movq_ext

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
MIB = 1 << 20
backend = backends(emulator=Emulator, gpu=Gpu)
counted = backends(emulator=lambda: Emulator(seeds=(0,)))


def expected(q, k, v, dout, scale):
    """Return out, lse and the gradients by the formula, in float64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    scores = q @ k.mT * scale
    out = scores.softmax(3) @ v
    return out.detach(), scores.logsumexp(3).detach(), torch.autograd.grad(out, (q, k, v), dout.double())


def assert_close(name, actual, wanted, slack=1.0):
    error, allowed = relative_error(actual, wanted), slack * RELATIVE[actual.dtype]
    assert error <= allowed, f"{name}: relative error {error:.2e} > {allowed:.2e} ({actual.dtype})"


def assert_gradient_close(name, grad, wanted, slack):
    if float(wanted.abs().max()) < 1e-12:  # with one key its weight is 1 for any q and k
        assert float(grad.abs().max()) < slack * RELATIVE[grad.dtype]
    else:
        assert_close(f"gradient of {name}", grad, wanted, slack)


def assert_right(backend, q, k, v, dout, scale=None, slack=1.0):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wanted_out, wanted_lse, wanted_grads = expected(q, k, v, dout, scale)
    out, lse = backend.forward(q, k, v, scale)
    assert_close("out", out, wanted_out, slack)
    torch.testing.assert_close(lse, wanted_lse.float(), rtol=1e-5, atol=1e-5)
    for name, grad, wanted in zip("qkv", backend.backward(dout, q, k, v, out, lse, scale), wanted_grads, strict=True):
        assert_gradient_close(name, grad, wanted, 2 * slack)


# (batch, heads, queries, keys, head size). The cases named `small` are for slow sanitizers.
SHAPES = {
    "small-whole-tiles": (1, 1, 64, 128, 64),
    "small-ragged": (1, 2, 70, 140, 48),
    "one-token": (2, 1, 1, 1, 32),
    "one-query": (1, 1, 1, 300, 80),
    "one-key": (1, 1, 50, 1, 64),
    "primes": (1, 1, 37, 131, 512),
    "shared-row-tiles": (1, 1, 33, 700, 64),
    "images-and-heads": (2, 3, 20, 40, 96),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_forward_and_backward_match_the_formula(backend, shape, dtype):
    assert_right(backend, *case(*shape, dtype))


@pytest.mark.parametrize("size", range(32, 513, 16))
def test_every_head_size(backend, size):
    backend.seeds = (1,)
    assert_right(backend, *case(1, 1, 17, 33, size, DTYPES[size // 16 % 3]))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_sdpa_agrees(backend, dtype):
    q, k, v, _ = case(1, 1, 100, 200, 512, dtype)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert_close("out", backend.forward(q, k, v, 512**-0.5)[0], wanted)


def test_parts_of_one_projection_are_read_in_place(backend):
    """q, k and v are parts of one (batch, tokens, 3 * C) tensor, as AttnBlock's channels_last convolution writes it."""
    fused = torch.randn(2, 70, 3 * 2 * 64).to(BF16)
    q, k, v = (x.unflatten(2, (2, 64)).transpose(1, 2) for x in fused.chunk(3, dim=2))
    assert not q.is_contiguous()
    assert_right(backend, q, k, v, torch.randn(2, 70, 2, 64).to(BF16).transpose(1, 2))


def assert_shared_kv_is_right(backend, q, kv, dout, scale):
    """The gradient of kv is the sum of those of k and v."""
    _, _, (wanted_dq, dk, dv) = expected(q, kv, kv, dout, scale)
    out, lse = backend.forward(q, kv, kv, scale)
    dq, dkv = backend.shared_kv_backward(dout, q, kv, out, lse, scale)
    assert_gradient_close("q", dq, wanted_dq, slack=2.0)
    assert_gradient_close("kv", dkv, dk + dv, slack=2.0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_backward_of_shared_keys_and_values(backend, shape, dtype):
    q, kv, _, dout = case(*shape, dtype)
    assert_shared_kv_is_right(backend, q, kv, dout, shape[-1] ** -0.5)


@pytest.mark.parametrize("size", [128, 200, 256])
@pytest.mark.parametrize("multiprocessors", [1, 3, 16])
def test_several_whole_tiles_of_shared_keys_and_values(backend, size, multiprocessors):
    """Each tile of keys is copied once, while the one before it is read."""
    if isinstance(backend, Emulator):
        backend.seeds, backend.device = (1, 2), {"multiprocessors": multiprocessors}
    q, kv, _, dout = case(1, 1, 70, 650, size, F16)
    wanted_out, wanted_lse, _ = expected(q, kv, kv, dout, size**-0.5)
    out, lse = backend.forward(q, kv, kv, size**-0.5)
    assert_close("out", out, wanted_out)
    torch.testing.assert_close(lse, wanted_lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0, 1e-4])
def test_any_scale_of_shared_keys_and_values(backend, scale):
    """The weights of both gradients are scaled, so that their sum needs one factor."""
    q, kv, _, dout = case(1, 1, 40, 150, 32, F16)
    assert_shared_kv_is_right(backend, q, kv, dout, scale)


@pytest.mark.parametrize("multiprocessors, shared", [(1, 227), (3, 163), (3, 99), (132, 99)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda dtype: str(dtype)[6:])
def test_every_device_gets_a_plan_that_fits(counted, multiprocessors, shared, dtype):
    """With the shared memory of an sm_86, sm_80 or sm_90, the rows stay in shared memory or stream through it."""
    counted.seeds = (1,)
    counted.device = {"multiprocessors": multiprocessors, "shared_limit": shared << 10}
    assert_right(counted, *case(1, 1, 70, 260, 512, dtype))


# --- Invariances


def test_the_order_of_the_keys_does_not_matter(backend):
    q, k, v, _ = case(1, 1, 40, 300, 64, F32)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    out, lse = backend.forward(q, k, v, 0.125)
    other, other_lse = backend.forward(q, k[:, :, order].contiguous(), v[:, :, order].contiguous(), 0.125)
    assert_close("out", other, out.double())
    torch.testing.assert_close(other_lse, lse)


def test_a_constant_added_to_all_scores_changes_only_the_lse(backend):
    q, k, v, _ = case(1, 1, 40, 200, 64, F32)
    shift = torch.randn(64, generator=torch.Generator().manual_seed(1))
    out, lse = backend.forward(q, k, v, 0.125)
    other, other_lse = backend.forward(q, k + shift, v, 0.125)
    assert_close("out", other, out.double(), slack=2.0)
    torch.testing.assert_close(other_lse - lse, q @ shift * 0.125, rtol=1e-4, atol=1e-4)


def test_one_hot_values_show_the_weights(backend):
    q, k, _, _ = case(1, 1, 50, 64, 64, F32)
    out, _ = backend.forward(q, k, torch.eye(64)[None, None], 0.125)
    torch.testing.assert_close(out.sum(3), torch.ones(1, 1, 50))
    torch.testing.assert_close(out, (q @ k.mT * 0.125).softmax(3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(backend, scale):
    assert_right(backend, *case(1, 1, 40, 150, 32, F32), scale=scale, slack=3.0)


# --- Extreme values


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_scores_of_ten_thousand(backend, dtype):
    q, k, v, dout = case(1, 1, 70, 300, 64, dtype)
    q, k = q * 36, k * 36
    assert (q.double() @ k.double().mT * 0.25).abs().max() > 1e4
    out, lse = backend.forward(q, k, v, 0.25)
    wanted, wanted_lse, _ = expected(q, k, v, dout, 0.25)
    assert out.isfinite().all() and lse.isfinite().all()
    torch.testing.assert_close(lse, wanted_lse.float(), rtol=1e-5, atol=0.02)
    assert_close("out", out, wanted, slack=2000.0 if dtype == F32 else 2.0)  # a float32 score of 10^4 has an error of 10^-3
    grads = backend.backward(dout, q, k, v, out, lse, 0.25)
    assert all(grad.isfinite().all() for grad in grads)


def test_scores_that_rise_with_every_tile(backend):
    """Every tile of keys has a new maximum; in reverse order, the later weights vanish."""
    q, k, v, dout = case(1, 1, 20, 640, 32, F32)
    backend.seeds = (1,)
    rising = torch.linspace(-60, 60, 640)[None, None, :, None]
    q = q.abs()
    for order in (rising, rising.flip(2)):
        assert_right(backend, q, 0.1 * k + order / 32, v, dout, scale=1.0, slack=20.0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda dtype: str(dtype)[6:])
def test_nan_stays_in_its_image_and_query(backend, dtype):
    q, k, v, _ = case(3, 1, 40, 150, 32, dtype)
    q[0, 0, 3, 5] = float("nan")
    k[1, 0, 7, 2] = float("nan")
    v[2, 0, 9, 1] = float("nan")
    bad = backend.forward(q, k, v, 0.2)[0].isnan()[:, 0]
    wanted = torch.zeros_like(bad)
    wanted[0, 3] = wanted[1] = wanted[2, :, 1] = True
    assert torch.equal(bad, wanted)


def test_an_infinite_score_gives_nan_where_sdpa_does(backend):
    q, k, v, _ = case(1, 1, 40, 150, 32, BF16)
    k[0, 0, 7, 2] = float("inf")
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(q, k, v, scale=0.2).isnan()
    assert wanted.any() and not wanted.all()
    assert torch.equal(backend.forward(q, k, v, 0.2)[0].isnan(), wanted)


def scores_of_minus_infinity(dtype, first):
    """Return q, k, v and dout. All queries but 5 score -inf with the `first` keys, and query 7 scores -inf with every key.

    The inputs are finite where the dtype has 1e20 (the sums overflow). In float16 keys are -inf, and query 5 scores +inf.
    """
    q, k, v, dout = case(1, 1, 20, 300, 32, dtype)
    q[..., :2] = k[..., :2] = 0
    if dtype == F16:
        q[..., 0], q[0, 0, 5, 0], k[0, 0, :first, 0] = 1, -1, -torch.inf
    else:
        q[..., 0], q[0, 0, 5, 0], k[0, 0, :first, 0] = 1e20, 0, -1e20
        q[0, 0, 7, 1], k[..., 1] = 1e20, -1e20
    return q, k, v, dout


@pytest.mark.parametrize("multiprocessors", [1, 3], ids=["whole", "parts"])
@pytest.mark.parametrize("first", [128, 200, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_scores_of_minus_infinity_match_sdpa(backend, dtype, first, multiprocessors):
    """The weights of whole tiles of keys vanish. Where all of a row's do, SDPA gives 0, not NaN."""
    if isinstance(backend, Emulator):
        backend.seeds, backend.device = (1,), {"multiprocessors": multiprocessors}
    q, k, v, dout = scores_of_minus_infinity(dtype, first)
    inputs = [x.float().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(*inputs, scale=0.2)
    out, lse = backend.forward(q, k, v, 0.2)
    assert wanted[0, 0, 3].isfinite().all()
    assert torch.equal(out.isnan(), wanted.isnan())
    assert_close("out", out.nan_to_num(), wanted.detach().double().nan_to_num())
    assert (lse[0, 0, 3] == -torch.inf) == (first == 300)
    grads = backend.backward(dout, q, k, v, out, lse, 0.2)
    for name, grad, expected_grad in zip("qkv", grads, torch.autograd.grad(wanted, inputs, dout.float()), strict=True):
        assert torch.equal(grad.isnan(), expected_grad.isnan()), name
        grad, expected_grad = grad[..., 2:].nan_to_num(), expected_grad[..., 2:].nan_to_num()  # not the sums of 1e20
        assert_close(f"gradient of {name}", grad, expected_grad, slack=2.0)


def test_many_keys(backend):
    backend.seeds = (1,)
    assert_right(backend, *case(1, 1, 16, 9000, 32, BF16))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(backend, data):
    backend.seeds = (1, 2)
    shape = [data.draw(st.integers(1, maximum)) for maximum in (2, 2, 70, 200)]
    dtype = data.draw(st.sampled_from(DTYPES))
    size = data.draw(st.integers(1, 40)) * (16 // dtype.itemsize)
    if isinstance(backend, Emulator):
        backend.device = {
            "multiprocessors": data.draw(st.integers(1, 8)),
            "shared_limit": data.draw(st.sampled_from([99, 163, 227])) << 10,
        }
    assert_right(backend, *case(*shape, min(size, 512), dtype), slack=2.0)


# --- Costs, counted by the emulator


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_forward_reads_the_keys_once_per_row_tile(counted, dtype):
    counted.device = {"multiprocessors": 2}
    q, k, v, _ = case(1, 1, 256, 256, 512, dtype)
    counted.forward(q, k, v, 0.1)
    rows = 128 // dtype.itemsize
    tiles, size = 256 // rows, q.numel() * q.element_size()
    assert counted.workspace == 0
    buffers = counted.cost.buffers
    assert buffers["q"].read_bytes == size and buffers["out"].written_bytes == size
    assert buffers["k"].read_bytes == buffers["v"].read_bytes == tiles * size
    for name in "qkv":
        assert buffers[name].read_sectors * 32 == buffers[name].read_bytes
    (launch,) = counted.cost.launches
    products = 2 * 256 * 256 * 512 / (16 * 8 * (32 / dtype.itemsize))
    assert launch.mma == products * (3 if dtype == F32 else 1)
    if dtype != F32:
        assert launch.bank_conflicts == 0
        assert launch.shared_wavefronts <= 2.2 * launch.mma  # the budget of attention_tile.cuh


@pytest.mark.parametrize("dtype", [BF16, F16], ids=lambda dtype: str(dtype)[6:])
def test_backward_is_eight_products_without_bank_conflicts(counted, dtype):
    counted.device = {"multiprocessors": 2}
    q, k, v, dout = case(1, 1, 128, 128, 512, dtype)
    out, lse = counted.forward(q, k, v, 0.1)
    counted.backward(dout, q, k, v, out, lse, 0.1)
    launches = counted.cost.launches
    assert sum(launch.mma for launch in launches) == 8 * 128 * 128 * 512 / (16 * 8 * 16)
    assert sum(launch.bank_conflicts for launch in launches) == 0


@pytest.mark.parametrize(
    "size, limit, copies, used",
    [(128, 163 << 10, 1, 105_472), (256, 227 << 10, 1, 187_392), (256, 163 << 10, 2, 162_816), (512, 227 << 10, 2, 195_584)],
)
def test_keys_that_are_values_are_copied_once_where_two_tiles_fit(counted, size, limit, copies, used):
    """Half of the bytes from L2, and 0.25 wavefronts of shared memory per mma less."""
    counted.device = {"multiprocessors": 1, "shared_limit": limit}
    q, kv, v, _ = case(1, 1, 64, 256, size, BF16)
    counted.forward(q, kv, v, 0.1)
    (two_tensors,) = counted.cost.launches
    counted.forward(q, kv, kv, 0.1)
    (launch,) = counted.cost.launches
    assert counted.cost.buffers["k"].read_bytes == copies * kv.numel() * 2
    assert launch.shared_bytes == used and launch.mma == two_tensors.mma and launch.bank_conflicts == 0
    if copies == 1:
        assert launch.shared_wavefronts == two_tensors.shared_wavefronts - 0.25 * launch.mma


def test_backward_of_shared_keys_and_values_is_seven_products(counted):
    """The walk of dkv has one operand of rows, which stays in the 163 KB of an sm_80 and is read once."""
    counted.device = {"multiprocessors": 2, "shared_limit": 163 << 10}
    q, kv, _, dout = case(1, 1, 128, 128, 512, BF16)
    out, lse = counted.forward(q, kv, kv, 0.1)
    counted.shared_kv_backward(dout, q, kv, out, lse, 0.1)
    launches = {launch.kernel: launch for launch in counted.cost.launches}
    assert sum(launch.mma for launch in launches.values()) == 7 * 128 * 128 * 512 / (16 * 8 * 16)
    assert sum(launch.bank_conflicts for launch in launches.values()) == 0
    tensor, statistics = 128 * 512 * 2, 2 * 2 * 128 * 4  # lse and delta of each of two row tiles
    # Each of the two row tiles reads its own half of kv, and all of q and dout twice.
    assert launches["attention dkv"].read_bytes == tensor + 2 * 4 * tensor + statistics
    assert launches["attention dkv"].written_bytes == tensor


@pytest.mark.parametrize(
    "multiprocessors, limit, blocks",
    [(108, 163 << 10, 64), (132, 227 << 10, 64), (170, 99 << 10, 128)],
    ids=["A100", "H100", "RTX 5090"],
)
def test_blocks_that_share_rows_leave_few_parts(counted, multiprocessors, limit, blocks):
    """1024 tokens are 128 units. With one unit per block, 16.8 MB of parts would pass through L2 twice, as many bytes as the keys
    and values of all units. Two units per block halve the parts. An RTX 5090 multiplies more slowly than that costs."""
    counted.device = {
        "multiprocessors": multiprocessors,
        "shared_limit": limit,
        "run_blocks": {"attention forward": (0, 1), "attention combine": (0, 0)},
    }
    q, k, v, _ = case(1, 1, 1024, 1024, 512, BF16)
    counted.forward(q, k, v, 0.1)
    walk, buffers = counted.cost.launches[0], counted.cost.buffers
    assert walk.grid[0] == blocks
    streamed = buffers["k"].read_bytes + buffers["v"].read_bytes  # of the first block: all have equal shares
    part = buffers["workspace"].written_bytes
    assert streamed * blocks == 32 * MIB and part == 64 * (512 + 1) * 4
    assert part * blocks <= (8.1 if blocks == 64 else 16.1) * MIB


@pytest.mark.skipif(not usable("emulator"), reason="needs Linux and a host C++ compiler")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_schedule_has_the_shortest_shares_whose_parts_do_not_dominate(data):
    rows, columns, resident, step = (data.draw(st.integers(1, maximum)) for maximum in (40, 40, 170, 2))
    cycles, part_bytes = (float(data.draw(st.integers(1, 1 << 18))) for _ in range(2))
    out = torch.zeros(4, dtype=torch.int32)
    emulator.build(glue=SCHEDULE_GLUE).call(
        "schedule", out=out, row_tiles=rows, column_tiles=columns, resident=resident, cycles=cycles, part_bytes=part_bytes,
        step=step, seeds=(0,))  # fmt: skip
    units, share, blocks, parts = out.tolist()

    def count_parts(share):
        owners = [unit // share for unit in range(units)]
        by_tile = [set(owners[first : first + columns]) for first in range(0, units, columns)]
        return sum(len(blocks) for blocks in by_tile if len(blocks) > 1)

    def part_time(share):
        parts = count_parts(share) * part_bytes / (24 * resident)
        return parts / (parts + share * cycles)

    assert units == rows * columns and share % step == 0 and parts == count_parts(share)
    assert blocks == -(-units // share) <= resident
    shorter = [s for s in range(step, share, step) if -(-units // s) <= resident]
    assert part_time(share) <= 0.60001 and all(part_time(s) > 0.59999 for s in shorter)


SCHEDULE_GLUE = """
#include "attention_schedule.h"
#include "emulator.h"

EXPORT(schedule, int* out, int row_tiles, int column_tiles, int resident, double cycles, double part_bytes, int step) {
  const movq::Schedule schedule = movq::plan_schedule(row_tiles, column_tiles, resident, {cycles, part_bytes}, step);
  const int results[] = {schedule.units, schedule.share, schedule.blocks,
                         int(movq::count_parts(schedule.units, column_tiles, schedule.share))};
  emu::copy_to_device(out, results, sizeof results);
}
"""


@pytest.mark.parametrize(
    "limit, used", [(99 << 10, 99 << 10), (163 << 10, 158_720), (227 << 10, 195_584)], ids=["RTX 4090", "A100", "H100"]
)
def test_stages_fill_the_shared_memory(counted, limit, used):
    """Three stages, with the rows streamed too; four; or six, of which two are read after each barrier."""
    counted.device = {"multiprocessors": 2, "shared_limit": limit}
    q, k, v, _ = case(1, 1, 64, 128, 512, BF16)
    counted.forward(q, k, v, 0.1)
    assert counted.cost.launches[0].shared_bytes == used


@pytest.mark.parametrize("size", [96, 160])
def test_a_padded_head_is_read_without_its_padding(counted, size):
    """Heads run in tiles of 128, 256 or 512 elements; the copies to shared memory write the zeros."""
    q, k, v, _ = case(1, 1, 64, 128, size, BF16)
    counted.forward(q, k, v, 0.1)
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        assert counted.cost.buffers[name].read_bytes == tensor.numel() * 2


@pytest.mark.parametrize("tokens", [64, 1000])
def test_one_image_fills_a_gpu(counted, tokens):
    """One block per row tile would be 1 and 16 blocks for 132 multiprocessors."""
    counted.device = {"multiprocessors": 132}
    q, k, v, _ = case(1, 1, tokens, tokens, 32, BF16)
    counted.forward(q, k, v, 0.1)
    units = -(-tokens // 64) * -(-tokens // 128)
    first = counted.cost.launches[0]
    assert first.grid[0] >= min(units, 132) and counted.workspace <= 2 * first.grid[0] * 64 * (32 + 1) * 4


def test_a_head_too_large_for_the_device_raises_with_the_name_of_the_kernel(counted):
    counted.device = {"shared_limit": 48 << 10}
    q, k, v, _ = case(1, 1, 8, 8, 64, BF16)
    with pytest.raises(
        emulator.EmulatorError, match=r"attention forward: needs .* bytes of shared memory per block, the device has 49152"
    ):
        counted.forward(q, k, v, 0.1)


# --- Launching


def test_a_small_head_does_not_lower_the_limit_of_a_large_one(counted):
    """The limit of shared memory belongs to the kernel, which other threads launch too. The emulator reports a lower one."""
    counted.device = {"multiprocessors": 9}  # of its own: a limit lasts as long as the process
    for size in (96, 512, 96):
        q, k, v, dout = case(1, 1, 8, 8, size, BF16)
        out, lse = counted.forward(q, k, v, 0.1)
        counted.backward(dout, q, k, v, out, lse, 0.1)


def test_a_shape_is_planned_once_per_device(counted):
    """The workspace's size and the launch use one plan; later calls of this shape use it too."""
    q, k, v, dout = case(1, 3, 5, 7, 80, BF16)
    for device in ({"multiprocessors": 5}, {"multiprocessors": 6}):
        for queries in ([4, 0], [0, 0]):  # multiprocessors and blocks on each, for keys and values in two tensors or one
            counted.device, counted.queries = device, []
            out, lse = counted.forward(q, k, v, 0.1)
            assert counted.queries == queries
        for queries in ([6, 0], [0, 0]):
            counted.queries = []
            counted.backward(dout, q, k, v, out, lse, 0.2)
            assert counted.queries == queries


@pytest.mark.skipif(not usable("emulator"), reason="needs Linux and a host C++ compiler")
def test_the_cache_of_plans_is_bounded_and_threads_can_share_it():
    """8 threads ask for 1000 keys in different orders, from a cache of 64. Every value is right."""
    library = emulator.build(glue=CACHE_GLUE)
    computed, wrong = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    library.call("share_cache", computed=computed, wrong=wrong, threads=8, keys=1000, seeds=(0,))
    assert wrong == 0 and computed > 1000
    library.call("share_cache", computed=computed, wrong=wrong, threads=8, keys=64, seeds=(0,))
    assert wrong == 0 and computed == 64


CACHE_GLUE = """
#include <atomic>
#include <thread>
#include <vector>
#include "bounded_cache.h"
#include "emulator.h"

EXPORT(share_cache, int64_t* computed, int64_t* wrong, int threads, int keys) {
  movq::BoundedCache<int, int, 64> cache;
  std::atomic<int64_t> computations{0}, errors{0};
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      for (int i = 0; i < 3 * keys; ++i) {
        const int key = (i * 7 + t * 31) % keys;
        errors += key + 1 != cache.get(key, [&] { return ++computations, key + 1; });
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  const int64_t results[2] = {computations, errors};
  emu::copy_to_device(computed, &results[0], sizeof(int64_t));
  emu::copy_to_device(wrong, &results[1], sizeof(int64_t));
}
"""


@pytest.mark.skipif(not usable("emulator"), reason="needs Linux and a host C++ compiler")
def test_division_by_multiplication_is_exact():
    """Small, large and random divisors; dividends around multiples of the divisor."""
    wrong = torch.ones(1, dtype=torch.int64)
    emulator.build(glue=DIVISOR_GLUE).call("count_wrong_quotients", wrong=wrong, seeds=(0,))
    assert wrong == 0


DIVISOR_GLUE = """
#include <random>
#include "device/divisor.cuh"
#include "emulator.h"

EXPORT(count_wrong_quotients, int64_t* wrong) {
  std::mt19937 random(1);
  int64_t count = 0;
  for (int i = 0; i < 2000; ++i) {
    const int divisor = i < 1000 ? i + 1 : i < 1100 ? INT32_MAX - (i - 1000) : int(random() % INT32_MAX) + 1;
    const movq::Divisor fast(divisor);
    auto check = [&](int64_t dividend) {
      if (dividend >= 0 && dividend <= INT32_MAX) count += int(dividend) / fast != int(dividend) / divisor;
    };
    for (int power = 0; power < 31; ++power) {
      const int64_t multiple = int64_t(divisor) << power;
      for (int64_t dividend : {multiple - 1, multiple, multiple + 1}) check(dividend);
    }
    for (int k = 0; k < 100; ++k) check(random() >> 1);
    check(INT32_MAX);
    check(INT32_MAX / divisor * int64_t(divisor) - 1);
  }
  emu::copy_to_device(wrong, &count, sizeof count);
}
"""


# --- Sizes that only a GPU has the time or the memory for


@pytest.mark.skipif(not usable("gpu"), reason="needs a GPU and the extension")
@pytest.mark.parametrize("tokens", [4096, 65536])
def test_long_sequences_in_little_memory_on_a_gpu(tokens):
    q, k, v = (torch.randn(1, 1, tokens, 512, device="cuda", dtype=BF16) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = movq_ext.attention(q, k, v)
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * 2 + 40 * MIB
    rows = torch.randint(tokens, (64,), device="cuda")
    wanted = (q[:, :, rows].double() @ k.double().mT * 512**-0.5).softmax(3) @ v.double()
    assert relative_error(out[:, :, rows], wanted) < RELATIVE[BF16]
