"""Proof of a conversion: every byte read back through the inverse mapping, and one forward beside diffusers' model."""

import importlib.util
from dataclasses import replace

import torch

from fluxlite import convert, streams
from fluxlite.autoencoder import AutoencoderConfig
from fluxlite.checkpoint import open_source
from fluxlite.latents import position_ids
from fluxlite.model import Flux, rope_table

MAX_ERROR = 1e-4  # ‖ours − theirs‖ / ‖theirs‖ in float32; a wrong row order gives about 1


def digests_of(source, progress=lambda count: None):
    """SHA-256 of each tensor of a `Source` ({name: digest}), and of all: the same in whatever files and order they lie."""
    digests = streams.Digests()
    try:
        for name, (dtype, shape) in source.described.items():
            digests.add(name, source.get(name))
            progress(streams.num_bytes({name: (dtype, shape)}))
        return digests.each(), digests.total()
    finally:
        digests.close()


def verify(source, dst, progress=lambda count: None):
    """Compare what lies at `dst` with the `Source` it was made from; lines that say what was proved, or `ValueError`."""
    back = open_source(dst, setting="--dst")
    wrong, count = [], 0
    for piece, tensor in convert.convert(back.get, back.layout, source.layout, source.config):
        if piece.name not in source.described:  # a bias that NeMo's layout may lack
            continue
        expected = source.get(piece.name)[piece.start : piece.stop].to(tensor.dtype)
        if not (streams.raw(expected) == streams.raw(tensor)).all():
            wrong.append(piece.name)
        count += 1
        progress(expected.numel() * source.described[piece.name][0].itemsize)
    if wrong:
        raise ValueError(f"--verify: {len(wrong)} of {count} pieces differ from {source.where}, {wrong[0]} first: do not use {dst}")
    lines = [f"verified: {count} pieces of {source.where} come back from {dst} bit for bit"]
    if isinstance(source.config, AutoencoderConfig) or source.config.mlp_ratio != 4:
        return lines
    if importlib.util.find_spec("diffusers") is None:
        return [*lines, "no forward was compared: diffusers is not installed"]
    error = forward_error(source, back)
    if error > MAX_ERROR:
        raise ValueError(f"--verify: a forward of {dst} differs from diffusers' by {error:.1e}: do not use it")
    return [*lines, f"verified: a forward of its first blocks equals diffusers' model to {error:.1e}"]


def first_blocks(source):
    """(shallow configuration, `get`) of the first double and single block of a `Source`, in its layout."""
    config = source.config
    shallow = replace(
        config, num_double_blocks=min(1, config.num_double_blocks), num_single_blocks=min(1, config.num_single_blocks)
    )
    pieces = {}
    for short, whole in zip(convert.rules("bfl", shallow), _matching(config, shallow)):
        pieces |= dict(zip(short.ours, whole.ours))

    def get_ours(name):
        parts = [pieces[p] for p in pieces if p.name == name]
        return torch.cat([source.get(p.name)[p.start : p.stop] for p in sorted(parts, key=lambda p: p.start)])

    return shallow, get_ours if source.layout == "fluxlite" else source.get


def _matching(config, shallow):
    """The rules of a model in BFL's layout that its shallow version has too, in that one's order."""
    by_name = {rule.theirs[0].name: rule for rule in convert.rules("bfl", config)}
    return [by_name[rule.theirs[0].name] for rule in convert.rules("bfl", shallow)]


@torch.no_grad()
def forward_error(source, back):
    """‖ours − theirs‖ / ‖theirs‖ of one float32 forward: ours with weights from `back`, diffusers' with those of `source`."""
    from diffusers import FluxTransformer2DModel

    shallow, theirs_get = first_blocks(source)
    _, ours_get = first_blocks(back)
    values = {k: v for k, v in convert.config_to_diffusers(shallow).items() if not k.startswith("_")}
    with torch.device("meta"):
        theirs, ours = FluxTransformer2DModel(**values), Flux(shallow)
    reference = convert.convert(theirs_get, source.layout, "diffusers", shallow)
    theirs.load_state_dict({piece.name: t.float() for piece, t in reference}, strict=True, assign=True)
    mine = convert.assemble(convert.convert(ours_get, back.layout, "fluxlite", shallow), convert.our_shapes(shallow))
    ours.load_state_dict({k: t.float() for k, t in mine.items()}, strict=True, assign=True)

    generator = torch.Generator().manual_seed(0)
    img = torch.randn(1, 12, shallow.in_channels, generator=generator)
    txt = torch.randn(1, 5, shallow.text_width, generator=generator)
    pooled, t = torch.randn(1, shallow.pooled_width, generator=generator), torch.tensor([0.7])
    guidance = torch.tensor([3.5]) if shallow.guidance_embed else None
    ids = position_ids(6, 8, 5)
    got = ours(img, txt, rope_table(ids, shallow), t=t, pooled=pooled, guidance=guidance)
    ids = ids.float()
    expected = theirs(img, txt, pooled, t, img_ids=ids[5:], txt_ids=ids[:5], guidance=guidance, return_dict=False)[0]
    return ((got - expected).norm() / expected.norm()).item()
