"""Which file of a folder from_pretrained loads: subfolders, variants and pipelines."""

import json
import shutil

import pytest
import torch
from checkpoints import make_movq, same_weights
from safetensors.torch import load_file, save_file
from tolerances import relative_error

from movq_ext import CheckpointError, from_pretrained, save_pretrained

pytest.importorskip("diffusers")

from vq_models import LIMIT, vq_model

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def theirs():
    return vq_model()


@pytest.fixture
def pipeline(tmp_path, theirs):
    """The folder of a pipeline with an autoencoder in movq/."""
    folder = tmp_path / "pipeline"
    theirs.save_pretrained(folder / "movq")
    (folder / "unet").mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyV22Pipeline"}))
    return folder


def decodes_like(ours, theirs):
    h = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return relative_error(ours.decode(h), theirs.decode(h, force_not_quantize=True).sample) < LIMIT


def test_a_pipeline_gives_its_autoencoder(pipeline, theirs):
    assert decodes_like(from_pretrained(pipeline), theirs)
    (pipeline / "movq").rename(pipeline / "vae")
    assert decodes_like(from_pretrained(pipeline), theirs)
    (pipeline / "vae").rename(pipeline / "image_decoder")
    assert decodes_like(from_pretrained(pipeline, subfolder="image_decoder"), theirs)
    with pytest.raises(CheckpointError, match=r"a pipeline with movq/ or vae/; .* has image_decoder/, model_index.json, unet/$"):
        from_pretrained(pipeline)


def test_subfolder(pipeline, theirs):
    assert decodes_like(from_pretrained(pipeline, subfolder="movq"), theirs)
    assert decodes_like(from_pretrained(pipeline.parent, subfolder=pipeline.name), theirs)
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*/vqvae; .* has model_index.json, movq/, unet/$"):
        from_pretrained(pipeline, subfolder="vqvae")
    save_pretrained(make_movq(), pipeline / "ours")
    assert same_weights(from_pretrained(pipeline, subfolder="ours"), make_movq())
    for choice in ({"subfolder": "movq"}, {"variant": "fp16"}):
        with pytest.raises(ValueError, match=r"subfolder and variant are only for folders, and .* is a file"):
            from_pretrained(pipeline / "movq" / FILE, **choice)


@pytest.mark.parametrize("as_safetensors", [True, False])
def test_variant(pipeline, as_safetensors):
    shutil.rmtree(pipeline / "movq")
    half = vq_model().half()
    half.save_pretrained(pipeline / "movq", variant="fp16", safe_serialization=as_safetensors)
    half.float()
    assert decodes_like(from_pretrained(pipeline, variant="fp16"), half)
    assert decodes_like(from_pretrained(pipeline / "movq", variant="fp16"), half)
    for folder in (pipeline, pipeline / "movq"):
        with pytest.raises(FileNotFoundError, match=r"no such file: .*_model.safetensors .*: pass variant='fp16'"):
            from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*_model.bf16.safetensors \(or .bin\); .* has "):
        from_pretrained(pipeline, variant="bf16")


@pytest.mark.parametrize("changes", [
    {}, dict(widths=(32, 64, 64, 128), attention=(False, False, False, True), layers=2), dict(mid_block_add_attention=False),
    dict(widths=(32,), attention=(False,)),
], ids=["small", "four levels", "no attention in the middle", "one level"])  # fmt: skip
def test_a_weight_file_alone(tmp_path, changes):
    """The config is inferred from the shapes, as for an original checkpoint."""
    theirs = vq_model(**changes)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / FILE)
    save_file(state, tmp_path / "kandinsky.safetensors")
    torch.save({"state_dict": {f"movq.{name}": tensor for name, tensor in state.items()}}, tmp_path / "kandinsky.ckpt")
    (tmp_path / "config.json").unlink()
    for path in (tmp_path / "kandinsky.safetensors", tmp_path / "kandinsky.ckpt", tmp_path / FILE, tmp_path):
        assert decodes_like(from_pretrained(path), theirs), path


def test_a_weight_file_with_group_norm_is_named(tmp_path):
    vq_model(norm_type="group").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is an autoencoder without SpatialNorm"):
        from_pretrained(tmp_path / FILE)


def test_a_checkpoint_named_like_ours(tmp_path):
    """Accelerate saves the entries alone as model.safetensors."""
    save_file(dict(make_movq().state_dict()), tmp_path / "model.safetensors")
    assert same_weights(from_pretrained(tmp_path), make_movq())
