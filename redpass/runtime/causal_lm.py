"""A causal language model with `generate`, around a program, a `model.onnx` or a `model.pt2`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpass.errors import LoadError, UsageError
from redpass.program import Program, Shape
from redpass.runtime.onnx import DTYPES, OnnxModel

PAST, PRESENT = "past_key_values.", "present."


@dataclass(frozen=True)
class _Backend:
    """A model as a function by names.

    Attributes:
        inputs: input name -> dtype and sizes; a name among sizes is the batch (first axis) or
            the past length.
        state: (input, output) names of the cache.
    """

    call: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
    inputs: Mapping[str, tuple[torch.dtype, Shape]]
    state: tuple[tuple[str, str], ...]

    @property
    def has_past(self) -> bool:
        """Whether it has a cache, or had one: the mask of a model that lost it is as long still."""
        shape = self.inputs["attention_mask"][1]
        return bool(self.state) or shape[-1] != self.inputs["input_ids"][1][-1]

    def empty(self, batch: int) -> dict[str, Tensor]:
        """Returns a cache of past length 0."""
        found = {}
        for name, _ in self.state:
            dtype, shape = self.inputs[name]
            rest = [size if isinstance(size, int) else 0 for size in shape[1:]]
            found[name] = torch.zeros([batch, *rest], dtype=dtype)
        return found


class CausalLM:
    """Generates text token by token, carrying the cache through the model's own state.

    Args:
        source: a program, or a file that `redpass.export` wrote from one.
        threads: threads of ONNX Runtime, 0 for one a core.

    Raises:
        UsageError: the model has no cache, or takes no `input_ids`.
        LoadError: a file that is missing, damaged, or neither `.onnx` nor `.pt2`.
    """

    def __init__(self, source: Program | str | Path, *, threads: int = 0) -> None:
        if isinstance(source, Program):
            self._backend = _from_program(source)
        else:
            self._backend = _from_file(Path(source), threads)
        names = set(self._backend.inputs)
        if not {"input_ids", "attention_mask"} <= names or not self._backend.has_past:
            raise UsageError(
                "not a causal language model with a cache",
                place=None if isinstance(source, Program) else source,
                hint=f"its inputs are {', '.join(sorted(names))}",
            )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Tensor:
        """Returns the prompts with up to `max_new_tokens` tokens after them.

        Args:
            input_ids: int64 [batch, seq]; shorter prompts are padded on the left.
            max_new_tokens: at least 1.
            eos_token_id: a row stops after one of these; the call ends when all rows have.
            pad_token_id: what stopped rows are filled with; the first end token when not given.
            attention_mask: [batch, seq], 0 where a prompt is padded; ones when not given.
            do_sample: draw tokens instead of taking the likeliest.
            temperature: divides the logits before drawing.
            top_p: draw among the likeliest tokens that together reach this probability.
            seed: of the drawing.

        Returns:
            int64 [batch, seq + new].

        Raises:
            UsageError: shapes that do not fit, or a row padded on the right.
        """
        mask = _checked_mask(input_ids, attention_mask, max_new_tokens)
        if not 0 < top_p <= 1 or temperature <= 0:
            raise UsageError(f"temperature {temperature}, top_p {top_p}", hint=_RANGES)
        ends = _as_list(eos_token_id)
        pad = pad_token_id if pad_token_id is not None else (ends or [0])[0]
        lot = torch.Generator().manual_seed(seed) if do_sample else None
        ids, step, state = input_ids, input_ids, self._backend.empty(len(input_ids))
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            logits, state = self._step(step, mask, state)
            chosen = _draw(logits, lot, temperature, top_p)
            chosen = torch.where(done, pad, chosen)
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            done |= torch.isin(chosen, torch.tensor(ends, dtype=torch.int64))
            if bool(done.all()):
                break
            step = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return ids

    def _step(
        self, tokens: Tensor, mask: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the logits after the last token, [batch, vocabulary], and the new cache."""
        given = {"input_ids": tokens, "attention_mask": mask, **state}
        if "position_ids" in self._backend.inputs:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            given["position_ids"] = positions[:, -tokens.shape[1] :].contiguous()
        found = self._backend.call(given)
        return found["logits"][:, -1].float(), {i: found[o] for i, o in self._backend.state}


