"""Differences of a linear's weight that are not stored whole, and a linear that computes with them.

`LowRank`, `Hadamard`, `Kronecker` and `DenseForm` are the forms in which LoRA files hold a
difference ΔW (out, in). Each can be written out (`dense`), cut (`rows`, `columns`) and applied to
inputs without being written out. `AdapterTerm` is such a form as a module, with its strength and,
of DoRA, how the sum is rescaled. `AdaptedLinear` is a linear with terms beside its weight, which is
untouched. `Adapters` are those that are trained, a model by themselves: `parallel.adapters` puts
them beside the linears of a wrapped one.

Definitions: LoRA arXiv 2106.09685; LoHa and LoKr LyCORIS, arXiv 2309.14859; DoRA arXiv 2402.09353.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fluxlite.nets.quantized import QuantizedLinear, quantized_class


def pick_indices(tensor, index, dim):
    """The rows (dim 0) or columns (dim 1) `index` of a tensor, a view where they are adjacent."""
    first, count = int(index[0]), len(index)
    if torch.equal(index, torch.arange(first, first + count)):
        return tensor.narrow(dim, first, count)
    return tensor.index_select(dim, index.to(tensor.device))


class LowRank(NamedTuple):
    """up (out, r) · down (r, in)."""

    down: torch.Tensor
    up: torch.Tensor

    @property
    def shape(self):
        return self.up.shape[0], self.down.shape[1]

    def dense(self):
        return self.up @ self.down

    def rows(self, index):
        return LowRank(self.down, pick_indices(self.up, index, 0))

    def columns(self, index):
        return LowRank(pick_indices(self.down, index, 1), self.up)

    def apply(self, x):
        return F.linear(F.linear(x, self.down), self.up)


class Hadamard(NamedTuple):
    """(w1_a · w1_b) ∘ (w2_a · w2_b), each factor (out, r) · (r, in): LoHa."""

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor

    @property
    def shape(self):
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def dense(self):
        return (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)

    def rows(self, index):
        w1_a, w2_a = (pick_indices(w, index, 0) for w in (self.w1_a, self.w2_a))
        return Hadamard(w1_a, self.w1_b, w2_a, self.w2_b)

    def columns(self, index):
        w1_b, w2_b = (pick_indices(w, index, 1) for w in (self.w1_b, self.w2_b))
        return Hadamard(self.w1_a, w1_b, self.w2_a, w2_b)

    def apply(self, x):
        return F.linear(x, self.dense())


class Kronecker(NamedTuple):
    """w1 ⊗ w2, each factor whole or two that are multiplied, and the rows and columns of it that
    are meant: LoKr.
    """

    w1: torch.Tensor | None
    w1_a: torch.Tensor | None
    w1_b: torch.Tensor | None
    w2: torch.Tensor | None
    w2_a: torch.Tensor | None
    w2_b: torch.Tensor | None
    row_index: torch.Tensor | None = None
    column_index: torch.Tensor | None = None

    def factors(self):
        """w1 and w2, multiplied out."""
        first = self.w1 if self.w1 is not None else self.w1_a @ self.w1_b
        return first, self.w2 if self.w2 is not None else self.w2_a @ self.w2_b

    def factor_shapes(self):
        """Their shapes."""
        w1 = self.w1.shape if self.w1 is not None else (len(self.w1_a), self.w1_b.shape[1])
        w2 = self.w2.shape if self.w2 is not None else (len(self.w2_a), self.w2_b.shape[1])
        return w1, w2

    @property
    def shape(self):
        (rows, columns), (of_rows, of_columns) = self.factor_shapes()
        found = [rows * of_rows, columns * of_columns]
        for dim, index in enumerate((self.row_index, self.column_index)):
            found[dim] = found[dim] if index is None else len(index)
        return tuple(found)

    def dense(self):
        whole = torch.kron(*self.factors())
        for dim, index in enumerate((self.row_index, self.column_index)):
            if index is not None:
                whole = whole.index_select(dim, index.to(whole.device))
        return whole

    def rows(self, index):
        index = index if self.row_index is None else self.row_index[index]
        return self._replace(row_index=index)

    def columns(self, index):
        index = index if self.column_index is None else self.column_index[index]
        return self._replace(column_index=index)

    def apply(self, x):
        if self.row_index is not None or self.column_index is not None:
            return F.linear(x, self.dense())
        w1, w2 = self.factors()
        x = x.unflatten(-1, (w1.shape[1], w2.shape[1]))  # x as a matrix X: w1 · X · w2ᵀ
        return (w1 @ F.linear(x, w2)).flatten(-2)


class DenseForm(NamedTuple):
    """A difference as it is: of a weight, or of a bias or scale (out,)."""

    diff: torch.Tensor

    @property
    def shape(self):
        return tuple(self.diff.shape)

    def dense(self):
        return self.diff

    def rows(self, index):
        return DenseForm(pick_indices(self.diff, index, 0))

    def columns(self, index):
        return DenseForm(pick_indices(self.diff, index, 1))

    def apply(self, x):
        return F.linear(x, self.diff)


def float_form(form):
    """A form with float32 factors."""
    return type(form)(*(t.float() if _has_values(t) else t for t in form))


def _has_values(tensor):
    """Whether a field of a form is a factor, and neither an index nor absent."""
    return tensor is not None and tensor.is_floating_point()


class AdapterTerm(nn.Module):
    """A form, its scale, and the strength with which it is added to a linear.

    Without `ratio` it adds strength · scale · ΔW·x. With one, DoRA's, W + strength · (W' − W) is
    meant, W' = ratio ∘ (W + scale · ΔW): a ratio (out, 1) rescales rows, one (1, in) columns. What
    is kept is its excess over 1, of which bfloat16 holds more digits than of what is nearly 1.
    """

    def __init__(self, form, scale=1.0, strength=1.0, ratio=None):
        super().__init__()
        self.form_type, self.scale, self.strength = type(form), scale, strength
        for name, tensor in zip(form._fields, form):
            if _has_values(tensor):
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(self, name, tensor)
        self.excess = None if ratio is None else nn.Parameter(ratio - 1, requires_grad=False)

    def form(self):
        return self.form_type(*(getattr(self, name) for name in self.form_type._fields))

    def forward(self, x, base, weight):
        """What is added for inputs x (…, in); a ratio needs base = W·x, without bias."""
        form = self.form()
        if self.excess is None:
            return form.apply(x) * (self.scale * self.strength)
        if self.excess.shape[1] == 1:
            added = self.scale * form.apply(x)
            return self.strength * (added + (base + added) * self.excess[:, 0])
        further = x * self.excess[0]
        added = F.linear(further, weight) + self.scale * form.apply(x + further)
        return self.strength * added


class AdaptedLinear(nn.Linear):
    """A linear with `AdapterTerm`s beside its weight, shared with the linear that it is made of.

    It is no plain linear (`flux.is_plain_linear`): no fast path passes it by.
    """

    def __init__(self, linear, terms):
        nn.Module.__init__(self)  # the linear's own tensors: nothing is made or copied
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.terms = nn.ModuleList(terms)

    def forward(self, x):
        out, base = super().forward(x), None
        if any(term.excess is not None for term in self.terms):
            base = F.linear(x, self.weight)
        for term in self.terms:
            out = out + term(x, base, self.weight)
        return out


def adapt_linears(model, terms):
    """Put {name of a linear: its `AdapterTerm`s} beside the linears of a model, in their type."""
    for name, of_linear in terms.items():
        parent, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent)
        linear = getattr(parent, leaf)
        if isinstance(linear, QuantizedLinear):
            linear.__class__ = quantized_class(AdaptedLinear)
            linear.terms = nn.ModuleList(of_linear).to(linear.codes.device, linear.weight_dtype)
        else:
            setattr(parent, leaf, AdaptedLinear(linear, of_linear).to(linear.weight))
    return model


# --- trained --------------------------------------------------------------------------------------


class LowRankAdapter(nn.Module):
    """A low-rank difference that is trained: up (out, r) and down (r, in).

    `names` are its linears. They are two where their sum is one linear for diffusers, the single
    block's last: then each has a down of its own, and both one up. `widths` are their inputs'.
    A DoRA has a `magnitude` (out,) too, the norms of the rows of W + scale · up · down. All are
    float32; products are in the type of what enters.
    """

    DOWNS = "down", "down_mlp"  # of the first linear, of the second

    def __init__(self, names, widths, out, rank, scale=1.0, dora=False):
        super().__init__()
        self.names, self.rank, self.scale = names, rank, scale
        self.down_names = self.DOWNS[: len(names)]
        self.linears = ()  # a tuple: they are another model's
        self.keep = None  # (B, r): 0 for ranks that a sample is trained without
        for name, width in zip(self.down_names, widths):
            self.register_parameter(name, nn.Parameter(torch.empty(rank, width)))
        self.up = nn.Parameter(torch.empty(out, rank))
        self.magnitude = nn.Parameter(torch.empty(out)) if dora else None

    def downs(self):
        return [getattr(self, name) for name in self.down_names]

    def product(self, x, down, up):
        """scale · up · down · x for x (B, …, in), of these parts of the factors."""
        inner = F.linear(x, down.to(x.dtype))
        if self.keep is not None:
            inner = inner * self.keep.to(x.dtype).view(len(x), *[1] * (x.ndim - 2), -1)
        return self.scale * F.linear(inner, up.to(x.dtype))

    def row_squares(self, weights, downs, up):
        """The squared norms (out,) of the rows of W + scale · up · down, of these parts of them."""
        sums = (
            torch.addmm(weight.float(), up, down, alpha=self.scale).square().sum(1)
            for weight, down in zip(weights, downs)
        )
        return sum(sums)


class Adapters(nn.Module):
    """`LowRankAdapter`s {name: adapter} beside a transformer of a `FluxConfig`, a model by itself.

    Names have dots, as those of modules: so parameters are named `transformer_blocks.0.….up`.
    """

    is_whole = True

    def __init__(self, config, adapters):
        super().__init__()
        self.config, self.each = config, adapters
        for name, adapter in adapters.items():
            place, (*path, leaf) = self, name.split(".")
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(leaf, adapter)

    def keep_ranks(self, masks):
        """Train each sample without the ranks where masks (B, adapters, ranks) are 0; None: all."""
        for number, adapter in enumerate(self.each.values()):
            adapter.keep = None if masks is None else masks[:, number, : adapter.rank]

    def forward_flops(self, num_text_tokens, num_image_tokens):
        """Floating-point operations of one sample's forward, without DoRA's norms."""
        tokens = {"img": num_image_tokens, "txt": num_text_tokens, "out": num_image_tokens}
        tokens["single_blocks"] = num_text_tokens + num_image_tokens
        total = 0
        for adapter in self.each.values():
            parts = adapter.names[0].removeprefix("double_blocks.").split(".")
            of = parts[1] if parts[0].isdecimal() else parts[0].removesuffix("_in")
            total += 2 * tokens.get(of, 1) * sum(p.numel() for p in adapter.parameters())
        return total
