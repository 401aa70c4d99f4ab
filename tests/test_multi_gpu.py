"""decode_sharded must match a single-process decode. Each number of processes is started once and decodes all cases."""

import contextlib
import re
import time

import processes
import pytest
import torch
import torch.distributed as dist
from models import CASES, adapted, circular, hooked, latents, make_decoder, patched, quantised
from tolerances import assert_close, relative_error
from torch import nn

from movq_ext import ResnetBlock, SpatialNorm, decode_sharded
from movq_ext.deploy import multi_gpu
from movq_ext.model import working_memory
from movq_ext.model.strip_rows import PointwiseRows
from movq_ext.model.working_memory import WorkingMemory

LITTLE, PLENTY = 60_000, 1 << 30  # bytes of a strip: several strips a band, and one
PROCESSES = [2, 4]
GRIDS = {name: case for name, case in CASES.items() if case[1][0] >= max(PROCESSES)} | {
    "five rows, attention on every level": (dict(attn_resolutions=[8, 16]), (5, 4), None),
    "seven rows, add_conv on another grid": (dict(add_conv=True), (7, 2), (5, 4)),
    "add_conv on its own grid": (dict(add_conv=True, ch_mult=(1, 1, 1)), (5, 2), None),
    "nine rows, three levels": (dict(ch_mult=(1, 2, 2), resamp_with_conv=True), (9, 3), (2, 3)),
}


def shortcuts(decoder):
    """3x3 shortcuts, which also read rows of other processes."""
    decoder.up[0].block[0] = ResnetBlock(in_channels=64, out_channels=32, conv_shortcut=True, zq_ch=5)
    decoder.up[0].block[1] = ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=True, zq_ch=5)
    decoder.norm_out = SpatialNorm(64, 5, num_groups=32)
    decoder.conv_out = nn.Conv2d(64, 3, 3, padding=1)


CHANGES = {change.__name__: change for change in (adapted, patched, hooked, shortcuts)}
FEWER_CHANNELS = dict(ch_mult=(1, 2), attn_resolutions=[], mid_attn=False)
DTYPES = {torch.float64: 1e-11, torch.bfloat16: 5e-2, torch.float16: 2**-11}


def unmodified(decoder):
    pass


def identity(decoder):
    decoder.mid.block_1 = nn.Identity()


def training(decoder):
    decoder.train()
    decoder.mid.block_1.dropout.p = 0.1


REFUSED = {
    "rows": (
        unmodified,
        latents((1, 9)),
        "ValueError: z must have at least one row per process, got 1 rows for 2 processes",
    ),
    "channels": (unmodified, latents(z=3), r"ValueError: z must have shape \(batch, 4"),
    "padding": (circular, latents(), "TypeError: .* must be 3x3 nn.Conv2d padded with zeros, got .*circular"),
    "conv_out": (quantised, latents(), "TypeError: .* must be 3x3 nn.Conv2d padded with zeros, got Sequential"),
    "block": (identity, latents(), "TypeError: decoder's layers must be ResnetBlock, .* got Identity"),
    "dropout": (training, latents(), "ValueError: decoder must be in evaluation mode"),
}