_RANGES = "temperature is above 0, top_p above 0 and at most 1"


def _draw(logits: Tensor, lot: torch.Generator | None, temperature: float, top_p: float) -> Tensor:
    if lot is None:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    ordered, places = probabilities.sort(dim=-1, descending=True)
    # A token stays while those before it have not reached top_p yet, so one always does.
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    return places.gather(-1, torch.multinomial(ordered, 1, generator=lot))[:, 0]


def _checked_mask(input_ids: Tensor, mask: Tensor | None, count: int) -> Tensor:
    if input_ids.dim() != 2 or 0 in input_ids.shape or input_ids.dtype != torch.int64:
        found = f"found {input_ids.dtype}{list(input_ids.shape)}"
        raise UsageError(f"{found}, expected int64[batch, seq], not empty", place="input_ids")
    if count < 1:
        raise UsageError(f"{count} tokens to generate", place="max_new_tokens", hint="at least 1")
    if mask is None:
        return torch.ones_like(input_ids)
    if mask.shape != input_ids.shape:
        expected = f"expected {list(input_ids.shape)}, the shape of input_ids"
        raise UsageError(f"found {list(mask.shape)}, {expected}", place="attention_mask")
    if not bool((mask[:, -1] != 0).all()):
        hint = "pad on the left: the last token of each row is the one to go on from"
        raise UsageError("a row is padded on the right", place="attention_mask", hint=hint)
    return mask.to(torch.int64)


def _as_list(ends: int | Sequence[int] | None) -> list[int]:
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def _from_program(program: Program) -> _Backend:
    names = [port.name for port in program.signature.inputs]
    outputs = [port.name for port in program.signature.outputs]
    module = program.module

    def call(values: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return dict(zip(outputs, module(*(values[name] for name in names)), strict=True))

    ports = {port.name: (port.dtype, port.shape) for port in program.signature.inputs}
    return _Backend(call, ports, program.signature.state)


def _from_file(path: Path, threads: int) -> _Backend:
    if path.suffix == ".onnx":
        model = OnnxModel(path, threads=threads)
        ports = {i.name: (DTYPES[i.type], tuple(i.shape)) for i in model.inputs}
        return _Backend(model, ports, _pairs(ports, model.outputs))
    if path.suffix != ".pt2":
        hint = "give a program, a model.onnx or a model.pt2"
        raise LoadError(f"'{path.suffix}' holds no model that generates", file=path, hint=hint)
    return _from_pt2(path)


def _from_pt2(path: Path) -> _Backend:
    from redpass.frontend.pt2 import load_exported

    exported: Any = load_exported(path)
    spec = exported.call_spec
    names = list(spec.in_spec.child(0).child(0).context)
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    ports = {}
    for name, node in zip(names, exported.graph_signature.user_inputs, strict=True):
        value = placeholders[node].meta["val"]
        shape = tuple(s if isinstance(s, int) else str(s) for s in value.shape)
        ports[name] = (value.dtype, shape)
    module = exported.module()
    outputs = tuple(map(str, spec.out_spec.context))

    def call(values: dict[str, Tensor]) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = module({name: values[name] for name in names})
        return found

    return _Backend(call, ports, _pairs(ports, outputs))


def _pairs(inputs: Mapping[str, Any], outputs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs cache inputs with outputs by their names, which a file keeps and a signature has."""
    pairs = ((name, PRESENT + name.removeprefix(PAST)) for name in inputs if name.startswith(PAST))
    return tuple(pair for pair in pairs if pair[1] in outputs)
