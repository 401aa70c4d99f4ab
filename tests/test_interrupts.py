"""Interrupted runs lose no finished image: every image is written as it is made."""

import pyarrow.parquet as pq
import pytest
from shard_files import (
    GRIDS,
    SIZES,
    file_names,
    npy_bytes,
    read_tar,
    run_decode,
    size_columns,
    write_code_file,
    write_parquet,
    write_tar,
)

from movq_ext.bulk.batches import BatchDecoder
from movq_ext.bulk.find import find_shards
from movq_ext.bulk.run import decode_shard

FORMATS = ["safetensors", "parquet", "tar"]


def write_shard(model, folder, form):
    """Write GRIDS as a shard and return its path."""
    if form == "safetensors":
        return write_code_file(model, folder / "x.safetensors")
    if form == "parquet":
        return write_parquet(folder / "x.parquet", **size_columns(), name=[str(i) for i in range(len(SIZES))])
    return write_tar(folder / "x.tar", [(f"{i}.npy", npy_bytes(grid)) for i, grid in enumerate(GRIDS)])


def read_images(out, form):
    """Return the PNGs of a finished shard, in the order of GRIDS."""
    if form == "safetensors":
        return [(out / f"{i}.png").read_bytes() for i in range(len(SIZES))]
    if form == "parquet":
        return pq.read_table(out / "x.parquet")["image"].to_pylist()
    return list(read_tar(out / "x.tar").values())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_an_interrupted_shard_resumes(model, model_folder, tmp_path, monkeypatch, capsys, form, error):
    """The images decoded before an interrupt or error are written and counted, and the next run decodes only the others."""
    source, out, progress, real = write_shard(model, tmp_path, form), tmp_path / "out", [], BatchDecoder.decode
    (whole,) = find_shards([write_shard(model, tmp_path / "whole", form)], tmp_path / "expected")
    calls = []

    def decode(self, codes):
        calls.append(len(codes))
        if len(calls) == 4:
            raise error("stop")
        return real(self, codes)

    from movq_ext.bulk.batches import Settings

    decoder = BatchDecoder(Settings(model_folder, "cpu"))
    decode_shard(whole, decoder)
    monkeypatch.setattr(BatchDecoder, "decode", decode)
    with pytest.raises(error):
        decode_shard(find_shards([source], out)[0], decoder, progress.append)
    assert sum(progress) == 3
    assert run_decode(model_folder, source, "-o", out) == 0
    assert "decoded 3, already there 3, failed 0" in capsys.readouterr().out and len(calls) == 4 + 3
    assert read_images(out, form) == read_images(tmp_path / "expected", form)
    assert file_names(out) == file_names(tmp_path / "expected")
