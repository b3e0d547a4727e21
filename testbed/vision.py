"""The two digit classifiers: a vision transformer and a residual CNN."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from testbed import digits
from testbed.loop import Schedule, Spent, batch_rows, fit, generator


@dataclass(frozen=True)
class VisionRecipe:
    """A digit classifier: its config's fields, whether it sees enlarged images, its schedule."""

    name: str
    config: Mapping[str, object]
    enlarged: bool
    schedule: Schedule


VIT = VisionRecipe(
    name="vit",
    config={
        "image_size": 24,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "num_labels": 10,
        # Wide enough for a width of 64: the default of 0.02 trains several times slower.
        "initializer_range": 0.1,
    },
    enlarged=True,
    schedule=Schedule(
        cycles=(2000,), batch=32, learning_rate=1e-3, warmup=100, weight_decay=0.05, seed=4
    ),
)

CNN = VisionRecipe(
    name="cnn",
    config={"widths": (24, 48, 96), "blocks": 3, "classes": 10},
    enlarged=False,
    schedule=Schedule(
        cycles=(600,), batch=64, learning_rate=2e-3, warmup=50, weight_decay=0.05, seed=5
    ),
)

RECIPES = {recipe.name: recipe for recipe in (VIT, CNN)}


def build(recipe: VisionRecipe) -> nn.Module:
    """An untrained classifier in float32."""
    torch.manual_seed(recipe.schedule.seed)
    if recipe.name == "cnn":
        from testbed.cnn import DigitCNN

        return DigitCNN(**recipe.config)
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**recipe.config)).float()


def logits(module: nn.Module, pixel_values: Tensor) -> Tensor:
    """Class scores `[n, 10]`, whether the module returns a tensor or a `transformers` output."""
    output = module(pixel_values=pixel_values)
    return output if isinstance(output, Tensor) else output.logits


def train(recipe: VisionRecipe, work: Path) -> tuple[nn.Module, Spent]:
    """Train from scratch on the digits' training rows, with checkpoints under `work`."""
    data = digits.load("training")
    module = build(recipe)
    prepare: Callable[[Tensor], Tensor] = digits.enlarge if recipe.enlarged else torch.clone

    def loss(module: nn.Module, step: int) -> Tensor:
        rows = batch_rows(len(data.labels), recipe.schedule, step)
        images = digits.jitter(data.images[rows], generator(recipe.schedule.seed, step))
        return functional.cross_entropy(
            logits(module, prepare(images)), data.labels[rows], label_smoothing=0.05
        )

    return module, fit(module, loss, recipe.schedule, work / f"{recipe.name}.pt")
