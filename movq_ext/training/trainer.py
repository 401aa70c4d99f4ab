"""The training loop: steps, checkpoints and resuming, on one or several processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..assets import PHOTO_FOLDER
from ..io.files import remove_partial_files, require_writable, wrap_errors
from ..io.images import save_image
from ..io.weights import from_pretrained, save_pretrained
from ..model.autoencoder import MOVQ
from .checkpoint import CHECKPOINT_NAME, lock_folder, read_checkpoint, require_same_model, write_checkpoint
from .config import OptionError, TrainingConfig, changed_options
from .discriminator import Adversary
from .log import TrainingLog
from .losses import Reconstruction, StepLosses, compute_losses
from .perceptual import MIN_SIZE, PerceptualDistance
from .photographs import Photographs
from .validation import Validation, psnr

logger = logging.getLogger(__name__)


class Trainer:
    """Train a model, save checkpoints and resume from them.

    Under torchrun, create one Trainer per process: DDP averages the gradients, and rank 0 writes the files.

    Args:
        model: the model to train; moved to device.
        folder: photographs, searched recursively.
        out: folder for the checkpoint ``training.pt``, the EMA weights ``model/`` (see save_pretrained), the losses ``log.csv``
            and the pictures ``validation/``.
        config: options of the run.
        device: torch device.

    Raises:
        ValueError: a folder contains no images, or the model has no codebook.
        OptionError: config.crop does not suit the model or a loss. This is a ValueError.
        FileNotFoundError: a folder, or a file of the perceptual network, does not exist.
        CheckpointError: a file of the perceptual network is damaged or belongs to another network.
    """

    def __init__(self, model: MOVQ, folder: str | Path, out: str | Path, config: TrainingConfig, device: torch.device) -> None:
        if not model.quantize.n_e:
            raise ValueError("model must have a codebook, got n_embed=0")
        if config.crop % model.downsampling:
            raise OptionError("crop", f"must be a multiple of the model's downsampling {model.downsampling}, got {config.crop}")
        if config.perceptual_network and config.crop < MIN_SIZE:
            raise OptionError("crop", f"must be at least {MIN_SIZE} for the perceptual loss, got {config.crop}")
        self.config, self.device = config, device
        self.out = Path(out)
        self.step = 0
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.photographs = Photographs(folder, config.crop, config.max_pixels)
        self.validation = Validation(config.validation or PHOTO_FOLDER, 2 * config.crop, config.max_pixels)
        self.model = model.to(device).train()
        if config.checkpoint_activations:
            self.model.gradient_checkpointing_enable()
        self.average = deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.usage = torch.zeros(model.quantize.n_e, dtype=torch.long, device=device)  # of each code since the last restart
        self.reconstruction: nn.Module = Reconstruction(self.model)
        if self.world_size > 1:  # the codebook has no gradient in the continuous phase, hence find_unused_parameters
            self.reconstruction = nn.parallel.DistributedDataParallel(self.reconstruction, find_unused_parameters=True)
        self.perceptual_distance = self.adversary = None
        if config.perceptual_network:
            self.perceptual_distance = PerceptualDistance(config.perceptual_network).to(device)
        if config.adversarial_weight:
            self.adversary = Adversary(config, self.model.decoder.conv_out.out_channels, device, self.world_size > 1)

    @property
    def checkpoint(self) -> Path:
        """Path of the file that `save` writes and `resume` reads."""
        return self.out / CHECKPOINT_NAME

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Train from the current step to the last. Save and validate every ``config.save_every`` steps and at the end.

        should_stop is called after every step. If it returns True in any process, save and return.

        Raises the errors of `train_step`, and OSError if ``out`` is not writable, the disk is full or another process is training
        in ``out``.
        """
        if self.rank > 0:
            self._run_steps(None, should_stop)
            return
        self.out.mkdir(parents=True, exist_ok=True)
        model, validation = self.out / "model", self.out / "validation"
        for folder in (self.out, model, validation):
            if folder.exists():
                require_writable(folder)  # now rather than after the steps until the first checkpoint
        with lock_folder(self.out):
            remove_partial_files([self.checkpoint, self.out / "log.csv", model / "model.safetensors", model / "config.json"])
            if self.step > 0 and not self._model_is_saved():
                self._save_model()
            if self.step < self.config.steps:
                with closing(TrainingLog(self.out, self.step)) as log:
                    self._run_steps(log, should_stop)

    def _run_steps(self, log: TrainingLog | None, should_stop: Callable[[], bool]) -> None:
        config, stop = self.config, False
        with tqdm(initial=self.step, total=config.steps, disable=self.rank > 0, unit="step") as progress:
            while self.step < config.steps and not stop:
                losses = self.train_step()
                progress.update()
                is_last = self.step == config.steps
                save = is_last or self.step % config.save_every == 0
                if save or self.step % config.log_every == 0:
                    values = self._log_values(losses)
                    progress.set_postfix_str(f"loss {values['loss']:.4f}, PSNR {values['psnr']:.2f} dB", refresh=is_last)
                    if log is not None:
                        if save:
                            values["validation_psnr"] = self._validate(log)
                        log.write(self.step, values)
                stop = self._in_any_process(should_stop())
                if save or stop:  # after logging: a run that is killed in between logs these steps again
                    self.save()

    def train_step(self) -> StepLosses:
        """Take one optimiser step. Return the losses of this process's batch.

        Raises FloatingPointError, before the weights change, if the latents, a loss or the gradients of one are not finite. Every
        process raises it, except while the codebook is filled: then only a process whose own latents are not finite does.
        Raises ValueError if every image in the folder is unreadable.
        """
        config, quantized = self.config, self.step >= self.config.continuous_steps
        if self.step == config.continuous_steps and not config.keep_codebook:
            self._initialize_codebook()
        optimizers: list[torch.optim.Optimizer] = [self.optimizer]
        adversary = self.adversary if self.step >= config.adversarial_start else None
        if adversary is not None:
            optimizers.append(adversary.optimizer)
        x = self.photographs.batch(config.batch_size, self._seed_step(self.step)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp):
            decoded, codebook_loss, latents, indices = self.reconstruction(x, quantized)
            last_layer = self.model.decoder.conv_out.weight
            losses = compute_losses(x, decoded, codebook_loss, config, self.perceptual_distance, adversary, last_layer)
        total = losses.loss.detach()
        losses.loss.backward()
        if losses.discriminator is not None:
            losses.discriminator.backward()
            total = total + losses.discriminator.detach()
        norms = [nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0) for optimizer in optimizers]
        norm = torch.stack(norms).sum()
        if not bool((total + norm).isfinite()):  # once per step, since it waits for the GPU
            cause = "" if bool(latents.isfinite().all()) else "the encoder's latents are not finite: "
            for optimizer in optimizers:
                optimizer.zero_grad()  # so that a step after `resume` starts clean
            values = f"the loss is {total.item()} and the gradient norm {norm.item()}"
            raise FloatingPointError(f"{cause}{values} at step {self.step}; the last checkpoint is intact")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * self._learning_rate_factor()
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        if indices is not None:
            self.usage += torch.bincount(indices.flatten(), minlength=len(self.usage))
            # The codebook settles in the last tenth of the run.
            if self.step % config.restart_every == 0 and self.step < 0.9 * config.steps:
                self._restart_unused_codes(latents)
        self._update_average()
        return losses._replace(**{name: value.detach() for name, value in losses._asdict().items() if value is not None})

    def save(self) -> None:
        """Write the checkpoint and the EMA model, each atomically. Raises OSError if that fails."""
        usage = self.usage.clone()
        if self.world_size > 1:
            dist.all_reduce(usage)  # the sum is all that the next restart needs
        if self.rank == 0:
            network = self.perceptual_distance
            state = {
                "model_config": self.model.config,
                "step": self.step,
                "processes": self.world_size,
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "usage": usage,
                "adversary": None if self.adversary is None else self.adversary.state_dict(),
                "perceptual_network": None if network is None else network.fingerprint(),
            }
            write_checkpoint(self.checkpoint, self.config, state)
            self._save_model()
        if self.world_size > 1:
            dist.barrier()

    def resume(self) -> None:
        """Continue from the checkpoint in ``out``.

        Raises FileNotFoundError if there is none, ValueError if it is damaged or was saved with another config or model, and
        OptionError, which is a ValueError, if it was saved with another perceptual network.
        """
        path = self.checkpoint
        # load_state_dict moves the tensors to the device, except Adam's step counts: on a GPU, every step would wait for them.
        saved, state = read_checkpoint(path, "cpu")
        if changes := changed_options(saved, vars(self.config)):
            listed = "; ".join(f"{name}={old!r}, now {new!r}" for name, (old, new) in changes.items())
            raise ValueError(f"{path} was saved with {listed}")
        require_same_model(path, state["model_config"], self.model.config)
        network = self.perceptual_distance
        if state["perceptual_network"] != (None if network is None else network.fingerprint()):
            raise OptionError("perceptual_network", f"must have the weights that {path} was saved with, got others")
        if state["processes"] != self.world_size:
            logger.warning("%s was saved by %d processes, now %d: the steps differ from an uninterrupted run's",
                           path, state["processes"], self.world_size)  # fmt: skip
        with wrap_errors(ValueError, f"{path} is damaged"):
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.adversary is not None:
                self.adversary.load_state_dict(state["adversary"])
            if self.rank == 0:  # the others count from zero: `save` wrote the sum
                self.usage.copy_(state["usage"])
            self.step = int(state["step"])
        logger.info("resumed from %s at step %d", path, self.step)

    def _save_model(self) -> None:
        with wrap_errors(OSError, f"cannot write {self.out / 'model'}"):  # safetensors has errors of its own
            save_pretrained(self.average, self.out / "model")

    def _model_is_saved(self) -> bool:
        """Return True if ``model/`` holds the EMA weights of this step. A run may be killed between its two files."""
        folder = self.out / "model"
        try:
            saved, own = from_pretrained(folder).state_dict(), self.average.state_dict()
        except (OSError, ValueError):
            return False
        equal = saved.keys() == own.keys() and all(torch.equal(saved[name], own[name].cpu()) for name in own)
        return equal and (folder / "config.json").exists()

    def _log_values(self, losses: StepLosses) -> dict[str, float]:
        """Return the losses, averaged over all processes, the PSNR and the learning rate."""
        values = {name: value for name, value in losses._asdict().items() if value is not None}
        stacked = torch.stack([value.float() for value in values.values()])
        if self.world_size > 1:
            dist.all_reduce(stacked)
        numbers = dict(zip(values, (stacked / self.world_size).tolist(), strict=True))
        return {**numbers, "psnr": psnr(numbers["mse"]), "learning_rate": self.optimizer.param_groups[0]["lr"]}

    def _validate(self, log: TrainingLog) -> float:
        """Write the validation picture of this step. Return the mean PSNR in dB."""
        quality, picture = self.validation.run(self.average, self.device, self.step > self.config.continuous_steps)
        (self.out / "validation").mkdir(exist_ok=True)
        path = self.out / "validation" / f"step_{self.step:07}.png"
        remove_partial_files([path])
        save_image(picture, path)
        log.write_picture(self.step, picture)
        return quality

    def _in_any_process(self, condition: bool) -> bool:
        """Return True in every process if the condition holds in one: all must stop after the same step."""
        if self.world_size == 1:
            return condition
        shared = torch.tensor(int(condition), device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared)

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
        logger.info("step %d: filling the codebook with latents of the photographs", self.step)
        with tqdm(total=2 * codes, desc="codebook", unit="latent", leave=False, disable=self.rank > 0) as progress:
            while sum(len(chunk) for chunk in chunks) < 2 * codes:
                x = self.photographs.batch(self.config.batch_size, generator).to(self.device)
                chunks.append(_flatten_latents(self.model.encode(x)))
                progress.update(len(chunks[-1]))
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
