"""Options of the encode command, and runs that end early or overlap."""

import os
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from image_folders import write_image
from PIL import Image
from shard_files import AWAY_FROM_SOURCE, file_names, read_tar, run_decode
from spies import record_calls

from movq_ext.bulk import code_output
from movq_ext.bulk.code_output import ShardFolder, SingleFile
from movq_ext.bulk.codebook import Codebook
from movq_ext.cli import main
from movq_ext.io.codes import CodeFile, encode_image
from movq_ext.io.files import content_hash
from movq_ext.io.images import load_image

IMAGES = 12
DIE_AFTER_SEVEN = """
import os, signal, sys
from movq_ext.bulk import image_encoder
from movq_ext.cli import main
images, encode_image = [], image_encoder.encode_image
def encode_or_die(model, image, max_memory):
    images.append(image)
    if len(images) > 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_image(model, image)
image_encoder.encode_image = encode_or_die
main(sys.argv[1:])
"""
STOP_AFTER_SEVEN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_DFL)" + DIE_AFTER_SEVEN.replace("SIGKILL", "SIGTERM")
RUN = "import sys; from movq_ext.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def photos(tmp_path):
    for i in range(IMAGES):
        write_image(tmp_path / f"photos/{i:02}.png", seed=i)
    return tmp_path / "photos"


def arguments(model_folder, photos, out, *more):
    return [*map(str, ("encode", photos, "-o", out, "--model", model_folder, "--device", "cpu", *more))]


def start(script, *arguments):
    command = [sys.executable, "-P", "-c", script, *arguments]
    pipe, env = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, env=env, cwd=AWAY_FROM_SOURCE, text=True)


@pytest.mark.parametrize("form", ["safetensors", "webdataset", "parquet"])
def test_decode_reads_what_encode_wrote(model_folder, photos, tmp_path, capsys, form):
    """The images are those of a single code file, whatever the format."""
    assert main(arguments(model_folder, photos, tmp_path / "codes.safetensors")) == 0
    assert run_decode(model_folder, tmp_path / "codes.safetensors", "-o", tmp_path / "expected") == 0
    shards, out = tmp_path / "codes", tmp_path / "out"
    capsys.readouterr()
    for count in (f"encoded {IMAGES}, already there 0", f"encoded 0, already there {IMAGES}"):
        assert main(arguments(model_folder, photos, shards, "--format", form, "--shard-size", 5)) == 0
        assert capsys.readouterr().out == f"{count}, failed 0\n"
    suffix = {"webdataset": ".tar"}.get(form, f".{form}")
    assert file_names(shards) == [f"codes-0000{i}{suffix}" for i in range(3)]
    assert run_decode(model_folder, shards, "-o", out) == 0
    if form == "parquet":
        tables = [pq.read_table(path).to_pydict() for path in sorted(out.iterdir())]
        found = {name: png for table in tables for name, png in zip(table["name"], table["image"], strict=True)}
    elif form == "webdataset":
        found = {name: png for path in out.iterdir() for name, png in read_tar(path).items() if name.endswith(".png")}
    else:
        found = {name.partition("/")[2]: (out / name).read_bytes() for name in file_names(out)}
    assert found == {name: (tmp_path / "expected" / name).read_bytes() for name in file_names(tmp_path / "expected")}


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_a_folder_of_decoded_images_has_no_codes(model_folder, photos, tmp_path, capsys, form):
    """Images that decode wrote to the output folder do not count as encoded."""
    assert main(arguments(model_folder, photos, tmp_path / "codes", "--format", form)) == 0
    assert run_decode(model_folder, tmp_path / "codes", "-o", tmp_path / "out") == 0
    capsys.readouterr()
    assert main(arguments(model_folder, photos, tmp_path / "out", "--format", form)) == 0
    assert capsys.readouterr().out == f"encoded {IMAGES}, already there 0, failed 0\n"


