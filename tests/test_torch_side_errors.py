"""The torch side of the operators with loops in place of the kernels: errors, devices, and the probe of a device."""

import emulator
import pytest
import torch
import torch_side
from operators import GROUPS, attention_arguments, detached, epilogue_arguments, norm_arguments
from torch_side import operators

pytestmark = pytest.mark.skipif(not emulator.available(), reason="needs Linux and a host C++ compiler")

EPS = 1e-6


@pytest.fixture(scope="module", autouse=True)
def fake():
    """The fake CUDA runtime, once the operators exist."""
    return torch_side.build()[1]


@pytest.fixture
def module():
    return torch_side.build()[0]


def norm(**changes):
    """Return the arguments of a norm with some of them changed."""
    inputs, dout = norm_arguments(torch.float16)
    given = dict(zip(("f", "zq_y", "zq_b", "weight", "bias"), detached(inputs), strict=True))
    mean, rstd = (torch.zeros(2, GROUPS) for _ in range(2))
    return {"dout": dout, **given, "mean": mean, "rstd": rstd, "groups": GROUPS, "eps": EPS, "silu": True, **changes}


NORM_ERRORS = {
    "f must have 4 dimensions and not be empty, got shape [3]": {"f": torch.zeros(3)},
    "f must have 4 dimensions and not be empty, got shape [0, 32, 8, 12]": {"f": torch.zeros(0, 32, 8, 12)},
    "f must be float32, float16 or bfloat16, got Double": {"f": torch.zeros(2, 32, 8, 12).double()},
    "f must have fewer than 2^31 channels and at most 2147418111 pixels, got shape [1, 8, 65536, 65536]": {
        "f": torch.zeros(()).expand(1, 8, 1 << 16, 1 << 16)
    },
    "groups must be a positive divisor of f's channels, got groups=5 for 32 channels": {"groups": 5},
    "groups must be a positive divisor of f's channels, got groups=0 for 32 channels": {"groups": 0},
    "zq_y and zq_b must be given together or not at all, got only zq_b": {"zq_y": None},
    "zq_y must have 4 dimensions and not be empty, got shape [2, 32, 4]": {"zq_y": torch.zeros(2, 32, 4).half()},
    "zq_y must have f's batch and channels (2, 32), got shape [2, 31, 2, 4]": {"zq_y": torch.zeros(2, 31, 2, 4).half()},
    "zq_y must have f's dtype Half, got Float": {"zq_y": torch.zeros(2, 32, 2, 4)},
    "zq_y and zq_b must have the same shape, got [2, 32, 2, 4] and [2, 32, 2, 2]": {"zq_b": torch.zeros(2, 32, 2, 2).half()},
    "weight must have shape (32,), got [31]": {"weight": torch.zeros(31)},
    "weight must be float32 or have f's dtype Half, got Double": {"weight": torch.zeros(32).double()},
    "bias must have weight's dtype Float, got Half": {"bias": torch.zeros(32).half()},
}


@pytest.mark.parametrize("message", NORM_ERRORS)
def test_errors_of_spatial_norm(message):
    for name, omitted in (("forward", {"dout", "mean", "rstd"}), ("backward", {"eps"})):
        arguments = {key: value for key, value in norm(**NORM_ERRORS[message]).items() if key not in omitted}
        with pytest.raises(ValueError) as caught:
            getattr(operators, f"spatial_norm_{name}")(**arguments)
        assert str(caught.value) == message


BACKWARD_ERRORS = {
    "dout must have f's shape [2, 32, 8, 12], got [2, 32, 8, 1]": {"dout": torch.zeros(2, 32, 8, 1).half()},
    "dout must have f's dtype Half, got Float": {"dout": torch.zeros(2, 32, 8, 12)},
    "mean must have the shape (2, 8) that forward returned, got [2, 4]": {"mean": torch.zeros(2, 4)},
    "rstd must be float32, got Half": {"rstd": torch.zeros(2, 8).half()},
    "rstd must be contiguous, got strides [1, 2]": {"rstd": torch.zeros(8, 2).T},
}


