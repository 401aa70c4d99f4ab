import logging
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shard_files import CODES, png_pixels, random_codes, read_rejects, run_decode, write_parquet
from spies import record_calls
from tolerances import relative_error

from movq_ext import from_pretrained, save_pretrained
from movq_ext.bulk import batches, parquet
from movq_ext.bulk.batches import BatchDecoder, Settings
from movq_ext.bulk.shards import Sample
from movq_ext.io.codes import decode_image
from movq_ext.model import autoencoder


def decode_in_order(decoder, samples):
    """Return the images of samples, or None, in the samples' order."""
    images = {sample.name: image for sample, image in decoder.decode_samples(samples)}
    return [images[sample.name] for sample in samples]


def samples_of(sizes):
    return [Sample(str(i), torch.from_numpy(random_codes(size, i)), size) for i, size in enumerate(sizes)]


def test_batches(decoder, model, monkeypatch):
    """A batch has as many grids of one size as fit in memory, and every image matches a decode of that grid alone."""
    monkeypatch.setattr(decoder, "device", torch.device("meta"))  # anything but a CPU
    monkeypatch.setattr(decoder, "max_memory", 3 * decoder.image_bytes((4, 4)) + 1)
    batches, decode = [], decoder.decode

    def decode_on_cpu(codes):
        batches.append(tuple(codes.shape))
        decoder.device = torch.device("cpu")
        images = decode(codes)
        decoder.device = torch.device("meta")
        return images

    monkeypatch.setattr(decoder, "decode", decode_on_cpu)
    sizes = [(8, 8), (7, 7), (4, 4), (8, 7), (8, 8), (8, 8), (3, 3)]
    samples = samples_of(sizes)
    samples.insert(1, Sample("bad", problem="no codes"))
    found = decode_in_order(decoder, samples)
    assert len(found) == len(samples)
    assert batches == [(3, 4, 4), (2, 4, 4), (2, 2, 2)]
    assert found.pop(1) is None and samples.pop(1).problem == "no codes"
    for sample, image in zip(samples, found, strict=True):
        got, single = (np.asarray(image, float) for image in (image, decode_image(model, sample.codes, sample.size)))
        assert np.abs(got - single).max() <= 1


@pytest.mark.parametrize("in_strips", [False, True])
def test_autocast(decoder, monkeypatch, in_strips):
    """A caller's autocast reaches whole images and images in strips."""
    monkeypatch.setattr(decoder, "max_memory", decoder.image_bytes((32, 32)) - in_strips)
    tiled = record_calls(monkeypatch, autoencoder, "decode_tiled", lambda *_, **__: True)
    (sample,) = samples_of([(64, 64)])
    expected = decoder.decode(sample.codes[None])
    tiled.clear()
    with torch.autocast("cpu", torch.bfloat16):
        image = decoder.decode(sample.codes[None])
    assert bool(tiled) == in_strips
    assert image.dtype == torch.bfloat16
    assert relative_error(image, expected) < 5e-2


def test_out_of_memory(decoder, monkeypatch, caplog):
    """Half the batch, then one image, then strips, then an error. The reduced budget is remembered, for its grid size alone."""
    monkeypatch.setattr(decoder, "device", torch.device("meta"))
    monkeypatch.setattr(decoder, "max_memory", 5 * decoder.image_bytes((4, 4)))
    monkeypatch.setattr(decoder, "reduced_budgets", {})
    tried, room = [], 2

    def decode(codes):
        tried.append(len(codes))
        if codes.shape[1] == 4 and len(codes) > room:
            if decoder.image_bytes((4, 4)) > decoder.budget((4, 4)):  # in strips
                if decoder.budget((4, 4)) < 2000:
                    raise ValueError("max_memory must be at least 2000 bytes")
                raise torch.OutOfMemoryError("again")
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(len(codes), 3, 8, 8)

    def empty_cache():
        assert sys.exc_info() == (None, None, None)  # a live exception's traceback keeps tensors in memory

    monkeypatch.setattr(decoder, "decode", decode)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    with caplog.at_level(logging.WARNING):
        assert all(decode_in_order(decoder, samples_of([(8, 8)] * 5)))
        assert tried == [5, 2, 2, 1] and "out of memory decoding 5 images of 4 x 4 codes" in caplog.text
        decode_in_order(decoder, samples_of([(8, 8)] * 4))
        assert tried[4:] == [2, 2]
        room = 0
        found = decode_in_order(decoder, samples := samples_of([(8, 8), (6, 6), (6, 6)]))
    assert found[0] is None and "max_memory must be at least" in samples[0].problem
    assert all(found[1:]) and tried[-1] == 2


def test_out_of_memory_on_a_cpu(decoder, monkeypatch):
    """torch has no exception class for it. One image is retried with less and less memory, then fails; the others are decoded."""
    monkeypatch.setattr(decoder, "reduced_budgets", {})
    real, budgets = decoder.decode, []

    def decode(codes):
        if codes.shape[1] == 8:
            budgets.append(decoder.budget((8, 8)))
            if budgets[-1] >= 2000:
                torch.empty(1 << 60, dtype=torch.uint8)
            raise ValueError("max_memory must be at least 2000 bytes")
        return real(codes)

    monkeypatch.setattr(decoder, "decode", decode)
    found = decode_in_order(decoder, samples := samples_of([(8, 8), (16, 16), (8, 8)]))
    assert [image is not None for image in found] == [True, False, True]
    assert "max_memory must be at least" in samples[1].problem
    assert len(budgets) > 2 and budgets == sorted(budgets, reverse=True)


