"""Upsampling and its convolution as one: the methods, which of them runs, and what each costs."""

import published
import pytest
import torch
import torch.nn.functional as F
from models import draw
from pretend_gpu import PretendGpu
from spies import record_calls
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import movq_ext
from movq_ext.ops import cpu_upsampling, cuda, extension, native, paths, registration, self_test, upsampling
from movq_ext.ops.functional import upsample_conv
from movq_ext.ops.paths import explain
from movq_ext.ops.upsampling import METHODS, count_costs, fold_upsampling, fold_window_row, fold_windows, interleave_windows

BF16 = torch.bfloat16
KERNELS = ("fold_upsampling", "fold_upsampling_backward", "interleave_windows", "add_bias_residual_")


def case(channels=8, out_channels=6, grid=(3, 2), dtype=torch.float64):
    """x, weight and bias."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(channels, out_channels, 3).to(dtype)
    x = draw(2, channels, *grid).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, conv.weight.detach(), conv.bias.detach()


def published_upsampling(x, weight, bias):
    return F.conv2d(published.resize(x, 2 * x.shape[2], 2 * x.shape[3]), weight, bias, padding=1)


# --- Formulas


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 2)])
def test_folds_of_an_upsampling(grid):
    x, weight, bias = case(grid=grid)
    expected = published_upsampling(x, weight, bias)
    assert_close(F.conv_transpose2d(x, fold_upsampling(weight), bias, stride=2, padding=1), expected)
    windows = F.conv2d(x, fold_windows(weight), padding=1)
    assert_close(interleave_windows(windows, bias), expected)
    phases = windows.unflatten(1, (2, 2, 6))
    pixels = torch.empty_like(expected)
    for down in (0, 1):
        for right in (0, 1):
            rows, columns = slice(down, down + grid[0]), slice(right, right + grid[1])
            pixels[:, :, down::2, right::2] = phases[:, 1 - down, 1 - right, :, rows, columns]
    assert_close(pixels + bias[:, None, None], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [(5, 3), (64, 8), (150, 4)])
def test_rows_of_windows(channels, dtype):
    """More output channels than are folded at once, and a last part with fewer."""
    out_channels, in_channels = channels
    weight = torch.randn(out_channels, in_channels, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = [fold_window_row(weight, row) for row in (0, 1)]
    assert torch.equal(torch.cat(rows), fold_windows(weight))
    assert all(row.is_contiguous(memory_format=torch.channels_last) for row in rows)


@pytest.mark.parametrize("method", [*METHODS, None])
@pytest.mark.parametrize("has_bias", [True, False])
def test_every_method_is_the_published_formula_with_its_gradients(method, has_bias):
    x, weight, bias = (tensor.requires_grad_() for tensor in case())
    bias = bias if has_bias else None
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    out, expected = upsample_conv(x, weight, bias, method), published_upsampling(x, weight, bias)
    assert_close(out, expected)
    dout = draw(*out.shape)
    for grad, want in zip(*(torch.autograd.grad(y, inputs, dout) for y in (out, expected)), strict=True):
        assert_close(grad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cpu_folds_no_weights_for_few_pixels(monkeypatch, dtype):
    """bfloat16 is multiplied so fast that folding pays later. All images share the folded weights."""
    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS", 12)
    monkeypatch.setattr(upsampling, "MIN_FOLDED_PIXELS_BFLOAT16", 24)
    folded = record_calls(monkeypatch, cpu_upsampling, "fold_upsampling", lambda out, weight: weight.dtype)
    x, weight, bias = case(dtype=dtype)
    for images, height, width in ((1, 1, 11), (2, 2, 3), (1, 1, 23), (4, 3, 2)):
        small = draw(images, x.shape[1], height, width).to(dtype)
        out = upsample_conv(small, weight, bias)
        assert_close(out, published_upsampling(*(tensor.double() for tensor in (small, weight, bias))), slack=2)
    assert len(folded) == (1 if dtype == torch.bfloat16 else 3)


BAD = {
    "rank": (dict(x=torch.zeros(8, 3, 2)), ValueError, r"x must have 4 dimensions .*, got shape \(8, 3, 2\)"),
    "kernel": (dict(weight=torch.zeros(6, 8, 1, 1)), ValueError, r"weight must have shape \(out, 8, 3, 3\), got \(6, 8, 1, 1\)"),
    "channels": (
        dict(weight=torch.zeros(6, 4, 3, 3)),
        ValueError,
        r"weight must have shape \(out, 8, 3, 3\), got \(6, 4, 3, 3\)",
    ),
    "bias": (dict(bias=torch.zeros(8)), ValueError, r"bias must have shape \(6,\), got \(8,\)"),
    "dtype": (
        dict(weight=torch.zeros(6, 8, 3, 3).half()),
        TypeError,
        "weight must have x's dtype torch.float32, got torch.float16",
    ),
    "device": (dict(bias=torch.zeros(6, device="meta")), ValueError, "bias must be on x's device cpu, got meta"),
    "method": (dict(method="fast"), ValueError, "method must be one of transposed, windows, direct, got 'fast'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    change, error, message = BAD[name]
    x, weight, bias = case(dtype=torch.float32)
    with pytest.raises(error, match=message):
        upsample_conv(**{**dict(x=x, weight=weight, bias=bias), **change})


# --- Implementations of the operators for a CPU and for shapes alone


def described(x):
    return x.shape, x.stride(), x.dtype


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cpu_and_fake_implementations(dtype, layout):
    _, weight, bias = case(dtype=dtype)
    weight = weight.contiguous(memory_format=layout)
    exact = weight.double().requires_grad_()
    for windows, fold in ((False, fold_upsampling), (True, fold_windows)):
        folded = registration.fold_upsampling_cpu(weight, windows)
        assert_close(folded, fold(exact), slack=0.5)
        assert folded.is_contiguous(memory_format=torch.channels_last)
        assert described(registration.fold_upsampling_fake(weight, windows)) == described(folded)
    dfolded = draw(8, 6, 4, 4).to(dtype)
    dweight = registration.fold_upsampling_backward_cpu(dfolded, layout == torch.channels_last)
    assert_close(dweight, torch.autograd.grad(fold_upsampling(exact), exact, dfolded.double())[0], slack=0.5)
    assert dweight.is_contiguous(memory_format=layout)
    assert described(registration.fold_upsampling_backward_fake(dfolded, layout == torch.channels_last)) == described(dweight)
    windows = draw(2, 24, 4, 3).to(dtype)
    out = registration.interleave_windows_cpu(windows, bias)
    assert_close(out, interleave_windows(windows.double(), bias.double()))
    assert described(registration.interleave_windows_fake(windows, bias)) == described(out)


# --- On a GPU: CPU implementations stand in for the kernels


class Launches(TorchDispatchMode):
    """Records the operators that launch kernels, and the bytes of the maps and weights that each reads and writes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.record(func.name().partition("::")[2].partition(".")[0], args, out)
        return out

    def record(self, name, args, out):
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor) and x.dim() == 4]
        self.calls.append((name, sum(x.nbytes for x in tensors)))

    def names(self):
        return [name for name, _ in self.calls]

    def bytes(self):
        return sum(size for _, size in self.calls)


