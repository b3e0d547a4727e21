"""Programs that the verification tests share, traced once a session."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Classes, Language, Masked, Position, text, traced

from redpass.program import Program

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="session")
def masked_module() -> Masked:
    torch.manual_seed(0)
    return Masked()


@pytest.fixture(scope="session")
def masked(masked_module: Masked) -> Program:
    return text(masked_module)


@pytest.fixture(scope="session", params=DTYPES, ids=lambda dtype: str(dtype)[6:])
def narrow_module(request: pytest.FixtureRequest, masked_module: Masked) -> Masked:
    return copy.deepcopy(masked_module).to(request.param)


@pytest.fixture(scope="session")
def narrow(narrow_module: Masked) -> Program:
    return text(narrow_module)


@pytest.fixture(scope="session")
def language() -> Program:
    return text(Language(0))


@pytest.fixture(scope="session")
def changed_language() -> Program:
    return text(Language(1))


@pytest.fixture(scope="session")
def classes() -> Program:
    return traced(Classes(0), {"x": torch.randn(3, 6)}, {"x": ("batch", 6)})


@pytest.fixture(scope="session")
def changed_classes() -> Program:
    return traced(Classes(1), {"x": torch.randn(3, 6)}, {"x": ("batch", 6)})


@pytest.fixture(scope="session")
def position() -> Program:
    ids = torch.randint(0, 11, (2, 5))
    return traced(Position(), {"input_ids": ids}, {"input_ids": ("batch", "seq")})
