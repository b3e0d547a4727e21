"""Results written back as Hugging Face folders: what plain transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import redpass
from redpass import rewrite
from redpass.analysis import structure
from redpass.data import Batches
from redpass.errors import ExportError
from redpass.export import to_huggingface
from redpass.export.layouts import fit, shorter_lists
from redpass.export.narrower import narrower
from redpass.facts import Facts
from redpass.lineage import extend
from redpass.passes.drop_layers import DropLayers
from redpass.passes.prune_channels import PruneChannels
from redpass.passes.prune_heads import PruneHeads
from redpass.passes.refit_projections import RefitProjections
from redpass.passes.shrink_heads import ShrinkHeads
from redpass.plan import Action, DropState, Replace, SetArgument, SetWeight, WeightRef
from redpass.program import Lineage, Program
from redpass.runtime.causal_lm import CausalLM

transformers = pytest.importorskip("transformers")

SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SIZE, "vocab_size": 61, "intermediate_size": 48, "max_position_embeddings": 64}
GPT2 = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 61, "n_positions": 64}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
IMAGE = {**SIZE, "intermediate_size": 48, "image_size": 16, "patch_size": 4, "num_channels": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**TEXT, **ENDS, "num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", {**GPT2, **ENDS}),
    "qwen3": (
        "Qwen3ForCausalLM",
        {**TEXT, **ENDS, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**TEXT, **ENDS, "num_key_value_heads": 2, "num_local_experts": 2},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {**TEXT, **ENDS}),
    "bert": ("BertModel", TEXT),
    "vit": ("ViTForImageClassification", IMAGE),
}
TALKERS = ("llama", "gpt2", "qwen3", "mixtral", "gpt_neox")

Load = Callable[[str], Program]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Loads a small model from a folder that plain transformers wrote; each once."""
    loaded: dict[str, Program] = {}

    def get(name: str) -> Program:
        if name not in loaded:
            folder = tmp_path_factory.mktemp(name)
            kind, settings = MODELS[name]
            torch.manual_seed(0)
            model_class = getattr(transformers, kind)
            model_class(model_class.config_class(**settings)).eval().save_pretrained(folder)
            (folder / "tokenizer.json").write_text("{}")
            (folder / "code.py").write_text("raise SystemExit")
            loaded[name] = redpass.load(folder)
        return loaded[name]

    return get


def changed(program: Program, *actions: Action) -> Program:
    """The program after approximate actions, as the engine leaves it."""
    after = rewrite.apply(program, actions)
    return replace(after, lineage=Lineage(program, after))


def without_layer(program: Program, number: int) -> Action:
    """Lets what follows a layer read what went into it; its cache goes too."""
    branches = [b for b in Facts(program).get(structure).branches if b.layer == number]
    edits = [Replace(branches[-1].after, branches[0].entry)]
    edits += [DropState(*pair) for branch in branches for pair in branch.state]
    return Action("test.drop", f"layers.{number}", tuple(edits), "a test drops it")


def without_attention(program: Program, number: int) -> Action:
    branches = Facts(program).get(structure).branches
    branch = next(b for b in branches if b.layer == number and b.kind == "attention")
    edits = (Replace(branch.join, branch.other), *(DropState(*pair) for pair in branch.state))
    return Action("test.drop", branch.label, edits, "a test drops it")


