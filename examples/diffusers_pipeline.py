"""Run a Kandinsky pipeline with movq_ext, and print what changed.

    python examples/diffusers_pipeline.py                     # a tiny pipeline with random weights: runs offline
    python examples/diffusers_pipeline.py --path kandinsky-community/kandinsky-2-2-decoder --device cuda

Needs diffusers. A real pipeline also needs transformers: `pip install diffusers transformers`.
"""

import argparse

import torch
from diffusers import AutoPipelineForText2Image, DDPMScheduler, UNet2DConditionModel, VQModel
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import KandinskyV22Pipeline

import movq_ext


def tiny_pipeline() -> tuple[KandinskyV22Pipeline, dict]:
    """Return Kandinsky 2.2's decoder pipeline with few channels and random weights, and inputs for it."""
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4,
        cross_attention_dim=32, encoder_hid_dim=32, encoder_hid_dim_type="image_proj", addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=(32, 64), latent_channels=4, norm_type="spatial", num_vq_embeddings=16,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    embeddings = {name: torch.randn(1, 32) for name in ("image_embeds", "negative_image_embeds")}
    return KandinskyV22Pipeline(unet, DDPMScheduler(), movq), {**embeddings, "height": 64, "width": 64}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--path", help="folder or name of a text-to-image pipeline; a tiny random one by default")
parser.add_argument("--prompt", default="a red fox in the snow")
parser.add_argument("--steps", type=int, default=25, help="denoising steps (%(default)s)")
parser.add_argument("--device", default="cpu")
parser.add_argument("--out", default="image.png", help="file to write (%(default)s)")
args = parser.parse_args()

if args.path:
    pipe, inputs = AutoPipelineForText2Image.from_pretrained(args.path), {"prompt": args.prompt}
else:
    pipe, inputs = tiny_pipeline()
print(movq_ext.accelerate(pipe.to(args.device)))  # in place; movq_ext.restore(pipe) undoes it
pipe(**inputs, num_inference_steps=args.steps).images[0].save(args.out)
