"""What the code computed once, kept in `golden/`: pictures and latents of the shipped weights,
losses and gradients of small nets.

    python tests/make_golden.py        # writes the files anew, where results are meant to change

`test_golden` compares them with what the code computes now. Weights and gradients have diffusers'
names and layout, whatever ours is: a model gets its weights and gives its gradients through
`convert`. Of a gradient, its norm and its inner products with `NUM_DIRECTIONS` random vectors are
kept. All is float32 on the CPU.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from reference import SMALL, our_controlnet_from, ours_from

import fluxlite
from fluxlite import rng
from fluxlite.nets import flow
from fluxlite.nets.controlnet import spread_samples
from fluxlite.nets.flux import rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.weights import conversion
from fluxlite.weights.hub import ASSETS

FOLDER, ROOT = Path(__file__).parent / "golden", Path(__file__).parents[1]
NUM_DIRECTIONS = 3
HEIGHT, WIDTH, NUM_TEXT, BATCH = 8, 12, 5, 2  # latent cells, text tokens, samples

# --- pictures -----------------------------------------------------------------------------------

PROMPTS = ["red circle with blue background", "gold circle with teal background"]
NEGATIVE = dict(negative_prompt="green circle with white background", true_cfg=2.5)
NET = fluxlite.Control(ASSETS / "flux-tiny" / "controlnet", ROOT / "docs" / "circle.png")
DRAWINGS = {  # options of `generate`
    "plain, seed 0": dict(seed=0),
    "plain, seed 1": dict(seed=1),
    "plain, true CFG": dict(seed=0, **NEGATIVE),
    "control, seed 0": dict(seed=0, controls=[NET]),
    "control, seed 1": dict(seed=1, controls=[NET]),
    "control, true CFG": dict(seed=0, controls=[NET], **NEGATIVE),
}


def draw_golden(pipeline, options):
    """Pictures (P, 64, 64, 3) uint8 of `PROMPTS` and their latents (P, C, h, w) float32."""
    latents, decode = [], pipeline.autoencoder.decode

    def keep_and_decode(x):
        latents.append(x.clone())
        return decode(x)

    pipeline.autoencoder.decode = keep_and_decode
    try:
        pictures = fluxlite.generate(PROMPTS, checkpoint=pipeline, **options)
    finally:
        del pipeline.autoencoder.decode
    return np.stack([np.asarray(p) for p in pictures]), torch.cat(latents).numpy()


# --- training steps -----------------------------------------------------------------------------

DEPTH = dict(num_layers=2, num_single_layers=2, guidance_embeds=True)
PIXEL = dict(
    num_single_layers=0, patch_size=2, conditioning_embedding_channels=SMALL["in_channels"] // 4
)
NETS = {  # what is trained: the transformer, or a ControlNet with these changes beside it, frozen
    "flux": None,
    "controlnet": dict(num_mode=3),
    "controlnet of doubles": PIXEL,
}


def draw_golden_values(shape, name):
    """Standard normal float32 values that depend on `name` alone."""
    return torch.randn(shape, generator=rng.generator(0, name, "golden"))


@torch.no_grad()
def fill_golden(theirs):
    """Give a model of diffusers random non-trivial weights, keyed by their names."""
    for name, p in theirs.named_parameters():
        values = draw_golden_values(p.shape, name)
        if p.ndim == 1 and "norm_" in name and name.endswith("weight"):
            p.copy_(1 + 0.3 * values)
        else:
            p.copy_(values * (p[0].numel() if p.ndim > 1 else 10) ** -0.5)
    return theirs


def make_golden_nets(changes):
    """Diffusers' transformer and, unless `changes` is None, a ControlNet beside it."""
    base = fill_golden(FluxTransformer2DModel(**SMALL, **DEPTH))
    if changes is None:
        return base, None
    return base, fill_golden(FluxControlNetModel(**SMALL | DEPTH | changes))


def make_golden_batch():
    """Clean tokens, noise and all that a step takes beside them."""
    tokens = BATCH, HEIGHT * WIDTH // 4, SMALL["in_channels"]
    shapes = dict(x0=tokens, noise=tokens, latent=tokens, pixel=(BATCH, 3, 8 * HEIGHT, 8 * WIDTH))
    shapes |= dict(
        txt=(BATCH, NUM_TEXT, SMALL["joint_attention_dim"]),
        pooled=(BATCH, SMALL["pooled_projection_dim"]),
    )
    drawn = {name: draw_golden_values(shape, f"input {name}") for name, shape in shapes.items()}
    return drawn | dict(
        t=torch.tensor([0.3, 0.8]), guidance=torch.tensor([1.0, 3.5]), mode=torch.tensor([2, 0])
    )


