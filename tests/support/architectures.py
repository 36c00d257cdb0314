"""The vision architectures of transformers, one small random instance each, and where their tokens lie.

Grids are written down as they follow from the architecture: the image's size over the strides of its stages, and the
tokens that are put before and after the patches. `tests/models/test_architectures.py` checks them, and
`docs/models_table.py` makes the table in `docs/models.md` of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_timm_available

# The auto-model mappings whose model types are either checked or left out.
MAPPINGS = (
    "IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "INSTANCE_SEGMENTATION", "UNIVERSAL_SEGMENTATION",
    "IMAGE_SEGMENTATION", "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "DEPTH_ESTIMATION", "BACKBONE", "IMAGE",
    "MASKED_IMAGE_MODELING", "ZERO_SHOT_IMAGE_CLASSIFICATION", "MASK_GENERATION", "POSE_ESTIMATION", "IMAGE_MATTING",
    "IMAGE_TO_IMAGE",
)  # fmt: skip


@dataclass(frozen=True)
class Unrolled:
    """A grid whose tokens are cut into units of 2 x 2, `levels` times, and ordered by their place in a unit.

    Hiera (arXiv 2306.00989) does so, so that it can pool a unit by a maximum over a single axis.
    """

    height: int
    width: int
    levels: int

    def places(self) -> Tensor:
        """Of each token in turn, its place in the grid, row by row; shape (H * W,)."""
        places = torch.arange(self.height * self.width).view(1, self.height, self.width)
        for _ in range(self.levels):
            units = places.view(len(places), places.shape[1] // 2, 2, places.shape[2] // 2, 2)
            places = units.permute(0, 2, 4, 1, 3).flatten(0, 2)
        return places.flatten()


@dataclass(frozen=True)
class InWindows:
    """A grid whose tokens come window by window, row by row within each of them."""

    height: int
    width: int
    rows: int
    columns: int

    def places(self) -> Tensor:
        """Of each token in turn, its place in the grid, row by row; shape (H * W,)."""
        places = torch.arange(self.height * self.width)
        return places.view(self.rows, self.height // self.rows, self.columns, -1).transpose(1, 2).flatten()


@dataclass(frozen=True)
class Elsewhere:
    """A grid whose tokens do not lie along the second axis of an input.

    Attributes:
        height, width, before: The grid, and the tokens before it.
        tokens: A function that converts the input to (images, tokens, C).
    """

    height: int
    width: int
    before: int
    tokens: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OneAfterAnother:
    """Several grids, one after another along the tokens of an input (N, L, C), or (L, C).

    Attributes:
        parts: Each (H, W), (H, W, tokens before), (H, W, tokens before, tokens after), or `Elsewhere`.
    """

    parts: tuple

    def split(self, x: Tensor) -> list[Tensor]:
        """The tokens of each grid, (N, L, C)."""
        counts = [
            part.height * part.width + part.before if isinstance(part, Elsewhere) else part[0] * part[1] + sum(part[2:])
            for part in self.parts
        ]
        return list((x if x.dim() == 3 else x[None]).split(counts, dim=1))


@dataclass(frozen=True)
class Architecture:
    """A small model of one type, and the positions of the tokens of its adapted layers.

    Attributes:
        model_type: The name that transformers gives to the type.
        task: The auto class or the model's class that builds it.
        settings: The settings of the configuration; a dict with a "model_type" becomes a configuration itself.
        grids: {part of a layer's name: (H, W), (H, W, tokens before), (H, W, tokens before, tokens after),
            `Unrolled`, `InWindows`, `Elsewhere` or `OneAfterAnother`; or a reason for which the layer is exact. The
            last part that occurs in a name, as a regular expression, counts. Layers on images (N, C, H, W) need none:
            they are their own grid.
        image: (H, W) of the images.
        inputs: Makes the model's inputs of images (2, 3, H, W); None: they are its `pixel_values`.
        config_type: The configuration's model type, where it is not `model_type`.
        variant: What distinguishes it from others of the same type.
    """

    model_type: str
    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    grids: dict[str, Any] = field(default_factory=dict)
    image: tuple[int, int] = (64, 96)
    inputs: Callable[[Tensor], dict[str, Tensor]] | None = None
    config_type: str = ""
    variant: str = ""

    @property
    def name(self) -> str:
        return self.model_type + (f", {self.variant}" if self.variant else "")

    def why_not_here(self) -> str:
        """The reason why it cannot be built here; "" if it can."""
        if (self.config_type or self.model_type) not in CONFIG_MAPPING or not hasattr(transformers, self.task):
            return f"transformers {transformers.__version__} has no {self.model_type}"
        if self.model_type.startswith("timm_") and not is_timm_available():
            return "timm is not installed"
        if self.model_type == "llama4" and transformers.__version__.startswith("5.24."):
            return "transformers 5.24 reads a field that the output of its own Llama4 model does not have"
        return ""

    def build(self) -> nn.Module:
        """Build the model with random weights, in training mode and without dropout."""
        torch.manual_seed(0)
        config = CONFIG_MAPPING[self.config_type or self.model_type](**_with_configs(self.settings))
        config.num_labels, config.architectures = 3, []
        cls = getattr(transformers, self.task)
        model = cls.from_config(config) if self.task.startswith("Auto") else cls(config)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        spread(model)
        return model.train()

    def batch(self) -> dict[str, Tensor]:
        """Two images, as the model's keyword arguments."""
        x = torch.randn(2, 3, *self.image, generator=torch.Generator().manual_seed(1))
        return self.inputs(x) if self.inputs else {"pixel_values": x}


def mapped_types() -> set[str]:
    """The model types that the installed transformers has for the tasks of `MAPPINGS`."""
    return {kind for task in MAPPINGS for kind in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})}


