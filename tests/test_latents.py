import pytest
import torch
from diffusers import FluxPipeline

from fluxlite.nets.latents import (
    check_size,
    num_image_tokens,
    pack_latents,
    position_ids,
    unpack_latents,
)


def test_unpack_inverts_pack():
    x = torch.randn(2, 16, 6, 10)
    tokens = pack_latents(x)
    assert tokens.shape == (2, num_image_tokens(6, 10), 64)
    assert torch.equal(unpack_latents(tokens, 6, 10), x)


def test_packing_and_positions_match_diffusers():
    x = torch.randn(3, 16, 6, 10)
    assert torch.equal(pack_latents(x), FluxPipeline._pack_latents(x, 3, 16, 6, 10))
    theirs = FluxPipeline._prepare_latent_image_ids(3, 3, 5, "cpu", torch.float32)
    ids = position_ids(6, 10, 4)
    assert torch.equal(ids[4:].float(), theirs) and ids[:4].eq(0).all()


def test_sizes_that_do_not_divide_name_the_nearest():
    with pytest.raises(ValueError, match="width=1000.*992 and 1008"):
        check_size(1024, 1000, 8)
    with pytest.raises(ValueError, match="height=7.*16"):
        check_size(7, 16, 8)
    check_size(16, 1040, 8)
