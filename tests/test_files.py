from shard_files import file_names

from movq_ext.io.files import atomic_write, remove_partial_files


def test_partial_files_of_killed_processes(tmp_path):
    for name in (".x.parquet.12.34.partial", ".y.parquet.12.34.partial", ".x.parquet", "x.parquet.12.34.partial"):
        (tmp_path / name).touch()
    remove_partial_files([tmp_path / "x.parquet", tmp_path / "gone/x.parquet"])
    assert file_names(tmp_path) == [".x.parquet", ".y.parquet.12.34.partial", "x.parquet.12.34.partial"]


def test_the_longest_names(tmp_path):
    """The partial file of the longest name that a file can have is written, and found if its process was killed."""
    path, left = tmp_path / f"{'é' * 125}.png", tmp_path / "left"
    with atomic_write(path) as partial:
        partial.write_text("whole")
        left.hardlink_to(partial)
        name = partial.name
    left.rename(tmp_path / name)
    remove_partial_files([path])
    assert file_names(tmp_path) == [path.name] and path.read_text() == "whole"
