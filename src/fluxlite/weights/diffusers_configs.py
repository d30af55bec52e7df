"""The config.json of diffusers' classes: our fields' names there, and what it fixes."""

CLASS_NAMES = {  # of each part of a pipeline
    "transformer": "FluxTransformer2DModel",
    "controlnet": "FluxControlNetModel",
    "autoencoder": "AutoencoderKL",
}
DIFFUSERS_FIELDS = {  # of a transformer or a ControlNet: ours → theirs
    "num_double_blocks": "num_layers",
    "num_single_blocks": "num_single_layers",
    "num_heads": "num_attention_heads",
    "in_channels": "in_channels",
    "text_width": "joint_attention_dim",
    "pooled_width": "pooled_projection_dim",
    "guidance_embed": "guidance_embeds",
    "rope_axes": "axes_dims_rope",
}
AUTOENCODER_FIELDS = (  # their names are ours
    *("block_out_channels", "layers_per_block", "latent_channels"),
    *("norm_num_groups", "scaling_factor", "shift_factor"),
)
FIXED_AUTOENCODER_FIELDS = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}


def fields_from_diffusers(values, part):
    """{field of ours: value} of the `config.json` of a transformer or a ControlNet."""
    found = {ours: values[theirs] for ours, theirs in DIFFUSERS_FIELDS.items() if theirs in values}
    found["rope_axes"] = tuple(found.get("rope_axes", (16, 56, 56)))
    found["hidden_size"] = values["num_attention_heads"] * values["attention_head_dim"]
    if part == "transformer":
        return found | {"out_channels": values.get("out_channels") or values["in_channels"]}
    hint = "pixel" if values.get("conditioning_embedding_channels") else "latent"
    return found | {"hint": hint, "num_modes": values.get("num_mode") or 0}


def config_to_diffusers(config):
    """The `config.json` of a `FluxConfig`, a `ControlNetConfig` or an `AutoencoderConfig`."""
    named = {"_class_name": CLASS_NAMES[config.part], "_diffusers_version": "0.30.0"}
    if config.part == "autoencoder":
        return named | _autoencoder_to_diffusers(config)
    if (config.rope_theta, config.mlp_ratio) != (10_000, 4):
        raise ValueError(
            "diffusers fixes model.rope_theta=10000 and model.mlp_ratio=4: this model has no "
            "config.json there"
        )
    shape = {theirs: getattr(config, ours) for ours, theirs in DIFFUSERS_FIELDS.items()}
    shape["attention_head_dim"] = config.head_width
    shape["axes_dims_rope"] = list(config.rope_axes)
    if config.part == "transformer":
        return named | {"patch_size": 1} | shape | {"out_channels": config.out_channels}
    pixel = config.hint == "pixel"  # patches of what the convolutions give are formed inside
    own = {
        "patch_size": 2 if pixel else 1,
        "num_mode": config.num_modes or None,
        "conditioning_embedding_channels": config.in_channels // 4 if pixel else None,
    }
    return named | shape | own


def _autoencoder_to_diffusers(config):
    values = {name: getattr(config, name) for name in AUTOENCODER_FIELDS}
    channels = list(config.block_out_channels)
    levels = {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
    return FIXED_AUTOENCODER_FIELDS | values | levels
