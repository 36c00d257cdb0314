"""No value in a checkpoint that somebody else wrote becomes a path, code, an endless loop or an allocation."""

import json
import re
import sys

import pytest
import torch
from models import hooks_of, images, layers_of, outputs, same_state, state_of, tiny_vit, train
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lbp_peft import LBPWHTConfig
from lbp_peft.tuner.validation.names import check_adapter_name
from lbp_peft.tuner.validation.patterns import check_pattern

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    return saved(LBPWHTConfig(r=3), tmp_path / "checkpoint")


@pytest.fixture
def stack(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    return saved(LBPWHTConfig(r=3, train_base_weight=False, stack_on=lora), tmp_path / "stack")


def saved(config, folder):
    get_peft_model(tiny_vit(), config).save_pretrained(folder)
    return folder


def edit(folder, **changes):
    written = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(written | changes))


def edit_beneath(folder, **changes):
    written = json.loads((folder / CONFIG).read_text())
    written["stack_on"]["default"] |= changes
    (folder / CONFIG).write_text(json.dumps(written))


# Paths

ESCAPING = [
    "/tmp/owned", "../owned", "..", ".", "", "a/b", "a\\b", "C:", "C:owned", "\\\\host\\share", "a\0b", "a\nb",
    "\u202egpj", " ", "owned ", "a.b", "NUL", "com1", "x" * 300, "a?b", "a*b", "keys", "train", 5, None, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPING, ids=repr)
def test_names_that_are_more_than_a_name_are_refused(name):
    with pytest.raises(ValueError, match="stack_on has an adapter called"):
        check_adapter_name(name, "stack_on")


@pytest.mark.parametrize("name", ["default", "first", "task-1", "réseau", "a+b", "two words", "_x", "COM", "null"])
def test_ordinary_names_are_accepted(name):
    check_adapter_name(name, "stack_on")
    assert list(LBPWHTConfig(stack_on={name: LoraConfig(target_modules=["fc1"])}).stack_on) == [name]


@pytest.mark.parametrize("name", ["../../elsewhere/owned", "owned\\up", "..", "C:owned", "ABSOLUTE"])
def test_no_name_in_a_checkpoint_leads_out_of_the_folder(name, stack, tmp_path):
    name = str(tmp_path / "elsewhere" / "owned") if name == "ABSOLUTE" else name
    written = json.loads((stack / CONFIG).read_text())
    edit(stack, stack_on={name: written["stack_on"]["default"]}, stack_active=[name])
    tensors = {k.replace("stack_on.default.", f"stack_on.{name}."): t for k, t in load_file(stack / WEIGHTS).items()}
    save_file(tensors, stack / WEIGHTS, {"format": "pt"})
    base = tiny_vit()
    with pytest.raises(ValueError, match=f"adapter_config.json of {re.escape(str(stack))}.*an adapter called"):
        PeftModel.from_pretrained(base, stack, is_trainable=True)
    untouched(base)
    assert not (tmp_path / "elsewhere").exists()


def test_a_stack_whose_checkpoint_could_not_be_loaded_is_not_begun():
    lora = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=["q_proj"]), "owner/name")
    with pytest.raises(ValueError, match="The model to stack on has an adapter called 'owner/name'"):
        get_peft_model(lora, LBPWHTConfig(train_base_weight=False))


def test_folders_that_x_lora_would_load_from_are_not_asked(stack):
    edit_beneath(stack, peft_type="XLORA", hidden_size=32, adapters={"a": "/etc"})
    with pytest.raises(ValueError, match="configuration of another method with adapters in layers.*XLORA"):
        PeftConfig.from_pretrained(stack)


# Code


def test_no_module_is_imported_because_a_checkpoint_names_it(stack):
    edit_beneath(stack, megatron_config={"hidden_size": 1}, megatron_core="antigravity")
    with pytest.raises(ValueError, match=r"stack_on\['default'\] has a megatron_config"):
        PeftModel.from_pretrained(tiny_vit(), stack)
    assert "antigravity" not in sys.modules


# Regular expressions

ENDLESS = [
    "(a+)+$", "(.*)*x", "(a|aa)+$", r"(\w+\.?)+X", "(?:a|a)*b", ".*.*.*.*.*x", "(a?){40}a{40}", "a?" * 30 + "a" * 30,
    "(.|.)" * 30, "(?=(a+)+)x", "(.*a){20}", r"(.+\.)+.+\d$", "(?i:(a+)+)b", "(x+x+)+y",
    "([ab]?(?i:A))+c", "(?:(?i:A)?a)*c", "(?:.*.*.*)?" * 6 + "x", "(?:.*.*|a)" * 8 + "x", "(?=.*.*.*)" * 6 + "x",
]  # fmt: skip
HARMLESS = [
    r".*layers\.(0|1)\..*", r"vit\.layers\.\d+\.(attention\.[qkvo]_proj|mlp\.fc[12])", r"(?:.*\.)?fc[12]",
    r"(\w+\.)*fc1", r"(layers\.\d+\.)*fc1", r"(?:[^.]+\.)*fc1", r"(\.\w+)*", r".*\d+.*", "fc2",
    r"^(?!.*head).*fc\d$", "all-linear",
    "|".join(rf"vit\.layers\.{i}\.mlp\.fc1" for i in range(300)),
]  # fmt: skip


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_expressions_that_match_for_ever_are_refused(field, pattern):
    settings = {field: {pattern: 3} if field == "rank_pattern" else pattern}
    if field == "layers_pattern":
        settings |= {"layers_to_transform": [0]}
    with pytest.raises(ValueError, match=f"{field}.* could take forever to match"):
        LBPWHTConfig(**settings)


