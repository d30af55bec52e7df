"""LoRA files of each dialect, written by hand: names, shapes and strengths as their programs write
them, and beside them what they mean.

A `Written` has the file's tensors, its header's metadata, and `meant`: {name of diffusers' weight
or bias: the difference in float64, by the definitions}. Nothing here uses the reader's tables.
"""

import json
from collections import namedtuple

import torch

Written = namedtuple("Written", "tensors metadata meant")
H, R, DOUBLES, SINGLES = 48, 4, 2, 1
WIDE, JOINT = 4 * H, 5 * H
TEXT, POOLED, CHANNELS, HEAD = 20, 14, 12, 16
STREAMS = {
    "img": ("to_{}", "to_out.0", "ff", "norm1"),
    "txt": ("add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
}


class Draw:
    """Values N(0, 0.02), in the order in which they are asked for."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape):
        return 0.02 * torch.randn(shape, generator=self.generator)


def diffusers_linears():
    """{name: (out, in)} of all linears of FluxTransformer2DModel at this size."""
    found = {"x_embedder": (H, CHANNELS), "context_embedder": (H, TEXT)}
    for kind, width in (("timestep", 256), ("guidance", 256), ("text", POOLED)):
        found[f"time_text_embed.{kind}_embedder.linear_1"] = (H, width)
        found[f"time_text_embed.{kind}_embedder.linear_2"] = (H, H)
    for i in range(DOUBLES):
        d = f"transformer_blocks.{i}"
        for qkv, out, ff, norm in STREAMS.values():
            found |= {f"{d}.attn.{qkv.format(x)}": (H, H) for x in "qkv"}
            found[f"{d}.attn.{out}"] = (H, H)
            found[f"{d}.{ff}.net.0.proj"], found[f"{d}.{ff}.net.2"] = (WIDE, H), (H, WIDE)
            found[f"{d}.{norm}.linear"] = (6 * H, H)
    for i in range(SINGLES):
        s = f"single_transformer_blocks.{i}"
        found |= {f"{s}.attn.to_{x}": (H, H) for x in "qkv"}
        found |= {f"{s}.proj_mlp": (WIDE, H), f"{s}.proj_out": (H, JOINT)}
        found[f"{s}.norm.linear"] = (3 * H, H)
    return found | {"norm_out.linear": (2 * H, H), "proj_out": (CHANNELS, H)}


def bfl_linears():
    """{name: (out, in)} of all linears of BFL's Flux at this size."""
    found = {"img_in": (H, CHANNELS), "txt_in": (H, TEXT)}
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", POOLED)):
        found |= {f"{name}.in_layer": (H, width), f"{name}.out_layer": (H, H)}
    for i in range(DOUBLES):
        for s in STREAMS:
            b = f"double_blocks.{i}.{s}"
            found |= {f"{b}_attn.qkv": (3 * H, H), f"{b}_attn.proj": (H, H)}
            found |= {f"{b}_mlp.0": (WIDE, H), f"{b}_mlp.2": (H, WIDE), f"{b}_mod.lin": (6 * H, H)}
    for i in range(SINGLES):
        b = f"single_blocks.{i}"
        found |= {f"{b}.linear1": (3 * H + WIDE, H), f"{b}.linear2": (H, JOINT)}
        found[f"{b}.modulation.lin"] = (3 * H, H)
    found["final_layer.adaLN_modulation.1"] = (2 * H, H)
    return found | {"final_layer.linear": (CHANNELS, H)}


def as_diffusers(name, values):
    """{name: values} in diffusers' modules of a difference (out, …) of BFL's module `name`."""
    one = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        **{
            f"{a}.{b}_layer": f"time_text_embed.{c}_embedder.linear_{d}"
            for a, c in (
                ("time_in", "timestep"),
                ("guidance_in", "guidance"),
                ("vector_in", "text"),
            )
            for b, d in (("in", 1), ("out", 2))
        },
    }
    if name in one:
        return {one[name]: values}
    if name == "final_layer.adaLN_modulation.1":
        shift, scale = values[:H], values[H:]
        return {"norm_out.linear": torch.cat([scale, shift])}
    kind, i, rest = name.split(".", 2)
    if kind == "single_blocks":
        s = f"single_transformer_blocks.{i}"
        if rest != "linear1":
            return {
                f"{s}.{ {'linear2': 'proj_out', 'modulation.lin': 'norm.linear'}[rest] }": values
            }
        q, k, v, mlp = values[:H], values[H : 2 * H], values[2 * H : 3 * H], values[3 * H :]
        return {f"{s}.attn.to_q": q, f"{s}.attn.to_k": k, f"{s}.attn.to_v": v, f"{s}.proj_mlp": mlp}
    stream, _, rest = rest.partition("_")
    qkv, out, ff, norm = STREAMS[stream]
    d = f"transformer_blocks.{i}"
    if rest == "attn.qkv":
        parts = values[:H], values[H : 2 * H], values[2 * H :]
        return {f"{d}.attn.{qkv.format(x)}": part for x, part in zip("qkv", parts)}
    to = {"attn.proj": f"attn.{out}", "mlp.0": f"{ff}.net.0.proj", "mlp.2": f"{ff}.net.2"}
    return {f"{d}.{(to | {'mod.lin': f'{norm}.linear'})[rest]}": values}


