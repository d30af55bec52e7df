"""What a file is that is offered as a FLUX model and is none: told by its keys or its first bytes.

Two tables, so that what is supported some day is one row less.
"""

import re

from fluxlite.cli import file_kinds

OTHER_MODEL = "fluxlite knows FLUX.1's transformers, ControlNets and autoencoders"
QUANTIZED_REMEDY = "it is not supported yet: fetch a version in bfloat16, fp8 or nf4"
TRANSFORMER_REMEDY = "and the transformer as model.checkpoint="
T5, CLIP, IMAGE_ENCODER = "a T5 text encoder", "a CLIP text encoder", "an image encoder"

# A pattern of keys, what holds them, and what to do. The first that matches counts: what was made
# of a model comes before the models.
TELLTALE_KEYS = (
    (
        r"\.(absmax|quant_map|SCB)$|quant_state\.bitsandbytes",
        "quantised by bitsandbytes in another way than nf4",
        QUANTIZED_REMEDY,
    ),
    (r"\.(qweight|qzeros|wscales|smooth_factor|weight_packed)$", "quantised", QUANTIZED_REMEDY),
    (r"\.weight\._(data|scale)$|\.weight_scale_(2|inv)$", "quantised", QUANTIZED_REMEDY),
    (r"\._weight_(qdata|scale|data)$", "quantised by torchao", QUANTIZED_REMEDY),
    (
        r"(?i)lora|\.hada_|\.lokr_|\.dora_scale|\.oft_(blocks|diag)|\.diff(_b)?$",
        "a LoRA or its like, not a model",
        "name it as lora= (in convert_hf.py as --lora), and here the model that it changes",
    ),
    (
        r"ip_adapter|^image_proj|\.to_k_ip\.|^pulid_",
        "an IP-Adapter or PuLID",
        "it is not supported yet: name a transformer or a ControlNet",
    ),
    (
        r"^redux_(up|down)\.",
        "FLUX.1 Redux",
        "name its folder as redux.checkpoint=, the picture as redux=, and here a transformer",
    ),
    (r"distilled_guidance_layer\.", "Chroma", f"it is not supported: {OTHER_MODEL}"),
    (r"(single|double)_stream_modulation", "FLUX.2", f"it is not supported: {OTHER_MODEL}"),
    (r"\.img_mod\.1\.|^txt_norm\.", "Qwen-Image", OTHER_MODEL),
    (r"joint_transformer_blocks\.|\.modX\.", "AuraFlow", OTHER_MODEL),
    (r"\.conv_inverted\.", "Sana", OTHER_MODEL),
    (r"^patch_embed\.text_proj\.", "CogVideoX", OTHER_MODEL),
    (r"(^|\.)patchify_proj\.", "LTX-Video", OTHER_MODEL),
    (r"\bblocks\.\d+\.cross_attn\.|^condition_embedder\.", "a video model, as Wan", OTHER_MODEL),
    (r"(^|\.)(caption_projection|adaln_single)\.", "PixArt or LTX-Video", OTHER_MODEL),
    (r"(^|\.)joint_blocks\.|^pos_embed\.(pos_embed|proj)", "Stable Diffusion 3", OTHER_MODEL),
    (
        r"(^|\.)(input_blocks|middle_block|output_blocks)\.\d|^(down|up)_blocks\.\d+\.(att|res)",
        "a UNet, as of Stable Diffusion or SDXL",
        OTHER_MODEL,
    ),
    (r"controlnet_cond_embedding|^control_model\.", "Stable Diffusion's ControlNet", OTHER_MODEL),
    (r"token_refiner\.", "HunyuanVideo", OTHER_MODEL),
    (r"(^|\.)noise_refiner\.|(^|\.)cap_embedder", "Lumina or Z-Image", OTHER_MODEL),
    (r"(^|\.)double_stream_blocks\.", "HiDream", OTHER_MODEL),
    (
        r"^(text_encoders|cond_stage_model|conditioner|first_stage_model|vae)\.",
        "an all-in-one checkpoint with text encoders or an autoencoder, as ComfyUI loads them",
        "name it as model.checkpoint=, and here the file of one part",
    ),
    (
        r"(^|\.)encoder\.block\.\d+\.layer\.|\.SelfAttention\.q\.|^enc\.blk\.",
        T5,
        f"name it as model.t5=, {TRANSFORMER_REMEDY}",
    ),
    (
        r"(^|\.)text_model\.|(^|\.)resblocks\.|^embeddings\.token_",
        CLIP,
        f"name it as model.clip=, {TRANSFORMER_REMEDY}",
    ),
    (r"(^|\.)vision_model\.|^embeddings\.patch_", IMAGE_ENCODER, "name a transformer"),
    (r"(^|\.)layers\.\d+\.self_attn\.q_proj|^blk\.\d", "a language model", OTHER_MODEL),
    (
        # FLUX.2's and Stable Diffusion's; of videos, as Wan's and LTX-Video's
        r"(^|\.)(post_)?quant_conv\.|^(en|de)coder\.(conv_in\.conv|(down|up)samples)\.",
        "an autoencoder, but not FLUX.1's",
        "fetch FLUX.1's ae.safetensors",
    ),
    (r"^(encoder|decoder)\.layers\.\d|^taesd_", "a tiny autoencoder (TAE)", "fetch ae.safetensors"),
    (r"^(clip_l|clip_g|emb_params|t5xxl)$", "a textual inversion", "name a transformer"),
)

MAX_KEYS = 1 << 14  # FLUX.1 has 1,446 in diffusers' layout
PICKLE_REMEDY = "pickles run code when they are opened, so they never are: fetch .safetensors"
SAVED_REMEDY = "it was saved in place of the file: fetch it again"
KIND_REMEDIES = {
    file_kinds.ZIP: PICKLE_REMEDY,
    file_kinds.PICKLE: PICKLE_REMEDY,
    file_kinds.LFS_POINTER: "run `git lfs pull`",
    file_kinds.WEB_PAGE: f"{SAVED_REMEDY}, logged in",
    file_kinds.XML: SAVED_REMEDY,
    file_kinds.JSON: "name the weights, or fetch them again",
    file_kinds.ARCHIVE: "unpack it",
    file_kinds.TAR: "unpack it",
}


def check_keys(keys, expected=None):
    """Raise `ValueError`, with a remedy, where keys are those of something else, and that is not
    `expected`.
    """
    if len(keys) > MAX_KEYS:
        raise ValueError(f"it has {len(keys)} tensors, more than any FLUX model: {OTHER_MODEL}")
    for pattern, what, remedy in TELLTALE_KEYS:
        found = next((key for key in keys if re.search(pattern, key)), None)
        if found is not None and what == expected:
            return
        if found is not None:
            raise ValueError(f"it is {what} (it has {found[:120]}): {remedy}")


def check_bytes(file, start):
    """Raise `ValueError`, naming `file`, where its first bytes are another kind of file's."""
    if not start:
        raise ValueError(f"{file} is empty: fetch it again")
    kind = file_kinds.file_kind(start)
    if kind not in (None, file_kinds.SAFETENSORS):
        remedy = KIND_REMEDIES.get(kind, "name the weights, .safetensors or their folder")
        raise ValueError(f"{file} is {kind}: {remedy}")
