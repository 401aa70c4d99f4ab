"""The training loop: steps, checkpoints and resuming, on one or several processes."""

from __future__ import annotations

import logging
import math
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..io.files import atomic_write, require_file, wrap_errors
from ..io.weights import save_pretrained
from ..model.autoencoder import MOVQ
from .config import TrainingConfig
from .photographs import Photographs

logger = logging.getLogger(__name__)


class TrainingLoss(nn.Module):
    """The training loss as a module, so that DistributedDataParallel wraps every forward pass."""

    def __init__(self, model: MOVQ, codebook_weight: float) -> None:
        super().__init__()
        self.model = model
        self.codebook_weight = codebook_weight

    def forward(self, x: Tensor, quantized: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return (loss, mean squared error, latents, code indices or None) for images in [-1, 1]."""
        h = self.model.encode(x)
        if quantized:
            quant, codebook_loss, (_, _, indices) = self.model.quantize(h)
        else:
            # Noise about as large as the later quantisation error keeps the decoder from relying on exact latents.
            quant = h + 0.1 * h.detach().std() * torch.randn_like(h)
            codebook_loss, indices = h.new_zeros(()), None
        mse = F.mse_loss(self.model.decode(quant).float(), x)
        return mse + self.codebook_weight * codebook_loss, mse, h.detach(), indices


class Trainer:
    """Train a model, save checkpoints and resume from them.

    Under torchrun, create one Trainer per process: DDP averages the gradients, and rank 0 writes the files.

    Args:
        model: the model to train; moved to device.
        folder: photographs, searched recursively.
        out: folder for the checkpoint ``training.pt`` and the EMA weights ``model/`` (see save_pretrained).
        config: hyperparameters.
        device: torch device.
        checkpoint_activations: recompute activations in the backward pass. The steps are the same; they take less memory and
            more time. See ActivationCheckpointing.

    Raises:
        ValueError: folder contains no images, or config.crop is not a multiple of the model's downsampling factor.
        FileNotFoundError: folder does not exist.
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
        self.usage = torch.zeros(model.quantize.n_e, dtype=torch.long, device=device)  # of each code since the last restart
        self.step = 0
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.objective: nn.Module = TrainingLoss(self.model, config.codebook_weight)
        if self.world_size > 1:  # the codebook has no gradient in the continuous phase, hence find_unused_parameters
            self.objective = nn.parallel.DistributedDataParallel(self.objective, find_unused_parameters=True)

    @property
    def checkpoint(self) -> Path:
        """Path of the file that `save` writes and `resume` reads."""
        return self.out / "training.pt"

    def run(self, save_every: int = 500) -> None:
        """Train from the current step to the last. Save every ``save_every`` steps and at the end.

        Raises the errors of `train_step`, and OSError if ``out`` is not writable.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        steps = range(self.step, self.config.steps)
        with tqdm(steps, initial=self.step, total=self.config.steps, disable=self.rank > 0, unit="step") as progress:
            for _ in progress:
                loss, mse = self.train_step()
                if self.step % 10 == 0:
                    psnr = -10 * math.log10(max(mse.item() / 4, 1e-10))  # values span [-1, 1]: the squared peak is 4
                    progress.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr:.2f} dB", refresh=False)
                if self.step % save_every == 0 or self.step == self.config.steps:
                    self.save()

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Take one optimiser step. Return (loss, mean squared error) of this process's batch, two scalars.

        Raises FloatingPointError, in every process and before the weights change, if the latents, the loss or the gradients of
        one process are not finite, and ValueError if every image in the folder is unreadable.
        """
        config, quantized = self.config, self.step >= self.config.continuous_steps
        if self.step == config.continuous_steps:
            self._initialize_codebook()
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * self._learning_rate_factor()
        x = self.photographs.batch(config.batch_size, self._seed_step(self.step)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
            loss, mse, latents, indices = self.objective(x, quantized)
        loss.backward()
        gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not bool((loss + gradient_norm).isfinite()):  # once per step, since it waits for the GPU; before the weights change
            cause = "" if bool(latents.isfinite().all()) else "the encoder's latents are not finite: "
            self.optimizer.zero_grad()  # so that a step after `resume` starts clean
            values = f"the loss is {loss.item()} and the gradient norm {gradient_norm.item()}"
            raise FloatingPointError(f"{cause}{values} at step {self.step}; the last checkpoint is intact")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if indices is not None:
            self.usage += torch.bincount(indices.flatten(), minlength=len(self.usage))
            # The codebook settles in the last tenth of the run.
            if self.step % config.restart_every == 0 and self.step < 0.9 * config.steps:
                self._restart_unused_codes(latents)
        self._update_average()
        return loss.detach(), mse.detach()

    def save(self) -> None:
        """Write the checkpoint and the EMA model, each atomically."""
        if self.rank == 0:
            state = {
                "config": asdict(self.config),
                "step": self.step,
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "usage": self.usage,
            }
            with atomic_write(self.checkpoint) as partial:
                torch.save(state, partial)
            save_pretrained(self.average, self.out / "model")
        if self.world_size > 1:
            dist.barrier()

    def resume(self) -> None:
        """Continue from the checkpoint in ``out``.

        Raises FileNotFoundError if there is none, and ValueError if it is damaged or was saved with another config.
        """
        require_file(self.checkpoint)
        with wrap_errors(ValueError, f"{self.checkpoint} is damaged"):
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            saved = dict(state["config"])
        changed = [
            f"{name}={saved.get(name)!r}, now {value!r}"
            for name, value in asdict(self.config).items()
            if name != "steps" and saved.get(name) != value
        ]
        if changed:
            raise ValueError(f"{self.checkpoint} was saved with {'; '.join(changed)}")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.usage.copy_(state["usage"])
        self.step = state["step"]
        logger.info("resumed from %s at step %d", self.checkpoint, self.step)

    def _learning_rate_factor(self) -> float:
        """Return the linear warm-up times a half cosine that ends at zero."""
        warm_up = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        return warm_up * 0.5 * (1 + math.cos(math.pi * self.step / self.config.steps))

    def _seed_step(self, step: int) -> torch.Generator:
        """Seed torch and return a generator for the data. A step's randomness depends only on (seed, step, rank)."""
        seed = (self.config.seed * 1_000_003 + step) * 4096 + self.rank
        torch.manual_seed(seed)
        return torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def _initialize_codebook(self) -> None:
        """Set the codebook to a random sample of the data's latents, so that its density follows theirs."""
        codes = self.model.quantize.n_e
        chunks: list[Tensor] = []
        generator = self._seed_step(-1 - self.config.seed)
        while sum(len(chunk) for chunk in chunks) < 2 * codes:
            x = self.photographs.batch(self.config.batch_size, generator).to(self.device)
            chunks.append(_flatten_latents(self.model.encode(x)))
        vectors = torch.cat(chunks)
        sample = torch.randperm(len(vectors), device=self.device)[:codes]
        self._set_codes(torch.arange(codes, device=self.device), vectors[sample])

    @torch.no_grad()
    def _restart_unused_codes(self, latents: Tensor) -> None:
        """Replace codes that no latent has used since the last restart with latents of this step."""
        if self.world_size > 1:
            dist.all_reduce(self.usage)
        unused = (self.usage == 0).nonzero().flatten()
        vectors = _flatten_latents(latents)
        sample = torch.randperm(len(vectors), generator=self._seed_step(self.step))[: len(unused)].to(self.device)
        self._set_codes(unused[: len(sample)], vectors[sample])
        self.usage.zero_()

    def _set_codes(self, indices: Tensor, vectors: Tensor) -> None:
        if self.world_size > 1:
            dist.broadcast(vectors, src=0)
        for model in (self.model, self.average):
            model.quantize.embedding.weight.data[indices] = vectors.to(model.quantize.embedding.weight.dtype)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))  # follow the model closely in the first steps
        average: list[Tensor] = list(self.average.parameters())
        weights: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(average, weights, 1 - decay)


def _flatten_latents(latents: Tensor) -> Tensor:
    """Reshape ``(B, C, h, w)`` to ``(B * h * w, C)`` float32."""
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).float()
