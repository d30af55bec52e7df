"""float8 products of the blocks' linears, by torchao: faster than bfloat16, and lossy.

What enters a product is rounded to three bits of mantissa and scaled, by row or by tensor; sums are
float32. Embedders, modulation and ends stay as they are. In training (`train_in_float8`) weights
keep their name and type, and are rounded in each product; for drawing (`quantize_linears`) once.
"""

from dataclasses import replace

import torch
from torch import nn

from fluxlite.cli.messages import quiet_torchao, warn_for_all
from fluxlite.nets.quantized import LOSSES, quantized_linears

LOSSY = "%s: %d linears of the blocks multiply in float8, which is lossy"


def block_linears(model):
    """{name: linear} of a model's blocks: all that is ever in float8."""
    return quantized_linears(model, ("double_blocks.", "single_blocks."))


def train_in_float8(model, kind):
    """Let the blocks' linears of a model, on any device or meta, multiply in float8 in training.

    `kind` is rowwise or tensorwise. Without a GPU the products are emulated in float32.
    """
    with quiet_torchao():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(kind)
    config = replace(config, emulate=not torch.cuda.is_available())
    names = block_linears(model).keys()
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)
    warn_for_all(LOSSY, f"parallel.float8={kind}", len(names))


def quantize_linears(model, device):
    """Move a model's blocks to a device, the weights of their linears rounded to float8 on the way,
    a scale a row. Inputs are rounded in each product. The model is in bfloat16, the device a GPU.
    """
    with quiet_torchao():
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )

    options = dict(granularity=PerRow(), set_inductor_config=False)  # which would set others' too
    config = Float8DynamicActivationFloat8WeightConfig(**options)
    names = block_linears(model).keys()
    for block in (*model.double_blocks, *model.single_blocks):
        quantize_(block, config, filter_fn=lambda m, _: isinstance(m, nn.Linear), device=device)
    warn_for_all(LOSSY, "float8=true", len(names))


def warn_of_rounding(kind):
    """Say what quantising by model.quantize=`kind` loses."""
    if kind != "none":
        where = "model.quantize=%s rounds the linears of blocks and modulation"
        warn_for_all(f"{where}, each weight by at most %s", kind, LOSSES[kind])


def lossy_settings(settings):
    """What a run's config and a picture's metadata say of {key: value} that round: {"lossy":
    [setting, …]} or {}.
    """
    used = [f"{k}={str(v).lower()}" for k, v in settings.items() if v not in (False, "none")]
    return {"lossy": used} if used else {}
