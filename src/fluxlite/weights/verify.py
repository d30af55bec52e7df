"""Proof of a conversion: every byte read back through the inverse mapping, and one forward beside
diffusers' model.
"""

import importlib.util
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fluxlite.cli.messages import quiet_torchao
from fluxlite.nets.configs import ControlNetConfig
from fluxlite.nets.flux import rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.weights import conversion, tensor_files
from fluxlite.weights.diffusers_configs import config_to_diffusers
from fluxlite.weights.sources import open_source

MAX_ERROR = 1e-4  # ‖ours − theirs‖ / ‖theirs‖ in float32; a wrong row order gives about 1


def digests_of(source, progress=lambda count: None):
    """SHA-256 of each tensor of a `Source` ({name: digest}), and of all: the same in whatever files
    and order they lie.
    """
    digests = tensor_files.Digests()
    source.check_whole()
    try:
        for name, entry in source.described.items():
            digests.add(name, source)
            progress(tensor_files.num_bytes({name: entry}))
        return digests.each(), digests.total()
    finally:
        digests.close()


def verify_conversion(source, dst, progress=lambda count: None):
    """Compare what lies at `dst` with the `Source` it was made from: lines that say what is proved.

    The forward takes about 3 GB at FLUX's width; the comparison of bytes a few linears. Raises
    `ValueError` where they differ.
    """
    back = open_source(dst, setting="--dst")
    wrong, rounded, count = compare_tensors(source, back, progress)
    if wrong:
        found = f"{len(wrong)} of {count} tensors differ from {source.where}, {wrong[0]} first"
        raise ValueError(f"--verify: {found}: do not use {dst}")
    how = f"as its values in {', '.join(sorted(rounded))}" if rounded else "bit for bit"
    lines = [f"verified: {count} tensors of {source.where} come back from {dst} {how}"]
    if source.what == "autoencoder" or source.config.mlp_ratio != 4:
        return lines
    if importlib.util.find_spec("diffusers") is None:
        return [*lines, "no forward was compared: diffusers is not installed"]
    error = forward_error(source, back)
    if not error <= MAX_ERROR:
        raise ValueError(
            f"--verify: a forward of {dst} differs from diffusers' by {error:.1e}: do not use it"
        )
    proved = f"verified: a forward of its first blocks equals diffusers' model to {error:.1e}"
    return [*lines, proved]


def compare_tensors(source, back, progress):
    """(names that differ, types that were rounded to, how many tensors) of `back` in `source`."""
    optional = conversion.optional_names(source.layout, source.config)
    wrong, rounded, count = [], set(), 0
    layouts = back.layout, source.layout
    for name, tensor in conversion.convert_weights(back.read, *layouts, source.config):
        if name in optional:  # a bias that NeMo's layout may lack, and whose value nothing reads
            continue
        expected = source.read(name)
        if tensor.dtype != expected.dtype:
            rounded.add(str(tensor.dtype).removeprefix("torch."))
        both = expected.to(tensor.dtype), tensor
        if not np.array_equal(*map(tensor_files.tensor_bytes, both)):
            wrong.append(name)
        count += 1
        progress(expected.nbytes)
    return wrong, rounded, count


def first_blocks(config):
    """The configuration of the first double and single block alone, whose names the whole has
    too.
    """
    depths = ("num_double_blocks", "num_single_blocks")
    return replace(config, **{name: min(1, getattr(config, name)) for name in depths})


@torch.no_grad()
def forward_error(source, back):
    """‖ours − theirs‖ / ‖theirs‖ of a float32 forward.

    Ours has `back`'s weights, diffusers' has `source`'s in `back`'s types.
    """
    shallow = first_blocks(source.config)
    inputs = make_inputs(shallow)
    weights = conversion.convert_weights(back.read, back.layout, "fluxlite", shallow)
    got = our_forward(shallow, {name: t.float() for name, t in weights}, inputs)

    described = {name: dtype for name, (dtype, _) in back.described.items()}
    types = conversion.layout_dtypes(back.layout, "diffusers", source.config, described)
    weights = conversion.convert_weights(source.read, source.layout, "diffusers", shallow)
    theirs = {name: t.to(types[name]).float() for name, t in weights}
    expected = diffusers_forward(shallow, theirs, inputs)
    return ((got - expected).norm() / expected.norm()).item()


def make_inputs(config):
    """Arguments of our forward, for 6 x 8 latent cells."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    inputs = dict(
        img=draw(1, 12, config.in_channels),
        txt=draw(1, 5, config.text_width),
        pooled=draw(1, config.pooled_width),
        t=torch.tensor([0.7]),
        guidance=torch.tensor([3.5]) if config.guidance_embed else None,
    )
    if isinstance(config, ControlNetConfig):
        inputs["hint"] = (
            draw(1, 3, 48, 64) if config.hint == "pixel" else draw(1, 12, config.in_channels)
        )
        inputs["mode"] = torch.tensor([0]) if config.num_modes else None
    return inputs


def our_forward(config, state, inputs):
    """What our network of such a shape and weights makes of `make_inputs`, in one tensor."""
    model = conversion.build_on_meta(config)
    model.load_state_dict(state, strict=True, assign=True)
    out = model(rope=rope_table(position_ids(6, 8, 5), config), **inputs)
    return torch.cat(sum(out, [])) if isinstance(config, ControlNetConfig) else out


def diffusers_forward(config, state, inputs):
    """The same of diffusers' network, of weights in its layout."""
    with torch.device("meta"):
        model = build_diffusers(config)
    model.load_state_dict(state, strict=True, assign=True)
    out = model(**diffusers_inputs(inputs, position_ids(6, 8, 5)))
    if not isinstance(config, ControlNetConfig):
        return out[0]
    return torch.cat([*(out[0] or ()), *(out[1] or ())])


def build_diffusers(config):
    """diffusers' own network of such a shape."""
    import diffusers

    values = config_to_diffusers(config)
    own = {name: value for name, value in values.items() if not name.startswith("_")}
    with quiet_torchao():
        cls = getattr(diffusers, values["_class_name"])
    return cls(**own)


DIFFUSERS_INPUTS = {  # ours → what diffusers' forward calls them
    "img": "hidden_states",
    "txt": "encoder_hidden_states",
    "pooled": "pooled_projections",
    "t": "timestep",
    "guidance": "guidance",
    "hint": "controlnet_cond",
    "mode": "controlnet_mode",
}


def diffusers_inputs(inputs, ids):
    """Arguments of our forward, and positions ids (L, 3) in place of `rope`, for diffusers'."""
    given = {DIFFUSERS_INPUTS[name]: value for name, value in inputs.items()}
    if given.get("controlnet_mode") is not None:
        given["controlnet_mode"] = given["controlnet_mode"][:, None]
    text = inputs["txt"].shape[1]
    return given | dict(txt_ids=ids[:text].float(), img_ids=ids[text:].float(), return_dict=False)
