import sys
import types

import pytest
from PIL import Image

from movq_ext.training import log
from movq_ext.training.log import COLUMNS, TrainingLog


def test_rows_after_the_checkpoint_are_removed(tmp_path):
    first = TrainingLog(tmp_path, 0)
    for step in (10, 20, 30):
        first.write(step, {"loss": step / 3, "mse": 0.25})
    first.close()
    path = tmp_path / "log.csv"
    path.write_text(path.read_text() + "40,1.0")  # cut off
    second = TrainingLog(tmp_path, 20)
    second.write(30, {"mse": 0.5})
    second.close()
    rows = ["10,3.33333,0.25,,,,,,,,", "20,6.66667,0.25,,,,,,,,", "30,,0.5,,,,,,,,"]
    assert path.read_text() == "\n".join([",".join(COLUMNS), *rows, ""])


@pytest.mark.parametrize("tail", ["20,1.0\n", "20,1.0", "20" + 9 * ",0.5" + ",18.1"], ids=["short", "cut off", "last digits"])
def test_incomplete_rows_are_dropped(tmp_path, tail):
    first = TrainingLog(tmp_path, 0)
    first.write(10, {"loss": 0.5})
    first.close()
    path = tmp_path / "log.csv"
    complete = path.read_text()
    path.write_text(complete + tail)
    TrainingLog(tmp_path, 20).close()
    assert path.read_text() == complete


@pytest.mark.parametrize("damage", ["", "step\n", "a,b\n1,2\n", "\x00\n\x00", "step,loss\n1,2,3,4\n"])
def test_a_damaged_file_does_not_stop_a_run(tmp_path, damage):
    (tmp_path / "log.csv").write_text(damage)
    TrainingLog(tmp_path, 5).close()
    assert (tmp_path / "log.csv").read_text().startswith(",".join(COLUMNS))


def test_tensorboard_gets_the_same_values(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def __getattr__(self, name):
            return lambda *arguments, **keywords: calls.append((name, *arguments))

    monkeypatch.setattr(log, "find_spec", lambda name: name == "tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    training_log = TrainingLog(tmp_path, 7)
    training_log.write(8, {"loss": 0.5, "psnr": 20.0})
    training_log.write_picture(8, Image.new("RGB", (4, 2)))
    training_log.close()
    assert calls[:3] == [(str(tmp_path / "tensorboard"), 8), ("add_scalar", "loss", 0.5, 8), ("add_scalar", "psnr", 20.0, 8)]
    assert calls[3][:2] == ("add_image", "validation") and calls[3][2].shape == (2, 4, 3) and calls[4] == ("close",)


def test_tensorboard_reads_the_log(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    training_log = TrainingLog(tmp_path, 0)
    training_log.write(1, {"loss": 0.5})
    training_log.write_picture(1, Image.new("RGB", (4, 2)))
    training_log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5)]
    assert events.Tags()["images"] == ["validation"]
