"""One training loop for every model: AdamW, warm-up, linear decay to zero, once or more often."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, int], Tensor]

SAVE_EVERY = 200


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. Counts of steps, so a slow machine makes the same model.

    Each cycle warms up and falls to zero again (warm restarts, Loshchilov and Hutter 2017): a model
    can be trained on without forgetting the schedule that made it.
    """

    cycles: tuple[int, ...]
    batch: int
    learning_rate: float
    warmup: int
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of all cycles."""
        return sum(self.cycles)

    def rate(self, step: int) -> float:
        """Learning rate of one step: in its cycle linear up over `warmup`, then down to zero."""
        for length in self.cycles:
            if step < length:
                rise = (step + 1) / self.warmup
                fall = (length - step) / (length - self.warmup)
                return self.learning_rate * min(rise, fall, 1.0)
            step -= length
        return 0.0


@dataclass(frozen=True)
class Spent:
    """What a training run cost: seconds of wall time and of processor time, over all restarts."""

    wall: float
    processor: float


def fit(module: nn.Module, loss: Loss, schedule: Schedule, checkpoint: Path) -> Spent:
    """Train `module` in place; `loss(module, step)` gives the scalar to minimise.

    State is written to `checkpoint` every `SAVE_EVERY` steps and picked up from there. The loss
    must depend on the step number alone (not on hidden random state): then a resumed run equals
    an unbroken one.
    """
    optimizer = _optimizer(module, schedule)
    first, wall, processor = _resume(module, optimizer, checkpoint)
    module.train()
    while first < schedule.steps:
        last = min(first + SAVE_EVERY, schedule.steps)
        began = time.monotonic(), time.process_time()
        mean = _run(module, loss, optimizer, schedule, range(first, last))
        wall += time.monotonic() - began[0]
        processor += time.process_time() - began[1]
        first = last
        _save(module, optimizer, checkpoint, (first, wall, processor))
        print(
            f"{checkpoint.stem} step {first}/{schedule.steps} loss {mean:.4f} wall {wall:.0f} s",
            flush=True,
        )
    module.eval()
    return Spent(wall, processor)


def _optimizer(module: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    # Norm gains and biases are kept out of the decay: pulling them to zero only slows training.
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95), fused=True)


def _run(module: nn.Module, loss: Loss, optimizer, schedule: Schedule, steps: range) -> float:
    total = 0.0
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        value = loss(module, step)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), schedule.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += value.item()
    return total / len(steps)


def _save(module: nn.Module, optimizer, checkpoint: Path, progress: tuple) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = checkpoint.with_suffix(".partial")
    state = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": progress,
    }
    torch.save(state, partial)
    partial.replace(checkpoint)


def _resume(module: nn.Module, optimizer, checkpoint: Path) -> tuple[int, float, float]:
    if not checkpoint.exists():
        return 0, 0.0, 0.0
    state = torch.load(checkpoint, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return state["progress"]


def generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step, the same whether or not the run was interrupted before it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def batch_rows(count: int, schedule: Schedule, step: int) -> Tensor:
    """Row numbers `[batch]` of one step: each epoch is a fresh permutation of `count` rows."""
    per_epoch = count // schedule.batch
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(count, generator=generator(schedule.seed + 1, epoch))
    return order[place * schedule.batch : (place + 1) * schedule.batch]
