import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest

import movq_ext
from movq_ext import MOVQ
from movq_ext.training import SMALL_MODEL_CONFIG, TrainingConfig
from movq_ext.training.checkpoint import KEYS, read_checkpoint, write_checkpoint


@pytest.mark.parametrize(("name", "value", "message"), [
    ("steps", 0, "must be positive, got 0"),
    ("batch_size", -1, "must be positive"),
    ("learning_rate", float("nan"), "must be positive"),
    ("warmup_steps", -1, "must not be negative"),
    ("max_pixels", 0, "must be positive"),
    ("seed", (1 << 31) + 1, "must be between -2147483648 and 2147483648, got 2147483649"),
    ("ema_decay", 1.0, r"must be in \[0, 1\)"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(name, value, message):
    with pytest.raises(ValueError, match=f"{name} {message}"):
        TrainingConfig(**{name: value})


def test_a_checkpoint_of_a_config_with_paths_can_be_read(tmp_path):
    config = TrainingConfig(validation=Path("photos"), perceptual_network=[Path("vgg.pth"), "lpips.pth"])
    write_checkpoint(tmp_path / "training.pt", config, dict.fromkeys(KEYS[1:]))
    saved, _ = read_checkpoint(tmp_path / "training.pt", "cpu")
    assert saved == config
    assert (saved.validation, saved.perceptual_network) == ("photos", ("vgg.pth", "lpips.pth"))


def test_the_help_of_every_option_is_its_documentation():
    documented = dict(re.findall(r"^ {4}(\w+): (.+)\.$", inspect.getdoc(TrainingConfig), re.MULTILINE))
    assert {field.name: field.metadata["help"] for field in dataclasses.fields(TrainingConfig)}.items() <= documented.items()


def test_the_shipped_config_builds_the_shipped_model():
    shipped = json.loads((Path(movq_ext.__file__).parent / "assets/small/config.json").read_text())
    assert json.loads(json.dumps(MOVQ(**SMALL_MODEL_CONFIG).config)) == shipped
