"""How a CPU decodes an image: as whole maps by one thread or by all, where they are small, and else in strips."""

import threading
from collections import Counter

import pytest
import torch
from models import CASES, latents, make_decoder
from spies import record_calls
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from movq_ext import MOVQDecoder, ResnetBlock, SpatialNorm
from movq_ext.model import decoder as decoder_module
from movq_ext.model.strips import Strips


@pytest.fixture
def batches(monkeypatch):
    """Return (images, threads of an operator, computed in the main thread) of every decode of whole maps, in any order."""

    def describe(image, decoder, z, zq):
        return len(z), torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    return record_calls(monkeypatch, MOVQDecoder, "_forward_fused", describe)


@pytest.fixture
def strips(monkeypatch):
    """Return the number of images that each call decoded in strips."""
    return record_calls(monkeypatch, Strips, "decode", lambda image, *_: len(image))


def map_bytes(z, dtype=torch.float32):
    """Return the bytes of a map of 32 channels at an image's resolution, for a decoder that doubles the latents' size."""
    return 32 * 4 * z[0, 0].numel() * dtype.itemsize


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_small_images_are_decoded_as_whole_maps(batches, strips, name, count):
    changes, grid, zq_grid = CASES[name]
    decoder, (z, zq) = make_decoder(**changes), latents(grid, zq_grid=zq_grid)
    with torch.enable_grad():
        expected = decoder(z, zq)
    assert expected.requires_grad and not batches
    torch.set_num_threads(count)
    out = decoder(z, zq)
    assert batches == ([(2, 1, True)] if count == 1 else [(1, 1, False)] * 2) and not strips
    assert out.is_contiguous() and torch.get_num_threads() == count
    assert_close(out, expected.double(), slack=5)


@torch.no_grad()
@pytest.mark.parametrize(
    "count, fits, expected", [(1, 4, [4, 1]), (1, 1, [1] * 5), (2, 8, [3, 2]), (2, 4, [2, 2, 1]), (3, 2, None)]
)
def test_threads_share_the_cache(batches, strips, monkeypatch, count, fits, expected):
    """Of maps of ``fits`` images, each thread holds its share. Maps that do not fit are computed in strips."""
    decoder, (z, zq) = make_decoder(), latents((4, 6), batch=5)
    monkeypatch.setattr(decoder_module, "MAX_WHOLE_MAP_BYTES", fits * map_bytes(z))
    torch.set_num_threads(count)
    decoder(z, zq)
    assert sorted((images for images, *_ in batches), reverse=True) == (expected or [])
    assert len(strips) == (0 if expected else 5)


@torch.no_grad()
def test_one_small_image_is_decoded_by_one_thread(batches, monkeypatch):
    """Its maps may take all of the memory: other threads have no image. An operator with several threads would wait for the
    slowest one, beside other processes for a time slice."""
    decoder, (z, zq) = make_decoder(), latents((4, 6), batch=1)
    monkeypatch.setattr(decoder_module, "MAX_WHOLE_MAP_BYTES", map_bytes(z))
    torch.set_num_threads(2)
    decoder(z, zq)
    assert batches == [(1, 1, False)]


@torch.no_grad()
@pytest.mark.parametrize("count, threads, more, shared", [(1, 2, 0, 1), (2, 3, 0, 2), (1, 2, -1, 0), (2, 2, 0, 0), (1, 1, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_share_the_small_maps_of_few_images(batches, strips, monkeypatch, dtype, count, threads, more, shared):
    """The images are fewer than the threads, and the largest map has 64 channels at twice the latents' size."""
    decoder, (z, zq) = make_decoder(ch_mult=(1, 2)).to(dtype), (x.to(dtype) for x in latents((4, 6), batch=count))
    assert max(block.in_channels for block in decoder.up[0].block) == 64
    with torch.enable_grad():
        expected = decoder(z, zq)
    monkeypatch.setattr(decoder_module, "MAX_WHOLE_MAP_BYTES", 0)
    monkeypatch.setattr(decoder_module, "MAX_SHARED_MAP_BYTES", 2 * map_bytes(z, dtype) + more)
    torch.set_num_threads(threads)
    out = decoder(z, zq)
    assert batches == [(1, threads, True)] * shared and len(strips) == (0 if shared else count)
    assert_close(out, expected.double(), slack=5)


@torch.no_grad()
def test_a_map_that_a_block_widens_counts(batches, monkeypatch):
    """The only block of the last level has 32 channels in and 64 out."""
    decoder, (z, zq) = make_decoder(ch_mult=(2, 1), num_res_blocks=0), latents((4, 6), batch=1)
    monkeypatch.setattr(decoder_module, "MAX_WHOLE_MAP_BYTES", 0)
    torch.set_num_threads(2)
    for more, shared in ((-1, 0), (0, 1)):
        monkeypatch.setattr(decoder_module, "MAX_SHARED_MAP_BYTES", 2 * map_bytes(z) + more)
        decoder(z, zq)
        assert len(batches) == shared


class Passes(TorchDispatchMode):
    """Counts the operators that write at least this many values. Each may be a parallel region: its threads meet at the end."""

    def __init__(self, min_elements):
        super().__init__()
        self.min_elements, self.names = min_elements, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if torch.is_tensor(first) and first.numel() >= self.min_elements and not func.is_view and "empty" not in func.name():
            self.names[func.overloadpacket.__name__] += 1
        return out


@torch.no_grad()
@pytest.mark.parametrize("dtype, norm", [(torch.float32, "sub"), (torch.bfloat16, "native_group_norm")])
def test_a_norm_and_its_activation_write_a_map_three_times(dtype, norm):
    decoder = make_decoder(attn_resolutions=[], mid_attn=False).to(dtype)
    z, zq = (x.to(dtype) for x in latents((32, 48), batch=1, zq_grid=(4, 6)))
    norms = sum(isinstance(module, SpatialNorm) for module in decoder.modules())
    blocks = sum(isinstance(module, ResnetBlock) for module in decoder.modules())
    with Passes(32 * 32 * 48) as passes:
        decoder._forward_fused(z, zq)
    folding = {"cat", "clone", "_to_copy"}
    written = {name: count for name, count in passes.names.items() if name not in folding | {"convolution"}}
    assert written == {norm: norms, "addcmul": norms, "silu_": norms, "add_": blocks}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_limit_is_in_bytes(batches, strips, monkeypatch, dtype):
    decoder, (z, zq) = make_decoder().to(dtype), (x.to(dtype) for x in latents((4, 6), batch=1))
    torch.set_num_threads(1)
    for limit in (map_bytes(z, dtype) - 1, map_bytes(z, dtype)):
        monkeypatch.setattr(decoder_module, "MAX_WHOLE_MAP_BYTES", limit)
        decoder(z, zq)
    assert (len(strips), len(batches)) == (1, 1)


@torch.no_grad()
def test_float16_is_computed_in_strips(batches, strips):
    """In float32."""
    decoder, (z, zq) = make_decoder().half(), latents((4, 6), batch=1)
    decoder(z.half(), zq.half())
    assert strips and not batches