def test_a_killed_run_resumes(model_folder, photos, tmp_path, capsys):
    """Nothing is encoded twice, and nothing is lost."""
    command = arguments(model_folder, photos, tmp_path / "codes", "--shard-size", 5)
    process = start(DIE_AFTER_SEVEN, *command)
    process.communicate(timeout=120)
    assert process.returncode == -9 and file_names(tmp_path / "codes") == [".unfinished.jsonl", "codes-00000.safetensors"]
    assert main(command) == 0
    assert capsys.readouterr().out == "encoded 5, already there 7, failed 0\n"
    files = [CodeFile.load(path) for path in sorted((tmp_path / "codes").glob("*.safetensors"))]
    assert [name for file in files for name in file.codes] == [f"photos/{i:02}.png" for i in range(IMAGES)]
    assert not list((tmp_path / "codes").glob(".*"))


@pytest.mark.parametrize("out", ["codes", "codes.safetensors"])
def test_sigterm_writes_the_encoded_images(model_folder, photos, tmp_path, capsys, out):
    command = arguments(model_folder, photos, tmp_path / out)
    process = start(STOP_AFTER_SEVEN, *command)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143 and "terminated; run the same command again to continue" in error
    path = tmp_path / out / "codes-00000.safetensors" if out == "codes" else tmp_path / out
    assert len(CodeFile.load(path).codes) == 7 and not list(path.parent.glob(".*"))
    assert main(command) == 0
    assert capsys.readouterr().out == "encoded 5, already there 7, failed 0\n"


def test_the_output_may_be_a_link(model_folder, photos, tmp_path, monkeypatch):
    """The file that it points to is written, keeps its permissions, and is locked under each of its names."""
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "codes.safetensors", tmp_path / "there/codes.safetensors"
    link.symlink_to(file)
    assert main(arguments(model_folder, photos / "00.png", link)) == 0
    file.chmod(0o600)
    journals = record_calls(monkeypatch, code_output, "Journal", lambda journal, path, out: path)
    assert main(arguments(model_folder, photos, link)) == main(arguments(model_folder, photos, file)) == 0
    assert journals == [file.with_name(".codes.safetensors.unfinished.jsonl")] * 2
    assert link.is_symlink() and len(CodeFile.load(file).codes) == IMAGES and file.stat().st_mode & 0o777 == 0o600
    assert file_names(tmp_path / "there") == ["codes.safetensors"]


@pytest.mark.parametrize("out", ["codes", "codes.safetensors"])
def test_a_second_run_waits_for_the_first(model, model_folder, photos, tmp_path, out):
    """It then encodes what the first has not."""
    codebook = Codebook.from_model(model)
    with ShardFolder(tmp_path / out, codebook, ".tar") if out == "codes" else SingleFile(tmp_path / out, codebook) as output:
        process = start(RUN, *arguments(model_folder, photos, tmp_path / out))
        while "waiting until it ends" not in (line := process.stderr.readline()):
            assert line, "the process ended"
        for i in range(4):
            image = load_image(photos / f"{i:02}.png")
            output.add(f"photos/{i:02}.png", encode_image(model, image), image.size, content_hash(photos / f"{i:02}.png"))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and printed == f"encoded {IMAGES - 4}, already there 4, failed 0\n"


def test_an_error_that_names_the_file_has_no_prefix(model_folder, photos, tmp_path, capsys):
    (photos / "05.png").write_bytes(b"not an image")
    assert main(arguments(model_folder, photos, tmp_path / "codes")) == 1
    assert f"error: cannot read {photos}/05.png: " in capsys.readouterr().err


