"""``movq-ext train``: what it asks for, prints and leaves behind. The steps are tested in test_trainer.py."""

import csv
import gc
import json
import logging
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from models import MODEL, SMALL_MOVQ
from PIL import Image

from movq_ext import MOVQ, from_pretrained, save_pretrained
from movq_ext.cli import main
from movq_ext.training import Trainer, checkpoint
from movq_ext.training.checkpoint import read_checkpoint

OPTIONS = "--batch-size 2 --crop 8 --continuous-steps 2 --restart-every 5 --learning-rate 0.002 --device cpu".split()


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    return tmp_path / "model.json"


@pytest.fixture
def train(photo_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    return lambda *more: main(["train", str(photo_folder), "-o", str(tmp_path / "out"), *map(str, more)])


@pytest.fixture
def trained(train, config_file, capsys):
    """A finished run of 4 steps, and what it printed."""
    assert train(*OPTIONS, "--config", config_file, "--steps", 4, "--save-every", 3, "--log-every", 2) == 0
    return capsys.readouterr()


def test_the_last_line_says_where_the_model_is(trained, tmp_path, caplog):
    assert trained.out.splitlines()[-1] == f"model after 4 steps: {tmp_path / 'out/model'}"
    assert from_pretrained(tmp_path / "out/model").quantize.n_e == 32
    assert "filling the codebook" in "".join(record.message for record in caplog.get_records("setup"))


def test_losses_and_validation_pictures_are_logged(trained, tmp_path):
    with open(tmp_path / "out/log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "3", "4"]
    assert [bool(row["validation_psnr"]) for row in rows] == [False, True, True]
    assert [bool(row["codebook"]) for row in rows] == [False, True, True]
    assert all(5 < float(row["psnr"]) < 40 and float(row["learning_rate"]) > 0 and not row["perceptual"] for row in rows)
    pictures = sorted((tmp_path / "out/validation").iterdir())
    assert [path.name for path in pictures] == ["step_0000003.png", "step_0000004.png"]
    assert Image.open(pictures[0]).size == (5 * 16, 2 * 16)  # the five shipped photographs above their reconstructions


def test_a_resumed_run_needs_no_flags(trained, train, tmp_path, capsys, caplog):
    assert train("--steps", 6, "--device", "cpu") == 0
    assert "resumed" in caplog.text
    assert capsys.readouterr().out.splitlines()[-1] == f"model after 6 steps: {tmp_path / 'out/model'}"
    config, state = read_checkpoint(tmp_path / "out/training.pt", "meta")
    assert (config.steps, config.batch_size, config.learning_rate, config.log_every) == (6, 2, 0.002, 2)
    assert state["step"] == 6 and state["model_config"]["n_embed"] == 32


def test_a_finished_run_says_so(trained, train, tmp_path, capsys):
    assert train("--device", "cpu") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("nothing to do: already trained for 4 steps; --steps can be raised\n")
    assert captured.out.splitlines()[-1] == f"model after 4 steps: {tmp_path / 'out/model'}"
    assert "step/s" not in captured.err


def test_other_options_than_those_of_the_checkpoint_are_refused_by_their_flags(trained, train, tmp_path, capsys):
    assert train("--learning-rate", 0.5, "--amp", "--batch-size", 2, "--save-every", 9) == 2
    message = f"error: {tmp_path / 'out/training.pt'} was saved with other options (--learning-rate: was 0.002, now 0.5; "
    assert capsys.readouterr().err.endswith(f"{message}--amp: was off, now on); leave out these flags, or choose another --out\n")


def test_another_config_than_that_of_the_checkpoint_is_refused(trained, train, config_file, tmp_path, capsys):
    config_file.write_text(json.dumps({**MODEL, "n_embed": 64}))
    assert train("--config", config_file) == 2
    assert f"error: {tmp_path / 'out/training.pt'} has a model with n_embed=32, now 64\n" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [
    (("--save-every", 0), "error: --save-every must be positive, got 0"),
    (("--log-every", 0), "error: --log-every must be positive, got 0"),
    (("--crop", 9), "error: --crop must be a multiple of the model's downsampling 2, got 9"),
    (("--adversarial-weight", 1, "--steps", 10), "error: --adversarial-start must be less than steps (10), got 2000"),
])  # fmt: skip
def test_errors_name_the_flag(train, config_file, capsys, flags, message):
    assert train("--config", config_file, "--device", "cpu", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--validation", "--perceptual-network"])
def test_a_missing_path_is_refused(train, capsys, flag):
    with pytest.raises(SystemExit):
        train(flag, "missing")
    assert f"argument {flag}: no such file or folder: missing" in capsys.readouterr().err


def test_training_starts_from_a_model(train, tmp_path, capsys, caplog):
    torch.manual_seed(1)
    model = MOVQ(**SMALL_MOVQ)
    save_pretrained(model, tmp_path / "model")
    options = "--batch-size 2 --crop 8 --learning-rate 1e-9 --ema-decay 0 --device cpu --steps 1".split()
    assert train(*options, "--init", tmp_path / "model") == 0
    trained = from_pretrained(tmp_path / "out/model").state_dict()
    for name, weight in model.state_dict().items():  # the codebook too
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-7)
    config, _ = read_checkpoint(tmp_path / "out/training.pt", "meta")
    assert config.keep_codebook and config.continuous_steps == 0
    shutil.rmtree(tmp_path / "model")
    assert train(*options[:-1], 2, "--init", tmp_path / "model") == 0  # resumed
    assert "--init is not used: " in caplog.text
    assert train("--init", tmp_path / "model", "-o", tmp_path / "new") == 2
    assert f"error: no such file or folder: {tmp_path / 'model'}" in capsys.readouterr().err


def test_training_from_a_model_can_fill_its_codebook_anew(train, tmp_path):
    save_pretrained(MOVQ(**SMALL_MOVQ), tmp_path / "model")
    assert train(*OPTIONS, "--steps", 1, "--init", tmp_path / "model") == 0
    config, _ = read_checkpoint(tmp_path / "out/training.pt", "meta")
    assert not config.keep_codebook and config.continuous_steps == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved(train, config_file, tmp_path, monkeypatch, capsys, caplog, number):
    plain = Trainer.train_step

    def step_and_interrupt(self):
        losses = plain(self)
        if self.step == 3:
            signal.raise_signal(number)
        return losses

    monkeypatch.setattr(Trainer, "train_step", step_and_interrupt)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    command = (*OPTIONS, "--config", config_file, "--steps", 5)
    assert train(*command) == 128 + number
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "interrupted and saved at step 3; run the same command again to continue\n" in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "out/training.pt", "meta")[1]["step"] == 3
    assert train(*command) == 0
    assert "resumed" in caplog.text


