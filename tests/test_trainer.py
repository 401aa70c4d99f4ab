import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import processes
import pytest
import torch
from models import CONFIG, CPU, MODEL
from safetensors import SafetensorError

from movq_ext import MOVQ, from_pretrained, save_pretrained
from movq_ext.training import Trainer, checkpoint
from movq_ext.training.losses import gradient_ratio


def trainer(folder, out, **changes):
    torch.manual_seed(0)
    return Trainer(MOVQ(**MODEL), folder, out, dataclasses.replace(CONFIG, **changes), CPU)


def test_the_loss_falls(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path, steps=80)
    losses = [run.train_step().mse.item() for _ in range(80)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


ADVERSARIAL = dict(adversarial_weight=0.5, adversarial_start=2, discriminator_layers=1, discriminator_channels=8)


@pytest.mark.parametrize("changes", [{}, {"amp": True}, {**ADVERSARIAL, "adaptive_weight": True}], ids=["", "amp", "adversarial"])
@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_resumed_run_matches_an_uninterrupted_one(photo_folder, tmp_path, changes, stop):
    whole = trainer(photo_folder, tmp_path / "whole", log_every=2, **changes)
    whole.run()
    first = trainer(photo_folder, tmp_path / "parts", log_every=2, **changes)
    first.run(lambda: first.step == stop)  # saves the step where it stops
    assert first.step == stop
    first.train_step()  # not saved: the resumed run repeats it
    second = trainer(photo_folder, tmp_path / "parts", log_every=2, **changes)
    second.resume()
    torch.manual_seed(123)
    second.run()
    a, b = (torch.load(run.checkpoint, weights_only=True) for run in (whole, second))
    assert a["step"] == b["step"] == 12
    for part in ("model", "average"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), part
    for part in ("optimizer", "adversary"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "parts/log.csv").read_text()
    assert not torch.equal(a["model"]["quant_conv.weight"], a["average"]["quant_conv.weight"])
    loaded = from_pretrained(tmp_path / "parts/model")
    assert all(torch.equal(loaded.state_dict()[name], b["average"][name]) for name in b["average"])


def train_command(folder, out, config, *more):
    options = "--steps 60 --batch-size 2 --crop 8 --continuous-steps 4 --restart-every 5 --save-every 5 --device cpu".split()
    files = [str(folder), "-o", str(out), "--config", str(config)]
    return [sys.executable, "-m", "movq_ext", "train", *files, *options, *more]


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    return tmp_path / "model.json"


def test_a_killed_run_resumes(photo_folder, tmp_path, config_file):
    whole, killed = (train_command(photo_folder, tmp_path / name, config_file) for name in ("whole", "killed"))
    subprocess.run(whole, check=True, capture_output=True)
    process = subprocess.Popen(killed, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed/training.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run(killed, check=True, capture_output=True, text=True)
    assert "resumed" in again.stderr and "PSNR" in again.stderr.upper()
    a, b = (torch.load(tmp_path / name / "training.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(a["average"][name], b["average"][name]) for name in a["average"])


def test_two_processes_train_one_model(photo_folder, tmp_path, config_file):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]  # on a free port
    command = train_command(photo_folder, tmp_path / "out", config_file)
    subprocess.run(torchrun + command[1:], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    state = torch.load(tmp_path / "out/training.pt", weights_only=True)
    assert state["step"] == 60 and all(tensor.isfinite().all() for tensor in state["model"].values())


TWO_PROCESSES = {"": {}, "adversarial": {**ADVERSARIAL, "adaptive_weight": True}}


def train_rank(rank, folder, out):
    """Return the weights of uninterrupted runs and of runs that stop between two restarts of unused codes and resume."""
    states = {}
    for name, changes in TWO_PROCESSES.items():
        changes = {"restart_every": 5, **changes}
        whole = trainer(folder, out / f"whole {name}", **changes)
        whole.run()
        first = trainer(folder, out / f"parts {name}", **changes)
        first.run(lambda first=first: first.step == 8 and rank == 1)  # a signal to one process stops both
        second = trainer(folder, out / f"parts {name}", **changes)
        second.resume()
        assert second.step == 8
        second.run()
        for how, run in (("whole", whole), ("resumed", second)):
            adversary = {} if run.adversary is None else run.adversary.discriminator.state_dict()
            states[name, how] = [run.model.state_dict(), run.average.state_dict(), adversary]
    return states


@pytest.fixture(scope="module")
def two_processes(photo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return processes.run(train_rank, 2, folder, photo_folder, folder)


def equal(first, second):
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", TWO_PROCESSES)
def test_ranks_agree_bit_for_bit(two_processes, case):
    first, second = two_processes
    assert equal(first[case, "whole"], second[case, "whole"])


@pytest.mark.parametrize("case", TWO_PROCESSES)
def test_two_processes_resume_bit_for_bit(two_processes, case):
    """Codes are restarted by what all processes have used since the last restart, before the interruption too."""
    for rank in two_processes:
        assert equal(rank[case, "whole"], rank[case, "resumed"])


def test_unused_codes_are_replaced_with_latents(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path)
    run.usage[:30] = 1
    latents = torch.randn(2, 4, 4, 4)
    before = run.model.quantize.embedding.weight.detach().clone()
    run._restart_unused_codes(latents)
    for model in (run.model, run.average):
        codes = model.quantize.embedding.weight
        assert torch.equal(codes[:30], before[:30])
        rows = latents.permute(0, 2, 3, 1).reshape(-1, 4)
        assert all((row == rows).all(1).any() for row in codes[30:])
    assert run.usage.sum() == 0


def test_a_kept_codebook_is_not_filled_with_latents(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path, keep_codebook=True, continuous_steps=0, learning_rate=1e-9)
    before = run.model.quantize.embedding.weight.detach().clone()
    assert run.train_step().codebook is not None
    torch.testing.assert_close(run.model.quantize.embedding.weight, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    (dict(adversarial_weight=1.0, adversarial_start=3), "crop must be at least 24 for a discriminator of 3 layers, got 8"),
    (dict(perceptual_network=("missing.pth",)), "crop must be at least 16 for the perceptual loss, got 8"),
    (dict(validation="missing"), "no such file or folder: missing"),
])  # fmt: skip
def test_unsuitable_options(photo_folder, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer(photo_folder, tmp_path, **change)


def test_the_adversarial_loss_changes_only_the_autoencoder(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path, **ADVERSARIAL, continuous_steps=0)
    for step in range(4):
        losses = run.train_step()
        assert (losses.adversarial is None) == (losses.discriminator is None) == (step < 2)
    assert losses.adversarial_weight == 0.5
    expected = losses.mse + 0.25 * losses.codebook + 0.5 * losses.adversarial
    torch.testing.assert_close(losses.loss, expected)
    decoded = torch.rand(2, 3, 8, 8, requires_grad=True)
    run.adversary.generator_loss(decoded).backward()
    assert decoded.grad.norm() > 0 and all(parameter.grad is None for parameter in run.adversary.discriminator.parameters())


def test_the_adaptive_weight_balances_the_gradients(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path, **{**ADVERSARIAL, "adversarial_start": 0}, adaptive_weight=True)
    run.train_step()
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    decoded, last = run.model(x)[0], run.model.decoder.conv_out.weight
    mse, adversarial = (decoded - x).square().mean(), run.adversary.generator_loss(decoded)
    ratio = gradient_ratio(mse, adversarial, last)
    gradients = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (mse, ratio * adversarial)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=0)
    assert not ratio.requires_grad


def test_a_missing_or_stale_model_is_saved_again(photo_folder, tmp_path):
    """A run may be killed, or the disk full, between the last checkpoint and the model."""
    run = trainer(photo_folder, tmp_path)
    run.run()
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    stale = trainer(photo_folder, tmp_path / "stale")
    for damage in (lambda: shutil.rmtree(tmp_path / "model"), lambda: save_pretrained(stale.model, tmp_path / "model"),
                   lambda: (tmp_path / "model/model.safetensors").write_bytes(weights[:100])):  # fmt: skip
        damage()
        again = trainer(photo_folder, tmp_path)
        again.resume()
        again.run()
        assert (tmp_path / "model/model.safetensors").read_bytes() == weights


def test_a_disk_too_full_for_the_model_is_an_os_error(photo_folder, tmp_path, monkeypatch):
    def fail(model, folder):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("movq_ext.training.trainer.save_pretrained", fail)
    with pytest.raises(OSError, match=r"cannot write .*model: SafetensorError: I/O error: No space left on device"):
        trainer(photo_folder, tmp_path).save()


@pytest.mark.parametrize("name", ["model", "validation"])
@pytest.mark.parametrize("target", ["a file", "/proc/self"])
def test_a_folder_that_cannot_be_written_is_noticed_at_the_start(photo_folder, tmp_path, monkeypatch, name, target):
    """Not by the first checkpoint. Even root cannot create files in /proc."""
    run = trainer(photo_folder, tmp_path)
    monkeypatch.setattr(run, "train_step", lambda: pytest.fail("a step was taken"))
    (tmp_path / "a file").touch()
    (tmp_path / name).symlink_to(target)
    with pytest.raises(OSError, match=f"cannot write to {tmp_path}/{name}: "):
        run.run()


def test_a_crop_that_the_model_cannot_downsample_is_refused(photo_folder, tmp_path):
    with pytest.raises(ValueError, match="crop must be a multiple of the model's downsampling 2, got 9"):
        trainer(photo_folder, tmp_path, crop=9)


def test_an_unsuitable_checkpoint_is_refused(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path)
    run.save()
    with pytest.raises(ValueError, match=r"was saved with learning_rate=0.001, now 0.5; seed=0, now 3"):
        trainer(photo_folder, tmp_path, learning_rate=0.5, seed=3).resume()
    trainer(photo_folder, tmp_path, steps=20).resume()
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"training\.pt is damaged"):
        run.resume()
    torch.save({"model": {}}, run.checkpoint)
    with pytest.raises(ValueError, match=r"training\.pt lacks config, model_config, step"):
        run.resume()


@pytest.mark.parametrize("key", checkpoint.KEYS)
def test_a_checkpoint_that_lacks_an_entry_is_refused(photo_folder, tmp_path, key):
    run = trainer(photo_folder, tmp_path)
    run.save()
    state = torch.load(run.checkpoint, weights_only=True)
    torch.save({name: value for name, value in state.items() if name != key}, run.checkpoint)
    with pytest.raises(ValueError, match=rf"training\.pt lacks {key}: expected a checkpoint that movq-ext train wrote"):
        run.resume()


@pytest.mark.parametrize("config", [None, {}, {"ddconfig": 1}, [1]])
def test_a_checkpoint_with_a_damaged_config_of_the_model_is_refused(photo_folder, tmp_path, config):
    run = trainer(photo_folder, tmp_path)
    run.save()
    torch.save({**torch.load(run.checkpoint, weights_only=True), "model_config": config}, run.checkpoint)
    with pytest.raises(ValueError, match=r"training\.pt is damaged: "):
        run.resume()


def test_a_checkpoint_of_another_model_is_refused(photo_folder, tmp_path):
    trainer(photo_folder, tmp_path).save()
    other = MOVQ({**MODEL["ddconfig"], "dropout": 0.2}, n_embed=64, embed_dim=4)
    with pytest.raises(ValueError, match=r"training\.pt has a model with dropout=0.1, now 0.2; n_embed=32, now 64"):
        Trainer(other, photo_folder, tmp_path, CONFIG, CPU).resume()


def test_a_resumed_optimizer_counts_steps_on_the_cpu(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path, adversarial_weight=0.5, adversarial_start=0, discriminator_layers=1)
    run.train_step()
    run.save()
    run.device = torch.device("meta")  # stands in for a GPU
    run.resume()
    states = [*run.optimizer.state.values(), *run.adversary.optimizer.state.values()]
    assert states and all(state["step"].device == CPU for state in states)


def test_latents_that_are_not_finite_stop_the_run(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path)
    run.save()
    with torch.no_grad():
        run.model.quant_conv.bias.fill_(float("nan"))
    message = "the encoder's latents are not finite: the loss is nan .* at step 0; the last checkpoint is intact"
    with pytest.raises(FloatingPointError, match=message):
        run.train_step()
    run.resume()
    assert run.train_step().loss.isfinite()


def test_latents_for_the_codebook_must_be_finite(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path, continuous_steps=0)
    before = run.model.quantize.embedding.weight.detach().clone()
    with torch.no_grad():
        run.model.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"the encoder computed NaN or infinity in torch\.float32"):
        run.train_step()
    assert torch.equal(run.model.quantize.embedding.weight, before)


def test_gradients_that_are_not_finite_do_not_change_the_weights(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path)
    run.save()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    hook = run.model.quant_conv.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    with pytest.raises(FloatingPointError, match=r"^the loss is \d.* and the gradient norm (inf|nan) at step 0"):
        run.train_step()
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    hook.remove()
    run.resume()
    assert run.train_step().loss.isfinite()
