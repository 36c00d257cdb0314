"""Two processes train as one does on the same global batch (DistributedDataParallel)."""

import contextlib
import functools

import pytest
import torch
import torch.distributed
from accelerate import Accelerator, DataLoaderConfiguration
from models import NO_GRID, images, largest_difference
from processes import on_processes_once, shared_folder
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from trials import BATCH, PROCESSES, STEPS, Trial, case, dinov2, lbp_wht, sequences, stacked, train_alone, weights_of

import lbp_peft
from lbp_peft import layout_report

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

TRIALS = [
    Trial("low-rank weight gradients", lbp_wht),
    Trial("AdamW", lbp_wht, adam=True),
    Trial("the paper's setting", functools.partial(lbp_wht, grad_input_rank=3)),
    Trial("on LoRA", stacked),
    Trial("on LoRA, AdamW", stacked, adam=True),
    Trial("one layer exact", functools.partial(lbp_wht, rank_pattern={"layers.0.mlp.fc1": 64}), low_rank=11),
    Trial("no token axis", functools.partial(case, "mixer"), low_rank=2),
    Trial("no grid", functools.partial(case, "attention"), sequences, low_rank=0),
    Trial("a parameter that is never used", dinov2, low_rank=6),
    Trial("static graph", lbp_wht, wrapping={"static_graph": True}),
    Trial("static graph, on LoRA", stacked, wrapping={"static_graph": True}),
    Trial("gradients as views of buckets", stacked, wrapping={"gradient_as_bucket_view": True}),
    Trial("accumulation", lbp_wht, micro_batches=2),
    Trial("accumulation, the paper's setting", functools.partial(lbp_wht, grad_input_rank=3), micro_batches=2),
    Trial("accumulation, on LoRA", stacked, micro_batches=2),
    Trial("checkpointing", lbp_wht, checkpointing=True),
    Trial("base weights on disk", functools.partial(lbp_wht, base_weights="disk")),
    Trial("base weights dropped", functools.partial(lbp_wht, base_weights="dropped")),
    # LBP-WHT has no formula for this method: its layers are run again in the backward pass.
    Trial("checkpointing, on DoRA", functools.partial(stacked, use_dora=True), checkpointing=True),
]


def count_bytes(counted, bucket):
    """A communication hook that sums as PyTorch's own does, and records what is sent."""
    counted.append(bucket.buffer().nbytes)
    work = torch.distributed.all_reduce(bucket.buffer().div_(PROCESSES), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def train_together(trial):
    model, rank, sent = trial.model(), torch.distributed.get_rank(), []
    wrapped = DistributedDataParallel(model, **trial.wrapping)
    wrapped.register_comm_hook(sent, count_bytes)
    optimizer = trial.optimizer(model)
    for step in range(STEPS):
        for micro_batch in range(trial.micro_batches):
            last = micro_batch == trial.micro_batches - 1
            with contextlib.nullcontext() if last else wrapped.no_sync():
                trial.loss(wrapped, step, micro_batch, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    ran = layout_report(model).layers.values()
    return {
        "weights": weights_of(model),
        "low rank": sum(not layer.why_exact for layer in ran),
        "bytes": sum(sent),
        "buffers": [name for name, _ in wrapped.named_buffers()],
    }


# Uneven numbers of batches


UNEVEN = (7, 4)  # batches of each process


def train_joined():
    trial, rank = Trial("join", lbp_wht), torch.distributed.get_rank()
    model = trial.model()
    wrapped = DistributedDataParallel(model)
    optimizer = trial.optimizer(model)
    with Join([wrapped]):
        for step in range(UNEVEN[rank]):
            optimizer.zero_grad()
            trial.loss(wrapped, step, 0, rank).backward()
            optimizer.step()
    return weights_of(model)


def train_joined_alone():
    trial = Trial("join", lbp_wht)
    model = trial.model()
    optimizer = trial.optimizer(model)
    for step in range(max(UNEVEN)):
        optimizer.zero_grad()
        for rank in range(PROCESSES):
            if step < UNEVEN[rank]:
                (trial.loss(model, step, 0, rank) / PROCESSES).backward()
        optimizer.step()
    return weights_of(model)


# accelerate


class Numbered(torch.utils.data.Dataset):
    def __init__(self, size=10):  # not a multiple of the global batch
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"pixel_values": images(1, seed=index)[0], "labels": index % 5, "index": index}


def train_with_accelerate(even_batches, accumulate=1, size=10):
    """Train for an epoch; return the images seen, the gathered outputs of the evaluation, and the weights."""
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(even_batches=even_batches),
    )
    model = lbp_wht().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Numbered(size), batch_size=BATCH))
    seen = []
    # accelerate's join_uneven_inputs does this on GPUs only.
    with contextlib.nullcontext() if even_batches else Join([wrapped]):
        for batch in loader:
            seen.append(batch.pop("index").tolist())
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    gathered = []
    for batch in accelerator.prepare(DataLoader(Numbered(size), batch_size=BATCH)) if even_batches else []:
        gathered += accelerator.gather_for_metrics(batch["index"]).tolist()
    accelerator.free_memory()
    return {
        "processes": accelerator.num_processes,
        "wrapped": type(wrapped).__name__,
        "seen": seen,
        "gathered": gathered,
        "weights": weights_of(model),
    }


