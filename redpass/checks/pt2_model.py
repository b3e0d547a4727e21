"""What may stand in a `.pt2`: members, operators, expressions, metadata.

PyTorch's loader unpickles members, imports operators by dotted name and evaluates shape
expressions as Python text, all on the file's own word, and no flag stops it. So the archive is
read here first, as data, and written anew without anything that could run; what cannot be
checked is refused.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from redpass.errors import LoadError

MAX_JSON, MAX_DEPTH = 256 << 20, 200
MAX_PARTS = 1_000_000
"""Values in one JSON member: models of 100 layers have a fifth of that, and each takes memory."""

_OP = re.compile(r"torch\.ops\.(aten|redpass)\.[A-Za-z_]\w*\.[A-Za-z_]\w*")
SIZE_TARGETS = frozenset(
    {f"_operator.{name}" for name in (
        "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "le", "lt", "mod", "mul", "ne",
        "neg", "or_", "pow", "sub", "truediv",
    )}
    | {f"math.{name}" for name in ("ceil", "floor", "trunc")}
    | {f"torch.sym_{name}" for name in ("float", "int", "ite", "max", "min", "not")}
)  # fmt: skip
"""Pure functions on sizes, as a file names them: those of `redpass.ops`, without its imports."""

DEVICES = frozenset(
    {
        "cpu", "cuda", "ipu", "xpu", "mkldnn", "opengl", "opencl", "ideep", "hip", "ve", "fpga",
        "maia", "xla", "lazy", "vulkan", "mps", "meta", "hpu", "mtia", "privateuseone",
    }
)  # fmt: skip
"""The kinds of device that PyTorch has names for (c10/core/DeviceType.h)."""

_REGIONS = frozenset(
    f"torch.ops.higher_order.{name}"
    for name in ("wrap_with_set_grad_enabled", "wrap_with_autocast")
)
_FILE_OPS = ("torch.ops.aten.from_file.",)
_SPEC_TYPES = frozenset(
    {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
)
_KEPT_METADATA = ("stack_trace", "nn_module_stack")
_OPAQUE = ("as_custom_obj", "as_script_object", "as_opaque", "as_operator")

FUNCTIONS = frozenset(
    {
        "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Eq",
        "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "FloorDiv", "CeilDiv", "PythonMod",
        "CleanDiv", "CeilToInt", "FloorToInt", "TruncToInt", "TruncToFloat", "ToFloat",
        "RoundToInt", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "Where",
        "ModularIndexing", "Identity", "Abs",
    }
)  # fmt: skip
"""Functions of size expressions: sympy's own and those of torch.utils._sympy."""

_FLAGS = frozenset({"positive", "integer", "real", "nonnegative", "evaluate"})
_SYMBOL = re.compile(r"[A-Za-z_]\w{0,63}")


def parse(data: bytes, file: Path, place: str) -> Any:
    """Parses a JSON member of bounded size and depth. Raises `LoadError`."""
    hint = "export the model again with torch.export"
    parts = data.count(b",") + data.count(b"[") + data.count(b"{")
    if len(data) > MAX_JSON or parts > MAX_PARTS:
        text = f"{len(data)} bytes of JSON with {parts} values"
        raise LoadError(text, file=file, place=place, hint=hint)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"not JSON: {error}", file=file, place=place, hint=hint) from error


def check_model(value: Any, file: Path, place: str) -> Any:
    """Checks a model's JSON and returns it without what is not needed.

    Raises:
        LoadError: an operator, an expression or an object that is not on the lists here.
    """
    if not isinstance(value, dict):
        raise LoadError("not a JSON object", file=file, place=place)
    _Checker(file, place).walk(value, 0)
    value["guards_code"] = []
    return value