def test_an_image_above_max_pixels_is_listed_and_skipped(model_folder, photos, tmp_path, capsys, monkeypatch):
    """The others are encoded. A larger limit than Pillow's is obeyed too."""
    Image.new("RGB", (9, 7)).save(photos / "05.png")
    assert main(arguments(model_folder, photos, tmp_path / "codes", "--max-pixels", 62)) == 1
    printed = capsys.readouterr()
    assert printed.out == f"encoded {IMAGES - 1}, already there 0, failed 1\n"
    assert f"error: cannot read {photos}/05.png: expected at most 62 pixels, got 9 x 7 (width x height)\n" in printed.err
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    assert main(arguments(model_folder, photos, tmp_path / "codes", "--max-pixels", 63)) == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_running_out_of_memory_fails_one_image(model_folder, photos, tmp_path, capsys, monkeypatch, error):
    def encode_small(model, image, max_memory):
        if image.width > 4:
            raise error
        return encode_image(model, image)

    monkeypatch.setattr("movq_ext.bulk.image_encoder.encode_image", encode_small)
    Image.new("RGB", (9, 7)).save(photos / "05.png")
    assert main(arguments(model_folder, photos, tmp_path / "codes")) == 1
    printed = capsys.readouterr()
    assert printed.out == f"encoded {IMAGES - 1}, already there 0, failed 1\n"
    assert f"error: {photos}/05.png: {str(error) or 'MemoryError'}\n" in printed.err


def test_a_full_disk_stops_the_run(model_folder, photos, tmp_path, capsys, monkeypatch):
    """Such an error concerns every image, so the run stops."""

    def full(journal, *image):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("movq_ext.bulk.journal.Journal.append", full)
    assert main(arguments(model_folder, photos, tmp_path / "codes")) == 2
    assert len(re.findall("error: .*No space left on device", capsys.readouterr().err)) == 1


@pytest.mark.parametrize(("out", "more", "message"), [
    ("x.tar", (), "expected -o to be a folder or a .safetensors file, got .*x.tar: pass a folder and --format"),
    ("x.safetensors", ("--shard-size", 5), "--shard-size and --format are for shards: expected -o to be a folder, got .*x.saf"),
    ("x.safetensors", ("--format", "parquet"), "--shard-size and --format are for shards: expected -o to be a folder, got "),
])  # fmt: skip
def test_options_that_contradict_each_other(model_folder, photos, tmp_path, capsys, out, more, message):
    assert main(arguments(model_folder, photos, tmp_path / out, *more)) == 2
    assert re.search(f"error: {message}", capsys.readouterr().err)
    assert file_names(tmp_path) == [f"photos/{i:02}.png" for i in range(IMAGES)]


def test_parquet_without_pyarrow(model_folder, photos, tmp_path, capsys, monkeypatch):
    """It is noticed before the first image is encoded."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("movq_ext.bulk.image_encoder.encode_image", lambda *_: pytest.fail("encoded an image"))
    assert main(arguments(model_folder, photos, tmp_path / "codes", "--format", "parquet")) == 2
    assert "Parquet files need pyarrow" in capsys.readouterr().err


def test_too_many_images_for_one_file(model_folder, photos, tmp_path, capsys, monkeypatch):
    """It is noticed before the first image is encoded."""
    monkeypatch.setattr("movq_ext.io.codes.MAX_HEADER_BYTES", 1500)
    monkeypatch.setattr("movq_ext.bulk.image_encoder.encode_image", lambda *_: pytest.fail("encoded an image"))
    assert main(arguments(model_folder, photos, tmp_path / "x.safetensors")) == 2
    assert "x.safetensors cannot hold 12 images" in capsys.readouterr().err


def test_an_existing_file_without_suffix_is_a_code_file(model_folder, photos, tmp_path):
    """Older versions wrote to any name."""
    assert main(arguments(model_folder, photos / "00.png", tmp_path / "x.safetensors")) == 0
    (tmp_path / "x.safetensors").rename(tmp_path / "x")
    assert main(arguments(model_folder, photos, tmp_path / "x")) == 0
    assert len(CodeFile.load(tmp_path / "x").codes) == IMAGES
