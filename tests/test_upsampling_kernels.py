"""The kernels of upsampling: the same cases on the emulator everywhere, and on a GPU if there is one."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import backends
from kernels.upsampling import Emulator, Gpu
from tolerances import assert_close

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
backend = backends(emulator=Emulator, gpu=Gpu)

# Channels (out, in) of the weight. The cases named `small` are for slow sanitizers.
CHANNELS = {
    "small": (16, 24),
    "small-odd": (3, 5),
    "several-tiles": (72, 40),
    "one-channel": (1, 1),
    "odd-side": (8, 9),
}
LAYOUTS = ("nchw", "channels_last")
CASES = [
    pytest.param(channels, dtype, layout, offset, id=f"{name}-{str(dtype)[6:]}-{layout}{'-unaligned' * (offset > 0)}")
    for name, channels in CHANNELS.items()
    for layout in LAYOUTS
    for dtype, offset in ((F32, 0), (BF16, 0), *(((F16, 0), (F16, 1)) if "small" in name else ()))
]


def draw(*shape, dtype=F32, layout="channels_last", offset=0, seed=0):
    """Return a random tensor that starts `offset` elements into its memory."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(dtype)
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    storage = torch.zeros(values.numel() + offset, dtype=dtype)
    return storage.as_strided(values.shape, values.stride(), offset).copy_(values)


def published(x, weight, bias=None):
    return F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)


def folded(weight):
    """The transposed form in float64, one sum after the other."""
    weight, sums = weight.double(), ((0,), (0, 1), (1, 2), (2,))
    out = weight.new_zeros(weight.shape[1], weight.shape[0], 4, 4)
    for row, rows in enumerate(sums):
        for column, columns in enumerate(sums):
            for y in rows:
                for x in columns:
                    out[:, :, 3 - row, 3 - column] += weight[:, :, y, x].T
    return out


def folded_windows(weight):
    """The windows in float64, from the transposed form: the pixel right of a window's centre is that of the next column."""
    out, in_ = weight.shape[:2]
    taps = folded(weight).transpose(0, 1)  # [out][in][4][4]
    windows = taps.new_zeros(2, 2, out, in_, 2, 2)
    for down in (0, 1):
        for right in (0, 1):
            # In a transposed convolution a pixel at an odd position uses taps 2 and 0, one at an even position 3 and 1.
            windows[down, right] = taps[:, :, [2 + down, down]][:, :, :, [2 + right, right]]
    return windows.flatten(0, 2)


@pytest.mark.parametrize("channels, dtype, layout, offset", CASES)
def test_a_fold_is_the_published_convolution(backend, channels, dtype, layout, offset):
    """In float64 both forms equal upsampling and a 3x3 convolution; each kernel's sums equal the exact ones, rounded once."""
    weight = draw(*channels, 3, 3, dtype=dtype, layout=layout, offset=offset)
    x = draw(2, channels[1], 2, 3, dtype=torch.float64)
    transposed, windows = backend.fold(weight), backend.fold(weight, windows=True)
    assert transposed.shape == (channels[1], channels[0], 4, 4) and windows.shape == (4 * channels[0], channels[1], 2, 2)
    assert all(form.is_contiguous(memory_format=torch.channels_last) for form in (transposed, windows))
    assert_close(F.conv_transpose2d(x, folded(weight), stride=2, padding=1), published(x, weight.double()))
    assert_close(transposed, folded(weight), slack=0.5)
    assert_close(windows, folded_windows(weight), slack=0.5)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_sums_are_rounded_once(backend, dtype):
    weight = draw(32, 32, 3, 3, dtype=dtype)
    once = folded(weight.float()).float().to(dtype)  # sums of four 16-bit numbers of one magnitude are exact in float32
    twice = torch.cat([weight[:, :, :1], weight[:, :, :1] + weight[:, :, 1:2]], 2)
    twice = twice[:, :, :, :1] + twice[:, :, :, 1:2]
    assert torch.equal(backend.fold(weight), once)
    assert torch.equal(backend.fold(weight, windows=True), folded_windows(weight.float()).float().to(dtype))
    assert not torch.equal(once[:, :, 2:, 2].transpose(0, 1).flip(2), twice[:, :, :, 0])  # the case can tell the two apart


