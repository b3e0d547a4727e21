"""Is a kernel's result as right as what PyTorch gives in the same dtype?

The truth is the reference in float64 on the same inputs. A kernel may be off by twice what the
reference in the inputs' own dtype is off, plus a floor of four roundings (why twice, and why a
floor: `redpass/verify/numbers.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redpass.codegen.ops.op import Op
from redpass.verify.differences import misplaced_nonfinite, relative_errors, shape_fault


def disagreement(op: Op, arguments: tuple[Any, ...], found: Any) -> str:
    """Returns "" when `found` is as right as the reference, else what is wrong with it.

    Args:
        op: whose result it is.
        arguments: what gave it.
        found: a tensor or several, as the op returns them.
    """
    truth = _outputs(op.reference(*map(_widened, arguments)))
    plain = _outputs(op.reference(*arguments))
    for index, (ref, old, new) in enumerate(zip(truth, plain, _outputs(found), strict=True)):
        if fault := _fault(ref, old, new):
            return f"result {index} {fault}"
    return ""


def _fault(truth: Tensor, old: Tensor, new: Tensor) -> str:
    if fault := shape_fault(old, new):
        return fault
    if count := misplaced_nonfinite(truth, old, new):
        return f"has NaN or infinity in {count} wrong places"
    floor = 4 * torch.finfo(new.dtype).eps
    for measure, error, was in relative_errors(truth, old, new):
        limit = 2 * was + floor
        if error > limit:
            return f"is wrong: {measure} {error:.1e}, allowed {limit:.1e}"
    return ""


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _widened(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return argument