def follow(seen_by_rank, accumulate=1):
    """Train one process on the batches that several processes saw."""
    model = lbp_wht().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    steps = max(len(seen) for seen in seen_by_rank)
    for step in range(steps):
        for seen in seen_by_rank:
            if step < len(seen):
                rows = [Numbered()[index] for index in seen[step]]
                x = torch.stack([row["pixel_values"] for row in rows])
                labels = torch.tensor([row["labels"] for row in rows])
                (model(x, labels=labels).loss / PROCESSES / accumulate).backward()
        if (step + 1) % accumulate == 0 or step == steps - 1:
            optimizer.step()
            optimizer.zero_grad()
    return weights_of(model)


# transformers' Trainer


TRAINED = {"LBP-WHT": lbp_wht, "on LoRA": stacked}


def train_with_trainer(build, folder):
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    settings = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "save_strategy": "no"}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4 // processes, max_steps=6, logging_steps=1, seed=0, report_to=[],
        use_cpu=True, disable_tqdm=True, label_names=["labels"], **settings,
    )  # fmt: skip
    model = build()
    trainer = Trainer(model, arguments, train_dataset=Numbered(12))
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"processes": trainer.accelerator.num_processes, "weights": weights_of(model), "losses": losses}


# Calibration


def calibrate_one(model, of_ranks):
    """Calibrate with these processes' batches; return the bases, and whether training goes on with them."""
    given = [{"pixel_values": images(3, seed=rank), "labels": torch.arange(3)} for rank in of_ranks]
    report = lbp_peft.calibrate(model, given)
    ranks = lbp_peft.allocate_ranks(model, given, memory="1x")
    projections = {
        name: torch.cat([one.double().t() @ one.double() if one.is_floating_point() else one for one in state.values()])
        for name, basis in report.bases.items()
        if (state := basis.state())
    }
    return {"batches": report.num_batches, "projections": projections, "cosines": ranks.cosines}


def calibrate_together():
    ranks = [torch.distributed.get_rank()] if torch.distributed.is_initialized() else range(PROCESSES)
    wrap = DistributedDataParallel if torch.distributed.is_initialized() else lambda model: model
    return {name: calibrate_one(wrap(lbp_wht(selection=name, r=4)), ranks) for name in ("lhe", "klt")}