def meant_of(name, values, leaf="weight"):
    """`as_diffusers` of either layout's module, with the names of weights or biases."""
    bfl = name.startswith(
        ("double", "single_blocks", "img_in", "txt_in", "final", "vector_in")
    ) or name.startswith(("time_in", "guidance_in"))
    found = as_diffusers(name, values) if bfl else {name: values}
    return {f"{module}.{leaf}": part for module, part in found.items()}


def low_rank_file(linears, key, suffixes, *, alpha=None, ranks=None, seed=0, scale=None):
    """A file of one low-rank pair for each of {name: (out, in)}; key(name) is its key's start."""
    draw, tensors, meant = Draw(seed), {}, {}
    for number, (name, (rows, columns)) in enumerate(linears.items()):
        r = ranks[number % len(ranks)] if ranks else R
        down, up = draw(r, columns), draw(rows, r)
        tensors |= {f"{key(name)}.{suffixes[0]}": down, f"{key(name)}.{suffixes[1]}": up}
        strength = 1.0 if scale is None else scale(name, r)
        if alpha is not None:
            tensors[f"{key(name)}.alpha"] = torch.tensor(alpha)
            strength = alpha / r
        meant |= meant_of(name, strength * (up.double() @ down.double()))
    return Written(tensors, {}, meant)


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


def underscored(prefix):
    return lambda name: prefix + name.replace(".", "_")


def dotted(prefix):
    return lambda name: prefix + name


def peft(seed=0, **options):
    return low_rank_file(diffusers_linears(), dotted("transformer."), AB, seed=seed, **options)


def peft_metadata(rslora):
    """peft's settings in the header, as diffusers writes them: patterns of ranks and alphas."""
    own = {"transformer_blocks.0.attn.to_q": 2, "proj_out": 2}
    names = list(diffusers_linears())
    ranks = [own.get(name, R) for name in names]

    def scale(name, r):
        alpha = 16.0 if name.startswith("single_transformer_blocks.0.attn.") else 6.0
        return alpha / (r**0.5 if rslora else r)

    made = peft(ranks=ranks, scale=scale)
    config = {
        "transformer.r": R,
        "transformer.lora_alpha": 6,
        # the last layer's, and not that of the single block
        "transformer.rank_pattern": {"transformer_blocks.0.attn.to_q": 2, "^proj_out": 2},
        "transformer.alpha_pattern": {r"single_transformer_blocks\.0\.attn\..*": 16},
        "transformer.use_rslora": rslora,
        "transformer.target_modules": names,
    }
    return made._replace(metadata={"lora_adapter_metadata": json.dumps(config)})


