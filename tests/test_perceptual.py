import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from movq_ext.io.tensor_files import CheckpointError
from movq_ext.training.perceptual import PerceptualDistance

# torchvision's numbers of VGG16's convolutions, with their channels, by resolution; and LPIPS's modules that hold them.
CONVOLUTIONS = [[(0, 3, 64), (2, 64, 64)], [(5, 64, 128), (7, 128, 128)], [(10, 128, 256), (12, 256, 256), (14, 256, 256)],
                [(17, 256, 512), (19, 512, 512), (21, 512, 512)], [(24, 512, 512), (26, 512, 512), (28, 512, 512)]]  # fmt: skip
WIDTHS = [64, 128, 256, 512, 512]


@pytest.fixture(scope="module")
def vgg():
    """Random weights by block, number and kind."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for block, convolutions in enumerate(CONVOLUTIONS):
        for number, inputs, outputs in convolutions:
            weights[block, number, "weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / 9 / inputs) ** 0.5
            weights[block, number, "bias"] = torch.randn(outputs, generator=generator) * 0.1
    return weights


@pytest.fixture(scope="module")
def linear():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(width, generator=generator) for width in WIDTHS]


@pytest.fixture(scope="module")
def vgg_file(vgg, tmp_path_factory):
    """The state dict of torchvision's VGG16, without most of its classifier."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    named = {f"features.{number}.{kind}": value for (_, number, kind), value in vgg.items()}
    torch.save({**named, "classifier.6.bias": torch.zeros(1000)}, path)
    return path


def images():
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(2, 3, 32, 16, generator=generator) * 2 - 1 for _ in range(2)]


def expected_distance(vgg, linear, x, y):
    """The formula of LPIPS in float64, with its own normalisation of the input."""
    shift, scale = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    x, y = ((image.double() - shift) / scale for image in (x, y))
    distance = 0
    for block, convolutions in enumerate(CONVOLUTIONS):
        if block:
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
        for number, _, _ in convolutions:
            weight, bias = (vgg[block, number, kind].double() for kind in ("weight", "bias"))
            x, y = (F.relu(F.conv2d(image, weight, bias, padding=1)) for image in (x, y))
        a, b = (image / image.square().sum(1, keepdim=True).sqrt() for image in (x, y))
        distance = distance + ((a - b).square() * linear[block].double().view(-1, 1, 1)).sum(1).mean()
    return distance


def test_the_distance_is_that_of_lpips(vgg, vgg_file, linear, tmp_path):
    uniform = [torch.ones(width) for width in WIDTHS]
    save_file({f"lin{i}.model.1.weight": value.view(1, -1, 1, 1) for i, value in enumerate(linear)}, tmp_path / "l.safetensors")
    for files, weights in [([vgg_file], uniform), ([vgg_file, tmp_path / "l.safetensors"], linear)]:
        distance = PerceptualDistance(files)
        torch.testing.assert_close(distance(*images()).double(), expected_distance(vgg, weights, *images()), rtol=1e-4, atol=0)
        x, _ = images()
        assert distance(x, x) == 0


LAYOUTS = {
    "features alone": lambda block, number, kind: f"{number}.{kind}",
    "lpips": lambda block, number, kind: f"net.slice{block + 1}.{number}.{kind}",
    "training checkpoint": lambda block, number, kind: f"loss.perceptual_loss.net.slice{block + 1}.{number}.{kind}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts(vgg, vgg_file, tmp_path, layout):
    others = {"encoder.0.weight": torch.zeros(3), "decoder.features.x": torch.zeros(3)}
    save_file({**{LAYOUTS[layout](*key): value for key, value in vgg.items()}, **others}, tmp_path / "vgg.safetensors")
    distance = PerceptualDistance([tmp_path / "vgg.safetensors"])
    assert distance.fingerprint() == PerceptualDistance([vgg_file]).fingerprint()


def test_weights_of_another_network_are_refused(vgg, vgg_file, tmp_path):
    path = tmp_path / "vgg.safetensors"
    names = {f"features.{number}.{kind}": value for (_, number, kind), value in vgg.items()}
    save_file({**names, "features.0.weight": torch.zeros(64, 3, 11, 11)}, path)
    with pytest.raises(CheckpointError, match=r"VGG16's convolutions; missing or of another shape: 0\.weight$"):
        PerceptualDistance([path])
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"of another shape: 0\.bias, 0\.weight, .* and 18 more$"):
        PerceptualDistance([path])
    save_file({f"lin{i}.model.1.weight": torch.zeros(1, 64, 1, 1) for i in range(5)}, path)
    with pytest.raises(CheckpointError, match=r"LPIPS's linear weights for VGG16; missing or of another shape: 1, 2, 3, 4$"):
        PerceptualDistance([vgg_file, path])


def test_gradients_are_finite_where_all_features_are_zero(vgg, tmp_path):
    weights = {f"{number}.{kind}": value.clone() for (_, number, kind), value in vgg.items()}
    weights["28.bias"].fill_(-1e6)
    save_file(weights, tmp_path / "vgg.safetensors")
    x, y = images()
    y.requires_grad_()
    PerceptualDistance([tmp_path / "vgg.safetensors"])(x, y).backward()
    assert y.grad.isfinite().all() and y.grad.norm() > 0


def test_the_weights_are_not_trained(vgg_file):
    distance = PerceptualDistance([vgg_file])
    assert not distance.training and not any(parameter.requires_grad for parameter in distance.parameters())
