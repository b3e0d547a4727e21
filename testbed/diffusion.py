"""A class-conditional diffusion transformer on the digits, its noise schedule, a DDIM sampler."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from testbed import digits
from testbed.loop import Schedule, Spent, batch_rows, fit, generator

TIMESTEPS = 1000
UNCONDITIONAL = 10
DROP_LABEL = 0.1

# hidden_states [n, 1, 8, 8], timestep [n], class_labels [n] -> predicted noise [n, 1, 8, 8]
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DiffusionRecipe:
    """The fields of `DiTTransformer2DModel`'s config, and the training schedule."""

    name: str
    config: Mapping[str, object]
    schedule: Schedule


DIT = DiffusionRecipe(
    name="dit",
    config={
        "num_layers": 8,
        "num_attention_heads": 6,
        "attention_head_dim": 16,
        "in_channels": 1,
        "out_channels": 1,
        "sample_size": 8,
        "patch_size": 2,
        # In this class the field counts the labels only; timesteps are encoded as sinusoids.
        "num_embeds_ada_norm": UNCONDITIONAL,
    },
    schedule=Schedule(
        cycles=(4000,), batch=64, learning_rate=1e-3, warmup=100, weight_decay=0.01, seed=6
    ),
)


def build(recipe: DiffusionRecipe) -> nn.Module:
    """An untrained denoiser in float32."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(recipe.schedule.seed)
    module = DiTTransformer2DModel(**recipe.config).float()
    for part in module.modules():
        # Each block would drop labels on its own; the loss below drops them once for all blocks.
        if hasattr(part, "dropout_prob"):
            part.dropout_prob = 0.0
    return module


def signal_levels() -> Tensor:
    """Share of signal variance left at each timestep: DDPM's linear schedule (Ho et al. 2020)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64), 0).float()


def add_noise(images: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Images `[n, 1, 8, 8]` as they look at `timestep` `[n]`."""
    level = signal_levels()[timestep].view(-1, 1, 1, 1)
    return level.sqrt() * images + (1 - level).sqrt() * noise


def train(recipe: DiffusionRecipe, work: Path) -> tuple[nn.Module, Spent]:
    """Train from scratch to predict the noise, with checkpoints under `work`."""
    data = digits.load("training")

    def loss(module: nn.Module, step: int) -> Tensor:
        random = generator(recipe.schedule.seed, step)
        rows = batch_rows(len(data.labels), recipe.schedule, step)
        noise = torch.randn(data.images[rows].shape, generator=random)
        timestep = torch.randint(TIMESTEPS, (len(rows),), generator=random)
        dropped = torch.rand(len(rows), generator=random) < DROP_LABEL
        labels = data.labels[rows].masked_fill(dropped, UNCONDITIONAL)
        noisy = add_noise(data.images[rows], noise, timestep)
        return functional.mse_loss(denoise(module)(noisy, timestep, labels), noise)

    module = build(recipe)
    return module, fit(module, loss, recipe.schedule, work / f"{recipe.name}.pt")


def denoise(module: nn.Module) -> Denoiser:
    """The module as a plain function of tensors."""
    return lambda noisy, timestep, labels: module(noisy, timestep, labels).sample


def guided(predict: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance: both predictions in one batch, the conditional half first."""

    def predict_both(noisy: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        free = torch.full_like(labels, UNCONDITIONAL)
        both = predict(noisy.repeat(2, 1, 1, 1), timestep.repeat(2), torch.cat([labels, free]))
        wanted, unconditional = both.chunk(2)
        return unconditional + scale * (wanted - unconditional)

    return predict_both


@torch.no_grad()
def sample(
    predict: Denoiser, labels: Tensor, *, steps: int = 50, scale: float = 2.0, seed: int = 0
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021): images `[n, 1, 8, 8]` in -1..1 for `labels` `[n]`.

    `predict` sees the timesteps from high to low, one call a step, so a cache between calls may
    live inside it.
    """
    levels = signal_levels()
    times = torch.linspace(TIMESTEPS - 1, 0, steps).round().long()
    after = torch.cat([levels[times[1:]], torch.ones(1)])
    image = torch.randn((len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    both = guided(predict, scale)
    for time, level, target in zip(times, levels[times], after, strict=True):
        noise = both(image, time.expand(len(labels)), labels)
        clean = ((image - (1 - level).sqrt() * noise) / level.sqrt()).clamp(-1, 1)
        # The clamped estimate implies another noise; the old one would leave the schedule.
        noise = (image - level.sqrt() * clean) / (1 - level).sqrt()
        image = target.sqrt() * clean + (1 - target).sqrt() * noise
    return image