def kohya(seed=0, only=None):
    linears = {name: shape for name, shape in bfl_linears().items() if not only or only in name}
    return low_rank_file(linears, underscored("lora_unet_"), DOWN_UP, alpha=2.0, seed=seed)


def kohya_split(training):
    """split_qkv: down stacked, up block-diagonal, alpha that of one part."""
    draw, tensors, meant = Draw(3), {}, {}
    for name, (rows, columns) in bfl_linears().items():
        parts = [H, H, H] if name.endswith("qkv") else [rows]
        parts = [H, H, H, WIDE] if name.endswith("linear1") else parts
        downs, ups = [draw(R, columns) for _ in parts], [draw(part, R) for part in parts]
        key, alpha = underscored("lora_unet_")(name), 2.0
        down, up = torch.cat(downs), torch.block_diag(*ups)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        strength = alpha / R if training else alpha / (R * len(parts))
        meant |= meant_of(name, strength * (up.double() @ down.double()))
    return Written(tensors, {}, meant)


def xlabs(prefix=""):
    draw, tensors, meant = Draw(4), {}, {}

    def put(key, name, rows, columns, whole=None):
        down, up = draw(R, columns), draw(rows, R)
        tensors[f"{prefix}{key}.down.weight"], tensors[f"{prefix}{key}.up.weight"] = down, up
        values = up.double() @ down.double()
        if whole:
            values = torch.cat([values, torch.zeros(whole - rows, columns)])
        parts = meant_of(name, values)
        meant.update({part: change for part, change in parts.items() if change.any()})

    for i in range(DOUBLES):
        for n, s in ((1, "img"), (2, "txt")):
            processor, b = f"double_blocks.{i}.processor", f"double_blocks.{i}.{s}_attn"
            put(f"{processor}.qkv_lora{n}", f"{b}.qkv", 3 * H, H)
            put(f"{processor}.proj_lora{n}", f"{b}.proj", H, H)
    for i in range(SINGLES):
        b = f"single_blocks.{i}"
        put(f"{b}.processor.qkv_lora", f"{b}.linear1", 3 * H, H, 3 * H + WIDE)
        put(f"{b}.processor.proj_lora", f"{b}.linear2", H, JOINT)
    return Written(tensors, {}, meant)


def bfl_control(channels=CHANNELS, rank=8):
    """BFL's: bare names, biases, ranks of at most the smaller side; norms' scales are apart."""
    draw, tensors, meant = Draw(5), {}, {}
    for name, (rows, columns) in bfl_linears().items():
        columns = channels if name == "img_in" else columns
        r = min(rank, rows, columns)
        down, up, bias = draw(r, columns), draw(rows, r), draw(rows)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        tensors[f"{name}.lora_B.bias"] = bias
        meant |= meant_of(name, up.double() @ down.double())
        meant |= meant_of(name, bias.double(), "bias")
    return Written(tensors, {}, meant)


def norm_scales():
    """{BFL's key: values (D,)} of all norms of queries and keys, and diffusers' names."""
    draw, found = Draw(6), {}
    for i in range(DOUBLES):
        for s, added in (("img", ""), ("txt", "added_")):
            for x, word in (("q", "query"), ("k", "key")):
                key = f"double_blocks.{i}.{s}_attn.norm.{word}_norm.scale"
                found[key] = f"transformer_blocks.{i}.attn.norm_{added}{x}.weight"
    for i in range(SINGLES):
        for x, word in (("q", "query"), ("k", "key")):
            key = f"single_blocks.{i}.norm.{word}_norm.scale"
            found[key] = f"single_transformer_blocks.{i}.attn.norm_{x}.weight"
    return {key: (1 + draw(HEAD), theirs) for key, theirs in found.items()}