def opened(folder: Path, name: str) -> Any:
    kind = getattr(transformers, MODELS[name][0])
    return kind.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_a_layer_is_one_that_transformers_loads(
    load: Load, name: str, tmp_path: Path
) -> None:
    program = load(name)
    short = changed(program, without_layer(program, 1))
    report = to_huggingface(short, tmp_path / "hf")
    assert max(report.worst.values()) <= 1
    assert report.notes[0].endswith("parameters fewer than the source")
    model, old = opened(tmp_path / "hf", name), opened(Path(program.origin.path), name)
    assert model.config.num_hidden_layers == 2
    # The last layer, renumbered, is bit for bit what it was.
    last = [n for n, _ in model.named_parameters() if ".1." in n]
    assert len(last) > 5
    for parameter in last:
        before = old.get_parameter(parameter.replace(".1.", ".2.", 1))
        assert torch.equal(model.get_parameter(parameter), before)
    if name in TALKERS:
        ids = torch.arange(1, 13).view(2, 6)
        wanted = CausalLM(short).generate(ids, 5)
        found = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_layer_that_lost_a_part_is_told(load: Load, name: str, tmp_path: Path) -> None:
    program = load(name)
    short = changed(program, without_attention(program, 1))
    expected = r"layer\w*\.1: lost only a part \(.*attention|layer\w*\.1: lost only a part \(.*attn"
    with pytest.raises(ExportError, match=expected):
        to_huggingface(short, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_new_values_of_a_weight_are_written(load: Load, tmp_path: Path) -> None:
    program = load("gpt2")
    target = "transformer.h.1.mlp.c_proj.weight"
    reader = next(n.name for n in program.weight_nodes if n.target == target)
    node = next(iter(program.nodes[reader].users)).name
    new = program.weights[target] * 1.5
    edits = (SetWeight("refitted", new), SetArgument(node, reader, WeightRef("refitted")))
    short = changed(program, Action("test.refit", "layers.1", edits, "a test changes it"))
    to_huggingface(short, tmp_path / "hf")
    model = opened(tmp_path / "hf", "gpt2")
    assert torch.equal(model.get_parameter(target), new)


def test_a_shared_layer_is_written_once_for_each_place(load: Load, tmp_path: Path) -> None:
    program = load("vit")
    readers = {str(n.target): n for n in program.weight_nodes}
    mine = {t: t.replace("layer.2.", "layer.1.").replace("layers.2.", "layers.1.") for t in readers}
    edits = tuple(
        Replace(readers[name].name, WeightRef(other))
        for name, other in mine.items()
        if name != other
    )
    shared = changed(program, Action("test.share", "layers.2", edits, "a test shares it"))
    to_huggingface(shared, tmp_path / "hf")
    model = opened(tmp_path / "hf", "vit")
    parameters = dict(model.named_parameters())
    pairs = [(n, n.replace(".2.", ".1.", 1)) for n in parameters if ".2." in n]
    assert len(pairs) > 10
    assert all(torch.equal(parameters[one], parameters[other]) for one, other in pairs)


def test_refitted_projections_of_a_shorter_model_are_written(load: Load, tmp_path: Path) -> None:
    program = load("vit")
    generator = torch.Generator().manual_seed(0)
    data = Batches(
        tuple({"pixel_values": torch.randn(8, 1, 16, 16, generator=generator)} for _ in range(8))
    )
    drop = DropLayers(only=("layers.1",)).plan(program, Facts(program)).actions
    short = rewrite.apply(program, drop)
    short = replace(short, lineage=extend(program, program, drop))
    refit = RefitProjections().plan(short, Facts(short, data)).actions
    assert refit
    again = rewrite.apply(short, refit)
    to_huggingface(replace(again, lineage=extend(short, program, refit)), tmp_path / "hf")
    model, old = opened(tmp_path / "hf", "vit"), opened(Path(program.origin.path), "vit")
    assert model.config.num_hidden_layers == 2
    changed_now = [
        name
        for name, value in model.named_parameters()
        if not torch.equal(value, old.get_parameter(name.replace(".1.", ".2.", 1)))
    ]
    assert changed_now
    assert all(name.split(".")[-2] in ("o_proj", "fc2", "dense") for name in changed_now)


def test_what_lies_beside_the_weights_is_copied_and_code_is_not(load: Load, tmp_path: Path) -> None:
    report = to_huggingface(load("llama"), tmp_path / "hf")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert report.notes == ()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_computation_that_no_module_has_is_told(load: Load, tmp_path: Path) -> None:
    from redpass.plan import Insert, Ref

    program = load("vit")
    branch = Facts(program).get(structure).branches[-1]
    edits = (
        Insert("doubled", torch.ops.aten.mul.Tensor, (Ref(branch.exit), 2.0), branch.join),
        SetArgument(branch.join, branch.exit, "doubled"),
    )
    new = changed(program, Action("test.double", branch.label, edits, "a test doubles it"))
    with pytest.raises(ExportError, match="doubled: is computed by the result and by no module"):
        to_huggingface(new, tmp_path / "hf")


def test_a_folder_that_would_give_other_results_is_refused(load: Load, tmp_path: Path) -> None:
    program = load("vit")
    weights = {k: v * 1.01 if "head" in k or "classifier" in k else v
               for k, v in program.weights.items()}  # fmt: skip
    with pytest.raises(ExportError, match="gives other results than the program"):
        to_huggingface(replace(program, weights=weights), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_model_of_no_folder_has_no_such_form(residual: Program, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="came from a module, not from a Hugging Face folder"):
        to_huggingface(residual, tmp_path / "hf")


def test_an_action_that_the_source_cannot_repeat_is_told(load: Load, tmp_path: Path) -> None:
    program = replace(load("vit"), lineage=Lineage(load("vit"), None, "add_7: no such node"))
    with pytest.raises(ExportError, match=r"cannot be repeated on the model as it was .*add_7"):
        to_huggingface(program, tmp_path / "hf")


def built(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A library of one model: stages of blocks, some of which have no attention."""
    shapes = {"head.weight": (3, 3)}
    skips = config.get("per_layer_config") or {}
    if config["width"] % 2 or len(config["block_types"]) != config["depths"][0]:
        raise ValueError("nonsense")
    for stage, depth in enumerate(config["depths"]):
        for block in range(depth):
            name = f"stages.{stage}.blocks.{block}"
            left_out = skips.get(str(block), {}).get("skip", []) if stage == 0 else []
            shapes |= {f"{name}.{p}.weight": (2, 2) for p in ("attention", "mlp")
                       if p not in left_out}  # fmt: skip
    return shapes


CONFIG = {"width": 4, "block_types": ["a", "b", "a", "b"], "depths": [4, 2], "eos": [1, 2, 3, 0]}


def test_the_number_that_counts_the_modules_is_found_by_trying() -> None:
    shapes = built(CONFIG)
    gone = frozenset(n for n in shapes if n.startswith("stages.1.blocks.0."))
    layout = fit(CONFIG, shapes, gone, built)
    assert layout.config == CONFIG | {"depths": [4, 1]}
    assert layout.names["stages.1.blocks.1.mlp.weight"] == "stages.1.blocks.0.mlp.weight"
    assert not any(name in layout.names for name in gone)


def test_no_number_that_counts_is_told() -> None:
    shapes = built(CONFIG)
    gone = frozenset(n for n in shapes if n.startswith("stages.0.blocks.1."))
    # Four types are demanded for the first stage, and nothing in reach of its depth cuts them.
    with pytest.raises(ExportError, match="no number of the configuration says how many"):
        fit(CONFIG, shapes, gone, built)


def test_a_part_is_left_out_where_the_library_can_say_it() -> None:
    shapes = built(CONFIG)

    def one_stage(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {k.replace("stages.0.", ""): v for k, v in shapes.items() if "stages.1." not in k}

    def build(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return one_stage(built(config))

    flat, gone = one_stage(shapes), frozenset({"blocks.2.mlp.weight"})
    layout = fit(CONFIG, flat, gone, build)
    assert layout.config["per_layer_config"] == {"2": {"skip": ["mlp"]}}
    assert set(layout.names) == flat.keys() - gone


def test_lists_in_a_module_that_goes_are_not_counted() -> None:
    names = [f"layers.{i}.experts.{j}.weight" for i in range(3) for j in range(2)]
    shapes = dict.fromkeys(names, (1,))
    lists = shorter_lists(shapes, frozenset(n for n in names if n.startswith("layers.1.")))
    assert [(item.prefix, item.kept) for item in lists] == [("layers", (0, 2))]


def random_tokens(batches: int = 4) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return Batches(
        tuple(
            {"input_ids": torch.randint(61, (4, 12), generator=generator)} for _ in range(batches)
        )
    )


def narrowed(program: Program, **options: Any) -> Program:
    """The program with all feed-forwards cut to two thirds, by `prune_channels`."""
    facts = Facts(program, random_tokens())
    plan = PruneChannels(shares=(0.67,), kinds=("feed-forward", "experts"), **options).plan(
        program, facts
    )
    assert plan.actions
    after = rewrite.apply(program, plan.actions)
    return replace(after, lineage=extend(program, program, plan.actions))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_neox", "bert", "mixtral"])
def test_narrower_feed_forwards_are_a_number_of_the_configuration(
    load: Load, name: str, tmp_path: Path
) -> None:
    program = load(name)
    report = to_huggingface(narrowed(program, together=True), tmp_path / "hf")
    assert max(report.worst.values()) <= 1
    model, old = opened(tmp_path / "hf", name), opened(Path(program.origin.path), name)
    config, before = model.config, old.config
    if name == "gpt2":
        assert (config.n_inner, before.n_inner) == (88, None)
    else:
        assert (config.intermediate_size, before.intermediate_size) == (32, 48)
    less = sum(p.numel() for p in model.parameters())
    assert less < sum(p.numel() for p in old.parameters())
    if name in TALKERS:
        ids = torch.arange(1, 13).view(2, 6)
        made = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert made.shape == (2, 10)


def test_layers_of_different_widths_are_told(load: Load, tmp_path: Path) -> None:
    program = load("llama")
    options = {"only": ("layers.0.feed-forward@32", "layers.1.feed-forward@40")}
    with pytest.raises(
        ExportError, match=r"(?s)different shapes in 3 layers.*together=True"
    ) as error:
        to_huggingface(narrowed(program, **options), tmp_path / "hf")
    assert "down_proj" in str(error.value)
    assert not (tmp_path / "hf").exists()


def test_numbers_that_say_sizes_are_found_by_trying() -> None:
    def build(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        heads, groups = config["heads"], config["parts"]["kv_heads"]
        if heads % groups:
            raise ValueError("heads do not divide")
        inner = config["inner"] or 4 * config["size"]
        return {
            "0.q": (heads * config["head_dim"], config["size"]),
            "0.k": (groups * config["head_dim"], config["size"]),
            "0.up": (inner, config["size"]),
        }

    config = {"size": 16, "heads": 8, "head_dim": 4, "inner": None, "parts": {"kv_heads": 4}}
    wanted = {"0.q": (16, 16), "0.k": (8, 16), "0.up": (40, 16)}
    found = narrower(config, wanted, build)
    assert found == {**config, "heads": 4, "inner": 40, "parts": {"kv_heads": 2}}
    with pytest.raises(ExportError, match=r"no number .* \[16, 15\] in place of \[16, 16\]"):
        narrower(config, {"0.q": (32, 16), "0.k": (16, 15)}, build)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_fewer_heads_in_one_fused_projection_are_refused(
    load: Load, name: str, tmp_path: Path
) -> None:
    """Side by side or head by head: a configuration has no word for them."""
    program = load(name)
    facts = Facts(program, random_tokens(2))
    for pass_, target in (
        (PruneHeads(shares=(0.5,)), "@2"),
        (ShrinkHeads(shares=(0.5,), multiple=1), "values@4"),
    ):
        plan = pass_.plan(program, facts.restrict(tuple(pass_.needs)))
        actions = [a for a in plan.actions if a.target.endswith(target)]
        assert len(actions) == 3
        after = rewrite.apply(program, actions)
        after = replace(after, lineage=extend(program, program, actions))
        with pytest.raises(ExportError, match=r"(?s)no module of the source.*model.pt2"):
            to_huggingface(after, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
