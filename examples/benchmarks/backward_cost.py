"""Counts the multiply-adds of one image's backward pass through EfficientFormer-L1, by exact backpropagation, LoRA and
LBP-WHT.

    pip install ".[timm]"
    python examples/benchmarks/backward_cost.py

The paper's headline model (arXiv 2309.15275) in its two protocols: "partial" adapts the last stage and freezes the
rest, "full" adapts all stages. Every method adapts the same layers and trains the head.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.methods import lbp_wht, lora
from benchmarks.models import MODELS, efficientformer_l1
from benchmarks.tables import aligned, number
from lbp_peft.encoder import encoder_linears
from lbp_peft.environment import environment, in_words
from lbp_peft.measure import multiply_adds

MODEL = MODELS["efficientformer-l1"]
HEADS = list(MODEL.heads)
PROTOCOLS = {"partial (last stage)": r"stages\.3\.", "full": r"stages\."}
METHODS = ("exact", "LoRA", "LBP-WHT, paper", "LBP-WHT, grad_input_dtype=full")


def backward_macs(model: nn.Module, images: torch.Tensor, check: bool = False) -> int:
    """The multiply-adds of the backward pass, by the package's counter; those of an exact model can be checked."""
    with _BackwardByHand() as by_hand:
        logits = model(images)
    loss = sum(part.square().sum() for part in (logits if isinstance(logits, tuple) else [logits]))
    with multiply_adds() as backward:
        loss.backward(retain_graph=check)
    if check:
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops = counter.get_flop_counts()["Global"]
        products = sum(count for operator, count in flops.items() if operator not in by_hand.operators) // 2
        assert backward.total == products + by_hand.macs, (backward.total, products, by_hand.macs)
    return backward.total


class _BackwardByHand(TorchFunctionMode):
    """Counts the multiply-adds of the backward pass that PyTorch's counter gets wrong, from the shapes of forward
    calls.

    That counter ignores the groups of convolutions, and not every version knows the fused attention of CPUs.
    """

    operators = (
        torch.ops.aten.convolution_backward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is F.conv2d:  # every output value takes one filter, and so does each of its two gradients
            x, weight = args[:2]
            self.macs += output.numel() * weight[0].numel() * (x.requires_grad + weight.requires_grad)
        elif function is F.scaled_dot_product_attention and output.requires_grad:
            query, key, value = args[:3]
            scores = query.shape[:-1].numel() * key.shape[-2]
            self.macs += scores * (3 * query.shape[-1] + 2 * value.shape[-1])  # q k^T is computed again
        return output


def adapted(options: argparse.Namespace, method: str, part: str) -> nn.Module:
    torch.manual_seed(0)
    model = efficientformer_l1(MODEL.size, options.classes).train()
    targets = [name for name in encoder_linears(model) if re.search(part, name)]
    if method == "exact":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = bool(re.search(part, name)) or name.split(".")[0] in HEADS
        return model
    if method == "LoRA":
        return lora(model, HEADS, targets, {"r": options.lora_r})
    settings = {"grad_input_rank": options.r} if method == "LBP-WHT, paper" else {"grad_input_dtype": "full"}
    return lbp_wht(model, HEADS, {"r": options.r, "target_modules": targets} | settings).train()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--r", type=int, default=21, help="LBP-WHT: bases per block; 21 is the paper's LP_L1-6")
    parser.add_argument("--lora-r", type=int, default=8)
    parser.add_argument("--classes", type=int, default=100)
    options = parser.parse_args(arguments)
    images = torch.randn(2, 3, *MODEL.size)  # batch norms want more than one
    print(in_words(environment()))
    print(f"EfficientFormer-L1, {MODEL.size[0]} px, r={options.r}, LoRA r={options.lora_r}")
    rows = []
    for protocol, part in PROTOCOLS.items():
        macs = {
            method: backward_macs(adapted(options, method, part), images, check=method == "exact") / len(images)
            for method in METHODS
        }
        for method, own in macs.items():
            less = 2 * (macs["LoRA"] - own)
            rows.append([f"{protocol}: {method}", number(own / 1e6, 1), f"{less / 1e6:+.1f}"])
    print(aligned(["protocol: method", "M multiply-adds", "MFLOPs less than LoRA"], rows))


if __name__ == "__main__":
    main()
