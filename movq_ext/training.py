"""Training a MoVQ autoencoder on a folder of photographs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .io.checkpoint import save_pretrained
from .io.files import refusing, replacing, require_file
from .io.images import find_images, load_image, to_tensor
from .model.autoencoder import MOVQ

log = logging.getLogger(__name__)

#: MOVQ's keywords for the model that ships with the package, with 8x downsampling, 4 latent channels and 3.0 million parameters.
SMALL_MODEL: dict[str, Any] = {
    "ddconfig": {
        "ch": 32,
        "out_ch": 3,
        "ch_mult": (1, 1, 2, 4),
        "num_res_blocks": 1,
        "attn_resolutions": (32,),
        "in_channels": 3,
        "resolution": 256,
        "z_channels": 4,
    },
    "n_embed": 16384,
    "embed_dim": 4,
}


@dataclass
class TrainingConfig:
    """What a run depends on; a checkpoint resumes only under the config it was made with (``steps`` may grow).

    Args:
        steps: of the optimiser.
        batch_size: crops a step, in each process.
        crop: height and width in pixels; a multiple of the model's downsampling.
        learning_rate: of AdamW, the highest; it falls along half a cosine to zero.
        warmup_steps: in which it rises from zero.
        continuous_steps: steps before the codebook is put between encoder and decoder.
        restart_every: steps between moving unused codes to latents that were seen.
        codebook_weight: of the codebook's loss beside the mean squared error.
        ema_decay: share of itself that the averaged model keeps in a step.
        amp: bfloat16 autocast.
        seed: of all randomness.

    Raises:
        ValueError: a number is out of its range.
    """

    steps: int = 20_000
    batch_size: int = 8
    crop: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    continuous_steps: int = 500
    restart_every: int = 100
    codebook_weight: float = 0.25
    ema_decay: float = 0.999
    amp: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "crop", "restart_every", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "continuous_steps", "codebook_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


class Photographs:
    """Random crops of a folder's pictures, a pure function of (seed, index), so that a resumed run sees the same ones."""

    CACHE_BYTES = 2 << 30

    def __init__(self, folder: str | Path, crop: int) -> None:
        self.files = [file for file, _ in find_images([folder])]
        if not self.files:
            raise ValueError(f"{folder} holds no pictures")
        self.crop = crop
        self._cache: dict[Path, Image.Image] = {}
        self._cached_bytes = 0
        self._unreadable: set[Path] = set()

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """``(size, 3, crop, crop)`` in [-1, 1]."""
        return torch.stack([self._crop(generator) for _ in range(size)])

    def _crop(self, generator: torch.Generator) -> Tensor:
        pick, zoom, across, down, flip = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        image = self._readable(int(pick * len(self.files)))
        # The crop's footprint in the photograph: from one pixel a pixel to half the picture's shorter side, so that the
        # model sees both fine texture and whole photographs made small.
        widest = max(self.crop, min(image.size) / 2)
        side = min(self.crop * (widest / self.crop) ** math.sqrt(zoom), *image.size)
        left, top = across * (image.width - side), down * (image.height - side)
        box = (left, top, left + side, top + side)
        x = to_tensor(image.resize((self.crop, self.crop), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0))
        return x.flip(2) if flip < 0.5 else x

    def _readable(self, index: int) -> Image.Image:
        """The picture at index, or the next one that can be read."""
        for file in self.files[index:] + self.files[:index]:
            if file not in self._unreadable:
                try:
                    return self._load(file)
                except OSError as error:
                    self._unreadable.add(file)
                    log.warning("left out: %s", error)
        raise ValueError(f"none of the {len(self.files)} pictures can be read")

    def _load(self, file: Path) -> Image.Image:
        if file not in self._cache:
            image = load_image(file)
            size = 3 * image.width * image.height
            if self._cached_bytes + size > self.CACHE_BYTES:
                return image
            self._cache[file] = image
            self._cached_bytes += size
        return self._cache[file]


