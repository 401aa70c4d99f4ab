"""Write codes in the formats that decode reads, and read which images such a file holds."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from ..io.codes import CodeFile, read_hashes
from ..io.files import atomic_write, max_expanded_bytes, parse_json, require_file, wrap_errors
from .codebook import CODEBOOK_KEY, Codebook
from .parquet_reader import import_pyarrow, open_parquet
from .shards import ShardError
from .webdataset import WebDatasetShard

HASH_KEY = "source_hash"  # in Parquet and JSON: the content_hash of the file that an image was encoded from
ROW_GROUP_ROWS = 1024


def save_codes(file: CodeFile, path: Path) -> None:
    """Write codes atomically, in the format of the path's suffix. A file with an unknown suffix becomes a code file."""
    WRITERS.get(path.suffix, CodeFile.save)(file, path)


def read_image_hashes(path: Path, codebook: Codebook) -> dict[str, str]:
    """Return the hash of every image that encode stored in a file, by name. The hash is "" if the file does not have it.

    Raises OSError if the file cannot be read, and ValueError if it is damaged or was made with another codebook.
    """
    require_file(path)
    return _READERS[path.suffix.lower()](path, codebook)


def _read_code_file(path: Path, codebook: Codebook) -> dict[str, str]:
    fingerprint, hashes = read_hashes(path)
    codebook.check_fingerprint(fingerprint, path)
    return hashes


def _save_tar(file: CodeFile, path: Path) -> None:
    keys: set[str] = set()
    with atomic_write(path) as partial, tarfile.open(partial, "w") as tar:
        for name, codes in file.codes.items():
            keys.add(key := _sample_key(name, keys))
            height, width = file.sizes[name]
            metadata = {"name": name, "height": height, "width": width, HASH_KEY: file.hashes.get(name, "")}
            npy = io.BytesIO()
            np.save(npy, codes.numpy())
            contents = {"npy": npy.getvalue(), "json": json.dumps({**metadata, CODEBOOK_KEY: file.codebook}).encode()}
            for extension, data in contents.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _sample_key(name: str, keys: set[str]) -> str:
    """Return a key that is not in keys: the image's name without its suffix. A key must have no dot after its last slash."""
    path = PurePosixPath(name)
    key = str(path.with_name(path.stem.replace(".", "_")))
    if key in keys:  # a.jpg and a.png
        key = str(path.with_name(path.name.replace(".", "_")))
    while key in keys:
        key += "_"
    return key


def _read_tar(path: Path, codebook: Codebook) -> dict[str, str]:
    hashes = {}
    for sample in WebDatasetShard(path, path).samples(codebook):
        if "json" in sample.payload:
            with wrap_errors(ShardError, f"{path}: the .json of {sample.name} cannot be read"):
                metadata = parse_json(sample.payload["json"].decode())
            if isinstance(metadata, dict) and CODEBOOK_KEY in metadata:
                codebook.check_fingerprint(metadata[CODEBOOK_KEY], path)
                if not sample.problem:  # the sample has codes, rather than an image that decode wrote
                    hashes[str(metadata.get("name"))] = str(metadata.get(HASH_KEY, ""))
    return hashes


def _save_parquet(file: CodeFile, path: Path) -> None:
    pa, pq = import_pyarrow()
    grids = [codes.numpy() for codes in file.codes.values()]
    values = pa.array(np.concatenate([grid.ravel() for grid in grids]))
    rows = pa.ListArray.from_arrays(_offsets([grid.shape[1] for grid in grids for _ in grid]), values)
    columns = {
        "name": pa.array(file.codes, pa.string()),
        "height": pa.array([file.sizes[name][0] for name in file.codes], pa.int32()),
        "width": pa.array([file.sizes[name][1] for name in file.codes], pa.int32()),
        HASH_KEY: pa.array([file.hashes.get(name, "") for name in file.codes], pa.string()),
        "codes": pa.ListArray.from_arrays(_offsets([len(grid) for grid in grids]), rows),
    }
    table = pa.table(columns, metadata={CODEBOOK_KEY: file.codebook})
    with atomic_write(path) as partial, open(partial, "wb") as output:  # pyarrow opens no path that is not UTF-8
        pq.write_table(table, output, row_group_size=ROW_GROUP_ROWS)
        if table.nbytes > max_expanded_bytes(output.tell()) // 2:  # images of one colour; readers refuse such a file
            output.seek(0)
            output.truncate()
            pq.write_table(table, output, row_group_size=ROW_GROUP_ROWS, use_dictionary=False)


def _offsets(lengths: list[int]) -> np.ndarray:
    """Return where each list starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _read_parquet(path: Path, codebook: Codebook) -> dict[str, str]:
    with open_parquet(path) as (schema, batches):
        fingerprint = (schema.metadata or {}).get(CODEBOOK_KEY.encode())
        if fingerprint is None or "codes" not in schema.names:  # not from encode, or images that decode wrote
            return {}
        codebook.check_fingerprint(fingerprint.decode(errors="replace"), path)
        hashes: dict[str, str] = {}
        for batch in batches:
            with wrap_errors(ShardError, f"{path} is damaged or not a Parquet file"):
                hashes.update(zip(batch["name"].to_pylist(), batch[HASH_KEY].to_pylist(), strict=True))
    return hashes


WRITERS: dict[str, Callable[[CodeFile, Path], None]] = {
    ".safetensors": CodeFile.save,
    ".tar": _save_tar,
    ".parquet": _save_parquet,
}
_READERS: dict[str, Callable[[Path, Codebook], dict[str, str]]] = {
    ".safetensors": _read_code_file,
    ".tar": _read_tar,
    ".parquet": _read_parquet,
}
