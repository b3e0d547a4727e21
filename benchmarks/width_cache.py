"""Smaller caches of keys and values: what they cost in quality, and what they hold and take.

    python benchmarks/width_cache.py --part quality --model gpt2 --seeds 0,1,2
    python benchmarks/width_cache.py --part bytes
    python benchmarks/width_cache.py --part times

Part `quality` cuts all caches of a trained model to the same share, with controls; a seed picks
half of the calibration rows, figures are from reporting rows. Part `bytes` counts the cache's
tensors after a run of 4,000 tokens, `times` times one call behind as many, original and result in
turns.
Results are kept in `results/width_cache.json`, and the tables written anew from all that is there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import redpass
from benchmarks.leaderboard import prepare
from redpass import rewrite
from redpass.data import Batches
from redpass.facts import Facts
from redpass.passes import CLEANUP
from redpass.passes.cache_latents import CacheLatents
from redpass.passes.drop_key_channels import DropKeyChannels
from redpass.plan import Action, Pass
from redpass.program import Program
from redpass.verify.metrics import METRICS, evaluate_all
from redpass.verify.sizes import concrete

RESULTS = Path(__file__).parent / "results"
SHARES = (0.75, 0.5, 0.25)
TOKENS = 4000
Make = Callable[[], Pass]

PLAIN: dict[str, Make] = {
    "latents": lambda: CacheLatents(SHARES, multiple=1),
    "metric: activations": lambda: CacheLatents(SHARES, multiple=1, basis="activations"),
    "control: plain SVD of the weights": lambda: CacheLatents(
        SHARES, multiple=1, basis="weights", refit=False, keys="rebuilt"
    ),
    "control: random directions": lambda: CacheLatents(
        SHARES, multiple=1, basis="random", refit=False
    ),
    "latents, 32 tokens in full": lambda: CacheLatents(SHARES, multiple=1, window=32),
    "latents, groups of 4 heads": lambda: CacheLatents(SHARES, multiple=1, group_size=4),
    "keys only: channels": lambda: DropKeyChannels(SHARES, multiple=1),
    "keys only: channels, no refit": lambda: DropKeyChannels(SHARES, multiple=1, refit=False),
    "keys only: random channels": lambda: DropKeyChannels(
        SHARES, multiple=1, order="random", refit=False
    ),
}
ROTARY: dict[str, Make] = {
    "latents": PLAIN["latents"],
    "latents, keys rebuilt": lambda: CacheLatents(SHARES, multiple=1, keys="rebuilt"),
    "latents, keys rebuilt, 32 tokens in full": lambda: CacheLatents(
        SHARES, multiple=1, keys="rebuilt", window=32
    ),
    "latents, keys rebuilt, groups of 4 heads": lambda: CacheLatents(
        SHARES, multiple=1, keys="rebuilt", group_size=4
    ),
} | PLAIN
RECIPES: Mapping[str, Mapping[str, Make]] = {"gpt2": PLAIN, "qwen3": ROTARY}
Keep = Callable[[str, Any], None]


def quality(
    name: str, seeds: Sequence[int], only: Sequence[str], rows: int, reporting: int, known: Any
) -> Iterator[Any]:
    """Yields perplexities over the original's, by recipe, share and seed, after each recipe."""
    bench = prepare(name, rows, 4, reporting)
    metrics = [METRICS["perplexity"]]

    def perplexity(program: Program) -> float:
        found = evaluate_all(
            metrics, program, bench.program, bench.reporting, originals=bench.originals
        )
        return found["perplexity"].value

    original = perplexity(bench.program)
    found = known or {"recipes": {}}
    found |= {"perplexity": original, "rows": rows // 2, "judged": reporting}
    for seed in seeds:
        picked = random.Random(seed).sample(range(len(bench.calibration)), rows // 8)
        data = Batches(tuple(bench.calibration[number] for number in sorted(picked)))
        facts = Facts(bench.program, data)
        for recipe in only or RECIPES[name]:
            figures = found["recipes"].setdefault(recipe, {str(share): {} for share in SHARES})
            actions = RECIPES[name][recipe]().plan(bench.program, facts).actions
            for rung, share in enumerate(SHARES):
                program = rewrite.apply(bench.program, rungs(actions, rung))
                figures[str(share)][str(seed)] = perplexity(program) / original
            print(name, seed, recipe, figures, flush=True)
            yield found


def rungs(actions: Sequence[Action], place: int) -> list[Action]:
    """Returns the rung of that number of every ladder."""
    ladders: dict[str, list[Action]] = {}
    for action in actions:
        ladders.setdefault(action.place, []).append(action)
    return [ladder[place] for ladder in ladders.values()]


def model(heads: int, width: int, layers: int = 1, kind: str = "Llama") -> Program:
    """A model that is little but attention: 8 query heads, random weights."""
    import transformers

    torch.manual_seed(0)
    if kind == "GPT2":
        config: Any = transformers.GPT2Config(
            n_embd=8 * width, n_layer=layers, n_head=8, n_inner=64, vocab_size=64,
            n_positions=TOKENS + 64, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return cleaned(redpass.load(transformers.GPT2LMHeadModel(config).eval()))
    config = transformers.LlamaConfig(
        hidden_size=8 * width, head_dim=width, num_attention_heads=8, num_key_value_heads=heads,
        num_hidden_layers=layers, intermediate_size=64, vocab_size=64,
        max_position_embeddings=TOKENS + 64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return cleaned(redpass.load(transformers.LlamaForCausalLM(config).eval()))


def cleaned(program: Program) -> Program:
    """Runs the exact clean-up, which gives all layers one set of rotary tables."""
    for _ in range(2):
        for kind in CLEANUP:
            program = rewrite.apply(program, kind().plan(program, Facts(program)).actions)
    return program


def tokens() -> Batches:
    """Random tokens: what is measured here does not depend on them."""
    drawn = torch.randint(3, 64, (4, 64), generator=torch.Generator().manual_seed(0))
    return Batches(({"input_ids": drawn},), "random tokens")


def cut(program: Program, *passes: Pass) -> Program:
    """Takes every action the passes plan, a pass for each kind of cache."""
    facts = Facts(program, tokens())
    actions: dict[str, Action] = {}
    for pass_ in passes:
        actions |= {action.place: action for action in pass_.plan(program, facts).actions}
    return cleaned(rewrite.apply(program, list(actions.values())))


def state_of(program: Program, length: int) -> dict[str, Tensor]:
    """A cache of random numbers."""
    generator = torch.Generator().manual_seed(0)
    ports = [program.signature.input(name) for name, _ in program.signature.state]
    sizes = {"batch": 1, "past": length}
    return {p.name: torch.randn(concrete(p.shape, sizes), generator=generator) for p in ports}


def call(program: Program, ids: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives tokens behind a cache; returns all outputs by name."""
    past = next(iter(state.values())).shape[2]
    positions = torch.arange(past, past + ids.shape[1]).unsqueeze(0)
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones(1, past + ids.shape[1], dtype=torch.int64),
        "position_ids": positions,
        **state,
    }
    names = [port.name for port in program.signature.outputs]
    return dict(zip(names, program(**given), strict=True))


def held(program: Program) -> int:
    """Decodes one by one until 4,000 positions are kept; returns the bytes of their tensors."""
    state, ids = state_of(program, 0), torch.full((1, 1), 3)
    for _ in range(TOKENS):
        found = call(program, ids, state)
        ids = found["logits"][:, -1:].argmax(-1)
        state = {a: found[b] for a, b in program.signature.state}
    assert all(tensor.shape[2] == TOKENS for tensor in state.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def ratio(before: Program, after: Program, length: int, rounds: int = 7) -> float:
    """Median time of a call with one token over that of the original, in turns."""
    ids = torch.full((1, 1), 3)
    states = [state_of(program, length) for program in (before, after)]
    times: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for place, program in enumerate((before, after)):
            start = time.process_time()
            call(program, ids, states[place])
            if number:
                times[place].append(time.process_time() - start)
    return statistics.median(times[1]) / statistics.median(times[0])


def latents(**options: Any) -> CacheLatents:
    """Half the cache."""
    return CacheLatents(shares=(0.5,), multiple=1, **options)


def bytes_held() -> tuple[int, int]:
    """Returns what the cache's tensors take after 4,000 tokens, before and after."""
    small = model(8, 16)
    return held(small), held(cut(small, latents()))


def times() -> Iterator[dict[str, dict[str, float]]]:
    """Yields times of forms of the cache at half its size, over the original's."""
    forms: dict[str, tuple[Pass, ...]] = {
        "latents": (latents(),),
        "latents, 32 tokens in full": (latents(window=32),),
        "latents of values, channels of keys": (
            latents(), DropKeyChannels(shares=(0.5,), multiple=1)),
        "latents, keys rebuilt": (latents(keys="rebuilt"),),
        "latents, keys rebuilt, groups of 2 heads": (latents(keys="rebuilt", group_size=2),),
    }  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for label, program in (
        ("8 heads, no rotation", lambda: model(8, 64, kind="GPT2")),
        ("8 heads, rotated", lambda: model(8, 64)),
        ("8 heads on 2, rotated", lambda: model(2, 64)),
    ):
        before = program()
        for form, passes in forms.items():
            found.setdefault(label, {})[form] = ratio(before, cut(before, *passes), TOKENS)
            print(f"{label}, {form}: {found[label][form]:.2f}", flush=True)
            yield found


def write(found: Mapping[str, Any], out: Path) -> None:
    """Writes all that is known as JSON and as tables."""
    out.mkdir(exist_ok=True)
    (out / "width_cache.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = ["# Smaller caches of keys and values", "", "Made by `benchmarks/width_cache.py`.", ""]
    for name, part in found.get("quality", {}).items():
        lines += _quality_table(name, part)
    if "bytes" in found:
        before, after = found["bytes"]
        lines += [
            "## The cache's tensors", "",
            f"After {TOKENS} tokens, one a call, they hold {before} bytes in the original and "
            f"{after} at half the rank: {after / before:.3f}.", "",
        ]  # fmt: skip
    if "times" in found:
        lines += _times_table(found["times"])
    (out / "width_cache.md").write_text("\n".join(lines).rstrip() + "\n")


def _quality_table(name: str, part: Mapping[str, Any]) -> list[str]:
    seeds = [len(next(iter(shares.values()))) for shares in part["recipes"].values()]
    lines = [
        f"## {name}: perplexity over the original's ({part['perplexity']:.2f})",
        "",
        f"{part['judged']} reporting rows; mean of {min(seeds)} to {max(seeds)} seeds ± spread, "
        f"each with {part['rows']} calibration rows. Every cache keeps the same share.",
        "",
        "| | " + " | ".join(f"{float(s):.0%} kept" for s in map(str, SHARES)) + " |",
        "|---|" + "---|" * len(SHARES),
    ]
    for recipe, shares in part["recipes"].items():
        cells = [mean_and_spread([*values.values()]) for values in shares.values()]
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def mean_and_spread(values: Sequence[float]) -> str:
    """Returns a cell of a table; one figure has no spread."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.pstdev(values):.3f}"


def _times_table(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    forms = list(next(iter(found.values())))
    lines = [
        f"## One call with one token behind {TOKENS}",
        "",
        "Processor time over the original's, half the cache kept; medians in turns, one thread, "
        "float32; one layer of 8 query heads of 64 and little beside it.",
        "",
        "| model | " + " | ".join(forms) + " |",
        "|---|" + "---|" * len(forms),
    ]
    for label, figures in found.items():
        cells = [f"{figures[form]:.2f}" if form in figures else "" for form in forms]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    """Runs one part and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("quality", "bytes", "times"), required=True)
    parser.add_argument("--model", choices=tuple(RECIPES), default="gpt2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipes", default="", help="names with ; between them, all if empty")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--reporting", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "width_cache.json"
    torch.set_num_threads(1)
    known = json.loads(path.read_text()) if path.exists() else {}
    if options.part == "bytes":
        write(known | {"bytes": bytes_held()}, options.out)
    elif options.part == "times":
        for found in times():
            write(known | {"times": found}, options.out)
    else:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        only = [name for name in options.recipes.split(";") if name]
        tables = known.setdefault("quality", {})
        size = (options.rows, options.reporting)
        old = tables.get(options.model)
        for found in quality(options.model, seeds, only, *size, old):
            tables[options.model] = found
            write(known, options.out)


if __name__ == "__main__":
    main()