def test_max_memory_option(model_folder, tmp_path):
    """--max-memory is kept by decoding in strips, which changes no pixel by more than rounding."""
    big = pa.array([np.random.default_rng(0).integers(0, CODES, (48, 32)).tolist()])
    source = write_parquet(tmp_path / "x.parquet", big)
    for out, *limit in (("whole",), ("strips", "--max-memory", "1M"), ("refused", "--max-memory", "1K")):
        assert run_decode(model_folder, source, "-o", tmp_path / out, *limit) == (out == "refused")
    tables = [pq.read_table(tmp_path / out / "x.parquet") for out in ("whole", "strips")]
    whole, strips = (png_pixels(table["image"][0].as_py()).astype(int) for table in tables)
    assert np.abs(whole - strips).max() <= 1
    assert "max_memory must be at least" in read_rejects(tmp_path / "refused/x.parquet.rejects.jsonl")[0]["reason"]


def test_an_image_above_the_budget_is_decoded_in_strips(decoder, monkeypatch):
    limits = []

    def decode(quantised, max_memory):
        limits.append(max_memory)
        return torch.zeros(1)

    monkeypatch.setattr(decoder.model, "decode", decode)
    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    for limit in (decoder.image_bytes((4, 4)), decoder.image_bytes((4, 4)) - 1):
        monkeypatch.setattr(decoder, "max_memory", limit)
        decoder.decode(codes)
    assert limits == [None, limit]


def test_an_image_that_is_not_finite(model_folder, tmp_path):
    broken = from_pretrained(model_folder)
    broken.quantize.embedding.weight.data[5] = float("nan")
    save_pretrained(broken, tmp_path / "broken")
    source = write_parquet(tmp_path / "x.parquet", pa.array([[[1, 2]], [[1, 5]], [[2, 1]]]))
    assert run_decode(tmp_path / "broken", source, "-o", tmp_path / "out") == 1
    assert pq.read_table(tmp_path / "out/x.parquet").num_rows == 2
    assert "NaN or infinity" in read_rejects(tmp_path / "out/x.parquet.rejects.jsonl")[0]["reason"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_on_a_gpu(model_folder, model, dtype):
    decoder = BatchDecoder(Settings(model_folder, "cuda", dtype))
    assert decoder.batch_size((4, 4)) > 100
    samples = samples_of([(8, 8)] * 7)
    for sample, image in zip(samples, decode_in_order(decoder, samples), strict=True):
        single = np.asarray(decode_image(model, sample.codes, sample.size), float)
        assert np.abs(np.asarray(image) - single).max() <= (1 if dtype == torch.float32 else 8)


@pytest.mark.parametrize(
    "owner, step, error",
    [
        (batches, "to_image", MemoryError()),
        (batches, "to_image", torch.OutOfMemoryError("CUDA out of memory")),
        (batches, "to_image", RuntimeError("can't allocate memory")),
        (Image.Image, "save", MemoryError()),
    ],
)
def test_out_of_memory_after_the_decode(model_folder, tmp_path, monkeypatch, owner, step, error):
    """In the conversion to pixels or to PNG, it rejects one image rather than ending all shards."""
    calls = []

    def fail_second(real):
        def call(*args, **kwargs):
            calls.append(None)
            if len(calls) == 2:
                raise error
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(owner, step, fail_second(getattr(owner, step)))
    write_parquet(tmp_path / "in/x.parquet", pa.array([[[1, 2]], [[3, 4]], [[5, 6]]]))
    write_parquet(tmp_path / "in/y.parquet", pa.array([[[1, 2]]]))
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 1
    assert pq.read_table(tmp_path / "out/x.parquet").num_rows == 2 and pq.read_table(tmp_path / "out/y.parquet").num_rows == 1
    (reject,) = read_rejects(tmp_path / "out/x.parquet.rejects.jsonl")
    assert reject["reason"].startswith("ran out of memory for ") and "2 x 4 " in reject["reason"]


def test_out_of_memory_for_codes(model_folder, tmp_path, monkeypatch):
    """It rejects the sample, or, in the reader, fails the shard."""

    class Huge(np.ndarray):
        def astype(self, dtype):
            raise MemoryError

    def raise_memory_error(*args):
        raise MemoryError

    source, to_array = write_parquet(tmp_path / "x.parquet", pa.array([[[1, 2]], [[3]]])), parquet._to_array
    monkeypatch.setattr(parquet, "_to_array", lambda codes: array.view(Huge) if (array := to_array(codes)).size == 2 else array)
    assert run_decode(model_folder, source, "-o", tmp_path / "sample") == 1
    (reject,) = read_rejects(tmp_path / "sample/x.parquet.rejects.jsonl")
    assert reject["reason"] == "ran out of memory for 1 x 2 codes"
    monkeypatch.setattr(parquet, "_parse_row", raise_memory_error)
    assert run_decode(model_folder, source, "-o", tmp_path / "shard") == 2
    (reject,) = read_rejects(tmp_path / "shard/x.parquet.rejects.jsonl")
    assert reject["name"] is None and reject["reason"].endswith("x.parquet: MemoryError")
