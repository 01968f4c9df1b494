"""Bottleneck adapters: small networks between the layers of a frozen model, which add to its residual stream.

    h = f(r), what a sublayer (attention or feed-forward) adds to the residual stream r
    b(x) = s * (W_up g(W_down x)),  W_up = 0 at first

    houlsby    h + b(h)                  after attention and after feed-forward; arXiv 1902.00751
    pfeiffer   r + h + b(norm(r + h))    after feed-forward, norm where it is the layer's last; arXiv 2005.00247
    parallel   h + b(r)                  beside feed-forward; He et al., arXiv 2110.04366

AdapterDrop leaves out the lowest layers, in training or when predicting: arXiv 2010.11918. Settings have the names of
the Adapters library (arXiv 2311.11077).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import in_full
from tanzaku.core.method import About, AdapterLayer, Method, ModuleLayer, Place, trainable
from tanzaku.core.places import places
from tanzaku.core.routing import in_equal_shares
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.taps import Tap
from tanzaku.errors import TanzakuError, nearest
from tanzaku.methods.invertible import Coupling, Inverse
from tanzaku.methods.parts import Norm, Projection, activation, activations, bottleneck_of
from tanzaku.models import tree
from tanzaku.models.families import Sublayer, features, weight_of
from tanzaku.support.refs import Ref


class BottleneckLayer(ModuleLayer):
    """One bottleneck, at a module where one sublayer's result h, or its sum with the residual stream r, can be changed.

    Args:
        site: how the sublayer lies in the model. size: numbers of h, per token.
        at_sum: the module has r + h before it: a norm reads it, or the module returns it. Else the module returns h.
        tap: where r is noted, if it is needed.
    """

    hub = "adapters"

    def __init__(self, how: BottleneckAdapter, site: Sublayer, size: int, like: Tensor, at_sum: bool, tap: Tap | None):
        super().__init__()
        self.site = site
        self.width = size
        self.at_sum, self.normed, self.tap = at_sum, at_sum and site.norm is not None, Ref(tap)
        self.before, self.after, self.parallel = how.original_ln_before, how.original_ln_after, how.is_parallel
        self.residual, self.within = how.residual_before_ln, how.within
        self.dropout, self.dropped = how.dropout, site.number < how.drop_layers
        self.activation = str(how.non_linearity)
        self.act = activation(self.activation)
        # Without the norm behind the sum, the result takes the place of what that norm returns.
        self.edits_input = self.normed and bool(how.original_ln_after)  # type: ignore[misc]
        self.edits_output = not self.edits_input  # type: ignore[misc]
        # A gate is a mean over tokens.
        self.gate_padding = how.gate_padding
        self.whole_rows = how.use_gating  # type: ignore[misc]
        self.reads_padding, self.reads_places = how.use_gating and how.gate_padding, how.use_gating  # type: ignore[misc]
        # h may be that of the one token that is read, while r is noted of all.
        self.untrimmed = tap is not None and not at_sum  # type: ignore[misc]
        hidden = how.width(site.number, size)
        self.norm_before = Norm(size, like) if how.ln_before else None
        self.down, self.up = how.projection(size, hidden, like), how.projection(hidden, size, like)
        self.gate = Projection(size, 1, like) if how.use_gating else None
        self.norm_after = Norm(size, like) if how.ln_after else None
        self.scaling: float | nn.Parameter
        if isinstance(how.scaling, str):
            self.scaling = trainable(size if how.scaling == "channel" else 1, like=like, fill=nn.init.ones_)
        else:
            self.scaling = 1.0 if how.scaling is None else float(how.scaling)
        if self.like.device.type != "meta":
            how.draw(self)

    @property
    def like(self) -> Tensor:
        """A tensor of the type that b is computed in."""
        return next(self.up.parameters())

    # -- one adapter

    def b(self, x: Tensor, training: bool, within: Tensor | None) -> Tensor:
        """b(x), (rows, tokens, size).

        Args:
            within: the residual, where the adapter's last norm is over the sum with it.
        """
        x = x.to(self.like.dtype)
        z = x if self.norm_before is None else self.norm_before(x)
        z = F.dropout(self.up(self.act(self.down(z))) * self.scaling, self.dropout, training)
        if self.gate is not None:
            open_by = torch.sigmoid(self.gate(x))
            if not self.gate_padding:
                own = (places(x).at >= 0)[..., None]
                open_by = (open_by * own).sum(1, keepdim=True) / own.sum(1, keepdim=True).clamp(min=1)
            z = z * open_by.mean(1, keepdim=True)
        z = z if within is None else z + within
        return z if self.norm_after is None else cast(Tensor, self.norm_after(z))

    def _parts(self, module: nn.Module, here: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What b reads, the residual that its norm is over, and what is added to it then; `here` is h, or r + h."""
        tap = self.tap()
        r = None if tap is None else tap.take().reshape(here.shape)
        if self.parallel:
            assert r is not None
            return r, None, here if self.after else here - r
        h = here if not self.at_sum else None if r is None else here - r
        total = here if self.at_sum else None if r is None else here + r
        # The base's norm, without what adapters do around it.
        x = h if not self.before else total if not self.normed or total is None else module.forward(total)
        assert x is not None
        if self.plain:
            return x, None, here
        residual = h if not self.before or self.residual is True else total if self.residual == "post_add" else x
        offset = None
        if self.at_sum == self.after:  # the sum is what r has been added to, and is wanted; or is not, and will be
            offset = r if self.after else None if r is None else -r
        if self.within:
            return x, residual, offset
        assert residual is not None
        return x, None, residual if offset is None else residual + offset

    @property
    def plain(self) -> bool:
        """Whether b(x) is added to what is here, be it h or the sum, and nothing else is done."""
        if self.parallel or self.within:
            return False
        if not self.before:
            return self.after and not self.at_sum
        return (self.residual is True) == self.after and not (self.normed and not self.residual)

    def _edited(self, module: nn.Module, here: Tensor, unchanged: Tensor) -> Tensor:
        if self.gate is not None and here.dim() != 3:
            raise TanzakuError(
                f"bottleneck: found {' x '.join(map(str, here.shape))} numbers at a {type(module).__name__}, expected "
                "(rows, tokens, features), over whose tokens use_gating takes a mean"
            )
        x, within, plus = self._parts(module, here)
        if self.dropped and not module.training:
            return unchanged

        def change(x: Tensor, y: Tensor) -> Tensor:
            z = self.b(x, module.training, within)
            return z if plus is None else z + y

        return in_full(change, self.like, x, here if plus is None else plus).to(here.dtype)

    def reads(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self._parts(module, x if self.normed else y)[0]

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._edited(module, x, x)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self._edited(module, x if self.normed else y, y)

    # -- several adapters at once

    def batch_key(self, module: nn.Module) -> Hashable | None:
        own = (self.norm_before, self.norm_after, self.gate, self.tap())
        alike = self.plain and all(part is None for part in own) and isinstance(self.scaling, float)
        if not alike or not isinstance(self.down, Projection) or (self.dropout and module.training) or self.dropped:
            return None
        weight = self.down.weight
        return (self.before, self.at_sum, self.edits_input, self.activation, self.scaling, weight.shape, weight.dtype)

    @staticmethod
    def batched_inputs(
        layers: Sequence[BottleneckLayer], sizes: tuple[int, ...], module: nn.Module, x: Tensor
    ) -> Tensor:
        first = layers[0]
        if len(layers) == 1:
            return first.inputs(module, x)
        w_down, w_up = (torch.stack([part.weight for part in each]).mT for each in _halves(layers))
        b_down, b_up = (torch.stack([part.bias for part in each])[:, None] for each in _halves(layers))

        def change(x: Tensor, y: Tensor) -> Tensor:
            z = x.to(w_down.dtype).reshape(len(layers), -1, x.shape[-1])
            z = torch.baddbmm(b_up, first.act(torch.baddbmm(b_down, z, w_down)), w_up)
            return y + z.view(y.shape) * first.scaling

        def together(here: Tensor) -> Tensor:
            x = module.forward(here) if first.before and first.normed else here
            return in_full(change, w_down, x, here).to(here.dtype)

        return in_equal_shares(sizes, together, x)

    @staticmethod
    def batched_outputs(
        layers: Sequence[BottleneckLayer], sizes: tuple[int, ...], module: nn.Module, x: Tensor, y: Tensor
    ) -> Tensor:
        if len(layers) == 1:
            return layers[0].outputs(module, x, y)
        return BottleneckLayer.batched_inputs(layers, sizes, module, y)


def _halves(layers: Sequence[BottleneckLayer]) -> tuple[list[Projection], list[Projection]]:
    return [cast(Projection, layer.down) for layer in layers], [cast(Projection, layer.up) for layer in layers]


INITS = ("mam_adapter", "bert", "houlsby")


# What a style sets where the settings say nothing: the Adapters library's double_seq_bn, seq_bn and par_bn.
STYLES: dict[str, dict[str, Any]] = {
    "houlsby": {"mh_adapter": True, "non_linearity": "swish", "original_ln_before": False},
    "pfeiffer": {"mh_adapter": False, "non_linearity": "relu", "original_ln_before": True},
    "parallel": {
        "mh_adapter": False,
        "non_linearity": "relu",
        "original_ln_before": False,
        "is_parallel": True,
        "reduction_factor": 2,
        "scaling": 4.0,
    },
}
_ELSE: dict[str, Any] = {"reduction_factor": 16, "is_parallel": False, "scaling": 1.0}


# Settings that the Adapters library has besides, at the values at which they say nothing.
INERT: dict[str, Any] = {
    "init_weights_seed": None,
    "stochastic_depth": 0.0,
}
# And those of matrices made of Kronecker products, which say nothing where `phm_layer` is false.
PHM: dict[str, Any] = {
    "phm_dim": 4,
    "phm_rank": 1,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "factorized_phm_W": True,
    "shared_W_phm": False,
}


def without_inert(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of that library's without what says nothing, and with what it does not say."""
    own = {key: value for key, value in config.items() if key not in INERT or value != INERT[key]}
    return {**own, "gate_padding": True} if config.get("use_gating") else own


@dataclass
class BottleneckAdapter(Method):
    """Bottleneck adapters, sequential or parallel.

    Args:
        style: "pfeiffer", "houlsby" or "parallel": what settings that are None are.
        mh_adapter, cross_adapter, output_adapter: whether there is one after self-attention, after cross-attention and
            after the feed-forward.
        reduction_factor: the layer's width, divided by the bottleneck's; or by layer, {"0": 8, "default": 16}.
        non_linearity: g, by transformers' name.
        original_ln_before: b reads the sum r + h, behind the norm that follows it if one does, and not h alone.
        original_ln_after: r is added to the result, and the norm that follows the sum is applied.
        ln_before, ln_after: layer norms of the adapter's own around b.
        residual_before_ln: what b is added to is h; False: what b reads; "post_add": the sum. Counts where
            original_ln_before does. adapter_residual_before_ln: it is added before `ln_after`'s norm.
        is_parallel: b reads r.
        scaling: s; "learned" as one number, or "channel", one a feature.
        use_gating: b(x) times a learned gate in (0, 1), the mean over a row's own tokens of those at hand (UniPELT,
            arXiv 2110.07577). gate_padding: and over padding, as in the Adapters library, whose files are read so: such
            rows depend on how they are padded.
        inv_adapter: "nice" adds an invertible adapter at the first layer's input, undone before the output embeddings
            (MAD-X). inv_adapter_reduction_factor: of the width of its halves.
        dropout: of b(x).
        leave_out: numbers of layers without adapters, from 0, in order of execution (AdapterDrop).
        drop_layers: so many of the first layers' adapters are trained, and do nothing when predicting (AdapterDrop).
        init_weights: "mam_adapter" starts with W_up = 0, which changes nothing; "bert" draws all from N(0, 0.02), and
            "houlsby" from a normal of 0.01, cut at two deviations. These two start near the base, not at it.
    """

    name = "bottleneck"
    peft_type = "BOTTLENECK"
    paper = "arXiv 1902.00751"
    summary = "small networks between the layers, which add to the residual stream"
    about = About(
        where="what the feed-forward of each layer, and attention if wanted, adds to the residual stream",
        parameters="adapters a layer * (2 * width * bottleneck + width + bottleneck), and an invertible one's",
        cost="two small products a layer, one after the other, between the layers",
        choose="for tasks that need new functions of a text and not other weights; it was the first of its kind",
        limits="is not linear, so it cannot be merged",
    )
    in_peft = False
    by_default = False
    nonzero = ("scaling",)
    # The middle of arXiv 1902.00751's search, 3e-5, 3e-4 and 3e-3.
    learning_rate = 3e-4
    # Widths that arXiv 1902.00751 and 2005.00247 search (from 2 to 64), and the first one's learning rates.
    space = spaces(reduction_factor=Choice((2, 8, 16, 64)), learning_rate=Range(3e-5, 3e-3, log=True))

    styles: ClassVar[Mapping[str, Mapping[str, Any]]] = STYLES

    style: str = "pfeiffer"
    mh_adapter: bool | None = None
    cross_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | dict[str, float] | None = None
    non_linearity: str | None = None
    original_ln_before: bool | None = None
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    is_parallel: bool | None = None
    scaling: float | str | None = None
    use_gating: bool = False
    gate_padding: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    dropout: float = 0.0
    leave_out: list[int] = field(default_factory=list)
    drop_layers: int = 0
    init_weights: str = "mam_adapter"

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        if config.get("architecture") is not None or config.get("phm_layer"):
            return None
        given = {key: value for key, value in config.items() if key not in PHM and key != "phm_layer"}
        return without_inert(given)

    def to_hub(self) -> dict[str, Any] | None:
        said = self.gate_padding or not self.use_gating
        self.require(said, "use_gating without gate_padding", "gate_padding=True, which the Adapters library has")
        own = {f.name for f in dataclasses.fields(Method)} | {"style", "drop_layers", "gate_padding"}
        settings = {key: value for key, value in self.settings().items() if key not in own}
        return {**INERT, **PHM, "phm_layer": False, **settings}

    def projection(self, n_in: int, n_out: int, like: Tensor) -> nn.Module:
        """A matrix and a bias of zeros; the matrix is to be drawn."""
        return Projection(n_in, n_out, like)

    @torch.no_grad()
    def draw(self, layer: BottleneckLayer) -> None:
        """Draw a layer's matrices."""
        down, up = cast(Projection, layer.down).weight, cast(Projection, layer.up).weight
        if self.init_weights == "mam_adapter":
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # and W_up stays zero
        for weight in (down, up):
            if self.init_weights == "bert":
                nn.init.normal_(weight, std=0.02)
            elif self.init_weights == "houlsby":
                nn.init.trunc_normal_(weight, std=1e-2, a=-2e-2, b=2e-2)
        if layer.gate is not None:
            nn.init.normal_(layer.gate.weight, std=0.02)

    @property
    def within(self) -> bool:
        """Whether the adapter's last norm is over the sum with the residual."""
        return self.ln_after and self.adapter_residual_before_ln and not self.is_parallel

    def largest(self) -> str:
        # What makes a bottleneck larger than its layer is a small number.
        for key in ("reduction_factor", "inv_adapter_reduction_factor"):
            given = getattr(self, key)
            factors = given.values() if isinstance(given, dict) else [1 if given is None else given]
            if min(factors, default=1) < 1:
                return f"{key}={given}"
        return super().largest()

    def width(self, number: int, size: int) -> int:
        """The bottleneck's width in a layer."""
        factor = self.reduction_factor
        if isinstance(factor, dict):
            factor = factor.get(str(number), factor.get("default"))
        known = isinstance(factor, int | float)
        self.require(
            known,
            f"reduction_factor={self.reduction_factor!r}",
            f"a number above 0, or one for each layer, as layer {number}, or by 'default'",
        )
        return bottleneck_of(self, size, cast(float, factor))

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self._check()
        base, copied = place.base, self.copied(place.base)
        kinds = {"attention": self.mh_adapter, "cross": self.cross_adapter, "feed_forward": self.output_adapter}
        sublayers = base.sublayers()
        layers = 1 + max(site.number for site in sublayers)
        strange = [number for number in self.leave_out if not 0 <= number < layers]
        self.require(not strange, f"leave_out={self.leave_out}", f"numbers of layers, 0 to {layers - 1}")
        self.require(self.drop_layers < layers, f"drop_layers={self.drop_layers}", f"fewer than {layers} layers")
        wanted = [site for site in sublayers if kinds[site.kind] and not copied(site.out)]
        self.require(
            bool(wanted),
            f"a {type(base.model).__name__} without {' or '.join(k for k, v in kinds.items() if v) or 'any adapter'}",
            "one that a pass shows: linear layers whose result is added to the residual stream",
        )
        if self.inv_adapter is not None:
            yield from self._invertible(place)
        for site in wanted:
            if site.number not in self.leave_out:
                yield from self._at(place, site)

    def _invertible(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        path, inside = base.layer_paths()[0]
        module = base.model.get_submodule(inside)
        size, factor = features(module)[1], self.inv_adapter_reduction_factor
        factor = 2 if factor is None else factor
        first, second = (
            bottleneck_of(self, half, factor, "inv_adapter_reduction_factor") for half in (size // 2, size - size // 2)
        )
        coupling = Coupling(size, (first, second), str(self.non_linearity), weight_of(module))
        yield path, coupling
        head = None
        with contextlib.suppress(AttributeError, NotImplementedError):
            head = base.model.get_output_embeddings()  # type: ignore[operator]
        for where, each in tree.named_modules(base.model):
            if each is head:
                yield where, Inverse(coupling)

    def _at(self, place: Place, site: Sublayer) -> Iterator[tuple[str, AdapterLayer]]:
        """The layers for one sublayer: a tap, if r is needed, and the bottleneck."""
        model = place.base.model
        # h is met where the last linear layer returns it, the sum where a norm reads it or a module returns it. That
        # module may be a layer that is checkpointed, from inside of which nothing is noted: where r is needed, it is h.
        at = site.norm if self.original_ln_before or self.is_parallel or not self.original_ln_after else None
        if self.original_ln_before and site.end is not None and not self._needs_stream(at_sum=True):
            at = site.end
        tapped = self._needs_stream(at is not None)
        self.require(
            site.residual is not None or not tapped,
            f"{site.out}, "
            + (
                "whose result is added to nothing that a pass shows"
                if site.end is None
                else "beside which attention adds to the same residual stream"
            ),
            "a sublayer that reads the residual stream and adds to it; style='houlsby' needs no such",
        )
        tap = Tap() if tapped else None
        if tap is not None:
            yield cast(str, site.residual), tap
        out = model.get_submodule(site.out)
        yield at or site.out, BottleneckLayer(self, site, features(out)[1], weight_of(out), at is not None, tap)

    def _needs_stream(self, at_sum: bool) -> bool:
        """Whether r is needed beside h, or beside the sum."""
        if self.is_parallel or (self.original_ln_before and not at_sum):
            return True
        if not at_sum:
            return not self.original_ln_after
        if not self.original_ln_before:
            return True
        plain = self.residual_before_ln is True
        return (not self.original_ln_after or self.within) if plain else self.original_ln_after

    def _check(self) -> None:
        self.require(
            self.style in self.styles,
            f"style={self.style!r}{nearest(self.style, self.styles)}",
            " or ".join(map(repr, self.styles)),
        )
        for key, value in {**_ELSE, **self.styles[self.style]}.items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        name = str(self.non_linearity).lower()
        self.require(
            name in activations(),
            f"non_linearity={self.non_linearity!r}{nearest(name, activations())}",
            "one of transformers' activations",
        )
        self.non_linearity = name
        self.require(self.inv_adapter in (None, "nice"), f"inv_adapter={self.inv_adapter!r}", "'nice', or None")
        self.require(0 <= self.dropout < 1, f"dropout={self.dropout}", "0 or more, below 1")
        self.require(self.drop_layers >= 0, f"drop_layers={self.drop_layers}", "0 or more")
        learned = ("learned", "channel")
        self.require(
            not isinstance(self.scaling, str) or self.scaling in learned,
            f"scaling={self.scaling!r}",
            "a number, 'learned' or 'channel'",
        )
        self.require(
            self.residual_before_ln in (True, False, "post_add"),
            f"residual_before_ln={self.residual_before_ln!r}",
            "True, False or 'post_add'",
        )
        self.require(
            self.init_weights in INITS,
            f"init_weights={self.init_weights!r}{nearest(self.init_weights, INITS)}",
            " or ".join(map(repr, INITS)),
        )
