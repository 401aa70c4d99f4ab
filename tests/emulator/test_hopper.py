"""Tests of the emulator's Hopper instructions: wgmma, TMA, mbarriers, named barriers and setmaxnreg."""

import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import emulator
from emulator import EmulatorError

pytestmark = pytest.mark.skipif(not emulator.available(), reason="needs Linux and a host C++ compiler")

HERE = Path(__file__).parent / "kernels"


@pytest.fixture(scope="module")
def planted():
    return emulator.build(HERE / "hopper_planted.cu")


@pytest.fixture(scope="module")
def sound():
    return emulator.build(HERE / "hopper_sound.cu")


def values(*shape, seed=0):
    """Return small integers as float16, whose products are exact."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float16)


# --- Planted bugs: (kernel, the value of `bug`, a pattern that the report must match)

BUGS = [
    ("products", 1, r"shared byte \d+, which wgmma reads, was stored by .* with no fence.proxy.async before the barrier"),
    ("products", 2, "no fence.proxy.async before the barrier"),
    ("products", 3, "wgmma.fence is missing"),
    ("products", 4, "a wgmma is in flight at the end: its wait is missing"),
    ("products", 5, "a wgmma is in flight at the end"),
    ("products", 6, "sums of a wgmma in flight were written"),
    ("products", 7, "race: shared byte 0 is written here and read by a wgmma of warpgroup 0, which is still in flight"),
    ("products", 8, "wgmma descriptor: byte 128 is not in the first row of a swizzle pattern of 1024 bytes"),
    ("products", 9, "the threads of the warpgroup pass different descriptors"),
    ("products", 10, "divergent warpgroup: wgmma.* needs a thread that has returned|deadlock: .* threads wait at wgmma"),
    ("products", 12, "no fence.proxy.async before the barrier"),
    ("fragments", 1, "registers of a were written after the wgmma.fence"),
    ("fragments", 2, "registers of d were written after the wgmma.fence"),
    ("fragments", 3, "wgmma.fence is missing, or does not name the registers of d"),
    ("fragments", 4, "wgmma.fence is missing, or does not name the registers of a"),
    ("fragments", 5, "registers of a of a wgmma in flight were written"),
    ("fragments", 6, "completes a wgmma, but does not name its registers of a"),
    ("fragments", 7, "completes a wgmma, but does not name its registers of d"),
    ("pipeline", 1, "to which a TMA copy by the mbarrier .* is still in flight|unwritten|race: shared byte"),
    ("pipeline", 2, "to which a TMA copy by the mbarrier at byte 16384 is still in flight|race: shared byte|deadlock"),
    ("pipeline", 3, "deadlock: .* threads? waits? at the mbarrier at byte 16384, parity 0"),
    ("pipeline", 4, "more arrivals than|race: shared byte .* written here and read by a wgmma|TMA copy is still in flight"),
    ("pipeline", 5, "race: shared byte .* is written here and read by a wgmma of warpgroup 1"),
    ("pipeline", 6, "no fence.proxy.async follows the initialisation of the mbarrier"),
    ("pipeline", 7, "no barrier follows the initialisation of the mbarrier|no initialised mbarrier"),
    ("pipeline", 8, "deadlock: .*the mbarrier at byte 16400, parity 0"),
    ("pipeline", 9, "more arrivals than it expects|race: shared byte|deadlock"),
    ("pipeline", 10, "misaligned shared TMA write"),
    ("pipeline", 11, "no thread waited for a TMA copy that completes on the mbarrier at byte 16392"),
    ("pipeline", 12, "deadlock|race: shared byte|still in flight"),
    ("pipeline", 13, "to which a TMA copy by the mbarrier .* is still in flight|unwritten|race: shared byte"),
    ("pipeline", 14, r"shared byte 20\d, which a TMA copy overwrites, was stored by .* with no fence.proxy.async"),
    ("pipeline", 15, "write to shared byte 16384, which belongs to the mbarrier at byte 16384"),
    ("pipeline", 16, "write to shared byte 16384, which belongs to the mbarrier at byte 16384"),
    ("pipeline", 17, "shared memory: elements 2048 to 6143 are out of bounds of a view of 4096"),
    ("pipeline", 18, "shared memory: elements 56 to 4103 are out of bounds of a view of 4096"),
    ("multicast", 1, "race: shared byte|TMA copy is still in flight"),
    ("multicast", 2, "to which a TMA copy by the mbarrier .* is still in flight|unwritten|race: shared byte|deadlock"),
    ("multicast", 3, "no barrier follows the initialisation of the mbarrier|no initialised mbarrier"),
    ("multicast", 4, "deadlock: .* at the mbarrier at byte 16384, parity 0"),
    ("multicast", 5, "a cluster of 2 has no block 2"),
    ("multicast", 6, "while another block of its cluster may still use|after that block has begun to end"),
    ("multicast", 7, "to which a TMA copy is still in flight|race: shared byte|deadlock"),
    ("phases", 1, "race: shared byte|unwritten shared memory"),
    ("roles", 1, "deadlock: .* setmaxnreg.inc, for registers that no warpgroup has returned"),
    ("roles", 2, "setmaxnreg from 168 to 160 is not an increase"),
    ("roles", 3, "deadlock: 128 threads wait at named barrier 1"),
    ("roles", 4, "named barrier 1 is of .* threads here and of"),
    ("roles", 5, "race: shared byte|unwritten shared memory"),
    ("roles", 6, "divergent warpgroup|deadlock: 64 threads wait at setmaxnreg.dec"),
    ("roles", 7, "race: shared byte|unwritten shared memory"),
    ("roles", 8, "divergent warp: this lane is at .*named barrier 1, others of its mask are at .*named barrier 1"),
]
A, B, TILES = values(64, 64), values(64, 64, seed=1), values(5 * 64, 64, seed=2)
ARGUMENTS = {
    "products": dict(a=A, b=B),
    "fragments": dict(a=A, b=B),
    "pipeline": dict(x=TILES, tiles=5),
    "multicast": dict(x=TILES, tiles=5),
    "phases": {},
    "roles": {},
}


def expected(kernel):
    if kernel in ("products", "fragments"):
        return A.astype(np.float64) @ B.astype(np.float64).T
    if kernel in ("pipeline", "multicast"):
        sums = sum(tile @ tile.T for tile in TILES.astype(np.float64).reshape(5, 64, 64))
        return sums if kernel == "pipeline" else np.stack([sums, sums])
    return np.ones(1) if kernel == "phases" else (np.arange(128.0) + 1) % 128


@pytest.mark.parametrize("kernel", ARGUMENTS)
def test_the_kernels_without_a_bug_are_right(planted, kernel):
    wanted = expected(kernel)
    d = emulator.empty(wanted.shape)
    planted.call(kernel, **ARGUMENTS[kernel], d=d, bug=0, seeds=range(6))
    np.testing.assert_array_equal(d, wanted)


@pytest.mark.parametrize("kernel, bug, report", BUGS, ids=[f"{kernel}-{bug}" for kernel, bug, _ in BUGS])
def test_a_planted_bug_is_reported_on_every_schedule(planted, kernel, bug, report):
    for seed in range(4):
        with pytest.raises(EmulatorError, match=report):
            planted.call(kernel, **ARGUMENTS[kernel], d=emulator.empty(2 * 64 * 64), bug=bug, seeds=(seed,))


def test_sums_that_are_read_in_flight_are_nan(planted):
    d = emulator.empty((64, 64))
    planted.call("products", **ARGUMENTS["products"], d=d, bug=11, seeds=range(4))
    assert np.isnan(d).all()


def test_exchanged_registers_of_a_give_a_wrong_product(planted):
    d = emulator.empty((64, 64))
    planted.call("fragments", **ARGUMENTS["fragments"], d=d, bug=8, seeds=(0,))
    assert (d != expected("fragments")).mean() > 0.9


def test_a_multicast_box_is_read_once_from_global_memory(planted):
    """Each of the two blocks receives every tile, and its half of the reads is half of the bytes."""
    result = planted.call("multicast", **ARGUMENTS["multicast"], d=emulator.empty((2, 64, 64)), bug=0, seeds=(0,))
    (launch,) = result.launches
    assert result.buffers["x"].read_bytes == TILES.nbytes
    assert (launch.tma, launch.tma_bytes) == (2 * 5, 2 * TILES.nbytes)


# --- wgmma: operands laid out by the canonical layouts of the PTX ISA ("Strides", "Canonical Layouts"), which are functions of
# 16-byte units: a shape and a stride for each dimension. T is 8, the elements of 16 bytes.

SWIZZLE_CODES = {16: 0, 32: 3, 64: 2, 128: 1}  # bits 62-63 of the descriptor, by the bytes of a row


def canonical_layout(row_bytes, mn_major, leading, stride):
    """Return the shapes and strides in bytes of dimensions MN and K, the fastest first."""
    units = row_bytes // 16
    if mn_major:
        shape = ((8, units, 256), (8, 2))
        if row_bytes == 16:
            return shape, ((2, 16, stride), (16, leading))  # units is 1
        return shape, ((2, 16, leading), (row_bytes, stride))
    return ((8, 256), (8, 2)), ((row_bytes, stride), (2, leading if row_bytes == 16 else 16))


def offsets(count, shape, strides):
    """Return the byte offset of each of `count` indices, whose digits in the mixed base `shape` count `strides`."""
    result, index = np.zeros(count, np.int64), np.arange(count)
    for base, step in zip(shape, strides, strict=True):
        result, index = result + index % base * step, index // base
    return result


def lay_out(image, start, matrix, row_bytes, mn_major, leading, stride):
    """Write matrix[mn][k] into the image of shared memory; return the descriptor."""
    (mn_shape, k_shape), (mn_strides, k_strides) = canonical_layout(row_bytes, mn_major, leading, stride)
    at = start + offsets(matrix.shape[0], mn_shape, mn_strides)[:, None] + offsets(matrix.shape[1], k_shape, k_strides)
    mask = {16: 0, 32: 1, 64: 3, 128: 7}[row_bytes]
    swizzled = at ^ ((at // 128) & mask) * 16
    image.view(np.uint16)[swizzled // 2] = matrix.view(np.uint16)
    assert len(np.unique(swizzled)) == matrix.size
    return start // 16 | leading // 16 << 16 | stride // 16 << 32 | SWIZZLE_CODES[row_bytes] << 62


def signed(descriptor):
    return descriptor - (1 << 64) if descriptor >> 63 else descriptor


LAYOUTS = [
    # bytes of a row, MN-major, leading and stride byte offset as functions of N
    pytest.param(128, False, lambda n: 16, lambda n: 1024, id="K-major-128B"),
    pytest.param(64, False, lambda n: 16, lambda n: 512, id="K-major-64B"),
    pytest.param(32, False, lambda n: 16, lambda n: 256, id="K-major-32B"),
    pytest.param(16, False, lambda n: n * 16, lambda n: 128, id="K-major-none"),
    pytest.param(128, True, lambda n: 4096, lambda n: 1024, id="MN-major-128B"),
    pytest.param(64, True, lambda n: 1024, lambda n: 512, id="MN-major-64B"),
    pytest.param(32, True, lambda n: 512, lambda n: 256, id="MN-major-32B"),
    pytest.param(16, True, lambda n: n * 16, lambda n: 128, id="MN-major-none"),
]


@pytest.mark.parametrize("row_bytes, mn_major, leading, stride", LAYOUTS)
@pytest.mark.parametrize("n", [64, 256])
def test_wgmma_reads_every_canonical_layout(sound, n, row_bytes, mn_major, leading, stride):
    if mn_major and row_bytes == 128 and n == 256:
        leading, stride = (lambda n: 2048), (lambda n: 1024)
    a, b = values(64, 16, seed=n), values(n, 16, seed=n + 1)
    image = np.full(40960, 0xFF, np.uint8)
    a_descriptor = lay_out(image, 0, a, 128, False, 16, 1024)
    b_descriptor = lay_out(image, 8192, b, row_bytes, mn_major, leading(n), stride(n))
    d = emulator.empty((64, n))
    given = dict(image=image, chunks=image.size // 16, a=a_descriptor, b=signed(b_descriptor), b_mn_major=mn_major, n=n, d=d)
    result = sound.call("product", **given, a_rows=None, half=True)
    np.testing.assert_array_equal(d, a.astype(np.float64) @ b.astype(np.float64).T)
    (launch,) = result.launches
    assert (launch.wgmma, launch.wgmma_flops, launch.wgmma_shared_bytes) == (1, 2 * 64 * n * 16, (64 + n) * 32)
    d[:] = np.nan
    launch = sound.call("product", **given, a_rows=a, half=True).launches[0]  # a in registers
    np.testing.assert_array_equal(d, a.astype(np.float64) @ b.astype(np.float64).T)
    assert launch.wgmma_shared_bytes == n * 32


@pytest.mark.parametrize("n, k", list(product([32, 64, 128, 256], [0, 3])))
def test_wgmma_of_bfloats_with_k_inside_the_swizzled_row(sound, n, k):
    """The descriptor of columns 16 k to 16 k + 15 of a 64-column tile starts 32 k bytes into the row."""

    def bfloats(x):
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    a, b = values(64, 64, seed=n), values(n, 64, seed=k)
    image = np.full(64 * 128 + n * 128, 0xFF, np.uint8)
    columns = np.arange(64)
    for start, matrix in ((0, a), (8192, b)):
        rows = np.arange(len(matrix))[:, None]
        at = start + rows * 128 + (columns // 8 ^ rows % 8) * 16 + columns % 8 * 2
        image.view(np.uint16)[at // 2] = bfloats(matrix)
    descriptor = 1 << 62 | 1024 // 16 << 32 | 1 << 16
    d = emulator.empty((64, n))
    sound.call("product", image=image, chunks=image.size // 16, a=descriptor | 2 * k, b=descriptor | 8192 // 16 + 2 * k,
               b_mn_major=False, n=n, d=d, a_rows=None, half=False)  # fmt: skip
    part = slice(16 * k, 16 * k + 16)
    np.testing.assert_array_equal(d, a[:, part].astype(np.float64) @ b[:, part].astype(np.float64).T)


FIELDS = {  # of b's descriptor: what to change
    "start": lambda d: d + 32 // 16,
    "leading": lambda d: d ^ (4096 ^ 2048) // 16 << 16,
    "stride": lambda d: d ^ (1024 ^ 512) // 16 << 32,
    "swizzle": lambda d: d ^ (SWIZZLE_CODES[128] ^ SWIZZLE_CODES[64]) << 62,
}


# K-major operands with a swizzle do not use the leading byte offset.
@pytest.mark.parametrize("field, mn_major", [(f, m) for f, m in product(FIELDS, [False, True]) if m or f != "leading"])
def test_a_wrong_field_of_a_descriptor_gives_a_wrong_product(sound, field, mn_major):
    a, b = values(64, 16), values(128, 16, seed=1)
    image = np.zeros(32768, np.uint8)
    given = dict(image=image, chunks=image.size // 16, b_mn_major=mn_major, n=128, a_rows=None, half=True, seeds=(0,))
    a_descriptor = lay_out(image, 0, a, 128, False, 16, 1024)
    b_descriptor = lay_out(image, 8192, b, 128, mn_major, 4096 if mn_major else 16, 1024)
    errors = []
    for descriptor in (b_descriptor, FIELDS[field](b_descriptor)):
        d = emulator.empty((64, 128))
        sound.call("product", **given, a=a_descriptor, b=signed(descriptor), d=d)
        errors.append(np.abs(d - a.astype(np.float64) @ b.astype(np.float64).T).max())
    assert errors[0] == 0 and errors[1] > 1


# --- TMA


@pytest.mark.parametrize("start", [(0, 0, 0, 0), (64, 3, 1, 1), (96, 8, 0, 1), (-32, -3, -1, 0), (0, 0, 2, 0), (200, 100, 0, 0)])
def test_a_box_is_swizzled_and_zero_beyond_the_tensor(sound, start):
    x = values(2, 2, 11, 104)  # padded rows: strides differ from sizes
    sizes, rows, planes = (96, 10, 2, 2), 8, 2
    y = emulator.empty((planes * rows, 64), np.float16)
    steps = {f"t{i}": x.strides[3 - i] for i in (1, 2, 3)}
    c = {f"c{i}": first for i, first in enumerate(start)}
    s = {f"s{i}": size for i, size in enumerate(sizes)}
    result = sound.call("box", x=x, **s, **steps, rows=rows, planes=planes, **c, y=y.view(np.uint32))
    wanted = np.zeros((planes, rows, 64), np.float16)
    for plane, row, column in np.ndindex(wanted.shape):
        at = (start[0] + column, start[1] + row, start[2] + plane, start[3])
        if all(0 <= i < size for i, size in zip(at, sizes, strict=True)):
            wanted[plane, row, column] = x[at[::-1]]
    inside = [len(range(max(0, first), min(size, first + extent)))
              for first, size, extent in zip(start, sizes, (64, rows, planes, 1), strict=True)]  # fmt: skip
    flat = np.arange(planes * rows)[:, None]
    chunks = np.arange(64) // 8 ^ flat % 8
    np.testing.assert_array_equal(y[flat, chunks * 8 + np.arange(64) % 8], wanted.reshape(-1, 64))
    (launch,) = result.launches
    assert (launch.tma, launch.tma_bytes) == (1, planes * rows * 128)
    assert launch.read_bytes == result.buffers["x"].read_bytes == 2 * np.prod(inside)


@pytest.mark.parametrize(
    "change, report",
    [
        (dict(rows=257), "a box of 1 to 256"),
        (dict(t1=200), "multiples of 16 bytes"),
        (dict(s2=0), "sizes from 1"),
        (dict(c0=1), "to start at a multiple of 16 bytes of a row"),
    ],
)
def test_invalid_tensor_maps_and_boxes_are_reported(sound, change, report):
    given = dict(s0=64, s1=8, s2=1, s3=1, t1=128, t2=1024, t3=1024, rows=8, planes=1, c0=0, c1=0, c2=0, c3=0)
    x, y = values(8, 64), emulator.empty((8, 32), np.uint32)
    sound.call("box", **given, x=x, y=y)
    with pytest.raises(EmulatorError, match=report):
        sound.call("box", **{**given, **change}, x=x, y=y)


def test_a_box_outside_the_allocation_is_reported(sound):
    x, y = values(8, 64), emulator.empty((8, 32), np.uint32)
    with pytest.raises(EmulatorError, match="global read of 16 bytes out of bounds: at byte 1024 of 'x'"):
        sound.call("box", x=x, y=y, s0=64, s1=9, s2=1, s3=1, t1=128, t2=1152, t3=1152, rows=9, planes=1, c0=0, c1=0, c2=0, c3=0)


# --- nvcc compiles every primitive


@pytest.fixture
def nvcc():
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return found or pytest.skip("no nvcc")


@pytest.mark.parametrize("code", ["compute_90a,code=sm_90a", "compute_90,code=sm_90", "compute_80,code=sm_80"])
def test_nvcc_compiles_every_hopper_primitive(nvcc, code, tmp_path):
    command = [nvcc, "-std=c++17", "-Werror", "all-warnings", f"-I{emulator.KERNELS}", f"-gencode=arch={code}", "-Xptxas", "-v",
               "-c", str(HERE / "every_hopper_primitive.cu"), "-o", str(tmp_path / "out.o")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bytes spill" not in done.stderr.replace("0 bytes spill", ""), done.stderr
    for loss in ("serialized", "setmaxnreg", "Potential Performance Loss"):
        assert loss not in done.stderr, done.stderr


def test_the_compiler_writes_no_register_of_wgmma_after_its_fence(nvcc):
    command = [nvcc, "-std=c++17", f"-I{emulator.KERNELS}", "-arch=compute_90a", "-ptx", str(HERE / "every_hopper_primitive.cu")]
    ptx = subprocess.run([*command, "-o", "-"], capture_output=True, text=True, check=True).stdout
    groups = re.findall(r"wgmma\.fence\.sync\.aligned;(.*?)wgmma\.commit_group", ptx, re.S)
    assert len(groups) == 2 * 4
    for group in groups:
        used = set(re.findall(r"%\w+", "".join(re.findall(r"wgmma\.mma_async[^{]*(\{[^}]*\}[^}]*);", group))))
        written = set(re.findall(r"^\s*(?:@\S+ )?(?!wgmma)[a-z][\w.]*\s+(%[fr]\d+),", group, re.M))
        assert not (moved := sorted(used & written)), f"{moved} are written after the fence:\n{group}"
