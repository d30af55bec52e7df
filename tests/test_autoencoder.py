import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from reference import randomise, relative_error
from safetensors.torch import save_file

from fluxlite.nets.autoencoder import Autoencoder, sample_posterior, tile_starts
from fluxlite.nets.configs import AutoencoderConfig
from fluxlite.weights import conversion
from fluxlite.weights.hub import ASSETS
from fluxlite.weights.sources import load_autoencoder

TINY = ASSETS / "flux-tiny"
SMALL = dict(
    block_out_channels=(8, 16, 16), layers_per_block=2, latent_channels=4, norm_num_groups=4
)


@pytest.fixture
def pair(tmp_path):
    """diffusers' small autoencoder with random parameters, saved, and ours loaded from it."""
    levels = len(SMALL["block_out_channels"])
    theirs = AutoencoderKL(
        **SMALL,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    randomise(theirs).eval().save_pretrained(tmp_path / "vae")
    return theirs, load_autoencoder(tmp_path / "vae"), tmp_path


def test_both_ways_match_diffusers(pair):
    theirs, ours, _ = pair
    images = torch.rand(2, 3, 24, 40) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, logvar = ours.posterior(images)
        assert mean.shape == (2, 4, 6, 10)
        assert (
            relative_error(mean, posterior.mean) < 1e-5
            and relative_error(logvar, posterior.logvar) < 1e-5
        )
        noise = torch.randn(mean.shape)
        expected = (posterior.mean + posterior.std * noise - 0.1159) * 0.3611
        assert relative_error(ours.encode(images, noise), expected) < 1e-5
        assert relative_error(ours.encode(images), (posterior.mode() - 0.1159) * 0.3611) < 1e-5
        latents = torch.randn(2, 4, 6, 10)
        assert (
            relative_error(ours.decode(latents), theirs.decode(latents / 0.3611 + 0.1159).sample)
            < 1e-5
        )


def bfl_state(ours):
    """The names and shapes of `ae.safetensors`, built from the published layout alone."""
    state, levels = {}, len(SMALL["block_out_channels"])
    for key, value in ours.state_dict().items():
        side, kind, *rest = key.split(".")
        if kind in ("down_blocks", "up_blocks"):
            level = int(rest[0]) if kind == "down_blocks" else levels - 1 - int(rest[0])
            if rest[1] == "resnets":
                leaf = ".".join(rest[3:]).replace("conv_shortcut", "nin_shortcut")
                name = f"{side}.{kind.split('_')[0]}.{level}.block.{rest[2]}.{leaf}"
            else:
                way = kind.split("_")[0]
                name = f"{side}.{way}.{level}.{way}sample.{'.'.join(rest[3:])}"
        elif kind == "mid_block" and rest[0] == "resnets":
            name = f"{side}.mid.block_{int(rest[1]) + 1}.{'.'.join(rest[2:])}"
        elif kind == "mid_block":
            leaf = {
                "group_norm": "norm",
                "to_q": "q",
                "to_k": "k",
                "to_v": "v",
                "to_out": "proj_out",
            }[rest[2]]
            name = f"{side}.mid.attn_1.{leaf}.{rest[-1]}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        else:
            name = key.replace("conv_norm_out", "norm_out")
        state[name] = value.contiguous()
    return state


def test_bfl_file_is_the_same_autoencoder(pair):
    _, ours, _ = pair
    state, mine = bfl_state(ours), ours.state_dict()
    got = dict(conversion.convert_weights(mine.__getitem__, "diffusers", "bfl", ours.config))
    assert got.keys() == state.keys() and all(torch.equal(got[k], state[k]) for k in state)
    assert "decoder.up.2.block.0.conv1.weight" in state and "encoder.mid.attn_1.q.weight" in state


def test_ae_safetensors_of_full_size_loads_strictly(tmp_path):
    reference = Autoencoder(AutoencoderConfig())
    levels = SMALL["block_out_channels"]
    SMALL["block_out_channels"] = (128, 256, 512, 512)
    try:
        save_file(bfl_state(reference), tmp_path / "ae.safetensors")
    finally:
        SMALL["block_out_channels"] = levels
    loaded = load_autoencoder(tmp_path / "ae.safetensors").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in reference.state_dict().items())
    with pytest.raises(ValueError, match="model.autoencoder"):
        load_autoencoder(tmp_path / "nothing")


def test_flux_autoencoder_has_the_shapes_of_diffusers():
    with torch.device("meta"):
        theirs = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        ours = Autoencoder(AutoencoderConfig())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


def test_posterior_is_sampled_or_its_mode():
    mean, logvar, noise = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(sample_posterior(mean, logvar), mean)
    assert torch.allclose(sample_posterior(mean, logvar, noise), mean + logvar.exp().sqrt() * noise)


def test_one_tile_that_covers_a_picture_is_the_whole_of_it(pair):
    _, ours, _ = pair
    latents = torch.randn(2, 4, 6, 10)
    with torch.no_grad():
        whole = ours.decode(latents)
        assert torch.equal(ours.decode_tiled(latents, 10), whole)
        assert torch.equal(ours.decode_tiled(latents, 99), whole)
        assert not torch.equal(ours.decode_tiled(latents, 8), whole)


@pytest.mark.parametrize("size, tile", [(8, 8), (9, 8), (14, 8), (15, 8), (100, 8), (33, 4)])
def test_tiles_cover_every_cell_and_overlap_by_a_quarter(size, tile):
    starts = tile_starts(size, tile)
    assert starts[0] == 0 and starts[-1] == max(0, size - tile)
    assert all(0 < b - a <= tile - tile // 4 for a, b in zip(starts, starts[1:]))


def test_a_tiled_picture_has_no_seam_and_differs_by_what_norms_see():
    """A picture, 256 pixels a side, in tiles of 128, by the shipped autoencoder."""
    ours = load_autoencoder(TINY)
    picture = torch.from_numpy(np.asarray(Image.open(ASSETS.parent / "docs/circle.png")).copy())
    picture = picture.permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latents = ours.encode(picture)
        whole, tiled = ours.decode(latents), ours.decode_tiled(latents, 16)
    assert tiled.shape == whole.shape and tiled.dtype == torch.float32
    error = (tiled - whole).abs() * 127.5
    assert 0.1 < error.mean() < 8, error.mean()
    # where tiles meet, neighbouring pixels differ no more than elsewhere
    steps = (tiled - whole).diff(dim=3).abs()
    seams = steps[..., ours.config.downsampling * 4 :: ours.config.downsampling * 4]
    assert seams.mean() < 1.5 * steps.mean()
