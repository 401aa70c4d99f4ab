"""Small models, their inputs and modifications, shared by test files."""

import processes
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from movq_ext import MOVQDecoder
from movq_ext.training import TrainingConfig

# Arguments of MOVQDecoder.
KANDINSKY = dict(ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=[32], in_channels=3, resolution=256,
                 z_channels=4, zq_ch=4)  # fmt: skip
TINY = dict(ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[8], in_channels=3, resolution=16,
            z_channels=4, zq_ch=5)  # fmt: skip
CPU = torch.device("cpu")
# Arguments of MOVQ, and of a training run.
DDCONFIG = dict(ch=32, out_ch=3, ch_mult=[1, 1], num_res_blocks=0, attn_resolutions=[], in_channels=3, resolution=32,
                z_channels=4, dropout=0.1)  # fmt: skip
MODEL = dict(ddconfig=DDCONFIG, n_embed=32, embed_dim=4)
SMALL_MOVQ = dict(ddconfig={**DDCONFIG, "dropout": 0.0}, n_embed=64, embed_dim=4)
CONFIG = TrainingConfig(steps=12, batch_size=2, crop=8, warmup_steps=2, continuous_steps=4, restart_every=3)


def randomize(layer):
    """Draw all parameters: published inits leave norm weights at one and biases near zero, which hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3
    return layer


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_decoder(seed=0, **changes):
    """A small decoder in evaluation mode."""
    torch.manual_seed(seed)
    decoder = MOVQDecoder(**{**TINY, **changes})
    for module in decoder.modules():  # as in randomize
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return decoder.eval()


def latents(grid=(4, 6), batch=2, dtype=torch.float32, z=4, zq=5, zq_grid=None, device=None):
    """Return a decoder's inputs, one latent with z channels and one with zq channels."""
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(batch, z, *grid, generator=generator), torch.randn(batch, zq, *(zq_grid or grid), generator=generator)
    return [x.to(device=device, dtype=dtype) for x in maps]


class Copies(TorchDispatchMode):
    """Records every clone and copy that makes a map of this batch size and at least this many elements."""

    def __init__(self, batch, min_elements):
        super().__init__()
        self.batch, self.min_elements, self.seen = batch, min_elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
            and out.shape[0] == self.batch
            and out.numel() >= self.min_elements
        ):
            self.seen.append((str(func), tuple(out.shape)))
        return out


def _ddp_worker(rank, changes, options):
    decoder = nn.parallel.DistributedDataParallel(make_decoder(**changes).train(), **options)
    z, zq = latents()
    decoder(z[rank : rank + 1], zq[rank : rank + 1]).square().mean().backward()
    return {name: p.grad for name, p in decoder.module.named_parameters()}


