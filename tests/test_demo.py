"""The demo as a function. test_cli.py tests what the command prints."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SMALL_MOVQ
from PIL import Image

from movq_ext import MOVQ, demo, from_pretrained
from movq_ext.demo import DEFAULT_PHOTO, PHOTOS, SMALL_MODEL_PATH, Quality, RoundTrip, round_trip, side_by_side
from movq_ext.io.codes import CodeFile, decode_image
from movq_ext.io.images import ImageError

DEMO_IMAGE = Path(__file__).resolve().parents[1] / "docs/images/demo.png"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MOVQ(**SMALL_MOVQ)


def image(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def uniform(height, width, value):
    return Image.new("RGB", (width, height), (value, value, value))


@pytest.mark.filterwarnings("error")  # scikit-image divides by zero if there is no error
@pytest.mark.parametrize(("first", "second", "psnr"), [
    (0, 255, 0.0),  # the largest possible error
    (100, 101, 48.130804),  # 20 log10(255)
    (50, 60, 28.130804),  # 20 log10(255 / 10)
    (7, 7, math.inf),
])  # fmt: skip
def test_psnr_of_uniform_images(first, second, psnr):
    assert Quality.compare(uniform(8, 8, first), uniform(8, 8, second)).psnr == pytest.approx(psnr, abs=1e-6)


@pytest.mark.parametrize(("first", "second"), [(100, 120), (0, 255), (7, 7)])
def test_ssim_of_uniform_images(first, second):
    """SSIM without variance reduces to its luminance term, (2ab + C) / (a^2 + b^2 + C) with C = (0.01 * 255)^2 = 6.5025."""
    expected = (2 * first * second + 6.5025) / (first**2 + second**2 + 6.5025)
    assert Quality.compare(uniform(9, 11, first), uniform(9, 11, second)).ssim == pytest.approx(expected, rel=1e-9)


def test_ssim_of_one_window():
    """For 7x7 pixels, a single window, SSIM is the formula of Wang et al. (2004) with sample covariances."""
    first, second = image(7, 7, 1), image(7, 7, 2)
    per_channel = []
    for channel in range(3):
        a, b = (np.asarray(picture, dtype=np.float64)[..., channel].ravel() for picture in (first, second))
        (variance_a, covariance), (_, variance_b) = np.cov(a, b)
        luminance = (2 * a.mean() * b.mean() + 6.5025) / (a.mean() ** 2 + b.mean() ** 2 + 6.5025)
        per_channel.append(luminance * (2 * covariance + 58.5225) / (variance_a + variance_b + 58.5225))
    assert Quality.compare(first, second).ssim == pytest.approx(np.mean(per_channel), abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (9, 2), (3, 3), (4, 40), (5, 5), (6, 6), (7, 7)], ids=str)
def test_small_images(model, tmp_path, shape):
    """SSIM needs a window of at least 3 pixels. It is NaN for smaller images; everything else works."""
    image(*shape).save(tmp_path / "photo.png")
    result = round_trip(model, tmp_path / "photo.png", tmp_path / "out")
    assert result.size == result.photo_size == (shape[1], shape[0])
    assert result.grid == tuple(-(-side // 2) for side in shape)
    assert math.isfinite(result.quality.psnr) and math.isnan(result.quality.ssim) == (min(shape) < 3)
    assert Quality.compare(image(*shape), image(*shape)).psnr == math.inf
    assert min(shape) < 3 or Quality.compare(image(*shape), image(*shape)).ssim == 1
    assert Image.open(tmp_path / "out/decoded.png").size == result.size


@pytest.mark.parametrize(("photo", "limit", "size"), [
    ((40, 20), 10, (10, 5)),  # (width, height)
    ((20, 40), 10, (5, 10)),
    ((40, 40), 16, (16, 16)),
    ((40, 20), 40, (40, 20)),
    ((40, 20), 4000, (40, 20)),  # never scaled up
    ((40, 1), 10, (10, 1)),
    ((40, 20), 1, (1, 1)),
])  # fmt: skip
def test_size(model, tmp_path, photo, limit, size):
    original = image(photo[1], photo[0])
    original.save(tmp_path / "photo.png")
    result = round_trip(model, tmp_path / "photo.png", tmp_path / "out", limit)
    assert (result.photo_size, result.size) == (photo, size)
    left = Image.open(tmp_path / "out/side_by_side.png").crop((0, 0, *size))
    assert np.array_equal(left, original if size == photo else original.resize(size, Image.Resampling.LANCZOS))


def test_bits():
    """64x48 pixels in cells of 8 pixels are 8 * 6 codes, here of 10 bits."""
    result = RoundTrip((64, 48), (64, 48), (6, 8), 3, 10, 0, 0, Quality(0, 0), 0, 0)
    assert result.code_bits == 480 and result.bits_per_pixel == 0.15625


@pytest.mark.parametrize(("codes", "bits"), [(2, 1), (3, 2), (64, 6), (65, 7)])
def test_bits_per_code(tmp_path, codes, bits):
    image(8, 8).save(tmp_path / "photo.png")
    assert round_trip(MOVQ(**{**SMALL_MOVQ, "n_embed": codes}), tmp_path / "photo.png", tmp_path / "out").bits_per_code == bits


def test_written_files(model, tmp_path):
    """The image is decoded from the codes in the file, and the reported sizes are those of the files."""
    original = image(20, 30)
    original.save(tmp_path / "photo.png")
    result = round_trip(model, tmp_path / "photo.png", tmp_path / "a/b")
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["codes.safetensors", "decoded.png", "side_by_side.png"]
    file = CodeFile.load(tmp_path / "a/b/codes.safetensors")
    codes, decoded = file.codes["photo.png"], Image.open(tmp_path / "a/b/decoded.png")
    assert tuple(codes.shape) == result.grid == (10, 15) and result.distinct_codes == len(set(codes.flatten().tolist()))
    assert np.array_equal(decoded, decode_image(model, codes, (20, 30)))
    assert result.quality == Quality.compare(original, decoded)
    assert result.code_file_bytes == (tmp_path / "a/b/codes.safetensors").stat().st_size
    assert result.png_bytes == (tmp_path / "photo.png").stat().st_size
    assert result.encode_seconds > 0 and result.decode_seconds > 0


def test_times_are_those_of_a_second_call(model, tmp_path, monkeypatch):
    """The first call on a machine takes longer: it loads libraries and chooses kernels."""
    calls, now = {"encode_image": 0, "decode_image": 0}, [0.0]
    monkeypatch.setattr(demo.time, "perf_counter", lambda: now[0])

    def slow_first_call(name):
        original = getattr(demo, name)

        def function(*args):
            calls[name] += 1
            now[0] += 100 if calls[name] == 1 else 1
            return original(*args)

        return function

    for name in calls:
        monkeypatch.setattr(demo, name, slow_first_call(name))
    image(8, 8).save(tmp_path / "photo.png")
    result = round_trip(model, tmp_path / "photo.png", tmp_path / "out")
    assert calls == {"encode_image": 2, "decode_image": 2}
    assert result.encode_seconds == result.decode_seconds == 1


def test_side_by_side():
    left, right = image(4, 3, 1), image(6, 5, 2)
    both = np.asarray(side_by_side(left, right, gap=2))
    assert both.shape == (6, 3 + 2 + 5, 3)
    assert np.array_equal(both[:4, :3], left) and np.array_equal(both[:, 5:], right)
    assert (both[4:, :3] == 255).all() and (both[:, 3:5] == 255).all()


def test_errors(model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "file").touch()
    image(8, 8).save(tmp_path / "photo.png")
    with pytest.raises(FileNotFoundError, match="missing"):
        round_trip(model, tmp_path / "missing.png", tmp_path / "out")
    with pytest.raises(ImageError, match="broken"):
        round_trip(model, tmp_path / "broken.png", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OSError):
        round_trip(model, tmp_path / "photo.png", tmp_path / "file")


def test_readme_image_is_the_output_of_the_demo(tmp_path):
    """They differ by the rounding of colours, and by codes that another machine's rounding errors change."""
    round_trip(from_pretrained(SMALL_MODEL_PATH), PHOTOS[DEFAULT_PHOTO], tmp_path)
    made, committed = Image.open(tmp_path / "side_by_side.png"), Image.open(DEMO_IMAGE)
    assert committed.size == made.size == (512 + 8 + 512, 512)
    assert Quality.compare(made, committed).psnr > 40, "run python docs/images/draw.py"
    assert DEMO_IMAGE.stat().st_size < 700_000


def test_quality_at_both_sizes(tmp_path):
    """The documents say 24.7 dB at 512 pixels and 22.1 dB at 256."""
    model = from_pretrained(SMALL_MODEL_PATH)
    for size, psnr in [(512, 24.66), (256, 22.09)]:
        assert round_trip(model, PHOTOS["astronaut"], tmp_path, size).quality.psnr == pytest.approx(psnr, abs=0.05)


def test_licences_name_every_photograph():
    text = (PHOTOS[DEFAULT_PHOTO].parent / "LICENSES.md").read_text()
    for path in PHOTOS.values():
        assert f"| `{path.name}` |" in text