@pytest.mark.parametrize("message", BACKWARD_ERRORS)
def test_errors_of_the_backward_of_spatial_norm(message):
    arguments = norm(**BACKWARD_ERRORS[message])
    del arguments["eps"]
    with pytest.raises(ValueError) as caught:
        operators.spatial_norm_backward(**arguments)
    assert str(caught.value) == message


def test_errors_of_forward_only_arguments():
    arguments = norm()
    for name in ("dout", "mean", "rstd"):
        del arguments[name]
    with pytest.raises(ValueError, match=r"f_bias must have shape \(32,\), got \[3\]"):
        operators.spatial_norm_forward(**arguments, f_bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"bordered zq_y must have three rows .* 8 x 12 pixels, got shape \[2, 32, 2, 4\]"):
        operators.spatial_norm_forward(**arguments, bordered=True)
    arguments |= {"zq_y": None, "zq_b": None}
    with pytest.raises(ValueError, match=r"bordered zq_y .* got shape none"):
        operators.spatial_norm_forward(**arguments, bordered=True)


def test_errors_of_clips():
    f, zq = torch.zeros(2, 32, 8, 12), torch.zeros(2, 32, 2, 4)
    arguments = dict(f=f, zq_y=zq, zq_b=zq, weight=None, bias=None, groups=GROUPS, eps=EPS, silu=True)
    with pytest.raises(ValueError, match="frames must be a positive divisor of f's 8 rows, got 3"):
        operators.spatial_norm_forward(**arguments, frames=3)
    with pytest.raises(ValueError, match="latent_frames must be a positive divisor of zq_y's 2 rows, got 0"):
        operators.spatial_norm_forward(**arguments, latent_frames=0)
    with pytest.raises(ValueError, match="bordered zq_y must be an image, got frames=2 and latent_frames=1"):
        operators.spatial_norm_forward(**arguments, bordered=True, frames=2)


