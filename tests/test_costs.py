"""The cost of a decode in deterministic counts: operations, copies, memory, kernel launches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import KANDINSKY, Copies, PeakBytes, latents, make_decoder
from torch.utils.flop_counter import FlopCounterMode

from movq_ext import AttnBlock, MOVQDecoder, ResnetBlock, SpatialNorm, Upsample, decode_tiled

pytestmark = pytest.mark.usefixtures("in_strips")


def operations(run):
    """Floating-point operations of calling run, as torch counts them."""
    with FlopCounterMode(display=False) as counted:
        run()
    return counted.get_total_flops()


def expected_operations(decoder, height, width):
    """Two operations per multiplication of the convolutions and of attention, from the layers' sizes."""

    def conv(layer, cells):
        return 2 * layer.weight.numel() * cells

    def norm(layer):
        return conv(layer.conv_y, height * width) + conv(layer.conv_b, height * width)

    cells = height * width
    total = conv(decoder.conv_in, cells)
    for layer in (step.layer for step in decoder.steps()):
        if isinstance(layer, Upsample):
            cells *= 4
            total += conv(layer.conv, cells) * 4 // 9  # 16 multiplications where the published layer takes 36
        elif isinstance(layer, ResnetBlock):
            total += norm(layer.norm1) + norm(layer.norm2) + conv(layer.conv1, cells) + conv(layer.conv2, cells)
            total += conv(layer.nin_shortcut, cells) if hasattr(layer, "nin_shortcut") else 0
        else:
            total += norm(layer.norm) + sum(conv(part, cells) for part in (layer.q, layer.k, layer.v, layer.proj_out))
            total += 4 * layer.q.out_channels * cells * cells
    return total + norm(decoder.norm_out) + conv(decoder.conv_out, cells)


def test_operations_of_the_released_model():
    """Layer by layer. The published decoder takes 637 billion at 256x256."""
    with torch.device("meta"):
        decoder, z = MOVQDecoder(**KANDINSKY), torch.empty(1, 4, 32, 32)
    counted = operations(lambda: decoder(z, z))
    assert counted == expected_operations(decoder, 32, 32)
    assert counted < 542e9


@pytest.mark.parametrize("max_memory, more", [(None, 0.03), (1 << 20, 0.1)])
def test_operations_of_strips(max_memory, more):
    """Convolutions never compute a row twice. Upsampling computes one extra column, and one extra row per strip."""
    decoder = make_decoder(attn_resolutions=[], mid_attn=False)  # torch does not count attention on a CPU
    z, zq = latents((24, 8), 1)
    with torch.no_grad():
        counted = operations(
            lambda: decoder(z, zq) if max_memory is None else decode_tiled(decoder, z, zq, max_memory=max_memory)
        )
    least = expected_operations(decoder, 24, 8)
    assert 0.999 * least <= counted <= (1 + more) * least


def test_strips_copy_no_map_unless_its_rows_have_gaps():
    """On a CPU, convolutions accumulate into the output map, or else into a buffer."""
    decoder, (z, zq) = make_decoder(), latents((8, 8), 1)
    with torch.no_grad(), Copies(1, 32 * 16 * 16) as copies:
        decoder(z, zq)
    # Of the block from 64 to 32 channels, its input, which is overwritten, and its shortcut; and the next block's input.
    assert copies.seen == [("aten.copy_.default", (1, channels, 16, 16)) for channels in (64, 32, 32)]


@pytest.mark.parametrize(
    "make, maps",
    [
        (lambda: ResnetBlock(in_channels=64, zq_ch=4), 2),  # of a norm or a convolution, the input and the output
        (lambda: ResnetBlock(in_channels=64), 2),
        (lambda: AttnBlock(64, 4), 4),  # in attention: q, k, v and the output
    ],
)
def test_peak_memory_of_a_block_in_inference(make, maps):
    """In maps beyond the block's input."""
    block = make().eval()
    x, zq = torch.randn(1, 64, 64, 64).contiguous(memory_format=torch.channels_last), torch.randn(1, 4, 8, 8)
    with torch.no_grad(), PeakBytes(block, x) as memory:
        block(x, zq=zq)
    assert maps <= memory.peak / x.nbytes < maps + 0.1


