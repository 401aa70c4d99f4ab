"""Folders of images for the tests, and folders that cannot be read."""

import os

import numpy as np
from PIL import Image


def write_image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)


def deny_reading(monkeypatch, name):
    """Make folders of this name unreadable, also for root."""
    original = os.scandir

    def scandir(path):
        if os.path.basename(path) == name:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
