"""`.pt` and `.pt2`: what loads, what is refused, and that nothing in a file runs."""

import importlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from redpass.checks import pt2_model
from redpass.errors import LoadError, UsageError
from redpass.frontend import NaNWeightsWarning, load

SPEC = ["input:float32[batch,4]"]


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, input):
        return self.inner(input) * 2


def build_mine():
    torch.manual_seed(0)
    return Mine()


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()


class Canary:
    """Leaves a file behind when it is unpickled by a plain unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def test_the_canary_sings(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "sung")))
    assert (tmp_path / "sung").exists()


def test_a_pickled_module_of_pytorchs_own_layers(tmp_path):
    module, x = plain(), torch.randn(3, 4)
    torch.save(module, tmp_path / "m.pt")
    program = load(tmp_path / "m.pt", inputs=SPEC)
    assert program.origin.kind == "pt"
    assert torch.equal(program(x)[0], module(x))


def test_nan_in_a_pickled_weight_warns_with_its_name(tmp_path):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        module[1].weight[0, 1] = float("nan")
    torch.save(module, tmp_path / "m.pt")
    with pytest.warns(NaNWeightsWarning) as caught:
        load(tmp_path / "m.pt", inputs=["input:float32[batch,4]"])
    assert [str(each.message) for each in caught] == ["weight '1.weight' holds NaN or infinity"]


def test_a_pickled_module_needs_inputs(tmp_path):
    torch.save(plain(), tmp_path / "m.pth")
    with pytest.raises(UsageError, match=r"m\.pth(.|\n)*name:dtype\[sizes\]"):
        load(tmp_path / "m.pth")


def test_a_users_class_is_refused_by_name_and_allowed_by_name(tmp_path):
    module, x, name = build_mine(), torch.randn(3, 4), f"{Mine.__module__}.Mine"
    torch.save(module, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=f"asks for '{name}'(.|\n)*--allow {name}"):
        load(tmp_path / "m.pt", inputs=SPEC)
    program = load(tmp_path / "m.pt", inputs=SPEC, allow=(name,))
    assert torch.equal(program(x)[0], module(x))


def test_an_allowed_name_must_be_a_class(tmp_path, canary):
    torch.save([Canary(canary)], tmp_path / "m.pt")
    name = f"{os.mkdir.__module__}.mkdir"
    with pytest.raises(UsageError, match="is no class"):
        load(tmp_path / "m.pt", inputs=SPEC, allow=(name,))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_malicious_pickle_does_not_run(tmp_path, canary, protocol):
    torch.save(
        {"w": torch.ones(2), "x": Canary(canary)}, tmp_path / "m.pt", pickle_protocol=protocol
    )
    with pytest.raises(LoadError):
        load(tmp_path / "m.pt", inputs=SPEC)


def test_a_bare_pickle_is_not_read(tmp_path, canary):
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(LoadError, match="no zip archive"):
        load(tmp_path / "m.pt", inputs=SPEC)


def test_trust_is_the_only_way_round(tmp_path):
    module, x = build_mine(), torch.randn(3, 4)
    torch.save(module, tmp_path / "m.pt")
    assert torch.equal(load(tmp_path / "m.pt", inputs=SPEC, trust_file=True)(x)[0], module(x))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_weights_alone_need_the_module(tmp_path, wrap):
    module, x = build_mine(), torch.randn(3, 4)
    torch.save(wrap(module.state_dict()), tmp_path / "m.pt")
    with pytest.raises(
        LoadError, match=r"2 weights and no module(.|\n)*module='package\.module:function'"
    ):
        load(tmp_path / "m.pt", inputs=SPEC)
    program = load(tmp_path / "m.pt", inputs=SPEC, module=f"{__name__}:build_mine")
    assert torch.equal(program(x)[0], module(x))


def test_weights_that_do_not_fit_are_named(tmp_path):
    torch.save({"inner.weight": torch.ones(4, 4), "other": torch.ones(1)}, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"missing \['inner.bias'\], unexpected \['other'\]"):
        load(tmp_path / "m.pt", inputs=SPEC, module=f"{__name__}:build_mine")


def test_a_factory_that_is_not_there(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "m.pt")
    with pytest.raises(UsageError, match="'nowhere:make' cannot be imported"):
        load(tmp_path / "m.pt", inputs=SPEC, module="nowhere:make")


def test_damaged_archives(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(plain(), path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(LoadError, match="truncated"):
        load(path, inputs=SPEC)
    spot = data.index(plain()[0].weight.detach().numpy().tobytes()[:16])
    path.write_bytes(data[:spot] + bytes([data[spot] ^ 1]) + data[spot + 1 :])
    with pytest.raises(LoadError, match="checksum"):
        load(path, inputs=SPEC)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/x", "a/x"], "occurs twice"),
        (["a/../x"], "leaves the archive"),
        (["/x"], "leaves the archive"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_with_names_no_writer_makes(tmp_path, names, message):
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"1")
    with pytest.raises(LoadError, match=message):
        load(path)


def test_a_zip_bomb(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\0" * (1 << 24))
    with pytest.raises(LoadError, match="claims 16777216"):
        load(tmp_path / "m.pt", inputs=SPEC)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "m.pt2"
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(plain(), (torch.randn(3, 4),), dynamic_shapes=({0: auto},))
    torch.export.save(exported, path)
    return path


def rewrite(source, target, change):
    """Copies an archive with members changed: `change(name, data)` gives data, or None to drop."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