# glibc otherwise takes maps from its heap once one of their size was freed, and the peak depends on the heap's holes.
FIXED_MMAP_THRESHOLD = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
PEAK = """
import sys, torch, movq_ext
from pathlib import Path

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))

torch.manual_seed(0)
decoder = movq_ext.MOVQDecoder(ch=64, out_ch=3, ch_mult=(1, 2, 4), num_res_blocks=1, attn_resolutions=[], in_channels=3,
                               resolution=256, z_channels=4, zq_ch=4, mid_attn=False).eval()
z = torch.randn(int(sys.argv[1]), 4, 96, 96)
torch.set_num_threads(int(sys.argv[2]))
with torch.no_grad():
    decoder(z, z)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    image = decoder(z, z)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("batch, threads", [(1, 1), (1, 2), (2, 1), (4, 2)])
def test_peak_memory_on_a_cpu(batch, threads):
    """The last upsampling's input and result, and strips, for each image that is decoded at the same time.

    The blocks after it take no more maps, and a larger batch adds its images only.
    """
    command = [sys.executable, "-c", PEAK, str(batch), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=FIXED_MMAP_THRESHOLD)
    pixels = 4 * 384 * 384
    assert int(done.stdout) < ((128 + 128 // 4) * min(batch, threads) + 2 * batch * 3) * pixels + 30e6


ENCODE_PEAK = (
    PEAK[: PEAK.index("torch.manual_seed")]
    + """
encoder = movq_ext.Encoder(ch=64, ch_mult=(1, 2, 4), num_res_blocks=1, attn_resolutions=[], in_channels=3, resolution=256,
                           z_channels=4, mid_attn=False).eval()
x = torch.randn(1, 3, 768, 768)
movq_ext.encode_tiled(encoder, x[:, :, :128], max_memory=int(sys.argv[1]))
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
movq_ext.encode_tiled(encoder, x, max_memory=int(sys.argv[1]))
print(resident("VmHWM") - before)
"""
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_of_an_encode_in_strips():
    """A single map of the first level takes 151 MB."""
    limit = 48 << 20
    command = [sys.executable, "-c", ENCODE_PEAK, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=FIXED_MMAP_THRESHOLD)
    assert int(done.stdout) < limit + 40e6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_of_a_decode_on_a_gpu():
    """Two or three kernels per norm, one pass after each block's last convolution and each upsampling, no layout conversions."""
    decoder = make_decoder(ch=64, ch_mult=(1, 2, 2)).cuda().bfloat16()
    z, zq = latents((16, 16), 1, torch.bfloat16, device="cuda")
    with torch.no_grad():
        decoder(z, zq)
        with torch.profiler.profile() as profile:
            decoder(z, zq)
            torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    with_statistics = sum(name.startswith("movq_ext::") and "_statistics" in name for name in names)  # operators
    norms = sum(isinstance(module, SpatialNorm) for module in decoder.modules())
    blocks = sum(step.takes_zq for step in decoder.steps())
    upsamplings = sum(isinstance(module, Upsample) for module in decoder.modules())

    def launches(kernel):
        return sum("movq" in name and kernel in name for name in names)

    assert launches("epilogue") == blocks + upsamplings, names
    assert launches("merge_statistics<") == launches("modulate<") == norms, names
    # A norm computes its own statistics unless the preceding kernel has.
    assert launches("interleaved_statistics<") == norms - with_statistics, names
    assert with_statistics > 0, names
    assert not [name for name in names if "nchwToNhwc" in name or "nhwcToNchw" in name]
