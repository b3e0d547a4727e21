"""Every metric against a slow obvious reference, and against figures computed by hand."""

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, Language, text, traced
from torch import Tensor, nn

from redpass.data import Batches
from redpass.errors import DataError, UsageError, VerifyError
from redpass.journal import Journal
from redpass.program import Program
from redpass.verify import logits
from redpass.verify.estimate import Samples, exponential_mean, mean, tail
from redpass.verify.metrics import (
    METRICS,
    Estimate,
    Originals,
    evaluate,
    evaluate_all,
    find_metric,
)

PADS = ([6, 3, 5], [2, 6, 6], [4])


@pytest.fixture(scope="module")
def data() -> Batches:
    """Texts of 6 tokens in batches of 3, 3 and 1; some end in padding, one begins with it."""
    generator = torch.Generator().manual_seed(5)
    items = []
    for lengths in PADS:
        ids = torch.randint(0, VOCABULARY, (len(lengths), 6), generator=generator)
        mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
        items.append({"input_ids": ids, "attention_mask": mask})
    items[1]["attention_mask"][0] = torch.tensor([0, 0, 0, 1, 1, 1])
    return Batches(tuple(items), "texts")


@pytest.fixture(scope="module")
def points() -> Batches:
    generator = torch.Generator().manual_seed(6)
    return Batches(
        tuple(
            {
                "x": torch.randn(7, 6, generator=generator),
                "labels": torch.randint(0, 4, (7,), generator=generator),
            }
            for _ in range(3)
        ),
        "points",
    )


def rows(program: Program, data: Batches, port: str = "logits") -> list[tuple[Tensor, ...]]:
    """(output, ids, mask) of each row, the obvious way."""
    names = [output.name for output in program.signature.outputs]
    found = []
    for batch in data:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = program(**inputs)[names.index(port)].double()
        found += zip(output, batch["input_ids"], batch["attention_mask"], strict=True)
    return found


def slow_losses(program: Program, data: Batches) -> list[list[float]]:
    found = []
    for output, ids, mask in rows(program, data):
        row = []
        for at in range(5):
            if mask[at] and mask[at + 1]:
                shares = [math.exp(x) for x in output[at].tolist()]
                row.append(-math.log(shares[ids[at + 1]] / sum(shares)))
        found.append(row)
    return found


def slow_kl(now: Program, was: Program, data: Batches) -> list[list[float]]:
    found = []
    for (new, _, mask), (old, _, _) in zip(rows(now, data), rows(was, data), strict=True):
        row = []
        for at in range(6):
            if mask[at]:
                p, q = old[at].softmax(-1), new[at].softmax(-1)
                row.append(sum((p[v] * (p[v] / q[v]).log()).item() for v in range(VOCABULARY)))
        found.append(row)
    return found


def flat(parts: list[list[float]]) -> list[float]:
    return [value for part in parts for value in part]