def edit_model(source, target, change):
    def member(name, data):
        if not name.endswith("models/model.json"):
            return data
        model = json.loads(data)
        change(model)
        return json.dumps(model).encode()

    return rewrite(source, target, member)


def test_an_exported_program(saved):
    program, x = load(saved), torch.randn(5, 4)
    assert program.origin.kind == "pt2"
    assert [str(p) for p in program.signature.inputs] == ["input:float32[batch,4]"]
    assert (program(x)[0] - plain()(x)).abs().max() <= 1e-6


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_sample_inputs_are_not_even_read(saved, tmp_path, canary):
    evil = pickled(Canary(canary))
    path = rewrite(saved, tmp_path / "e.pt2", lambda n, d: evil if "sample_inputs" in n else d)
    assert load(path).signature.outputs


def test_pickled_weights_are_refused(saved, tmp_path, canary):
    evil = pickled(Canary(canary))

    def change(name, data):
        if name.endswith("weights/weight_0"):
            return evil
        if not name.endswith("weights_config.json"):
            return data
        config = json.loads(data)
        for entry in config["config"].values():
            entry["use_pickle"] = True
        return json.dumps(config).encode()

    with pytest.raises(LoadError, match="pickled or foreign weight"):
        load(rewrite(saved, tmp_path / "e.pt2", change))


@pytest.mark.parametrize(
    "member", ["data/weights/model.pt", "data/constants/custom_obj_0", "extra/run.so"]
)
def test_foreign_members_are_refused(saved, tmp_path, canary, member):
    path = rewrite(saved, tmp_path / "e.pt2", lambda n, d: d)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"m/{member}", pickle.dumps(Canary(canary)))
    with pytest.raises(LoadError, match="a member that no plain export has"):
        load(path)


@pytest.mark.parametrize(
    "target",
    ["torch.load", "torch.hub.load", "_operator.methodcaller", "torch.ops.aten.from_file.default",
     "torch.ops.load_library", "#evil:op", "math.os", "torch.ops.higher_order.cond"],
)  # fmt: skip
def test_operators_off_the_list_are_refused(saved, tmp_path, target):
    def change(model):
        model["graph_module"]["graph"]["nodes"][0]["target"] = target

    with pytest.raises(LoadError, match="is not allowed"):
        load(edit_model(saved, tmp_path / "e.pt2", change))