def assert_ddp_averages_the_gradients(folder, changes, **options):
    """Two processes with one image each must get the gradients of one process with both images."""
    decoder = make_decoder().train()
    decoder(*latents()).square().mean().backward()
    for grads in processes.run(_ddp_worker, 2, folder, changes, options):
        for name, parameter in decoder.named_parameters():
            assert (grads[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-7, name


# Decoders to run in strips: changes to TINY, z's grid, and zq's grid if it differs.
CASES = {
    "default": ({}, (4, 6), None),
    "odd grid, another grid of zq": ({}, (5, 3), (7, 2)),
    "one row": ({}, (1, 9), (1, 2)),
    "add_conv": (dict(add_conv=True), (6, 4), (3, 3)),
    "give_pre_end": (dict(give_pre_end=True), (4, 4), None),
    "three levels, no convolution after upsampling": (dict(ch_mult=(1, 2, 2), resamp_with_conv=False), (4, 4), None),
    "attention on every level": (dict(attn_resolutions=[8, 16]), (6, 4), None),
    "from files": ({}, (40, 4), None),
    "no attention": (dict(attn_resolutions=[], mid_attn=False), (6, 4), None),
}


class Scaled(nn.Conv2d):
    """A stand-in for an adapter (LoRA): its weights alone do not determine its result."""

    def forward(self, x):
        return 2 * super().forward(x)


def scaled(conv):
    twin = Scaled(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)
    twin.load_state_dict(conv.state_dict())
    return twin.to(conv.weight.dtype)


# What users do to the layers of a decoder.


def circular(decoder):
    for layer in (decoder.mid.block_1.conv1, decoder.up[0].block[0].conv2, decoder.up[1].upsample.conv):
        layer.padding_mode = "circular"


def adapted(decoder):
    decoder.up[0].block[0].conv2 = scaled(decoder.up[0].block[0].conv2)
    decoder.up[1].upsample.conv = scaled(decoder.up[1].upsample.conv)
    decoder.mid.attn_1.v, decoder.norm_out.conv_y = scaled(decoder.mid.attn_1.v), scaled(decoder.norm_out.conv_y)


def patched(decoder):
    layer = decoder.up[1].block[0].conv2
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)


def hooked(decoder):
    decoder.up[0].block[0].conv2.register_forward_hook(lambda layer, inputs, out: 2 * out)


def quantised(decoder):
    decoder.conv_out = nn.Sequential(decoder.conv_out, nn.Hardtanh())


def larger(decoder):
    torch.manual_seed(1)
    decoder.up[1].upsample.conv = nn.Conv2d(64, 64, 5, padding=2)


class Trebled(nn.GroupNorm):
    def forward(self, x):
        return 3 * super().forward(x)


def other_norm(decoder):
    decoder.up[0].block[0].norm2.norm_layer.__class__ = Trebled


def hooked_norm(decoder):
    decoder.up[0].block[0].norm2.norm_layer.register_forward_hook(lambda layer, inputs, out: 2 * out)


# Layers that stand for those of other packages.


class Adapter(nn.Module):
    """Wraps a layer as PEFT does: no attribute of the layer but its result, and that is changed."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return 2 * self.base_layer(x)


class QuantisedWeight(torch.Tensor):
    """A weight as torchao makes it: an instance of a tensor subclass for which few operators exist. It counts twice."""

    OPERATORS = (torch.nn.functional.linear, torch.nn.functional.conv2d)
    ATTRIBUTES = ("__get__", "detach", "requires_grad_", "dim", "size")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in cls.OPERATORS:
            return func(*(2 * x.as_subclass(torch.Tensor) if isinstance(x, cls) else x for x in args), **(kwargs or {}))
        if func.__name__ not in cls.ATTRIBUTES:
            raise NotImplementedError(f"{func.__name__} of a quantised weight")
        return super().__torch_function__(func, types, args, kwargs or {})


def quantise(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(QuantisedWeight), requires_grad=False)
    return layer


def offload(layer):
    """Keep a layer's parameters elsewhere between calls, with a forward on the instance like accelerate and diffusers."""
    parameters, forward = dict(layer.named_parameters(recurse=False)), layer.forward

    def load_and_run(*args, **kwargs):
        layer._parameters.update(parameters)
        out = forward(*args, **kwargs)
        layer._parameters.update({name: nn.Parameter(p.to("meta")) for name, p in parameters.items()})
        return out

    layer._parameters.update({name: nn.Parameter(p.to("meta")) for name, p in parameters.items()})
    layer.forward = load_and_run
    return layer


class PeakBytes(TorchDispatchMode):
    """The most bytes that results of operators occupy at once, except views of a module's parameters and of other tensors."""

    def __init__(self, module=None, *tensors):
        super().__init__()
        self.peak, self.live = 0, {}
        excluded = [*tensors, *(module.parameters() if module is not None else ())]
        self.excluded = {tensor.untyped_storage()._cdata for tensor in excluded}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for result in tree_leaves(out):
            if isinstance(result, torch.Tensor) and not result.is_mkldnn:  # packed weights
                storage = result.untyped_storage()
                if storage._cdata in self.excluded:
                    continue
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out
