"""Stand-ins for the modules of PyTorch and transformers that a model class imports.

Run from their own files are what decides names and shapes: PyTorch's layers, the configuration and
the model, the base classes of both, and what transformers does to match weights with a model. What
only computes, logs, downloads or distributes is a stand-in.
"""

from __future__ import annotations

import ast
import itertools
import logging
import math
import re
import types
from typing import Any

from redpass.checks import shape_functions as functions
from redpass.checks import shapes
from redpass.checks.installed import Installed
from redpass.checks.stand_ins import Undecided, Unknown, is_code

PACKAGES = ("torch", "transformers", "huggingface_hub")
EXECUTED = re.compile(
    r"torch\.nn\.modules\.\w+|huggingface_hub\.(dataclasses|errors)|transformers\.("
    r"configuration_utils|modeling_utils|modeling_rope_utils|modeling_layers|activations"
    r"|pytorch_utils|core_model_loading|conversion_mapping|backbone_utils|initialization"
    r"|generation\.configuration_utils|utils\.(type_validators|loading_report|import_utils)"
    r"|integrations\.heterogeneity(\.\w+)?|models\.auto\.\w+"
    r"|models\.(\w+\.)+(?!modular_|tokenization|\w*processing|feature_extraction|convert_)\w+)"
)
TYPES = (
    "float32 float64 float16 bfloat16 complex64 complex128 int8 int16 int32 int64 uint8 bool float "
    "double half int long short float8_e4m3fn float8_e5m2"
)
DECORATORS = "auto_docstring can_return_tuple merge_with_config_defaults capture_outputs"
MOST_STEPS = 40_000
"""Attributes of modules that are set before a model is too large to be drawn in a second."""

STILL = (
    "init_parallel_plans _backward_compatibility_gradient_checkpointing "
    "_move_missing_keys_from_meta_to_device _initialize_missing_keys"
)
"""Methods of a model that do nothing here."""

MIXINS = {
    "generation": "GenerationMixin",
    "generation.utils": "GenerationMixin",
    "integrations": "PeftAdapterMixin",
    "distributed.mixin": "DistributedMixin",
}
"""Bases of model classes that add neither weights nor anything to their names."""


def installed() -> Installed:
    """Returns the modules a model class needs, none of them run yet.

    Raises:
        Undecided: a package is not installed.
    """
    modules = Installed(PACKAGES, EXECUTED)
    modules.values["torch"] = shapes.Value
    _torch(modules)
    _layers(modules)
    _transformers(modules)
    _integrations(modules)
    return modules


def model_class(modules: Installed, kind: str, name: str) -> Any:
    """Returns the class that `transformers.<name>` would be, looked up with models of type `kind`.

    Raises:
        Undecided: no file of this type's folder offers the name.
    """
    auto = modules.load("transformers.models.auto.configuration_auto")
    return getattr(_Folder(modules, auto.model_type_to_module_name(kind)), name)


class _Folder:
    """Stands in for `transformers.models.<name>`, which imports its files when asked."""

    def __init__(self, modules: Installed, name: str) -> None:
        self._modules, self._package = modules, f"transformers.models.{name}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        home = self._modules.file(self._package).parent
        for file in (*home.glob("configuration_*.py"), *home.glob("modeling_*.py")):
            if re.search(rf"^class {re.escape(name)}\b", file.read_text("utf-8"), re.M):
                module = self._modules.load(f"{self._package}.{file.stem}")
                if name in module.__all__:
                    return getattr(module, name)
        raise Undecided(f"{name} is not in {self._package}")


