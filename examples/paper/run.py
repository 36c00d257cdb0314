"""The paper's experiments, and the same comparison on a smaller scale: one command for each table.

    python examples/paper/run.py --table classification --model efficientformer_l1 --protocol partial \\
        --dataset cifar100 --methods full lora lora-without-mlps lp_l1-2 lp_l1-4 lp_l1-6 lp_l1-8

The recipe of a data set (recipes/*.yaml) says where its images are and how to train. Every option of
examples/image_classification.py and examples/semantic_segmentation.py that a recipe may hold can be given as a flag,
for example --train_files and --test_files for images in Parquet files of your own; --data names a folder. With
--trials N the learning rate and the rank of each method are first searched on validation images, N trials for each.
Every run writes a record, and --only-missing skips runs that have one. `report.py` makes tables and figures of records.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.methods import NotAvailable
from common.checkpoints import write_whole

from lbp_peft.loading.terminal import plain_messages
from paper import costs
from paper.bench import Bench
from paper.methods import METHODS, method_named
from paper.models import BACKBONES, PROTOCOLS, Backbone, backbone_named
from paper.recipe import TABLES, recipe
from paper.records import COSTS, Experiment
from paper.search import Setting, Trial, best, next_setting

RESULTS = Path(__file__).parent / "results"
SEARCH_SEED = 1000  # trials begin with another head, and see the images in another order, than what is tested


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    own, flags = parser().parse_known_args(arguments)
    if own.again and own.only_missing:
        raise SystemExit("--again replaces records and --only-missing keeps them: give one of the two")
    methods = {name: method_named(name) for name in own.methods}
    options = recipe(own.table, own.dataset, flags, own.data)
    if own.stage:
        backbone = Backbone(own.model, {"partial": own.stage, "full": ""})
    else:
        backbone = backbone_named(own.model)
    measures = own.peak or own.cost_rounds is not None
    cache = None if measures else own.cache
    bench = Bench(own.table, own.model, backbone, own.weights, own.protocol, options, cache)
    if own.peak:
        (name,) = methods
        print(json.dumps(costs.peak_of(bench, name)))
        return
    name = own.name or "-".join((Path(own.model).name, own.protocol, Path(own.dataset).stem))
    experiment = Experiment(own.output, own.table, name)
    if own.cost_rounds is not None:
        record = costs.costs(bench, list(methods), own.cost_rounds, without_methods(arguments))
        experiment.folder.mkdir(parents=True, exist_ok=True)
        write_whole(experiment.folder / COSTS, json.dumps(record, indent=1) + "\n")
        print(json.dumps(record["methods"], indent=1))
        return
    for method in methods:
        adapt(bench, experiment, method, own)


def adapt(bench: Bench, experiment: Experiment, name: str, own: argparse.Namespace) -> None:
    """All runs of one method that are missing: the trials of the search, then one for each seed."""
    method, start = METHODS[name], bench.options.learning_rate

    def score(run: str, setting: Setting, seed: int, scored: str) -> float:
        config = bench.config(name, setting, seed, scored)
        record = None if own.again else experiment.read(name, run, config)
        if record is not None and not own.only_missing:
            file = experiment.file(name, run)
            raise SystemExit(f"{file} is there: give --only-missing to go on, or --again to replace it")
        if record is None:
            record = {"config": config, **bench.run(method, setting, seed, scored)}
            experiment.write(name, run, record)
        shown = f"{setting.learning_rate:g}" + ("" if setting.rank is None else f", rank {setting.rank}")
        print(f"{name}: {run}, learning rate {shown}: {100 * record['score']:.2f} %")
        return float(record["score"])

    try:
        trials: list[Trial] = []
        for _ in range(own.trials):
            setting = next_setting(trials, start * method.scale, method.ranks)
            run = f"trial-lr={setting.learning_rate:g}-rank={setting.rank or 0}"
            trials.append(Trial(setting, score(run, setting, SEARCH_SEED, "validation")))
        chosen = best(trials) if trials else Setting(start, next(iter(method.ranks), None))
        for seed in bench.options.seeds:
            score(f"seed-{seed}", chosen, seed, "test")
    except NotAvailable as error:
        print(f"{name}: not available: {error}")


def without_methods(arguments: list[str]) -> list[str]:
    """The arguments without --methods and --cost-rounds and their values."""
    kept, dropped = [], False
    for argument in arguments:
        if argument.startswith("--"):
            dropped = argument.split("=")[0] in ("--methods", "--cost-rounds")
        if not dropped:
            kept.append(argument)
    return kept


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--table", choices=TABLES, default="classification")
    result.add_argument("--model", required=True, help=f"{', '.join(BACKBONES)}, or with --stage any model on the hub")
    result.add_argument("--weights", help="folder, or file of timm's weights (default: from the hub)")
    result.add_argument("--stage", help="regular expression of the layers that the partial protocol adapts")
    result.add_argument("--protocol", choices=PROTOCOLS, default="partial")
    result.add_argument("--dataset", required=True, help="a recipe: its name in recipes/, or a YAML file")
    result.add_argument("--data", help="folder or name on the hub, in the place of the recipe's")
    result.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    result.add_argument("--trials", type=int, default=0, help="of each method's search (default: 0, the recipe's rate)")
    result.add_argument("--cache", type=Path, help="compute the frozen part once, and keep its features in this folder")
    result.add_argument("--output", type=Path, default=RESULTS, help="folder of the records")
    result.add_argument("--name", help="of the experiment (default: model, protocol and data set)")
    result.add_argument("--only-missing", action="store_true", help="keep the records that are there")
    result.add_argument("--again", action="store_true", help="replace them")
    result.add_argument(
        "--cost-rounds", type=int, help="only measure so many steps, and the peak of each method (0: only the peak)"
    )
    result.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    return result


if __name__ == "__main__":
    with plain_messages(training=True):
        main()
