import math

import numpy as np
import pytest
import torch
from models import CPU, SMALL_MOVQ
from PIL import Image

from movq_ext import MOVQ
from movq_ext.training.validation import MAX_IMAGES, Validation, psnr


def test_psnr():
    assert psnr(4) == 0 and psnr(0) == 100
    assert psnr((2 / 255) ** 2) == pytest.approx(20 * math.log10(255))


@pytest.mark.parametrize("quantized", [False, True])
def test_the_picture_shows_photographs_above_their_reconstructions(photo_folder, quantized):
    torch.manual_seed(0)
    model, validation = MOVQ(**SMALL_MOVQ).eval(), Validation(photo_folder, 16)
    quality, picture = validation.run(model, CPU, quantized)
    assert picture.size == (3 * 16, 2 * 16)
    pixels = np.asarray(picture).astype(float)
    originals, decoded = pixels[:16], pixels[16:]
    each = [((a - b) ** 2).mean() for a, b in zip(np.split(originals, 3, 1), np.split(decoded, 3, 1), strict=True)]
    assert quality == pytest.approx(np.mean([20 * math.log10(255) - 10 * math.log10(mse) for mse in each]), abs=0.01)
    expected = model.decode_code(model.encode_code(validation.images[0][None])) if quantized else None
    if quantized:
        first = ((expected[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).detach().numpy()
        assert np.abs(first - decoded[:, :16]).max() <= 1


def test_the_number_of_photographs_is_bounded(tmp_path):
    for i in range(MAX_IMAGES + 3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i:02}.png")
    assert len(Validation(tmp_path, 8).images) == MAX_IMAGES
