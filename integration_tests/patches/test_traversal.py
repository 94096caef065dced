"""Walks over a fused model yield what torch's yield, whatever the tree looks like."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lorafuse import FuseConfig, fuse
from lorafuse.patches.traversal import TRAIN, WALKS, FlatTraversal, flatten_traversal
from lorafuse.plugin.errors import FuseConfigError, FuseError

ALL = (*WALKS, *TRAIN)
NAMES = {"named_modules", "named_parameters", "parameters", "train", "num_parameters"}


class Renamed(nn.Module):
    """Its walks have their own idea of names."""

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield name.upper(), module


class AlwaysEvaluating(nn.Module):
    def train(self, mode=True):
        return super().train(False)


KINDS = (nn.Module, nn.Module, nn.Module, Renamed, AlwaysEvaluating)


def flatten(module):
    FlatTraversal(module).replace(module, ALL)
    assert NAMES - {"num_parameters"} <= module.__dict__.keys()


@st.composite
def trees(draw):
    """A module with some below it, some of them in several places, with shared parameters."""
    modules = []
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    for _ in range(draw(st.integers(1, 8))):
        module = draw(st.sampled_from(KINDS))()
        module.training = draw(st.booleans())
        for i in draw(st.lists(st.integers(0, 3), max_size=2)):
            module.register_parameter(f"p{i}", parameters[i])
        module.register_parameter("none", None)
        for i, child in enumerate(draw(st.lists(st.sampled_from([None, *modules]), max_size=3))):
            module.add_module(str(i), child)
        modules.append(module)
    return modules[-1]


def walked(root):
    return {
        "modules": [
            list(root.named_modules(prefix=prefix, remove_duplicate=once))
            for prefix in ("", "above")
            for once in (True, False)
        ],
        "parameters": [
            list(root.named_parameters(prefix, recurse, once))
            for prefix in ("", "above")
            for recurse in (True, False)
            for once in (True, False)
        ],
        "unnamed": [list(root.parameters(recurse)) for recurse in (True, False)],
    }


def the_same(a, b):
    """Tensors and modules by identity: `==` of tensors compares what is in them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(the_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(the_same, a, b))
    return a == b if isinstance(a, str) else a is b


@given(trees(), st.booleans(), st.booleans())
def test_any_tree(root, only_the_root, mode):
    modules = [module for _, module in nn.Module.named_modules(root)]
    stock = walked(root)
    before = [module.training for module in modules]
    root.train(mode)
    trained = [module.training for module in modules]
    for module, training in zip(modules, before, strict=True):
        module.training = training

    flattened = [root] if only_the_root else modules
    traversal = FlatTraversal(root)
    for one in flattened:
        traversal.replace(one, WALKS)
        traversal.replace(one, TRAIN)
    assert the_same(walked(root), stock)
    assert root.train(mode) is root
    assert [module.training for module in modules] == trained
    traversal.undo()
    assert not any(NAMES & module.__dict__.keys() for module in modules)


def test_as_lazy():
    """A module that is put in while somebody walks comes, as it does with torch's walk."""

    def walk(root):
        names = []
        for name, module in root.named_modules():
            names.append(name)
            if name == "0":
                root._modules["1"] = nn.Sequential(nn.Identity())
                module.add_module("new", nn.Identity())
        return names

    def tree():
        return nn.Sequential(nn.Sequential(nn.Identity()), nn.Identity(), nn.Identity())

    ours = tree()
    flatten(ours)
    assert walk(ours) == walk(tree()) == ["", "0", "0.0", "0.new", "1", "1.0", "2"]


def test_a_memo_is_kept():
    ours = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity()))
    flatten(ours)
    memo = {ours[0]}
    assert [name for name, _ in ours.named_modules(memo)] == ["", "1", "1.0"]
    assert memo == {ours, ours[0], ours[1], ours[1][0]}
    assert list(ours.named_modules(memo)) == []


def test_no_boolean():
    ours = nn.Sequential(nn.Identity())
    flatten(ours)
    with pytest.raises(ValueError, match="boolean"):
        ours.train(1)


def test_they_pass_for_methods():
    ours = nn.Sequential(nn.Identity())
    flatten(ours)
    for name in NAMES - {"num_parameters"}:
        assert getattr(ours, name).__func__ is getattr(nn.Module, name)
        assert getattr(ours, name).__self__ is ours


@pytest.fixture
def model(make_peft):
    return make_peft("llama", lora_dropout=0.1)


