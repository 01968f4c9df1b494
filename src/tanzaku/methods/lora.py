"""LoRA: a low-rank change of weight matrices.

    y = W x + (alpha / r) B A x,  A in R^{r x in}, B in R^{out x r}, B = 0 at first

Hu et al. 2021, arXiv 2106.09685. rsLoRA scales by alpha / sqrt(r): Kalajdzievski 2023, arXiv 2312.03732.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tanzaku.core.combining import Combining
from tanzaku.core.delta import base_matrix
from tanzaku.core.method import About, AdapterLayer, Attached, Method, Place
from tanzaku.core.passes import Passes
from tanzaku.core.space import Choice, Range, ends, spaces
from tanzaku.core.targeted import TargetedWithBiases, pattern
from tanzaku.core.weights import BiasCopy, WeightCopy
from tanzaku.errors import TanzakuError, listed
from tanzaku.methods.activated import Invocation
from tanzaku.methods.lora_layers import (
    ActivatedDelta,
    DoraConv2d,
    DoraDelta,
    DoraEmbedding,
    DoraStarted,
    Factored,
    LoraConv2d,
    LoraDelta,
    LoraEmbedding,
    StartedDelta,
    initialise,
    not_yet,
)
from tanzaku.methods.lora_parameters import Factors, ParameterDelta, parameters_at
from tanzaku.methods.lora_starts import (
    DIRECTIONS,
    PISSA,
    SCALES,
    Components,
    Covariance,
    Gradient,
    Look,
    corda,
    loftq,
    lora_ga,
    olora,
    pissa,
    product_of,
    shared_out,
)
from tanzaku.methods.trainable_tokens import indices_by_path, token_layers
from tanzaku.models.families import Base, features
from tanzaku.models.quantize import quantised, stored_weight

_B = re.compile(r"\.lora_B\b")


@dataclass
class LoRA(TargetedWithBiases):
    """Low-rank adaptation.

    Args:
        r: rank of the change. lora_alpha: the change is scaled by lora_alpha / r.
        target_modules: last names, a regular expression for the path, or "all-linear"; None takes the family's.
        lora_dropout: probability of dropping an input of A in training.
        bias: "none", "all" or "lora_only": which biases are trained too.
        init_lora_weights: True (Kaiming-uniform A, zero B), "gaussian" (normal A with deviation 1 / r, zero B),
            "orthogonal" (both at random, their product zero) or False (both at random, the product not zero). From the
            base's weight: "pissa" (its principal components, arXiv 2404.02948; "pissa_niter_16" finds them faster and
            less exactly), "olora" (its QR decomposition, arXiv 2406.01775), "loftq" (what quantisation takes from it,
            arXiv 2310.08659). What is added is then counted from where A and B start, since the base stays as it is,
            and files have plain LoRA of twice the rank.
            From training rows, which runs show it before the first step, and :func:`tanzaku.calibrate` elsewhere: "eva"
            (principal components of what a module reads, arXiv 2410.07170), "corda" (of the weight by the covariance of
            what it reads, arXiv 2406.05223), "lora_ga" (of the weight's gradient, arXiv 2407.05000).
        eva_config: `rho` (a module has up to rho r components, by how much they explain, and one at least), `tau` (how
            like successive components are that have settled), `whiten`, `adjust_scaling_factors`.
        corda_config: `corda_method`, "ipm" (principal directions) or "kpm" (the least ones, to keep what is known).
        lora_ga_config: `direction`, `scale` and `stable_gamma`, as HF PEFT has them.
        loftq_config: `loftq_bits` (4 or 8) and `loftq_iter`, of a base that is not quantised: A and B start where they
            would make up for it. Of one that is, they make up for what was lost at first, and the weights before that
            are read from its checkpoint.
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        use_dora: give each output feature a trained magnitude, and let the change turn directions alone (DoRA, arXiv
            2402.09353). It reads the base's weights at every pass.
        target_parameters: paths of parameters, or the ends of such, of modules that multiply by themselves, as stacked
            experts' ("mlp.experts.gate_up_proj"); then target_modules=None is no module.
        trainable_token_indices: ids of tokens whose vectors are trained, too, in the model's embedding or in several by
            name; see `TrainableTokens`.
        alora_invocation_tokens: ids of the tokens that invoke the adapter: in each row it is in force from where they
            begin for the last time, and a row without them is the base's, but for a head and what `modules_to_save`
            names, which are in force everywhere. In decoders alone; it cannot be merged (activated LoRA, arXiv
            2504.12397). Rows are looked through before a cache is there, and after that what is added to them.
        loraplus_lr_ratio: the learning rate of B is so many times that of A, in the paper 16 (LoRA+, arXiv 2402.12354).
            `Adapter.groups` has the rates for other optimizers than a run's own.
        freeze_a: train B alone: half the parameters, and what A reads need not be kept (LoRA-FA, arXiv 2308.03303).
        layers_to_transform, layers_pattern: only these layers, counted in the lists that layers_pattern names.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        rank_pattern, alpha_pattern: rank or alpha for paths that end with the key or match it.
    """

    name = "lora"
    peft_type = "LORA"
    paper = "arXiv 2106.09685"
    summary = "low-rank change of weight matrices"
    about = About(
        where="query and value projections (of mixers in state-space layers): y + (alpha / r) B A x",
        parameters="r (in + out) a matrix",
        cost="two products of rank r a matrix",
        choose="first: it does well nearly everywhere, is served by every server, and merges away",
        limits="a change of rank r; a fixed rank for all matrices",
    )
    mergeable = True
    combines_by: ClassVar[str | None] = "cat"  # exact
    holds_changes: ClassVar[bool] = True
    not_in_peft: ClassVar[Mapping[str, Any]] = {"loraplus_lr_ratio": 1.0, "freeze_a": False}
    nonzero = ("lora_alpha",)
    learning_rate = 3e-4  # HF PEFT's method comparison (MetaMathQA), and the upper half of the papers' 1e-4 to 5e-4.
    # The paper: ranks from 1 up do nearly alike, at 2e-4 (GPT-2) to 5e-4 (RoBERTa); a decade lies on either side.
    space = spaces(r=Choice((1, 4, 8, 16, 32)), learning_rate=Range(5e-5, 5e-3, log=True))
    own_biases = "lora_only"
    files_as_peft: ClassVar[bool] = False  # a start that is found again in the base's weight is left out of files

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    alora_invocation_tokens: list[int] | None = None
    loraplus_lr_ratio: float = 1.0
    freeze_a: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    loftq_config: dict[str, int] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None

    @classmethod
    def open_space(cls, given: Mapping[str, Any]) -> dict[str, Choice | Range]:
        space = super().open_space(given)
        if "r" in space and "orthogonal" in ends(given.get("init_lora_weights")):  # which takes even ranks alone
            space["r"] = Choice(tuple(r for r in ends(space["r"]) if r % 2 == 0))
        return space

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        self.check()
        if self._to_fill and self.init_lora_weights == "lora_ga":
            self.init_lora_weights = True  # as in PEFT, which looks for a base that was saved without its start
        named = parameters_at(base, self.target_parameters or ())
        found = [] if self.target_parameters and not self.target_modules else self.find(base)
        stacked = [(f"{path}.{name}", base.model.get_submodule(path)) for path, each in named.items() for name in each]
        self.check_patterns([*found, *stacked], self.rank_pattern, self.alpha_pattern)
        invocation = self._invocation(base)
        if invocation is not None:
            yield "", invocation
        for path, module in found:
            r, scaling = self._size(path)
            layer: LoraDelta | LoraEmbedding
            if invocation is not None:
                self._check_matrix(module, path, "alora_invocation_tokens")
                init = None if self._to_fill else self.init_lora_weights
                layer = ActivatedDelta(module, invocation, r, scaling, self.lora_dropout, init)
            elif self._starts():
                layer = self._started(base, module, path, r, scaling)
            else:
                layer = self.layer(module, path, r, scaling)
            if self.freeze_a:
                # Of an embedding, B is what starts at random and is held.
                held = layer.lora_embedding_B if isinstance(layer, LoraEmbedding) else layer.lora_A.weight
                held.requires_grad_(False)
            yield path, layer
        yield from self._parameters(base, named)
        if self.trainable_token_indices:
            tokens = indices_by_path(self, base, self.trainable_token_indices)
            for path, _ in found:
                self.require(path not in tokens, f"{path} in target_modules and trainable_token_indices", "one of them")
            yield from token_layers(self, base, tokens, inside=".token_adapter")
        yield from self.biases(base, [path for path, _ in found])

    def _size(self, path: str) -> tuple[int, float]:
        """(rank, scaling) of what is at a path."""
        r = int(pattern(self.rank_pattern, path, self.r))
        alpha = pattern(self.alpha_pattern, path, self.lora_alpha)
        self.require(r > 0, f"r={r} for {path}", "a rank of 1 or more")
        started = self._starts() or self.calibrates
        self.require(
            alpha > 0 or not started, f"lora_alpha={alpha} for {path}", f"above 0 for {self.init_lora_weights!r}"
        )
        return r, alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def _parameters(
        self, base: Base, named: Mapping[str, Mapping[str, nn.Parameter]]
    ) -> Iterator[tuple[str, AdapterLayer]]:
        """Changes of the parameters that `target_parameters` names."""
        names = self.target_parameters or ()
        paths = [f"{path}.{name}" for path, each in named.items() for name in each]
        for name in names:
            some = any(path == name or path.endswith(f".{name}") for path in paths)
            self.require(some, f"target_parameters: {name!r}, which ends no parameter's path", "one that does")
        if names:
            plain = self.init_lora_weights in (True, False) and not self.lora_dropout and not self.use_dora
            plain = plain and not self.freeze_a and self.alora_invocation_tokens is None
            found = "target_parameters with dropout, DoRA, a frozen A, an invocation or another start"
            self.require(plain, found, "them alone, with init_lora_weights true or false")
        for path, each in named.items():
            module = base.model.get_submodule(path)
            factors = {}
            for name, weight in each.items():
                fits = weight.dim() in (2, 3) and weight.is_floating_point()
                shape = f"{path}.{name} of {tuple(weight.shape)}"
                self.require(fits, shape, "a matrix, or matrices of several experts")
                turned = bool(getattr(module, "is_transposed", False))
                factors[name] = Factors(weight, turned, *self._size(f"{path}.{name}"))
                factors[name].draw(zero=self.init_lora_weights is True)
            yield path, ParameterDelta(factors)

    def rate_of(self, parameter: str) -> float:
        return self.loraplus_lr_ratio if _B.search(parameter) else 1.0

    def layer(self, module: nn.Module, path: str, r: int, scaling: float) -> LoraDelta | LoraEmbedding:
        """The adapter layer that fits the kind of module."""
        if isinstance(module, nn.Embedding):
            if self.init_lora_weights == "eva":
                self._check_matrix(module, path)
            table = DoraEmbedding if self.use_dora else LoraEmbedding
            return table(module, r, scaling, self.init_lora_weights)
        kind: type[LoraDelta] = DoraDelta if self.use_dora else LoraDelta
        if isinstance(module, nn.Conv2d):
            kind = DoraConv2d if self.use_dora else LoraConv2d
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        self.require(r % groups == 0, f"r={r} for {path}", f"a multiple of its {groups} groups")
        features(module, path)
        rows = self.init_lora_weights == "eva"
        if rows:
            self._check_matrix(module, path)
        init = None if self._to_fill else True if rows else self.init_lora_weights
        made = kind(module, r, scaling, self.lora_dropout, init)
        made.watch = not_yet if rows and not self._to_fill else None
        return made

    def _check_matrix(self, module: nn.Module, path: str, setting: str = "init_lora_weights") -> None:
        matrix = not isinstance(module, nn.Embedding | nn.Conv2d)
        found = f"{path}, a {type(module).__name__}, with {setting}={getattr(self, setting)!r}"
        self.require(matrix, found, "a linear layer or Conv1D")

    def _invocation(self, base: Base) -> Invocation | None:
        """What finds the tokens that invoke the adapter, if some do."""
        tokens = self.alora_invocation_tokens
        if tokens is None:
            return None
        found = f"alora_invocation_tokens={tokens}"
        ids = all(type(token) is int and 0 <= token < base.vocab_size for token in tokens)
        self.require(bool(tokens) and ids, found, f"one id or more, from 0 to {base.vocab_size - 1}")
        causal = not base.encoder_decoder and any(getattr(m, "is_causal", False) for _, m in base.attention())
        self.require(causal, f"{found} on a {type(base.model).__name__}", "a decoder, where no token sees later ones")
        self.require(not self.use_dora, f"{found} with use_dora", "one of them")
        alone = self.bias == "none" and not self.trainable_token_indices
        self.require(alone, f"{found} with biases or tokens", "it alone: those are in force everywhere")
        self.require(
            not (self._starts() or self.calibrates), f"{found} with {self.init_lora_weights!r}", "another start"
        )
        return Invocation(tokens)

    def _starts(self) -> bool:
        """Whether A and B start at a product that is no zero and is counted from."""
        init = self.init_lora_weights
        named = ("olora", "loftq", "corda", "lora_ga")
        return isinstance(init, str) and (bool(PISSA.fullmatch(init)) or init in named)

    def _found_again(self) -> bool:
        """Whether files have A and B alone."""
        return self.files_as_peft and self.init_lora_weights in ("pissa", "olora")

    def _started(self, base: Base, module: nn.Module, path: str, r: int, scaling: float) -> StartedDelta:
        init = str(self.init_lora_weights)
        self._check_matrix(module, path)
        self.require(
            not (self._to_fill and init in ("loftq", "corda")),
            f"a file of A and B that belong to a base which HF PEFT changed by {init}",
            "one that was saved with path_initial_model_for_weight_conversion",
        )
        kind = DoraStarted if self.use_dora else StartedDelta
        layer = kind(module, r, scaling, self.lora_dropout, self._to_fill, self._found_again())
        if layer.lora_A.weight.is_meta:
            return layer
        weight = base_matrix(module)
        limit = min(weight.shape)
        self.require(r <= limit, f"r={r} for {path}", f"at most {limit}, the rank of its weight, for {init!r}")
        if init in ("corda", "lora_ga"):
            layer.watch = not_yet
            # A zero B, and nothing to count from, until rows were seen.
            initialise(layer, module, True)
        elif init == "loftq" and quantised(module):
            exact = stored_weight(base.model, path).to(weight)
            layer.begin(*product_of((exact - weight) / scaling, r), counted=False)
        else:
            layer.begin(*self.start_of(weight, r, scaling))
        return layer

    def start_of(self, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
        """A and B that are functions of the weight alone."""
        init = str(self.init_lora_weights)
        if init == "loftq":
            return loftq(weight, r, scaling, *self._loftq())
        if init == "olora":
            return olora(weight, r, scaling)
        steps = cast("re.Match[str]", PISSA.fullmatch(init))[1]
        return pissa(weight, r, scaling, None if steps is None else int(steps))

    def to_peft(self, config: dict[str, Any]) -> dict[str, Any]:
        # A start that is counted from is written as plain LoRA of twice the rank, at the same scaling.
        if not self._starts() or self._to_fill or self._found_again():
            return config
        more = math.sqrt(2) if self.use_rslora else 2
        return {
            **config,
            "r": 2 * self.r,
            "lora_alpha": more * self.lora_alpha,
            "rank_pattern": {key: 2 * r for key, r in self.rank_pattern.items()},
            "alpha_pattern": {key: more * alpha for key, alpha in self.alpha_pattern.items()},
            "init_lora_weights": True,
            "loftq_config": {},
            "corda_config": None,
            "lora_ga_config": None,
        }

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not isinstance(module, nn.Conv1d)

    def combined(self, parts: Sequence[Attached], by: Combining) -> Method:
        ranks = []
        for part in parts:
            for path, layer in part.at():
                if isinstance(layer, BiasCopy):
                    raise TanzakuError(
                        f"combine: {part.name!r} trains biases, which have no rule; expected bias='none'"
                    )
                if type(layer) not in (LoraDelta, StartedDelta, LoraConv2d, LoraEmbedding, WeightCopy):
                    raise TanzakuError(
                        f"combine: {part.name!r} is more than a product B A at {path}, which has no rule; expected LoRA"
                    )
            ranks.append(max(each.factors()[0].shape[0] for _, each in part.at() if isinstance(each, Factored)))
        if by.svd is not None:
            r = max(ranks) if by.rank is None else by.rank
        elif by.how == "cat":
            r = sum(ranks)
        else:
            if len(set(ranks)) > 1:
                raise TanzakuError(
                    f"combine: found ranks {listed(map(str, ranks))}, expected one for how={by.how!r}; use 'cat' or "
                    "'svd'"
                )
            r = ranks[0]
        # Weights and scalings are in A and B: the result's own scaling is alpha / r = 1.
        return dataclasses.replace(
            self,
            r=r,
            lora_alpha=r,
            use_rslora=False,
            init_lora_weights=True,
            loftq_config={},
            eva_config=None,
            corda_config=None,
            lora_ga_config=None,
            rank_pattern={},
            alpha_pattern={},
            layers_to_transform=None,
            layers_pattern=None,
        )

    # -- starts from rows

    @property
    def calibrates(self) -> bool:
        return self.init_lora_weights in ("eva", "corda", "lora_ga")

    def calibrate(self, adapter: Attached, passes: Passes) -> None:
        layers = {path: layer for path, layer in adapter.at() if isinstance(layer, LoraDelta)}
        fresh = all(layer.watch is not None for layer in layers.values())
        expected = "one that has not: to start again would undo what it has learnt since; attach another"
        self.require(fresh, f"{adapter.name!r}, which has started already", expected)
        wanted = {path: self._look(layer) for path, layer in layers.items()}
        # Which candidates see alike: what they look for, and where. What they start at may still differ.
        key = frozenset((path, look.key) for path, look in wanted.items())
        looks = passes.once(key, lambda: self._see(layers, wanted, passes))
        with torch.no_grad():
            self._start_from(layers, looks)
        for layer in layers.values():
            layer.watch = None

    def _see(self, layers: Mapping[str, LoraDelta], looks: Mapping[str, Look], passes: Passes) -> Mapping[str, Look]:
        """Let rows pass until each look has seen enough."""
        try:
            for path, layer in layers.items():
                layer.watch = looks[path]
            for run in passes:
                self._pass(run, list(looks.values()))
                if all(look.done for look in looks.values()):
                    break
        finally:
            for layer in layers.values():
                layer.watch = not_yet
        for path, look in looks.items():
            self.require(look.module is not None, f"no pass through {path}", "rows that the base runs it for")
        return looks

    def _look(self, layer: LoraDelta) -> Look:
        if self.init_lora_weights == "corda":
            return Covariance()
        if self.init_lora_weights == "lora_ga":
            return Gradient()
        config = self._eva()
        width = layer.lora_A.weight.shape[1]
        return Components(min(round(layer.r * config["rho"]), width), config["tau"])

    def _pass(self, run: Callable[[], Tensor], looks: list[Look]) -> None:
        if self.init_lora_weights != "lora_ga":
            with torch.no_grad():
                run()
            return
        with torch.enable_grad():
            loss = run()
            expected = "one: with `labels` in every batch, or a function of the outputs"
            self.require(loss.requires_grad, "rows without a loss that depends on the model", expected)
            seen = [look for look in looks if isinstance(look, Gradient) and look.probe is not None]
            probes = [cast(Tensor, look.probe) for look in seen]
            for look, gradient in zip(seen, torch.autograd.grad(loss, probes, allow_unused=True), strict=True):
                look.add(gradient)

    def _start_from(self, layers: Mapping[str, LoraDelta], looks: Mapping[str, Look]) -> None:
        if self.init_lora_weights == "eva":
            self._start_eva(layers, cast("Mapping[str, Components]", looks))
            return
        for path, look in looks.items():
            layer, weight = cast(StartedDelta, layers[path]), base_matrix(cast(nn.Module, look.module))
            total = cast("Covariance | Gradient", look).total
            self.require(total is not None, f"no gradient of {path}", "a loss that depends on it")
            mean = cast(Tensor, total) / cast("Covariance | Gradient", look).passes
            if isinstance(look, Covariance):
                a, b = corda(weight, mean.to(weight), layer.r, layer.scaling, self._corda())
            else:
                limit = min(weight.shape) // 2
                self.require(layer.r <= limit, f"r={layer.r} for {path}", f"at most {limit} for 'lora_ga'")
                a, b = lora_ga(weight, mean.to(weight), layer.r, layer.scaling, *self._lora_ga())
            layer.begin(a, b)

    def _start_eva(self, layers: Mapping[str, LoraDelta], looks: Mapping[str, Components]) -> None:
        config = self._eva()
        for path, look in looks.items():
            expected = f"at least {look.number} in a batch"
            self.require(look.basis is not None, f"fewer tokens at {path} than it looks for components", expected)
        ranks = shared_out({p: look.explained for p, look in looks.items()}, sum(s.r for s in layers.values()))
        alphas = {}
        for path, look in looks.items():
            layer, r = layers[path], ranks[path]
            alpha = pattern(self.alpha_pattern, path, self.lora_alpha)
            alphas[path] = alpha * r / layer.r if config["adjust_scaling_factors"] else alpha
            a = cast(Tensor, look.basis)[:r]
            if config["whiten"]:
                a = a / look.values[:r].sqrt()[:, None]
            layer.resize(a, alphas[path] / (math.sqrt(r) if self.use_rslora else r))
        self.rank_pattern = {path: r for path, r in ranks.items() if r != self.r}
        self.alpha_pattern = {path: alpha for path, alpha in alphas.items() if alpha != self.lora_alpha}

    def _eva(self) -> dict[str, Any]:
        return {"rho": 2.0, "tau": 0.99, "whiten": False, "adjust_scaling_factors": True} | (self.eva_config or {})

    def _corda(self) -> str:
        return str((self.corda_config or {}).get("corda_method", "ipm"))

    def _lora_ga(self) -> tuple[str, str, float]:
        config = {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16} | (self.lora_ga_config or {})
        return str(config["direction"]), str(config["scale"]), float(cast(Any, config["stable_gamma"]))

    def _check_rows(self) -> None:
        eva, (direction, scale, gamma) = self._eva(), self._lora_ga()
        numbers = all(isinstance(eva[key], int | float) for key in ("rho", "tau"))
        flags = all(isinstance(eva[key], bool) for key in ("whiten", "adjust_scaling_factors"))
        known = eva.keys() <= {"rho", "tau", "whiten", "adjust_scaling_factors", "use_label_mask", "label_mask_value"}
        right = known and flags and numbers and eva["rho"] >= 1 and 0 <= eva["tau"] <= 1
        self.require(right, f"eva_config={self.eva_config}", "rho of 1 or more, tau in [0, 1], whiten")
        self.require(self._corda() in ("ipm", "kpm"), f"corda_config={self.corda_config}", "corda_method ipm or kpm")
        right = direction in DIRECTIONS and scale in SCALES and gamma > 0
        expected = f"direction ({', '.join(DIRECTIONS)}), scale ({', '.join(SCALES)}), stable_gamma above 0"
        self.require(right, f"lora_ga_config={self.lora_ga_config}", expected)

    def training_state(self, adapter: Attached) -> dict[str, Tensor]:
        return {
            f"{end}.{path}": low.weight.detach()
            for path, layer in adapter.at()
            if isinstance(layer, StartedDelta)
            for end, low in (("A", layer.start_A), ("B", layer.start_B))
        }

    @torch.no_grad()
    def resume(self, adapter: Attached, state: dict[str, Tensor]) -> None:
        for path, layer in adapter.at():
            if isinstance(layer, StartedDelta):
                layer.start_A.weight.copy_(state[f"A.{path}"])
                layer.start_B.weight.copy_(state[f"B.{path}"])

    def check(self) -> None:
        self.require(self.r > 0, f"r={self.r}", "a rank of 1 or more")
        init = self.init_lora_weights
        expected = (
            "true, false, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_16', 'olora', 'loftq', 'eva', 'corda' or "
            "'lora_ga'"
        )
        known = init in (True, False, "gaussian", "orthogonal", "eva") or self._starts()
        self.require(known, f"init_lora_weights={init!r}", expected)
        self.require(self.loraplus_lr_ratio > 0, f"loraplus_lr_ratio={self.loraplus_lr_ratio}", "a number above 0")
        self._check_loftq()
        self._check_rows()
        self.require(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout}", "a probability below 1")
        self.check_bias()

    def _loftq(self) -> tuple[int, int]:
        return self.loftq_config.get("loftq_bits", 4), self.loftq_config.get("loftq_iter", 1)

    def _check_loftq(self) -> None:
        bits, rounds = self._loftq()
        known = self.loftq_config.keys() <= {"loftq_bits", "loftq_iter"} and bits in (4, 8)
        expected = "loftq_bits (4 or 8) and loftq_iter (1 or more)"
        self.require(known and type(rounds) is int and rounds > 0, f"loftq_config={self.loftq_config}", expected)
