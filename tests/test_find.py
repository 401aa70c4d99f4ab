"""Which shards are found, and where their images go."""

import os

import pytest
from image_folders import deny_reading
from shard_files import file_names, read_rejects, run_decode, size_columns, write_parquet

from movq_ext.bulk.find import find_shards


def test_find_shards(tmp_path):
    write_parquet(tmp_path / "in/a.parquet")
    (tmp_path / "in/notes.txt").touch()
    (tmp_path / "in/_hidden.parquet").touch()
    (tmp_path / "in/.b.parquet.1.2.partial").touch()
    (tmp_path / "codes/x").mkdir(parents=True)
    for name in ("x.safetensors", "x/y.safetensors"):  # x/y/a.jpg in the first and a.jpg in the second would share a path
        (tmp_path / "codes" / name).touch()
    assert [shard.source.name for shard in find_shards([tmp_path / "in"], tmp_path / "out")] == ["a.parquet"]
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    for inputs, out, error, message in [
        ([tmp_path / "missing"], "out", FileNotFoundError, "no such file: .*missing"),
        ([tmp_path / "empty"], "out", ValueError, r"empty has no shards \(.parquet, .tar, .tar.gz, .tgz, .npz, .safetensors\)"),
        ([tmp_path / "pipe.tar"], "out", OSError, "expected a regular file, got a folder, pipe or device"),
        ([tmp_path / "in"], "in", ValueError, "output .* is inside input"),
        ([tmp_path / "in"], "in/deep/er", ValueError, "output .* is inside input"),
        ([tmp_path / "in", tmp_path / "in/a.parquet"], "out", ValueError, "would both be written to .*a.parquet"),
        ([tmp_path / "codes"], "out", ValueError, "codes/x/y.safetensors would be written to .*, among the images of "),
    ]:
        with pytest.raises(error, match=message):
            find_shards(inputs, tmp_path / out)
    with pytest.raises(ValueError, match="would be overwritten by its own images"):
        find_shards([tmp_path / "in/a.parquet"], tmp_path / "in")


def test_hidden_folders_and_links(model_folder, tmp_path, caplog):
    """Hidden folders are skipped, links to folders are followed once, and a dangling link is reported."""
    for name in ("split=train/a", "_delta_log/b", ".cache/deep/c"):
        write_parquet(tmp_path / f"in/{name}.parquet")
    (tmp_path / "in/dangling.parquet").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in/circle").symlink_to(tmp_path / "in")
    write_parquet(tmp_path / "elsewhere/d.parquet")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/README.md").touch()
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 1
    assert file_names(tmp_path / "out") == ["dangling.parquet.rejects.jsonl", "linked/d.parquet", "split=train/a.parquet"]
    assert "no such file" in read_rejects(tmp_path / "out/dangling.parquet.rejects.jsonl")[0]["reason"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/in: ignored 4: hidden 2, .md 1, links to folders already searched 1"
    ]


def test_an_unreadable_folder(tmp_path, monkeypatch):
    write_parquet(tmp_path / "in/a.parquet")
    (tmp_path / "in/closed").mkdir()
    deny_reading(monkeypatch, "closed")
    with pytest.raises(PermissionError, match="closed"):
        find_shards([tmp_path / "in"], tmp_path / "out")


def test_images_never_overwrite_another_input(tmp_path):
    for name in ("out/a", "in/a"):
        write_parquet(tmp_path / f"{name}/x.parquet")
    inputs = [tmp_path / "out/a/x.parquet", tmp_path / "in"]
    for order in (inputs, inputs[::-1]):
        with pytest.raises(ValueError, match=r"out/a/x.parquet would be overwritten by the images of .*in/a/x.parquet"):
            find_shards(order, tmp_path / "out")


@pytest.mark.parametrize("link, target", [("results", "out"), ("x.parquet", "out/x.parquet"), ("results", "out/deep")])
def test_a_link_from_the_input_to_the_output(tmp_path, link, target):
    write_parquet(tmp_path / "in/a.parquet")
    write_parquet(tmp_path / "out/x.parquet")
    write_parquet(tmp_path / "out/deep/y.parquet")
    (tmp_path / "in" / link).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"is a link into output .*: the next run would read the images as codes"):
        find_shards([tmp_path / "in"], tmp_path / "out")


def test_an_input_folder_inside_the_output(tmp_path):
    write_parquet(tmp_path / "codes/a.parquet")
    assert [shard.target for shard in find_shards([tmp_path / "codes"], tmp_path)] == [tmp_path / "a.parquet"]


def test_what_cannot_be_read_is_reported_and_the_rest_decoded(model_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/mount").symlink_to(tmp_path / "nowhere")
    assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 2
    assert f"cannot follow link: {tmp_path}/in/mount" in capsys.readouterr().err
    write_parquet(tmp_path / "in/a.parquet", **size_columns())
    (tmp_path / "in/closed").mkdir()
    deny_reading(monkeypatch, "closed")
    for _ in range(2):
        assert run_decode(model_folder, tmp_path / "in", "-o", tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert f"cannot follow link: {tmp_path}/in/mount" in error and "in/closed" in error
    assert file_names(tmp_path / "out") == ["a.parquet"]
