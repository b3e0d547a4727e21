"""Caches with a window of tokens in full, against the rule done one pair of tokens at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from caching import decode, module, plan_with, texts
from torch import Tensor, fx

import redpass
from redpass import ops, rewrite
from redpass.analysis.caches.moments import cache_moments
from redpass.analysis.caches.parts import Factors
from redpass.analysis.caches.sites import CacheSide, cache_sites
from redpass.facts import Facts
from redpass.passes.cache_latents import CacheLatents
from redpass.program import Program, interpret

WINDOW = 5
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(5))
CUTS = ((20,), (3, 1, 1, 9, 6), (1,) * 20)


def off(before: Tensor, after: Tensor) -> float:
    return float((before - after).norm() / before.norm())


SLOW: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gpt2", {}),
    ("gpt2", {"group_size": 2}),
    ("llama", {}),
    ("llama", {"keys": "rebuilt"}),
    ("gpt_neox", {"group_size": 2, "keys": "rebuilt"}),
)


@pytest.mark.parametrize(("name", "form"), SLOW, ids=str)
def test_every_pair_of_tokens_follows_the_rule(name: str, form: dict[str, Any]) -> None:
    program = one_layer(name)
    pass_ = CacheLatents(ranks=(3,), multiple=1, window=WINDOW, **form)
    plan = plan_with(pass_, program)
    assert len(plan.actions) == 2
    after = rewrite.apply(program, plan.actions)
    expected = slowly(program, pass_)
    assert off(decode(program, IDS, (20,))[0], expected) > 1e-3
    for calls in CUTS:
        assert off(expected, decode(after, IDS, calls)[0]) < 1e-5


@cache
def one_layer(name: str) -> Program:
    count = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}
    return redpass.load(module(name, **count))


def slowly(program: Program, pass_: CacheLatents) -> Tensor:
    """Logits of a model with one layer, by the rule, one pair of tokens after the other."""
    facts = Facts(program, texts())
    sites = facts.get(cache_sites)
    moments = cache_moments(program, facts, sites, pass_.group_size)
    sides = {key[1]: side for key, side in sites.found.items() if isinstance(side, CacheSide)}
    core = sides["key"].site.core
    lossy: dict[str, Tensor] = {}
    for (label, kind), side in sites.found.items():
        assert isinstance(side, CacheSide)
        factors = pass_._basis(side, moments[label, kind]).factors(3)
        early = kind == "key" and pass_.keys == "rebuilt"
        place = side.split if early else side.new
        lossy[kind] = run(program, {place: partial_of(factors)})[1][side.operand]
    _, full = run(program, {})
    mask = full[ops.argument(core.node, "attn_mask")]
    exact = {kind: full[side.operand] for kind, side in sides.items()}
    made = attended(full[core.query], exact, lossy, mask)
    return run(program, {core.output: lambda _: made})[0]


def partial_of(factors: Factors) -> Any:
    """What latents give back of `[batch, heads, positions, width]`, or heads on axis 2."""
    mean = torch.zeros(factors.down.shape[::2]) if factors.mean is None else factors.mean

    def given_back(value: Tensor) -> Tensor:
        heads, size = factors.groups * (factors.down.shape[2] // value.shape[3]), value.shape[3]
        at_front = value.shape[1] == heads
        by_head = value.double() if at_front else value.double().transpose(1, 2)
        found = torch.empty_like(by_head)
        each = heads // factors.groups
        for group in range(factors.groups):
            held = slice(group * each, (group + 1) * each)
            joined = by_head[:, held].transpose(1, 2).flatten(2)
            back = joined @ factors.down[group].T @ factors.up[group].T + mean[group]
            found[:, held] = back.unflatten(2, (each, size)).transpose(1, 2)
        return (found if at_front else found.transpose(1, 2)).to(value.dtype)

    return given_back


def attended(query: Tensor, exact: Any, lossy: Any, mask: Tensor) -> Tensor:
    found = torch.zeros_like(query)
    share = query.shape[1] // exact["key"].shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                seen = [j for j in range(query.shape[2]) if mask[b, 0, i, j]]
                kept = [exact if i - j <= WINDOW else lossy for j in seen]
                keys, values = (
                    torch.stack([kept[n][kind][b, h // share, j] for n, j in enumerate(seen)])
                    for kind in ("key", "value")
                )
                weights = torch.softmax(keys @ query[b, h, i] / query.shape[3] ** 0.5, 0)
                found[b, h, i] = weights @ values
    return found


def run(program: Program, instead: dict[fx.Node, Any]) -> tuple[Tensor, dict[fx.Node, Tensor]]:
    """Logits and all values of one call, with some values put in place of others."""
    known: dict[fx.Node, Tensor] = {}
    empty = {p.name: [0 if s == "past" else s for s in p.shape] for p in program.signature.inputs}
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    given["position_ids"] = torch.arange(20).expand(2, -1).contiguous()
    inputs = [
        given[name] if name in given else torch.zeros([2, *(int(s) for s in shape[1:])])
        for name, shape in empty.items()
    ]

    def observe(node: fx.Node, value: Any) -> Any:
        known[node] = instead[node](value) if node in instead else value
        return known[node]

    names = [port.name for port in program.signature.outputs]
    return interpret(program, inputs, observe)[names.index("logits")], known