@pytest.fixture
def launches(monkeypatch):
    """Plant the CPU implementations as the kernels of a GPU; record launches while the fixture's value is entered."""
    mode = Launches()

    def plant(name):
        def kernel(*arguments):
            with _disable_current_modes():
                out = registration.CPU_IMPLEMENTATIONS[name](*arguments)
            moved = arguments, out
            if name == "interleave_windows":  # reads only the phases inside the map, see test_upsampling_kernels.py
                moved = (out,), out
            elif out is None:  # reads x and writes it
                moved = arguments, arguments[0]
            mode.record(name, *moved)
            return out

        monkeypatch.setattr(torch.ops.movq_ext, name, kernel, raising=False)

    for name in KERNELS:
        plant(name)
    monkeypatch.setattr(self_test, "_results", {})
    monkeypatch.setenv(self_test.VARIABLE, "0")
    monkeypatch.setattr(paths, "device_reason", lambda index: None)
    monkeypatch.setattr(native, "is_inference", lambda *tensors: not torch.is_grad_enabled())
    extension.warn_once.cache_clear()
    return mode


def on_a_gpu(*tensors):
    return [tensor.as_subclass(PretendGpu) for tensor in tensors]


CONVOLVED = {
    "transposed": ["fold_upsampling", "convolution", "add_bias_residual_"],
    "windows": ["fold_upsampling", "convolution", "interleave_windows"],
    "direct": ["upsample_nearest2d", "convolution", "add_bias_residual_"],
}


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_three_launches_and_the_counted_bytes(launches, method):
    x, weight, bias = case(32, 64, (4, 6), BF16)
    expected = published_upsampling(x.double(), weight.double(), bias.double())
    with launches:
        out = upsample_conv(*on_a_gpu(x, weight, bias), method)
    assert launches.names() == CONVOLVED[method]
    assert launches.bytes() == count_costs(x, 64, True, BF16)[method].bytes
    assert_close(out.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("dtype, casts, bytes_per_pair", [(torch.float32, [], 4 * 130), (BF16, ["_to_copy"], 606)])
@torch.no_grad()
def test_folding_without_our_kernel_takes_seven_launches_and_five_times_the_bytes(launches, dtype, casts, bytes_per_pair):
    """In 16 bits it adds in float32 too, between two casts, and moves twelve times the bytes."""
    _, weight, _ = case(32, 64, dtype=dtype)
    with launches:
        cuda.fold_upsampling(weight)
        (_, ours), *_ = launches.calls
        fold_upsampling(*on_a_gpu(weight))
    assert launches.names() == ["fold_upsampling", *casts, *["add", "add", "cat"] * 2, *casts, "clone"]
    assert ours == 25 * 32 * 64 * dtype.itemsize and launches.bytes() - ours == bytes_per_pair * 32 * 64


@pytest.fixture
def autocast_to_bf16(monkeypatch):
    """Casts on the CPU, and tells the operators that the GPU's autocast is on."""
    with torch.autocast("cpu", BF16), monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: True)
        patch.setattr(torch, "get_autocast_dtype", lambda device: BF16)
        yield


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16])
@torch.no_grad()
def test_a_bias_of_any_dtype_is_added_by_a_kernel(launches, autocast_to_bf16, method, dtype):
    x, weight, bias = case(32, 64, (4, 6), torch.float32)
    with launches:
        out = upsample_conv(*on_a_gpu(x, weight, bias.to(dtype)), method)
    assert launches.names()[-1] == CONVOLVED[method][-1]
    assert out.dtype == BF16
    assert_close(out.as_subclass(torch.Tensor), published_upsampling(x.double(), weight.double(), bias.double()), slack=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("x_dtype", [BF16, torch.float32])
@torch.no_grad()
def test_counted_bytes_include_the_casts_of_autocast(launches, autocast_to_bf16, method, x_dtype):
    x, weight, bias = case(32, 64, (4, 6), torch.float32)
    x = x.to(x_dtype)
    with launches:
        upsample_conv(*on_a_gpu(x, weight, bias), method)
    assert launches.bytes() == count_costs(x, 64, True, BF16, torch.float32)[method].bytes


def test_training_folds_by_kernels_both_ways(launches):
    x, weight, bias = case(32, 64, (24, 24), torch.float32)
    weight = weight.contiguous(memory_format=torch.channels_last)
    inputs = [tensor.requires_grad_() for tensor in on_a_gpu(x, weight, bias)]
    exact = [tensor.detach().double().as_subclass(torch.Tensor).requires_grad_() for tensor in inputs]
    with launches:
        out = upsample_conv(*inputs)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    names = launches.names()
    assert names.count("fold_upsampling") == names.count("fold_upsampling_backward") == 1 and "cat" not in names
    expected = published_upsampling(*exact)
    for grad, want in zip(grads, torch.autograd.grad(expected, exact, torch.ones_like(expected)), strict=True):
        assert_close(grad.as_subclass(torch.Tensor), want, slack=4)
    assert grads[1].is_contiguous(memory_format=torch.channels_last)


def test_a_fold_can_be_differentiated_twice(launches):
    weight = case(4, 4)[1].requires_grad_()
    assert torch.autograd.gradgradcheck(cuda.fold_upsampling, weight)


def test_transforms_without_rules_for_kernels_leave_it_to_pytorch(launches):
    x, weight, bias = case(4, 4, (24, 24), torch.float32)

    def run(x, weight):
        return upsample_conv(*on_a_gpu(x, weight, bias))

    with torch.no_grad(), pytest.warns(RuntimeWarning, match="vmap, jvp and forward-mode"):
        batched = torch.func.vmap(run, (0, None))(x[:, None], weight)
    assert_close(batched.as_subclass(torch.Tensor)[:, 0], published_upsampling(x.double(), weight.double(), bias.double()))
    _, tangent = torch.func.jvp(run, (x, weight), (x, weight))
    assert_close(tangent.as_subclass(torch.Tensor), 2 * published_upsampling(x.double(), weight.double(), None), slack=2)


def test_failed_kernels_leave_it_to_pytorch(launches, monkeypatch):
    monkeypatch.setattr(paths, "device_reason", lambda index: "no kernels for this device")
    x, weight, bias = case(32, 64, (24, 24), torch.float32)
    with launches, torch.no_grad(), pytest.warns(RuntimeWarning, match="no kernels for this device"):
        out = upsample_conv(*on_a_gpu(x, weight, bias))
    assert not set(launches.names()) & set(KERNELS)
    assert_close(out.as_subclass(torch.Tensor), published_upsampling(x.double(), weight.double(), bias.double()), slack=2)


# --- The choice


def meta(channels, size, batch=1):
    return torch.empty(batch, channels, size, size, device="meta", dtype=BF16)


# Channels and width of the small map, and GFLOP and MB of each method in 16 bits.
COSTS = {
    (512, 8): dict(transposed=(0.54, 22.3), windows=(0.68, 22.4), direct=(1.21, 6.1)),
    (512, 32): dict(transposed=(8.6, 35.1), windows=(9.1, 35.4), direct=(19.3, 26.7)),
    (512, 64): dict(transposed=(34.4, 76.0), windows=(35.4, 76.5), direct=(77.3, 92.8)),
    (256, 128): dict(transposed=(34.4, 114.4), windows=(34.9, 114.95), direct=(77.3, 177.3)),
}


@pytest.mark.parametrize("channels, size", COSTS)
def test_counted_costs(channels, size):
    costs = count_costs(meta(channels, size), channels, True, BF16)
    for method, (gflop, megabytes) in COSTS[channels, size].items():
        assert costs[method].operations / 1e9 == pytest.approx(gflop, abs=0.051)
        assert costs[method].bytes / 1e6 == pytest.approx(megabytes, abs=0.051)


def chosen(channels, size, batch=1):
    return paths.upsampling_method(meta(channels, size, batch), channels, True, in_inference=True, weight_dtype=BF16)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_rate_of_float32_follows_cudnns_precision(precision):
    """The older flag, allow_tf32, cannot be read once this one was set."""
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, precision
    try:
        cost = count_costs(meta(512, 32), 512, True, torch.float32)["transposed"]
        assert cost.equivalent_bytes(torch.float32) - cost.bytes == cost.operations / (148 if precision == "tf32" else 20)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_small_maps_are_not_folded():
    """Folding costs 64 bytes per pair of channels, and saves 40 operations per pair and pixel besides the large map's reads."""
    assert [chosen(512, size) for size in (8, 16, 19, 20, 32, 128)] == ["direct"] * 3 + ["transposed"] * 3
    assert chosen(512, 8, batch=6) == "transposed" and chosen(512, 8, batch=5) == "direct"
    assert chosen(128, 10) == "direct" and chosen(128, 16) == "transposed"


def test_traced_programs_fold_maps_of_any_size(monkeypatch):
    monkeypatch.setattr(native, "is_tracing", lambda: True)
    assert chosen(512, 8) == "transposed"


def test_explain_says_which_method_runs_and_what_it_costs(launches, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    x = torch.empty(1, 512, 32, 32, dtype=BF16).as_subclass(PretendGpu)
    with torch.no_grad():
        text = explain(x, "upsample_conv")
        with torch.autocast("cpu", BF16):
            under_autocast = explain(x, "upsample_conv")
    costs = "transposed 8.59 GFLOP and 35.1 MB, windows 9.14 GFLOP and 35.4 MB, direct 19.3 GFLOP and 26.7 MB"
    assert text == f"cuda: compiled for H100; method transposed with a weight in bfloat16 ({costs})"
    assert "method transposed with a weight in float32 (transposed 8.59 GFLOP and 73.4 MB" in under_autocast
    assert explain(torch.empty(1, 8, 4, 4), "upsample_conv") == "native: the CUDA kernels do not run on cpu tensors"


def test_an_upsample_layer_takes_the_chosen_method(launches):
    up = movq_ext.Upsample(32, with_conv=True)
    for size, method in ((24, "transposed"), (2, "direct")):
        x = draw(1, 32, size, size).float()
        launches.calls.clear()
        with torch.no_grad():
            expected = up(x)
            with launches:
                out = up(x.as_subclass(PretendGpu))
        assert launches.names() == CONVOLVED[method]
        assert_close(out.as_subclass(torch.Tensor), expected.double(), slack=2)
