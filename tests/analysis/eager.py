"""Small Hugging Face models whose layers are watched by hooks: the slow, plain reference.

Everything here reads the eager module, nothing the graph, and keeps every token in memory.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import zoo
from torch import Tensor, nn

from redpass.data import Batches
from redpass.facts import Facts
from redpass.program import Program

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
WORDS = SMALL | {"vocab_size": 50, "pad_token_id": 0}
Pair = tuple[str, str]


@dataclass
class Watched:
    """A module, its program, data, and where its layers and branches are.

    Attributes:
        layers: path of the list of layers; `branches`: path of a branch's last module in a layer.
        is_post_norm: whether a branch's output meets the layer's input in front of a norm.
    """

    module: nn.Module
    program: Program
    data: Batches
    layers: str
    branches: Pair
    seen: dict[str, list[Tensor]] = field(default_factory=dict)

    def facts(self, data: Batches | None = None) -> Facts:
        return Facts(self.program, data or self.data)

    def stack(self) -> list[nn.Module]:
        return list(self.module.get_submodule(self.layers))

    def tokens(self, per_batch: list[Tensor]) -> np.ndarray:
        """All tokens that are no padding, float64 `[tokens, width]`."""
        kept = []
        for values, batch in zip(per_batch, self.data, strict=True):
            mask = batch.get("attention_mask", torch.ones(values.shape[:2]))
            kept.append(values[mask.bool()])
        return torch.cat(kept).double().numpy()

    def run(self) -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in self.data:
                self.module(**batch)

    def stages(self) -> list[np.ndarray]:
        """The stream before the first layer and behind each."""
        inputs: list[list[Tensor]] = [[] for _ in self.stack()]
        outputs: list[list[Tensor]] = [[] for _ in self.stack()]
        with hooked(self.stack(), lambda i, x, y: (inputs[i].append(x), outputs[i].append(y))):
            self.run()
        return [self.tokens(inputs[0]), *map(self.tokens, outputs)]

    def parts(self, branch: int) -> list[np.ndarray]:
        """What branch 0 (attention) or 1 (feed-forward) of each layer adds to the stream."""
        made: list[list[Tensor]] = [[] for _ in self.stack()]
        modules = [layer.get_submodule(self.branches[branch]) for layer in self.stack()]
        with hooked(modules, lambda i, x, y: made[i].append(y)):
            self.run()
        return [self.tokens(values) for values in made]

    def end_without(self, number: int) -> np.ndarray:
        """The stream behind the last layer when one layer hands on its input."""
        outputs: list[Tensor] = []
        last = len(self.stack()) - 1

        def skip(i: int, x: Tensor, y: Tensor) -> Tensor | None:
            kept = x if i == number else y
            if i == last:
                outputs.append(kept)
            return kept if i == number else None

        with hooked(self.stack(), skip):
            self.run()
        return self.tokens(outputs)


@contextmanager
def hooked(modules: list[nn.Module], act: Callable[[int, Tensor, Tensor], Any]) -> Iterator[None]:
    """Calls `act(number, input, output)`; a tensor it returns is what the module gives instead."""

    def hook(i: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        found = act(i, given, output[0] if isinstance(output, tuple) else output)
        if not isinstance(found, Tensor):
            return None
        return (found, *output[1:]) if isinstance(output, tuple) else found

    handles = [
        module.register_forward_hook(functools.partial(hook, i), with_kwargs=True)
        for i, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sentences(side: str, seed: int = 0) -> Batches:
    """Two batches of token ids, padded on one side; no row is shorter than three tokens."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for length, rows in ((9, 4), (7, 3)):
        ids = torch.randint(1, 50, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, rows):
            hidden = slice(0, row) if side == "left" else slice(length - row, length)
            mask[row, hidden] = 0
        items.append({"input_ids": ids, "attention_mask": mask})
    return Batches(tuple(items), "sentences")


def pictures() -> Batches:
    generator = torch.Generator().manual_seed(0)
    items = ({"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)} for _ in range(2))
    return Batches(tuple(items), "pictures")


def _model(name: str, head: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    module: nn.Module = getattr(transformers, name + head)(config)
    return module.eval()


@functools.cache
def watched(name: str) -> Watched:
    """One of `MODELS`, traced once a session."""
    kind, head, options, data, layers, branches = MODELS[name]
    module = _model(kind, head, options)
    return Watched(module, zoo.program(module), data(), layers, branches)


MODELS: dict[str, Any] = {
    "llama": (
        "Llama", "ForCausalLM", WORDS | {"num_key_value_heads": 2},
        lambda: sentences("left"), "model.layers", ("self_attn.o_proj", "mlp.down_proj"),
    ),
    "gpt_neox": (
        "GPTNeoX", "ForCausalLM", WORDS, lambda: sentences("right"),
        "gpt_neox.layers", ("attention.dense", "mlp.dense_4h_to_h"),
    ),
    "bert": (
        "Bert", "Model", WORDS, lambda: sentences("right"),
        "encoder.layer", ("attention.output.dense", "output.dense"),
    ),
    "vit": (
        "ViT", "Model", SMALL | {"image_size": 8, "patch_size": 4}, pictures,
        "layers", ("attention.o_proj", "mlp.fc2"),
    ),
}  # fmt: skip