def error_message(function, *arguments, **keywords):
    """Return the type and the message of the error that the call raises."""
    try:
        function(*arguments, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def worker(rank, size):
    with torch.no_grad():
        results = decode_all(rank, size)
    results["gradient"] = error_message(decode_sharded, make_decoder(), *latents())
    with torch.inference_mode():
        results["inference mode"] = decode_sharded(make_decoder(), *latents())
    return results


def decode_all(rank, size):
    results = {}
    for name, (changes, grid, zq_grid) in GRIDS.items():
        for strip_bytes in (LITTLE, PLENTY):
            multi_gpu.cpu_memory = lambda dtype, strip=strip_bytes: WorkingMemory(strip, maps=0)
            results[name, strip_bytes] = decode_sharded(make_decoder(**changes), *latents(grid, zq_grid=zq_grid))
    for name, change in CHANGES.items():
        change(decoder := make_decoder())
        results[name] = decode_sharded(decoder, *latents((6, 4)))
    for dtype in DTYPES:
        results[dtype] = decode_sharded(make_decoder().to(dtype), *latents((6, 4), dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        results["autocast"] = decode_sharded(make_decoder(), *latents((6, 4)))
    results["rows"] = decode_sharded(make_decoder(), *latents((7, 4)), gather=False)
    with threads():
        results["threads"] = decode_sharded(make_decoder(**FEWER_CHANNELS), *latents((24, 4)))
    moments, x = multi_gpu.BandMoments(multi_gpu.Band(None, 40)), large_mean()
    first, last = multi_gpu.Band(None, 40).rows(40)
    moments.add(x[:, :, first:last])
    moments.all_reduce()
    results["moments"] = (moments.count, *moments.group_statistics(4, 1e-6))
    ranks = sorted({size // 2, size - 1})  # one of two, two of four: ranks in the group differ from those in the world
    arguments = make_decoder(), *latents(), dist.new_group(ranks)
    results["group"] = decode_sharded(*arguments) if rank in ranks else error_message(decode_sharded, *arguments)
    if size == 2:
        for name, (change, (z, zq), _) in REFUSED.items():
            change(decoder := make_decoder())
            results["refused", name] = error_message(decode_sharded, decoder, z, zq)
        z, zq = latents()
        results["refused", "ddp"] = error_message(decode_sharded, nn.parallel.DistributedDataParallel(make_decoder()), z, zq)
        results["refused", "other z"] = error_message(decode_sharded, make_decoder(), z + rank, zq)
        results["refused", "other zq"] = error_message(decode_sharded, make_decoder(), z, zq.roll(rank))
        results["refused", "other shape"] = error_message(decode_sharded, make_decoder(), z, zq[:, :, : 2 + rank])
    return results


@contextlib.contextmanager
def threads():
    """Context manager: three threads compute strips of four rows, and the first strip of each band reads its residual last."""
    write_rows = PointwiseRows.write_rows

    def write_late(self, first, last, out):
        if first == self.x._first:
            time.sleep(0.1)
        write_rows(self, first, last, out)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(PointwiseRows, "write_rows", write_late)
        monkeypatch.setattr(multi_gpu, "cpu_memory", lambda dtype: WorkingMemory(1, workers=3))
        monkeypatch.setattr(working_memory, "MIN_THREADED_VALUES", 1)
        torch.set_num_threads(3)
        yield
        torch.set_num_threads(1)


def large_mean():
    return torch.randn(1, 8, 40, 30, generator=torch.Generator().manual_seed(5)) + 4096


@pytest.fixture(scope="module", params=PROCESSES)
def results(request, tmp_path_factory):
    """The results of every process for every case."""
    return processes.run(worker, request.param, tmp_path_factory.mktemp("processes"), request.param)


def test_threads_of_a_band(results):
    """Where a block writes over its input, which has more channels, and the band starts below the map's first row."""
    expected = make_decoder(**FEWER_CHANNELS)(*latents((24, 4)))
    assert_close(same_in_all(results, "threads"), expected.double(), slack=5)


def same_in_all(results, key):
    """Return the result of the first process, after checking that all have the same bits."""
    found = [result[key] for result in results]
    assert all(torch.equal(x, found[0]) for x in found)
    return found[0]


def test_every_process_gets_the_whole_image(results):
    for name, (changes, grid, zq_grid) in GRIDS.items():
        expected = make_decoder(**changes)(*latents(grid, zq_grid=zq_grid))
        for strip_bytes in (LITTLE, PLENTY):
            out = same_in_all(results, (name, strip_bytes))
            assert out.is_contiguous() and not out.requires_grad
            assert_close(out, expected.double(), slack=5)


def test_modified_layers(results):
    for name, change in CHANGES.items():
        change(decoder := make_decoder())
        assert_close(same_in_all(results, name), decoder(*latents((6, 4))).double(), slack=5)


def test_other_dtypes(results):
    for dtype, limit in DTYPES.items():
        out, decoder = same_in_all(results, dtype), make_decoder().to(dtype)
        exact = decoder.double()(*(x.double() for x in latents((6, 4), dtype=dtype)))
        assert out.dtype == dtype
        assert relative_error(out, exact) < limit, dtype


def test_autocast_and_inference_mode(results):
    assert same_in_all(results, "autocast").dtype == torch.bfloat16
    assert 1e-4 < relative_error(same_in_all(results, "autocast"), make_decoder()(*latents((6, 4)))) < 5e-2
    assert_close(same_in_all(results, "inference mode"), make_decoder()(*latents()).double(), slack=5)


def test_without_gather_each_process_returns_its_rows(results):
    expected, bands = make_decoder()(*latents((7, 4))), [result["rows"] for result in results]
    assert [first for _, first in bands] == [2 * (7 * rank // len(results)) for rank in range(len(results))]
    assert_close(torch.cat([rows for rows, _ in bands], 2), expected.double(), slack=5)


def test_merged_moments_with_a_large_mean(results):
    x = large_mean()
    grouped = x.double().reshape(4, -1)
    for count, mean, rstd in (result["moments"] for result in results):
        assert count == 40 * 30
        torch.testing.assert_close(mean[::2], grouped.mean(1), rtol=1e-7, atol=0)
        expected = (grouped.var(1, correction=0) + 1e-6).rsqrt()
        torch.testing.assert_close(rstd[::2], expected, rtol=3e-5, atol=0)  # float32 values are 5e-4 apart


def test_a_group_without_all_processes(results):
    members = {len(results) // 2, len(results) - 1}
    for rank, result in enumerate(results):
        if rank in members:
            assert_close(result["group"], make_decoder()(*latents()).double(), slack=5)
        else:
            assert result["group"] == "ValueError: group must contain this process"


def test_invalid_arguments(results):
    for result in results:
        assert re.match("ValueError: .* must not require gradients: call under torch.no_grad", result["gradient"])
    if len(results) != 2:
        return
    other = r"ValueError: z and zq must be the same in all processes of the group, got different ones in ranks \[1\]"
    expected = {name: pattern for name, (_, _, pattern) in REFUSED.items()}
    expected |= dict.fromkeys(("other z", "other zq", "other shape"), other)
    expected["ddp"] = "TypeError: decoder must be a MOVQDecoder, got DistributedDataParallel"
    for result in results:
        for name, pattern in expected.items():
            assert re.match(pattern, result["refused", name], re.DOTALL), (name, result["refused", name])


def test_torch_distributed_must_be_initialised():
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.distributed must be initialised"):
        decode_sharded(make_decoder(), *latents())


def test_bands_cover_every_row_once():
    for size in range(1, 9):
        for latent_rows in range(size, 20):
            bands = []
            for rank in range(size):
                band = multi_gpu.Band.__new__(multi_gpu.Band)  # without torch.distributed and its processes
                band.latent_rows, band.rank, band.world_size = latent_rows, rank, size
                bands.append(band.rows(4 * latent_rows))
            assert [row for first, last in bands for row in range(first, last)] == list(range(4 * latent_rows))
            assert max(last - first for first, last in bands) - min(last - first for first, last in bands) <= 4
