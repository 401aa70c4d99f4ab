import numpy as np
import pytest
from shard_files import CELL, CODES

from movq_ext.bulk.codebook import Codebook
from movq_ext.io.codes import codebook_fingerprint


def test_codebook_of_a_model(model):
    assert Codebook.from_model(model) == Codebook(codebook_fingerprint(model), CODES, CELL)


def test_an_image_of_too_many_pixels(model):
    codes = np.zeros(1, np.int64)
    expected = r"expected an image of at most 67108864 pixels, got 1048576 x 1000 .*: raise the limit with --max-pixels"
    with pytest.raises(ValueError, match=expected):
        Codebook.from_model(model).to_grid(codes, (1 << 20, 1000))
