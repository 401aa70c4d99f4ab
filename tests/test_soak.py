"""Repeated decodes leak nothing. MOVQ_EXT_CASES=10000 runs that many decodes of each kind."""

import gc
import itertools
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from spies import record_calls
from torch import Tensor, nn

from movq_ext import MOVQDecoder, annotate, decode_tiled, profiling
from movq_ext.model import feature_maps

DECODES = int(os.environ.get("MOVQ_EXT_CASES", 64))
WARM_UP = 24
MAX_RSS_GROWTH = 24 << 20  # bytes that the allocator may retain after the warm-up, whatever the number of decodes
SIZES = [(1, 1), (3, 5), (8, 4), (6, 6), (2, 9), (7, 1)]
MEMORY = 43_008  # bytes, the minimum for latents 4 cells wide. Half of it holds no map of (1, 32, 48, 8): maps go to files
SETTINGS = dict(
    ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=(), in_channels=3, resolution=32, z_channels=4
)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return MOVQDecoder(**{**SETTINGS, **changes}).eval()


def latents(height=4, width=4, batch=1, **options):
    return torch.randn(batch, 4, height, width, **options), torch.randn(batch, 4, height, width)


def count_tensors():
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


@pytest.fixture
def files(monkeypatch):
    """A list with an entry for every temporary file that was created."""
    return record_calls(monkeypatch, feature_maps.tempfile, "TemporaryFile", lambda file, **options: options)


def usage():
    """Return the numbers of live tensors, open files and objects, and the resident memory in bytes."""
    while gc.collect():  # garbage of earlier tests can take more than one pass
        pass
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return count_tensors(), len(os.listdir("/proc/self/fd")), len(gc.get_objects()), resident


def assert_no_leak(work, decodes=DECODES):
    """Call work(0), work(1), ... and compare the usage after a warm-up with that at the end."""
    for i in range(WARM_UP):
        work(i)
    before = usage()
    for i in range(WARM_UP, WARM_UP + decodes):
        work(i)
    after = usage()
    for name, was, now in zip(("tensors", "open files"), before, after, strict=False):
        assert now <= was, f"{was} {name} became {now}"
    # torch and the interpreter retain a few objects.
    assert after[2] - before[2] < decodes // 4, f"{before[2]} objects became {after[2]}"
    assert after[3] - before[3] < MAX_RSS_GROWTH, f"{before[3]} bytes became {after[3]}"


@torch.no_grad()
def in_strips(decoder, i):
    decoder(*latents())


@torch.no_grad()
def with_changing_sizes(decoder, i):
    decoder(*latents(*SIZES[i % len(SIZES)], batch=1 + i % 3))


def in_files(decoder, i):
    decode_tiled(decoder, *latents(24, 4), max_memory=MEMORY)


@torch.inference_mode()
def in_half_precision(decoder, i):
    z, zq = latents()
    decoder(z.half(), zq.half())


@torch.no_grad()
def under_autocast(decoder, i):
    with torch.autocast("cpu", torch.bfloat16):
        decoder(*latents())


def with_gradients(decoder, i):
    decoder(*latents(requires_grad=True)).square().mean().backward()
    decoder.zero_grad(set_to_none=True)


@torch.no_grad()
def with_features(decoder, i):
    decoder.forward_with_features_output(*latents())


@torch.no_grad()
def annotated(decoder, i):
    with annotate(decoder):
        decoder(*latents())


WAYS_TO_DECODE = [in_strips, with_changing_sizes, in_files, in_half_precision, under_autocast, with_gradients, with_features,
                  annotated]  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory and open files from /proc")
@pytest.mark.parametrize("work", WAYS_TO_DECODE)
def test_decodes(work, files):
    decoder = make()
    if work is in_half_precision:
        decoder.half()
    assert_no_leak(lambda i: work(decoder, i))
    assert not profiling._annotated and (len(files) >= DECODES) == (work is in_files)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory and open files from /proc")
@pytest.mark.parametrize("how", ["in place", "data", "loaded"])
def test_weights_that_change_between_decodes(how):
    """Values derived from the old weights are dropped, and those from the new ones are right."""
    decoder, z, zq = make(), *latents()
    states = [make(seed).state_dict() for seed in range(2)]
    wanted = []
    for state in states:
        other = make()
        other.load_state_dict(state)
        with torch.no_grad():
            wanted.append([other(z, zq), other.forward_with_features_output(z, zq)[0]])

    @torch.no_grad()
    def work(i):
        state = states[i % 2]
        if how == "loaded":
            decoder.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
        else:
            for name, parameter in decoder.named_parameters():
                if how == "data":
                    parameter.data = state[name].clone()
                else:
                    parameter.copy_(state[name])
        for got, expected in zip((decoder(z, zq), decoder.forward_with_features_output(z, zq)[0]), wanted[i % 2], strict=True):
            torch.testing.assert_close(got, expected)

    assert_no_leak(work)


def test_replaced_parameters():
    """A new parameter can reuse its predecessor's address and version, with other values."""
    decoder = make()
    upsample = decoder.up[1].upsample
    x = torch.randn(1, 32, 5, 5)
    for _ in range(DECODES):
        upsample.conv.weight = None
        upsample.conv.weight = nn.Parameter(torch.randn(32, 32, 3, 3) / 17)
        for _ in range(2):
            upsample.conv.weight.data = torch.randn(32, 32, 3, 3) / 17
        with torch.no_grad():
            torch.testing.assert_close(upsample(x), upsample.conv(F.interpolate(x, scale_factor=2.0)), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory and open files from /proc")
def test_dropped_models_are_freed():
    dropped = []

    def work(i):
        decoder = make(i)
        with torch.no_grad(), annotate(decoder):
            decoder(*latents())
            decoder.forward_with_features_output(*latents())
        dropped[:] = [*dropped[-20:], weakref.ref(decoder), weakref.ref(decoder.conv_out.weight)]

    assert_no_leak(work, DECODES // 3)
    assert all(ref() is None for ref in dropped) and not profiling._annotated


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory and open files from /proc")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_decodes(error, files):
    """Each fails at another layer. None leaves a file or profiler range open, or a map in memory."""
    decoder, calls = make(), itertools.count()
    fails_at = 0

    def fail(*_):
        if next(calls) == fails_at:
            raise error

    for conv in decoder.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            conv.register_forward_hook(fail)

    def work(i):
        nonlocal calls, fails_at
        calls, fails_at = itertools.count(), i % 10
        with pytest.raises(error), annotate(decoder):
            decode_tiled(decoder, *latents(24, 4), max_memory=MEMORY)

    assert_no_leak(work)
    assert not profiling._annotated and not profiling._open_ranges.stack and len(files) >= DECODES // 2