def test_loss_and_perplexity(language: Program, changed_language: Program, data: Batches) -> None:
    now, was = slow_losses(changed_language, data), slow_losses(language, data)
    loss = sum(flat(now)) / len(flat(now))
    before = sum(flat(was)) / len(flat(was))
    found = evaluate_all([METRICS["loss"], METRICS["perplexity"]], changed_language, language, data)
    assert found["loss"].value == pytest.approx(loss, rel=1e-6)
    assert found["loss"].original == pytest.approx(before, rel=1e-6)
    assert found["loss"].difference == pytest.approx(loss - before, rel=1e-5)
    assert found["loss"].count == len(flat(now)) == 26
    perplexity = found["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(loss), rel=1e-6)
    assert perplexity.original == pytest.approx(math.exp(before), rel=1e-6)
    assert perplexity.stderr == pytest.approx(found["loss"].stderr * math.exp(loss), rel=1e-6)


def test_kl_and_its_tail(language: Program, changed_language: Program, data: Batches) -> None:
    slow = flat(slow_kl(changed_language, language, data))
    found = evaluate_all([METRICS["kl"], METRICS["kl_p99"]], changed_language, language, data)
    assert found["kl"].value == pytest.approx(sum(slow) / len(slow), rel=1e-5)
    assert found["kl"].count == len(slow) == 33
    assert found["kl"].original == 0
    assert found["kl"].difference == found["kl"].value
    wanted = torch.tensor(slow, dtype=torch.float64).quantile(0.99).item()
    assert found["kl_p99"].value == pytest.approx(wanted, rel=1e-5)


def test_kl_is_from_the_original_to_the_program(
    language: Program, changed_language: Program, data: Batches
) -> None:
    there = evaluate(METRICS["kl"], changed_language, language, data).value
    back = evaluate(METRICS["kl"], language, changed_language, data).value
    assert abs(there - back) > 1e-3 * there


def test_top1(language: Program, changed_language: Program, data: Batches) -> None:
    agree = [
        float(new[at].argmax() == old[at].argmax())
        for (new, _, mask), (old, _, _) in zip(
            rows(changed_language, data), rows(language, data), strict=True
        )
        for at in range(6)
        if mask[at]
    ]
    found = evaluate(METRICS["top1"], changed_language, language, data)
    assert found.value == pytest.approx(sum(agree) / len(agree), rel=1e-12)
    assert 0 < found.value < 1
    assert (found.original, found.count) == (1, len(agree))


def test_accuracy(classes: Program, changed_classes: Program, points: Batches) -> None:
    def slow(program: Program) -> float:
        hits = [
            float(program(x=batch["x"])[0][row].argmax() == batch["labels"][row])
            for batch in points
            for row in range(7)
        ]
        return sum(hits) / 21

    found = evaluate(METRICS["accuracy"], changed_classes, classes, points)
    assert found.value == pytest.approx(slow(changed_classes), rel=1e-12)
    assert found.original == pytest.approx(slow(classes), rel=1e-12)
    assert found.count == 21
    p = found.value
    assert found.stderr == pytest.approx(math.sqrt(p * (1 - p) / 20), rel=1e-9)


def test_accuracy_leaves_out_ignored_labels(classes: Program, points: Batches) -> None:
    ignored = tuple(
        {**batch, "labels": torch.where(torch.arange(7) < 3, -100, batch["labels"])}
        for batch in points
    )
    assert evaluate(METRICS["accuracy"], classes, classes, Batches(ignored)).count == 12


def pooled(program: Program, data: Batches) -> list[Tensor]:
    return [output[mask.bool()].mean(0) for output, _, mask in rows(program, data, "hidden")]


def test_cosine_of_pooled_embeddings(
    language: Program, changed_language: Program, data: Batches
) -> None:
    pairs = zip(pooled(changed_language, data), pooled(language, data), strict=True)
    slow = [(a @ b / a.norm() / b.norm()).item() for a, b in pairs]
    found = evaluate(METRICS["cosine"], changed_language, language, data, port="hidden")
    assert found.value == pytest.approx(sum(slow) / 7, rel=1e-6)
    assert found.stderr == pytest.approx(torch.tensor(slow).double().std().item() / 7**0.5, 1e-5)
    assert found.count == 7


def test_cosine_of_raw_embeddings(
    classes: Program, changed_classes: Program, points: Batches
) -> None:
    slow = [
        torch.cosine_similarity(changed_classes(x=b["x"])[0], classes(x=b["x"])[0], dim=1)
        for b in points
    ]
    found = evaluate(METRICS["cosine"], changed_classes, classes, points)
    assert found.value == pytest.approx(torch.cat(slow).mean().item(), rel=1e-5)


def test_retrieval(classes: Program, changed_classes: Program, points: Batches) -> None:
    def neighbours(program: Program) -> list[set[int]]:
        vectors = torch.cat([program(x=b["x"])[0] for b in points])
        found = []
        for row in range(21):
            near = [
                (torch.cosine_similarity(vectors[row], vectors[other], dim=0).item(), other)
                for other in range(21)
                if other != row
            ]
            found.append({other for _, other in sorted(near, reverse=True)[:5]})
        return found

    shared = zip(neighbours(changed_classes), neighbours(classes), strict=True)
    slow = sum(len(a & b) / 5 for a, b in shared) / 21
    found = evaluate(METRICS["retrieval"], changed_classes, classes, points)
    assert found.value == pytest.approx(slow, rel=1e-9)
    assert 0 < found.value < 1
    assert evaluate(METRICS["retrieval"], classes, classes, points).value == 1


def test_relative_error_leaves_padding_out(
    language: Program, changed_language: Program, data: Batches
) -> None:
    slow = []
    for (new, _, mask), (old, _, _) in zip(
        rows(changed_language, data), rows(language, data), strict=True
    ):
        kept = mask.bool()
        slow.append(((new[kept] - old[kept]).norm() / old[kept].norm()).item())
    found = evaluate(METRICS["relative_error"], changed_language, language, data)
    assert found.value == pytest.approx(sum(slow) / 7, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("kl", 0), ("kl_p99", 0), ("top1", 1), ("cosine", 1), ("relative_error", 0), ("retrieval", 1)],
)
def test_a_program_against_itself(
    language: Program, data: Batches, name: str, value: float
) -> None:
    found = evaluate(METRICS[name], language, language, data)
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.difference == pytest.approx(0, abs=1e-12)
    assert found.difference_stderr == pytest.approx(0, abs=1e-9)