def test_an_expression_that_is_code_does_not_run(saved, tmp_path, canary):
    code = f"__import__('os').mkdir({str(canary)!r})"

    def change(model):
        sizes = model["graph_module"]["graph"]["tensor_values"]["input"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = code

    with pytest.raises(LoadError, match="no size expression"):
        load(edit_model(saved, tmp_path / "e.pt2", change))


def test_guards_that_are_code_do_not_run(saved, tmp_path, canary):
    code = f"__import__('os').mkdir({str(canary)!r})"
    path = edit_model(saved, tmp_path / "e.pt2", lambda m: m.update(guards_code=[code]))
    load(path)(torch.randn(2, 4))


def test_a_tree_spec_that_imports_is_refused(saved, tmp_path):
    def change(model):
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = '[1, {"type": "evil.Type", "context": "{}", "children_spec": []}]'

    with pytest.raises(LoadError, match="tree spec"):
        load(edit_model(saved, tmp_path / "e.pt2", change))


def test_deep_and_broken_json(saved, tmp_path):
    deep = rewrite(saved, tmp_path / "d.pt2", lambda n, d: b"[" * 100_000 if "models/" in n else d)
    with pytest.raises(LoadError, match="not JSON"):
        load(deep)
    bad = rewrite(saved, tmp_path / "b.pt2", lambda n, d: d[:-9] if "models/" in n else d)
    with pytest.raises(LoadError, match="not JSON"):
        load(bad)


def test_missing_and_short_weights(saved, tmp_path):
    gone = rewrite(saved, tmp_path / "g.pt2", lambda n, d: None if n.endswith("weight_0") else d)
    with pytest.raises(LoadError, match=r"\(data/weights/weight_0\) are missing"):
        load(gone)
    short = rewrite(saved, tmp_path / "s.pt2", lambda n, d: d[:8] if n.endswith("weight_0") else d)
    with pytest.raises(LoadError, match="are 8, its shape takes 128"):
        load(short)


@pytest.mark.parametrize(
    "text",
    ["Symbol('s0', positive=True, integer=True)", "Add(Symbol('s1'), Integer(2))", "s0 + 1",
     "-s3*4",
     "FloorDiv(Mul(Integer(3), Symbol('s77', integer=True)), Integer(2))",
     "Pow(Symbol('s1'), Integer(2))"],
)  # fmt: skip
def test_size_expressions(text):
    assert pt2_model.is_safe_expression(text)


@pytest.mark.parametrize(
    "text",
    ["().__class__", "open('x')", "Symbol('a').x", "lambda: 1", "[1]", "s0[0]", "'a'*9", "9**9**9",
     "Pow(Integer(9), Pow(Integer(9), Integer(9)))", "Symbol(open('x'))", "__import__('os')",
     "f'{s0}'",
     "Symbol('__class__ x')", "Add(*[1])", "eval(s0)", 5, "(" * 300 + ")" * 300],
)  # fmt: skip
def test_what_is_no_size_expression(text):
    assert not pt2_model.is_safe_expression(text)


def test_a_pickle_of_a_later_protocol_says_how_to_save_it_again(tmp_path):
    torch.save(plain(), tmp_path / "m.pt", pickle_protocol=4)
    with pytest.raises(LoadError, match=r"STACK_GLOBAL[^\n]*\n  save it again with torch\.save"):
        load(tmp_path / "m.pt", inputs=SPEC)


def test_the_size_functions_a_file_may_name_are_those_of_the_ops_table():
    from redpass.ops import SIZE_FUNCTIONS

    homes = {"math", "_operator", "torch"}
    found = {
        f"{home}.{function.__name__}"
        for function in SIZE_FUNCTIONS
        for home in homes
        if getattr(importlib.import_module(home), function.__name__, None) is function
    }
    assert {t.replace("torch.sym_", "torch.") for t in pt2_model.SIZE_TARGETS} - {
        "_operator.getitem"
    } == {t.replace("torch.sym_", "torch.") for t in found}


@pytest.mark.parametrize(
    "damage",
    [{"device": {"type": ["cpu"], "index": None}}, {"device": {"type": {}, "index": 0}},
     {"in_spec": "5"}, {"in_spec": "[1]"}, {"in_spec": '{"1": 2}'}, {"in_spec": "[1, 5]"},
     {"in_spec": '[1, {"type": ["builtins.list"]}]'}, {"out_spec": '[1, {"children_spec": 5}]'},
     {"out_spec": '[1, {"children_spec": [[]]}]'}, {"out_spec": '[1, {"context": 5}]'}],
)  # fmt: skip
def test_values_of_a_wrong_kind_are_refused_with_file_and_place(damage, tmp_path):
    with pytest.raises(LoadError, match=r"models/model\.json"):
        pt2_model.check_model({"graph": [damage]}, tmp_path / "m.pt2", "models/model.json")