@pytest.mark.parametrize("channels, dtype, layout, offset", CASES)
def test_the_gradient_of_a_fold(backend, channels, dtype, layout, offset):
    dfolded = draw(channels[1], channels[0], 4, 4, dtype=dtype, offset=offset)
    weight = torch.zeros(*channels, 3, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(folded(weight), weight, dfolded.double())
    dweight = backend.fold_backward(dfolded, layout == "channels_last")
    assert dweight.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    assert_close(dweight, expected, slack=0.5)


# Shapes of x: (batch, channels, height, width).
MAPS = {
    "small": (2, 16, 3, 5),
    "small-odd": (1, 3, 2, 3),
    "one-pixel": (3, 40, 1, 1),
    "one-row": (1, 8, 1, 37),
    "one-column": (1, 8, 37, 1),
    "several-tiles": (1, 72, 4, 20),
    "many-images": (70, 3, 2, 2),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("bias_dtype", [F32, "same", None])
def test_windows_become_the_published_map(backend, name, dtype, bias_dtype):
    """The windows are exact convolutions in float64, rounded to the dtype."""
    batch, channels, height, width = MAPS[name]
    x, weight = draw(batch, 4, height, width, dtype=torch.float64), draw(channels, 4, 3, 3, dtype=torch.float64, seed=1)
    bias = draw(1, channels, 1, 1, dtype=F32, seed=2).flatten()
    bias = None if bias_dtype is None else bias.to(dtype if bias_dtype == "same" else bias_dtype)
    windows = F.conv2d(x, folded_windows(weight), padding=1).to(dtype).contiguous(memory_format=torch.channels_last)
    out = backend.interleave(windows, bias)
    assert out.shape == (batch, channels, 2 * height, 2 * width) and out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, published(x, weight, None if bias is None else bias.double()))


@pytest.mark.parametrize("unaligned", ["windows", "bias"])
def test_unaligned_windows_and_biases(backend, unaligned):
    windows = draw(1, 64, 4, 5, dtype=BF16, offset=int(unaligned == "windows"))
    bias = draw(1, 16, 1, 1, dtype=BF16, offset=int(unaligned == "bias")).flatten()
    assert torch.equal(backend.interleave(windows, bias), backend.interleave(windows.clone(), bias.clone()))


def test_infinities_stay_in_their_pixels(backend):
    windows, bias = draw(1, 64, 4, 5, dtype=BF16), torch.zeros(16)
    windows[0, 16 + 3, 1, 2] = float("inf")  # phase (0, 1) of window (1, 2): pixel (1, 4)
    bias[7] = float("-inf")
    out = backend.interleave(windows, bias)
    expected = torch.ones(out.shape, dtype=torch.bool)
    expected[:, 7] = expected[0, 3, 1, 4] = False
    assert torch.equal(out.isfinite(), expected)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_channels(backend, data):
    backend.seeds = (0,)
    channels = [data.draw(st.integers(1, 90)) for _ in range(2)]
    dtype, layout = data.draw(st.sampled_from([F32, BF16, F16])), data.draw(st.sampled_from(LAYOUTS))
    weight = draw(*channels, 3, 3, dtype=dtype, layout=layout, offset=data.draw(st.integers(0, 1)))
    assert_close(backend.fold(weight), folded(weight), slack=0.5)
    assert_close(backend.fold(weight, windows=True), folded_windows(weight), slack=0.5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_map(backend, data):
    backend.seeds = (0,)
    batch, channels, height, width = (data.draw(st.integers(1, maximum)) for maximum in (3, 80, 9, 70))
    dtype = data.draw(st.sampled_from([F32, BF16]))
    windows = draw(batch, 4 * channels, height + 1, width + 1, dtype=dtype, offset=data.draw(st.integers(0, 1)))
    out = backend.interleave(windows, None)
    phases = windows.unflatten(1, (2, 2, channels))
    for down in (0, 1):
        for right in (0, 1):
            part = phases[:, 1 - down, 1 - right, :, down : down + height, right : right + width]
            assert torch.equal(out[:, :, down::2, right::2], part)


# --- Costs, counted by the emulator


counted = backends(emulator=Emulator)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("windows", [False, True], ids=["transposed", "windows"])
def test_a_fold_reads_each_weight_once_and_writes_each_sum_once(counted, windows, layout, dtype):
    """One launch, 25 values per pair of channels, in accesses of 16 bytes and without bank conflicts."""
    weight = draw(128, 64, 3, 3, dtype=dtype, layout=layout)
    counted.seeds = (0,)
    counted.fold(weight, windows)
    (launch,), buffers = counted.cost.launches, counted.cost.buffers
    assert buffers["weight"].read_bytes == weight.nbytes and buffers["folded"].written_bytes == weight.nbytes * 16 // 9
    assert buffers["folded"].written_sectors * 32 == weight.nbytes * 16 // 9
    shared = 1 if layout == "channels_last" else 2  # in [out][in][3][3] two lanes or accesses share a sector
    assert buffers["weight"].read_sectors * 32 <= shared * weight.nbytes
    assert buffers["weight"].read_requests * 32 * 16 == weight.nbytes
    assert buffers["folded"].write_requests * 32 * 16 == weight.nbytes * 16 // 9
    assert launch.bank_conflicts == 0


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_a_fold_reads_and_writes_once(counted, layout, dtype):
    dfolded = draw(64, 128, 4, 4, dtype=dtype)
    counted.seeds = (0,)
    counted.fold_backward(dfolded, layout == "channels_last")
    (launch,), buffers = counted.cost.launches, counted.cost.buffers
    assert buffers["dfolded"].read_bytes == buffers["dfolded"].read_sectors * 32 == dfolded.nbytes
    assert buffers["dweight"].written_bytes == dfolded.nbytes * 9 // 16
    assert buffers["dfolded"].read_requests * 32 * 16 == dfolded.nbytes
    assert buffers["dweight"].write_requests * 32 * 16 == dfolded.nbytes * 9 // 16
    assert launch.bank_conflicts == 0


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_interleaving_moves_each_pixel_once(counted, dtype):
    """In whole sectors and accesses of 16 bytes; the phases of border windows outside the map are not read."""
    height, width, channels = 24, 64, 128  # two rounds of two accesses per thread
    windows, bias = draw(1, 4 * channels, height + 1, width + 1, dtype=dtype), torch.zeros(channels)
    counted.seeds = (0,)
    counted.interleave(windows, bias)
    size, (launch,) = 4 * height * width * channels * windows.element_size(), counted.cost.launches
    read, out = counted.cost.buffers["pixels"], counted.cost.buffers["out"]
    assert read.read_bytes == read.read_sectors * 32 == out.written_bytes == out.written_sectors * 32 == size
    assert launch.shared_bytes == 0
    threads = math.prod(launch.grid) * 256
    assert counted.cost.buffers["bias"].read_bytes <= threads * 16 * 4 // windows.element_size()  # once per thread
