"""Threads compute strips of their own: the same image whatever their order, with one meeting per layer, within the memory."""

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from models import CASES, hooked, latents, make_decoder, patched
from spies import record_calls
from tolerances import assert_close
from torch import nn

from movq_ext import Encoder, annotate, decode_tiled, encode_tiled
from movq_ext.model import strips, working_memory
from movq_ext.model.feature_maps import FeatureMap, FileStorage, MapStore, MemoryStorage, Runs
from movq_ext.model.layers import AttnBlock, ResnetBlock
from movq_ext.model.strip_buffer import StripBuffer
from movq_ext.model.strip_norms import NormalisedRows
from movq_ext.model.strip_rows import ConvolvedRows
from movq_ext.model.strip_spans import HALO
from movq_ext.ops import winograd

pytestmark = pytest.mark.usefixtures("in_strips", "small_maps_in_threads")

LITTLE = 2_000_000  # bytes: several strips for each of two threads, and files


def decode(decoder, z, zq, max_memory=None):
    with torch.no_grad():
        return decoder(z, zq) if max_memory is None else decode_tiled(decoder, z, zq, max_memory=max_memory)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count, max_memory", [(2, None), (3, None), (2, LITTLE)])
def test_threads_match_whole_maps(runs, name, count, max_memory):
    changes, grid, zq_grid = CASES[name]
    decoder, (z, zq) = make_decoder(**changes), latents(grid, batch=count + 1, zq_grid=zq_grid)
    torch.set_num_threads(1)
    expected = decoder(z, zq).double()  # with gradients: layer by layer
    decode(decoder, z, zq, max_memory)
    assert not runs
    torch.set_num_threads(count)
    out = decode(decoder, z, zq, max_memory)
    assert runs[-1] == 1  # the last image
    if max_memory is None:
        assert runs.pop(0) == count  # the others, one for each thread
    assert max(runs) in (range(2, count + 1) if name != "one row" else [1])
    assert_close(out, expected, slack=5)


@pytest.fixture
def images(monkeypatch):
    """Return the number of threads that shared each image, sorted."""
    return record_calls(monkeypatch, strips.Strips, "decode", lambda image, self, *_: self.memory.workers)


@pytest.mark.parametrize("count, batch, expected", [(2, 5, [1, 1, 1, 1, 2]), (2, 1, [2]), (3, 3, [1, 1, 1]), (3, 2, [3, 3])])
def test_threads_decode_images_of_their_own(runs, images, count, batch, expected):
    """Only what is left of a batch is divided into strips."""
    decoder, (z, zq) = make_decoder(), latents((16, 6), batch=batch)
    torch.set_num_threads(count)
    out = decode(decoder, z, zq)
    assert sorted(images) == expected and max(runs) == count
    assert len(runs) == 2 if max(expected) == 1 else len(runs) > 10  # the images, and all of them in one tensor
    assert_close(out, decoder(z, zq).double(), slack=5)


def test_large_images_are_decoded_one_by_one(monkeypatch, images):
    """In strips of all threads, so that memory does not grow with their number. With a memory limit, all images are."""
    decoder, (z, zq) = make_decoder(), latents((16, 6), batch=2)
    largest_weight = max(weight.nbytes for layer in decoder.layers() for weight in layer.parameters())
    image_bytes = 2 * ((32 * 12) * (64 + 32) * 4 + 3 * largest_weight)  # of two images
    torch.set_num_threads(2)
    for limit in (image_bytes - 1, image_bytes):
        monkeypatch.setattr(strips, "MAX_IMAGES_BYTES", limit)
        decode(decoder, z, zq)
    decode(decoder, z, zq, LITTLE)
    assert images == [2, 2, 1, 1, 2, 2]


