"""The accelerated classes: copies and pickles, and an environment without diffusers."""

import copy
import io
import pickle
import sys

import pytest
import torch
from accelerated_models import assert_equal, kl, outputs, vq
from torch import nn

from movq_ext import accelerate, restore
from movq_ext.diffusers import acceleration, registry


@torch.no_grad()
def test_copies_and_pickles():
    for model in (vq(), kl()):
        for change in (accelerate, restore):
            change(model)
            expected = outputs(model)
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
                assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
                assert_equal(outputs(other), expected)
                other.decoder.up_blocks[0].upsamplers[0].conv.weight.mul_(2)
                assert not torch.equal(outputs(other)[0], expected[0])
                assert_equal(outputs(model), expected)


def test_without_diffusers(monkeypatch):
    monkeypatch.setattr(acceleration, "accelerated_classes", registry.accelerated_classes.__wrapped__)
    monkeypatch.setitem(sys.modules, "diffusers.models.attention_processor", None)
    with pytest.raises(ImportError, match="accelerate needs diffusers: pip install diffusers"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = registry.nothing


def test_accelerated_classes_are_subclasses_of_the_same_name():
    classes = registry.accelerated_classes()
    assert {original.__name__ for original in classes} <= {path.rpartition(".")[2] for path in registry.IMPLEMENTATIONS}
    assert len(classes) >= 6  # KVAE's norm is not in every diffusers
    for original, accelerated in classes.items():
        assert issubclass(accelerated, original) and accelerated.diffusers_class is original
        assert accelerated.__name__ == original.__name__
        assert pickle.loads(pickle.dumps(accelerated)) is accelerated
