import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from spies import record_calls

from movq_ext.io.files import (
    MAX_JSON_CHARACTERS,
    atomic_write,
    parse_json,
    path_to_text,
    printable,
    read_json,
    remove_partial_files,
    require_file,
    text_to_path,
    wrap_errors,
)

THREADS = 8
WRITE_UNTIL_KILLED = """
import sys
from movq_ext.io.files import atomic_write
with atomic_write(sys.argv[1]):
    print(flush=True)
    input()
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- atomic_write


def test_the_new_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == tmp_path
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/a.txt'") as raised,
        atomic_write(tmp_path / "a.txt") as partial,
    ):
        partial.write_text("new")
    assert raised.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_contents_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        fsync(descriptor)
        calls.append(("fsync", os.fstat(descriptor).st_size))

    def recorded_replace(old, new):
        replace(old, new)
        calls.append(("replace", new.stat().st_size))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("whole")
    assert calls == [("fsync", 5), ("replace", 5)]


@pytest.mark.parametrize("mask", [0o027, 0o077])
def test_a_private_file_gets_the_permissions_of_the_umask(tmp_path, mask):
    """Some libraries create files that only their owner can read."""
    old = os.umask(mask)
    try:
        with atomic_write(tmp_path / "a.txt") as partial:
            partial.unlink()
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(old)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o664])
def test_an_overwritten_file_keeps_its_permissions(tmp_path, monkeypatch, mode):
    """A private file is private from the start: whoever opens it before chmod could read what is written later."""
    path = tmp_path / "a.txt"
    path.touch()
    path.chmod(mode)
    created = record_calls(monkeypatch, os, "open", lambda result, path, flags, mode=None: mode if flags & os.O_CREAT else None)
    with atomic_write(path) as partial:
        assert [value for value in created if value is not None] == [0o600]
        assert partial.stat().st_mode & 0o777 == mode | 0o600
        partial.write_text("new")
    assert path.stat().st_mode & 0o777 == mode and path.read_text() == "new"


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_written_through(tmp_path, exists):
    """Atomically: the partial file is in the folder of the file that the link points to."""
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "a.txt", tmp_path / "there/b.txt"
    if exists:
        target.write_text("old")
    link.symlink_to("there/b.txt")
    with atomic_write(link) as partial:
        partial.write_text("new")
        assert partial.parent == target.parent and target.exists() is exists
    assert link.is_symlink() and target.read_text() == "new" and names(target.parent) == ["b.txt"]


def test_a_pipe_is_not_overwritten(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = "expected a regular file to overwrite, got a pipe or device: .*/pipe"
    with pytest.raises(OSError, match=message), atomic_write(tmp_path / "pipe"):
        pytest.fail("the block was entered")
    assert names(tmp_path) == ["pipe"]


def test_concurrent_writers(tmp_path, monkeypatch):
    """Readers always see one writer's complete file. The umask belongs to the process, so no writer may change it."""
    path, barrier = tmp_path / "a.bin", threading.Barrier(THREADS)
    old = os.umask(0o027)
    try:
        with monkeypatch.context() as patch, ThreadPoolExecutor(THREADS) as pool:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))

            def work(byte):
                barrier.wait()
                for _ in range(20):
                    with atomic_write(path) as partial, open(partial, "wb") as file:
                        for _ in range(10):
                            file.write(bytes([byte]) * 1000)
                    content = path.read_bytes()
                    assert len(content) == 10_000 and len(set(content)) == 1

            list(pool.map(work, range(THREADS)))
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640 and list(tmp_path.iterdir()) == [path]


# --- remove_partial_files


def test_only_partial_files_are_removed(tmp_path):
    """Other names, folders and links stay, without an error."""
    target = tmp_path / "target"
    target.touch()
    for name in (".x.a.b.partial", ".x.0123456789abcdef.partial", ".x.0123456789abcdeg.output.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".x.00000000000000aa.output.partial").mkdir()
    (tmp_path / ".x.00000000000000bb.output.partial").symlink_to(target)
    os.mkfifo(tmp_path / ".x.00000000000000cc.output.partial")
    before = names(tmp_path)
    remove_partial_files([tmp_path / "x"])
    assert [name for name in before if name not in names(tmp_path)] == [".x.00000000000000cc.output.partial"]


def test_partial_files_of_killed_processes(tmp_path):
    for name in (
        ".x.parquet.0123456789abcdef.output.partial",
        ".y.parquet.0123456789abcdef.output.partial",
        ".x.parquet",
        "x.parquet.0123456789abcdef.output.partial",
    ):
        (tmp_path / name).touch()
    remove_partial_files([tmp_path / "x.parquet", tmp_path / "gone/x.parquet"])
    assert names(tmp_path) == [
        ".x.parquet",
        ".y.parquet.0123456789abcdef.output.partial",
        "x.parquet.0123456789abcdef.output.partial",
    ]


@pytest.mark.parametrize("name", ["x.parquet", "link.parquet"])
def test_partial_files_of_living_processes_stay(tmp_path, name):
    """A partial file is locked as long as its writer lives. The writer may be another process, or a thread of this one."""
    (tmp_path / "link.parquet").symlink_to("x.parquet")
    command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(tmp_path / "x.parquet")]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
        atomic_write(tmp_path / "x.parquet") as partial,
    ):
        process.stdout.readline()
        living = names(tmp_path)
        assert partial.name in living and len(living) == 3
        remove_partial_files([tmp_path / name])
        assert names(tmp_path) == living
        process.kill()
        process.wait()
        remove_partial_files([tmp_path / name])
        assert names(tmp_path) == sorted([partial.name, "link.parquet"])
    assert names(tmp_path) == ["link.parquet", "x.parquet"]


