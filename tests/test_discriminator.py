import pytest
import torch
import torch.nn.functional as F
from torch import nn

from movq_ext.training.discriminator import HingeLoss, PatchDiscriminator


def published(channels, layers):
    """The discriminator of pix2pix and VQGAN, spelt out for the three sizes that the tests use."""
    conv, norm, act = nn.Conv2d, nn.BatchNorm2d, lambda: nn.LeakyReLU(0.2)
    n = channels
    head = [conv(3, n, 4, 2, 1), act()]
    middle = {
        1: [conv(n, 2 * n, 4, 1, 1, bias=False), norm(2 * n), act(), conv(2 * n, 1, 4, 1, 1)],
        2: [conv(n, 2 * n, 4, 2, 1, bias=False), norm(2 * n), act(), conv(2 * n, 4 * n, 4, 1, 1, bias=False), norm(4 * n), act(),
            conv(4 * n, 1, 4, 1, 1)],
        3: [conv(n, 2 * n, 4, 2, 1, bias=False), norm(2 * n), act(), conv(2 * n, 4 * n, 4, 2, 1, bias=False), norm(4 * n), act(),
            conv(4 * n, 8 * n, 4, 1, 1, bias=False), norm(8 * n), act(), conv(8 * n, 1, 4, 1, 1)],
    }  # fmt: skip
    return nn.Sequential(*head, *middle[layers])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_it_is_the_published_network(layers):
    ours, theirs = PatchDiscriminator(3, 4, layers), published(4, layers)
    assert list(ours.layers.state_dict()) == [name for name in theirs.state_dict() if name.rsplit(".")[-1] in ("weight", "bias")]
    theirs.load_state_dict(ours.layers.state_dict(), strict=False)
    x = torch.rand(2, 3, 48, 40)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("layers", "pixels"), [(1, 16), (2, 34), (3, 70)])
def test_a_score_sees_a_patch(layers, pixels):
    discriminator = PatchDiscriminator(3, 4, layers).eval()
    for module in discriminator.modules():
        if isinstance(module, nn.BatchNorm2d):  # its statistics see everything
            module.forward = lambda x: x
    x = torch.rand(1, 3, 160, 160, requires_grad=True)
    scores = discriminator(x)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == pixels


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_min_size(layers):
    size = PatchDiscriminator.min_size(layers)
    assert PatchDiscriminator(3, 4, layers)(torch.rand(2, 3, size, size)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        PatchDiscriminator(3, 4, layers)(torch.rand(2, 3, size - 2, size - 2))


def test_weights_are_initialised_as_published():
    torch.manual_seed(0)
    for name, parameter in PatchDiscriminator(3, 64, 3).named_parameters():
        if parameter.dim() == 4 and parameter.numel() > 4000:
            assert abs(parameter.mean()) < 2e-3 and parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_the_hinge_loss():
    loss = HingeLoss(lambda scores: scores)
    real, decoded = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert loss(real, decoded) == (torch.tensor([0.0, 0.5, 2.0]).mean() + torch.tensor([0.0, 1.0, 2.0]).mean()) / 2
    assert loss(real, decoded) == (F.relu(1 - real).mean() + F.relu(1 + decoded).mean()) / 2