def test_images_alone_share_the_memory_of_strips(monkeypatch):
    seen = record_calls(monkeypatch, strips.Strips, "decode", lambda image, self, *_: self.memory)
    torch.set_num_threads(2)
    decode(make_decoder(), *latents((16, 6), batch=3))
    alone, shared = seen[0], seen[-1]
    assert (alone.strip, alone.winograd, alone.workers) == (shared.strip // 2, shared.winograd, 1)


@pytest.mark.parametrize("max_memory", [LITTLE, None])
def test_encoder(runs, max_memory):
    torch.manual_seed(0)
    encoder = Encoder(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[8], in_channels=3, resolution=16, z_channels=4)
    x = torch.randn(1, 3, 44, 12)
    torch.set_num_threads(2)
    out = encode_tiled(encoder.eval(), x, max_memory=max_memory or 1 << 28)
    assert max(runs) == 2
    assert_close(out, encoder(x).double(), slack=5)


@pytest.mark.parametrize("max_memory", [LITTLE, None])
def test_the_order_of_the_strips_changes_no_bit(monkeypatch, max_memory):
    """The first strip of each map waits until others are done. Also where maps overwrite one with more channels."""
    decoder, (z, zq) = make_decoder(), latents((16, 6), batch=1)
    torch.set_num_threads(2)
    expected, reserve = decode(decoder, z, zq, max_memory), FeatureMap.reserve

    def late_reserve(self, first, last):
        time.sleep(0.03 if first == 0 else 0)
        return reserve(self, first, last)

    assert_close(expected, decoder(z, zq).double(), slack=5)
    monkeypatch.setattr(FeatureMap, "reserve", late_reserve)
    out = decode(decoder, z, zq, max_memory)
    assert_close(out, decoder(z, zq).double(), slack=5)  # if both were wrong, they could be equal
    assert torch.equal(out, expected)


def test_each_thread_has_a_buffer_of_its_own():
    store = MapStore(torch.float32, torch.device("cpu"))
    buffer, x, other = StripBuffer(store, 0), store.allocate(4, 8, 8), []
    rows = buffer.rows(x, 3)
    thread = threading.Thread(target=lambda: other.append(buffer.rows(x, 3)))
    thread.start()
    thread.join()
    assert buffer.rows(x, 3).data_ptr() == rows.data_ptr() != other[0].data_ptr()


def test_one_meeting_per_layer(runs):
    decoder, (z, zq) = make_decoder(), latents((16, 8), batch=1)
    torch.set_num_threads(2)
    decode(decoder, z, zq)
    blocks = list(decoder.layers())
    attention, resnet = (sum(isinstance(block, kind) for block in blocks) for kind in (AttnBlock, ResnetBlock))
    convolutions = 2 + 2 * resnet  # with conv_in and conv_out
    packed = resnet  # the weights of both convolutions
    upsampling, whole_decode = 2, 1  # its weights, then the map
    attention *= 2  # keys and values, then queries
    assert len(runs) == whole_decode + packed + convolutions + attention + upsampling


def test_every_operator_is_single_threaded(monkeypatch):
    seen = []
    for owner, name in [(NormalisedRows, "__init__"), (NormalisedRows, "write_rows"), (ConvolvedRows, "__init__"),
                        (ConvolvedRows, "add_rows"), (FeatureMap, "commit_strip"), (strips, "attention"),
                        (strips.Strips, "store_input"), (strips.Strips, "output")]:  # fmt: skip
        describe = lambda *_, name=name: (name, torch.get_num_threads(), threading.current_thread() is threading.main_thread())
        seen.append(record_calls(monkeypatch, owner, name, describe))
    decoder, (z, zq) = make_decoder(), latents((16, 6), batch=1)
    torch.set_num_threads(2)
    decode(decoder, z, zq)
    assert torch.get_num_threads() == 2
    assert [{call[1:] for call in calls} for calls in seen] == [{(1, False)}] * len(seen)


WITHOUT_TEAM = """
import os, torch
import movq_ext
movq_ext.model.decoder.MAX_WHOLE_MAP_BYTES = movq_ext.model.decoder.MAX_SHARED_MAP_BYTES = 0
decoder = movq_ext.MOVQDecoder(ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=[], in_channels=3,
                               resolution=64, z_channels=4, zq_ch=4).eval()
z = torch.randn(1, 4, 32, 32)
torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
with torch.inference_mode():
    decoder(z, z)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_a_decode_has_no_parallel_region():
    """OpenMP starts its threads in the first one: the process has only the two workers."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TEAM], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"


@pytest.mark.parametrize("change", [hooked, patched])
def test_modified_layers_run_in_the_caller(monkeypatch, change):
    """Hooks need not be thread-safe."""
    decoder, (z, zq) = make_decoder(), latents((16, 6), batch=1)
    change(decoder)
    seen = record_calls(monkeypatch, nn.Conv2d, "_conv_forward", lambda *_: threading.get_ident())
    torch.set_num_threads(2)
    decode(decoder, z, zq, LITTLE)
    assert set(seen) == {threading.get_ident()}


def test_annotated_layers_run_in_threads(runs):
    decoder, (z, zq) = make_decoder(), latents((16, 6), batch=1)
    torch.set_num_threads(2)
    with annotate(decoder):
        decode(decoder, z, zq, LITTLE)
    assert max(runs) == 2


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("factor", [1, 2, 5])
def test_threads_share_the_memory_limit(monkeypatch, count, factor):
    """The strips that threads compute at once, with their halos."""
    decoder, (z, zq) = make_decoder(attn_resolutions=[], mid_attn=False), latents((40, 16), batch=1)
    with pytest.raises(ValueError) as error:
        decode_tiled(decoder, z, zq, max_memory=1)
    limit = factor * int(next(word for word in str(error.value).split() if word.isdigit()))
    seen = record_calls(monkeypatch, strips.Strips, "spans", lambda spans, self, x, values: (spans, self.memory, x, values))
    torch.set_num_threads(count)
    assert_close(decode_tiled(decoder, z, zq, max_memory=limit), decoder(z, zq).double(), slack=5)
    for spans, memory, x, values in seen:
        rows = max(last - first for first, last in spans) + 2
        assert min(memory.workers, len(spans)) * rows * values * x.width * 4 <= limit // 2
    assert {memory.workers for _, memory, _, _ in seen} == {min(count, factor // 2 or 1)}


def test_winograd_blocks_share_the_memory():
    weight = torch.randn(8, 8, 3, 3)
    one, three = (winograd.WinogradConvolution(weight, None, 1 << 20, threads) for threads in (1, 3))
    assert torch.equal(one.factors, three.factors)
    assert three.block_bytes == one.block_bytes // 3


def test_a_file_is_read_and_written_by_several_threads():
    class SlowFile:
        """Gives other threads time to move the position before it is used."""

        def __init__(self, file):
            self.file, self.readinto, self.write = file, file.readinto, file.write

        def seek(self, position):
            self.file.seek(position)
            time.sleep(0.002)

    with tempfile.TemporaryFile() as file:
        storage = FileStorage(SlowFile(file), torch.float32, torch.device("cpu"))
        values = torch.arange(80.0).view(8, 10)

        def write_and_read(index):
            for _ in range(4):
                run = Runs(10 * index, 10)
                storage.commit(run, values[index : index + 1])
                assert torch.equal(storage.read(run)[0], values[index])

        workers = [threading.Thread(target=write_and_read, args=(index,)) for index in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert torch.equal(storage.read(Runs(0, 80))[0], values.flatten())


def test_an_error_in_a_strip_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(ConvolvedRows, "add_rows", lambda *_: 1 // 0)
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        decode(make_decoder(), *latents((16, 6)))


@pytest.mark.parametrize("workers", [2, 8, 64])
@pytest.mark.parametrize("width", [256, 1024, 8192])
def test_memory_of_wide_maps_is_bounded(monkeypatch, workers, width):
    """The strips of all threads take at most 512 MiB or as much as the map, or there is one thread."""
    height, channels = 512, 128
    x = FeatureMap(channels, height, width, MemoryStorage(torch.empty(0)))
    values, map_bytes = working_memory.convolution_values(channels, channels), height * width * channels * 4
    seen = record_calls(monkeypatch, strips, "run_in_threads", lambda _, function, spans, count: (spans, count))
    run = strips.Strips(MapStore(x.dtype, torch.device("cpu")), None, working_memory.CPU_MEMORY._replace(workers=workers))
    run.run(lambda first, last: None, x, values)
    ((spans, count),) = seen
    rows = max(last - first for first, last in spans) + HALO
    assert rows >= 4 + HALO
    limit = max(512 << 20, map_bytes)
    assert count == 1 or count * rows * values * width * 4 <= limit
    assert count == workers or (count + 1) * rows * values * width * 4 > limit