def _torch(modules: Installed) -> None:
    types_ = {name: shapes.Type() for name in TYPES.split()} | {"float32": shapes.FLOAT}
    sized = dict.fromkeys(["empty", "zeros", "ones", "rand", "randn"], functions.sized)
    tensors = "Tensor FloatTensor LongTensor IntTensor BoolTensor"
    each = "exp log sqrt sin cos tanh zeros_like ones_like empty_like full_like randn_like"
    modules.stand_in(
        "torch", **types_, **sized, **dict.fromkeys(each.split(), functions.like),
        **dict.fromkeys(tensors.split(), functions.AnyTensor), full=functions.full,
        arange=functions.arange, linspace=functions.linspace, tensor=functions.tensor,
        cat=functions.cat, concat=functions.cat, stack=functions.stack, chunk=functions.chunk,
        Size=shapes.Size, dtype=shapes.Type, device=shapes.Device, equal=lambda *_: False,
        get_default_dtype=lambda: shapes.FLOAT,
    )  # fmt: skip
    script = {"ScriptModule": type("ScriptModule", (), {}), "is_scripting": lambda: False}
    modules.stand_in("torch.jit", **script, is_tracing=lambda: False)
    for name in ("torch.autograd", "torch.autograd.function"):
        modules.stand_in(name, Function=_plain("Function"))
    modules.stand_in("torch._jit_internal", _copy_to_script_wrapper=_unchanged)
    modules.stand_in("torch.utils._python_dispatch", is_traceable_wrapper_subclass=lambda _: False)
    notes = [f"{name}_reproducibility_note" for name in ("forward", "backward", "cudnn")]
    modules.stand_in("torch._torch_docs", reproducibility_notes=dict.fromkeys(notes, ""))
    names = "prod lcm log log2 sqrt ceil floor"
    modules.stand_in("numpy", **{name: getattr(math, name) for name in names.split()})


