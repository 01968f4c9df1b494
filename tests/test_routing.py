"""Rows to adapters: a route does what sending every row by itself would do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tanzaku.core.routing import Route, put, take
from tanzaku.errors import TanzakuError

names = st.sampled_from(["a", "b", "c-1"])
entry = st.one_of(st.none(), names, st.lists(names, max_size=3).map(tuple))
routes = st.lists(entry, min_size=1, max_size=9)


def stack_of(found):
    return () if found is None else (found,) if isinstance(found, str) else found


@settings(deadline=None)
@given(routes, st.integers(1, 3))
def test_groups_send_every_row_to_its_stack(entries, times):
    """Each row of the batch is in exactly one group, that of its entry; a multiple repeats entries in place."""
    route = Route.of(entries)
    wanted = [stack_of(e) for e in entries for _ in range(times)]
    seen = {}
    for number, rows in route.groups(len(wanted)):
        for row in take(torch.arange(len(wanted)), rows).tolist():
            assert row not in seen
            seen[row] = route.stacks[number]
    assert [seen[row] for row in range(len(wanted))] == wanted


@settings(deadline=None)
@given(routes, st.integers(1, 3), st.data())
def test_put_replaces_rows_as_a_loop_does(entries, times, data):
    """Groups changed and put back, some left as they are, equal a loop over rows, gradients included."""
    route = Route.of(entries)
    rows = times * len(entries)
    changed = data.draw(st.sets(st.integers(0, len(route.stacks) - 1)))
    base = torch.randn(rows, 2, 3, requires_grad=True)
    original = base.detach().clone()
    parts = [(at, take(base, at) * (n + 2)) for n, at in route.groups(rows) if n in changed]
    found = put(base, parts)
    factor = torch.ones(rows, 1, 1)
    for row in range(rows):
        number = route.stacks.index(stack_of(entries[row // times]))
        if number in changed:
            factor[row] = number + 2
    assert torch.equal(found, original * factor)
    (gradient,) = torch.autograd.grad(found.sum(), base)
    assert torch.equal(gradient, factor.expand_as(base))
    assert torch.equal(base, original)  # nothing is written in place


@settings(deadline=None)
@given(routes, st.integers(1, 30))
def test_any_other_size_is_an_error(entries, rows):
    """A route of several stacks fits whole multiples of its length only; a route of one stack fits all."""
    route = Route.of(entries)
    if route.uniform:
        assert route.groups(rows) == [(0, None)]
    elif rows % len(entries):
        with pytest.raises(TanzakuError, match=f"{len(entries)} entries and the batch {rows} rows"):
            route.groups(rows)
    else:
        assert sum(len(take(torch.arange(rows), at)) for _, at in route.groups(rows)) == rows


@settings(deadline=None)
@given(routes)
def test_adapters_are_named_once_in_order(entries):
    """The names of a route, each once, as they appear."""
    flat = [name for e in entries for name in stack_of(e)]
    assert Route.of(entries).adapters == list(dict.fromkeys(flat))


def test_contiguous_rows_are_views():
    """Rows that lie together are not copied."""
    x = torch.arange(6.0)
    (_, first), (_, second) = Route.of(["a", "a", "b"]).groups(6)
    assert take(x, first).data_ptr() == x.data_ptr()
    assert take(x, second).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_put_keeps_the_type_of_the_base():
    """A part of another type becomes the base's."""
    base = torch.zeros(3, dtype=torch.bfloat16)
    for rows in (slice(0, 2), torch.tensor([0, 2])):
        assert put(base, [(rows, torch.ones(2))]).dtype == torch.bfloat16
    assert put(base, []) is base


@pytest.mark.parametrize("entries", ["lora", [], ()])
def test_a_route_is_a_list_of_entries(entries):
    """A bare name or nothing at all is an error that says what was expected."""
    with pytest.raises(TanzakuError, match="expected a list with one entry a row"):
        Route.of(entries)


@pytest.mark.parametrize("wrong", [1, ("a", 2), {"a"}, ("a", None), ("a", ("b",))], ids=str)
def test_an_entry_is_a_name_a_tuple_or_none(wrong):
    """Anything else among the entries is an error that shows it."""
    with pytest.raises(TanzakuError, match="expected a name, a tuple of names or None"):
        Route.of(["a", wrong])
