"""Vision-language and encoder-decoder models of transformers, one small random instance each.

Only the vision tower is adapted by default. Grids are written down as they follow from the architecture: the image's
size over the size of a patch, the tokens before the patches, and how patches of several images come one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from architectures import (
    FLAT,
    SQUARE,
    SQUARE_CLS,
    SWIN,
    TEXT,
    TOKENS_FIRST,
    Architecture,
    Elsewhere,
    OneAfterAnother,
)
from torch import Tensor

IMAGE_TOKEN = 99

# A decoder of each family of language models
LLAMA = TEXT | {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128}
QWEN2 = LLAMA | {"model_type": "qwen2"}
MISTRAL = LLAMA | {"model_type": "mistral"}
GEMMA = LLAMA | {"model_type": "gemma"}
GEMMA_3 = LLAMA | {"model_type": "gemma3_text"}
CLIP = FLAT | {"model_type": "clip_vision_model"}
SIGLIP = FLAT | {"model_type": "siglip_vision_model", "vision_use_head": False}


def _words(count: int, length: int = 5) -> Tensor:
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))


def with_words(num_image_tokens: int, **others: Any) -> Callable[[Tensor], dict[str, Any]]:
    """Make inputs of images, and of texts with a few words and as many places for an image as it has tokens."""

    def inputs(x: Tensor) -> dict[str, Any]:
        places = torch.full((len(x), num_image_tokens), IMAGE_TOKEN)
        ids = torch.cat([_words(len(x), 1), places, _words(len(x))], dim=1)
        return {"pixel_values": x, "input_ids": ids, "attention_mask": torch.ones_like(ids)} | {
            name: make(x) for name, make in others.items()
        }

    return inputs


def captioned(x: Tensor) -> dict[str, Any]:
    """Make inputs of images, and of texts that are given separately."""
    ids = _words(len(x))
    return {"pixel_values": x, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cut(x: Tensor) -> Tensor:
    """Cut images into patches of 8 x 8 pixels, shape (N, L, pixels * channels)."""
    return x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


# Qwen-VL: patches of all images one after another, in units of 2 x 2 that are merged for the language model.


def in_units(height: int, width: int) -> Elsewhere:
    """Order patches (images * H * W, C) unit by unit."""

    def tokens(x: Tensor) -> Tensor:
        units = x.reshape(-1, height // 2, width // 2, 2, 2, x.shape[-1])
        return units.transpose(2, 3).reshape(-1, height * width, x.shape[-1])

    return Elsewhere(height, width, 0, tokens)


def in_windows(height: int, width: int, window: int) -> Elsewhere:
    """Order patches by unit and units by window, as Qwen2.5-VL does; windows at the end may be smaller."""
    of_units = torch.arange(height * width // 4).view(height // 2, width // 2)
    windows = [part for rows in of_units.split(window) for part in rows.split(window, dim=1)]
    back = torch.cat([part.flatten() for part in windows]).argsort()
    units = in_units(height, width)

    def tokens(x: Tensor) -> Tensor:
        x = x.reshape(-1, len(back), 4, x.shape[-1])
        return units.tokens(x[:, back].flatten(0, 2))

    return Elsewhere(height, width, 0, tokens)


def patches_of(*sizes: tuple[int, int]) -> Callable[[Tensor], dict[str, Any]]:
    """Make inputs of a Qwen-VL: images with these numbers of rows and columns of patches, in one text."""

    def inputs(_: Tensor) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        num_patches = [height * width for height, width in sizes]
        ids = [_words(1, 1)]
        for number in num_patches:
            ids += [torch.tensor([[97]]), torch.full((1, number // 4), IMAGE_TOKEN), torch.tensor([[98]])]
        ids = torch.cat([*ids, _words(1)], dim=1)
        return {
            "pixel_values": torch.randn(sum(num_patches), 3 * 2 * 8 * 8, generator=generator),
            "image_grid_thw": torch.tensor([[1, *size] for size in sizes]),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        }

    return inputs


QWEN_TEXT = LLAMA | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}, "rope_scaling": None,
}  # fmt: skip
QWEN_TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 96, "vision_start_token_id": 97,
               "vision_end_token_id": 98}  # fmt: skip
QWEN_2 = QWEN_TOKENS | {
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8},
    "text_config": {k: v for k, v in QWEN_TEXT.items() if k != "model_type"},
}  # fmt: skip
QWEN_2_5 = QWEN_TOKENS | {
    "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
                      "patch_size": 8, "window_size": 64, "fullatt_block_indexes": [1]},
    "text_config": {k: v for k, v in QWEN_TEXT.items() if k != "model_type"},
}  # fmt: skip
QWEN_3 = QWEN_TOKENS | {
    "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
                      "patch_size": 8, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    "text_config": {k: v for k, v in QWEN_TEXT.items() if k != "model_type"},
}  # fmt: skip

ARCHITECTURES = [
    Architecture("qwen2_vl", "Qwen2VLForConditionalGeneration", QWEN_2, {"": in_units(8, 12)},
                 inputs=patches_of((8, 12)), variant="one image"),
    Architecture("qwen2_vl", "Qwen2VLForConditionalGeneration", QWEN_2, {"": in_units(8, 12)},
                 inputs=patches_of((8, 12), (8, 12)), variant="two images of one size"),
    Architecture("qwen2_vl", "Qwen2VLForConditionalGeneration", QWEN_2, {
                     "": OneAfterAnother((in_units(8, 12), in_units(4, 8)))},
                 inputs=patches_of((8, 12), (4, 8)), variant="two images of two sizes"),
    Architecture("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", QWEN_2_5, {"": in_windows(8, 12, 4)},
                 inputs=patches_of((8, 12)), variant="one image"),
    Architecture("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", QWEN_2_5, {"": in_windows(8, 12, 4)},
                 inputs=patches_of((8, 12), (8, 12)), variant="two images of one size"),
    Architecture("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", QWEN_2_5, {
                     "": OneAfterAnother((in_windows(8, 12, 4), in_windows(4, 8, 4)))},
                 inputs=patches_of((8, 12), (4, 8)), variant="two images of two sizes"),
    Architecture("qwen3_vl", "Qwen3VLForConditionalGeneration", QWEN_3, {"": in_units(8, 12)},
                 inputs=patches_of((8, 12)), variant="one image"),
    Architecture("qwen3_vl", "Qwen3VLForConditionalGeneration", QWEN_3, {"": in_units(8, 12)},
                 inputs=patches_of((8, 12), (8, 12)), variant="two images of one size"),
    Architecture("qwen3_vl", "Qwen3VLForConditionalGeneration", QWEN_3, {
                     "": OneAfterAnother((in_units(8, 12), in_units(4, 8)))},
                 inputs=patches_of((8, 12), (4, 8)), variant="two images of two sizes"),
    Architecture("llava", "LlavaForConditionalGeneration", {
        "vision_config": CLIP, "text_config": LLAMA, "image_token_index": IMAGE_TOKEN}, SQUARE_CLS, (64, 64),
        with_words(64)),
    Architecture("llava_next", "LlavaNextForConditionalGeneration", {
        "vision_config": CLIP, "text_config": LLAMA, "image_token_index": IMAGE_TOKEN,
        "image_grid_pinpoints": [[64, 64]]}, SQUARE_CLS, (64, 64), lambda x: with_words(136)(x) | {
            "pixel_values": torch.stack([x, x.flip(-1)], 1), "image_sizes": torch.tensor([[64, 64]] * 2)}),
    Architecture("llava_onevision", "LlavaOnevisionForConditionalGeneration", {
        "vision_config": SIGLIP, "text_config": QWEN2, "image_token_index": IMAGE_TOKEN,
        "image_grid_pinpoints": [[64, 64]]}, SQUARE, (64, 64), lambda x: with_words(136)(x) | {
            "pixel_values": torch.stack([x, x.flip(-1)], 1), "image_sizes": torch.tensor([[64, 64]] * 2)}),
    Architecture("paligemma", "PaliGemmaForConditionalGeneration", {
        "vision_config": SIGLIP | {"projection_dim": 32}, "text_config": GEMMA, "image_token_index": IMAGE_TOKEN,
        "projection_dim": 32}, SQUARE, (64, 64), with_words(64, token_type_ids=lambda x: torch.zeros(2, 70).long())),
    Architecture("gemma3", "Gemma3ForConditionalGeneration", {
        "vision_config": SIGLIP, "text_config": GEMMA_3, "mm_tokens_per_image": 16, "image_token_index": IMAGE_TOKEN,
        "boi_token_index": 98, "eoi_token_index": 97}, SQUARE, (64, 64),
        with_words(16, token_type_ids=lambda x: torch.zeros(2, 22).long())),
    Architecture("internvl", "InternVLForConditionalGeneration", {
        "vision_config": FLAT | {"model_type": "internvl_vision", "image_size": [64, 64], "patch_size": [8, 8]},
        "text_config": QWEN2, "image_token_id": IMAGE_TOKEN}, SQUARE_CLS, (64, 64), with_words(16)),
    Architecture("idefics2", "Idefics2ForConditionalGeneration", {
        "vision_config": FLAT, "text_config": MISTRAL, "image_token_id": IMAGE_TOKEN, "perceiver_config": {
            "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 16, "num_key_value_heads": 1}},
        SQUARE, (64, 64), lambda x: with_words(4)(x) | {"pixel_values": x[:, None]}),
    Architecture("idefics3", "Idefics3ForConditionalGeneration", {
        "vision_config": FLAT, "text_config": LLAMA, "image_token_id": IMAGE_TOKEN, "scale_factor": 2},
        SQUARE, (64, 64), lambda x: with_words(16)(x) | {"pixel_values": x[:, None]}),
    Architecture("smolvlm", "SmolVLMForConditionalGeneration", {
        "vision_config": FLAT, "text_config": LLAMA, "image_token_id": IMAGE_TOKEN, "scale_factor": 2},
        SQUARE, (64, 64), lambda x: with_words(16)(x) | {"pixel_values": x[:, None]}),
    Architecture("mistral3", "Mistral3ForConditionalGeneration", {
        "vision_config": FLAT | {"model_type": "pixtral", "head_dim": 16}, "text_config": MISTRAL,
        "image_token_index": IMAGE_TOKEN, "spatial_merge_size": 2}, {
            "": Elsewhere(8, 12, 0, lambda x: x.reshape(2, 96, -1))}, (64, 96),
        lambda x: with_words(24)(x) | {"image_sizes": torch.tensor([[64, 96]] * 2)}),
    Architecture("aya_vision", "AyaVisionForConditionalGeneration", {
        "vision_config": SIGLIP, "text_config": LLAMA | {"model_type": "cohere2"}, "image_token_index": IMAGE_TOKEN,
        "downsample_factor": 2}, SQUARE, (64, 64), with_words(16)),
    Architecture("mllama", "MllamaForConditionalGeneration", {
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
                          "intermediate_size": 64, "image_size": 64, "patch_size": 8, "max_num_tiles": 1,
                          "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0],
                          "vision_output_dim": 64},
        "text_config": LLAMA | {"model_type": "mllama_text_model", "cross_attention_layers": [1],
                                "num_hidden_layers": 2, "pad_token_id": 0},
        "image_token_index": IMAGE_TOKEN}, {"": (8, 8, 1, 7)}, (64, 64), lambda x: with_words(1)(x) | {
            "pixel_values": x[:, None, None], "aspect_ratio_ids": torch.ones(2, 1).long(),
            "aspect_ratio_mask": torch.ones(2, 1, 1).long(), "cross_attention_mask": torch.ones(2, 7, 1, 1).long()}),
    Architecture("llama4", "Llama4ForConditionalGeneration", {
        "vision_config": FLAT | {"model_type": "llama4_vision_model", "vision_output_dim": 32,
                                 "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128},
        "text_config": LLAMA | {"model_type": "llama4_text", "num_local_experts": 1, "intermediate_size_mlp": 64,
                                "moe_layers": []},
        "image_token_index": IMAGE_TOKEN}, {"": (8, 8, 0, 1)}, (64, 64), with_words(16)),
    Architecture("lfm2_vl", "Lfm2VlForConditionalGeneration", {
        "vision_config": {key: value for key, value in FLAT.items() if key != "image_size"} | {
            "model_type": "siglip2_vision_model", "num_patches": 64, "vision_use_head": False},
        "text_config": LLAMA | {"model_type": "lfm2"}, "image_token_id": IMAGE_TOKEN, "downsample_factor": 2}, SQUARE,
        (64, 64), lambda x: with_words(16)(x) | {
            "pixel_values": cut(x), "pixel_attention_mask": torch.ones(2, 64).long(),
            "spatial_shapes": torch.tensor([[8, 8]] * 2)}),
    # Encoder-decoder models, and others whose texts have no places for images
    Architecture("florence2", "Florence2ForConditionalGeneration", {
        "vision_config": {"model_type": "florence_vision", "embed_dim": [16, 32, 32, 32], "num_heads": [1, 2, 2, 2],
                          "num_groups": [1, 2, 2, 2], "depths": [1, 1, 1, 1], "window_size": 4, "projection_dim": 32,
                          "max_position_embeddings": 16, "drop_path_rate": 0.0},
        "text_config": {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
                        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64,
                        "decoder_ffn_dim": 64, "vocab_size": 100, "max_position_embeddings": 64},
        "image_token_id": IMAGE_TOKEN}, {
            r"blocks\.0\.": (16, 16), r"blocks\.1\.": (8, 8), r"blocks\.2\.": (4, 4), r"blocks\.3\.": (2, 2),
            "window_attn": (4, 4)}, (64, 64),
        with_words(5, decoder_input_ids=lambda x: _words(2))),
    Architecture("blip", "BlipForConditionalGeneration", {"vision_config": FLAT, "text_config": TEXT}, SQUARE_CLS,
                 (64, 64), captioned, variant="image to text"),
    Architecture("blip-2", "Blip2ForConditionalGeneration", {
        "vision_config": FLAT, "qformer_config": TEXT | {"encoder_hidden_size": 32},
        "text_config": TEXT | {"model_type": "opt", "ffn_dim": 64, "max_position_embeddings": 64,
                               "word_embed_proj_dim": 32}, "num_query_tokens": 4,
        "image_token_index": IMAGE_TOKEN}, SQUARE_CLS, (64, 64), with_words(4), variant="image to text"),
    Architecture("instructblip", "InstructBlipForConditionalGeneration", {
        "vision_config": FLAT, "qformer_config": TEXT | {"encoder_hidden_size": 32},
        "text_config": TEXT | {"model_type": "opt", "ffn_dim": 64, "max_position_embeddings": 64,
                               "word_embed_proj_dim": 32}, "num_query_tokens": 4,
        "image_token_index": IMAGE_TOKEN}, SQUARE_CLS, (64, 64), with_words(
            4, qformer_input_ids=lambda x: _words(2), qformer_attention_mask=lambda x: torch.ones(2, 5).long())),
    Architecture("kosmos-2", "Kosmos2ForConditionalGeneration", {
        "vision_config": FLAT, "text_config": {
            "vocab_size": 100, "embed_dim": 32, "layers": 1, "ffn_dim": 64, "attention_heads": 2,
            "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0}, "latent_query_num": 4},
        SQUARE_CLS, (64, 64), lambda x: with_words(4)(x) | {
            "image_embeds_position_mask": with_words(4)(x)["input_ids"] == IMAGE_TOKEN}),
    Architecture("git", "GitForCausalLM", TEXT | {
        "vision_config": FLAT, "max_position_embeddings": 128}, SQUARE_CLS, (64, 64), captioned),
    Architecture("pix2struct", "Pix2StructForConditionalGeneration", {
        "vision_config": {"hidden_size": 32, "patch_embed_hidden_size": 192, "d_ff": 64, "d_kv": 16,
                          "num_hidden_layers": 2, "num_attention_heads": 2, "dropout_rate": 0.0, "seq_len": 64},
        "text_config": {"hidden_size": 32, "vocab_size": 100, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2,
                        "dropout_rate": 0.0, "decoder_start_token_id": 0}},
        {"": "the places of its patches are among their values"}, (64, 64), lambda x: {"flattened_patches": torch.cat([
            torch.cartesian_prod(torch.arange(1.0, 9), torch.arange(1.0, 9)).expand(2, 64, 2),
            cut(x)], 2),
            "attention_mask": torch.ones(2, 64).long(), "decoder_input_ids": _words(2)}),
    Architecture("vilt", "ViltModel", FLAT | TEXT | {"max_image_length": -1}, {
        "": (1, 5, 0, 65)}, (64, 64), captioned),
    Architecture("flava", "FlavaModel", {
        "image_config": FLAT, "text_config": TEXT, "multimodal_config": {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        "hidden_size": 32, "projection_dim": 32}, SQUARE_CLS, (64, 64), captioned),
    Architecture("bridgetower", "BridgeTowerModel", {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vision_config": {
            "hidden_size": 64, "num_hidden_layers": 2, "patch_size": 8, "image_size": 64},
        "text_config": TEXT | {"hidden_size": 64}}, {"": TOKENS_FIRST}, (64, 64), captioned),
    Architecture("vision-encoder-decoder", "VisionEncoderDecoderModel", {
        "encoder": FLAT | {"model_type": "vit"}, "decoder": {
            "model_type": "trocr", "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2,
            "decoder_ffn_dim": 64, "vocab_size": 100, "max_position_embeddings": 16, "cross_attention_hidden_size": 32,
            "dropout": 0.0, "is_decoder": True, "add_cross_attention": True}},
        SQUARE_CLS, (64, 64), lambda x: {"pixel_values": x, "decoder_input_ids": _words(2)}, variant="TrOCR"),
    Architecture("vision-encoder-decoder", "VisionEncoderDecoderModel", {
        "encoder": SWIN | {"model_type": "donut-swin"}, "decoder": {
            "model_type": "mbart", "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2,
            "decoder_ffn_dim": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
            "vocab_size": 100, "max_position_embeddings": 16, "dropout": 0.0, "is_decoder": True,
            "add_cross_attention": True}},
        {r"layers\.0\.blocks": (16, 16), r"layers\.1\.blocks": (8, 8), r"\.0\.downsample": (8, 8),
         r"blocks\.\d+\.attention\.": (4, 4)},
        (64, 64), lambda x: {"pixel_values": x, "decoder_input_ids": _words(2)}, variant="Donut and Nougat"),
    Architecture("vision-text-dual-encoder", "VisionTextDualEncoderModel", {
        "vision_config": FLAT | {"model_type": "vit"}, "text_config": TEXT | {"model_type": "bert"}},
        SQUARE_CLS, (64, 64), captioned),
]  # fmt: skip

# How the names of the layers in the blocks of the vision tower begin, as a regular expression; by model type.
TOWERS = {
    "qwen2_vl": r"model\.visual\.blocks\.",
    "qwen2_5_vl": r"model\.visual\.blocks\.",
    "qwen3_vl": r"model\.visual\.blocks\.",
    "llava": r"model\.vision_tower\.encoder\.layers\.",
    "llava_next": r"model\.vision_tower\.encoder\.layers\.",
    "llava_onevision": r"model\.vision_tower\.encoder\.layers\.",
    "paligemma": r"model\.vision_tower\.encoder\.layers\.",
    "gemma3": r"model\.vision_tower\.encoder\.layers\.",
    "internvl": r"model\.vision_tower\.encoder\.layer\.",
    "idefics2": r"model\.vision_model\.encoder\.layers\.",
    "idefics3": r"model\.vision_model\.encoder\.layers\.",
    "smolvlm": r"model\.vision_model\.encoder\.layers\.",
    "mistral3": r"model\.vision_tower\.transformer\.layers\.",
    "aya_vision": r"model\.vision_tower\.encoder\.layers\.",
    "mllama": r"model\.vision_model\.(global_)?transformer\.layers\.",
    "llama4": r"vision_model\.model\.layers\.",
    "lfm2_vl": r"model\.vision_tower\.encoder\.layers\.",
    "florence2": r"model\.vision_tower\.blocks\.",
    "blip": r"vision_model\.encoder\.layers\.",
    "blip-2": r"vision_model\.encoder\.layers\.",
    "instructblip": r"vision_model\.encoder\.layers\.",
    "kosmos-2": r"vision_model\.model\.encoder\.layers\.",
    "git": r"git\.image_encoder\.vision_model\.encoder\.layers\.",
    "pix2struct": r"encoder\.encoder\.layer\.",
    "vilt": r"encoder\.layer\.",
    "flava": r"image_model\.encoder\.layer\.",
    "bridgetower": r"vision_model\.visual\.transformer\.resblocks\.\d\.mlp\.",
    "vision-encoder-decoder": r"encoder\.(encoder\.)?layers\.",
    "vision-text-dual-encoder": r"vision_model\.layers\.",
}
