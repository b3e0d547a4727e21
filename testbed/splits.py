"""Held-out data of every model, ready to be fed to it, in three disjoint splits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from testbed import corpus, diffusion, digits, minilm, store

TEXT = "text"
WINDOWS = {"calibration": 256, "choosing": 128, "reporting": 256}
WINDOW = 256


@dataclass(frozen=True)
class Split:
    """Examples of one split: `inputs` are keyword arguments of forward, with equal first dimension.

    `targets` are what a good model gives: class labels, or the true noise. None for language
    models, which predict their own inputs. `texts` holds the sentences that `inputs` were made
    from, where there are any.
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor | None = None
    texts: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def part(self, rows: slice) -> "Split":
        """Some of the examples."""
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        targets = None if self.targets is None else self.targets[rows]
        return Split(inputs, targets, self.texts[rows])

    def batches(self, size: int) -> Iterator["Split"]:
        """Consecutive pieces of at most `size` examples."""
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))


class Splits(Mapping[str, Split]):
    """The three splits of one model, each made when it is first asked for."""

    def __init__(self, make: Callable[[str], Split]) -> None:
        self._make = make
        self._made: dict[str, Split] = {}

    def __getitem__(self, name: str) -> Split:
        if name not in corpus.SPLITS:
            raise KeyError(f"no split {name!r}; there are {', '.join(corpus.SPLITS)}")
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(corpus.SPLITS)

    def __len__(self) -> int:
        return len(corpus.SPLITS)


def write_text(tokenizer) -> None:
    """Store held-out windows, so that figures do not hang on the Python version."""
    from safetensors.numpy import save_file

    folder = store.WEIGHTS / TEXT
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: _pick(tokenizer, name) for name in corpus.SPLITS}, folder / "text.safetensors")
    store.write_json(folder / "files.json", {name: corpus.files_of(name) for name in corpus.SPLITS})


def _pick(tokenizer, split: str) -> np.ndarray:
    windows = corpus.windows(tokenizer, split, WINDOW)
    # Evenly spaced, so that every file of the split has its part.
    rows = np.linspace(0, len(windows) - 1, WINDOWS[split]).round().astype(int)
    return windows[rows]


def language(split: str) -> Split:
    """Stored windows of the standard library's source: `input_ids` int64 `[count, 256]`."""
    from safetensors.numpy import load_file

    windows = load_file(store.verify(TEXT) / "text.safetensors")[split]
    return Split({"input_ids": torch.from_numpy(windows.astype(np.int64))})


def vit(split: str) -> Split:
    """Digits enlarged to `pixel_values` `[count, 1, 24, 24]`, with their classes."""
    data = digits.load(split)
    return Split({"pixel_values": digits.enlarge(data.images)}, data.labels)


def cnn(split: str) -> Split:
    """Digits as `pixel_values` `[count, 1, 8, 8]`, with their classes."""
    data = digits.load(split)
    return Split({"pixel_values": data.images}, data.labels)


def dit(split: str) -> Split:
    """Noisy digits at random timesteps, with the noise in them, which differs between splits."""
    data = digits.load(split)
    random = torch.Generator().manual_seed(corpus.SPLITS.index(split))
    timestep = torch.randint(diffusion.TIMESTEPS, (len(data.labels),), generator=random)
    noise = torch.randn(data.images.shape, generator=random)
    noisy = diffusion.add_noise(data.images, noise, timestep)
    return Split({"hidden_states": noisy, "timestep": timestep, "class_labels": data.labels}, noise)


def sentences(tokenizer, split: str) -> Split:
    """Sentences as `input_ids` and `attention_mask` int64 `[count, 64]`; targets are packages."""
    texts, sources = zip(*minilm.sentences(split), strict=True)
    encoded = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=minilm.LENGTH,
        return_tensors="pt",
    )
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return Split(inputs, torch.tensor(sources), texts)
