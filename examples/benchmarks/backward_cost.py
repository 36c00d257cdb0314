"""Multiply-adds of one image's backward pass through EfficientFormer-L1, by exact backpropagation, LoRA and LBP-WHT.

    pip install ".[timm]"
    python examples/benchmarks/backward_cost.py

The paper's headline model (arXiv 2309.15275) in its two protocols: "partial" adapts the last stage and freezes the
rest, "full" adapts all stages. Every method adapts the same layers and trains the head.
"""

from __future__ import annotations

import argparse
import re

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lbp_peft import LBPWHTConfig
from lbp_peft.encoder import encoder_linears
from lbp_peft.measure import multiply_adds

HEADS = ["head", "head_dist"]
PROTOCOLS = {"partial (last stage)": r"stages\.3\.", "full": r"stages\."}


def backward_macs(model: nn.Module, images: torch.Tensor) -> int:
    """Multiply-adds of the backward pass, by the package's counter; checked against PyTorch's own."""

    def loss() -> torch.Tensor:
        logits = model(images)
        return sum(part.square().sum() for part in (logits if isinstance(logits, tuple) else [logits]))

    value = loss()
    with multiply_adds() as backward:
        value.backward()
    value = loss()
    with FlopCounterMode(display=False) as flops:
        value.backward()
    assert 2 * backward.total == flops.get_total_flops()
    return backward.total


def adapted(options: argparse.Namespace, method: str, part: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("efficientformer_l1", pretrained=False, num_classes=options.classes).train()
    targets = [name for name in encoder_linears(model) if re.search(part, name)]
    if method == "exact":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = bool(re.search(part, name)) or name.split(".")[0] in HEADS
        return model
    if method == "LoRA":
        return get_peft_model(model, LoraConfig(r=options.lora_r, target_modules=targets, modules_to_save=HEADS))
    rank, grad_input = options.r, options.r if method == "LBP-WHT, paper" else "full"
    config = LBPWHTConfig(r=rank, grad_input=grad_input, target_modules=targets, modules_to_save=HEADS)
    return get_peft_model(model, config).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, default=21, help="LBP-WHT: bases per block; 21 is the paper's LP_L1-6")
    parser.add_argument("--lora-r", type=int, default=8)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    images = torch.randn(2, 3, options.image_size, options.image_size)  # batch norms want more than one
    ranks = f"r={options.r}, LoRA r={options.lora_r}"
    print(f"EfficientFormer-L1, {options.image_size} px, {ranks}, torch {torch.__version__}, timm {timm.__version__}")
    for protocol, part in PROTOCOLS.items():
        millions = {}
        for method in ("exact", "LoRA", "LBP-WHT, paper", "LBP-WHT, grad_input=full"):
            millions[method] = backward_macs(adapted(options, method, part), images) / len(images) / 1e6
        for method, value in millions.items():
            less = 2 * (millions["LoRA"] - value)
            print(f"{protocol:22} {method:26} {value:9.1f} M multiply-adds, {less:+8.1f} MFLOPs less than LoRA")


if __name__ == "__main__":
    main()