def test_a_partial_file_that_is_removed_before_it_is_locked(tmp_path, monkeypatch):
    """Its writer creates another."""
    path, flock, locked = tmp_path / "x.parquet", fcntl.flock, []

    def remove_and_lock(descriptor, operation):
        locked.append(descriptor)
        if len(locked) == 1:
            remove_partial_files([path])
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with atomic_write(path) as partial:
        partial.write_text("whole")
    assert len(locked) == 3 and path.read_text() == "whole" and names(tmp_path) == ["x.parquet"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Every partial file counts as dead."""

    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with atomic_write(tmp_path / "x.parquet") as partial:
        partial.write_text("whole")
    (tmp_path / ".x.parquet.0123456789abcdef.output.partial").touch()
    remove_partial_files([tmp_path / "x.parquet"])
    assert names(tmp_path) == ["x.parquet"]


def test_the_longest_names(tmp_path):
    """The partial file's name fits the file system too, and remove_partial_files finds it."""
    path = tmp_path / f"{'é' * 125}.png"
    with atomic_write(path) as partial:
        partial.write_text("whole")
        name = partial.name
    (tmp_path / name).touch()  # of a killed process
    remove_partial_files([path])
    assert names(tmp_path) == [path.name] and path.read_text() == "whole"


# --- Safe reads


def test_require_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"no such file: .*a\.txt"):
        require_file(path)
    path.touch()
    require_file(path)
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(PermissionError("denied")))
    with pytest.raises(PermissionError, match="denied"):
        require_file(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_require_file_refuses_anything_else(tmp_path, kind):
    create = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}[kind]
    create(tmp_path / "a")
    with pytest.raises(OSError, match=r"expected a regular file, got a folder, pipe or device: .*/a"):
        require_file(tmp_path / "a")


def test_wrap_errors():
    with pytest.raises(ValueError) as raised, wrap_errors(ValueError, "a.bin is damaged"):
        raise KeyError("x")
    assert str(raised.value) == "a.bin is damaged: KeyError: 'x'"
    assert isinstance(raised.value.__cause__, KeyError)


def test_wrap_errors_passes_its_own_class():
    own = UnicodeError("own")
    with pytest.raises(ValueError, match="own") as raised, wrap_errors(ValueError, "a.bin is damaged"):
        raise own
    assert raised.value is own


def test_wrap_errors_does_not_catch_an_interruption():
    with pytest.raises(KeyboardInterrupt), wrap_errors(ValueError, "a.bin is damaged"):
        raise KeyboardInterrupt


def test_a_wrapped_reason_is_short_and_printable():
    with pytest.raises(ValueError, match="is damaged") as raised, wrap_errors(ValueError, "a.bin is damaged"):
        raise OSError("\x1b" + "x" * 10**5)
    assert len(str(raised.value)) < 400 and "\x1b" not in str(raised.value)


def test_parse_json():
    assert parse_json('{"a": [1, {"a": null}]}') == {"a": [1, {"a": None}]}
    for text, message in [("[1, 2]", "at most 5 characters"), ('{"a":1,"a":2}', "has a repeated key")]:
        with pytest.raises(ValueError, match=message):
            parse_json(text, 5 if "[" in text else 99)


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"é": 1}, ensure_ascii=False), encoding="utf-8")
    assert read_json(path) == {"é": 1}
    path.write_text("{}".ljust(MAX_JSON_CHARACTERS))
    assert read_json(path) == {}
    path.write_text("{}".ljust(MAX_JSON_CHARACTERS + 1))
    with pytest.raises(ValueError, match="at most 1048576 characters of JSON"):
        read_json(path)


def test_printable():
    assert printable("a\x1b\n\udcffé\u202e", 9) == "a\\x1b\n\\udcffé\\u202e" and printable("abc", 2) == "ab..."


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("name", ["a/b.png", "größe/é.png", "日本.png"])
def test_names_are_unicode_and_paths_follow_the_locale(monkeypatch, encoding, name):
    """A path has the bytes of UTF-8 under an ASCII locale too, so that codes and images have the same names on every machine."""
    on_disk = name.encode(encoding if encoding == "latin-1" and "日" not in name else "utf-8")
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode(encoding, "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda data: data.decode(encoding, "surrogateescape"))
    path = text_to_path(name)
    assert str(path).encode(encoding, "surrogateescape") == on_disk
    if (encoding, name) != ("latin-1", "日本.png"):
        assert path_to_text(path) == name


def test_names_that_are_not_unicode():
    assert path_to_text(text_to_path("a\udcff.png")) == "a\udcff.png"
    with pytest.raises(UnicodeEncodeError):
        text_to_path("a\ud800.png")
