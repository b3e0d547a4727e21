"""The passes, in the order the pipeline runs them. Adding one: a file, and a line here."""

from collections.abc import Sequence

from redpass.passes.cache_latents import CacheLatents
from redpass.passes.cluster_heads import ClusterHeads
from redpass.passes.drop_branches import DropBranches
from redpass.passes.drop_constant_channels import DropConstantChannels
from redpass.passes.drop_dead_nodes import DropDeadNodes
from redpass.passes.drop_identity_gathers import DropIdentityGathers
from redpass.passes.drop_key_channels import DropKeyChannels
from redpass.passes.drop_layers import DropLayers
from redpass.passes.drop_neutral_operands import DropNeutralOperands
from redpass.passes.drop_noops import DropNoops
from redpass.passes.drop_span import DropSpan
from redpass.passes.factor_linears import FactorLinears
from redpass.passes.fold_batch_norms import FoldBatchNorms
from redpass.passes.fold_constants import FoldConstants
from redpass.passes.fold_linear_chains import FoldLinearChains
from redpass.passes.fold_norm_gains import FoldNormGains
from redpass.passes.fuse_activations import FuseActivations
from redpass.passes.fuse_norms import FuseNorms
from redpass.passes.map_stream import MapStream
from redpass.passes.merge_equal_neurons import MergeEqualNeurons
from redpass.passes.merge_equal_nodes import MergeEqualNodes
from redpass.passes.merge_equal_sizes import MergeEqualSizes
from redpass.passes.merge_key_value_heads import MergeKeyValueHeads
from redpass.passes.merge_linears import MergeLinears
from redpass.passes.prune_channels import PruneChannels
from redpass.passes.prune_heads import PruneHeads
from redpass.passes.refit_projections import RefitProjections
from redpass.passes.reuse_layers import ReuseLayers
from redpass.passes.share_layers import ShareLayers
from redpass.passes.share_repeated_heads import ShareRepeatedHeads
from redpass.passes.shorten_chains import ShortenChains
from redpass.passes.shrink_heads import ShrinkHeads
from redpass.passes.slice_stream import SliceStream
from redpass.passes.tie_equal_weights import TieEqualWeights
from redpass.plan import Pass

CLEANUP: tuple[type[Pass], ...] = (
    DropNoops,
    DropNeutralOperands,
    ShortenChains,
    DropIdentityGathers,
    MergeEqualSizes,
    FoldConstants,
    MergeEqualNodes,
    TieEqualWeights,
    DropDeadNodes,
)
"""Exact, and keeps the structure readable: first and last."""

REDUCE: tuple[type[Pass], ...] = (DropBranches, PruneChannels, RefitProjections)
"""Approximate: they run under a budget, or when asked for by name."""

REDUCE_ALIKE: tuple[Pass, ...] = (
    DropLayers(),
    PruneChannels(kinds=("feed-forward", "experts"), together=True),
    RefitProjections(),
)
"""In place of those, where the configuration of a library has to say the result: whole layers go,
and widths are cut alike in all layers."""

ON_REQUEST: tuple[type[Pass], ...] = (
    DropLayers,
    DropSpan,
    ShareLayers,
    ReuseLayers,
    FactorLinears,
    ShrinkHeads,
    MapStream,
    ClusterHeads,
    PruneHeads,
    MergeKeyValueHeads,
    CacheLatents,
    DropKeyChannels,
    SliceStream,
)
"""Approximate: they run when asked for by name."""

FUSE: tuple[type[Pass], ...] = (
    FoldBatchNorms,
    DropConstantChannels,
    MergeEqualNeurons,
    FoldLinearChains,
    FuseNorms,
    FuseActivations,
    FoldNormGains,
    MergeLinears,
    ShareRepeatedHeads,
)
"""Exact, and hides structure (merged projections, folded gains): after everything else."""

PASSES: dict[str, type[Pass]] = {
    kind.name: kind for kind in (*CLEANUP, *REDUCE, *ON_REQUEST, *FUSE)
}
"""Every pass by the name users type."""


def default_pipeline(approximate: bool, reduce: Sequence[Pass] = ()) -> tuple[Pass, ...]:
    """Returns the passes of a run in order; with `approximate` those that need a budget too.

    Args:
        reduce: approximate passes to run in place of `REDUCE`.
    """
    middle = tuple(reduce or (kind() for kind in REDUCE)) if approximate else ()
    first, last = (tuple(kind() for kind in group) for group in (CLEANUP, (*FUSE, *CLEANUP)))
    return (*first, *middle, *last)
