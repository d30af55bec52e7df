"""What tests share: small models of the reference libraries with every parameter random, and
relative errors.
"""

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel

from fluxlite.nets.configs import ControlNetConfig
from fluxlite.nets.controlnet import ControlNet
from fluxlite.nets.flux import Flux
from fluxlite.weights import conversion, net_configs


def randomise(module, seed=0):
    """Fill every parameter with random non-trivial values: zero initialisation would hide most of
    the network.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "norm" in name and p.ndim == 1 and name.endswith("weight"):
                p.copy_(1 + 0.3 * torch.randn(p.shape, generator=generator))
            else:
                fan_in = p[0].numel() if p.ndim > 1 else 10
                p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
    return module


SMALL = dict(
    attention_head_dim=16,
    num_attention_heads=3,
    in_channels=12,
    joint_attention_dim=20,
    pooled_projection_dim=14,
    axes_dims_rope=(4, 6, 6),
)


def diffusers_flux(*, guidance=True, doubles=2, singles=3, **changes):
    """A small FluxTransformer2DModel with random parameters."""
    values = SMALL | dict(num_layers=doubles, num_single_layers=singles, guidance_embeds=guidance)
    return randomise(FluxTransformer2DModel(**(values | changes)))


def diffusers_controlnet(
    *, guidance=True, doubles=2, singles=3, pixel=False, modes=None, seed=1, **changes
):
    """A small FluxControlNetModel with random parameters: on latents, on `pixel`s as XLabs', or a
    union of `modes`.
    """
    values = (
        SMALL
        | dict(
            num_layers=doubles, num_single_layers=singles, guidance_embeds=guidance, num_mode=modes
        )
        | changes
    )
    if pixel:
        values |= dict(patch_size=2, conditioning_embedding_channels=values["in_channels"] // 4)
    return randomise(FluxControlNetModel(**values), seed)


def ours_from(theirs):
    """Our Flux with the parameters of a FluxTransformer2DModel."""
    config = net_configs.config_from_diffusers(theirs.config)
    state = theirs.state_dict()
    model = Flux(config)
    model.load_state_dict(conversion.to_fluxlite(state, config, "diffusers"), strict=True)
    return model


def our_controlnet_from(theirs):
    """Our ControlNet with the parameters of a FluxControlNetModel."""
    config = net_configs.config_from_diffusers(theirs.config, ControlNetConfig)
    net = ControlNet(config)
    net.load_state_dict(
        conversion.to_fluxlite(theirs.state_dict(), config, "diffusers"), strict=True
    )
    return net


def made_up_inputs(config, dtype, tokens):
    """Made-up inputs of two samples for a Flux's forward, but for the rotations; (text, image)
    tokens.
    """
    draw = torch.Generator().manual_seed(0)
    text, image = tokens
    shapes = dict(
        img=(2, image, config.in_channels),
        txt=(2, text, config.text_width),
        pooled=(2, config.pooled_width),
    )
    drawn = {name: torch.randn(s, generator=draw).to(dtype) for name, s in shapes.items()}
    return drawn | dict(t=torch.tensor([0.2, 0.9]), guidance=torch.tensor([1.0, 4.0]))


def relative_error(ours, theirs):
    """‖ours − theirs‖ / ‖theirs‖."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def last_of_each(arguments):
    """key=value arguments, where a later one replaces one of its key: a command line takes each
    once.
    """
    return list({argument.split("=")[0]: argument for argument in arguments}.values())
