"""How good a model is: one figure for each kind, for the model itself or a changed copy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from testbed import diffusion, digits, vision
from testbed.loader import TestbedModel
from testbed.splits import Split


@dataclass(frozen=True)
class Metric:
    """The name of a figure, which direction is better, and how it is computed."""

    name: str
    higher_is_better: bool
    of: Callable[[nn.Module, Split], float]


@torch.no_grad()
def measure(
    model: TestbedModel,
    split: str = "reporting",
    *,
    limit: int | None = None,
    module: nn.Module | None = None,
) -> float:
    """The figure (see `METRICS`) on the first `limit` examples, perhaps of another `module`."""
    data = model.splits[split]
    return METRICS[model.name].of(module or model.module, data.part(slice(limit)))


def perplexity(module: nn.Module, data: Split) -> float:
    """`exp` of the mean negative log-likelihood per predicted token."""
    losses = [_token_losses(module, part.inputs["input_ids"]) for part in data.batches(8)]
    return torch.cat(losses).double().mean().exp().item()


def _token_losses(module: nn.Module, tokens: Tensor) -> Tensor:
    logits = module(input_ids=tokens, use_cache=False).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )


def accuracy(module: nn.Module, data: Split) -> float:
    """Share of images whose highest score is their class."""
    guesses = [
        vision.logits(module, part.inputs["pixel_values"]).argmax(-1) for part in data.batches(100)
    ]
    return (torch.cat(guesses) == data.targets).double().mean().item()


def noise_error(module: nn.Module, data: Split) -> float:
    """Mean squared error of the predicted noise, whose own variance is 1."""
    errors = [
        (module(**part.inputs).sample - part.targets).square().flatten(1).mean(1)
        for part in data.batches(100)
    ]
    return torch.cat(errors).double().mean().item()


def same_package(module: nn.Module, data: Split) -> float:
    """Share of sentences whose nearest other sentence is from the same package (chance 0.25)."""
    vectors = torch.cat([embed(module, part.inputs) for part in data.batches(64)])
    similarity = (vectors @ vectors.T).fill_diagonal_(-1)
    return (data.targets[similarity.argmax(1)] == data.targets).double().mean().item()


def embed(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Unit vectors `[n, d]`: the mean over real tokens of the last hidden state."""
    hidden = module(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def recognised(
    predict: diffusion.Denoiser,
    classifier: nn.Module,
    *,
    each: int = 20,
    steps: int = 50,
    scale: float = 2.0,
    seed: int = 0,
) -> float:
    """Share of guided samples, `each` per class, that the classifier takes for the wanted class."""
    labels = torch.arange(10).repeat(each)
    images = diffusion.sample(predict, labels, steps=steps, scale=scale, seed=seed)
    guesses = vision.logits(classifier, digits.enlarge(images)).argmax(-1)
    return (guesses == labels).double().mean().item()


METRICS = {
    "gpt2": Metric("perplexity", False, perplexity),
    "qwen3": Metric("perplexity", False, perplexity),
    "mixtral": Metric("perplexity", False, perplexity),
    "vit": Metric("accuracy", True, accuracy),
    "cnn": Metric("accuracy", True, accuracy),
    "dit": Metric("noise error", False, noise_error),
    "minilm": Metric("same package", True, same_package),
}