@pytest.mark.parametrize("pattern", HARMLESS, ids=lambda pattern: pattern[:40])
def test_ordinary_expressions_are_accepted(pattern):
    check_pattern("target_modules", pattern)
    for name in ("vit.layers.0.attention.output.dense_projection_with_a_long_name", "vit." + "layers.0." * 6):
        re.fullmatch(pattern, name)  # comes to an end


@pytest.mark.parametrize("pattern, why", [
    ("(", "missing \\)"), ("[", "unterminated"), ("*a", "nothing to repeat"), ("a{99999999999999999999}", "too large"),
    ("(" * 5000 + ")" * 5000, "recursion"), ("a)(b", "unbalanced"), ("(?i)fc1", "global flags not at the start"),
])  # fmt: skip
def test_expressions_that_cannot_be_compiled_are_refused_with_the_reason(pattern, why):
    with pytest.raises(ValueError, match=f"A key of rank_pattern is not a valid regular expression .*{why}") as caught:
        LBPWHTConfig(rank_pattern={pattern: 3})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("changes", [
    {"target_modules": "(a+)+$"}, {"exclude_modules": "(a+)+$"}, {"rank_pattern": {"(a+)+$": 2}},
    {"alpha_pattern": {"(a+)+$": 2}}, {"layers_pattern": "(a+)+$", "layers_to_transform": [0]},
    {"modules_to_save": ["(a+)+$"]},
])  # fmt: skip
def test_expressions_of_the_adapters_beneath_are_checked_too(changes, stack):
    edit_beneath(stack, **changes)
    with pytest.raises(ValueError, match=r"stack_on\['default'\]\..*(forever|must be names of modules)"):
        PeftModel.from_pretrained(tiny_vit(), stack)


def test_names_of_modules_to_save_are_no_expressions(checkpoint):
    edit(checkpoint, modules_to_save=["(.*)*x"])
    with pytest.raises(ValueError, match=r"modules_to_save must be names of modules or None, got \['\(\.\*\)\*x'\]"):
        PeftModel.from_pretrained(tiny_vit(), checkpoint)


# Numbers and types


@pytest.mark.parametrize("changes, message", [
    ({"r": "10"}, "r must be an int .*got '10'"),
    ({"r": 10.0}, "r must be an int .*got 10.0"),
    ({"r": 1e400}, "r must be an int .*got inf"),
    ({"r": float("nan")}, "r must be an int .*got nan"),
    ({"block_size": 2**60}, "block_size must be a power of two up to 128 .*got 1152921504606846976"),
    ({"grid_size": [2.5, 3]}, "grid_size must be two positive ints"),
    ({"num_prefix_tokens": True}, "num_prefix_tokens must be an int"),
    ({"rank_pattern": {"fc1": 10**30}}, r"rank_pattern\['fc1'\] must be an int"),
    ({"train_base_weight": "no"}, "train_base_weight must be True or False, got 'no'"),
    ({"auto_mapping": 5}, "auto_mapping must be a dict"),
    ({"stack_on": {"a": {"peft_type": "NOPE"}}}, "peft_type 'NOPE', which PEFT does not know. It knows .*LORA"),
    ({"stack_on": {"a": {"peft_type": "LBPWHT", "stack_on": {}}}}, "configuration of another method"),
    ({"target_modules": "x" * 1000 + "("}, "target_modules is not a valid regular expression"),
])  # fmt: skip
def test_values_of_a_file_are_checked_and_the_file_is_named(changes, message, checkpoint):
    edit(checkpoint, **changes)
    base = tiny_vit()
    with pytest.raises(ValueError, match=f"adapter_config.json of {re.escape(str(checkpoint))}.*{message}") as caught:
        PeftModel.from_pretrained(base, checkpoint)
    assert len(str(caught.value)) < 1000
    untouched(base)
    model = get_peft_model(tiny_vit(), LBPWHTConfig())
    with pytest.raises(ValueError, match=message):
        model.load_adapter(checkpoint, "other")
    assert list(model.peft_config) == ["default"]


def untouched(base):
    assert not layers_of(base) and not hooks_of(base) and not hasattr(base, "peft_config")
    assert same_state(state_of(base), state_of(tiny_vit()))
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("changes", [
    {"r": "x"}, {"r": -1}, {"lora_alpha": "q"}, {"bias": 5}, {"target_modules": 5}, {"rank_pattern": [1]},
    {"rank_pattern": {"q_proj": "x"}}, {"lora_dropout": "1"}, {"init_lora_weights": "nope"}, {"runtime_config": {}},
])  # fmt: skip
def test_values_of_the_adapter_beneath_end_in_a_value_error_and_an_untouched_model(changes, stack):
    edit_beneath(stack, **changes)
    base = tiny_vit()
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base, stack, is_trainable=True)
    untouched(base)
    model = get_peft_model(base, LBPWHTConfig(r=3))
    assert torch.equal(outputs(model, images()), outputs(tiny_vit(), images()))


@pytest.mark.parametrize("changes", [
    {"block_size": 128, "r": 128 * 128}, {"grid_size": [10**9, 10**9]}, {"num_prefix_tokens": 10**18},
    {"hadamard_size": 2**4000, "grad_input_dtype": "int8"},
], ids=lambda changes: ",".join(changes))  # fmt: skip
def test_enormous_numbers_allocate_nothing_enormous(changes, checkpoint):
    edit(checkpoint, **changes)
    model = PeftModel.from_pretrained(tiny_vit(), checkpoint, is_trainable=True)
    before = peak_memory()
    try:
        train(model, images(), 1)
    except ValueError as error:
        assert "grid_size" in str(error)
    assert peak_memory() - before < 1 << 30


def peak_memory():
    """The peak memory of this process so far, in bytes."""
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
