"""Fully sharded training (FSDP2 and FSDP1): the same weights as on one process; checkpoints in full and in shards."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, load_fsdp_model, save_fsdp_model
from models import images, largest_difference, outputs, same_state, tiny_vit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from processes import on_processes_once, shared_folder
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTLayer
from trials import HEAD, PROCESSES, Trial, lbp_wht, stacked, train_alone, weights_of

from lbp_peft import layout_report

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


STEPS = 4


def fsdp2(model, mesh=(PROCESSES,), **settings):
    # The device is named, since the default mesh consists of GPUs where there are any.
    mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("replicas", "shards")[-len(mesh) :])
    for block in [module for module in model.modules() if isinstance(module, ViTLayer)]:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


BLOCKS = ModuleWrapPolicy({ViTLayer})


def fsdp1(model, mesh=None, policy=BLOCKS, **settings):
    # Frozen and trained weights lie in one block, which takes use_orig_params.
    settings = {"use_orig_params": True, "device_id": torch.device("cpu")} | settings
    if mesh:
        settings["device_mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replicas", "shards"))
    return FSDP1(model, auto_wrap_policy=policy, **settings)


@dataclass(frozen=True)
class Sharded:
    name: str
    trial: Trial
    wrap: Callable = fsdp2
    checkpointing: bool = False
    tolerance: float = 1e-5


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
LBP, PAPER, LORA = Trial("", lbp_wht), Trial("", functools.partial(lbp_wht, grad_input_rank=3)), Trial("", stacked)
DROPPED, ON_DISK = (Trial("", functools.partial(lbp_wht, base_weights=where)) for where in ("dropped", "disk"))
DORA = Trial("", functools.partial(stacked, use_dora=True))
EXACT = Trial("", functools.partial(lbp_wht, r=64), low_rank=0)  # as many bases as there are patches
BF16_2 = functools.partial(fsdp2, mp_policy=BF16)
BF16_1 = functools.partial(
    fsdp1, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
)
HYBRID_1 = functools.partial(fsdp1, sharding_strategy=ShardingStrategy.HYBRID_SHARD)
RUNS = [
    Sharded("FSDP2", LBP),
    Sharded("FSDP2, the paper's setting", PAPER),
    Sharded("FSDP2, on LoRA", LORA),
    Sharded("FSDP2, AdamW", Trial("", lbp_wht, adam=True)),
    Sharded("FSDP2, kept after the forward pass", LBP, functools.partial(fsdp2, reshard_after_forward=False)),
    Sharded("FSDP2, offloaded", LORA, functools.partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False))),
    Sharded("FSDP2, replicated", LBP, functools.partial(fsdp2, mesh=(PROCESSES, 1))),
    Sharded("FSDP2, checkpointing", LBP, checkpointing=True),
    Sharded("FSDP2, checkpointing, on DoRA", DORA, checkpointing=True),
    Sharded("FSDP2, bf16", LBP, BF16_2, tolerance=0.1),
    Sharded("FSDP2, bf16, the paper's setting", PAPER, BF16_2, tolerance=0.1),
    Sharded("FSDP2, bf16, exact", EXACT, BF16_2, tolerance=0.1),
    Sharded("FSDP2, bf16, on LoRA", LORA, BF16_2, tolerance=0.1),
    Sharded("FSDP2, base weights dropped", DROPPED),
    Sharded("FSDP2, base weights on disk", ON_DISK),
    Sharded("FSDP1, base weights dropped", DROPPED, fsdp1),
    Sharded("FSDP1", LBP, fsdp1),
    Sharded("FSDP1, on LoRA", LORA, fsdp1),
    Sharded(
        "FSDP1, gradients in shards", LBP, functools.partial(fsdp1, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)
    ),
    Sharded("FSDP1, checkpointing", LORA, fsdp1, checkpointing=True),
    # FSDP1 offloads from accelerators only: on the CPU its CPUOffload stops with an error.
    Sharded("FSDP1, bf16", LBP, BF16_1, tolerance=0.1),
    Sharded("FSDP1, bf16, exact", EXACT, BF16_1, tolerance=0.1),
]


def prepared(run):
    model = run.wrap(run.trial.model())
    if run.checkpointing:  # as accelerate does it
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, ViTLayer))
    return model


def train(run, model, optimizer, first=0, last=STEPS):
    for step in range(first, last):
        run.trial.loss(model, step, 0, torch.distributed.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()


def gathered(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def train_sharded(run):
    model = prepared(run)
    optimizer = run.trial.optimizer(model)
    train(run, model, optimizer)
    ran = layout_report(model).layers.values()
    whole = gathered(model)
    return {
        "weights": whole,
        "adapter": get_peft_model_state_dict(model, whole),
        "low rank": sum(not layer.why_exact for layer in ran),
        "sharded": sum(p.numel() for p in local_parameters(model)) < sum(t.numel() for t in whole.values()),
    }


def local_parameters(model):
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


# Checkpoints


def resume_from_shards(run, folder):
    """Train half of the steps, write shards, read them into a new model and optimiser, and train the rest."""
    model = prepared(run)
    optimizer = run.trial.optimizer(model)
    train(run, model, optimizer, 0, STEPS // 2)
    weights, states = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": states}, checkpoint_id=folder)

    model = prepared(run)
    optimizer = run.trial.optimizer(model)
    weights, states = get_state_dict(model, optimizer)
    load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    train(run, model, optimizer, STEPS // 2, STEPS)
    return gathered(model)


def driving(accelerator, version=2):
    """Have accelerate run its FSDP code on the CPU, which it otherwise does on accelerators only."""
    for state in (PartialState, AcceleratorState):
        state._shared_state |= {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["ViTLayer"],
        state_dict_type="SHARDED_STATE_DICT",
        use_orig_params=True if version == 1 else None,
        cpu_ram_efficient_loading=False,
    )
    return accelerator


@contextlib.contextmanager
def afterwards_as_before():
    """After the block, accelerate no longer assumes that it runs FSDP."""
    yield
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.MULTI_CPU


@afterwards_as_before()
def with_accelerate(run, folder):
    """Train half of the steps, save the state and the adapter, load the state into a new model, and train the rest."""
    accelerator = driving(Accelerator(cpu=True))
    plugin = accelerator.state.fsdp_plugin

    def accelerated():
        model = run.trial.model()
        return accelerator.prepare(model, run.trial.optimizer(model))

    model, optimizer = accelerated()
    train(run, model, optimizer, 0, STEPS // 2)
    accelerator.save_state(folder / "state")
    save_fsdp_model(plugin, accelerator, model, folder / "adapter shards", adapter_only=True)
    whole = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder / "adapter", state_dict=whole)
    half = gathered(model)

    accelerator.free_memory()
    model, optimizer = accelerated()
    load_fsdp_model(plugin, accelerator, model, folder / "adapter shards", adapter_only=True)
    from_adapter = gathered(model)
    accelerator.load_state(folder / "state")
    train(run, model, optimizer, STEPS // 2, STEPS)
    return {
        "processes": accelerator.num_processes,
        "half": half,
        "from adapter": from_adapter,
        "end": gathered(model),
    }


def resume_fsdp1(run, kind):
    """Resume with FSDP1's own functions: the keys of `get_state_dict` differ between a new and an old optimiser."""
    model = prepared(run)
    optimizer = run.trial.optimizer(model)
    train(run, model, optimizer, 0, STEPS // 2)
    with FSDP1.state_dict_type(model, kind):
        weights, states = model.state_dict(), FSDP1.optim_state_dict(model, optimizer)

    model = prepared(run)
    optimizer = run.trial.optimizer(model)
    with FSDP1.state_dict_type(model, kind):
        model.load_state_dict(weights)
        optimizer.load_state_dict(FSDP1.optim_state_dict_to_load(model, optimizer, states))
    train(run, model, optimizer, STEPS // 2, STEPS)
    return gathered(model)


def from_a_whole(run):
    """Load the state dict of one process into a sharded model; return whether the model gives the same one back."""
    weights = {name: torch.randn_like(tensor) for name, tensor in run.trial.model().state_dict().items()}
    torch.distributed.broadcast_object_list(shared := [weights])  # random ones differ from process to process
    model = prepared(run)
    set_model_state_dict(model, dict(shared[0]), options=StateDictOptions(full_state_dict=True))
    return same_state(gathered(model), shared[0])


def without_original_parameters():
    """Use FSDP1 with use_orig_params=False, by block, or with a unit for each trained module, as PEFT proposes."""
    with pytest.raises(ValueError) as refused:
        fsdp1(LBP.model(), use_orig_params=False)
    model = LORA.model()
    model = fsdp1(model, policy=fsdp_auto_wrap_policy(model), use_orig_params=False)
    optimizer = LORA.optimizer(model)
    train(Sharded("", LORA), model, optimizer)
    ran = layout_report(model).layers.values()
    return {
        "refused": str(refused.value),
        "weights": gathered(model),
        "why exact": {layer.why_exact for layer in ran},
    }


# The example program and its training loop


EXAMPLE = [
    "--methods", "lbp-wht:r=3", "lora+lbp-wht:r=3", "--epochs", "1", "--train_images_per_class", "4",
    "--batch_size", "10", "--test_images", "20", "--timing_rounds", "1", "--checkpoint_every", "1",
]  # fmt: skip
CLIPPED = 0.1  # the norm at which gradients are clipped


def on_few_digits():
    """The embedded example with few images of digits."""
    from common import digits
    from common.classification import Classification

    class Few(Classification):
        def embedded(self):
            known = digits.digits(range(5))
            known.train, known.test = (part.select(range(40)) for part in (known.train, known.test))
            return dataclasses.replace(digits.EMBEDDED, known=lambda: known, epochs=1)

    return Few()


@afterwards_as_before()
def run_example(folder):
    """Run the example as `accelerate launch` does with fsdp2.yaml; return how many processes and shards it found."""
    from common import experiment

    seen = []

    def make_accelerator(options, make=experiment.make_accelerator):
        accelerator = driving(make(options))
        seen.append((accelerator.num_processes, str(accelerator.distributed_type)))
        return accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_accelerator", make_accelerator)
        patch.setattr(sys, "argv", ["image_classification.py", *EXAMPLE, "--output", str(folder)])
        experiment.main(on_few_digits(), "")
    return seen


class Numbered(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"pixel_values": images(1, seed=index)[0], "labels": index % 5}


class Plain(torch.optim.SGD):
    def __init__(self, weights, lr, weight_decay, fused):
        super().__init__(weights, lr)


def train_clipped(build, folder, version=None):
    """Run the examples' training loop with clipped gradients on all processes, sharded or not."""
    from common import training
    from common.classification import Classification, ClassificationOptions
    from common.processes import make_accelerator

    options = ClassificationOptions(output=str(folder), max_grad_norm=CLIPPED, scheduler="constant", warmup_steps=0)
    accelerator = make_accelerator(options)
    if version:
        driving(accelerator, version)
    loaders = [DataLoader(Numbered(), batch_size=4 // accelerator.num_processes) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, afterwards_as_before() if version else contextlib.nullcontext():
        patch.setattr(torch.optim, "AdamW", Plain)  # AdamW would take steps of the same length, clipped or not
        run = training.Run("", folder, 2, 0.5)
        if version == 1:  # accelerate's own has FSDP1 offload to the CPU, which crashes where all is on the CPU already
            patch.setattr(accelerator, "get_state_dict", gathered)
        model, history = training.train(accelerator, Classification(), build(), loaders, run, options)
    return model.state_dict() if accelerator.is_main_process else {}, [epoch["loss"] for epoch in history]


def all_runs(folder):
    warnings.simplefilter("ignore")
    folder, found = Path(folder), {run.name: train_sharded(run) for run in RUNS}
    for name in ("FSDP2", "FSDP2, on LoRA"):
        run = next(run for run in RUNS if run.name == name)
        found[f"{name}, resumed"] = resume_from_shards(run, folder / name)
    for name in ("FSDP2", "FSDP2, on LoRA"):
        run = next(run for run in RUNS if run.name == name)
        found[f"{name}, accelerate"] = with_accelerate(run, folder / f"{name}, accelerate")
    for kind in (StateDictType.FULL_STATE_DICT, StateDictType.SHARDED_STATE_DICT):
        found[f"FSDP1, {kind.name}"] = resume_fsdp1(run_named("FSDP1"), kind)
    for name in ("FSDP1", "FSDP2", "FSDP2, on LoRA"):
        found[f"{name}, from a whole"] = from_a_whole(run_named(name))
    found["use_orig_params=False"] = without_original_parameters()
    for version in (1, 2):
        found[f"FSDP{version}, clipped"] = train_clipped(lbp_wht, folder, version)
    if importlib.util.find_spec("sklearn"):  # this is run last, since it leaves the group at its end
        found["example"] = run_example(folder / "example")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shared_folder(tmp_path_factory, "sharded")


@pytest.fixture(scope="module")
def together(folder):
    return on_processes_once(PROCESSES, functools.partial(all_runs, str(folder)), folder)


@functools.cache
def alone(trial):
    return train_alone(trial, STEPS)


def trained(found, run):
    return {name: tensor for name, tensor in found.items() if name in alone(run.trial)}


def run_named(name):
    return next(run for run in RUNS if run.name == name)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_sharded_processes_train_as_one(run, together):
    expected = alone(run.trial)
    assert largest_difference(weights_of(run.trial.model()), expected) > 1e-2  # so that equality says something
    for found in together:
        assert largest_difference(trained(found[run.name]["weights"], run), expected) < run.tolerance
        assert found[run.name]["low rank"] == run.trial.low_rank
        assert found[run.name]["sharded"] == ("replicated" not in run.name)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_adapter_can_be_taken_out_of_a_sharded_model(run, together):
    model = run.trial.model()
    expected = get_peft_model_state_dict(model, model.state_dict() | together[0][run.name]["weights"])
    assert same_state(together[0][run.name]["adapter"], expected)
    assert len(expected) == len(get_peft_model_state_dict(run.trial.model()))


@pytest.mark.parametrize("name", ["FSDP2", "FSDP2, on LoRA"])
def test_training_goes_on_from_shards(name, together):
    run = run_named(name)
    for found in together:
        assert largest_difference(trained(found[f"{name}, resumed"], run), alone(run.trial)) < 1e-5


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_training_goes_on_from_state_dicts_of_fsdp1(kind, together):
    for found in together:
        weights = trained(found[f"FSDP1, {kind}"], run_named("FSDP1"))
        assert largest_difference(weights, alone(LBP)) < 1e-5


@pytest.mark.parametrize("name", ["FSDP1", "FSDP2", "FSDP2, on LoRA"])
def test_a_whole_state_dict_goes_into_a_sharded_model(name, together):
    assert all(found[f"{name}, from a whole"] for found in together)


def rounding(found, run):
    """How far the weights of two runs are apart, relative to how far training moved them."""
    expected, start = alone(run.trial), weights_of(run.trial.model())
    found = trained(found[run.name]["weights"], run)
    return sum((found[n] - e).norm() for n, e in expected.items()) / sum(
        (start[n] - e).norm() for n, e in expected.items()
    )


@pytest.mark.parametrize("name", ["FSDP2, bf16", "FSDP2, bf16, the paper's setting", "FSDP1, bf16"])
def test_bf16_rounds_no_more_than_exact_backpropagation_does(name, together):
    exact = rounding(together[0], run_named(f"{name.split(',')[0]}, bf16, exact"))
    assert 0 < rounding(together[0], run_named(name)) < 1.5 * exact
    assert exact < 0.1


def test_fsdp1_without_original_parameters(together):
    """A block of frozen and trained weights is refused; with a unit for each trained module, layers are exact."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], **HEAD)
    expected = train_alone(Trial("", lambda: get_peft_model(tiny_vit(), lora)), STEPS)
    found = together[0]["use_orig_params=False"]
    assert largest_difference({n: found["weights"][n] for n in expected}, expected) < 1e-5
    assert "use_orig_params=False" in found["refused"] and "requires_grad" in found["refused"]
    assert all(found["why exact"])


# Copies of the model on two pairs of processes. (Of copies on one process each, FSDP1 sums no gradients.)


HYBRID = {"FSDP2": functools.partial(fsdp2, mesh=(2, 2)), "FSDP1": functools.partial(HYBRID_1, mesh=(2, 2))}
HYBRID_STEPS = 3


def hybrid():
    found = {}
    for name, wrap in HYBRID.items():
        model = wrap(LBP.model())
        optimizer = LBP.optimizer(model)
        train(Sharded(name, LBP, wrap), model, optimizer, last=HYBRID_STEPS)
        local = sum(parameter.numel() for parameter in local_parameters(model))
        found[name] = {"weights": gathered(model), "local": local}
    return found


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return on_processes_once(4, hybrid, shared_folder(tmp_path_factory, "hybrid"))


@pytest.mark.parametrize("name", HYBRID)
def test_two_copies_on_two_processes_each_train_as_one(name, four):
    expected = train_alone(LBP, HYBRID_STEPS, processes=4)
    size = sum(parameter.numel() for parameter in LBP.model().parameters())
    for found in four:
        weights = found[name]["weights"]
        assert largest_difference({n: weights[n] for n in expected}, expected) < 1e-5
    # Each copy is whole on two processes, up to what is filled up to make shards equal.
    assert sum(found[name]["local"] for found in four) == pytest.approx(2 * size, rel=0.02)


@pytest.mark.parametrize("name", ["FSDP2", "FSDP2, on LoRA"])
def test_accelerate_saves_and_resumes_sharded_training(name, together, folder):
    run = run_named(name)
    for found in (each[f"{name}, accelerate"] for each in together):
        assert found["processes"] == PROCESSES
        assert largest_difference(trained(found["end"], run), alone(run.trial)) < 1e-5
        assert same_state(found["from adapter"], found["half"])  # all else was never trained
    # The adapter, saved by itself, is loaded like any other.
    half = run.trial.model()
    half.load_state_dict(together[0][f"{name}, accelerate"]["half"])
    loaded = PeftModel.from_pretrained(tiny_vit(), folder / f"{name}, accelerate" / "adapter")
    assert torch.equal(outputs(loaded, images()), outputs(half, images()))
    assert not torch.equal(outputs(loaded, images()), outputs(tiny_vit(), images()))


@pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="the example's digits need scikit-learn")
def test_the_example_program_runs_sharded(together, folder):
    """It is enough that the program ends: it checks that each reloaded adapter predicts the same."""
    assert all(found["example"] == [(PROCESSES, "DistributedType.FSDP")] for found in together)
    output = folder / "example"
    results = json.loads((output / "results.json").read_text())["results"]
    assert len(results) == 2 and (output / "table.txt").exists()
    base = ViTForImageClassification.from_pretrained(output / "pretrained", num_labels=5)
    # Training has changed the weights.
    untrained = functools.partial(ViTForImageClassification.from_pretrained, output / "pretrained", num_labels=5)
    for method in ("lbp-wht-r-3", "lora-lbp-wht-r-3"):
        adapted = PeftModel.from_pretrained(untrained(), output / method / "seed-0" / "adapter")
        assert not torch.equal(outputs(adapted, images()), outputs(base, images()))
        assert not list(output.glob("*/seed-0/checkpoint*"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="alone, the training loop would take the device")
@pytest.mark.parametrize("version", [1, 2])
def test_gradients_are_clipped_by_the_norm_over_all_shards(version, together, tmp_path):
    expected, losses = train_clipped(lbp_wht, tmp_path)
    found, found_losses = together[0][f"FSDP{version}, clipped"]
    assert largest_difference(found, expected) < 1e-5
    # On record is the loss of all processes' images, on each of them.
    assert found_losses == pytest.approx(losses, rel=1e-5) == together[1][f"FSDP{version}, clipped"][1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_sharding.CLIPPED", None)
        assert largest_difference(train_clipped(lbp_wht, tmp_path)[0], expected) > 1e-2