def test_a_fused_model(model):
    core = model.get_base_model()
    wrapped = nn.Sequential(model)
    stock = [walked(one) for one in (model, core, wrapped)]
    size = core.num_parameters(exclude_embeddings=True)
    own = {module: set(module.__dict__) for module in model.modules()}
    report = fuse(model, FuseConfig())
    row = report.operations()["traversal"]
    assert (row.found, row.fused, row.called, row.fallbacks) == (1, 1, 0, [])
    methods = {module: NAMES & module.__dict__.keys() for module in model.modules()}
    walks = NAMES - {"train", "num_parameters"}
    assert {module: names for module, names in methods.items() if names} == {
        model: walks,
        core: walks | {"num_parameters"},
        core.model.layers[0]: {"train"},
        core.model.layers[1]: {"train"},
    }
    assert the_same([walked(one) for one in (model, core, wrapped)], stock)
    assert core.num_parameters(exclude_embeddings=True) == size
    # As a trainer that evaluates: a dropout that somebody has switched by hand is switched back.
    layer = core.model.layers[1]
    dropout = layer.mlp.up_proj.lora_dropout["default"]
    for mode in (False, True):
        dropout.training = not mode
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}
    called = report.operations()["traversal"]
    assert called.called == 1 and called.runtime_fallbacks == []

    another = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(layer))
    assert next(again.modules()) is again
    another.eval()
    assert {module.training for module in another.modules()} == {False}
    assert {module.training for module in model.modules()} == {True}
    assert not {*another.parameters()} & {*model.parameters()}

    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    assert sum("second" in name for name, _ in model.named_parameters()) == 4
    model.delete_adapter("second")
    report.unfuse()
    assert {module: set(module.__dict__) for module in model.modules()} == own


def counts(model):
    return [
        model.num_parameters(trainable, exclude)
        for trainable in (False, True)
        for exclude in (False, True)
    ]


def test_parameters_are_counted_again_when_they_have_changed(model):
    core = model.get_base_model()
    report = fuse(model, FuseConfig())

    def embedding():
        core.set_input_embeddings(nn.Embedding(70, 32))

    def adapter():
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))

    def data():
        core.lm_head.weight.data = torch.zeros(3, 32)

    def tie():
        core.lm_head.weight = core.model.embed_tokens.weight

    def no_embedding():
        core.model.embed_tokens = nn.Linear(32, 70, bias=False)

    known = []
    for change in (lambda: None, embedding, adapter, data, tie, no_embedding):
        change()
        found = counts(core)
        stock = type(core).num_parameters
        assert found == counts(core) == counts(model)
        assert found == [stock(core, t, e) for t in (False, True) for e in (False, True)]
        known.append(found)
    assert all(a != b for a, b in itertools.pairwise(known))
    report.unfuse()
    assert counts(core) == known[-1]


def test_four_bits(model, tmp_path):
    model.unload().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    stock = counts(base)
    fuse(model, FuseConfig())
    assert counts(base) == counts(base) == stock


def test_a_part_with_a_train_of_its_own(model):
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.add_module("evaluating", AlwaysEvaluating())
    report = fuse(model, FuseConfig(fused_traversal=True, fused_rms_norm=True))
    model.train()
    assert not mlp.evaluating.training and mlp.gate_proj.training
    row = report.operations()["traversal"]
    assert [str(one) for one in row.runtime_fallbacks] == [
        "AlwaysEvaluating has a train of its own (PeftModelForCausalLM)"
    ]


def test_what_others_have_put_there_stays(model):
    layer = model.get_base_model().model.layers[0]
    layer.train = mine = lambda mode=True: layer
    report = fuse(model, FuseConfig())
    assert layer.train is mine
    model.parameters = theirs = lambda: iter(())
    report.unfuse()
    assert model.parameters is theirs and layer.train is mine
    assert "train" not in model.get_base_model().model.layers[1].__dict__


def test_only_where_asked_for(model):
    for flags in ({"fused_traversal": False}, {"fused_rms_norm": True}):
        report = fuse(model, FuseConfig(**flags))
        assert "traversal" not in report.operations()
        assert not NAMES & model.__dict__.keys()
    strict = FuseConfig(
        fused_moe=True, fused_rms_norm=True, fused_traversal=True, fused_strict=True
    )
    with pytest.raises(FuseError, match="fused_moe"):  # it has no experts
        fuse(model, strict)
    assert not NAMES & model.__dict__.keys()
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    report = fuse(wrapped, FuseConfig(fused_traversal=True))
    (copied,) = report.operations()["traversal"].fallbacks
    assert copied.reason.startswith("DataParallel copies it")
    plain = model.unload()
    assert "traversal" not in fuse(plain, FuseConfig()).operations()
    report = fuse(plain, FuseConfig(fused_traversal=True))
    assert [str(one) for one in report.operations()["traversal"].fallbacks] == [
        "nothing else of it is fused"
    ]
    assert not NAMES & plain.__dict__.keys()
    with pytest.raises(FuseConfigError, match="fused_traversal"):
        FuseConfig(fused_traversal="yes")


def test_no_list_of_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    model[1].add_module("1", None)  # as models do that leave a place empty
    record = flatten_traversal(model)
    assert record.module == "Sequential" and [n for n, _ in model.named_modules()] == [
        "", "0", "1", "1.0",
    ]  # fmt: skip
