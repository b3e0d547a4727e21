# ruff: noqa: E501  # a record reads best one a line
"""A record as a run on a 12-layer encoder leaves it, with every outcome and state in it."""

from __future__ import annotations

import math
from dataclasses import replace

from redpass.record import (
    ActionRecord,
    BranchRecord,
    CostRecord,
    Curve,
    CurvePoint,
    LatencyRecord,
    LayerRecord,
    Matrix,
    PassRecord,
    QualityRecord,
    Recipe,
    RunRecord,
    SkipRecord,
)

DROPPED = ("layers.7.attention", "layers.9.attention", "layers.10.feed-forward")


def sample(layers: int = 12, model: str = "models/all-MiniLM-L6-v2") -> RunRecord:
    labels = [
        f"layers.{i // 2}.{'feed-forward' if i % 2 else 'attention'}" for i in range(2 * layers)
    ]
    return RunRecord(
        version="0.1.0",
        command="redpass optimize models/all-MiniLM-L6-v2 --data text.txt --budget 'cosine>=0.98'"
        " --out out/minilm",
        model=model,
        model_kind="huggingface",
        model_digest="5e" * 32,
        data="text.txt",
        data_digest="da" * 32,
        budget="cosine>=0.98",
        verdict="met",
        before=CostRecord(22_713_216, 90_852_864, 5.44e9, {"batch": 1, "seq": 128}, 0, 612, 91_020_331),
        after=CostRecord(20_944_512, 83_778_048, 4.52e9, {"batch": 1, "seq": 128}, 0, 431, 83_903_112),
        dims={"batch": "1 or more", "seq": "2 to 512"},
        passes=_passes(),
        actions=_actions(labels),
        skips=_skips(labels),
        quality=[
            QualityRecord("cosine", "choosing", "higher", 1.0, 0.9861, -0.0139, 0.0009, 256),
            QualityRecord(
                "cosine", "reporting", "higher", 1.0, 0.9843, -0.0157, 0.0011, 256, "cosine>=0.98", True
            ),
        ],
        branches=[
            BranchRecord(
                label, label.rpartition(".")[2], i // 2, 591_000 * (1 + i % 2), 1.5e8 * (1 + i % 2),
                _cosine(i), "dropped" if label in DROPPED else "kept",
            )
            for i, label in enumerate(labels)
        ],
        matrices=[_matrix(labels), _spans(layers)],
        latency=[
            LatencyRecord("onnxruntime", "batch 1, seq 128", 14.2, 11.3, 0.796, (0.788, 0.806)),
            LatencyRecord("eager", "batch 1, seq 128", 31.0, 25.2, 0.81, (0.78, 0.86)),
            LatencyRecord("compile", "batch 1, seq 128", 0, 0, 0, (0, 0), "no C++ compiler was found"),
        ],
        recipe=Recipe([("drop_noops", ["drop_noops.cast:to"])], model, "5e" * 32, "9a" * 32, "da" * 32, 0, "0.1.0"),
        notes=["The position table limits seq to 512 (modeling_bert.py:104)."],
        machine={"processor": "x86_64", "threads": "2", "python": "3.11.7", "torch": "2.13.0"},
        seconds=73.4,
        curves=_curves(),
        layers=[
            LayerRecord(
                f"layers.{i}", labels[2 * i : 2 * i + 2], 1_773_000, 4.5e8,
                0.4 * math.exp(-i / 2) + 0.0002, 0.6 * math.exp(-i / 3) + 0.001, -0.5 - 0.1 * i,
                "without attention" if f"layers.{i}.attention" in DROPPED else "kept",
            )
            for i in range(layers)
        ],
    )  # fmt: skip


def hostile() -> RunRecord:
    """A record in which every text a model can choose tries to be markup."""
    text = "<script>alert(1)</script>\x1b[31m"
    record = sample(2, text)
    return replace(
        record,
        actions=[replace(record.actions[0], target=text, key=text, reason=text, why=text)],
        skips=[SkipRecord(text, text, text, text)],
        branches=[replace(record.branches[0], label=text, outcome=text)],
        matrices=[
            Matrix(text, [text], [[1.0]], columns=[text], x_title=text, y_title=text, note=text)
        ],
        layers=[replace(record.layers[0], label=text, branches=[text], outcome=text)],
        curves=[Curve(text, text, text, [CurvePoint(0.1, 2.0, 0.1, text)], text)],
        notes=[text],
        dims={text: text},
        machine={text: text},
        command=text,
        data=text,
    )