def take_our_step(theirs, control):
    """Loss and gradients, under diffusers' names, of our nets with the weights of diffusers'."""
    base, batch = ours_from(theirs), make_golden_batch()
    rope = rope_table(position_ids(HEIGHT, WIDTH, NUM_TEXT), base.config)
    args = flow.add_noise(batch["x0"], batch["noise"], batch["t"]), batch["txt"], rope
    inputs, trained, residuals = {k: batch[k] for k in ("t", "pooled", "guidance")}, base, None
    if control is not None:
        base.requires_grad_(False)
        trained = our_controlnet_from(control)
        steer = dict(
            hint=batch[trained.config.hint],
            mode=batch["mode"] if trained.config.num_modes else None,
        )
        residuals = spread_samples(trained(*args, **inputs, **steer), trained.config, base.config)
    loss = flow.velocity_loss(
        base(*args, **inputs, residuals=residuals), batch["x0"], batch["noise"]
    ).mean()
    loss.backward()
    return loss.item(), conversion.from_fluxlite(gradients_of(trained), trained.config, "diffusers")


def take_their_step(theirs, control):
    """The same of diffusers' nets themselves."""
    batch, ids = make_golden_batch(), position_ids(HEIGHT, WIDTH, NUM_TEXT).float()
    inputs = dict(
        hidden_states=flow.add_noise(batch["x0"], batch["noise"], batch["t"]),
        encoder_hidden_states=batch["txt"],
        pooled_projections=batch["pooled"],
        timestep=batch["t"],
        guidance=batch["guidance"],
        txt_ids=ids[:NUM_TEXT],
        img_ids=ids[NUM_TEXT:],
        return_dict=False,
    )
    trained, added = theirs, {}
    if control is not None:
        theirs.requires_grad_(False)
        pixel, union = control.input_hint_block is not None, control.union
        trained, mode = control, batch["mode"][:, None] if union else None
        samples = control(
            controlnet_cond=batch["pixel" if pixel else "latent"], controlnet_mode=mode, **inputs
        )
        names = "controlnet_block_samples", "controlnet_single_block_samples"
        added = dict(zip(names, samples), controlnet_blocks_repeat=pixel)
    loss = flow.velocity_loss(theirs(**inputs, **added)[0], batch["x0"], batch["noise"]).mean()
    loss.backward()
    return loss.item(), gradients_of(trained)


def gradients_of(module):
    """{name: gradient}, zeros where a backward left none."""
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()
    }


def sketch_gradient(name, gradient):
    """Its norm and its inner products with the random vectors of its name, in float64."""
    flat = gradient.double().flatten()
    vectors = [draw_golden_values(gradient.shape, f"{i} {name}") for i in range(NUM_DIRECTIONS)]
    return [flat.norm().item(), *(flat.dot(v.double().flatten()).item() for v in vectors)]


def sketch_step(loss, gradients):
    """What is kept of a step: {"loss": a number, name of a parameter: its gradient's sketch}."""
    return {"loss": loss} | {name: sketch_gradient(name, g) for name, g in gradients.items()}


# --- files --------------------------------------------------------------------------------------


def step_path(name):
    """Where the step of one of `NETS` is kept."""
    return FOLDER / f"{name.replace(' ', '_')}.json"


def write_lines(path, values):
    """JSON with a line for each entry."""
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in values.items())
    path.write_text(f"{{\n{lines}\n}}\n")


def main():
    pipeline = fluxlite.load_pipeline(device="cpu", dtype=torch.float32)
    pictures, latents = zip(*(draw_golden(pipeline, options) for options in DRAWINGS.values()))
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "pictures.npz", **dict(zip(DRAWINGS, pictures)))
    np.savez_compressed(FOLDER / "latents.npz", **dict(zip(DRAWINGS, latents)))
    for name, changes in NETS.items():
        write_lines(step_path(name), sketch_step(*take_our_step(*make_golden_nets(changes))))


if __name__ == "__main__":
    main()
