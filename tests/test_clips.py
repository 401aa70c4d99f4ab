"""The spatial norm of clips: the formula on five dimensions, the frames of the latent, gradients and layouts."""

import published
import pytest
import torch
import torch.nn.functional as F
from clip_cases import SIZES, arguments
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from movq_ext import explain, spatial_norm
from movq_ext.ops import clips

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def source_frames(t, frames, split_first_frame):
    """The latent's frame for each frame of a clip, as the models say it."""
    if split_first_frame and t > 1 and frames > 1:
        return torch.cat([torch.tensor([0]), 1 + published.nearest_index(frames - 1, t - 1)])
    return published.nearest_index(frames, t)


def formula(f, zq_y, zq_b, weight, bias, groups, eps=1e-6, activation=None, split_first_frame=False):
    """`published.spatial_norm` of the frames, with statistics of all of them."""
    frames = source_frames(zq_y.shape[2], f.shape[2], split_first_frame)
    y, b = (torch.stack([published.resize(zq[:, :, t], *f.shape[3:]) for t in frames], dim=2) for zq in (zq_y, zq_b))
    norm = published.group_norm(f.flatten(2, 3), groups, weight, bias, eps).view(f.shape)
    return published.silu(norm * y + b) if activation == "silu" else norm * y + b


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


def test_explain_takes_clips():
    assert explain(torch.zeros(1, 2, 3, 4, 4)) == "native: the CUDA kernels do not run on cpu tensors"
