import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from shard_files import CODES, file_names, modification_times, random_codes

from movq_ext.bulk import code_output
from movq_ext.bulk.code_output import ShardFolder, SingleFile
from movq_ext.bulk.code_writers import WRITERS, read_image_hashes
from movq_ext.bulk.codebook import Codebook
from movq_ext.io.codes import CodeFile

BOOK = Codebook("book", CODES, 2)
SIZE = (8, 8)


def add(output, numbers):
    for i in numbers:
        output.add(f"{i}.png", torch.from_numpy(random_codes(SIZE, seed=i)), SIZE, f"hash {i}")


def images_by_file(folder):
    """Return the sorted numbers of the images in each file of a folder."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return {path.name: sorted(int(name[:-4]) for name in read_image_hashes(path, BOOK)) for path in paths}


@contextmanager
def file_size_limit(size):
    """Let writes fail with "File too large" beyond a size in bytes, as a full disk does with "No space left on device"."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_and_die(function):
    """Run a function in another process, which is then killed."""
    if (process := os.fork()) == 0:
        try:
            function()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("suffix", WRITERS)
def test_shards_of_a_bounded_number_of_images(tmp_path, suffix):
    """A second run adds shards and leaves the finished ones alone. Formats may be mixed."""
    with ShardFolder(tmp_path, BOOK, suffix, 3) as output:
        add(output, range(7))
    expected = {f"codes-00000{suffix}": [0, 1, 2], f"codes-00001{suffix}": [3, 4, 5], f"codes-00002{suffix}": [6]}
    assert images_by_file(tmp_path) == expected
    before = modification_times(tmp_path)
    with ShardFolder(tmp_path, BOOK, ".safetensors", 3) as output:
        assert [i for i in range(9) if output.holds(f"{i}.png", f"hash {i}")] == list(range(7))
        add(output, [7, 8])
    assert images_by_file(tmp_path) == {**expected, "codes-00003.safetensors": [7, 8]}
    assert {path: modification_times(tmp_path)[path] for path in before} == before
    assert not list(tmp_path.glob(".*"))


def test_a_shard_also_ends_at_a_number_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(code_output, "MAX_SHARD_BYTES", 2 * 4 * 16)
    with ShardFolder(tmp_path, BOOK, ".tar") as output:
        add(output, range(5))
    assert list(images_by_file(tmp_path).values()) == [[0, 1], [2, 3], [4]]


def test_a_shard_also_ends_where_its_header_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("movq_ext.io.codes.MAX_HEADER_BYTES", 1000)
    with ShardFolder(tmp_path, BOOK, ".safetensors") as output:
        add(output, range(7))
    assert list(images_by_file(tmp_path).values()) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_killed_process_loses_nothing(tmp_path, suffix):
    """The next run writes the images of its unfinished shard. It may have another shard size and format."""

    def add_eight():
        with ShardFolder(tmp_path, BOOK, ".safetensors", 5) as output:
            add(output, range(8))
            os.kill(os.getpid(), signal.SIGKILL)

    run_and_die(add_eight)
    assert images_by_file(tmp_path) == {"codes-00000.safetensors": [0, 1, 2, 3, 4]}
    with ShardFolder(tmp_path, BOOK, suffix, 2) as output:
        assert all(output.holds(f"{i}.png", f"hash {i}") for i in range(8))
        expected = {"codes-00000.safetensors": [0, 1, 2, 3, 4], f"codes-00001{suffix}": [5, 6]}
        assert images_by_file(tmp_path) == expected
    assert images_by_file(tmp_path) == {**expected, f"codes-00002{suffix}": [7]}


def test_killed_processes_leave_no_short_shards(tmp_path):
    """Each run continues the unfinished shard."""

    def add_one():
        with ShardFolder(tmp_path, BOOK, ".safetensors", 3) as output:
            add(output, [len(output.hashes)])
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(5):
        run_and_die(add_one)
    with ShardFolder(tmp_path, BOOK, ".safetensors", 3) as output:
        assert all(output.holds(f"{i}.png", f"hash {i}") for i in range(5))
    assert list(images_by_file(tmp_path).values()) == [[0, 1, 2], [3, 4]]


def test_a_process_killed_before_it_clears_the_journal(tmp_path, monkeypatch):
    """The images of the journal are in a shard already: they are not written twice."""

    def die_after_the_first_shard():
        with ShardFolder(tmp_path, BOOK, ".safetensors", 2) as output:
            monkeypatch.setattr(code_output.Journal, "clear", lambda journal: os.kill(os.getpid(), signal.SIGKILL))
            add(output, range(5))

    for suffix in WRITERS:
        (
            tmp_path / f".codes-00000{suffix}.0123456789abcdef.output.partial"
        ).touch()  # from a process that was killed while it wrote
    run_and_die(die_after_the_first_shard)
    with ShardFolder(tmp_path, BOOK, ".safetensors", 2) as output:
        add(output, range(2, 5))
    assert list(images_by_file(tmp_path).values()) == [[0, 1], [2, 3], [4]]
    assert file_names(tmp_path) == sorted(images_by_file(tmp_path))


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_full_disk_loses_nothing(tmp_path, suffix):
    """Neither the journal nor the shard can be written."""
    output, journal = ShardFolder(tmp_path, BOOK, suffix, 50), tmp_path / ".unfinished.jsonl"
    add(output, range(70))
    message = rf"cannot write .*codes-00001\{suffix}; its images are in {journal} for the next run: .*File too large"
    with pytest.raises(OSError, match=message), file_size_limit(1000), output:
        with file_size_limit(journal.stat().st_size + 50), pytest.raises(OSError, match=r"\.jsonl: File too large"):
            add(output, [70])
    assert images_by_file(tmp_path) == {f"codes-00000{suffix}": list(range(50))}
    with ShardFolder(tmp_path, BOOK, suffix, 50) as output:
        assert [i for i in range(100) if output.holds(f"{i}.png", f"hash {i}")] == list(range(70))
        add(output, range(70, 100))
    assert sorted(i for numbers in images_by_file(tmp_path).values() for i in numbers) == list(range(100))


