"""Lists what a training step saves for its backward pass, tensor by tensor.

    python examples/benchmarks/saved_tensors.py
    python examples/benchmarks/saved_tensors.py --methods full lbp-wht:compress_activations=all --bf16

Each row is for one class of modules, and one dtype and shape of the tensors that they save. It has the size of all such
tensors, and their share of what the first method saves. A storage that several modules save counts once, for the first
of them. Parameters and buffers do not count.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.methods import adapted, words
from benchmarks.models import MODELS, Batch, Model
from benchmarks.tables import aligned
from lbp_peft.environment import environment, in_words

METHODS = (
    "full", "lbp-wht:r=10", *(f"lbp-wht:r=10,compress_activations={w}" for w in ("activation/norm", "all")),
)  # fmt: skip
MIB = 2**20


def saved_tensors(model: nn.Module, kind: Model, batch: Batch, bf16: bool) -> Counter[tuple[str, str, str]]:
    """The bytes that are saved within the block, by the class of the module that is running, by dtype and by shape."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    running: list[str] = ["outside of modules"]
    seen: dict[int, torch.UntypedStorage] = {}
    found: Counter[tuple[str, str, str]] = Counter()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage
            key = running[-1], str(tensor.dtype).removeprefix("torch."), " x ".join(map(str, tensor.shape))
            found[key] += storage.nbytes()
        return tensor

    # Global hooks of this kind are not taken for any that could change what a layer computes.
    before = nn.modules.module.register_module_forward_pre_hook(lambda m, _: running.append(type(m).__name__))
    after = nn.modules.module.register_module_forward_hook(lambda m, *_: running.pop() and None, always_call=True)
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast(batch["pixel_values"].device.type, torch.bfloat16, enabled=bf16),
        ):
            kind.loss(model, batch)
    finally:
        before.remove()
        after.remove()
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="vit-b")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", default=list(METHODS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="everything under bf16 autocast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    for method in options.methods:
        try:
            words(method)
        except ValueError as error:
            parser.error(str(error))
    print(in_words(environment()))
    kind = MODELS[options.model]
    torch.manual_seed(0)
    base = kind.build(kind.size).to(options.device)
    batch = {name: t.to(options.device) for name, t in kind.batch(options.batch_size, kind.size).items()}
    reference = 0
    for method in options.methods:
        model = adapted(base, method, list(kind.heads)).train()
        kind.loss(model, batch)  # the first pass finds the positions of the tokens
        found = saved_tensors(model, kind, batch, options.bf16)
        total = sum(found.values())
        reference = reference or total
        print(f"\n{method}: {total / MIB:.1f} MiB, {total / reference:.3f} of {options.methods[0]}")
        lines = [[*key, f"{size / MIB:.1f}", f"{size / reference:.3f}"] for key, size in found.most_common()]
        print(aligned(["saved in", "dtype", "shape", "MiB", "share"], lines))


if __name__ == "__main__":
    main()
