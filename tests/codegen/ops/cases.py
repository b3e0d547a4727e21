"""Small arguments of every op on the CPU, by op and label."""

from __future__ import annotations

import torch

from redpass.codegen.ops import OPS


def cases(dtype: torch.dtype = torch.float32) -> dict[str, tuple[str, tuple]]:
    """Returns label -> (op's name, arguments)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (0.5 * torch.randn(shape, generator=generator)).to(dtype)

    clusters, seen = [0, 0, 1, 0, 1], draw(2, 1, 3, 7) > -0.5
    table = draw(1, 7, 8)
    heads = draw(2, 2, 3, 16), draw(2, 2, 7, 16), draw(2, 5, 7, 12)
    latents = draw(2, 7, 2, 5), draw(4, 16, 5), draw(2, 7, 2, 6), draw(2, 9, 6)
    found = {
        "add_norm rms": (draw(2, 3, 16), draw(2, 3, 16), draw(16), None, 1e-5, "rms"),
        "add_norm layer": (draw(2, 3, 16), draw(2, 3, 16), draw(16), draw(16), 1e-5, "layer"),
        "rotary halves": (draw(2, 4, 7, 8), draw(2, 2, 7, 8), table, table, False),
        "rotary pairs": (draw(2, 4, 7, 12), draw(2, 2, 7, 12), table, table, True),
        "gated_feed_forward": (draw(2, 3, 16), draw(9, 16), draw(9, 16), None, draw(9), "silu"),
        "low_rank_linear": (draw(2, 3, 16), draw(4, 16), draw(9, 4), draw(9), "gelu"),
        "clustered_attention": (*heads, clusters, [], [], None, False, 0, None),
        "clustered_attention causal": (*heads, clusters, [], [], None, True, 4, 0.3),
        "clustered_attention mask": (*heads, clusters, [1, 0], [4, 3, 2, 1, 0], seen, False, 0,
                                     None),
        "latent_attention": (draw(2, 8, 1, 16), *latents, table, table, None, False, None),
        "latent_attention normed": (draw(2, 8, 1, 16), *latents, table, table, None, False, None,
                                    draw(16), 1e-5),
        "latent_attention pairs": (draw(2, 8, 3, 16), *latents[:3], None, table, table, seen, True,
                                   0.3),
    }  # fmt: skip
    return {label: (label.split()[0], arguments) for label, arguments in found.items()}


CASES = cases()
assert {name for name, _ in CASES.values()} == set(OPS)