def test_an_exception_keeps_what_was_added(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardFolder(tmp_path, BOOK, ".tar") as output:
        add(output, range(2))
        raise KeyboardInterrupt
    assert images_by_file(tmp_path) == {"codes-00000.tar": [0, 1]}


def test_another_image_of_the_same_name(tmp_path):
    for _ in range(2):
        with ShardFolder(tmp_path, BOOK, ".parquet") as output:
            if not output.holds("0.png", "hash 0"):
                add(output, [0])
            with pytest.raises(ValueError, match=r"^0\.png is already there with other contents: encode to another output"):
                output.holds("0.png", "hash 1")


@pytest.mark.parametrize("name", ["../a.png", "\udcff.png", "a\0.png"])
def test_invalid_names_are_refused_before_the_image_is_encoded(tmp_path, name):
    with ShardFolder(tmp_path, BOOK, ".safetensors") as output, pytest.raises(ValueError, match="expected an image name"):
        output.holds(name, "")


def test_shards_of_another_codebook_and_damaged_ones_are_refused(tmp_path):
    with ShardFolder(tmp_path, BOOK, ".safetensors") as output:
        add(output, [0])
    with pytest.raises(ValueError, match="was made with codebook book, but the model has other"):
        ShardFolder(tmp_path, Codebook("other", CODES, 2), ".safetensors")
    (tmp_path / "codes-00001.tar").write_bytes(b"x")
    for _ in range(2):  # the lock was released
        with pytest.raises(ValueError, match=r"codes-00001\.tar is damaged"):
            ShardFolder(tmp_path, BOOK, ".safetensors")


def test_subfolders_count_as_encoded(tmp_path):
    """They do not change the numbers of the shards."""
    with ShardFolder(tmp_path / "gpu1", BOOK, ".tar") as output:
        add(output, [0])
    with ShardFolder(tmp_path, BOOK, ".tar") as output:
        assert output.holds("0.png", "hash 0")
        add(output, [1])
    assert file_names(tmp_path) == ["codes-00000.tar", "gpu1/codes-00000.tar"]


def test_a_single_file_is_written_once(tmp_path, monkeypatch):
    def save(file, path):
        saved.append(len(file.codes))
        file.save(path)

    path, saved = tmp_path / "x.safetensors", []
    monkeypatch.setattr(code_output, "save_codes", save)
    for numbers in (range(100), range(100, 102), []):
        with SingleFile(path, BOOK) as output:
            add(output, numbers)
    assert saved == [100, 102] and len(CodeFile.load(path).codes) == 102
    assert file_names(tmp_path) == ["x.safetensors"]


def test_a_hash_without_codes_does_not_count_as_encoded(tmp_path):
    file = CodeFile(BOOK.fingerprint, hashes={"0.png": "hash 0"})
    file.add("1.png", torch.from_numpy(random_codes(SIZE)), SIZE)
    file.save(tmp_path / "x.safetensors")
    with SingleFile(tmp_path / "x.safetensors", BOOK) as output:
        assert not output.holds("0.png", "hash 0") and output.holds("1.png", "hash 1")


def test_a_single_file_survives_a_kill(tmp_path):
    def add_two():
        with SingleFile(tmp_path / "x.safetensors", BOOK) as output:
            add(output, range(2))
            os.kill(os.getpid(), signal.SIGKILL)

    run_and_die(add_two)
    with SingleFile(tmp_path / "x.safetensors", BOOK) as output:
        assert output.holds("1.png", "hash 1")
    assert list(CodeFile.load(tmp_path / "x.safetensors").codes) == ["0.png", "1.png"]


def test_too_many_images_for_a_single_file(tmp_path):
    """safetensors reads headers of at most 100 MB."""
    with SingleFile(tmp_path / "x.safetensors", BOOK) as output:
        output.require_room(f"{i:100}" for i in range(100_000))
        with pytest.raises(ValueError, match=r"x\.safetensors cannot hold 660000 images: .* choose a folder"):
            output.require_room(f"{i}.png" for i in range(660_000))


def test_a_library_error_becomes_an_os_error(tmp_path):
    """safetensors has errors of its own."""
    with file_size_limit(200), pytest.raises(OSError, match="cannot write"):
        with SingleFile(tmp_path / "x.safetensors", BOOK) as output:
            output._file.add("big", torch.zeros(100, 100), (200, 200))
            output._changed = True
