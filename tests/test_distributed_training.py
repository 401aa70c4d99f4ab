"""Training on two processes is training on one: DDP and FSDP2 (fully_shard), activation checkpointing, autocast.

FSDP2 is on the units that README names. Both processes are started once and run all cases.
"""

import processes
import pytest
import torch
from models import MODEL, latents, make_decoder
from tolerances import assert_close, relative_error
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from movq_ext import MOVQ, AttnBlock, Downsample, ResnetBlock, SpatialNorm, Upsample, decode_sharded

STEPS = 3
BLOCKS = (ResnetBlock, AttnBlock, Upsample, Downsample)
UNITS = {"whole": (), "blocks": BLOCKS, "blocks and norms": (*BLOCKS, SpatialNorm), "convolutions": (nn.Conv2d,)}
WRAPPERS = ["ddp", *UNITS]
CLOSE = 5e-5  # of what single steps of one process move; float32, summed in another order
CLOSE_BFLOAT16 = 3e-2  # of gradients in bfloat16 autocast, which rounds to 8 bits


def decoder():
    return make_decoder().train()


def movq():
    torch.manual_seed(0)
    return MOVQ({**MODEL["ddconfig"], "ch_mult": [1, 2], "dropout": 0.0}, MODEL["n_embed"], MODEL["embed_dim"]).train()


def images():
    return [torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1]


def codes():
    return torch.arange(24).reshape(2, 3, 4)


def loss_of(model, inputs):
    out = model(*inputs)
    return out.float().square().mean() if isinstance(out, torch.Tensor) else (out[0].float() - inputs[0]).square().mean() + out[1]


def wrapped(model, how, **keywords):
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for module in reversed(list(model.modules())):
        if module is not model and isinstance(module, UNITS[how]):
            fully_shard(module, **keywords)
    return fully_shard(model, **keywords)


def whole(model, of=lambda p: p):
    """The model's parameters, or what there is of each, put together from all processes."""
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    tensors = {name: of(p).detach() for name, p in model.named_parameters()}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x.clone() for name, x in tensors.items()}


def train(model, inputs, checkpointing=False, autocast=False):
    """Parameters after some steps, the gradients of the first one."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if checkpointing:
        inner.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, inputs)
        loss.backward()
        if step == 0:
            gradients = whole(model, lambda p: p.grad)
        optimizer.step()
        optimizer.zero_grad()
    return whole(model), gradients


def worker(rank):
    mine = {"decoder": [x[rank : rank + 1] for x in latents()], "movq": [x[rank : rank + 1] for x in images()]}
    results = {}
    for how in WRAPPERS:
        for checkpointing in (False, True):
            results["decoder", how, checkpointing] = train(wrapped(decoder(), how), mine["decoder"], checkpointing)
        results["autocast", how] = train(wrapped(decoder(), how), mine["decoder"], autocast=True)[1]
    for how in ("ddp", "blocks"):
        for checkpointing in (False, True):
            results["movq", how, checkpointing] = train(wrapped(movq(), how), mine["movq"], checkpointing)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    results["policy"] = train(wrapped(decoder(), "blocks", mp_policy=policy), mine["decoder"])[1]
    results["evaluation"] = evaluate(wrapped(decoder(), "blocks"), mine["decoder"])
    register_fsdp_forward_method(codes_model := wrapped(movq(), "blocks"), "decode_code")
    with torch.no_grad():
        results["codes"] = codes_model.eval().decode_code(codes())
    try:
        with torch.no_grad():
            decode_sharded(wrapped(decoder(), "blocks"), *latents())
    except TypeError as error:
        results["sharded"] = str(error)
    return results


def evaluate(model, inputs):
    """Decoded images and features after every step, and whether anything that follows from parameters was kept."""
    register_fsdp_forward_method(model, "forward_with_features_output")
    optimizer, results = torch.optim.SGD(model.parameters(), 0.05), []
    for _ in range(STEPS):
        with torch.no_grad():
            model.eval()
            results.append((model(*latents()), model.forward_with_features_output(*latents())[0]))
        loss_of(model.train(), inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return processes.run(worker, 2, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def single():
    """What one process makes of the whole batch."""
    return {"decoder": train(decoder(), latents()), "movq": train(movq(), images()),
            "autocast": train(decoder(), latents(), autocast=True)[1]}  # fmt: skip


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_same_steps(results, wanted, start):
    (parameters, _), (wanted, _) = results, wanted
    assert parameters.keys() == wanted.keys()
    scale = (flat(wanted) - flat(start)).norm() / len(wanted) ** 0.5  # of an average parameter: some do not move but for rounding
    assert scale > 1e-3
    for name, parameter in parameters.items():
        moved = (wanted[name] - start[name]).norm()
        assert (parameter - wanted[name]).norm() < CLOSE * (moved + scale), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", WRAPPERS)
def test_a_decoder_takes_the_steps_of_one_process(results, single, how, checkpointing):
    for result in results:
        assert_same_steps(result["decoder", how, checkpointing], single["decoder"], whole(decoder()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", ["ddp", "blocks"])
def test_the_whole_model_takes_the_steps_of_one_process(results, single, how, checkpointing):
    for result in results:
        assert_same_steps(result["movq", how, checkpointing], single["movq"], whole(movq()))


@pytest.mark.parametrize("how", WRAPPERS)
def test_gradients_in_autocast(results, single, how):
    exact = flat(single["decoder"][1])
    for result in results:
        gradients = flat(result["autocast", how])
        assert relative_error(gradients, flat(single["autocast"])) < CLOSE_BFLOAT16
        assert 1e-4 < relative_error(gradients, exact) < 2 * CLOSE_BFLOAT16


def test_gradients_in_fsdp_mixed_precision(results, single):
    for result in results:
        assert 1e-4 < relative_error(flat(result["policy"]), flat(single["decoder"][1])) < 2 * CLOSE_BFLOAT16


def test_evaluation_between_steps_sees_the_new_parameters(results):
    """FSDP2 fills parameters in place without a trace: what was derived from their values of an earlier step must not be used."""
    model = decoder()
    optimizer, before = torch.optim.SGD(model.parameters(), 0.05), None
    for step in range(STEPS):
        wanted = model.eval()(*latents()).detach()
        assert before is None or relative_error(wanted, before) > 1e-2
        for result in results:
            for out in result["evaluation"][step]:
                assert_close(out, wanted.double(), slack=20)
        before = wanted
        loss_of(model.train(), latents()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_other_methods_of_a_sharded_model(results):
    for result in results:
        assert_close(result["codes"], movq().eval().decode_code(codes()).double(), slack=20)


def test_a_sharded_decoder_cannot_decode_one_image_over_several_processes(results):
    for result in results:
        assert result["sharded"].startswith("decoder's parameters must be whole in every process")
