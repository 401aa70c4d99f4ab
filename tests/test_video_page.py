"""The table of docs/video.md that says what `accelerate` replaces in each video autoencoder, against its report."""

import re
from pathlib import Path

import pytest
from video_models import allegro, cogvideox, hunyuan_video, kandinsky6, kvae_video, magvit, mochi, temporal_decoder

from movq_ext import accelerate

PAGE = Path(__file__).parent.parent / "docs" / "video.md"
MODELS = {
    "AutoencoderKLCogVideoX": cogvideox,
    "AutoencoderKLKVAEVideo": kvae_video,
    "Kandinsky6SRVAE": kandinsky6,
    "AutoencoderKLHunyuanVideo": hunyuan_video,
    "AutoencoderKLMagvit": magvit,
    "AutoencoderKLMochi": mochi,
    "AutoencoderKLAllegro": allegro,
    "AutoencoderKLTemporalDecoder": temporal_decoder,
}


def table_row(model, report):
    """Return the row of the page's table for a model's report."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    replaced = ", ".join(f"`{name}`" for name in sorted(report.replaced))
    left = "; ".join(sorted({f"`{classes[name]}`: {reason}" for name, reason in report.skipped.items()}))
    return f"| `{type(model).__name__}` | {replaced} | {left or '-'} |"


def rows():
    return [line for line in PAGE.read_text().splitlines() if re.match(r"\| `\w+(VAE|Autoencoder|KL)\w*` \|", line)]


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_accelerates_report(name):
    model = MODELS[name]()
    assert table_row(model, accelerate(model)) in rows()


def test_the_table_has_every_model_once():
    assert [row.split("`")[1] for row in rows()] == list(MODELS)
