"""Models with one redundancy planted by code, some with a trap that must be left alone.

case = planted.build("zero_branches_llama")
case.findings    # what must be found, and where
case.exactness   # how close the output must stay; `tolerance(case)` gives the figure
case.reduced     # the same function without the redundancy, as a proof
"""

from collections.abc import Callable

from testbed.errors import TestbedError
from testbed.planted import algebra, attention, branches, experts, neurons
from testbed.planted.record import Finding, Planted, in_double, output, tolerance

__all__ = ["Finding", "Planted", "build", "in_double", "names", "output", "tolerance"]

_BUILDERS: tuple[Callable[[], Planted], ...] = (
    attention.equal_heads,
    attention.equal_heads_gpt2,
    attention.equal_key_groups,
    neurons.rescaled_neurons_relu,
    neurons.duplicated_neurons_gelu,
    neurons.constant_channels,
    neurons.constant_channels_padded,
    branches.zero_branches_llama,
    branches.zero_branches_gpt2,
    branches.zero_branches_bert,
    branches.equal_layers,
    branches.tied_weights,
    branches.tied_transposed,
    algebra.rank_deficient,
    algebra.duplicated_subgraph,
    algebra.batchnorm_after_conv,
    algebra.linear_into_linear,
    algebra.norm_gain_before_linear,
    algebra.norm_bias_before_linear,
    experts.permuted_experts,
)


def names() -> tuple[str, ...]:
    """Names that `build` knows, each the name of the function that makes it."""
    return tuple(builder.__name__ for builder in _BUILDERS)


def build(name: str) -> Planted:
    """A fresh planted model. Raises `TestbedError` for an unknown name."""
    for builder in _BUILDERS:
        if builder.__name__ == name:
            return builder()
    raise TestbedError(f"no planted model {name!r}; there are {', '.join(names())}")
