from copy import deepcopy

import pytest
import torch
from PIL import Image

from movq_ext.bulk import image_encoder
from movq_ext.bulk.image_encoder import LOADING_BYTES, MEMORY_SHARE, PIXEL_BYTES, ImageEncoder

IMAGE = Image.linear_gradient("L").convert("RGB")


@pytest.fixture
def limits(model, monkeypatch):
    """The max_memory of every encode."""
    used, encode_image = [], image_encoder.encode_image
    monkeypatch.setattr(image_encoder, "encode_image", lambda *args: used.append(args[2]) or encode_image(*args))
    return used


def test_images_are_encoded_whole_if_they_fit_and_in_strips_if_not(model, monkeypatch, limits):
    encoder, pixels = ImageEncoder(model), IMAGE.width * IMAGE.height
    whole = encoder.encode(IMAGE)
    budget = 4 * 3 * 32 * pixels  # float32; three maps of 32 channels, as the levels have no blocks
    free = int((budget + PIXEL_BYTES * pixels) / MEMORY_SHARE)
    for missing in (-2, 2):
        monkeypatch.setattr(image_encoder, "free_memory", lambda device, missing=missing: free - missing)
        assert torch.equal(encoder.encode(IMAGE), whole)
    assert limits[:2] == [None, None] and 0.99 * budget < limits[2] < budget


def test_a_given_limit_is_used(model, limits):
    ImageEncoder(model, max_memory=10_000_000).encode(IMAGE)
    assert limits == [10_000_000]


def test_float16_on_a_cpu_needs_float32_copies(model, monkeypatch, limits):
    pixels = IMAGE.width * IMAGE.height
    monkeypatch.setattr(image_encoder, "free_memory", lambda device: int(500 * pixels / MEMORY_SHARE))
    ImageEncoder(model).encode(IMAGE)
    monkeypatch.setattr(image_encoder, "encode_image", lambda *args: limits.append(args[2]))
    ImageEncoder(deepcopy(model).half()).encode(IMAGE)
    assert limits[0] is None and limits[1] is not None


def test_images_that_cannot_be_read_in_the_free_memory_are_refused(model, monkeypatch):
    monkeypatch.setattr(image_encoder, "free_memory", lambda device: 1000 * LOADING_BYTES)
    encoder = ImageEncoder(model)
    encoder.require_memory(20, 40)
    with pytest.raises(ValueError, match=r"^20 x 41 pixels \(height x width\) do not fit in the free memory, 800 pixels do$"):
        encoder.require_memory(20, 41)
