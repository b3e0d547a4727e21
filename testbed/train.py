"""Train the test bed's models from scratch: `python -m testbed.train [--fresh] [NAME ...]`.

Each model is trained to its recipe's step count (an interrupted run goes on from its checkpoint),
stored in float16, loaded again as users load it, measured on held-out data, and described in a
card. One core takes about 70 minutes for all; the two 12-layer language models are most of that.
"""

import argparse
import json
from pathlib import Path

from torch import nn

from testbed import cards, corpus, diffusion, language, loader, quality, splits, store, vision
from testbed.loop import Spent

WORK = Path(__file__).parent / "work"
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
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(loader.names())
    if unknown:
        parser.error(
            f"unknown model {', '.join(sorted(unknown))}; there are {', '.join(loader.names())}"
        )
    for name in (*TRAINED, "minilm"):
        if not options.names or name in options.names:
            if options.fresh:
                (WORK / f"{name}.pt").unlink(missing_ok=True)
            make(name)


def make(name: str) -> None:
    """Train, store, load, measure and describe one model."""
    spent = None
    if name in TRAINED:
        module, spent = _train(name)
        _store(name, module)
    record(name, spent)


def _train(name: str) -> tuple[nn.Module, Spent]:
    if name in language.RECIPES:
        return language.train(language.RECIPES[name], WORK)
    if name in vision.RECIPES:
        return vision.train(vision.RECIPES[name], WORK)
    return diffusion.train(diffusion.DIT, WORK)


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
