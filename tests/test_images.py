import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from movq_ext.io import images
from movq_ext.io.images import ImageError, has_later_frames, load_image, pad_to_multiple, save_image, to_image, to_tensor


def pixels(height=5, width=7, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pixels_survive_the_round_trip():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    x = to_tensor(Image.fromarray(every))
    assert x.shape == (3, 16, 16) and x.min() == -1 and x.max() == 1
    assert np.array_equal(np.asarray(to_image(x)), every)


def test_values_are_clamped_and_nan_is_refused():
    assert np.asarray(to_image(torch.full((3, 1, 1), 7.0))).max() == 255
    with pytest.raises(ValueError, match="expected finite pixel values, got NaN or infinity"):
        to_image(torch.full((3, 1, 1), float("nan")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode in ("CMYK", "I;16") else "png"
    image = Image.fromarray(pixels()[..., 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(pixels()).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    loaded = load_image(tmp_path / f"a.{suffix}")
    assert (loaded.mode, loaded.size) == ("RGB", (7, 5))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(load_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_orientation_is_applied_once(tmp_path, suffix):
    image = Image.fromarray(pixels())
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    options = {"lossless": True} if suffix == "webp" else {}
    image.save(tmp_path / f"turned.{suffix}", exif=exif, **options)
    loaded = load_image(tmp_path / f"turned.{suffix}")
    assert loaded.size == (5, 7)
    if suffix != "jpg":
        assert np.array_equal(np.asarray(loaded), np.rot90(pixels(), -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels()).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), expected)


def exif_bytes(*entries):
    """An EXIF block with these (tag, type, count, value)."""
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("entry", [
    (0x0112, 2, 2, 54), (0x0112, 5, 1, 9999), (0x0112, 3, 2, 6), (0x0112, 11, 1, 6), (0x0112, 200, 1, 6), (0x0112, 4, 1, 2**31),
    (0x011A, 2, 2, 54), (0x8769, 9, 1, 2**32 - 1), (0xA005, 2, 1, 6), (0x014A, 11, 1, 6), (0x0111, 5, 1, 6),
])  # fmt: skip
def test_exif_data_of_wrong_types_are_ignored(tmp_path, suffix, entry):
    """The orientation beside them is applied."""
    path, options = tmp_path / f"a.{suffix}", {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(pixels()).save(path, exif=exif_bytes(entry), **options)
    assert load_image(path).size in ((7, 5), (5, 7))
    if entry[0] != 0x0112:
        Image.fromarray(pixels()).save(path, exif=exif_bytes((0x0112, 3, 1, 6), entry), **options)
        assert load_image(path).size == (5, 7)


@pytest.mark.parametrize("tag", [0x02BC, 0x8773])
@pytest.mark.parametrize("kind", [2, 3, 4, 11])
def test_tiff_metadata_of_wrong_types_are_ignored(tmp_path, tag, kind):
    """XMP and a colour profile."""
    directory = ImageFileDirectory_v2()
    directory[0x0112], directory.tagtype[tag] = 6, kind
    directory[tag] = "text" if kind == 2 else 7
    Image.fromarray(pixels()).save(tmp_path / "a.tif", tiffinfo=directory)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.tif")), np.rot90(pixels(), -1))


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_the_first_frame_is_read_and_others_are_noticed(tmp_path, suffix):
    first, *others = (Image.new("RGB", (4, 4), colour) for colour in ("white", "red", "black"))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    assert np.asarray(load_image(tmp_path / f"a.{suffix}")).min() == 255
    assert has_later_frames(tmp_path / f"a.{suffix}")
    first.save(tmp_path / f"b.{suffix}")
    assert not has_later_frames(tmp_path / f"b.{suffix}")


@pytest.mark.parametrize("damaged", [1, 2])
def test_damaged_later_pages_do_not_hide_the_first(tmp_path, damaged):
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("white", "red", "black")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    contents = bytearray((tmp_path / "a.tif").read_bytes())
    directory = 4  # the position of the first directory's offset
    for _ in range(damaged):
        (start,) = struct.unpack_from("<I", contents, directory)
        directory = start + 2 + 12 * struct.unpack_from("<H", contents, start)[0]
    (start,) = struct.unpack_from("<I", contents, directory)
    (tmp_path / "a.tif").write_bytes(contents[: start + 5])
    assert load_image(tmp_path / "a.tif").size == (4, 4)
    assert has_later_frames(tmp_path / "a.tif") is (damaged == 2)


def test_later_pages_are_not_read(tmp_path, monkeypatch):
    pages = [Image.new("L", (1, 1))] * 9
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    seek, frames = TiffImageFile._seek, []
    monkeypatch.setattr(TiffImageFile, "_seek", lambda image, frame: (frames.append(frame), seek(image, frame))[1])
    assert has_later_frames(tmp_path / "a.tif") and max(frames) == 1


def test_a_photograph_with_a_depth_map_has_one_frame(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (2, 2))])
    assert load_image(tmp_path / "a.jpg").size == (4, 4) and not has_later_frames(tmp_path / "a.jpg")


@pytest.mark.parametrize("kept", [0, 1, 20, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_damaged_images_are_refused(tmp_path, kept, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels(64, 64)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(OSError):
        load_image(path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.fromarray(pixels(100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"cannot read .*bomb.png: expected at most 200 pixels\. Image size "):
        load_image(tmp_path / "bomb.png")


def tiny_webp(width, height):
    """A lossless WebP without pixels."""
    frame = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(9)
    chunk = b"VP8L" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "mpo", "png", "ppm", "tif", "webp"])
@pytest.mark.parametrize("read", [load_image, has_later_frames])
def test_the_size_is_checked_before_pixels_are_decoded(tmp_path, monkeypatch, suffix, read):
    """Of animations and rotated images too."""
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    first, options = Image.new("RGB", (30, 20)), {"save_all": True, "append_images": [Image.new("RGB", (30, 20), "red")]}
    first.save(path, exif=exif, **(options if suffix in ("gif", "mpo", "png", "tif", "webp") else {}))
    read(path, max_pixels=600)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    with pytest.raises(ImageError, match=r"cannot read .*: expected at most 599 pixels, got (30 x 20|20 x 30) "):
        read(path, max_pixels=599)


def test_the_second_frame_of_a_gif_takes_no_memory(tmp_path, monkeypatch):
    """It may be larger than the first one."""

    def frame(side):
        return b"\x21\xf9\x04\x08\0\0\0\0\x2c" + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\0"

    header = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    (tmp_path / "a.gif").write_bytes(header + frame(1) + frame(9999) + b"\x3b")
    allocated, fill = [], Image.core.fill
    monkeypatch.setattr(Image.core, "fill", lambda mode, size, color: allocated.append(size) or fill(mode, size, color))
    assert load_image(tmp_path / "a.gif").size == (1, 1) and has_later_frames(tmp_path / "a.gif")
    assert max(allocated, default=(0, 0)) <= (1, 1)


def test_a_small_file_that_claims_many_pixels(tmp_path, recwarn):
    (tmp_path / "a.webp").write_bytes(tiny_webp(16383, 10923))
    with pytest.raises(ImageError, match="expected at most 67108864 pixels, got 16383 x 10923"):
        load_image(tmp_path / "a.webp")
    assert not recwarn.list


@pytest.mark.parametrize(("size", "padded"), [((1, 1), (8, 8)), ((8, 16), (8, 16)), ((9, 7), (16, 8))])
def test_padding_repeats_the_border(size, padded):
    x = torch.randn(1, 3, *size)
    out = pad_to_multiple(x, 8)
    assert out.shape[2:] == padded
    assert torch.equal(out[:, :, : size[0], : size[1]], x)
    assert torch.equal(out[:, :, -1, -1], x[:, :, -1, -1])


def test_save_image(tmp_path, monkeypatch):
    path, array = tmp_path / "a.png", pixels()
    save_image(Image.fromarray(array), path)
    assert np.array_equal(np.asarray(load_image(path)), array) and path.stat().st_mode & 0o400

    def disk_full(image, partial, format):
        partial.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_image(Image.fromarray(pixels(seed=1)), path)
    assert np.array_equal(np.asarray(load_image(path)), array) and list(tmp_path.iterdir()) == [path]


# --- Untrusted files


def png(width, height):
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(10**6))),
        (b"IEND", b""),
    ]
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("size", [(2**31 - 1, 1), (1, 2**31 - 1), (65536, 65536), (0, 0)])
def test_impossible_sizes_are_refused(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png(*size))
    with pytest.raises(ImageError, match=r"cannot read .*a.png: "):
        load_image(tmp_path / "a.png")


def test_loading_an_image_starts_no_program(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("Ghostscript was started"))
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: pytest.fail("Ghostscript was started"))
    with pytest.raises(ImageError, match="cannot identify image file"):
        load_image(tmp_path / "a.png")


def test_every_error_of_pillow_becomes_an_image_error(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for error in (
        struct.error("x"),
        MemoryError(),
        OverflowError("x"),
        KeyError("x"),
        zlib.error("x"),
        RecursionError("x"),
        OSError("x"),
    ):
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ImageError, match=f"cannot read .*a.png: {type(error).__name__}: "):
            load_image(tmp_path / "a.png")


@pytest.mark.parametrize("strip_pixels", [1, 20, 35, 1 << 22])
def test_images_are_converted_in_strips(monkeypatch, strip_pixels):
    monkeypatch.setattr(images, "STRIP_PIXELS", strip_pixels)
    x = torch.linspace(-1.2, 1.2, 3 * 5 * 7).view(3, 5, 7)
    expected = (x.clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0)
    assert np.array_equal(np.asarray(to_image(x)), expected.numpy())
    x[1, 4, 3] = float("nan")
    with pytest.raises(ValueError, match="expected finite pixel values, got NaN or infinity"):
        to_image(x)
