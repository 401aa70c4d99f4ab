"""What every mode of image looks like in RGB. Images go through files, since readers differ in what they report."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from movq_ext.io.images import ImageError, load_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RED_IS_GREEN = SRGB.replace(b"rXYZ", b"tmp ").replace(b"gXYZ", b"rXYZ").replace(b"tmp ", b"gXYZ")
BRIGHTER = SRGB.replace(bytes.fromhex("00026666"), bytes.fromhex("00010000"))  # a gamma of 1 instead of 2.4
NEARLY_SRGB = SRGB.replace(bytes.fromhex("00026666"), bytes.fromhex("00026a00"))  # a gamma of 2.414
GREY = BRIGHTER.replace(b"RGB XYZ", b"GRAYXYZ").replace(b"rTRC", b"kTRC")


def load(image, path, background="white", **options):
    image.save(path, **options)
    return np.asarray(load_image(path, background)).tolist()


def write_tiff(path, values, bits, sample_format=1, photometric=1, bands=1):
    """Write a grey or RGB TIFF of one strip, without Pillow."""
    height, width = values.shape[:2]
    tags = {
        256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: bands, 278: height, 279: values.nbytes,
        339: sample_format,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.tobytes() + directory)


# --- Transparency


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_colours_are_composited_on_the_background(tmp_path, suffix):
    red = np.array([[[255, 0, 0, 0], [255, 0, 0, 51], [255, 0, 0, 255]]], dtype=np.uint8)
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    assert load(Image.fromarray(red), path, **options) == [[[255, 255, 255], [255, 204, 204], [255, 0, 0]]]
    assert load(Image.fromarray(red), path, "#0000ff", **options) == [[[0, 0, 255], [51, 0, 204], [255, 0, 0]]]


def palette_image(*pixels):
    image = Image.new("P", (len(pixels), 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata(pixels)
    return image


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("image", "suffix", "transparency", "expected"), [
    (Image.new("LA", (1, 1), (80, 0)), "png", None, [255, 255, 255]),
    (Image.new("LA", (1, 1), (80, 255)), "png", None, [80, 80, 80]),
    (palette_image(0, 1), "png", 0, [255, 255, 255]),
    (palette_image(1, 0), "png", 0, [0, 255, 0]),
    (palette_image(0, 1), "png", b"\x33\xff", [255, 204, 204]),
    (palette_image(0, 1), "gif", 0, [255, 255, 255]),
    (Image.new("RGB", (1, 1), (1, 2, 3)), "png", (1, 2, 3), [255, 255, 255]),
    (Image.new("RGB", (1, 1), (1, 2, 3)), "png", (1, 2, 4), [1, 2, 3]),
    (Image.new("L", (1, 1), 7), "png", 7, [255, 255, 255]),
    (Image.new("L", (1, 1), 7), "png", 8, [7, 7, 7]),
    (Image.new("1", (1, 1), 0), "png", 0, [255, 255, 255]),
    (Image.fromarray(np.array([[257]], dtype=np.uint16)), "png", 257, [255, 255, 255]),
    (Image.fromarray(np.array([[257]], dtype=np.uint16)), "png", 258, [1, 1, 1]),
])  # fmt: skip
def test_every_kind_of_transparency(tmp_path, image, suffix, transparency, expected):
    options = {} if transparency is None else {"transparency": transparency}
    assert load(image, tmp_path / f"a.{suffix}", **options)[0][0] == expected


# --- Range


@pytest.mark.parametrize(("values", "bits", "photometric"), [
    (np.array([[0, 32768, 65535]], "<u2"), 16, 1),
    (np.array([[65535, 32767, 0]], "<u2"), 16, 0),  # white is zero
    (np.array([[255, 127, 0]], "u1"), 8, 0),
    (np.frombuffer(bytes.fromhex("000800fff0"), "u1")[None], 12, 1),  # 0, 2048, 4095
])  # fmt: skip
def test_integers_are_scaled_by_what_a_tiff_says(tmp_path, values, bits, photometric):
    write_tiff(tmp_path / "a.tif", np.resize(values, (1, 3)) if bits != 12 else values, bits, photometric=photometric)
    if bits == 12:  # the strip is 5 bytes wide, the image 3 pixels
        data = (tmp_path / "a.tif").read_bytes()
        (tmp_path / "a.tif").write_bytes(data.replace(struct.pack("<HHII", 256, 4, 1, 5), struct.pack("<HHII", 256, 4, 1, 3)))
    assert np.asarray(load_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 128, 255]


def test_floats_are_scaled_from_0_to_1(tmp_path):
    values = np.array([[0, 0.5, 1]], dtype=np.float32)
    assert load(Image.fromarray(values), tmp_path / "a.tif") == [[[0] * 3, [128] * 3, [255] * 3]]
    (tmp_path / "a.pfm").write_bytes(b"Pf\n3 1\n-1.0\n" + values.tobytes())
    assert np.asarray(load_image(tmp_path / "a.pfm"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("values", "message"), [
    (np.float32([[0, 255]]), r"expected floats in \[0, 1\], got floats in \[0, 255\]"),
    (np.float32([[-0.5, 1]]), r"expected floats in \[0, 1\], got floats in \[-0.5, 1\]"),
    (np.float32([[0, np.nan]]), r"expected floats in \[0, 1\], got floats in \[nan, nan\]"),
    (np.int32([[0, 255]]), "expected unsigned integers, got signed integers of 32 bits"),
    (np.int16([[0, 255]]), "expected unsigned integers, got signed integers of 16 bits"),
    (np.int8([[0, 100]]), "expected unsigned integers, got signed integers of 8 bits"),
    (np.uint32([[0, 2**32 - 1]]), "expected integers of up to 16 bits, got 32 bits"),
])  # fmt: skip
def test_values_of_unknown_range_are_refused(tmp_path, values, message):
    sample_format = {"f": 3, "i": 2, "u": 1}[values.dtype.kind]
    write_tiff(tmp_path / "a.tif", values, 8 * values.dtype.itemsize, sample_format)
    with pytest.raises(ImageError, match=rf"cannot read .*a.tif: ValueError: {message}"):
        load_image(tmp_path / "a.tif")


# --- Colours


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_colour_profiles_are_applied(tmp_path, suffix):
    path, options = tmp_path / f"a.{suffix}", {"lossless": True} if suffix == "webp" else {}
    assert load(Image.new("RGB", (1, 1), "red"), path, icc_profile=RED_IS_GREEN, **options) == [[[0, 255, 0]]]
    assert load_image(path).info == {}  # saving it must not write the old profile
    assert load(Image.new("RGBA", (1, 1), (255, 0, 0, 51)), path, icc_profile=RED_IS_GREEN, **options) == [[[204, 255, 204]]]


@pytest.mark.parametrize(("mode", "profile"), [("RGB", BRIGHTER), ("P", BRIGHTER), ("L", GREY), ("LA", GREY)])
def test_profiles_of_every_mode(tmp_path, mode, profile):
    assert load(Image.new("L", (1, 1), 128).convert(mode), tmp_path / "a.png", icc_profile=profile) == [[[192] * 3]]


PROFILES_WITHOUT_EFFECT = {
    "sRGB": SRGB, "nearly sRGB": NEARLY_SRGB, "junk": b"junk", "cut": SRGB[:300], "of another mode": GREY,
}  # fmt: skip


@pytest.mark.parametrize("profile", PROFILES_WITHOUT_EFFECT.values(), ids=PROFILES_WITHOUT_EFFECT)
def test_profiles_that_change_nothing(tmp_path, profile):
    """sRGB's own would only add rounding errors, and viewers ignore an invalid one."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    assert load(Image.fromarray(pixels), tmp_path / "a.png", icc_profile=profile) == pixels.tolist()


def test_cmyk(tmp_path):
    for suffix in ("jpg", "tif"):
        cyan = load(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), tmp_path / f"a.{suffix}")
        assert np.abs(np.array(cyan) - [0, 255, 255]).max() <= 1
