"""The spatial norm of clips: the formula on five dimensions, the frames of the latent, gradients and layouts."""

import pytest
import torch
import torch.nn.functional as F
from clip_cases import SIZES, arguments, draw, formula, source_frames
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_gpu import PretendGpu
from tolerances import assert_close

from movq_ext import explain, spatial_norm
from movq_ext.ops import clips, functional
from movq_ext.ops.registration import CPU_IMPLEMENTATIONS

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split_first_frame", [False, True])
@pytest.mark.parametrize(("f_size", "zq_size"), SIZES)
def test_a_clip_is_the_formula(f_size, zq_size, split_first_frame, layout, activation):
    f, *rest = arguments(f_size, zq_size)
    expected = formula(f, *rest, activation=activation, split_first_frame=split_first_frame)
    f = f.contiguous(memory_format=layout)
    out = spatial_norm(f, *rest, activation=activation, split_first_frame=split_first_frame)
    assert_close(out, expected)
    assert out.is_contiguous(memory_format=layout)
    out = spatial_norm(f, None, None, *rest[2:], activation=activation)
    expected = F.group_norm(f, rest[-1], *rest[2:4], 1e-6)
    assert_close(out, F.silu(expected) if activation else expected)


@settings(max_examples=40, deadline=None)
@given(
    f_size=st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)),
    zq_size=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)), split_first_frame=st.booleans(),
)  # fmt: skip
def test_a_clip_of_any_size_is_the_formula(f_size, zq_size, split_first_frame):
    case = arguments(f_size, zq_size, batch=1)
    few = f_size[0] * f_size[1] * f_size[2] < 4  # if a group's values nearly agree, 1 / sqrt(eps) amplifies their rounding
    expected = formula(*case, split_first_frame=split_first_frame)
    assert_close(spatial_norm(*case, split_first_frame=split_first_frame), expected, slack=100.0 if few else 1.0)


@settings(max_examples=60, deadline=None)
@given(t=st.integers(1, 9), frames=st.integers(1, 20), split_first_frame=st.booleans())
def test_the_frames_of_the_latent(t, frames, split_first_frame):
    numbers = torch.arange(t, dtype=torch.float32).view(1, 1, t, 1, 1)
    table = clips.resize_frames(numbers, frames, 1, split_first_frame).flatten()
    assert table.tolist() == source_frames(t, frames, split_first_frame).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_other_dtypes(dtype):
    case = arguments(dtype=dtype)
    expected = formula(*(x.double() for x in case[:-1]), case[-1], activation="silu", split_first_frame=True)
    out = spatial_norm(*case, activation="silu", split_first_frame=True)
    assert out.dtype == dtype
    assert_close(out, expected, slack=2)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("f_size", "zq_size", "split_first_frame"), [
    ((3, 4, 2), (2, 2, 2), True), ((3, 3, 2), (2, 2, 1), False), ((2, 2, 2), (1, 1, 2), True),
])  # fmt: skip
def test_gradients(f_size, zq_size, split_first_frame, activation):
    *tensors, groups = arguments(f_size, zq_size, batch=1)
    norm = lambda *x: spatial_norm(*x, groups, activation=activation, split_first_frame=split_first_frame)
    inputs = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradgradcheck(norm, inputs)


def test_a_clip_of_one_frame_is_its_image():
    f, y, b, *rest = arguments((1, 8, 8), (1, 4, 2), torch.float32)
    image = spatial_norm(f[:, :, 0], y[:, :, 0], b[:, :, 0], *rest, activation="silu")
    assert torch.equal(spatial_norm(f, y, b, *rest, activation="silu", split_first_frame=True)[:, :, 0], image)


def test_the_latent_stays_narrow():
    """The map that the operator is given has the latent's width and, where rows repeat equally often, its rows."""
    f, zq = torch.empty(1, 2, 9, 32, 32), torch.empty(1, 2, 3, 4, 4)
    assert clips.modulation_map(zq, f, True).shape == (1, 2, 9 * 4, 4)
    assert clips.modulation_map(zq[:, :, :, :3], f, True).shape == (1, 2, 9 * 32, 4)


def test_compiled():
    case = arguments()
    compiled = torch.compile(
        lambda *x: spatial_norm(*x, activation="silu", split_first_frame=True), fullgraph=True, backend="eager"
    )
    assert_close(compiled(*case), formula(*case, activation="silu", split_first_frame=True))


@pytest.fixture
def kernels(monkeypatch):
    """The compiled operators, computed on a CPU."""
    for name, implementation in CPU_IMPLEMENTATIONS.items():
        monkeypatch.setattr(torch.ops.movq_ext, name, implementation, raising=False)
    monkeypatch.setattr(functional, "why_native", lambda f: None)
    monkeypatch.setattr(functional, "failed_self_test", lambda operator, f: None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("f_size", "zq_size"), SIZES)
def test_the_kernels_are_given_the_clip_and_the_latent_as_they_are(kernels, f_size, zq_size, layout, monkeypatch):
    calls = []

    def forward(*arguments):
        calls.append(arguments)
        return CPU_IMPLEMENTATIONS["spatial_norm_forward"](*arguments)

    monkeypatch.setattr(torch.ops.movq_ext, "spatial_norm_forward", forward, raising=False)
    f, y, b, *rest = (x.float() if isinstance(x, torch.Tensor) else x for x in arguments(f_size, zq_size))
    f, y, b = (x.contiguous(memory_format=layout) for x in (f, y, b))
    out = spatial_norm(f.as_subclass(PretendGpu), y, b, *rest, activation="silu", split_first_frame=True)
    doubles = (x.double() if isinstance(x, torch.Tensor) else x for x in (f, y, b, *rest))
    assert_close(out, formula(*doubles, activation="silu", split_first_frame=True), slack=2.0)
    ((f_map, y_map, b_map, *_, frames, latent_frames, split_first_frame),) = calls
    assert [x.data_ptr() for x in (f_map, y_map, b_map)] == [x.data_ptr() for x in (f, y, b)]
    assert (frames, latent_frames, split_first_frame) == (f_size[0], zq_size[0], True)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(("f_size", "zq_size"), SIZES)
def test_gradients_of_the_kernels(kernels, f_size, zq_size, create_graph):
    case = arguments(f_size, zq_size, torch.float32)
    inputs, groups = [x.requires_grad_() for x in case[:-1]], case[-1]
    out = spatial_norm(inputs[0].as_subclass(PretendGpu), *inputs[1:], groups, activation="silu", split_first_frame=True)
    dout = draw(*out.shape, dtype=torch.float32)
    grads = torch.autograd.grad(out, inputs, dout, create_graph=create_graph)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = formula(*exact, groups, activation="silu", split_first_frame=True)
    for grad, want in zip(grads, torch.autograd.grad(expected, exact, dout.double()), strict=True):
        assert grad.requires_grad == create_graph
        assert float((grad - want).detach().abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))


def test_explain_takes_clips():
    assert explain(torch.zeros(1, 2, 3, 4, 4)) == "native: the CUDA kernels do not run on cpu tensors"
