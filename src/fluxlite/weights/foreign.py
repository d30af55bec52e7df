"""What a file is that is offered as a FLUX model and is none: told by its keys or its first bytes.

Two tables, so that what is supported some day is one row less.
"""

import re

OTHER_MODEL = "fluxlite knows FLUX.1's transformers, ControlNets and autoencoders"
QUANTIZED_REMEDY = "it is not supported yet: fetch a version in bfloat16 or fp8"
PART_REMEDY = "name a file or folder with the transformer alone"
ENCODER_REMEDY = "the transformer is model.checkpoint=; name the encoder's folder as "

# A pattern of keys, what holds them, and what to do. The first that matches counts: what was made
# of a model comes before the models.
TELLTALE_KEYS = (
    (
        r"\.(absmax|quant_map|SCB)$|quant_state\.bitsandbytes",
        "quantised by bitsandbytes",
        QUANTIZED_REMEDY,
    ),
    (r"\.(qweight|qzeros|wscales|smooth_factor|weight_packed)$", "quantised", QUANTIZED_REMEDY),
    (r"\.weight\._(data|scale)$|\.weight_scale_(2|inv)$", "quantised", QUANTIZED_REMEDY),
    (
        r"(?i)lora|\.hada_|\.lokr_|\.dora_scale|\.oft_(blocks|diag)|\.diff(_b)?$",
        "a LoRA or its like, not a model",
        "adapters are not supported yet: name the model that it was merged into",
    ),
    (
        r"ip_adapter|^image_proj|\.to_k_ip\.",
        "an IP-Adapter",
        "it is not supported yet: name a transformer or a ControlNet",
    ),
    (r"^redux_(up|down)\.", "FLUX.1 Redux", "it is not supported yet: name a transformer"),
    (r"distilled_guidance_layer\.", "Chroma", f"it is not supported: {OTHER_MODEL}"),
    (r"(single|double)_stream_modulation", "FLUX.2", f"it is not supported: {OTHER_MODEL}"),
    (r"\.img_mod\.1\.|^txt_norm\.", "Qwen-Image", OTHER_MODEL),
    (r"(^|\.)joint_blocks\.|^pos_embed\.(pos_embed|proj)", "Stable Diffusion 3", OTHER_MODEL),
    (
        r"(^|\.)(input_blocks|middle_block|output_blocks)\.\d|^(down|up)_blocks\.\d+\.(att|res)",
        "a UNet, as of Stable Diffusion or SDXL",
        OTHER_MODEL,
    ),
    (r"controlnet_cond_embedding|^control_model\.", "Stable Diffusion's ControlNet", OTHER_MODEL),
    (r"individual_token_refiner", "HunyuanVideo", OTHER_MODEL),
    (r"(^|\.)noise_refiner\.|(^|\.)cap_embedder", "Lumina or Z-Image", OTHER_MODEL),
    (r"(^|\.)double_stream_blocks\.", "HiDream", OTHER_MODEL),
    (
        r"^(model\.diffusion_model\.)?blocks\.\d+\.cross_attn\.",
        "a video model, as Wan",
        OTHER_MODEL,
    ),
    (
        r"^(text_encoders|cond_stage_model|conditioner|first_stage_model|vae)\.",
        "an all-in-one checkpoint with text encoders or an autoencoder, as ComfyUI loads them",
        f"it is not supported yet: {PART_REMEDY}",
    ),
    (
        r"(^|\.)encoder\.block\.\d+\.layer\.|\.SelfAttention\.q\.",
        "a T5 text encoder",
        f"{ENCODER_REMEDY}model.t5=",
    ),
    (
        r"(^|\.)text_model\.|(^|\.)resblocks\.",
        "a CLIP text encoder",
        f"{ENCODER_REMEDY}model.clip=",
    ),
    (r"(^|\.)vision_model\.", "an image encoder", "name a transformer"),
    (r"(^|\.)layers\.\d+\.self_attn\.q_proj", "a language model", OTHER_MODEL),
    (r"^(post_)?quant_conv\.", "an autoencoder, but not FLUX.1's", "fetch FLUX.1's ae.safetensors"),
    (r"^(encoder|decoder)\.layers\.\d|^taesd_", "a tiny autoencoder (TAE)", "fetch ae.safetensors"),
    (r"^(clip_l|clip_g|emb_params|t5xxl)$", "a textual inversion", "name a transformer"),
)

MAX_KEYS = 1 << 14  # FLUX.1 has 1,446 in diffusers' layout
PICKLE_REMEDY = "pickles run code when they are opened, so they never are: fetch .safetensors"
# First bytes of a file (of its text in lower case, without white space), what it is, what to do.
TELLTALE_BYTES = (
    (b"gguf", "a GGUF file", "it is not supported yet: fetch .safetensors"),
    (b"pk\x03\x04", "a zip archive, as torch.save writes .pt, .ckpt and .bin", PICKLE_REMEDY),
    (b"\x80\x02", "a pickle", PICKLE_REMEDY),
    (b"\x80\x03", "a pickle", PICKLE_REMEDY),
    (b"\x80\x04", "a pickle", PICKLE_REMEDY),
    (b"\x80\x05", "a pickle", PICKLE_REMEDY),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    (b"<!doctype", "a web page", "it was saved in place of the file: fetch it again, logged in"),
    (b"<html", "a web page", "it was saved in place of the file: fetch it again, logged in"),
    (b"<?xml", "XML, an error message", "it was saved in place of the file: fetch it again"),
    (b"{", "JSON, an error message or an index", "name the weights, or fetch them again"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"rar!", "a RAR archive", "unpack it"),
    (b"\x89png", "a picture", "name the weights"),
    (b"\xff\xd8\xff", "a picture", "name the weights"),
    (b"\x93numpy", "a NumPy array", "name .safetensors"),
    (b"\x89hdf", "an HDF5 file", "name .safetensors"),
)


def check_keys(keys):
    """Raise `ValueError`, with a remedy, where keys are those of something else."""
    if len(keys) > MAX_KEYS:
        raise ValueError(f"it has {len(keys)} tensors, more than any FLUX model: {OTHER_MODEL}")
    for pattern, what, remedy in TELLTALE_KEYS:
        found = next((key for key in keys if re.search(pattern, key)), None)
        if found is not None:
            raise ValueError(f"it is {what} (it has {found[:120]}): {remedy}")


def check_bytes(file, start):
    """Raise `ValueError`, naming `file`, where its first bytes are another kind of file's."""
    if not start:
        raise ValueError(f"{file} is empty: fetch it again")
    if start[8:9] == b"{":  # as safetensors begin, whose length in front may look like anything
        return
    text = start.lstrip().lower()
    for magic, what, remedy in TELLTALE_BYTES:
        if text.startswith(magic):
            raise ValueError(f"{file} is {what}: {remedy}")
