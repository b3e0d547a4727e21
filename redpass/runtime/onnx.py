"""An ONNX file as a function from named tensors to named tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpass.errors import LoadError, UsageError, nearest

DTYPES = {
    "tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32, "tensor(bool)": torch.bool, "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8, "tensor(int16)": torch.int16, "tensor(float16)": torch.float16,
}  # fmt: skip


class OnnxModel:
    """Runs an ONNX file in ONNX Runtime on the CPU.

    Args:
        path: the file; external data is read from its folder only.
        threads: threads of one operator, 0 for one a core.
        spinning: whether idle threads wait actively: a little faster alone, slower beside others.

    Raises:
        LoadError: missing, damaged, or with external data outside its folder.
    """

    def __init__(self, path: str | Path, *, threads: int = 0, spinning: bool = False) -> None:
        import onnxruntime

        self.path = Path(path)
        if not self.path.is_file():
            raise LoadError("no such file", file=path, hint="give a model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        try:
            self.session = onnxruntime.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LoadError(f"ONNX Runtime refuses it: {first}", file=path) from error
        self.inputs: tuple[Any, ...] = tuple(self.session.get_inputs())
        self.outputs = tuple(item.name for item in self.session.get_outputs())

    def __call__(
        self, values: Mapping[str, Tensor] | None = None, /, **named: Tensor
    ) -> dict[str, Tensor]:
        """Returns the outputs by name. Half-precision floats are converted where the file has none.

        Raises:
            UsageError: a missing or unknown input.
        """
        given = dict(values or {}) | named
        names = [item.name for item in self.inputs]
        unknown = sorted(set(given) - set(names))
        missing = [name for name in names if name not in given]
        if unknown or missing:
            hint = nearest(unknown[0], names) if unknown else f"expected {', '.join(names)}"
            raise UsageError(
                f"inputs do not match: missing {missing or 'none'}, unknown {unknown or 'none'}",
                file=self.path,
                hint=hint,
            )
        feed = {item.name: self._array(item, given[item.name]) for item in self.inputs}
        found = self.session.run(None, feed)
        return {
            name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)
        }

    def _array(self, item: Any, value: Tensor) -> Any:
        wanted = DTYPES.get(item.type, value.dtype)
        if value.is_floating_point() and wanted.is_floating_point:
            value = value.to(wanted)
        return value.detach().cpu().contiguous().numpy()
