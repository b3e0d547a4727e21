"""Operands whose third row lies 2^31 elements from the first: an offset of 32 bits would wrap.

The distance between two rows, 2^30, is itself a number of 32 bits, as in any large tensor.

The memory between the rows is never touched, so it costs addresses only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from redpass.codegen.ops import OPS, Config

FAR = 2**30
DRAW = Callable[..., torch.Tensor]


@pytest.fixture
def far(random) -> DRAW:
    """`far(axis, *shape)`: half-precision numbers, three along `axis`, far apart."""

    def draw(axis: int, *shape: int) -> torch.Tensor:
        values = random(*shape, dtype=torch.float16)
        assert shape[axis] == 3
        strides = list(values.stride())
        strides[axis] = FAR
        torch.use_deterministic_algorithms(False)  # or all of it would be filled with NaN
        try:
            memory = torch.empty(2 * FAR + values.numel(), dtype=torch.float16)
        except RuntimeError as error:  # pragma: no cover
            pytest.skip(f"no address space for 4 GiB: {error}")
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)
        return memory.as_strided(shape, strides).copy_(values)

    return draw


def test_add_norm(far, check, random) -> None:
    near = random(3, 32, dtype=torch.float16)
    check(OPS["add_norm"], far(0, 3, 32), near, None, None, 1e-5, "rms")
    check(OPS["add_norm"], near, far(0, 3, 32), None, None, 1e-5, "layer")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotary(axis, far, check, random) -> None:
    table = random(1, 3, 16, dtype=torch.float16)
    near = random(3, 3, 3, 16, dtype=torch.float16)
    check(OPS["rotary"], far(axis, 3, 3, 3, 16), near, table, table, False)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gated_feed_forward(which, far, check, random) -> None:
    operands = [random(3, 16, dtype=torch.float16) for _ in range(3)]
    operands[which] = far(0, 3, 16)
    config = Config.of(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2)
    check(OPS["gated_feed_forward"], *operands, None, None, "silu", config=config)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_low_rank_linear(which, far, check, random) -> None:
    shapes = [(3, 16), (3, 16), (3, 3)]
    operands = [random(*shape, dtype=torch.float16) for shape in shapes]
    operands[which] = far(0, *shapes[which])
    check(OPS["low_rank_linear"], *operands, None, "none")


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_clustered_attention(axis, which, far, check, random) -> None:
    operands = [random(3, 3, 3, 16, dtype=torch.float16) for _ in range(3)]
    operands[which] = far(axis, 3, 3, 3, 16)
    config = Config.of(BLOCK_M=16, BLOCK_N=16, VALUES=1, SPLITS=1, PACKED=1)
    check(
        OPS["clustered_attention"], *operands, [0, 1, 2], [], [], None, True, 0, None, config=config
    )


@pytest.mark.parametrize("which", [1, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_latent_attention(axis, which, far, check, random) -> None:
    shapes = [(3, 3, 1, 16), (3, 3, 3, 16), (3, 16, 16), (3, 3, 3, 16), (3, 16, 16)]
    operands = [random(*shape, dtype=torch.float16) for shape in shapes]
    operands[which] = far(axis, *shapes[which])
    table = random(1, 3, 8, dtype=torch.float16)
    config = Config.of(BLOCK_N=16, BLOCK_R=16, SPLITS=1)
    check(OPS["latent_attention"], *operands, table, table, None, False, None, config=config)
