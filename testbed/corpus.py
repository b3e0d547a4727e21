"""Text for the language models: the standard library's own Python source, split by file.

The library ships with every Python, is under the PSF licence, and is large enough (about 3 million
tokens) for models of a few million parameters. Which split a file falls in depends on its relative
path alone, so a file that appears in two Python versions is on the same side in both.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

SPLITS = ("calibration", "choosing", "reporting")
END = "<|endoftext|>"

# Tests repeat themselves, codec tables and bundled wheels are neither prose nor code, and installed
# packages differ from machine to machine.
SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "encodings",
        "ensurepip",
        "__pycache__",
    }
)
HELD_OUT_PERCENT = 4


@cache
def source_files() -> tuple[str, ...]:
    """Relative POSIX paths of the standard library's source files, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, children, files in os.walk(root):
        # Pruned in place: installed packages can be a hundred times larger than the library.
        children[:] = [name for name in children if not _is_skipped_folder(name)]
        place = Path(folder).relative_to(root)
        found += [(place / name).as_posix() for name in files if _is_source(name)]
    return tuple(sorted(found))


def _is_skipped_folder(name: str) -> bool:
    return name in SKIPPED_FOLDERS or name.startswith("config-")


def _is_source(name: str) -> bool:
    # `_sysconfigdata_*`, like the folder `config-*`, describes the machine Python was built on.
    return name.endswith(".py") and not name.startswith("_sysconfigdata")


def split_of(path: str) -> str:
    """The split of one file: `training`, or one of `SPLITS`, from a hash of its path."""
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 100
    index = bucket // HELD_OUT_PERCENT
    return SPLITS[index] if index < len(SPLITS) else "training"


def files_of(split: str) -> list[str]:
    """Files of one split, in a fixed order that mixes the library's packages."""
    chosen = [path for path in source_files() if split_of(path) == split]
    return sorted(chosen, key=lambda path: hashlib.sha256(b"order" + path.encode()).digest())


def texts(split: str) -> Iterator[str]:
    """Contents of the split's files, in the order of `files_of`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in files_of(split):
        yield (root / path).read_text(encoding="utf-8", errors="replace")


def train_tokenizer(vocabulary: int):
    """A byte-level BPE tokenizer of `vocabulary` entries, trained on the training split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts("training"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


@cache
def shared_tokenizer(vocabulary: int):
    """The tokenizer that all language models share, trained once in a process."""
    return train_tokenizer(vocabulary)


def windows(tokenizer, split: str, length: int) -> np.ndarray:
    """The split's tokens cut in windows: uint16 `[count, length]`; files are separated by `END`."""
    stream: list[int] = []
    for text in texts(split):
        stream.append(tokenizer.eos_token_id)
        stream.extend(tokenizer(text)["input_ids"])
    count = len(stream) // length
    return np.asarray(stream[: count * length], dtype=np.uint16).reshape(count, length)
