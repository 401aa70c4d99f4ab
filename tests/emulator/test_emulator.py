"""Tests of the emulator: it reports each kind of planted bug, and each primitive agrees with numpy."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import emulator
from emulator import EmulatorError

pytestmark = pytest.mark.skipif(not emulator.available(), reason="needs Linux and a host C++ compiler")

HERE = Path(__file__).parent / "kernels"


@pytest.fixture(scope="module")
def planted():
    return emulator.build(HERE / "planted.cu")


@pytest.fixture(scope="module")
def sound():
    return emulator.build(HERE / "sound.cu")


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_bfloat(x):
    """Return the bits of the nearest bfloat16, ties to even, in integer arithmetic that the emulator does not use."""
    bits = x.view(np.uint32).astype(np.uint64)
    low, up = bits & 0xFFFF, bits >> 16
    return (up + ((low > 0x8000) | ((low == 0x8000) & (up & 1 == 1)))).astype(np.uint16)


def from_bfloat(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


# --- Planted bugs: (kernel, its arguments, the value of `bug`, a pattern that the report must match)

X, Y = floats(64), emulator.empty(64)
BUGS = [
    ("missing_barrier", dict(x=X, y=Y, n=64), True, r"race: shared byte .* between|read of unwritten shared memory"),
    ("missing_second_barrier", dict(x=X, y=Y, n=64), True, "race: shared byte"),
    ("missing_syncwarp", dict(x=X, y=Y), True, "race: shared byte|read of unwritten shared memory"),
    ("write_race", dict(y=Y, n=64), True, "race: shared byte 0 is written here and written by"),
    (
        "global_bounds",
        dict(x=X[:63], y=Y[:63], n=63),
        True,
        "global write of 4 bytes out of bounds: at byte 252 of 'y', which has 252",
    ),
    ("global_read_before", dict(x=X, y=Y, n=64), True, "global read of 4 bytes out of bounds: at byte -4 of 'x'"),
    ("writes_const", dict(x=X), True, "global write to 'x', which is const"),
    ("raw_pointer", dict(x=X, y=Y), True, "AddressSanitizer: use-after-poison"),
    ("misaligned", dict(x=X, y=Y), True, "misaligned global read of 16 bytes at byte 4 of 'x'"),
    ("misaligned_shared", dict(y=Y), True, "misaligned shared read of 16 bytes at byte 4"),
    ("shared_view", dict(y=Y), True, "elements 4 to 4 are out of bounds of a view of 4"),
    ("shared_bounds", dict(y=Y), True, "shared write of 4 bytes at byte 16: out of bounds of the block's 16"),
    ("unwritten_shared", dict(y=Y), True, "read of unwritten shared memory: byte 4"),
    ("async_copy", dict(x=X, y=Y, threads=8), 1, "cp.async .* its wait is missing"),
    ("async_copy", dict(x=X, y=Y, threads=8), 2, "cp.async .* its wait is missing"),
    ("async_copy", dict(x=X, y=Y, threads=8), 3, "its wait is missing|race: shared byte|unwritten shared"),
    ("async_overwrite", dict(x=X, y=Y, threads=8), True, "race: shared byte|cp.async .* its wait is missing"),
    ("divergent_barrier", dict(y=Y, n=64), 1, "divergent barrier"),
    (
        "divergent_barrier",
        dict(y=Y, n=64),
        2,
        "divergent barrier: .* waits at __syncthreads in line .* it is at __syncthreads in line",
    ),
    ("divergent_barrier", dict(y=Y, n=64), 3, "divergent barrier"),
    (
        "divergent_barrier",
        dict(y=Y, n=64),
        4,
        "divergent barrier: .* waits at __syncthreads in line .* it is at __syncthreads in line",
    ),
    ("divergent_shuffle", dict(y=Y), 1, "divergent warp: __shfl_xor_sync|deadlock"),
    ("divergent_shuffle", dict(y=Y), 2, "divergent warp: this lane is at"),
    ("cluster_barriers", dict(y=Y, blocks=4), 1, "race: shared byte|unwritten"),
    ("cluster_barriers", dict(y=Y, blocks=4), 2, "ends while another block|has begun to end"),
    ("dependent_launch", dict(x=X, between=X.copy(), y=X.copy(), n=64), 1, "global read of 'between' before wait_for_previous"),
    ("dependent_launch", dict(x=X, between=X.copy(), y=X.copy(), n=64), 2, "global write of 'y' before wait_for_previous"),
    ("dependent_launch", dict(x=X, between=X.copy(), y=X.copy(), n=64), 3, "ends without wait_for_previous_kernel"),
    ("order_of_blocks", dict(y=Y), True, "'y' depends on the order in which threads run"),
]


@pytest.mark.parametrize("kernel, arguments, bug, report", BUGS, ids=[f"{b[0]}-{int(b[2])}" for b in BUGS])
def test_a_planted_bug_is_reported_on_every_schedule(planted, kernel, arguments, bug, report):
    planted.call(kernel, **arguments, bug=type(bug)(0))
    for seeds in [(0, 1, 2)] if kernel == "order_of_blocks" else [(0,), (1,), (2,), (3,)]:
        with pytest.raises(EmulatorError, match=report) as error:
            planted.call(kernel, **arguments, bug=bug, seeds=seeds)
        if kernel not in ("raw_pointer", "order_of_blocks"):
            assert str(error.value).startswith(kernel + ": ") and "[block (" in str(error.value)


def test_sanitizers_are_on(planted):
    y = np.zeros(1, np.float32)
    planted.call("local_array", index=np.array([3], np.int32), y=y)
    assert y[0] == 4
    with pytest.raises(EmulatorError, match="AddressSanitizer: stack-buffer-overflow"):
        planted.call("local_array", index=np.array([4], np.int32), y=y)
    with pytest.raises(EmulatorError, match="signed integer overflow"):
        planted.call("overflow", x=np.array([65536], np.int32), y=np.zeros(1, np.int32))
    planted.call("local_array", index=np.array([0], np.int32), y=y)  # in a new process
    assert y[0] == 1


def test_a_wrong_fragment_gives_a_wrong_product(planted):
    a, b, d = floats(16, 16).astype(np.float16), floats(16, 8, seed=1).astype(np.float16), emulator.empty((16, 8))
    expected = a.astype(np.float64) @ b.astype(np.float64)
    planted.call("fragment", a=a, b=b, d=d, bug=False)
    np.testing.assert_allclose(d, expected, rtol=1e-6, atol=1e-6)
    planted.call("fragment", a=a, b=b, d=d, bug=True)
    assert np.abs(d - expected).max() > 1


def test_a_kernel_that_never_ends_times_out(planted):
    with pytest.raises(EmulatorError, match="may never end"):
        planted.call("spin", y=np.zeros(1, np.float32), timeout=2)
    planted.call("spin", y=np.ones(1, np.float32))


@pytest.mark.parametrize(
    "change, report",
    [
        (dict(threads=1025), "1025 threads in a block"),
        (dict(threads=0), "0 threads in a block"),
        (dict(grid=0), "an empty grid"),
        (dict(shared_bytes=227 * 1024 + 1), "bytes of shared memory"),
        (dict(cluster=3), "not whole clusters"),
        (dict(grid=1024, cooperative=True), "more than fit at once"),
    ],
)
def test_launches_over_the_limits_are_refused(planted, change, report):
    good = dict(grid=4, threads=1024, shared_bytes=227 * 1024, cluster=2, cooperative=False)
    planted.call("shape", **good)
    with pytest.raises(EmulatorError, match=f"nothing: invalid launch: .*{report}"):
        planted.call("shape", **{**good, **change})


def test_the_first_kernel_of_a_call_must_not_be_dependent(planted):
    with pytest.raises(EmulatorError, match="dependent_launch: invalid launch: the first kernel of a call"):
        planted.call("dependent_launch", x=X, between=X.copy(), y=X.copy(), n=64, bug=4)


def test_a_dependent_kernel_reads_what_the_one_before_it_wrote(planted):
    between, y = emulator.empty(64), X.copy()
    cost = planted.call("dependent_launch", x=X, between=between, y=y, n=64, bug=0)
    np.testing.assert_array_equal(y, X + (X + X))
    assert [launch.dependent for launch in cost.launches] == [False, True]


def test_a_kernel_opts_in_to_shared_memory_once_per_device(planted):
    device = dict(multiprocessors=7)  # of its own: opting in lasts as long as the process
    planted.call("opt_in", shared_bytes=48 << 10, bug=2, **device)
    with pytest.raises(EmulatorError, match=r"nothing: invalid launch: 65536 bytes .* has opted in to 49152"):
        planted.call("opt_in", shared_bytes=64 << 10, bug=2, **device)
    planted.call("opt_in", shared_bytes=64 << 10, bug=1, **device)
    with pytest.raises(EmulatorError, match="lowered from 65536 to 51200 bytes, which would fail another thread's launch"):
        planted.call("opt_in", shared_bytes=50 << 10, bug=1, **device)
    for kilobytes in (64, 50, 227):
        planted.call("opt_in", shared_bytes=kilobytes << 10, bug=0, **device)


def test_arguments_are_checked(planted):
    with pytest.raises(TypeError, match="takes x, y, n, bug"):
        planted.call("global_bounds", x=X)


def test_a_failed_call_does_not_change_its_arrays(planted):
    y = np.zeros(63, np.float32)
    with pytest.raises(EmulatorError):
        planted.call("global_bounds", x=X[:63], y=y, n=63, bug=True)
    assert not y.any()


# --- Shared memory of arguments, and alignment


def test_views_keep_their_alignment_and_their_neighbours(planted, sound):
    base = np.arange(40, dtype=np.float32)
    with pytest.raises(EmulatorError, match="misaligned"):
        planted.call("misaligned", x=base[1:], y=Y, bug=False)
    planted.call("misaligned", x=base[4:], y=Y, bug=False)
    sound.call("strided", x=base[:32].copy(), y=base[4:36], stride=1)
    assert (base[4:36] == np.arange(32)).all() and (base[:4] == np.arange(4)).all() and (base[36:] == np.arange(36, 40)).all()


def test_overlapping_arguments_are_one_buffer(sound):
    base = np.arange(64, dtype=np.float32)
    result = sound.call("ragged", x=base, y=base[:32], n=64)
    assert (base[:32] == np.arange(32) + np.arange(32, 64)).all()
    assert result.buffers["x"] is result.buffers["y"]


def test_tensors_and_strided_views(sound):
    torch = pytest.importorskip("torch")
    x, y = torch.arange(64.0), torch.zeros(2, 32)
    sound.call("strided", x=x, y=y[1], stride=2)
    assert torch.equal(y[1], x[::2]) and not y[0].any()


# --- Conversions of every 16-bit value and its neighbours


def all_values(decode):
    return decode(np.arange(65536, dtype=np.uint16))


@pytest.mark.parametrize(
    "kernel, decode", [("from_half", lambda b: b.view(np.float16).astype(np.float32)), ("from_bfloat", from_bfloat)]
)
def test_every_16_bit_value_widens_exactly(sound, kernel, decode):
    bits, y = np.arange(65536, dtype=np.uint16), emulator.empty(65536)
    sound.call(kernel, x=bits, y=y, n=65536)
    np.testing.assert_array_equal(y, decode(bits))
    assert (np.signbit(y) == (bits >= 32768))[~np.isnan(y)].all()


@pytest.mark.parametrize(
    "kernel, decode, encode",
    [
        ("to_half", lambda b: b.view(np.float16).astype(np.float32), lambda x: x.astype(np.float16).view(np.uint16)),
        ("to_bfloat", from_bfloat, to_bfloat),
    ],
)
def test_rounding_is_to_nearest_even_around_every_16_bit_value(sound, kernel, decode, encode):
    with np.errstate(all="ignore"):
        values = all_values(decode)
        ups = np.nextafter(values, np.float32(np.inf))
        middles = ((values.astype(np.float64) + np.roll(values, -1)) / 2).astype(np.float32)  # ties, if both are finite
        x = np.concatenate(
            [
                values,
                ups,
                np.nextafter(values, np.float32(-np.inf)),
                middles,
                np.nextafter(middles, np.float32(0)),
                np.nextafter(middles, np.float32(np.inf)),
                floats(65536) * 1e5,
                floats(65536) * 1e-6,
            ]
        )
        y = emulator.empty(x.shape, np.uint16)
        sound.call(kernel, x=x, y=y, n=x.size, seeds=(1,))
        expected = encode(x)
    nan = np.isnan(x)
    assert nan.any() and np.isnan(decode(y[nan])).all()
    np.testing.assert_array_equal(y[~nan], expected[~nan])


def test_bfloat_rounding_matches_torch(sound):
    torch = pytest.importorskip("torch")
    x = floats(4096) * 10.0 ** np.random.default_rng(1).integers(-30, 30, 4096).astype(np.float32)
    y = torch.zeros(4096, dtype=torch.bfloat16)
    sound.call("to_bfloat", x=x, y=y, n=4096)
    assert torch.equal(y, torch.from_numpy(x).bfloat16())


# --- Warps


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("argument", [0, 1, 3, 7, 16, 31])
def test_shuffles(sound, argument, width):
    x, y, lane = floats(32), emulator.empty((4, 32)), np.arange(32)
    sound.call("shuffles", x=x, y=y, argument=argument, width=width)
    first = lane // width * width
    last = first + width - 1
    sources = [first + argument % width, lane - argument, lane + argument, lane ^ argument]
    inside = [np.full(32, True), sources[1] >= first, sources[2] <= last, sources[3] <= last]
    for mode in range(4):
        np.testing.assert_array_equal(y[mode], x[np.where(inside[mode], sources[mode], lane)])


@pytest.mark.parametrize("threads", [32, 96, 72])
def test_votes(sound, threads):
    x = np.random.default_rng(threads).integers(0, 2, threads).astype(np.int32)
    y = emulator.empty((threads, 8), np.uint32)
    sound.call("votes", x=x, y=y, threads=threads)
    for t in range(threads):
        warp = range(t // 32 * 32, min(t // 32 * 32 + 32, threads))
        bits = [(int(x[i]) << i % 32) for i in warp]
        peers = [bit for i, bit in zip(warp, bits, strict=True) if i % 2 == t % 2]
        assert y[t].tolist() == [sum(bits), any(bits), all(bits), sum(peers), x.sum(), x.any(), x.all(), t]


@pytest.mark.parametrize("threads", [32, 128, 1024])
@pytest.mark.parametrize("n", [1, 31, 1000])
def test_moments_and_block_reductions(sound, n, threads):
    x, y = floats(n) + 1000, emulator.empty(3)
    sound.call("moments", x=x, y=y, n=n, threads=threads)
    np.testing.assert_allclose(y[:2], [x.astype(np.float64).mean(), x.astype(np.float64).var()], rtol=1e-4)
    assert y[2] == x[:threads].max()


# --- Tensor cores


@pytest.mark.parametrize(
    "kernel, encode, decode",
    [
        ("matmul_half", lambda x: x.astype(np.float16), lambda x: x.astype(np.float64)),
        ("matmul_bfloat", to_bfloat, lambda x: from_bfloat(x).astype(np.float64)),
    ],
)
def test_mma_from_ldmatrix_is_a_matrix_product(sound, kernel, encode, decode):
    a, b, c = encode(floats(16, 16)), encode(floats(16, 8, seed=1)), floats(16, 8, seed=2)
    d = c.copy()
    result = sound.call(kernel, a=a, b=b, d=d)
    np.testing.assert_allclose(d, decode(a) @ decode(b) + c, rtol=1e-6, atol=1e-6)
    assert result.launches[0].mma == 1


def test_tf32_mma_rounds_its_operands_to_ten_bits(sound):
    def tf32(x):  # to nearest, ties away from zero
        mantissa, exponent = np.frexp(x.astype(np.float64))
        return np.ldexp(np.copysign(np.floor(np.abs(mantissa) * 2048 + 0.5), mantissa) / 2048, exponent)

    a, b, d = floats(16, 8), floats(8, 8, seed=1), emulator.empty((16, 8))
    sound.call("matmul_tf32", a=a, b=b, d=d)
    np.testing.assert_allclose(d, tf32(a) @ tf32(b), rtol=1e-6, atol=1e-6)


def test_mma_truncates_its_sums(sound):
    a, b, d = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32), emulator.empty((16, 8))
    a[:, 0], a[:, 1] = [1] * 8 + [-1] * 8, [2**-12] * 8 + [-(2**-12)] * 8
    b[0], b[1] = 1, 1.5 * 2**-12  # 1 and three quarters of an ulp, of either sign
    sound.call("matmul_tf32", a=a, b=b, d=d)
    assert np.array_equal(d, np.repeat([[1.0], [-1.0]], 8, axis=0) * np.ones(8))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_gives_each_lane_its_pair(sound, count, transposed):
    x, y = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8), emulator.empty((32, count), np.uint32)
    sound.call("matrices", x=x, y=y, count=count, transposed=transposed)
    rows = x.swapaxes(1, 2) if transposed else x
    for lane in range(32):
        pair = rows[:, lane // 4, lane % 4 * 2 :][:, :2].astype(np.uint32)
        np.testing.assert_array_equal(y[lane], pair[:, 0] | pair[:, 1] << 16)


# --- Copies, clusters, grids, atomics


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("pieces", [0, 13, 64])
def test_cp_async_fills_with_zeros_and_reads_only_what_is_valid(sound, pieces, width):
    x, y = floats(max(pieces * width, 4)), emulator.empty(64 * width)
    result = sound.call("copy_valid", x=x, y=y, n=pieces * width, width=width)
    np.testing.assert_array_equal(y, np.concatenate([x[: pieces * width], np.zeros((64 - pieces) * width, np.float32)]))
    assert result.buffers["x"].read_bytes == pieces * width * 4


@pytest.mark.parametrize("cluster", [2, 4, 8])
def test_clusters_read_each_others_shared_memory(sound, cluster):
    x, y = floats(16, 64), emulator.empty((16, 64))
    sound.call("cluster_sum", x=x, y=y, blocks=16, threads=64, cluster=cluster)
    sums = x.reshape(-1, cluster, 64).sum(1, dtype=np.float64)
    np.testing.assert_allclose(y, np.repeat(sums, cluster, 0), rtol=1e-4, atol=1e-5)


def test_grid_sync(sound):
    x, parts, y = floats(16, 128), emulator.empty(16), emulator.empty(16)
    sound.call("grid_sum", x=x, parts=parts, y=y, blocks=16, threads=128)
    np.testing.assert_allclose(y, x.sum(dtype=np.float64), rtol=1e-4)


def test_an_atomic_ticket_identifies_the_last_block(sound):
    x, parts, ticket, y = floats(100), emulator.empty(100), np.zeros(1, np.uint32), emulator.empty(1)
    sound.call("last_block", x=x, parts=parts, ticket=ticket, y=y, blocks=100, seeds=range(8))
    np.testing.assert_allclose(y, x.sum(dtype=np.float64), rtol=1e-4)
    assert ticket[0] == 100


def test_indices_in_three_dimensions(sound):
    y = emulator.empty(24 * 210, np.uint32)
    sound.call("where_am_i", y=y)
    assert (y == np.arange(24 * 210)).all()


# --- Counters


@pytest.mark.parametrize("stride", [1, 2, 8, 32, 33])
def test_sectors_and_bank_conflicts_of_strided_access(sound, stride):
    x, y = floats(32 * stride), emulator.empty(32)
    result = sound.call("strided", x=x, y=y, stride=stride)
    (launch,) = result.launches
    assert (y == x[::stride]).all()
    assert (launch.read_bytes, launch.written_bytes, launch.read_requests, launch.write_requests) == (128, 128, 1, 1)
    assert launch.read_sectors == result.buffers["x"].read_sectors == min(4 * stride, 32)
    assert launch.written_sectors == result.buffers["y"].written_sectors == 4
    assert launch.worst_ways == np.gcd(stride, 32)
    assert launch.bank_conflicts == 2 * (np.gcd(stride, 32) - 1)


@pytest.mark.parametrize("pitch, ways", [(16, 1), (128, 8), (144, 1), (64, 4)])
def test_bank_conflicts_of_ldmatrix(sound, pitch, ways):
    x, y = np.arange(64, dtype=np.uint16), emulator.empty(32, np.uint32)
    assert sound.call("pitched", x=x, y=y, pitch=pitch).launches[0].worst_ways == ways


@pytest.mark.parametrize("n", [32, 70, 100])
def test_requests_of_lanes_that_loop_unevenly(sound, n):
    x, y = floats(n), emulator.empty(32)
    buffer = sound.call("ragged", x=x, y=y, n=n).buffers["x"]
    assert (buffer.read_requests, buffer.read_sectors, buffer.read_bytes) == (-(-n // 32), -(-n // 8), 4 * n)


# --- nvcc compiles every primitive


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_nvcc_compiles_every_primitive(arch, tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        pytest.skip("no nvcc")
    command = [
        nvcc,
        "-std=c++17",
        "-Werror",
        "all-warnings",
        f"-I{emulator.KERNELS}",
        f"-arch=sm_{arch}",
        "-Xptxas",
        "-v",
        "-c",
        str(HERE / "every_primitive.cu"),
        "-o",
        str(tmp_path / "out.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bytes spill" not in done.stderr.replace("0 bytes spill", ""), done.stderr