def all_trials(folder):
    found = {trial.name: train_together(trial) for trial in TRIALS}
    return found | {
        "join": train_joined(),
        "calibration": calibrate_together(),
        "even": train_with_accelerate(True),
        "uneven": train_with_accelerate(False),
        "partial": train_with_accelerate(True, size=11),
        "partial and uneven": train_with_accelerate(False, size=11),
        "accumulate": train_with_accelerate(True, accumulate=2),
        **{f"Trainer, {name}": train_with_trainer(build, folder) for name, build in TRAINED.items()},
    }


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = shared_folder(tmp_path_factory, "data parallel")
    return on_processes_once(PROCESSES, functools.partial(all_trials, folder), folder)


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
@pytest.mark.filterwarnings(NO_GRID)
def test_two_processes_train_as_one(trial, together):
    expected = train_alone(trial)
    start = weights_of(trial.model())
    assert largest_difference(start, expected) > 1e-2  # so that equal results mean something
    for found in together:
        assert largest_difference(found[trial.name]["weights"], expected) < 1e-5
        assert found[trial.name]["low rank"] == trial.low_rank


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_the_gradients_of_trained_weights_are_all_that_is_sent(trial, together):
    trained = sum(p.nbytes for p in weights_of(trial.model()).values())
    for found in together:
        assert found[trial.name]["bytes"] == STEPS * trained
        assert not found[trial.name]["buffers"]  # which would be broadcast before every step


def test_processes_with_fewer_batches_join(together):
    expected = train_joined_alone()
    for found in together:
        assert largest_difference(found["join"], expected) < 1e-5


def test_processes_calibrate_as_one_does_by_all_batches(together):
    expected = calibrate_together()
    for name, alone in expected.items():
        for found in (run["calibration"][name] for run in together):
            assert found["batches"] == alone["batches"] == PROCESSES
            assert found["projections"].keys() == alone["projections"].keys()
            for layer, projection in alone["projections"].items():
                assert torch.allclose(found["projections"][layer], projection, atol=1e-3), layer
            assert found["cosines"] == pytest.approx(alone["cosines"], abs=1e-3)
        first, second = (run["calibration"][name]["projections"] for run in together)
        assert all(torch.equal(first[layer], second[layer]) for layer in first)


# Batches of each process, and images in the last of them.
SEEN = {"even": ([3, 3], [2, 2]), "uneven": ([3, 2], [2, 2]), "accumulate": ([3, 3], [2, 2])}
SEEN |= {"partial": ([3, 3], [2, 2]), "partial and uneven": ([3, 3], [2, 1])}


@pytest.mark.parametrize("name", SEEN)
def test_accelerate(name, together):
    runs = [found[name] for found in together]
    assert {run["processes"] for run in runs} == {PROCESSES}
    assert {run["wrapped"] for run in runs} == {"DistributedDataParallel"}
    seen = [run["seen"] for run in runs]
    assert ([len(batches) for batches in seen], [len(batches[-1]) for batches in seen]) == SEEN[name]
    expected = follow(seen, accumulate=2 if name == "accumulate" else 1)
    for run in runs:
        assert largest_difference(run["weights"], expected) < 1e-5
        if "uneven" not in name:
            assert run["gathered"] == list(
                range(11 if name == "partial" else 10)
            )  # what was added to fill up the last batch is dropped again


@pytest.mark.skipif(torch.accelerator.is_available(), reason="alone, the Trainer would take the device")
@pytest.mark.parametrize("name", TRAINED)
def test_the_trainer(name, together, tmp_path):
    alone = train_with_trainer(TRAINED[name], tmp_path)
    assert alone["processes"] == 1
    assert largest_difference(weights_of(TRAINED[name]()), alone["weights"]) > 1e-2
    for found in (each[f"Trainer, {name}"] for each in together):
        assert found["processes"] == PROCESSES
        assert largest_difference(found["weights"], alone["weights"]) < 1e-5
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4) and len(found["losses"]) == 6


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the trials run on the CPU, this would take the device")
def test_low_rank_gradients_differ_from_exact_ones():
    """The trials above would pass with any gradients that are averaged, so it is checked that these are low-rank."""
    exact = functools.partial(lbp_wht, r=64)
    differences = largest_difference(train_alone(Trial("", lbp_wht)), train_alone(Trial("", exact)))
    assert differences > 1e-3
    assert len(layout_report(lbp_wht()).layers) == 12
