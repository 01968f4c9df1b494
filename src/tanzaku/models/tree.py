"""The place of adapters in a model's tree, and walks over the base that leave it out.

All attached adapters stand below `model.tanzaku`, by name and then by the path of their sites, so that whoever walks a
tree (a parent, an optimizer, DDP, `.to()`, `deepcopy`, pickle) finds them. Whoever means the base walks it with the
functions here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tanzaku.errors import listed

PLACE = "tanzaku"


class Adapters(nn.Module):
    """The attached adapters by name. Those that are active stand in the `state_dict` of the model and of its parents,
    and have to be there when one is loaded; of the others it says nothing."""

    def __init__(self, manager: Any):
        super().__init__()
        self.__dict__["manager"] = manager
        self.register_state_dict_post_hook(_hide)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_spare)  # type: ignore[no-untyped-call]

    def forward(self, x: Any) -> Any:
        """What a base that runs its children one after another (nn.Sequential) gives it, as it is."""
        return x

    def hidden(self) -> list[str]:
        """Names of the adapters that are not active."""
        active = self.__dict__["manager"].active_names
        return [name for name in self._modules if name not in active]


def _hide(place: Any, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    starts = tuple(f"{prefix}{name}." for name in place.hidden())
    for key in [key for key in state if key.startswith(starts)] if starts else []:
        del state[key]
    notes = getattr(state, "_metadata", {})
    gone = [key for key in notes if f"{key}.".startswith(starts)] if starts else []
    if len(place.hidden()) == len(place._modules):
        gone.append(prefix[:-1])
    for key in gone:
        notes.pop(key, None)


def _spare(place: Any, state: dict[str, Any], prefix: str, _notes: Any, _strict: Any, *found: list[str]) -> None:
    held = {key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix)}
    active = place.__dict__["manager"].active_names
    if held and active and not held & {*active}:
        # Also where it need not be strict: an optimizer's state, say, would go on with the other's parameters.
        first = min(held)
        found[2].append(f"found adapter {first!r}, and {listed(active)} is active: activate(model, {first!r}) first")
    # What a state says nothing of stays as it is, and is not missing.
    for name in place.hidden():
        for key, tensor in place._modules[name].state_dict(keep_vars=True).items():
            state.setdefault(f"{prefix}{name}.{key}", tensor)


def attach(tree: nn.Module, path: str, layer: nn.Module) -> None:
    """Make `layer` a part of `tree` at `path`, or beside it where another stands there."""
    *parts, last = path.split(".")
    for part in parts:
        part = _free(tree, part, nn.Module)
        tree._modules.setdefault(part, nn.Module())
        tree = tree._modules[part]  # type: ignore[assignment]
    tree._modules[_free(tree, last, None)] = layer


def _free(tree: nn.Module, name: str, kind: type | None) -> str:
    """`name`, or one like it where something else than a mere part of a path has it."""
    while (there := tree._modules.get(name)) is not None and (kind is None or type(there) is not kind):
        name += "_"
    return name


# -- the base alone


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True, _prefix: str = "", _seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without adapters."""
    seen = set() if _seen is None else _seen
    if remove_duplicate and id(model) in seen:
        return
    seen.add(id(model))
    yield _prefix, model
    for name, child in model._modules.items():
        if child is not None and not isinstance(child, Adapters):
            path = f"{_prefix}.{name}" if _prefix else name
            yield from named_modules(child, remove_duplicate=remove_duplicate, _prefix=path, _seen=seen)


def modules(model: nn.Module) -> Iterator[nn.Module]:
    """`model.modules()` without adapters."""
    return (module for _, module in named_modules(model))


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` without adapters'."""
    seen: set[int] = set()
    for path, module in named_modules(model, remove_duplicate=remove_duplicate):
        for name, parameter in module._parameters.items():
            if parameter is None or (remove_duplicate and id(parameter) in seen):
                continue
            seen.add(id(parameter))
            yield f"{path}.{name}" if path else name, parameter


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """`model.parameters()` without adapters'."""
    return (parameter for _, parameter in named_parameters(model))


def saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint of the base holds, by all of its names: parameters, and the buffers that are no mere cache."""
    yield from named_parameters(model, remove_duplicate=False)
    for path, module in named_modules(model, remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of the base."""
    for module in modules(model):
        yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
