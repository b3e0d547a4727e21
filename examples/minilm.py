"""Optimises the real all-MiniLM-L6-v2 under a quality budget and searches with the result.

Writes the sentences to a text file, calls the command line exactly as a user would, then loads the
exported ONNX file in ONNX Runtime and finds the sentence nearest to a question.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "minilm"
OPTIONS = ("--rows", "512", "--length", "48")
sys.path.insert(0, str(ROOT))


def main(
    out: Path = OUT,
    budget: str = "cosine>=0.9",
    options: Sequence[str] = OPTIONS,
) -> None:
    from testbed import minilm

    model = minilm.folder()
    data = out.parent / "sentences.txt"
    data.parent.mkdir(parents=True, exist_ok=True)
    sentences = [text for split in minilm.SENTENCES for text, _ in minilm.sentences(split)]
    data.write_text("\n".join(sentences) + "\n")
    optimize(model, data, budget, out, options)
    search(out / "model.onnx", model, sentences[:200], "How do I sort the rows of an array?")
    print(f"\nreport: {out / 'report.html'}")


def optimize(model: Path, data: Path, budget: str, out: Path, options: Sequence[str]) -> None:
    from redpass.cli import main as redpass

    words = ["optimize", model, "--data", data, "--budget", budget, "--out", out, "--force"]
    command = [str(word) for word in (*words, *options)]
    print("redpass", *command, flush=True)
    code = redpass(command)
    if code:
        raise SystemExit(code)


def search(onnx: Path, model: Path, sentences: list[str], question: str) -> None:
    import torch
    from transformers import AutoTokenizer

    from redpass.runtime import OnnxModel

    network, tokenizer = OnnxModel(onnx), AutoTokenizer.from_pretrained(model)

    def embed(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        inputs = {port.name: batch[port.name] for port in network.inputs}
        states = network(inputs)["last_hidden_state"]
        mask = batch["attention_mask"][:, :, None]
        pooled = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1)

    scores = (embed(sentences) @ embed([question]).T).squeeze(1)
    best = int(scores.argmax())
    print(f"\nQ: {question}\nA: {sentences[best]}  (cosine {scores[best]:.3f})")


if __name__ == "__main__":
    main()