def _cosine(i: int) -> float:
    return 0.72 + 0.27 * (1 - math.exp(-i / 6)) - 0.05 * (i % 2)


def _matrix(labels: list[str]) -> Matrix:
    count = len(labels) + 1
    values = [
        [math.exp(-abs(i - j) / (3 + min(i, j) / 2)) for j in range(count)] for i in range(count)
    ]
    names = ["input", *(f"after {label}" for label in labels)]
    return Matrix("Mean cosine between the residual stream's values", names, values, 0.0, 1.0)


def _spans(layers: int) -> Matrix:
    values = [
        [0.05 * (n + 1) ** 0.7 * (1 + abs(start + n / 2 - layers / 2) / layers)
         if start + n < layers else None for start in range(layers)]
        for n in range(layers)
    ]  # fmt: skip
    return Matrix(
        "Angular distance over spans of layers", [str(n + 1) for n in range(layers)], values,
        0.0, 0.5, [f"layers.{i}" for i in range(layers)], "low",
        "layers in the span", "first layer of the span", "The lightest cell of a row is the best.",
    )  # fmt: skip


def _curves() -> list[Curve]:
    slopes = {"verified greedy on branches": 1.2, "verified greedy on layers": 2.0,
              "block influence, one-shot": 4.7, "random": 11.0}  # fmt: skip
    return [
        Curve(method, "perplexity", "lower", [
            CurvePoint(share, 12.5 * math.exp(slope * share * (1 + share)), 0.4 + slope * share, f"step {number}" * (number > 0))
            for number, share in enumerate((0.0, 0.08, 0.125, 0.17, 0.25, 0.33))
        ])
        for method, slope in slopes.items()
    ]  # fmt: skip


def _passes() -> list[PassRecord]:
    same = "outputs are equal bit by bit on 4 inputs"
    return [
        PassRecord("drop_noops", "drop_noops", "same bits", 84, 3, "checked", same, (612, 528), 0.8),
        PassRecord("fold_constants", "fold_constants", "within tolerance", 6, 0, "checked", same, (528, 519), 1.4),
        PassRecord("merge_equal_nodes", "merge_equal_nodes", "same bits", 0, 0, "nothing to do", "nothing was planned", (519, 519), 0.1),
        PassRecord("drop_branches", "drop_branches(min_similarity=0.8)", "approximate", 3, 9, "not checked", "measured against the budget", (519, 431), 62.0),
    ]  # fmt: skip


def _actions(labels: list[str]) -> list[ActionRecord]:
    exact = [
        ActionRecord(i + 1, f"drop_noops.cast:to_{i}", "drop_noops", f"to_{i}",
                     "a cast to the type the value already has", "applied", "equal bit by bit")
        for i in range(8)
    ]  # fmt: skip
    saving = {
        "parameters": 591_360.0,
        "bytes": 2_365_440.0,
        "flops": 1.53e8,
        "kv_bytes_per_token": 3072.0,
    }
    lossy = [
        ActionRecord(
            9 + i, f"drop_branches.similar:{label}", "drop_branches", label,
            f"the stream hardly changes in this branch: mean cosine {_cosine(i + 14):.4f} across it",
            "applied" if label in DROPPED else "refused" if i % 2 else "rolled back",
            "cosine 0.9871 ± 0.0010 on choosing data, limit cosine>=0.98",
            {"similarity": _cosine(i + 14)}, saving, 1 - _cosine(i + 14),
        )
        for i, label in enumerate(labels[-10:])
    ]  # fmt: skip
    return exact + lossy


def _skips(labels: list[str]) -> list[SkipRecord]:
    low = [
        SkipRecord("drop_branches", "drop_branches.similar", label,
                   f"similarity {_cosine(i):.4f} is below 0.8")
        for i, label in enumerate(labels[:6])
    ]  # fmt: skip
    return [
        *low,
        SkipRecord("drop_noops", "drop_noops.view", "view_3", "its size is read by another node"),
        SkipRecord("drop_noops", "drop_noops.view", "view_9", "its size is read by another node"),
    ]
