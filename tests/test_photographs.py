import logging

import pytest
import torch
from image_folders import deny_reading
from PIL import Image
from spies import record_calls

from movq_ext.training import Photographs, photographs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_crops_depend_only_on_the_generator(photo_folder, monkeypatch):
    photos = Photographs(photo_folder, 8)
    a, b, c = (photos.batch(20, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == (20, 3, 8, 8) and a.min() >= -1 and a.max() <= 1
    monkeypatch.setattr(photographs, "CACHE_BYTES", 0)
    assert torch.equal(Photographs(photo_folder, 8).batch(20, generator(1)), a)


def test_the_cache_is_bounded(photo_folder, monkeypatch):
    opened = record_calls(monkeypatch, photographs, "load_image", lambda image, path, max_pixels: path)
    monkeypatch.setattr(photographs, "CACHE_BYTES", 3 * 40 * 40)  # the largest of the three photographs, or the two others
    Photographs(photo_folder, 8).batch(50, generator())
    assert 3 < len(opened) < 50


def test_unreadable_images_are_skipped(photo_folder, tmp_path, caplog):
    (tmp_path / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="could not read any of the 1 images"):
        Photographs(tmp_path, 8).batch(1, generator())
    (tmp_path / "1.png").write_bytes((photo_folder / "0.png").read_bytes())
    photos = Photographs(tmp_path, 8)
    caplog.clear()
    assert photos.batch(9, generator()).isfinite().all()
    assert sum("skipping an image (1 so far): cannot read " in record.message for record in caplog.records) == 1


def test_images_above_max_pixels_are_skipped_and_counted(photo_folder, tmp_path, caplog):
    (tmp_path / "1.png").write_bytes((photo_folder / "0.png").read_bytes())
    for name in ("0", "2"):
        Image.new("RGB", (100, 100)).save(tmp_path / f"{name}.png")
    photos = Photographs(tmp_path, 8, max_pixels=100 * 100 - 1)
    assert torch.equal(photos.batch(9, generator()), Photographs(photo_folder / "0.png", 8).batch(9, generator()))
    assert [record.message.partition(":")[0] for record in caplog.records] == [f"skipping an image ({i} so far)" for i in (1, 2)]
    assert "expected at most 9999 pixels, got 100 x 100 (width x height)" in caplog.text


def test_what_the_folder_holds_besides_readable_images_is_logged(photo_folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "photos").symlink_to(photo_folder)
    (tmp_path / "closed").mkdir()
    (tmp_path / "notes.txt").touch()
    deny_reading(monkeypatch, "closed")
    with caplog.at_level(logging.INFO):
        assert len(Photographs(tmp_path, 8).files) == 3
    warning, info = caplog.records
    assert warning.levelname == "WARNING" and f"Permission denied: '{tmp_path}/closed'" in warning.getMessage()
    assert info.levelname == "INFO" and info.getMessage() == f"{tmp_path}: ignored 1: .txt 1"


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found no images in "):
        Photographs(tmp_path, 8)
