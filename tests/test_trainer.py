import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import processes
import pytest
import torch
from models import CONFIG, CPU, MODEL

from movq_ext import MOVQ, from_pretrained
from movq_ext.training import Trainer


def trainer(folder, out, **changes):
    torch.manual_seed(0)
    return Trainer(MOVQ(**MODEL), folder, out, dataclasses.replace(CONFIG, **changes), CPU)


def test_the_loss_falls(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path, steps=80)
    losses = [run.train_step()[1].item() for _ in range(80)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_resumed_run_matches_an_uninterrupted_one(photo_folder, tmp_path, amp, stop):
    whole = trainer(photo_folder, tmp_path / "whole", amp=amp)
    whole.run(save_every=100)
    first = trainer(photo_folder, tmp_path / "parts", amp=amp)
    first.out.mkdir()
    for _ in range(stop):
        first.train_step()
    first.save()
    first.train_step()  # not saved: the resumed run repeats it
    second = trainer(photo_folder, tmp_path / "parts", amp=amp)
    second.resume()
    torch.manual_seed(123)
    second.run(save_every=100)
    a, b = (torch.load(run.checkpoint, weights_only=True) for run in (whole, second))
    assert a["step"] == b["step"] == 12
    for part in ("model", "average"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), part
    torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)
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
    port = str(20000 + os.getpid() % 20000)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command = train_command(photo_folder, tmp_path / "out", config_file)
    subprocess.run(torchrun + command[1:], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    state = torch.load(tmp_path / "out/training.pt", weights_only=True)
    assert state["step"] == 60 and all(tensor.isfinite().all() for tensor in state["model"].values())


def train_rank(rank, folder, out):
    run = trainer(folder, out)
    for _ in range(12):
        run.train_step()
    return run.model.state_dict(), run.average.state_dict()


def test_ranks_agree_bit_for_bit(photo_folder, tmp_path):
    for first, second in zip(*processes.run(train_rank, 2, tmp_path, photo_folder, tmp_path), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


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
    with pytest.raises(ValueError, match=r"training\.pt is damaged: KeyError: 'config'"):
        run.resume()


def test_latents_that_are_not_finite_stop_the_run(photo_folder, tmp_path):
    run = trainer(photo_folder, tmp_path)
    run.save()
    with torch.no_grad():
        run.model.quant_conv.bias.fill_(float("nan"))
    message = "the encoder's latents are not finite: the loss is nan .* at step 0; the last checkpoint is intact"
    with pytest.raises(FloatingPointError, match=message):
        run.train_step()
    run.resume()
    assert run.train_step()[0].isfinite()


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
    assert run.train_step()[0].isfinite()
