"""Train the test bed's models from scratch: `python -m testbed.train [--fresh] [NAME ...]`.

Each model is trained to its recipe's step count (an interrupted run goes on from its checkpoint),
stored in float16, loaded again as users load it, measured on held-out data, and described in a
card. One core takes about two and a half hours for all; the two 12-layer language models are most
of that. `--check` trains in a folder of its own, compares the quality with the stated one, and
changes nothing.
"""

import argparse
import json
import tempfile
from pathlib import Path

from torch import nn

from testbed import cards, corpus, diffusion, language, loader, quality, splits, store, vision
from testbed.loop import Spent

WORK = Path(__file__).parent / "work"
REPRODUCED = 0.02
"""How far, relative to the stated quality, that of a model trained again may be off."""

TRAINED = (*vision.RECIPES, "dit", *language.RECIPES)

# Rows of the reporting split that the fast test measures again.
SLICE = {"gpt2": 8, "qwen3": 8, "mixtral": 8, "vit": 100, "cnn": 400, "dit": 100, "minilm": 128}


def main(arguments: list[str] | None = None) -> None:
    """Make every model that the command line names, in an order that the measurements allow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join(loader.names())}"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget checkpoints and start at step 0"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="train from step 0 in a scratch folder and compare with the stated quality",
    )
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(loader.names())
    if unknown:
        parser.error(
            f"unknown model {', '.join(sorted(unknown))}; there are {', '.join(loader.names())}"
        )
    chosen = [n for n in (*TRAINED, "minilm") if not options.names or n in options.names]
    if options.check:
        misses = [name for name in chosen if name in TRAINED and not check(name)]
        raise SystemExit(f"not reproduced: {', '.join(misses)}" if misses else 0)
    for name in chosen:
        if options.fresh:
            (WORK / f"{name}.pt").unlink(missing_ok=True)
        make(name)


def check(name: str) -> bool:
    """Trains a model again in a scratch folder and compares its quality with the stated one.

    Weights are rounded as stored ones are. Prints both figures; returns whether they agree
    within `REPRODUCED`.
    """
    with tempfile.TemporaryDirectory() as folder:
        module, spent = _train(name, Path(folder))
    model = loader.load(name)
    if name == "mixtral":
        module.config.output_router_logits = False
    found = quality.measure(model, module=module.half().float())
    stated = float(loader.stated_quality(name)["reporting"])
    change = found / stated - 1
    verdict = "reproduced" if abs(change) <= REPRODUCED else "NOT reproduced"
    minutes = spent.processor / 60
    print(
        f"{name}: {verdict}: {found:.5f} where {stated:.5f} is stated ({change:+.2%}), "
        f"{minutes:.1f} minutes of processor time",
        flush=True,
    )
    return abs(change) <= REPRODUCED


def make(name: str) -> None:
    """Train, store, load, measure and describe one model."""
    spent = None
    if name in TRAINED:
        module, spent = _train(name, WORK)
        _store(name, module)
    record(name, spent)


def _train(name: str, work: Path) -> tuple[nn.Module, Spent]:
    if name in language.RECIPES:
        return language.train(language.RECIPES[name], work)
    if name in vision.RECIPES:
        return vision.train(vision.RECIPES[name], work)
    return diffusion.train(diffusion.DIT, work)


def _store(name: str, module: nn.Module) -> None:
    folder = store.WEIGHTS / name
    if name == "mixtral":
        # Router scores serve the balancing loss of training; users want the logits alone.
        module.config.output_router_logits = False
    store.save(module, folder)
    if name in language.RECIPES:
        tokenizer = corpus.shared_tokenizer(language.VOCABULARY)
        tokenizer.save_pretrained(folder)
        splits.write_text(tokenizer)
    if name == "cnn":
        store.write_json(folder / "config.json", dict(vision.CNN.config))


def record(name: str, spent: Spent | None) -> None:
    """Measure the stored model, then write its entry in `quality.json`, its card, the manifest."""
    card = store.WEIGHTS / name / "README.md"
    card.parent.mkdir(parents=True, exist_ok=True)
    card.touch()
    store.write_manifest()
    model = loader.load(name)
    figures = _figures(model) | _cost(spent)
    card.write_text(cards.write(name, figures))
    path = store.WEIGHTS / store.QUALITY
    entries = json.loads(path.read_text()) if path.exists() else {}
    store.write_json(path, entries | {name: figures})
    store.write_manifest()
    print(name, figures, flush=True)


def _figures(model: loader.TestbedModel) -> dict[str, object]:
    rows = SLICE[model.name]
    figures: dict[str, object] = {
        "metric": quality.METRICS[model.name].name,
        "reporting": round(quality.measure(model), 5),
        "slice_rows": rows,
        "slice": round(quality.measure(model, limit=rows), 5),
        "parameters": sum(value.numel() for value in model.module.parameters()),
    }
    if model.name == "dit":
        predict, classifier = diffusion.denoise(model.module), loader.load("vit").module
        figures["recognised"] = round(quality.recognised(predict, classifier), 4)
    return figures


def _cost(spent: Spent | None) -> dict[str, object]:
    if spent is None:
        return {}
    return {
        "wall_minutes": round(spent.wall / 60, 1),
        "processor_minutes": round(spent.processor / 60, 1),
    }


if __name__ == "__main__":
    main()