OUT_ERRORS = {
    "out must have f's shape [2, 32, 8, 12], got [2, 32, 9, 12]": torch.zeros(2, 32, 9, 12),
    "out must have f's dtype Float, got Half": torch.zeros(2, 32, 8, 12).half(),
    "out must have f's layout, NCHW, with adjacent rows, got strides [3072, 1, 384, 32] for shape [2, 32, 8, 12]": torch.zeros(
        2, 32, 8, 12
    ).contiguous(memory_format=torch.channels_last),
    "out must have f's layout, NCHW, with adjacent rows, got strides [6144, 192, 24, 2] for shape [2, 32, 8, 12]": torch.zeros(
        2, 32, 8, 24
    )[..., ::2],
    "out must have f's layout, NCHW, with adjacent rows, got strides [0, 96, 12, 1] for shape [2, 32, 8, 12]": torch.zeros(
        1, 32, 8, 12
    ).expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("message", OUT_ERRORS)
def test_errors_of_the_memory_for_a_norm(message):
    with pytest.raises(ValueError) as caught:
        operators.spatial_norm_into(OUT_ERRORS[message], torch.zeros(2, 32, 8, 12), None, None, None, None, GROUPS, EPS, True)
    assert str(caught.value) == message


def test_f_may_not_overlap_the_memory_for_its_norm():
    storage = torch.zeros(33 * 96)
    f, out = storage[: 32 * 96].view(1, 32, 8, 12), storage[96:].view(1, 32, 8, 12)
    with pytest.raises(ValueError, match="f must be out itself or not overlap it, got one that starts -384 bytes after out"):
        operators.spatial_norm_into(out, f, None, None, None, None, GROUPS, EPS, True)


ATTENTION_ERRORS = {
    "q must have 4 dimensions (batch, heads, tokens, head size) and not be empty, got shape [3]": {"q": torch.zeros(3)},
    "q must have a head size of at most 512, got 520": {"q": torch.zeros(2, 3, 10, 520)},
    "k must have q's batch, heads and head size [2, 3, 10, 32], got [2, 3, 14, 16]": {"k": torch.zeros(2, 3, 14, 16)},
    "k must have q's dtype Float, got Half": {"k": torch.zeros(2, 3, 14, 32).half()},
    "k and v must have the same number of tokens, got 14 and 13": {"v": torch.zeros(2, 3, 13, 32)},
    "q must be float32, float16 or bfloat16, got Double": {
        "q": torch.zeros(2, 3, 10, 32).double(), "k": torch.zeros(2, 3, 14, 32).double(), "v": torch.zeros(2, 3, 14, 32).double(),
    },
    "dout must have q's shape [2, 3, 10, 32], got [2, 3, 11, 32]": {"dout": torch.zeros(2, 3, 11, 32)},
    "out must have q's dtype Float, got Half": {"out": torch.zeros(2, 3, 10, 32).half()},
    "lse must have q's batch, heads and tokens [2, 3, 10], got shape [2, 3, 9]": {"lse": torch.zeros(2, 3, 9)},
    "lse must be contiguous, got strides [30, 1, 3]": {"lse": torch.zeros(2, 10, 3).mT},
    "lse must be float32, got Double": {"lse": torch.zeros(2, 3, 10).double()},
}  # fmt: skip


@pytest.mark.parametrize("message", ATTENTION_ERRORS)
def test_errors_of_attention(message):
    inputs, dout = attention_arguments()
    given = dict(zip("qkv", detached(inputs), strict=True)) | {"dout": dout, "out": dout, "lse": torch.zeros(2, 3, 10)}
    changes = ATTENTION_ERRORS[message]
    with pytest.raises(ValueError) as caught:
        operators.attention_backward(**(given | changes), scale=0.2)
    assert str(caught.value) == message
    if set(changes) <= set("qkv"):
        with pytest.raises(ValueError) as caught:
            operators.attention_forward(**{name: (given | changes)[name] for name in "qkv"}, scale=0.2)
        assert str(caught.value) == message


def test_errors_of_the_epilogue():
    x, bias = torch.zeros(2, 3, 4, 5), torch.zeros(3)
    for message, arguments in {
        "x must have 4 dimensions and not be empty, got shape [3]": (bias, bias, None),
        "x must be dense in NCHW or channels_last, got strides [120, 40, 10, 2] for shape [2, 3, 4, 5]": (
            torch.zeros(2, 3, 4, 10)[..., ::2], bias, None,
        ),
        "bias or residual must be given, got neither": (x, None, None),
        "bias must have shape (3,), got [4]": (x, torch.zeros(4), None),
        "residual must have x's shape [2, 3, 4, 5], got [2, 3, 4, 4]": (x, None, torch.zeros(2, 3, 4, 4)),
        "residual must have x's dtype Float, got Half": (x, None, x.half()),
    }.items():  # fmt: skip
        with pytest.raises(ValueError) as caught:
            operators.add_bias_residual_(*arguments)
        assert str(caught.value) == message


def test_errors_of_statistics():
    x, bias, windows = torch.zeros(2, 6, 4, 5), torch.zeros(6), torch.zeros(1, 8, 2, 2)
    statistics = torch.zeros(2, 3, 7, 4)
    norm = x, None, None, None, None, 3, EPS, False
    for message, operator, arguments in [
        ("groups must be a positive divisor of x's channels, got groups=4 for 6 channels", "add_bias_residual_statistics_",
         (x, bias, None, 4, 8)),
        ("chunk_pixels must be positive, got 0", "add_bias_residual_statistics_", (x, bias, None, 3, 0)),
        ("groups must be a positive divisor of the upsampled map's channels, got groups=0 for 2 channels",
         "interleave_windows_statistics", (windows, None, 0, 8)),
        ("chunk_columns must be positive, got -1", "interleave_windows_statistics", (windows, None, 2, -1)),
        ("statistics must have shape (2, 3, parts, 4), got [2, 2, 7, 4]", "spatial_norm_forward",
         (*norm, None, False, statistics[:, :2])),
        ("statistics must be contiguous, got strides [84, 28, 1, 7]", "spatial_norm_forward",
         (*norm, None, False, torch.zeros(2, 3, 4, 7).mT)),
        ("statistics must be float32, got Double", "spatial_norm_forward", (*norm, None, False, statistics.double())),
        ("statistics must be aligned to 16 bytes, got an address that is 4 modulo 16", "spatial_norm_forward",
         (*norm, None, False, torch.zeros(2 * 3 * 7 * 4 + 1)[1:].view(2, 3, 7, 4))),
        ("statistics must not be given with f_bias: they are those of f alone", "spatial_norm_forward",
         (*norm, bias, False, statistics)),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as caught:
            getattr(operators, operator)(*arguments)
        assert str(caught.value) == message


def test_errors_of_upsampling():
    weight, windows = torch.zeros(2, 3, 3, 3), torch.zeros(1, 8, 2, 2)
    for message, operator, arguments in [
        ("weight must have shape (out, in, 3, 3), got [2, 3, 3, 4]", "fold_upsampling", (torch.zeros(2, 3, 3, 4),)),
        ("weight must be float32, float16 or bfloat16, got Double", "fold_upsampling", (weight.double(),)),
        ("dfolded must have shape (in, out, 4, 4), got [2, 3, 3, 3]", "fold_upsampling_backward", (weight, False)),
        (
            "windows must have shape (batch, 4 * channels, height + 1, width + 1) and not be empty, got [1, 8, 1, 2]",
            "interleave_windows", (windows[:, :, 1:], None),
        ),
        ("bias must have shape (2,), got [8]", "interleave_windows", (windows, torch.zeros(8))),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as caught:
            getattr(operators, operator)(*arguments)
        assert str(caught.value) == message


def test_running_out_of_memory_is_a_memory_error_with_figures(fake):
    """The stable ABI loses the type of PyTorch's own exception."""
    huge = torch.zeros(()).expand(1, 1 << 20, 1, 1 << 30)  # must be copied
    figures = f"Tried to allocate {4 << 50} bytes; 1000 of 5000 bytes are free on the GPU."
    with pytest.raises(MemoryError) as caught:
        operators.spatial_norm_forward(huge, None, None, None, None, 1, EPS, False)
    assert str(caught.value) == f"CUDA out of memory. {figures}"
    fake.set_kernel_failed(True)  # whose error is what the allocator reports
    try:
        with pytest.raises(RuntimeError, match="CUDA error: an illegal memory access was encountered"):
            operators.spatial_norm_forward(huge, None, None, None, None, 1, EPS, False)
    finally:
        fake.set_kernel_failed(False)


# --- Devices


def test_every_operator_makes_its_device_current(fake):
    """The launchers check that a guard exists and which stream they get; the guard is for the tensor's device."""
    fake.take_events()
    x, bias, _ = epilogue_arguments()
    operators.add_bias_residual_(x, bias, None)
    assert fake.take_events().split() == [f"guard({x.get_device()})".encode(), b"release"]


def test_probe_of_a_device_makes_no_context_on_another(module, fake):
    """cudaSetDevice creates a context, also when it restores the previous device, and so does every call that needs one."""
    fake.take_events()
    assert module.device_support(0) == {"device_capability": 90, "binary_version": 90, "ptx_version": 90}
    assert module.device_support(1) == {"device_capability": 75, "binary_version": 0, "ptx_version": 0}
    expected = []
    for device in (0, 1):
        expected += [f"cudaDeviceGetAttribute({device})"] * 2 + [
            f"guard({device})",
            f"cudaFuncGetAttributes({device})",
            "release",
        ]
    assert fake.take_events().decode().split() == expected


def test_probe_of_a_missing_device_is_an_error_before_any_context(module, fake):
    fake.take_events()
    with pytest.raises(RuntimeError, match="probe_device: cudaDeviceGetAttribute: invalid device ordinal"):
        module.device_support(2)
    assert fake.take_events() == b"cudaDeviceGetAttribute(2) "
    with pytest.raises(TypeError):
        module.device_support("0")