def _layers(modules: Installed) -> None:
    """`torch.nn`: its layers from their own files."""
    listing = modules.file("torch.nn.modules.x").with_name("__init__.py").read_text("utf-8")
    homes = {
        alias.name: ("" if str(node.module).startswith("torch") else "torch.nn.modules.")
        + str(node.module)
        for node in ast.parse(listing).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def layer(name: str) -> Any:
        if name not in homes:
            return Unknown(f"torch.nn.{name}")
        return getattr(modules.load(homes[name]), name)

    weights: dict[str, Any] = {"Parameter": shapes.Parameter, "Buffer": shapes.Buffer}
    lazy = {f"Uninitialized{name}": type(name, (kind,), {}) for name, kind in weights.items()}
    modules.stand_in("torch.nn", layer, **weights)
    modules.stand_in("torch.nn.parameter", **weights, **lazy, is_lazy=lambda _: False)
    modules.stand_in("torch.nn.functional", pad=functions.pad)
    modules.stand_in("torch.nn.utils")
    modules.stand_in("torch.nn.modules")
    gain = {"_calculate_fan_in_and_fan_out": lambda _: (1, 1), "calculate_gain": lambda *_: 1.0}
    modules.stand_in("torch.nn.init", lambda _: functions.same, **gain)
    modules.after["torch.nn.modules.module"] = _watch


def _watch(module: Any) -> None:
    """Stops at an attribute that may be a module or a weight unknown to us, and at too many."""
    plain, steps = module.Module.__setattr__, itertools.count()

    def watched(self: Any, name: str, value: Any) -> None:
        if next(steps) > MOST_STEPS:
            raise Undecided("a model of very many parts")
        if isinstance(value, Unknown) and not isinstance(value, shapes.Value):
            raise Undecided(f"{type(self).__name__}.{name} is {value._path}")
        plain(self, name, value)

    module.Module.__setattr__ = watched


def _transformers(modules: Installed) -> None:
    root = modules.file("transformers").read_text("utf-8")
    version = re.search(r'^__version__ = "(.+)"', root, re.M)
    modules.stand_in("transformers", _automatic(modules), __version__=version and version[1])
    modules.stand_in("transformers.models.auto", _automatic(modules))
    decorators = dict.fromkeys(DECORATORS.split(), _unchanged)
    modules.stand_in(
        "transformers.utils", _available(modules), **decorators,
        PushToHubMixin=_plain("PushToHubMixin", push_to_hub=lambda _: None), copy_func=_copied,
        is_env_variable_true=lambda *_: True, torch_compilable_check=lambda *_, **__: None,
        CONFIG_NAME="config.json",
        TransformersKwargs=_plain("TransformersKwargs"),
    )  # fmt: skip
    modules.stand_in(
        "transformers.utils.logging", tqdm=lambda values, **_: values, WARNING=logging.WARNING,
        get_logger=lambda *_: _Silent(),
    )  # fmt: skip
    modules.stand_in(
        "transformers.utils.generic", **decorators, GeneralInterface=_Interface,
        is_timm_config_dict=lambda config: "pretrained_cfg" in config,
        is_flash_attention_requested=lambda *_, **__: False,
    )  # fmt: skip
    modules.stand_in(
        "transformers.utils.output_capturing", **decorators, _CAN_RECORD_REGISTRY={},
        maybe_install_capturing_hooks=lambda _: None, select_hidden_states=lambda *_: _unchanged,
    )  # fmt: skip
    flash = "transformers.modeling_flash_attention_utils"
    modules.stand_in(flash, is_flash_attn_available=lambda **_: False)
    modules.after["transformers.modeling_utils"] = _still
    plain = modules.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        full = f"{package}{name}" if name.startswith(".") else name
        found = re.fullmatch(r"transformers\.models\.((deprecated\.)?\w+)", full)
        return _Folder(modules, found[1]) if found else plain(full)

    modules.modules["importlib"].import_module = import_module


def _still(module: Any) -> None:
    """Keeps the base class from what needs weights, a device or generation."""
    kind = module.PreTrainedModel
    kind._check_and_adjust_attn_implementation = lambda self, how, **_: _attention(self, how)
    kind._check_and_adjust_experts_implementation = lambda *_: "eager"
    kind._from_config = classmethod(lambda cls, config, *_, **__: cls(config))
    kind.can_generate = kind.is_custom_code = classmethod(lambda _: False)
    module.get_torch_context_manager_or_global_device = lambda: shapes.Device("meta")
    for name in STILL.split():
        setattr(kind, name, lambda *_, **__: None)


class NoFusedAttentionError(Exception):
    """Fused attention was asked for and a model does not have it."""


def _attention(model: Any, how: str) -> str:
    if how == "sdpa" and not model._supports_sdpa:
        raise NoFusedAttentionError
    return how


def _integrations(modules: Installed) -> None:
    for name, mixin in MIXINS.items():
        modules.stand_in(f"transformers.{name}", **{mixin: _plain(mixin)})
    kernels = ("use_kernel_forward_from_hub", "use_kernelized_func", "use_kernel_func_from_hub")
    given: dict[str, Any] = {name: lambda *_, **__: _unchanged for name in kernels}
    given |= dict.fromkeys(("use_experts_implementation", "force_accelerate_hooks"), _unchanged)
    no = ("is_deepspeed_zero3_enabled", "is_fsdp_managed_module", "is_fsdp_enabled")
    given |= {name: lambda *_: False for name in no}
    given |= {"deepspeed_config": lambda: None, "get_device": lambda *_, **__: "cpu"}
    for name in ("", ".hub_kernels", ".deepspeed", ".fsdp", ".accelerate", ".moe"):
        modules.stand_in(f"transformers.integrations{name}", **given)
    modules.stand_in("transformers.distributed.utils", is_dtensor=lambda *_: False)
    same = {"_tied_params_are_equal": lambda *_: False}  # it decides on tying, not on what is there
    modules.stand_in("transformers.distributed.sharding_utils", **same)
    modules.stand_in("transformers.loss.loss_utils", LOSS_MAPPING={"nothing": None})


def _automatic(modules: Installed) -> Any:
    def get(name: str) -> Any:
        if re.match("AutoModel|AutoBackbone", name):
            return type(name, (), {"from_config": staticmethod(lambda *v, **n: real(name, v, n))})
        if "CONFIG" in name or name.endswith("Config"):
            return getattr(modules.load("transformers.models.auto.configuration_auto"), name)
        return Unknown(f"transformers.{name}")

    def real(name: str, values: Any, named: Any) -> Any:
        kind = getattr(modules.load("transformers.models.auto.modeling_auto"), name)
        return kind.from_config(*values, **named)

    return get


def _available(modules: Installed) -> Any:
    def get(name: str) -> Any:
        if re.fullmatch(r"is_\w+_available", name):
            return getattr(modules.load("transformers.utils.import_utils"), name)
        return Unknown(f"transformers.utils.{name}")

    return get


def _unchanged(value: Any = None, *_: Any, **__: Any) -> Any:
    """Decorates without a change, with arguments or without."""
    return value if is_code(value) else _unchanged


def _plain(name: str, **more: Any) -> type:
    given = {"__init_subclass__": classmethod(lambda _, **__: None), "apply": Unknown(name)}
    return type(name, (), given | more)


def _copied(f: Any) -> Any:
    return types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)


class _Silent:
    """A logger without listeners."""

    level = logging.CRITICAL

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class _Interface(dict[str, Any]):
    """Tables of functions that compute something."""

    def __missing__(self, key: str) -> Any:
        return shapes.Value(key)

    def get_interface(self, *_: Any) -> Any:
        """Returns some function."""
        return shapes.Value("a function")
