"""Families of timm, one small random instance each, and where their tokens lie, as in `support/architectures.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from architectures import Elsewhere, Unrolled, spread
from torch import Tensor, nn


@dataclass(frozen=True)
class TimmArchitecture:
    """A model of timm.

    Attributes:
        name: The name for `timm.create_model`.
        settings: The settings that make it small.
        size: Height and width of the image.
        grids: See `Architecture`. Layers on images (N, C, H, W) need none.
    """

    name: str
    settings: dict[str, Any]
    size: int
    grids: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Build the model with random weights, in training mode."""
        import timm

        torch.manual_seed(0)
        model = timm.create_model(self.name, pretrained=False, num_classes=3, **self.settings)
        spread(model)
        return model.train()

    def batch(self) -> dict[str, Tensor]:
        """Two images, as the model's keyword arguments."""
        return {"x": torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))}


def _stages(size: int, pattern: str = r"stages\.{}\.") -> dict[str, Any]:
    return {pattern.format(i): (size // stride, size // stride) for i, stride in enumerate((4, 8, 16, 32))}


FOUR = {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 32)}
FLAT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 2)}
ATTENTION_MAPS = "attention maps"
# Of attention maps (N, queries, keys, heads), the queries of each key.
QUERIES_OF_MAPS = Elsewhere(8, 8, 0, lambda x: x.transpose(1, 2).flatten(0, 1))

ARCHITECTURES = [
    TimmArchitecture("beit_base_patch16_224", FLAT | {"img_size": 96}, 96, {"": (6, 6, 1)}),
    TimmArchitecture("cait_xxs24_224", FLAT | {"img_size": 128, "patch_size": 16}, 128, {
        "": (8, 8), r"proj_[lw]$": QUERIES_OF_MAPS, r"token_only.*attn\.[kv]$": (8, 8, 1)}),
    TimmArchitecture("convnext_tiny", FOUR, 96, _stages(96)),
    TimmArchitecture("convnextv2_atto", FOUR, 96, _stages(96)),
    TimmArchitecture("davit_tiny", {
        "depths": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (1, 2, 2, 2)}, 224,
        _stages(224) | {r"\.0\.0\.attn": (7, 7)}),
    TimmArchitecture("deit3_small_patch16_224", FLAT | {"img_size": 96}, 96, {"": (6, 6, 1)}),
    TimmArchitecture("deit_tiny_distilled_patch16_224", FLAT | {"img_size": 96}, 96, {"": (6, 6, 2)}),
    TimmArchitecture("edgenext_xx_small", {"depths": (1, 1, 2, 1)}, 128, _stages(128) | {
        "pos_embd": "made of the grid alone, not of the image"}),
    TimmArchitecture("efficientformer_l1", {"depths": (1, 1, 1, 2)}, 224, _stages(224)),
    TimmArchitecture("efficientformer_l7", {"depths": (1, 1, 1, 2), "num_vit": 1}, 224, _stages(224)),
    TimmArchitecture("efficientformerv2_s0", {"depths": (1, 1, 1, 2)}, 224, {"talking_head": ATTENTION_MAPS}),
    TimmArchitecture("efficientformerv2_l", {"depths": (1, 1, 1, 2), "img_size": 128}, 128, {
        "talking_head": ATTENTION_MAPS}),
    TimmArchitecture("eva_giant_patch14_224", FLAT | {"img_size": 112}, 112, {"": (8, 8, 1)}),
    TimmArchitecture("eva02_tiny_patch14_224", FLAT | {"img_size": 112}, 112, {"": (8, 8, 1)}),
    TimmArchitecture("fastvit_t8", {"layers": (1, 1, 1, 1)}, 128),
    TimmArchitecture("mobilevit_xxs", {}, 128, {
        r"stages\.2.*transformer": (8, 8), r"stages\.3.*transformer": (4, 4), r"stages\.4.*transformer": (2, 2)}),
    TimmArchitecture("poolformer_s12", {}, 96, _stages(96)),
    TimmArchitecture("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, 128, _stages(128) | {r"attn\.kv$": (4, 4)}),
    TimmArchitecture("repvit_m1", {"depth": (1, 1, 1, 1)}, 128),
    TimmArchitecture("resnet50", {"layers": (1, 1, 1, 1)}, 64),
    TimmArchitecture("samvit_base_patch16", {
        "img_size": 128, "depth": 2, "embed_dim": 64, "num_heads": 2, "global_attn_indexes": [1]}, 128, {
            "": (8, 8), r"blocks\.0\.attn": (14, 14)}),
    TimmArchitecture("swin_tiny_patch4_window7_224", SWIN, 224, _stages(224, r"layers\.{}\.") | {r"\.attn\.": (7, 7)}),
    TimmArchitecture("swinv2_tiny_window8_256", SWIN, 256, _stages(256, r"layers\.{}\.") | {r"\.attn\.": (8, 8)}),
    TimmArchitecture("vit_medium_patch16_reg4_gap_256", FLAT | {"img_size": 96}, 96, {"": (6, 6, 4)}),
    TimmArchitecture("vit_small_patch14_reg4_dinov2", FLAT | {"img_size": 112}, 112, {"": (8, 8, 5)}),
    TimmArchitecture("vit_tiny_patch16_224", FLAT | {"img_size": 96}, 96, {"": (6, 6, 1)}),
    TimmArchitecture("xcit_nano_12_p16_224", {"depth": 2, "img_size": 128}, 128, {
        "": (8, 8), r"cls_attn.*attn\.[kv]$": (8, 8, 1)}),
    # In another order, or along another axis
    TimmArchitecture("hiera_tiny_224", {"stages": (1, 1, 1, 1), "embed_dim": 32}, 224, {
        r"blocks\.0": Unrolled(56, 56, 3), r"blocks\.1": Unrolled(28, 28, 2), r"blocks\.2": Unrolled(14, 14, 1),
        r"blocks\.3": (7, 7), r"blocks\.1\.(proj|attn\.qkv)": Unrolled(56, 56, 3),
        r"blocks\.2\.(proj|attn\.qkv)": Unrolled(28, 28, 2), r"blocks\.3\.(proj|attn\.qkv)": Unrolled(14, 14, 1)}),
    TimmArchitecture("mixer_s32_224", {}, 224, {
        "": (7, 7), "mlp_tokens": "patches are the channels"}),
    TimmArchitecture("mobilevitv2_050", {}, 128, {
        r"\.transformer\.": "images unfolded to pixels of a patch by patches"}),
]  # fmt: skip