def _with_configs(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: CONFIG_MAPPING[value["model_type"]](**_with_configs({k: v for k, v in value.items() if k != "model_type"}))
        if isinstance(value, dict) and "model_type" in value
        else value
        for key, value in settings.items()
    }


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Give weights the size that trained ones have, since gradients vanish through many layers of small weights."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=max(parameter[0].numel(), 1) ** -0.5)
        elif parameter.dim() == 1 and parameter.abs().max() < 1e-3:  # biases, scales of a layer's output
            parameter.normal_(std=0.1)


def _words(count: int, length: int = 5) -> Tensor:
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))


# Settings that many architectures share


FLAT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64,
    "patch_size": 8,
}  # fmt: skip
FOUR = FLAT | {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
STAGES = {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}
PYRAMID = {**STAGES, "num_attention_heads": [1, 2, 2, 2]}
SWIN = {
    "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "image_size": 64, "patch_size": 4,
    "drop_path_rate": 0.0,
}  # fmt: skip
SWIN_OF_FOUR = SWIN | {"model_type": "swin", "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2]}
ALL_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100,
    "max_position_embeddings": 16,
}  # fmt: skip
TWO_TOWERS = {"vision_config": FLAT, "text_config": TEXT}
RESNET = STAGES | {"model_type": "resnet", "embedding_size": 16, "out_features": ["stage4"]}
HGNET = {
    "model_type": "hgnet_v2", "embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "stem_channels": [3, 8, 16],
    "stage_in_channels": [16, 16, 32, 32], "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 32, 32, 32],
    "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
DETR = {
    "backbone_config": RESNET, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 7,
}  # fmt: skip
RT_DETR = {
    "backbone_config": HGNET, "encoder_hidden_dim": 32, "encoder_in_channels": [32, 32, 32], "encoder_ffn_dim": 64,
    "encoder_attention_heads": 2, "d_model": 32, "num_queries": 7, "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 64, "decoder_layers": 2, "decoder_attention_heads": 2, "hidden_expansion": 0.5,
    "num_denoising": 0,
}  # fmt: skip
RT_DETR_ON_RESNET = RT_DETR | {
    "backbone_config": STAGES | {"model_type": "rt_detr_resnet", "embedding_size": 16, "layer_type": "basic",
                                 "out_features": ["stage2", "stage3", "stage4"]},
}  # fmt: skip
LW_DETR = {
    "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2, "num_queries": 7, "group_detr": 1, "c2f_num_blocks": 1,
}  # fmt: skip
GROUNDING_DINO = {key: value for key, value in DETR.items() if key != "backbone_config"} | {
    "backbone_config": SWIN_OF_FOUR | {"out_indices": [2, 3, 4]}, "fusion_droppath": 0.0,
    "text_config": TEXT | {"model_type": "bert", "vocab_size": 1100},
}  # fmt: skip
MASKS = {
    "backbone_config": SWIN_OF_FOUR | ALL_STAGES, "hidden_dim": 32, "encoder_feedforward_dim": 32, "encoder_layers": 1,
    "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 32, "num_queries": 7,
}  # fmt: skip
DPT = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
ZOE = {
    "bottleneck_features": 8, "num_attractors": [2, 2, 2, 2], "bin_embedding_dim": 8, "num_relative_features": 8,
    "bin_configurations": [{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}],
}  # fmt: skip
OCR_BLOCK = {
    "reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0],
    "vertical_long_to_small_conv_longratio": [[7, 1], 1, [3, 0]],
    "vertical_long_to_small_conv_midratio": [[5, 1], 1, [2, 0]],
    "vertical_long_to_small_conv_shortratio": [[3, 1], 1, [1, 0]],
    "horizontal_small_to_long_conv_longratio": [[1, 7], 1, [0, 3]],
    "horizontal_small_to_long_conv_midratio": [[1, 5], 1, [0, 2]],
    "horizontal_small_to_long_conv_shortratio": [[1, 3], 1, [0, 1]],
    "symmetric_conv_long_longratio": [7, 1, 3], "symmetric_conv_long_midratio": [5, 1, 2],
    "symmetric_conv_long_shortratio": [3, 1, 1],
}  # fmt: skip
LCNET_V3 = {
    "stem_channels": 8, "conv_symmetric_num": 2, "divisor": 4, "block_configs": [
        [[3, 8, 8, 1, False]], [[3, 8, 16, 2, False]], [[3, 16, 16, 2, False]], [[3, 16, 32, 2, False]],
        [[5, 32, 32, 2, True]]],
}  # fmt: skip
LCNET_V4 = {
    "stem_channels": [3, 8, 16], "block_configs": [
        [[3, 16, 16, 1, True]], [[3, 16, 16, 2, False]], [[3, 16, 32, 2, False]], [[3, 32, 32, 2, True]]],
}  # fmt: skip
OCR = {"intraclass_block_config": OCR_BLOCK, "neck_out_channels": 32, "kernel_list": [3, 2, 2]}

# Grids that many architectures share. Images are 64 x 96 where no size is given.
QUERIES = "object queries"
# Of (images * patches, frames, C), the patches of a frame.
ONE_PATCH_OVER_TIME = Elsewhere(8, 8, 0, lambda x: x.unflatten(0, (-1, 64)).transpose(1, 2).flatten(0, 1))
TOKENS_FIRST = Elsewhere(8, 8, 1, lambda x: x.transpose(0, 1))
SCALES = "tokens of several scales one after another"
SINGLE = "a single token"
SQUARE, SQUARE_CLS, WIDE, WIDE_CLS = {"": (8, 8)}, {"": (8, 8, 1)}, {"": (8, 12)}, {"": (8, 12, 1)}
S4, S8, S16, S32 = (16, 24), (8, 12), (4, 6), (2, 3)  # by stride
WINDOW = (4, 4)


def _stages(pattern: str, grids: tuple = (S4, S8, S16, S32)) -> dict[str, Any]:
    return {pattern.format(i): grid for i, grid in enumerate(grids)}


def _swin(grids: tuple = (S4, S8, S16, S32)) -> dict[str, Any]:
    merged = {rf"layers\.{i}\.downsample": grid for i, grid in enumerate(grids[1:])}
    return _stages(r"layers\.{}\.blocks", grids) | merged | {r"blocks\.\d+\.attention\.": WINDOW}


DECODER = {r"decoder\.layers": QUERIES, r"decoder\.bbox_embed": QUERIES}
DETR_GRIDS = {r"encoder\.layers": S32} | DECODER | {r"decoder.*encoder_attn\.(k|v)(_content|_pos)?_proj": S32}
RT_DETR_GRIDS = {r"encoder\.aifi": S32} | DECODER | {r"decoder.*encoder_attn\.value_proj": SCALES}
DEFORMABLE_GRIDS = (
    {r"encoder\.layers": OneAfterAnother(((4, 6), (2, 3)))} | DECODER | {r"decoder.*attn\.value_proj": SCALES}
)
MASK_GRIDS = _swin() | {r"pixel_level_module\.decoder\.encoder": SCALES}

ARCHITECTURES = [
    # Plain transformers
    Architecture("aimv2_vision_model", "AutoModel", FLAT, SQUARE, (64, 64)),
    Architecture("beit", "AutoModelForImageClassification", FLAT | {"use_relative_position_bias": True}, SQUARE_CLS,
                 (64, 64)),
    Architecture("data2vec-vision", "AutoModelForImageClassification", FLAT, SQUARE_CLS, (64, 64)),
    Architecture("deit", "AutoModelForImageClassification", FLAT, {"": (8, 8, 2)}, (64, 64)),
    Architecture("deit", "AutoModelForMaskedImageModeling", FLAT, {"": (8, 8, 2)}, (64, 64), variant="masked"),
    Architecture("dinov2", "AutoModelForImageClassification", FLAT, WIDE_CLS),
    Architecture("dinov2_with_registers", "AutoModelForImageClassification", FLAT, {"": (8, 12, 5)}),
    Architecture("dinov3_vit", "AutoModel", FLAT | {"num_register_tokens": 4}, {"": (8, 12, 5)}),
    Architecture("ijepa", "AutoModelForImageClassification", FLAT, SQUARE, (64, 64)),
    Architecture("mlcd", "AutoModel", FLAT,
                 SQUARE_CLS | {"out_proj": TOKENS_FIRST}, (64, 64), config_type="mlcd_vision_model"),
    Architecture("mlcd_vision_model", "AutoModel", FLAT, SQUARE_CLS | {"out_proj": TOKENS_FIRST}, (64, 64)),
    Architecture("pixio", "AutoBackbone", FLAT | {"n_cls_tokens": 8}, {"": (8, 8, 8)}, (64, 64)),
    Architecture("sapiens2", "AutoBackbone", FLAT | {"num_register_tokens": 8}, {"": (8, 8, 9)}, (64, 64)),
    Architecture("siglip_vision_model", "AutoModel", FLAT, SQUARE, (64, 64)),
    Architecture("tipsv2_vision_model", "AutoModel", FLAT, {"": (8, 8, 2)}, (64, 64)),
    Architecture("vit", "AutoModelForImageClassification", FLAT | {"image_size": [64, 96]}, WIDE_CLS),
    Architecture("vit", "AutoModelForMaskedImageModeling", FLAT, SQUARE_CLS, (64, 64), variant="masked"),
    Architecture("vit_mae", "AutoModel", FLAT, {"": "a random quarter of the patches"}, (64, 64)),
    Architecture("vit_msn", "AutoModelForImageClassification", FLAT, SQUARE_CLS, (64, 64)),
    Architecture("vitpose_backbone", "AutoBackbone", FLAT | {"image_size": [64, 96], "patch_size": [8, 8]}, WIDE),
    # Vision towers
    Architecture("altclip", "AutoModelForZeroShotImageClassification", TWO_TOWERS, SQUARE_CLS, (64, 64),
                 lambda x: {"pixel_values": x, "input_ids": _words(2)}),
    Architecture("blip", "AutoModelForZeroShotImageClassification", TWO_TOWERS, SQUARE_CLS, (64, 64),
                 lambda x: {"pixel_values": x, "input_ids": _words(2)}),
    Architecture("chinese_clip", "AutoModelForZeroShotImageClassification", TWO_TOWERS, SQUARE_CLS, (64, 64),
                 lambda x: {"pixel_values": x, "input_ids": _words(2)}),
    Architecture("clip", "AutoModelForImageClassification", TWO_TOWERS, SQUARE_CLS, (64, 64)),
    Architecture("clip", "AutoModelForZeroShotImageClassification", TWO_TOWERS, SQUARE_CLS, (64, 64),
                 lambda x: {"pixel_values": x, "input_ids": _words(2)}, variant="both towers"),
    Architecture("clipseg", "AutoModelForZeroShotImageClassification", TWO_TOWERS, SQUARE_CLS, (64, 64),
                 lambda x: {"pixel_values": x, "input_ids": _words(2)}),
    Architecture("metaclip_2", "AutoModelForImageClassification", TWO_TOWERS, SQUARE_CLS, (64, 64)),
    Architecture("siglip", "AutoModelForImageClassification", TWO_TOWERS, SQUARE, (64, 64)),
    Architecture("siglip2", "AutoModelForImageClassification", {
        "vision_config": {key: value for key, value in FLAT.items() if key != "image_size"} | {"num_patches": 64},
        "text_config": TEXT}, {"": (8, 8)}, (64, 64), lambda x: {
            "pixel_values": x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(2, 64, 192),
            "pixel_attention_mask": torch.ones(2, 64, dtype=torch.long),
            "spatial_shapes": torch.tensor([[8, 8], [8, 8]])}),
    Architecture("tipsv2", "AutoBackbone", {"vision_config": FLAT, "text_config": TEXT}, {"": (8, 8, 2)}, (64, 64)),
    Architecture("cohere2_vision", "AutoModel", {
        "vision_config": FLAT | {"model_type": "siglip_vision_model"},
        "text_config": TEXT | {"model_type": "cohere2", "num_key_value_heads": 2, "head_dim": 16},
        "image_token_id": 99, "alignment_intermediate_size": 64}, SQUARE, (64, 64),
        lambda x: {"pixel_values": x, "input_ids": torch.cat([torch.full((2, 16), 99), _words(2)], 1)}),
    Architecture("shieldgemma2", "AutoModelForImageClassification", {
        "vision_config": FLAT | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "text_config": TEXT | {"model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 16},
        "mm_tokens_per_image": 16, "image_token_index": 99, "boi_token_index": 98, "eoi_token_index": 97,
        "yes_token_index": 5, "no_token_index": 6}, SQUARE, (64, 64), lambda x: {
            "pixel_values": x, "input_ids": torch.cat([torch.full((2, 16), 99), _words(2)], 1),
            "attention_mask": torch.ones(2, 21, dtype=torch.long)}),
    Architecture("llama4", "Llama4VisionModel", FLAT | {
        "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128},
        {"": (8, 8, 0, 1)}, (64, 64), config_type="llama4_vision_model"),
    Architecture("mllama", "MllamaVisionModel", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "intermediate_size": 64, "image_size": 64, "patch_size": 8, "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0], "vision_output_dim": 64},
        {"": (8, 8, 1, 7)}, (64, 64), lambda x: {
            "pixel_values": x[:, None, None], "aspect_ratio_ids": torch.tensor([[1], [1]]),
            "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long)}, config_type="mllama_vision_model"),
    Architecture("align", "AutoModelForZeroShotImageClassification", {
        "vision_config": {"depth_coefficient": 0.1, "width_coefficient": 0.5, "hidden_dim": 160, "image_size": 64},
        "text_config": TEXT, "projection_dim": 160}, inputs=lambda x: {"pixel_values": x, "input_ids": _words(2)}),
    Architecture("blip-2", "AutoModelForZeroShotImageClassification", {
        "vision_config": FLAT, "qformer_config": TEXT | {"encoder_hidden_size": 32, "use_qformer_text_input": True},
        "text_config": TEXT | {"model_type": "opt"}, "num_query_tokens": 4, "image_text_hidden_size": 16},
        SQUARE_CLS | {"qformer": (1, 5), r"qformer.*crossattention.*\.(key|value)$": (8, 8, 1)}, (64, 64),
        lambda x: {"pixel_values": x, "input_ids": _words(2)}),
    # Windows
    Architecture("donut-swin", "AutoModelForImageClassification", SWIN, _swin((S4, S8))),
    Architecture("lw_detr_vit", "AutoBackbone", FLAT | {"num_windows": 4, "window_block_indices": [0]},
                 {r"layer\.0": (4, 6), r"layer\.1\.": InWindows(8, 12, 2, 2), "intermediate": (4, 6)}),
    Architecture("maskformer-swin", "AutoBackbone", SWIN, _swin((S4, S8))),
    Architecture("rf_detr_dinov2", "AutoBackbone", FLAT | {"num_windows": 2, "window_block_indexes": [0]},
                 {"": (4, 4, 1), r"layer\.1\.attention": OneAfterAnother(((4, 4, 1),) * 4)}, (64, 64)),
    Architecture("swin", "AutoModelForImageClassification", SWIN, _swin((S4, S8))),
    Architecture("swin", "AutoModelForMaskedImageModeling", SWIN, _swin(((16, 16), (8, 8))), (64, 64),
                 variant="masked"),
    Architecture("swin2sr", "AutoModelForImageToImage", SWIN | {
        "depths": [2], "num_heads": [2], "image_size": 16, "patch_size": 1},
        {"": (16, 24), r"\.attention\.": WINDOW}, (16, 24)),
    Architecture("swinv2", "AutoModelForImageClassification", SWIN, _swin((S4, S8))),
    Architecture("vitdet", "AutoBackbone", FLAT | {"window_size": 4, "window_block_indices": [0]},
                 SQUARE | {r"layer\.0\.attention": WINDOW}, (64, 64)),
    Architecture("sam", "AutoModelForMaskGeneration", {
        "vision_config": FLAT | {"window_size": 4, "global_attn_indexes": [1], "output_channels": 16, "mlp_dim": 64,
                                 "num_pos_feats": 8},
        "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
                                "num_hidden_layers": 1}},
        SQUARE | {r"layers\.0\.attn": WINDOW}, (64, 64),
        lambda x: {"pixel_values": x, "input_points": torch.tensor([[[[9.0, 20.0]]], [[[50.0, 33.0]]]])}),
    Architecture("sam_hq", "AutoModelForMaskGeneration", {
        "vision_config": FLAT | {"window_size": 4, "global_attn_indexes": [0], "output_channels": 16, "mlp_dim": 64,
                                 "num_pos_feats": 8},
        "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
                                "num_hidden_layers": 1, "vit_dim": 32}},
        SQUARE | {r"layers\.1\.attn": WINDOW, "mask_decoder": "tokens of prompts"}, (64, 64),
        lambda x: {"pixel_values": x, "input_points": torch.tensor([[[[9.0, 20.0]]], [[[50.0, 33.0]]]])}),
    # Pyramids
    Architecture("cvt", "AutoModelForImageClassification", {
        "embed_dim": [16, 32, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 2], "drop_path_rate": [0.0] * 3},
        _stages(r"stages\.{}\.", (S4, S8, (*S16, 1)))
        | _stages(r"stages\.{}\..*projection_(key|value)", (S8, S16, (*S32, 1)))),
    Architecture("focalnet", "AutoModelForImageClassification", {
        "embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3], "image_size": 64,
        "patch_size": 4, "drop_path_rate": 0.0}, _stages(r"stages\.{}\.", (S4, S8))),
    Architecture("hiera", "AutoModelForImageClassification", {
        "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "image_size": [64, 64],
        "masked_unit_size": [8, 8], "query_stride": [2, 2], "num_query_pool": 2},
        {r"stages\.0": Unrolled(16, 16, 2), r"stages\.1": Unrolled(8, 8, 1), r"stages\.2": (4, 4),
         r"stages\.1\.layers\.0\.(proj|attn\.qkv)": Unrolled(16, 16, 2),
         r"stages\.2\.layers\.0\.(proj|attn\.qkv)": Unrolled(8, 8, 1)}, (64, 64)),
    Architecture("levit", "AutoModelForImageClassification", {
        "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 3], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
        "image_size": 128, "drop_path_rate": 0}, {
            r"stages\.0": (8, 8), r"stages\.1": (4, 4), r"stages\.2": (2, 2),
            r"stages\.0\.layers\.([34]|2\.(queries|projection))": (4, 4),
            r"stages\.1\.layers\.([34]|2\.(queries|projection))": (2, 2)}, (128, 128)),
    Architecture("pvt", "AutoModelForImageClassification", PYRAMID | {"image_size": 64, "drop_path_rate": 0.0},
                 _stages(r"block\.{}\.", ((16, 16), (8, 8), (4, 4), (2, 2)))
                 | {r"\b(key|value|[kv]_proj)$": (2, 2), r"block\.3\.\d": (2, 2, 1)}, (64, 64)),
    Architecture("pvt_v2", "AutoModelForImageClassification", PYRAMID,
                 _stages(r"encoder\.layers\.{}\.") | {r"\b(key|value|[kv]_proj)$": S32}),
    Architecture("segformer", "AutoModelForImageClassification", PYRAMID,
                 _stages(r"\b(block|stages)\.{}\.") | {r"\b(key|value|[kv]_proj)$": S32}),
    Architecture("segformer", "AutoModelForSemanticSegmentation", PYRAMID | {"decoder_hidden_size": 16},
                 _stages(r"\b(block|stages)\.{}\.") | {r"\b(key|value|[kv]_proj)$": S32}, variant="segmentation"),
    # Hybrids and convolutional networks
    Architecture("convnext", "AutoModelForImageClassification", STAGES, _stages(r"stages\.{}\.")),
    Architecture("convnextv2", "AutoModelForImageClassification", STAGES, _stages(r"stages\.{}\.")),
    Architecture("dinov3_convnext", "AutoBackbone", STAGES, _stages(r"stages\.{}\.")),
    Architecture("efficientnet", "AutoModel", {
        "depth_coefficient": 0.1, "width_coefficient": 0.5, "hidden_dim": 640, "drop_connect_rate": 0.0}),
    Architecture("hgnet_v2", "AutoBackbone", {key: value for key, value in HGNET.items() if key != "model_type"}),
    Architecture("mobilenet_v1", "AutoModelForImageClassification", {"depth_multiplier": 0.25}),
    Architecture("mobilenet_v2", "AutoModelForImageClassification", {"depth_multiplier": 0.35}),
    Architecture("mobilevit", "AutoModel", {
        "image_size": 128, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]}, {
            r"layer\.2\.transformer": (4, 8), r"layer\.3\.transformer": (2, 4), r"layer\.4\.transformer": (1, 2)},
        (64, 128)),
    Architecture("mobilevitv2", "AutoModelForImageClassification", {
        "image_size": 64, "base_attn_unit_dims": [16, 24, 32], "n_attn_blocks": [1, 1, 1]},
        {r"\.transformer\.": "images unfolded to pixels of a patch by patches"}, (64, 64)),
    Architecture("poolformer", "AutoModelForImageClassification", STAGES | {"drop_path_rate": 0.0}),
    Architecture("pp_lcnet", "AutoModelForImageClassification", {"scale": 0.25}),
    Architecture("pp_lcnet_v3", "AutoBackbone", LCNET_V3),
    Architecture("pp_lcnet_v4", "AutoBackbone", LCNET_V4),
    Architecture("regnet", "AutoModelForImageClassification", STAGES | {"embedding_size": 16, "groups_width": 8}),
    Architecture("resnet", "AutoModelForImageClassification", STAGES | {"embedding_size": 16}),
    Architecture("rt_detr_resnet", "AutoBackbone", STAGES | {"embedding_size": 16}),
    Architecture("swiftformer", "AutoModelForImageClassification", {
        "embed_dims": [16, 16, 32, 32], "depths": [2, 2, 2, 2], "drop_path_rate": 0.0}, {
            r"network\.0": S4, r"network\.2": S8, r"network\.4": S16, r"network\.6": S32}),
    Architecture("textnet", "AutoBackbone", {
        "hidden_sizes": [8, 8, 16, 16, 16], "stem_out_channels": 8}),
    # Depth and pose
    Architecture("chmv2", "AutoModelForDepthEstimation", {
        "backbone_config": FOUR | {"model_type": "dinov3_vit", "reshape_hidden_states": True,
                                   "return_class_token": True},
        "post_process_channels": [8, 8, 8, 8], "fusion_hidden_size": 8, "head_hidden_size": 8,
        "number_output_channels": 8, "patch_size": 8}, {"": (8, 12, 1), "readout_projects": (8, 12)}),
    Architecture("depth_anything", "AutoModelForDepthEstimation", DPT | {
        "backbone_config": FOUR | {"model_type": "dinov2"}, "reassemble_hidden_size": 32, "patch_size": 8,
        "head_hidden_size": 8}, WIDE_CLS),
    Architecture("depth_pro", "AutoModelForDepthEstimation", {
        "patch_size": 16, "fusion_hidden_size": 8, "intermediate_hook_ids": [1, 0], "intermediate_feature_dims": [8, 8],
        "scaled_images_ratios": [0.5, 1.0], "scaled_images_overlap_ratios": [0.0, 0.25],
        "scaled_images_feature_dims": [8, 8]} | {
            key: FLAT | {"model_type": "dinov2", "image_size": 16, "patch_size": 4}
            for key in ("image_model_config", "patch_model_config", "fov_model_config")}, {"": (4, 4, 1)}, (64, 64)),
    Architecture("dpt", "AutoModelForDepthEstimation",
                 FLAT | DPT | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}, SQUARE_CLS, (64, 64)),
    Architecture("dpt", "AutoModelForSemanticSegmentation",
                 FLAT | DPT | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}, SQUARE_CLS, (64, 64),
                 variant="segmentation"),
    Architecture("glpn", "AutoModelForDepthEstimation", PYRAMID | {"decoder_hidden_size": 16, "drop_path_rate": 0.0},
                 _stages(r"\b(block|stages)\.{}\.") | {r"\b(key|value|[kv]_proj)$": S32}),
    Architecture("prompt_depth_anything", "AutoModelForDepthEstimation", DPT | {
        "backbone_config": FOUR | {"model_type": "dinov2"}, "reassemble_hidden_size": 32, "patch_size": 8,
        "head_hidden_size": 8}, WIDE_CLS, inputs=lambda x: {"pixel_values": x, "prompt_depth": x[:, :1, ::8, ::8]}),
    Architecture("tipsv2_dpt", "AutoModelForDepthEstimation", DPT | {
        "backbone_config": FOUR | {"model_type": "tipsv2_vision_model"}, "num_depth_bins": 8}, {"": (8, 8, 2)},
        (64, 64)),
    Architecture("zoedepth", "AutoModelForDepthEstimation", DPT | ZOE | {
        "backbone_config": FOUR | {"model_type": "beit", "use_relative_position_bias": True}},
        {"": (8, 8, 1), "readout_projects": (8, 8)}, (64, 64)),
    Architecture("vitpose", "AutoModelForPoseEstimation", {
        "backbone_config": FLAT | {"model_type": "vitpose_backbone", "image_size": [64, 96], "patch_size": [8, 8],
                                   "out_indices": [2]}}, WIDE),
    # Segmentation and matting
    Architecture("eomt", "AutoModelForUniversalSegmentation",
                 FLAT | {"num_blocks": 1, "num_queries": 6, "mlp_ratio": 2},
                 {r"layers\.0": (8, 8, 5), r"layers\.1": (8, 8, 11)}, (64, 64)),
    Architecture("eomt_dinov3", "AutoModelForUniversalSegmentation", FLAT | {"num_blocks": 1, "num_queries": 6},
                 {r"layers\.0": (8, 8, 5), r"layers\.1": (8, 8, 11)}, (64, 64)),
    Architecture("mask2former", "AutoModelForUniversalSegmentation",
                 MASKS | {"feature_size": 32, "mask_feature_size": 32}, MASK_GRIDS),
    Architecture("maskformer", "AutoModelForInstanceSegmentation", {
        "backbone_config": SWIN_OF_FOUR | ALL_STAGES, "fpn_feature_size": 32, "mask_feature_size": 32,
        "decoder_config": {"model_type": "detr", "d_model": 32, "decoder_layers": 1, "encoder_layers": 1,
                           "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "num_queries": 7}}, _swin() | {
            r"transformer_module\.decoder": QUERIES, r"transformer_module.*encoder_attn\.[kv]_proj": S32}),
    Architecture("oneformer", "AutoModelForUniversalSegmentation", MASKS | {
        "text_encoder_width": 32, "text_encoder_context_length": 8, "text_encoder_num_layers": 1,
        "text_encoder_vocab_size": 99, "text_encoder_n_ctx": 2, "conv_dim": 32, "mask_dim": 32, "query_dec_layers": 1,
        "task_seq_len": 8}, MASK_GRIDS | {"transformer_module": QUERIES},
        inputs=lambda x: {"pixel_values": x, "task_inputs": _words(2, 8)}),
    Architecture("upernet", "AutoModelForSemanticSegmentation", {
        "backbone_config": STAGES | ALL_STAGES | {"model_type": "convnext"}, "hidden_size": 16,
        "auxiliary_in_channels": 32}, _stages(r"stages\.{}\.")),
    Architecture("videomt", "AutoModelForUniversalSegmentation",
                 FLAT | {"num_blocks": 1, "num_queries": 6, "mlp_ratio": 2},
                 {r"layers\.0": (8, 8, 5), r"layers\.1": (8, 8, 11)}, (64, 64),
                 lambda x: {"pixel_values_videos": x[None]}),
    Architecture("vitmatte", "AutoModelForImageMatting", {
        "backbone_config": FLAT | {"model_type": "vitdet", "num_channels": 4, "patch_size": 16,
                                   "out_features": ["stage2"]},
        "hidden_size": 32, "convstream_hidden_sizes": [4, 4, 4], "fusion_hidden_sizes": [4, 4, 4, 4]},
        {"": (4, 6)}, inputs=lambda x: {"pixel_values": torch.cat([x, x[:, :1]], 1)}),
    # Detection
    Architecture("conditional_detr", "AutoModelForObjectDetection", DETR, DETR_GRIDS),
    Architecture("d_fine", "AutoModelForObjectDetection", RT_DETR, RT_DETR_GRIDS),
    Architecture("dab-detr", "AutoModelForObjectDetection",
                 {key: value for key, value in DETR.items() if key != "d_model"} | {"hidden_size": 32}, DETR_GRIDS),
    Architecture("deformable_detr", "AutoModelForObjectDetection", DETR | {
        "backbone_config": RESNET | {"out_features": ["stage3", "stage4"]}, "num_feature_levels": 2},
        DEFORMABLE_GRIDS),
    Architecture("deimv2", "AutoModelForObjectDetection", RT_DETR, RT_DETR_GRIDS),
    Architecture("detr", "AutoModelForObjectDetection", DETR, DETR_GRIDS),
    Architecture("detr", "AutoModelForObjectDetection", DETR | {"num_queries": 6}, DETR_GRIDS,
                 variant="as many queries as patches"),
    Architecture("grounding-dino", "AutoModelForZeroShotObjectDetection", GROUNDING_DINO,
                 DEFORMABLE_GRIDS | _swin() | {"text_enhancer": (1, 5)},
                 inputs=lambda x: {"pixel_values": x, "input_ids": torch.tensor([[101, 5, 6, 1012, 102]] * 2)}),
    Architecture("mm-grounding-dino", "AutoModelForZeroShotObjectDetection", GROUNDING_DINO,
                 DEFORMABLE_GRIDS | _swin() | {"text_enhancer": (1, 5)},
                 inputs=lambda x: {"pixel_values": x, "input_ids": torch.tensor([[101, 5, 6, 1012, 102]] * 2)}),
    Architecture("lw_detr", "AutoModelForObjectDetection", LW_DETR | {
        "backbone_config": FLAT | {"model_type": "lw_detr_vit", "num_windows": 4, "window_block_indices": [0],
                                   "out_features": ["stage2"]},
        "projector_scale_factors": [1.0], "projector_out_channels": 32}, {
            r"encoder\.layer\.0": (4, 6), r"encoder\.layer\.1\.": InWindows(8, 12, 2, 2), "intermediate": (4, 6),
            "enc_out_bbox_embed": (8, 12)} | DECODER | {r"cross_attn\.value_proj": (8, 12)}),
    Architecture("owlv2", "AutoModelForZeroShotObjectDetection", TWO_TOWERS | {"projection_dim": 32}, SQUARE_CLS,
                 (64, 64), lambda x: {"pixel_values": x, "input_ids": _words(4)}),
    Architecture("owlvit", "AutoModelForZeroShotObjectDetection", TWO_TOWERS | {"projection_dim": 32}, SQUARE_CLS,
                 (64, 64), lambda x: {"pixel_values": x, "input_ids": _words(4)}),
    Architecture("pp_doclayout_v2", "AutoModelForObjectDetection",
                 RT_DETR | {
        "class_thresholds": [0.5] * 3, "class_order": [0, 1, 2], "reading_order_config": {
            "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1,
            "max_position_embeddings": 64, "max_2d_position_embeddings": 1024, "coordinate_size": 6, "shape_size": 4}},
        RT_DETR_GRIDS),
    Architecture("pp_doclayout_v3", "AutoModelForObjectDetection", RT_DETR | {
        "x4_feat_dim": 16, "backbone_config": HGNET | ALL_STAGES}, RT_DETR_GRIDS),
    Architecture("pp_doclayout_v4", "AutoModelForObjectDetection",
                 {key: value for key, value in RT_DETR.items() if key != "d_model"} | {"hidden_size": 32},
                 RT_DETR_GRIDS),
    Architecture("pp_ocrv5_mobile_det", "AutoModelForObjectDetection", {
        "backbone_config": LCNET_V3 | {"model_type": "pp_lcnet_v3", "out_features": [
            "stage2", "stage3", "stage4", "stage5"]}, "neck_out_channels": 16,
        "layer_list_out_channels": [16, 16, 32, 32]}),
    Architecture("pp_ocrv5_server_det", "AutoModelForObjectDetection", OCR | {
        "backbone_config": HGNET | ALL_STAGES, "scale_factor_list": [1, 2, 4, 8]}),
    Architecture("pp_ocrv6_medium_det", "AutoModelForObjectDetection", OCR | {
        "backbone_config": LCNET_V4 | ALL_STAGES | {"model_type": "pp_lcnet_v4"}, "scale_factor_list": [1, 2, 4, 8]}),
    Architecture("pp_ocrv6_small_det", "AutoModelForObjectDetection", {
        "backbone_config": LCNET_V4 | ALL_STAGES | {"model_type": "pp_lcnet_v4"}, "neck_out_channels": 16,
        "layer_list_out_channels": [16, 16, 32, 32]}),
    Architecture("rf_detr", "AutoModelForObjectDetection", LW_DETR | {
        "backbone_config": FLAT | {"model_type": "rf_detr_dinov2", "num_windows": 2, "window_block_indexes": [0],
                                   "out_features": ["stage2"]}, "intermediate_size": 32}, {
            r"encoder\.layer": (4, 4, 1), r"encoder\.layer\.1\.attention": OneAfterAnother(((4, 4, 1),) * 4),
            "enc_out_bbox_embed": (8, 8)} | DECODER | {r"cross_attn\.value_proj": (8, 8)}, (64, 64)),
    Architecture("rt_detr", "AutoModelForObjectDetection", RT_DETR_ON_RESNET, RT_DETR_GRIDS),
    Architecture("rt_detr_v2", "AutoModelForObjectDetection", RT_DETR_ON_RESNET, RT_DETR_GRIDS),
    Architecture("table-transformer", "AutoModelForObjectDetection", DETR, DETR_GRIDS),
    Architecture("yolos", "AutoModelForObjectDetection", FLAT | {
        "image_size": [64, 96], "num_detection_tokens": 7, "use_mid_position_embeddings": False},
        {"": (8, 12, 1, 7)}),
    # timm's
    Architecture("timm_backbone", "AutoBackbone", {"backbone": "test_vit"}, {"": (10, 10, 1)}, (160, 160)),
    Architecture("timm_wrapper", "AutoModelForImageClassification", {
        "architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 96, "depth": 2, "embed_dim": 48}},
        {"": (6, 6, 1)}, (96, 96)),
    Architecture("timm_wrapper", "AutoModel", {
        "architecture": "convnext_atto", "model_args": {"depths": [1, 1, 1, 1], "dims": [16, 32, 32, 32]}},
        image=(64, 96), variant="ConvNeXt"),
    # Not on patches
    Architecture("imagegpt", "AutoModelForImageClassification", {
        "vocab_size": 33, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}, {"": (1, 64)}, (8, 8),
        lambda x: {"input_ids": _words(2, 64) % 32}),
    Architecture("perceiver", "AutoModelForImageClassification", {
        "num_latents": 4, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2, "num_cross_attention_heads": 1, "image_size": 16}, {"": "latent vectors"},
        (16, 16), lambda x: {"inputs": x}),
    # Video
    Architecture("timesformer", "AutoModel", FLAT | {"num_frames": 2}, {
        "": "frames one after another", r"\.attention\.": (8, 8, 1), "temporal_attention": ONE_PATCH_OVER_TIME},
        (64, 64), lambda x: {"pixel_values": torch.stack([x, x], 1)}),
    Architecture("videomae", "AutoModel", FLAT | {"num_frames": 2}, {"": (8, 8)}, (64, 64),
                 lambda x: {"pixel_values": torch.stack([x, x], 1)}),
    Architecture("vivit", "AutoModel", FLAT | {"num_frames": 2, "tubelet_size": [2, 8, 8]}, {"": (8, 8, 1)},
                 (64, 64), lambda x: {"pixel_values": torch.stack([x, x], 1)}),
]  # fmt: skip

# Model types of the mappings that are not checked, and why.
LEFT_OUT: dict[str, str] = {
    "bit": "its convolutions standardise their weights, so it has no layer to adapt",
    "dinat": "needs the package natten",
    "edgetam": "its backbone is timm's RepViT, which is checked",
    "edgetam_video": "video; its backbone is timm's RepViT, which is checked",
    "omdet-turbo": "no small instance was made; its parts are Swin and the encoder of RT-DETR, which are checked",
    "sam2": "no small instance was made; its encoder is Hiera with windows in rows",
    "sam2_video": "video, on the encoder of sam2",
    "sam3_tracker": "no small instance was made; its encoder is a plain transformer with windows, as sam's",
    "sam3_video": "video, on the encoder of sam3_tracker",
    "uvdoc_backbone": "it has no convolution with kernel 1 and no linear layer to adapt",
    "videoprism": "video",
    "videoprism_vision_model": "video",
}
