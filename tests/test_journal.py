import os
import threading

import pytest
import torch
from shard_files import CODES, SIZES, random_codes

from movq_ext.bulk.codebook import Codebook
from movq_ext.bulk.journal import Journal

BOOK = Codebook("book", CODES, 2)


def append(journal, numbers):
    for i in numbers:
        codes = torch.from_numpy(random_codes(SIZES[i], seed=i))
        journal.append("book", f"a/{i}\n\u00fc.png", codes, SIZES[i], f"hash {i}")


def recover(path):
    journal = Journal(path, path)
    try:
        return journal, journal.recover(BOOK)
    finally:
        journal.close()


def test_append_and_recover(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, path)
    append(journal, range(6))
    journal.close()
    _, file = recover(path)
    assert list(file.codes) == [f"a/{i}\n\u00fc.png" for i in range(6)]
    for i, (name, codes) in enumerate(file.codes.items()):
        assert codes.tolist() == random_codes(SIZES[i], seed=i).tolist()
        assert file.sizes[name] == SIZES[i] and file.hashes[name] == f"hash {i}"


def test_a_file_cut_anywhere_loses_the_incomplete_image_alone(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, path)
    append(journal, range(3))
    journal.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        journal = Journal(path, path)
        complete = sum(line_end <= end for line_end in ends)
        assert len(journal.recover(BOOK).codes) == complete
        append(journal, [5])  # after the last complete line
        journal.close()
        assert len(recover(path)[1].codes) == complete + 1


@pytest.mark.parametrize("line", [
    b"\0" * 100 + b"\n", b"[1]\n", b"{}\n", b"[" * 100_000 + b"\n", b"\xff\n",
    b'{"codebook":"book","name":"../x","size":[2,2],"source_hash":"","codes":[[1]]}\n',
    b'{"codebook":"book","name":"x","size":[2,2],"source_hash":"","codes":[[1.5]]}\n',
    b'{"codebook":"book","name":"x","size":[2,2],"source_hash":"","codes":[[99]]}\n',
    b'{"codebook":"book","name":"x","size":[2,2],"source_hash":"","codes":[[1],[2,3]]}\n',
    b'{"codebook":"book","name":"x","size":2,"source_hash":"","codes":[[1]]}\n',
])  # fmt: skip
def test_damaged_lines_are_skipped(tmp_path, caplog, line):
    """The lines after them are not."""
    path = tmp_path / "journal"
    journal = Journal(path, path)
    append(journal, [0])
    journal.close()
    path.write_bytes(path.read_bytes() + line)
    journal = Journal(path, path)
    append(journal, [1, 2])
    journal.close()
    assert len(recover(path)[1].codes) == 3
    assert f"{path}: skipped damaged lines: 1;" in caplog.text and "incomplete" not in caplog.text


def test_an_incomplete_last_line_is_deleted(tmp_path, caplog):
    path = tmp_path / "journal"
    journal = Journal(path, path)
    append(journal, [0, 1])
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert len(recover(path)[1].codes) == 1 and path.read_bytes() == whole[: whole.index(b"\n") + 1]
    assert f"{path}: deleted an incomplete last line" in caplog.text and "damaged" not in caplog.text


@pytest.mark.parametrize("other", [Codebook("other", CODES, 2), Codebook("other", 1, 2), Codebook("other", CODES, 8)])
def test_another_codebook_is_refused(tmp_path, other):
    """Even if its codebook is smaller or its cells are larger, so that the codes do not fit it."""
    path = tmp_path / "journal"
    journal = Journal(path, path)
    append(journal, [0])
    journal.close()
    journal = Journal(path, path)
    with pytest.raises(ValueError, match="journal was made with codebook book, but the model has other"):
        journal.recover(other)
    journal.close()
    assert len(recover(path)[1].codes) == 1


@pytest.mark.parametrize("end", ["close", "delete"])
def test_a_second_process_waits(tmp_path, caplog, end):
    """Even if the first deletes the file that the second waits for. A third then waits for the second."""
    path, opened = tmp_path / "journal", []
    first = Journal(path, tmp_path)
    threads = [threading.Thread(target=lambda: opened.append(Journal(path, tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: f"another process is writing to {tmp_path}: waiting until it ends" in caplog.text)
    threads[0].join(0.1)
    assert not opened
    getattr(first, end)()
    for number in (1, 2):
        wait_until(lambda number=number: len(opened) == number)
        threads[0].join(0.1)
        assert len(opened) == number and path.exists()
        getattr(opened[-1], end)()
    for thread in threads:
        thread.join()
    assert path.exists() == (end == "close")


def wait_until(condition):
    deadline = threading.Event()
    for _ in range(500):
        if condition():
            return
        deadline.wait(0.02)
    raise AssertionError("timed out")


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def no_locks(file, operation):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr("movq_ext.bulk.journal.fcntl.flock", no_locks)
    Journal(tmp_path / "journal", tmp_path).delete()
    assert "cannot lock" in caplog.text and "do not let two processes write" in caplog.text


def test_images_of_more_pixels_than_the_default(tmp_path):
    """They are recovered if encode was asked for them."""
    size = (1 << 14, 1 << 13)
    codes = torch.zeros(size[0] // 1024, size[1] // 1024, dtype=torch.int32)
    for max_pixels, names in [(1 << 27, ["large"]), (1 << 26, [])]:
        book = Codebook("book", CODES, 1024, max_pixels)
        journal = Journal(tmp_path / "j", tmp_path)
        journal.append("book", "large", codes, size, "hash")
        assert list(journal.recover(book).codes) == names
        journal.clear()
        journal.close()
