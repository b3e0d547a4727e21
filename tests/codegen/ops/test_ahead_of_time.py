"""Every kernel compiles for the GPUs we mean, keeps its registers and fits in shared memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from redpass.codegen.aot import AotReport, build
from redpass.codegen.ops import OPS
from redpass.codegen.ops.op import DTYPES, compiling_for
from redpass.codegen.ops.recorded import recorded

TARGETS = ("sm_80", "sm_90")
EVERY_PUSH = [
    (name, dtype, target, 0)
    for name in OPS
    for dtype, target in (
        (torch.float16, "sm_80"), (torch.bfloat16, "sm_90"), (torch.float32, "sm_90"),
    )
] + [
    (name, dtype, target, place)
    for name, place in (("clustered_attention", 3), ("latent_attention", 1))
    for dtype, target in ((torch.float16, "sm_80"), (torch.bfloat16, "sm_90"))
]  # fmt: skip
"""Each op, dtype and target at least once, decoding with clusters and keys that are normalised too;
all combinations and sizes are the slow test's."""

PRODUCTS = ("gated_feed_forward", "clustered_attention", "latent_attention")
"""Ops whose first sample is large enough for the tensor cores' wide products."""


def check(report: AotReport) -> None:
    assert report.fits, (report.kernel, report.registers, report.spills, report.shared)
    assert report.registers <= 255


@pytest.mark.parametrize(("name", "dtype", "target", "place"), EVERY_PUSH)
def test_default_configs(name, dtype, target, place, tmp_path) -> None:
    op = OPS[name]
    label, arguments = list(op.samples(dtype))[place]
    assert place == 0 or label.startswith("decode") or label.endswith("normed")
    reports = build(op, arguments, target, tmp_path)
    for report in reports:
        check(report)
    if target == "sm_90" and dtype == torch.bfloat16 and name in PRODUCTS and not place:
        assert "wgmma.mma_async" in reports[0].ptx
        assert "cp.async" in reports[0].ptx


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_all_samples(name, dtype, target, tmp_path) -> None:
    for _, arguments in OPS[name].samples(dtype):
        for report in build(OPS[name], arguments, target, tmp_path):
            check(report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streams_read_sixteen_bytes_at_once(dtype, tmp_path) -> None:
    _, arguments = next(iter(OPS["add_norm"].samples(dtype)))
    (report,) = build(OPS["add_norm"], arguments, "sm_90", tmp_path)
    assert "ld.global.v4" in report.ptx
    assert "st.global.v4" in report.ptx


@pytest.mark.parametrize("name", OPS)
def test_what_is_compiled_is_what_is_launched(name) -> None:
    """Samples are calls that the kernel takes; every argument of a kernel has its type."""
    op = OPS[name]
    for dtype in DTYPES:
        for _, arguments in op.samples(dtype):
            assert op.refuses(*arguments) == ""
            for target in (80, 90):
                with compiling_for(target):
                    configs = op.configs(*arguments)
                assert len(set(configs)) == len(configs)
                for config in configs:
                    for launch in recorded(op, config, *arguments):
                        assert set(launch.signature) == set(launch.kernel.arg_names)
                        assert all(0 < size <= 65535 for size in launch.grid[1:])


def test_launches_are_specialised_as_triton_does(tmp_path) -> None:
    op = OPS["add_norm"]
    x = torch.empty(3, 5, 32, device="meta")
    (launch,) = recorded(op, op.configs(x)[0], x, x, None, None, 1e-5, "rms")
    assert launch.signature["x"] == "*fp32"
    assert launch.signature["rows"] == "i32"
    assert launch.signature["eps"] == "fp32"
    assert launch.constants["weight"] is None
    assert launch.constants["LAYER"] is False
    assert "width" in launch.aligned
    assert "rows" not in launch.aligned


def test_distances_of_over_two_thousand_million_are_wide(tmp_path) -> None:
    op = OPS["add_norm"]
    far = torch.empty(1, dtype=torch.float16, device="meta").as_strided((2, 32), (2**31, 1))
    near = torch.empty(2, 32, dtype=torch.float16, device="meta")
    (launch,) = recorded(op, op.configs(far)[0], far, near, None, None, 1e-5, "rms")
    assert launch.signature["x_row"] == "i64"
    assert launch.signature["residual_row"] == "i32"