def test_a_second_interruption_stops_at_once(train, config_file, monkeypatch, request, capsys):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores SIGINT
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))

    def interrupt_twice(self):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    train_step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", interrupt_twice)
    assert train(*OPTIONS, "--config", config_file) == 130
    error = capsys.readouterr().err
    assert "stopping after this step; interrupt again to stop at once" in error and "interrupted; nothing is saved yet\n" in error
    monkeypatch.setattr(Trainer, "train_step", lambda self: train_step(self) if self.step == 0 else interrupt_twice(self))
    assert train(*OPTIONS, "--config", config_file, "--save-every", 1) == 130
    expected = "interrupted; not saved; run the same command again to continue from the last checkpoint\n"
    assert expected in capsys.readouterr().err


def test_two_runs_in_one_folder(trained, train, tmp_path, capsys):
    with checkpoint.lock_folder(tmp_path / "out"):
        assert train("--steps", 6, "--device", "cpu") == 2
    assert capsys.readouterr().err.endswith(f"error: another process is training in {tmp_path / 'out'}\n")
    assert train("--steps", 6, "--device", "cpu") == 0


def test_partial_files_of_killed_runs_are_removed(trained, train, tmp_path):
    partial = [
        tmp_path / "out" / name
        for name in (".training.pt.0123456789abcdef.output.partial", "model/.model.safetensors.0123456789abcdef.output.partial")
    ]
    for path in partial:
        path.touch()
    assert train("--device", "cpu") == 0
    assert not any(path.exists() for path in partial)


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from movq_ext.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("limit", "message"), [(50, "File too large"), (20_000, "cannot write {}/training.pt: ")])
def test_a_full_disk_is_an_error_not_a_traceback(photo_folder, config_file, tmp_path, limit, message):
    """The log and the checkpoint. A limit of a file's size fails like a full disk, with another number."""
    files = ["train", str(photo_folder), "-o", str(tmp_path / "out"), "--config", str(config_file), "--steps", "1"]
    command = [sys.executable, "-c", FULL_DISK, str(limit), *files, *OPTIONS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "File too large" in last and message.format(tmp_path / "out") in last


def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_step(train, config_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("a step was taken"))
    assert train(*OPTIONS, "--config", config_file) == 2
    assert "error: " in capsys.readouterr().err


def test_the_trainer_is_freed_before_the_process_group(train, config_file, monkeypatch):
    """Freed after it, DDP's reducer may wait for a thread of gloo that waits for the GIL: the process then never ends."""
    alive, destroy = [], torch.distributed.destroy_process_group

    def spy():
        alive.extend(thing for thing in gc.get_objects() if type(thing) is Trainer)
        destroy()

    monkeypatch.setattr(torch.distributed, "destroy_process_group", spy)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    assert train(*OPTIONS, "--config", config_file, "--steps", 1) == 0
    assert not torch.distributed.is_initialized() and alive == []