class Objective(nn.Module):
    """The training loss as one module, so that DistributedDataParallel sees every forward pass."""

    def __init__(self, model: MOVQ, codebook_weight: float) -> None:
        super().__init__()
        self.model = model
        self.codebook_weight = codebook_weight

    def forward(self, x: Tensor, quantized: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(loss, mean squared error, latents, code indices or None) of images in [-1, 1]."""
        h = self.model.encode(x)
        if quantized:
            quant, codebook_loss, (_, _, indices) = self.model.quantize(h)
        else:
            # Noise of about the size of the later quantisation error keeps the decoder from relying on exact latents.
            quant, codebook_loss, indices = h + 0.1 * h.detach().std() * torch.randn_like(h), h.new_zeros(()), None
        mse = F.mse_loss(self.model.decode(quant).float(), x)
        return mse + self.codebook_weight * codebook_loss, mse, h.detach(), indices


class Trainer:
    """Trains, checkpoints and resumes.

    Under torchrun every process calls this; gradients are averaged and process 0 writes the files.

    Args:
        model: the model to train; moved to device.
        folder: photographs, searched to the bottom.
        out: folder for ``training.pt`` (the checkpoint) and ``model/`` (the averaged weights, see save_pretrained).
        config: hyperparameters.
        device: torch device.
        checkpoint_activations: train in less memory and more time, the very same steps; see ActivationCheckpointing.

    Raises:
        ValueError: folder holds no pictures, or config's crop is not a multiple of the model's downsampling.
        FileNotFoundError: there is no such folder.
    """

    def __init__(
        self,
        model: MOVQ,
        folder: str | Path,
        out: str | Path,
        config: TrainingConfig,
        device: torch.device,
        checkpoint_activations: bool = False,
    ) -> None:
        if config.crop % model.downsampling:
            raise ValueError(f"crop must be a multiple of the model's downsampling {model.downsampling}, got {config.crop}")
        self.config, self.device = config, device
        self.out = Path(out)
        self.photographs = Photographs(folder, config.crop)
        self.model = model.to(device).train()
        if checkpoint_activations:
            self.model.gradient_checkpointing_enable()
        self.average = deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.usage = torch.zeros(model.quantize.n_e, dtype=torch.long, device=device)  # since the last restart
        self.step = 0
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        objective = Objective(self.model, config.codebook_weight)
        self.objective: nn.Module = objective
        if self.world_size > 1:  # the codebook has no part in the continuous phase, hence find_unused_parameters
            self.objective = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)

    @property
    def checkpoint(self) -> Path:
        """The file that `save` writes and `resume` reads."""
        return self.out / "training.pt"

    def run(self, save_every: int = 500) -> None:
        """Train from the current step to the last, saving every ``save_every`` steps and at the end.

        Raises what `train_step` raises, and OSError where ``out`` cannot be written to.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        steps = range(self.step, self.config.steps)
        with tqdm(steps, initial=self.step, total=self.config.steps, disable=self.rank > 0, unit="step") as progress:
            for _ in progress:
                loss, mse = self.train_step()
                if self.step % 10 == 0:
                    psnr = -10 * math.log10(max(mse.item() / 4, 1e-10))  # the images span 2, so the peak's square is 4
                    progress.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr:.2f} dB", refresh=False)
                if self.step % save_every == 0 or self.step == self.config.steps:
                    self.save()

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimiser step; returns (loss, mean squared error) of this process's batch, two scalars.

        Raises FloatingPointError where the loss is not finite, and ValueError where no picture of the folder can be read.
        """
        config, quantized = self.config, self.step >= self.config.continuous_steps
        if self.step == config.continuous_steps:
            self._initialize_codebook()
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * self._schedule()
        with self._seeded(self.step) as generator:
            x = self.photographs.batch(config.batch_size, generator).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
                loss, mse, latents, indices = self.objective(x, quantized)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}; the last checkpoint is intact")
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if indices is not None:
            self.usage += torch.bincount(indices.flatten(), minlength=len(self.usage))
            # Near the end the codebook must settle, so no code is moved in the last tenth.
            if self.step % config.restart_every == 0 and self.step < 0.9 * config.steps:
                self._restart_unused_codes(latents)
        self._update_average()
        return loss.detach(), mse.detach()

    def save(self) -> None:
        """Write checkpoint and averaged model; each replaces the old one whole or not at all."""
        if self.rank == 0:
            state = {
                "config": asdict(self.config),
                "step": self.step,
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "usage": self.usage,
            }
            with replacing(self.checkpoint) as partial:
                torch.save(state, partial)
            save_pretrained(self.average, self.out / "model")
        if self.world_size > 1:
            dist.barrier()

    def resume(self) -> None:
        """Continue from the checkpoint in ``out``.

        Raises FileNotFoundError if there is none, and ValueError if it is damaged or was made with another config.
        """
        require_file(self.checkpoint)
        with refusing(ValueError, f"{self.checkpoint} is damaged"):
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            theirs = dict(state["config"])
        ours = asdict(self.config)
        changed = [
            f"{key}={theirs.get(key)!r}, now {ours[key]!r}" for key in ours if key != "steps" and theirs.get(key) != ours[key]
        ]
        if changed:
            raise ValueError(f"{self.checkpoint} was made with {'; '.join(changed)}")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.usage.copy_(state["usage"])
        self.step = state["step"]
        log.info("resumed %s at step %d", self.checkpoint, self.step)

    def _schedule(self) -> float:
        """Linear warm-up, then half a cosine to zero."""
        warm = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        return warm * 0.5 * (1 + math.cos(math.pi * self.step / self.config.steps))

    @contextmanager
    def _seeded(self, step: int) -> Iterator[torch.Generator]:
        """All randomness of a step follows from (seed, step, rank), whatever ran before."""
        seed = (self.config.seed * 1_000_003 + step) * 4096 + self.rank
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def _initialize_codebook(self) -> None:
        """Start the codebook on latents drawn from the data: its density then follows theirs."""
        codes = self.model.quantize.n_e
        latents: list[Tensor] = []
        with self._seeded(-1 - self.config.seed) as generator:
            while sum(len(chunk) for chunk in latents) < 2 * codes:
                x = self.photographs.batch(self.config.batch_size, generator).to(self.device)
                latents.append(_rows(self.model.encode(x)))
            rows = torch.cat(latents)
            self._set_codes(torch.arange(codes, device=self.device), rows[torch.randperm(len(rows), device=self.device)[:codes]])

    @torch.no_grad()
    def _restart_unused_codes(self, latents: Tensor) -> None:
        """Move codes that no latent chose since the last restart onto latents of this step."""
        if self.world_size > 1:
            dist.all_reduce(self.usage)
        unused = (self.usage == 0).nonzero().flatten()
        rows = _rows(latents)
        with self._seeded(self.step) as generator:
            choice = torch.randperm(len(rows), generator=generator)[: len(unused)].to(self.device)
        self._set_codes(unused[: len(choice)], rows[choice])
        self.usage.zero_()

    def _set_codes(self, indices: Tensor, rows: Tensor) -> None:
        if self.world_size > 1:
            dist.broadcast(rows, src=0)
        for model in (self.model, self.average):
            model.quantize.embedding.weight.data[indices] = rows.to(model.quantize.embedding.weight.dtype)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        average: list[Tensor] = list(self.average.parameters())
        weights: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(average, weights, 1 - decay)


def _rows(latents: Tensor) -> Tensor:
    """``(B, C, h, w)`` to ``(B * h * w, C)`` float32."""
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).float()
