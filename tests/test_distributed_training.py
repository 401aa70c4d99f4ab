"""Training on two processes matches training on one: DDP and FSDP2 (fully_shard), activation checkpointing, autocast.

FSDP2 shards the units that the documentation recommends. The two processes start once and run every case.
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
TOLERANCE = 5e-5  # relative to a parameter's movement: float32 sums in another order
BFLOAT16_TOLERANCE = 3e-2  # of gradients under bfloat16 autocast, which rounds to 8 bits


def decoder():
    return make_decoder().train()


def movq():
    torch.manual_seed(0)
    return MOVQ({**MODEL["ddconfig"], "ch_mult": [1, 2], "dropout": 0.0}, MODEL["n_embed"], MODEL["embed_dim"]).train()


def images():
    return [torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1]


def codes():
    return torch.arange(24).reshape(2, 3, 4)


def compute_loss(model, inputs):
    out = model(*inputs)
    return out.float().square().mean() if isinstance(out, torch.Tensor) else (out[0].float() - inputs[0]).square().mean() + out[1]


def wrap(model, how, **keywords):
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for module in reversed(list(model.modules())):
        if module is not model and isinstance(module, UNITS[how]):
            fully_shard(module, **keywords)
    return fully_shard(model, **keywords)


def gather(model, select=lambda p: p):
    """Return ``select(parameter)`` of every parameter, gathered from all processes."""
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    tensors = {name: select(p).detach() for name, p in model.named_parameters()}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x.clone() for name, x in tensors.items()}


def train(model, inputs, checkpointing=False, autocast=False):
    """Return (parameters after STEPS steps, gradients of the first step)."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if checkpointing:
        inner.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = compute_loss(model, inputs)
        loss.backward()
        if step == 0:
            gradients = gather(model, lambda p: p.grad)
        optimizer.step()
        optimizer.zero_grad()
    return gather(model), gradients


def worker(rank):
    mine = {"decoder": [x[rank : rank + 1] for x in latents()], "movq": [x[rank : rank + 1] for x in images()]}
    results = {}
    for how in WRAPPERS:
        for checkpointing in (False, True):
            results["decoder", how, checkpointing] = train(wrap(decoder(), how), mine["decoder"], checkpointing)
        results["autocast", how] = train(wrap(decoder(), how), mine["decoder"], autocast=True)[1]
    for how in ("ddp", "blocks"):
        for checkpointing in (False, True):
            results["movq", how, checkpointing] = train(wrap(movq(), how), mine["movq"], checkpointing)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    results["policy"] = train(wrap(decoder(), "blocks", mp_policy=policy), mine["decoder"])[1]
    results["evaluation"] = evaluate(wrap(decoder(), "blocks"), mine["decoder"])
    register_fsdp_forward_method(codes_model := wrap(movq(), "blocks"), "decode_code")
    with torch.no_grad():
        results["codes"] = codes_model.eval().decode_code(codes())
    try:
        with torch.no_grad():
            decode_sharded(wrap(decoder(), "blocks"), *latents())
    except TypeError as error:
        results["sharded"] = str(error)
    return results


def evaluate(model, inputs):
    """Return (decoded image, image of forward_with_features_output) before every step."""
    register_fsdp_forward_method(model, "forward_with_features_output")
    optimizer, results = torch.optim.SGD(model.parameters(), 0.05), []
    for _ in range(STEPS):
        with torch.no_grad():
            model.eval()
            results.append((model(*latents()), model.forward_with_features_output(*latents())[0]))
        compute_loss(model.train(), inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return processes.run(worker, 2, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def single():
    """The results of one process on the whole batch."""
    return {"decoder": train(decoder(), latents()), "movq": train(movq(), images()),
            "autocast": train(decoder(), latents(), autocast=True)[1]}  # fmt: skip


def flatten(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_same_steps(results, expected, start):
    parameters, expected = results[0], expected[0]
    assert parameters.keys() == expected.keys()
    # The movement of an average parameter: some move by rounding only.
    scale = (flatten(expected) - flatten(start)).norm() / len(expected) ** 0.5
    assert scale > 1e-3
    for name, parameter in parameters.items():
        moved = (expected[name] - start[name]).norm()
        assert (parameter - expected[name]).norm() < TOLERANCE * (moved + scale), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", WRAPPERS)
def test_decoder_steps_match_a_single_process(results, single, how, checkpointing):
    for result in results:
        assert_same_steps(result["decoder", how, checkpointing], single["decoder"], gather(decoder()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", ["ddp", "blocks"])
def test_movq_steps_match_a_single_process(results, single, how, checkpointing):
    for result in results:
        assert_same_steps(result["movq", how, checkpointing], single["movq"], gather(movq()))


@pytest.mark.parametrize("how", WRAPPERS)
def test_gradients_under_autocast(results, single, how):
    exact = flatten(single["decoder"][1])
    for result in results:
        gradients = flatten(result["autocast", how])
        assert relative_error(gradients, flatten(single["autocast"])) < BFLOAT16_TOLERANCE
        assert 1e-4 < relative_error(gradients, exact) < 2 * BFLOAT16_TOLERANCE


def test_gradients_in_fsdp_mixed_precision(results, single):
    for result in results:
        assert 1e-4 < relative_error(flatten(result["policy"]), flatten(single["decoder"][1])) < 2 * BFLOAT16_TOLERANCE


def test_evaluation_between_steps_sees_the_new_parameters(results):
    """FSDP2 refills parameters in place without raising their version: values derived in an earlier step must not be reused."""
    model = decoder()
    optimizer, before = torch.optim.SGD(model.parameters(), 0.05), None
    for step in range(STEPS):
        expected = model.eval()(*latents()).detach()
        assert before is None or relative_error(expected, before) > 1e-2
        for result in results:
            for out in result["evaluation"][step]:
                assert_close(out, expected.double(), slack=20)
        before = expected
        compute_loss(model.train(), latents()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_other_methods_of_a_sharded_model(results):
    for result in results:
        assert_close(result["codes"], movq().eval().decode_code(codes()).double(), slack=20)


def test_decode_sharded_refuses_sharded_parameters(results):
    for result in results:
        assert result["sharded"].startswith("decoder's parameters must be whole in every process")