class _Checker:
    def __init__(self, file: Path, place: str) -> None:
        self.file, self.place = file, place

    def refuse(self, found: str) -> LoadError:
        return LoadError(
            found,
            file=self.file,
            place=self.place,
            hint="redpass refuses what it cannot check; export the model again with torch.export",
        )

    def walk(self, value: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self.refuse("nested too deeply")
        if isinstance(value, list):
            for part in value:
                self.walk(part, depth + 1)
        elif isinstance(value, dict):
            for key in list(value):
                self.entry(value, key)
                self.walk(value[key], depth + 1)

    def entry(self, holder: dict[str, Any], key: str) -> None:
        value = holder[key]
        self.device(value)
        if key == "target" and isinstance(value, str):
            if not is_known_target(value):
                raise self.refuse(f"the operator '{value}' is not allowed")
        elif key == "expr_str":
            self.expression(value)
        elif key in ("in_spec", "out_spec"):
            self.spec(value)
        elif key == "metadata" and isinstance(value, dict):
            holder[key] = {k: v for k, v in value.items() if k in _KEPT_METADATA}
        elif key in _OPAQUE or (
            key in ("custom_obj_values", "treespec_namedtuple_fields") and value
        ):
            raise self.refuse(f"an object of its own kind ({key})")
        elif key == "range_constraints" and isinstance(value, dict):
            for name in value:
                self.expression(name)

    def device(self, value: Any) -> None:
        # By its form, not its key: a tensor may be called `device`.
        if isinstance(value, dict) and value.keys() == {"type", "index"} and not is_device(value):
            raise self.refuse(f"no device: {value}")

    def expression(self, text: Any) -> None:
        if not is_safe_expression(text):
            raise self.refuse(f"'{text}' is no size expression")

    def spec(self, text: Any) -> None:
        if not isinstance(text, str):
            raise self.refuse("a tree spec that is no text")
        if not text:
            return
        found = parse(text.encode(), self.file, self.place)
        if not isinstance(found, list) or len(found) != 2:
            raise self.refuse("a tree spec without its two parts")
        self.spec_part(found[1], 0)

    def spec_part(self, spec: Any, depth: int) -> None:
        if depth > MAX_DEPTH or not _is_plain_spec(spec):
            raise self.refuse("a tree spec of a kind of its own")
        for child in spec.get("children_spec") or ():
            self.spec_part(child, depth + 1)


def _is_plain_spec(spec: Any) -> bool:
    if not isinstance(spec, dict) or not isinstance(spec.get("children_spec", []), list | None):
        return False
    kind, context = spec.get("type"), spec.get("context")
    is_plain = context is None or (isinstance(context, str) and "{" not in context)
    return is_plain and isinstance(kind, str | None) and kind in _SPEC_TYPES


def is_known_target(target: str) -> bool:
    """Whether a call target is an ATen or redpass op, a size function or a gradient switch."""
    if _OP.fullmatch(target):
        return not target.startswith(_FILE_OPS)
    return target in _REGIONS or target in SIZE_TARGETS


def is_device(value: Any) -> bool:
    """Whether `value` names a device that PyTorch has a name for, and at most its number."""
    if not isinstance(value, dict):
        return False
    kind, index = value.get("type"), value.get("index")
    if not isinstance(kind, str) or kind not in DEVICES:
        return False
    return index is None or (type(index) is int and 0 <= index < 128)


def is_safe_expression(text: Any) -> bool:
    """Whether `text` is made of numbers, symbols, arithmetic and the functions listed here."""
    if not isinstance(text, str) or len(text) > 10_000:
        return False
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return _is_safe(tree, 0)


def _is_safe(node: ast.AST, depth: int) -> bool:
    if depth > 100:
        return False
    if isinstance(node, ast.Call):
        return _is_safe_call(node, depth)
    if isinstance(node, ast.BinOp):
        plain = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
        powers = isinstance(node.op, ast.Pow) and _is_small(node.right)
        return (isinstance(node.op, plain) or powers) and all(
            _is_safe(part, depth + 1) for part in (node.left, node.right)
        )
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub | ast.UAdd) and _is_safe(node.operand, depth + 1)
    if isinstance(node, ast.Name):
        return bool(_SYMBOL.fullmatch(node.id)) and "__" not in node.id
    return isinstance(node, ast.Constant) and _is_number(node.value)


def _is_safe_call(node: ast.Call, depth: int) -> bool:
    if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
        return False
    flags = all(
        k.arg in _FLAGS and isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool)
        for k in node.keywords
    )
    if node.func.id == "Symbol":
        names = [a.value for a in node.args if isinstance(a, ast.Constant)]
        fits = len(names) == len(node.args) == 1 and isinstance(names[0], str)
        return flags and fits and bool(_SYMBOL.fullmatch(str(names[0])))
    if node.func.id in ("Pow", "PowByNatural", "FloatPow"):
        flags = flags and len(node.args) == 2 and _is_small(node.args[1])
    return flags and all(_is_safe(argument, depth + 1) for argument in node.args)


def _is_small(node: ast.AST) -> bool:
    """Whether an exponent is a small number, so that evaluating it costs nothing."""
    if isinstance(node, ast.Call) and len(node.args) == 1:
        return _is_small(node.args[0])
    if isinstance(node, ast.UnaryOp):
        return _is_small(node.operand)
    value = node.value if isinstance(node, ast.Constant) else None
    return isinstance(value, int | float) and _is_number(value) and abs(value) <= 16


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63