def test_padding_changes_nothing(
    language: Program, changed_language: Program, data: Batches
) -> None:
    longer = Batches(
        tuple({k: nn.functional.pad(v, (0, 4)) for k, v in batch.items()} for batch in data)
    )
    for name in ("perplexity", "kl", "top1", "relative_error"):
        short = evaluate(METRICS[name], changed_language, language, data)
        assert evaluate(METRICS[name], changed_language, language, longer) == short, name


def test_pieces_change_nothing(
    language: Program, changed_language: Program, data: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_all([METRICS["kl"], METRICS["loss"]], changed_language, language, data)
    monkeypatch.setattr(logits, "PIECE", VOCABULARY * 2)
    assert evaluate_all([METRICS["kl"], METRICS["loss"]], changed_language, language, data) == whole


def test_figures_by_hand() -> None:
    three = torch.tensor([[2.0, 4.0, 9.0], [1.0, 2.0, 3.0]])
    samples = [Samples(three[0], three[1], torch.tensor([1.0, 2.0, 3.0]))]
    found = mean(samples)
    # 15 / 6 = 2.5; 6 / 6 = 1; deviations 2 - 2.5, 4 - 5, 9 - 7.5: squares 0.25 + 1 + 2.25 = 3.5.
    assert (found.value, found.original, found.difference, found.count) == (2.5, 1, 1.5, 6)
    assert found.stderr == pytest.approx(math.sqrt(3.5 * 3 / 2) / 6)
    # The original is 1 a token in each row: the difference varies as the program does.
    assert found.difference_stderr == pytest.approx(found.stderr)
    assert exponential_mean(samples).value == pytest.approx(math.exp(2.5))
    values = torch.arange(101.0)
    top = tail(0.99)([Samples(values, values, values, (values,))])
    assert top.value == pytest.approx(99)


def test_the_difference_is_surer_than_either_value() -> None:
    rows = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 5 + 20
    now = rows + 0.1 + 0.01 * torch.randn(400, generator=torch.Generator().manual_seed(1))
    found = mean([Samples(now, rows, torch.ones(400))])
    assert found.stderr == pytest.approx(5 / 20, rel=0.1)
    assert found.difference_stderr == pytest.approx(0.01 / 20, rel=0.1)
    assert found.difference == pytest.approx(0.1, abs=0.003)


def test_one_row_has_no_error() -> None:
    one = torch.ones(1)
    assert math.isnan(mean([Samples(one, one, one)]).stderr)


def test_stderr_holds_up_against_many_draws() -> None:
    generator = torch.Generator().manual_seed(2)
    values, errors = [], []
    for _ in range(300):
        weight = torch.randint(1, 9, (60,), generator=generator).double()
        sums = weight * (3 + torch.randn(60, generator=generator, dtype=torch.float64))
        found = mean([Samples(sums, sums, weight)])
        values.append(found.value)
        errors.append(found.stderr)
    spread = torch.tensor(values).std().item()
    assert sum(errors) / 300 == pytest.approx(spread, rel=0.15)


class Counting:
    """Counts how often a program runs."""

    def __init__(self, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        bind = Program.bind

        def counted(this: Program, *given: Any) -> list[Tensor]:
            self.runs += this is program
            return bind(this, *given)

        monkeypatch.setattr(Program, "bind", counted)


def test_originals_run_once_for_many_programs(
    language: Program, changed_language: Program, data: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Counting(language, monkeypatch)
    metrics = [METRICS["kl"], METRICS["perplexity"], METRICS["top1"]]
    originals = Originals(language, data)
    first = evaluate_all(metrics, changed_language, language, data, originals=originals)
    again = evaluate_all(metrics, changed_language, language, data, originals=originals)
    assert count.runs == 3
    assert first == again
    assert originals.bytes == 7 * 6 * VOCABULARY * 4
    assert str(originals).startswith("outputs of 3 of 3 batches held in 0.0 MiB")


def test_originals_beyond_the_limit_are_computed_again(
    language: Program, changed_language: Program, data: Batches
) -> None:
    small = Originals(language, data, limit=6 * VOCABULARY * 4)
    free = evaluate(METRICS["kl"], changed_language, language, data)
    assert evaluate(METRICS["kl"], changed_language, language, data, originals=small) == free
    assert small.bytes == 6 * VOCABULARY * 4


def test_originals_of_other_data_are_refused(
    language: Program, data: Batches, points: Batches
) -> None:
    with pytest.raises(UsageError, match="another program or other data"):
        evaluate(METRICS["kl"], language, language, data, originals=Originals(language, data[:1]))


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'perplexity'"):
        find_metric("perplexty")
    with pytest.raises(UsageError, match="known: accuracy, cosine, kl"):
        find_metric("zzzzzz")


def test_check_names_what_is_missing(classes: Program, language: Program, data: Batches) -> None:
    bare = Batches(({"x": torch.randn(3, 6)},), "bare.npz")
    with pytest.raises(DataError, match=r"bare.npz: batch 0: there is no 'labels'"):
        METRICS["accuracy"].check(classes, bare)
    with pytest.raises(DataError, match="there is no 'input_ids'"):
        METRICS["perplexity"].check(classes, bare)
    ids = Batches(({"x": torch.randn(3, 6), "input_ids": torch.ones(3, 2).long()},))
    with pytest.raises(DataError, match="needs an output with 3 axes, not output_0:float32"):
        METRICS["perplexity"].check(classes, ids)
    with pytest.raises(DataError, match=r"there is no output 'logit'(.|\n)*did you mean 'logits'"):
        METRICS["kl"].check(language, data, port="logit")
    for name in ("perplexity", "loss", "kl", "top1", "cosine", "retrieval", "relative_error"):
        METRICS[name].check(language, data)


def test_check_finds_data_that_are_too_small(classes: Program, language: Program) -> None:
    def text(*masks: list[int]) -> Batches:
        mask = torch.tensor(masks)
        return Batches(({"input_ids": torch.ones_like(mask), "attention_mask": mask},), "few.txt")

    with pytest.raises(DataError, match=r"few.txt: 0 targets are too few for metric 'perplexity'"):
        METRICS["perplexity"].check(language, text([1, 0, 0], [0, 0, 1]))
    with pytest.raises(DataError, match="31 positions are too few for metric 'kl_p99'"):
        METRICS["kl_p99"].check(language, text([1] * 31))
    two = Batches(({"x": torch.randn(2, 6)},))
    with pytest.raises(DataError, match="2 rows are too few for metric 'retrieval'"):
        METRICS["retrieval"].check(classes, two)


def test_check_finds_inputs_that_the_model_refuses(language: Program) -> None:
    beyond = Batches(({"input_ids": torch.full((2, 4), 99)},), "other.txt")
    with pytest.raises(DataError, match=r"other.txt: batch 0: metric 'kl' cannot be measured"):
        METRICS["kl"].check(language, beyond)


def test_nan_in_the_result_is_an_error(classes: Program, points: Batches) -> None:
    from dataclasses import replace

    weights = {name: torch.full_like(value, torch.nan) for name, value in classes.weights.items()}
    broken = replace(classes, weights=weights)
    for name in ("kl", "top1", "accuracy", "cosine", "retrieval", "relative_error"):
        with pytest.raises(VerifyError, match=r"output 'output_0', batch 0: holds NaN"):
            evaluate(METRICS[name], broken, classes, points)


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts a function into a module that can be imported; returns its dotted name."""

    def add(function: Callable[..., object]) -> str:
        module = types.ModuleType("user_metrics")
        module.score = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "user_metrics", module)
        return "user_metrics:score"

    return add


def test_user_metric_with_a_number_a_row(
    classes: Program, changed_classes: Program, points: Batches, user: Callable[..., str]
) -> None:
    def score(program: Program, original: Program, batches: Batches) -> Tensor:
        return torch.cat([program(x=batch["x"])[0].amax(-1) for batch in batches])

    metric = find_metric(user(score))
    metric.check(classes, points)
    found = evaluate(metric, changed_classes, classes, points)
    now, was = score(changed_classes, classes, points), score(classes, classes, points)
    assert metric.better == "higher"
    assert found.value == pytest.approx(now.mean().item(), rel=1e-6)
    assert found.difference == pytest.approx((now - was).mean().item(), rel=1e-5)
    assert found.difference_stderr == pytest.approx((now - was).std().item() / 21**0.5, rel=1e-5)


def test_user_metric_with_one_number_or_an_estimate(
    classes: Program, changed_classes: Program, points: Batches, user: Callable[..., str]
) -> None:
    def score(program: Program, original: Program, batches: Batches) -> float:
        return 3.0 if program is original else 5.0

    score.better = "lower"  # type: ignore[attr-defined]
    metric = find_metric(user(score).replace(":", "."))
    found = evaluate(metric, changed_classes, classes, points)
    assert (metric.better, found.value, found.difference, found.stderr) == ("lower", 5, 2, 0)
    metric = find_metric(user(lambda *_: Estimate(0.5, 0.1, 9)))
    found = evaluate(metric, changed_classes, classes, points)
    assert (found.value, found.stderr, found.count) == (0.5, 0.1, 9)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (float("nan"), "returned NaN"),
        (torch.tensor([1.0, float("nan")]), "returned NaN"),
        (None, "returned NoneType"),
        ("good", "returned str"),
        (torch.zeros(0), "returned Tensor"),
    ],
)
def test_user_metric_that_returns_no_number(
    classes: Program, points: Batches, user: Callable[..., str], result: object, message: str
) -> None:
    metric = find_metric(user(lambda *_: result))
    with pytest.raises(DataError, match=f"metric 'user_metrics:score': {message}"):
        metric.check(classes, points)
    with pytest.raises(DataError, match=message):
        evaluate(metric, classes, classes, points)


def test_user_metric_that_raises_is_found_on_one_batch(
    classes: Program, points: Batches, user: Callable[..., str]
) -> None:
    seen = []

    def score(program: Program, original: Program, batches: Batches) -> float:
        seen.append(len(batches))
        raise ZeroDivisionError("nothing here")

    metric = find_metric(user(score))
    with pytest.raises(DataError, match="'user_metrics:score': raised ZeroDivisionError: nothing"):
        metric.check(classes, points)
    assert seen == [1]


def test_user_metric_that_cannot_be_found(user: Callable[..., str]) -> None:
    user(lambda *_: 1.0)
    with pytest.raises(UsageError, match=r"metric 'no.such:thing': cannot import 'no.such'"):
        find_metric("no.such:thing")
    with pytest.raises(UsageError, match=r"holds no function 'scor'\n  did you mean 'score'"):
        find_metric("user_metrics:scor")


def test_an_overflowing_perplexity_is_infinite(data: Batches) -> None:
    module = Language(0)
    with torch.no_grad():
        module.head.weight.mul_(1e4)
    ids = data[0]["input_ids"]
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sharp = traced(module, example, dict.fromkeys(example, ("batch", "seq")))
    assert evaluate(METRICS["perplexity"], sharp, sharp, data).value == math.inf


def test_the_first_batches_alone_share_what_was_computed(
    language: Program, data: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Counting(language, monkeypatch)
    originals = Originals(language, data)
    few = originals.first(2)
    found = [few.output(number) for number in (0, 1)]
    assert [originals.output(number) is value for number, value in enumerate(found)] == [True, True]
    originals.output(2)
    assert count.runs == 3
    assert len(few.batches) == 2
    assert originals.first(3) is originals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_of_a_killed_run_are_read_back(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = text(Language(0).to(dtype))
    data = Batches(tuple({"input_ids": torch.randint(0, 9, (2, 5))} for _ in range(3)))
    first = Originals(program, data, journal=Journal.open(tmp_path / "j", "key"))
    expected = [first.output(number) for number in range(2)]
    count = Counting(program, monkeypatch)
    again = Originals(program, data, journal=Journal.open(tmp_path / "j", "key"))
    found = [again.output(number) for number in range(3)]
    assert count.runs == 1
    for was, now in zip(expected, found, strict=False):
        assert now.dtype == was.dtype
        assert torch.equal(now, was)


def test_kept_bytes_that_make_no_tensor_are_computed_again(
    language: Program, data: Batches, tmp_path: Path
) -> None:
    expected = Originals(language, data).output(0)
    for about in (None, ["int3", [2]], ["float32", "x"], ["float32", [3, 5]], [[], []]):
        kept = Journal.open(tmp_path / "j", "key")
        originals = Originals(language, data, journal=kept)
        name = f"{originals.port} of batch {data[0:1].digest()}"
        kept.blocks.keep(name, about, memoryview(b"12345678"))
        assert torch.equal(originals.output(0), expected)
