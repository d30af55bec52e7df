"""Context parallelism (Ulysses, arXiv 2309.14509): ranks share the tokens of a sample.

A rank holds its part of the tokens, and in attention all tokens of some heads. B batch, L tokens,
H hidden width, N heads, D head width.
"""

from functools import partial
from itertools import chain

import torch
from einops import rearrange

from fluxlite.parallel.exchange import JoinTokens, exchange_parts


def share_tokens(model, cp, tp):
    """Give each rank of `cp`, and of `tp` unless it is None, its part of the text and of the image.

    The parts of the output are joined. What is between, `residuals` included, has the rank's tokens
    alone. The joint sequence is then
    (text, image) of the first rank, (text, image) of the second, …; so are the rotations.
    """
    joint = {}

    def enter(_module, args, kwargs):
        img, txt, rope = args
        if "hint" in kwargs:
            kwargs["hint"] = kwargs["hint"].chunk(cp.size(), dim=1)[cp.get_local_rank()]
        parts = [x.chunk(cp.size(), dim=1)[cp.get_local_rank()] for x in (img, txt)]
        joint["double"] = reorder_tables(rope, txt.shape[1], cp.size())
        joint["single"] = reorder_tables(rope, txt.shape[1], cp.size() * (tp.size() if tp else 1))
        return (*parts, joint["double"]), kwargs

    def enter_single(_module, args):
        x, modulation, _, attend = args
        return x, modulation, joint["single"], attend

    model.register_forward_pre_hook(enter, with_kwargs=True)
    if tp is not None:
        for block in model.single_blocks:
            block.register_forward_pre_hook(enter_single)
    if cp.size() > 1:
        model.attend = partial(attend_by_heads, model.attend, cp)
        if model.joins_tokens:
            model.register_forward_hook(lambda _module, _args, out: JoinTokens.apply(out, cp))


def share_velocity(model, cp):
    """Let ranks of `cp` share the tokens of each `Flux.velocity`, which is whole on all of them.

    So are what it is given and its residuals.
    """
    model.attend = partial(attend_by_heads, model.attend, cp)
    model.velocity = partial(velocity_by_tokens, model.velocity, cp)


def velocity_by_tokens(velocity, cp, img, txt, rope, modulation, residuals=None):
    """`Flux.velocity`, of whose tokens this rank computes its part."""

    def own_tokens(x):
        return x.chunk(cp.size(), dim=1)[cp.get_local_rank()]

    tables = reorder_tables(rope, txt.shape[1], cp.size())
    parts = [list(map(own_tokens, of_kind)) for of_kind in residuals or ()]
    own = velocity(own_tokens(img), own_tokens(txt), tables, modulation, parts or None)
    return JoinTokens.apply(own, cp)


def reorder_tables(rope, num_text_tokens, parts):
    """Tables for (text | image), reordered to (text, image) of each of so many parts in turn."""
    if parts == 1:
        return rope
    reordered = []
    for table in rope:
        text, image = table[:num_text_tokens].chunk(parts), table[num_text_tokens:].chunk(parts)
        reordered.append(torch.cat([*chain.from_iterable(zip(text, image))]))
    return tuple(reordered)


def attend_by_heads(attend, mesh, q, k, v, rope):
    """`attend` for q, k, v (B, L/cp, N, D): for all tokens and N/cp heads, then (B, L/cp, N·D)."""
    ranks = mesh.size()
    heads = rearrange(torch.stack([q, k, v]), "three b l (c n) d -> c three b l n d", c=ranks)
    q, k, v = rearrange(exchange_parts(heads, mesh), "c three b l n d -> three b (c l) n d")
    out = attend(q, k, v, rope)
    return rearrange(
        exchange_parts(rearrange(out, "b (c l) h -> c b l h", c=ranks), mesh),
        "c b l h -> b l (c h)",
    )
