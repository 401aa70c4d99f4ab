import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from movq_ext.derived import Derived, weight_for


def doubled(x):
    doubled.calls += 1
    return x * 2


doubled.calls = 0


@pytest.fixture
def derived():
    doubled.calls = 0
    return Derived(doubled)


def test_it_is_made_once_and_again_when_a_parameter_changes(derived):
    p = nn.Parameter(torch.ones(3))
    with torch.no_grad():
        assert derived(p) is derived(p) and doubled.calls == 1
        p.add_(1)
        assert derived(p).tolist() == [4, 4, 4] and doubled.calls == 2
        p.data = torch.full((3,), 5.0)
        assert derived(p).tolist() == [10, 10, 10]
        other = nn.Parameter(torch.zeros(3))
        assert derived(other).tolist() == [0, 0, 0]


def test_it_is_part_of_the_graph_where_gradients_are_needed(derived):
    p = nn.Parameter(torch.ones(3))
    with torch.no_grad():
        derived(p)
    derived(p).sum().backward()
    assert p.grad.tolist() == [2, 2, 2]
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    assert derived(frozen) is derived(frozen)


@pytest.mark.parametrize("why", ["asked not to", "inference tensor", "meta", "a transform"])
def test_it_is_not_kept(derived, why):
    if why == "inference tensor":
        with torch.inference_mode():
            p = torch.ones(3)
    else:
        p = torch.ones(3, device="meta" if why == "meta" else "cpu")
    if why == "a transform":
        assert torch.vmap(derived)(torch.ones(2, 3)).tolist() == [[2] * 3] * 2
    else:
        derived(p, keep=why != "asked not to")
        assert derived(p, keep=why != "asked not to").shape == (3,)
    assert derived._value is None


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_empty(derived, twin_of):
    p = torch.ones(3)
    derived(p)
    twin = twin_of(derived)
    assert twin._value is None and twin(p).tolist() == [2, 2, 2]


def test_a_weight_is_kept_in_the_layout_of_what_it_convolves():
    layer = nn.Conv2d(4, 8, 3).eval()
    x = torch.randn(1, 4, 5, 5)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert weight_for(layer, x) is layer.weight
        weight = weight_for(layer, nhwc)
        assert weight.is_contiguous(memory_format=torch.channels_last) and torch.equal(weight, layer.weight)
        assert weight_for(layer, nhwc) is weight
        layer.weight.mul_(2)
        assert torch.equal(weight_for(layer, nhwc), layer.weight)
        assert copy.deepcopy(layer).state_dict().keys() == {"weight", "bias"}
        layer.to(memory_format=torch.channels_last)
        assert weight_for(layer, nhwc) is layer.weight


def test_kept_weights_go_with_their_layer():
    layer, x = nn.Conv2d(4, 8, 3).eval(), torch.randn(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        kept = weakref.ref(weight_for(layer, x))
    assert kept() is not None
    del layer
    gc.collect()
    assert kept() is None
