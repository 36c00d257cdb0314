"""Old names of settings, which work for one release."""

import copy
import dataclasses
import json
import warnings
from contextlib import contextmanager

import pytest
from models import images, layers_of, outputs, tiny_vit
from peft import PeftConfig, PeftModel, get_peft_model

from lbp_peft import LBPWHTConfig


@contextmanager
def one_warning(*words):
    """Expect exactly one DeprecationWarning, which points at this file and contains all these words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [w for w in caught if issubclass(w.category, DeprecationWarning) and "LBPWHTConfig" in str(w.message)]
    assert len(found) == 1 and found[0].filename == __file__
    assert all(word in str(found[0].message) for word in words), str(found[0].message)
    assert not [w for w in caught if "Unexpected keyword" in str(w.message) and "grad_input" in str(w.message)]


VALUES = [
    ({"grad_input": "auto"}, {"grad_input_dtype": "auto"}),
    ({"grad_input": "int8"}, {"grad_input_dtype": "int8"}),
    ({"grad_input": 6}, {"grad_input_rank": 6}),
    ({"grad_input": (6, "int8")}, {"grad_input_rank": 6, "grad_input_dtype": "int8"}),
    ({"grad_input": [6, "full"]}, {"grad_input_rank": 6, "grad_input_dtype": "full"}),
    ({"rotation": 32}, {"hadamard_size": 32}),
    ({"grad_input": "int8", "rotation": 16}, {"grad_input_dtype": "int8", "hadamard_size": 16}),
]


@pytest.mark.parametrize("old, new", VALUES)
def test_in_a_call(old, new):
    with one_warning(*old, *(f"{name}={value!r}" for name, value in new.items())):
        config = LBPWHTConfig(r=3, **old)
    assert config == LBPWHTConfig(r=3, **new)
    assert not config.to_dict().keys() & {"grad_input", "rotation"}


def saved(folder, old, **more):
    """Write a checkpoint as it was written when settings had their old names."""
    model = get_peft_model(tiny_vit(), LBPWHTConfig(r=3, target_modules=["fc1"]))
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    for name in ("grad_input_rank", "grad_input_dtype", "grad_input_rank_pattern", "hadamard_size"):
        del settings[name]
    file.write_text(json.dumps(settings | old | more))
    return model


@pytest.mark.parametrize("old, new", VALUES)
def test_in_a_file(old, new, tmp_path):
    model = saved(tmp_path, old)
    with one_warning(*old):
        config = PeftConfig.from_pretrained(tmp_path)
    with one_warning(*old):
        assert config.to_dict() == LBPWHTConfig.from_pretrained(tmp_path).to_dict()
    assert all(getattr(config, name) == value for name, value in new.items())
    with one_warning(*new):
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True)
    expected = LBPWHTConfig(r=3, target_modules=["fc1"], **new)
    assert outputs(loaded, images()).equal(outputs(model, images()))
    rule = next(iter(layers_of(loaded).values())).lbpwht_rule["default"]
    assert rule.input_gradient.precision == expected.input_precision(expected.grad_input_rank)
    assert getattr(rule.input_gradient, "basis", None) == expected.input_basis(expected.grad_input_rank)
    loaded.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert not written.keys() & {"grad_input", "rotation"}


def test_in_a_file_with_settings_of_a_later_version(tmp_path):
    """PEFT reads such a file a second time, without the settings that it does not know."""
    saved(tmp_path, {"grad_input": 6}, of_a_later_version=1)
    with one_warning("grad_input_rank=6"), pytest.warns(UserWarning, match="of_a_later_version"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert config.grad_input_rank == 6


def test_in_a_dictionary():
    with one_warning("grad_input_rank=6"):
        config = PeftConfig.from_peft_type(peft_type="LBPWHT", grad_input=6)
    assert config == LBPWHTConfig(grad_input_rank=6)


@pytest.mark.parametrize("old, new", VALUES)
def test_in_replace(old, new):
    config = LBPWHTConfig(r=5, grad_input_rank=21, grad_input_dtype="bf16")
    before = copy.deepcopy(config)
    with one_warning(*old):
        replaced = dataclasses.replace(config, **old)
    settings = {"grad_input_rank": None, "grad_input_dtype": "auto"} if "grad_input" in old else {}
    assert replaced == dataclasses.replace(config, **(settings | new)) and config == before
    with pytest.raises(ValueError, match="grad_input is an old name of .*and grad_input_dtype is given too"):
        dataclasses.replace(config, grad_input=3, grad_input_dtype="int8")


def test_as_an_attribute():
    config = LBPWHTConfig(grad_input_rank=6, grad_input_dtype="int8", hadamard_size=16)
    with one_warning("grad_input_rank=6", "grad_input_dtype='int8'"):
        assert config.grad_input == (6, "int8")
    with one_warning("hadamard_size=16"):
        assert config.rotation == 16
    with one_warning("grad_input_dtype='full'"):
        config.grad_input = "full"
    with one_warning("hadamard_size=0"):
        config.rotation = 0
    assert config == LBPWHTConfig(grad_input_dtype="full")
    for value, new in (("int8", {"grad_input_dtype": "int8"}), (6, {"grad_input_rank": 6})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert LBPWHTConfig(**new).grad_input == value


@pytest.mark.parametrize("settings, message", [
    ({"grad_input": 6, "grad_input_rank": 6}, "grad_input is an old name of grad_input_rank and grad_input_dtype, and "
     "grad_input_rank is given too. Give only the new"),
    ({"grad_input": 6, "grad_input_dtype": "auto"}, "grad_input_dtype is given too"),
    ({"rotation": 16, "hadamard_size": 16}, "rotation is an old name of hadamard_size, and hadamard_size is given too"),
    ({"grad_input": "exact"}, "grad_input_dtype must be one of.*got 'exact'"),
    ({"grad_input": 65}, "grad_input_rank must be.*got 65"),
    ({"grad_input": None}, "grad_input is an old name.*It must be a rank, a number format or a pair.*got None"),
    ({"grad_input": False}, "grad_input is an old name.*got False"),
    ({"grad_input": 10.0}, "grad_input is an old name.*got 10.0"),
    ({"grad_input": (10,)}, r"grad_input is an old name.*got [([]10,?[])]"),
    ({"grad_input": (10, "int8", 3)}, r"grad_input is an old name.*got [([]10, 'int8', 3[])]"),
    ({"grad_input": ("int8", 10)}, "grad_input_rank must be.*got 'int8'"),
    ({"rotation": 24}, "hadamard_size must be a power of two.*got 24"),
])  # fmt: skip
def test_mistakes(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LBPWHTConfig(**settings)
    saved(tmp_path, settings)
    with pytest.raises(ValueError, match=f"The adapter_config.json of .* cannot be used: .*{message}"):
        LBPWHTConfig.from_pretrained(tmp_path)


def test_a_script_shows_the_warning(tmp_path):
    """By default Python shows DeprecationWarnings only where they point at the main program."""
    saved(tmp_path, {"grad_input": 6})
    script = f"LBPWHTConfig(rotation=16)\nPeftConfig.from_pretrained({str(tmp_path)!r})\n"
    main = {"__name__": "__main__", "LBPWHTConfig": LBPWHTConfig, "PeftConfig": PeftConfig}
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")  # as Python itself
        exec(compile(script, "script.py", "exec"), main)
    shown = [(w.filename, w.lineno, str(w.message)) for w in caught if issubclass(w.category, DeprecationWarning)]
    assert [where[:2] for where in shown] == [("script.py", 1), ("script.py", 2)]
    assert "Write hadamard_size=16 instead" in shown[0][2] and "Write grad_input_rank=6 instead" in shown[1][2]