def comfy_diffs():
    """ComfyUI's whole differences of weights, biases and norms beside factors without an alpha."""
    draw = Draw(7)
    made = low_rank_file(bfl_linears(), dotted("diffusion_model."), AB, seed=8)
    tensors, meant = dict(made.tensors), dict(made.meant)
    for name in ("double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1"):
        rows, columns = bfl_linears()[name]
        for suffix in ("lora_A.weight", "lora_B.weight"):
            del tensors[f"diffusion_model.{name}.{suffix}"]
        diff, bias = draw(rows, columns), draw(rows)
        tensors |= {f"diffusion_model.{name}.diff": diff, f"diffusion_model.{name}.diff_b": bias}
        meant |= meant_of(name, diff.double()) | meant_of(name, bias.double(), "bias")
    scale = draw(HEAD)
    tensors["diffusion_model.double_blocks.1.txt_attn.norm.key_norm.scale.diff"] = scale
    meant["transformer_blocks.1.attn.norm_added_k.weight"] = scale.double()
    return Written(tensors, {}, meant)


def loha(linears, key):
    draw, tensors, meant = Draw(9), {}, {}
    for name, (rows, columns) in linears.items():
        w1_a, w1_b, w2_a, w2_b = draw(rows, R), draw(R, columns), draw(rows, R), draw(R, columns)
        parts = {"w1_a": w1_a, "w1_b": w1_b, "w2_a": w2_a, "w2_b": w2_b}
        tensors |= {f"{key(name)}.hada_{part}": tensor for part, tensor in parts.items()}
        tensors[f"{key(name)}.alpha"] = torch.tensor(3.0)
        first, second = w1_a.double() @ w1_b.double(), w2_a.double() @ w2_b.double()
        meant |= meant_of(name, first * second * 3 / R)
    return Written(tensors, {}, meant)


def lokr(linears, key, full, factor=4):
    """LyCORIS's LoKr: both factors full, with ai-toolkit's alpha, or the second decomposed."""
    draw, tensors, meant = Draw(10), {}, {}
    for name, (rows, columns) in linears.items():
        w1 = draw(factor, factor if columns % factor == 0 else 2)
        w2 = draw(rows // w1.shape[0], columns // w1.shape[1])
        tensors[f"{key(name)}.lokr_w1"] = w1
        if full:
            tensors[f"{key(name)}.lokr_w2"] = w2
            tensors[f"{key(name)}.alpha"] = torch.tensor(9999999999.0).half()
            strength = 1.0
        else:
            a, b = draw(w2.shape[0], 2), draw(2, w2.shape[1])
            tensors |= {f"{key(name)}.lokr_w2_a": a, f"{key(name)}.lokr_w2_b": b}
            tensors[f"{key(name)}.alpha"] = torch.tensor(1.0)
            w2, strength = a.double() @ b.double(), 1.0 / 2
        meant |= meant_of(name, strength * torch.kron(w1.double(), w2.double()))
    return Written(tensors, {}, meant)


def dora(linears, key, base, per_output, suffixes=DOWN_UP, vector="dora_scale"):
    """DoRA over {name: weight} of the layout that `linears` are of."""
    draw, tensors, meant = Draw(11), {}, {}
    for name, (rows, columns) in linears.items():
        down, up = draw(R, columns), draw(rows, R)
        tensors |= {f"{key(name)}.{suffixes[0]}": down, f"{key(name)}.{suffixes[1]}": up}
        shape = (rows, 1) if per_output else (1, columns)
        magnitude = 1 + 10 * draw(*shape)
        kept = magnitude[:, 0] if vector.startswith("lora_magnitude") else magnitude
        tensors[f"{key(name)}.{vector}"] = kept.clone()
        weight = base[f"{name}.weight"].double()
        whole = weight + up.double() @ down.double()
        norm = whole.norm(dim=1 if per_output else 0, keepdim=True)
        meant |= meant_of(name, magnitude.double() * whole / norm - weight)
    return Written(tensors, {}, meant)
