"""Law 9: in other people's programs an active adapter is seen, trained, moved, clipped, copied and saved.

Each law runs for every method, by the native API and by HF PEFT's names.
"""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from variants import all_kinds, attached, bamboo, logits, method, plain_logits, unlike

import tanzaku as tz
from close import GRADIENT, assert_close, close
from models import batch, saved_parts, tiny
from tanzaku.compat.peft import get_peft_model
from tanzaku.compat.peft.config import CONFIGS
from tanzaku.core.manager import manager_of
from tanzaku.core.method import ModuleLayer
from tanzaku.core.shared import Shared
from tanzaku.core.sites import guard_hooks
from tanzaku.core.weights import WeightCopy
from tanzaku.methods import METHODS
from tanzaku.models import tree
from tiers import costly, in_families

IN_PEFT = {kind.method.name: kind for kind in CONFIGS.values()}
PROGRAMS = [
    *((name, "native") for name in METHODS),
    *((name, "compat") for name in METHODS if name in IN_PEFT),
]
in_programs = pytest.mark.parametrize(
    ("name", "api"), costly([p for p in PROGRAMS if p[0] in unlike()], [p for p in PROGRAMS if p[0] not in unlike()])
)


def active(name, api="native", kind="llama", head="cls"):
    """A model with an opened, active adapter and one that is not active: what a program is handed."""
    model = bamboo(kind, head)
    if api == "native":
        attached(model, name)
        attached(model, "lora", as_="idle")
        tz.activate(model, name)
        return model
    settings = {key: value for key, value in vars(method(name)).items() if value is not None}
    task = "CAUSAL_LM" if name == "cpt" else "SEQ_CLS"  # the only one that PEFT has it for
    with TemporaryDirectory() as folder:
        parts = saved_parts(model, method(name), Path(folder))
        settings |= {"adapters": {label: str(path) for label, path in parts.items()}} if parts else {}
        model = get_peft_model(model, IN_PEFT[name](**{**settings, "task_type": task}))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in trained(model):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def compute(model):
    with torch.no_grad():
        return model(**batch(bamboo())).logits


class Net(nn.Module):
    """A program's own network, which holds the model beside something else."""

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(3, 2)

    def forward(self, **inputs):
        return self.head(self.body(**inputs).logits)


def steps(net, count=3):
    """Steps of an optimizer over what the program sees."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02)
    for seed in range(count):
        out = net(**batch(bamboo(), seed=seed))
        (out if isinstance(out, torch.Tensor) else out.logits).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# -- inside another module


@in_programs
def test_a_parent_sees_and_trains_what_is_active(name, api):
    """All of the active adapter and nothing else: no tensor of the base, nor of what is not active."""
    body = active(name, api)
    own = trained(body)
    net = Net(body)
    head = list(net.head.parameters())
    assert {id(p) for p in trained(net)} == {id(p) for p in [*own, *head]}
    before, base = [p.detach().clone() for p in own], snapshot(body)
    steps(net)
    moved = [not torch.equal(a, b) for a, b in zip(before, own, strict=True)]
    assert all(moved)
    assert all(torch.equal(a, b) for a, b in zip(base, snapshot(body), strict=True))


def snapshot(model):
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [p.detach().clone() for p in tree.parameters(model)]


@in_programs
def test_a_parents_state_holds_what_is_active(name, api):
    """A parent's state loads strictly, into a parent whose adapter is another one, and brings the adapter with it."""
    one, two = Net(active(name, api)), Net(active(name, api))
    with torch.no_grad():
        for parameter in trained(two):
            parameter.add_(0.1)
    assert not close(compute_net(one), compute_net(two))
    result = two.load_state_dict(one.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert_close(compute_net(two), compute_net(one))


def compute_net(net):
    with torch.no_grad():
        return net(**batch(bamboo()))


@all_kinds
def test_a_state_without_an_active_adapter_is_the_bases(name):
    """Key by key, also in a parent; and such a state loads strictly while adapters are attached."""
    bare, model = bamboo(), active(name)
    keys = list(bare.state_dict())
    with_it = model.state_dict()
    assert [key for key in with_it if not key.startswith(f"tanzaku.{name}.")] == keys != list(with_it)
    tz.activate(model, None)
    state = model.state_dict()
    assert list(state) == keys and list(state._metadata) == list(bare.state_dict()._metadata)
    assert list(Net(model).state_dict()) == list(Net(bare).state_dict())
    own = [p.detach().clone() for p in manager_of(model).tree.parameters()]
    model.load_state_dict(bare.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(own, manager_of(model).tree.parameters(), strict=True))
    tz.activate(model, name)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(bare.state_dict())


@in_programs
def test_a_parent_moves_the_adapter(name, api):
    """`.double()` of a parent takes the adapter along, as it takes the base."""
    body = active(name, api)
    before = compute(body)
    net = Net(body).double()
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert_close(compute(body).float(), before, GRADIENT)


def test_names_that_an_adapter_may_have():
    """Names of attributes of modules do no harm in the tree."""
    model = bamboo()
    for name in ("train", "forward", "host", "training", "_modules", "parameters"):
        attached(model, "lora", as_=name)
        tz.activate(model, name)
        assert any(key.startswith(f"tanzaku.{name}.") for key in model.state_dict())
        assert trained(model)
    tz.detach(model)


# -- copies


@in_programs
def test_a_copy_has_an_adapter_of_its_own(name, api):
    """It computes the same, and training it changes the copy alone."""
    model = active(name, api)
    before = compute(model)
    twin = copy.deepcopy(model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert_close(compute(twin), before)
    assert len(trained(twin)) == len(trained(model))
    steps(twin)
    assert_close(compute(model), before)
    assert not close(compute(twin), before)
    if api == "native":
        tz.activate(twin, None)
        assert_close(compute(model), before)
        assert_close(compute(twin), compute(bamboo()))
        tz.detach(twin)
        assert name in tz.adapters(model) and not tz.adapters(twin)


@all_kinds
def test_a_copy_of_a_part_leaves_the_whole_behind(name):
    """A copied backbone computes with the adapter or says that it cannot; neither head nor model comes with it."""
    model = active(name)
    inputs = batch(model)
    kind = type(model)
    gc.collect()
    before = sum(type(o) is kind for o in gc.get_objects())
    part = copy.deepcopy(model.model)
    gc.collect()
    assert sum(type(o) is kind for o in gc.get_objects()) == before
    with torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        own = [layer for path, layer in manager_of(model).get(name).at() if path or isinstance(layer, Shared)]
        alone = all(isinstance(each, ModuleLayer | WeightCopy | Shared) for each in own)
        alone = alone and not any(getattr(each, "reads_places", False) for each in own)
        if not alone or len(own) < len([*manager_of(model).get(name).at()]):  # it needs what lies around the part
            with pytest.raises(tz.TanzakuError, match="copy of a part of a model"):
                part(**inputs)
        else:
            assert_close(part(**inputs).last_hidden_state, expected)


@in_programs
def test_an_average_follows_the_adapter(name, api):
    """An exponential moving average, as AveragedModel keeps it."""
    model = active(name, api)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    first = [p.detach().clone() for p in trained(model)]
    average.update_parameters(model)
    steps(model, 1)
    average.update_parameters(model)
    for mean, old, new in zip(trained(average.module), first, trained(model), strict=True):
        assert_close(mean, (old + new) / 2)


@in_programs
def test_pickled_and_read_again(name, api):
    """torch.save of a whole model, active adapter and all."""
    model = active(name, api)
    before = compute(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(model)
    assert_close(compute(twin), before)
    assert len(trained(twin)) == len(trained(model))
    steps(twin)
    assert_close(compute(model), before)


def test_a_model_that_was_unpickled_writes_its_adapters(tmp_path):
    """In a process that has imported nothing of ours by name."""
    model = tiny("llama", "lm")
    tz.attach(model, tz.LoRA(r=2), "a", seed=0)
    tz.activate(model, "a")
    with (tmp_path / "model").open("wb") as file:
        pickle.dump(model, file)
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')).save_pretrained(sys.argv[2])"
    paths = [str(tmp_path / name) for name in ("model", "out")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=300)
    tz.load(tiny("llama", "lm"), tmp_path / "out" / "tanzaku" / "a", "mine")


def test_read_in_another_process(tmp_path):
    """Nothing of this process is needed, such as attention functions that it registered."""
    path = tmp_path / "models.pkl"
    found = {}
    with path.open("wb") as file:
        models = {name: active(name) for name in METHODS}
        pickle.dump((models, batch(bamboo())), file)
    found = {name: compute(model) for name, model in models.items()}
    code = (
        "import pickle, sys, torch\n"
        f"models, inputs = pickle.load(open({str(path)!r}, 'rb'))\n"
        "with torch.no_grad():\n"
        "    out = {name: model(**inputs).logits for name, model in models.items()}\n"
        f"torch.save(out, {str(tmp_path / 'out.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    for name, out in torch.load(tmp_path / "out.pt").items():
        assert_close(out, found[name], at=name)


# -- threads


@all_kinds
def test_threads_have_routes_of_their_own(name):
    """On one model, at once: each thread gets its own route's rows, whatever the others run."""
    model = bamboo()
    attached(model, name)
    attached(model, "llama_adapter", as_="quiet")  # it runs modules of the base without adapters
    inputs = batch(model)
    routes = [[name] * 4, ["quiet"] * 4, [None] * 4]
    if METHODS[name].shares_batch:
        routes.append([name, None, "quiet", name])
    with torch.no_grad():
        expected = [logits(model, route, inputs) for route in routes]

    def work(number):
        with torch.no_grad():
            return [logits(model, routes[number], inputs) for _ in range(8)]

    with switching_fast(), ThreadPoolExecutor(len(routes)) as pool:
        for want, found in zip(expected, pool.map(work, range(len(routes))), strict=True):
            for out in found:
                assert_close(out, want)


class switching_fast:
    """Threads take turns as often as they can."""

    def __enter__(self):
        self.before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)

    def __exit__(self, *_):
        sys.setswitchinterval(self.before)


def test_two_models_in_two_threads():
    """What one model runs in quiet says nothing of another."""
    one, two = active("llama_adapter"), active("lora")
    expected = [compute(one), compute(two)]
    with switching_fast(), ThreadPoolExecutor(2) as pool:
        for want, found in zip(expected, pool.map(lambda m: [compute(m) for _ in range(30)], (one, two)), strict=True):
            for out in found:
                assert_close(out, want)


@all_kinds
def test_what_is_active_is_so_in_all_threads(name):
    """And a route is its own thread's alone."""
    model = active(name)
    expected, bare = compute(model), compute(bamboo())

    def elsewhere():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(compute, model).result()

    assert_close(elsewhere(), expected)
    with tz.route(model, [None] * 4):
        assert_close(elsewhere(), expected)
        assert_close(compute(model), bare)
    tz.activate(model, None)
    assert_close(elsewhere(), bare)


@pytest.mark.parametrize("reentrant", [False, True])
@all_kinds
def test_a_checkpointed_layer_keeps_its_route_in_another_thread(name, reentrant):
    """The backward pass runs in a thread of its own, as CUDA's does, after the route has ended."""
    model = bamboo()
    adapter = attached(model, name)
    inputs = batch(model)
    mixed = [name, None, None, name] if METHODS[name].shares_batch else [name] * 4

    def gradients(threaded):
        for _, parameter in adapter.named_parameters():
            parameter.grad = None
        torch.manual_seed(3)  # of methods that draw
        with tz.route(model, mixed):
            loss = plain_logits(model, inputs).square().sum()
        if threaded:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
        return [p.grad.clone() for _, p in adapter.trained()]

    model.train()
    expected = gradients(threaded=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for want, found in zip(expected, gradients(threaded=True), strict=True):
        assert_close(found, want, GRADIENT)


# -- torch.compile


def compiled(model, backend="eager"):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend)


@pytest.mark.slow
@in_families("name", list(METHODS))
def test_compiled_code_is_never_stale(name):
    """Compiled before and after, with adapters switched, routed and left out, it computes what the model does."""
    model = bamboo()
    inputs = batch(model)
    fast = compiled(model)
    with torch.no_grad():
        fast(**inputs)
        attached(model, name)
        attached(model, name, as_="second")
        for entry in (name, "second", None, name, "second"):
            tz.activate(model, entry)
            assert_close(fast(**inputs).logits, model(**inputs).logits)
        tz.activate(model, None)
        routes = [[name] * 4, [None] * 4]
        if METHODS[name].shares_batch:
            routes += [[name, "second", None, name], [None, name, "second", "second"]]
        for route in routes:
            with tz.route(model, route):
                assert_close(fast(**inputs).logits, model(**inputs).logits)
        assert_close(fast(**inputs).logits, model(**inputs).logits)
        tz.detach(model)
        assert_close(fast(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(("name", "variant"), [("lora", "layers_to_transform"), ("llama_adapter", "default")])
def test_layers_that_share_compiled_code(name, variant):
    """Compiled one by one, in a thread of its own: some layers are adapted, and those that are not have come first."""
    model = bamboo()
    inputs = {**batch(model), "use_cache": False}
    for as_ in "ab":
        attached(model, name, variant, as_)
    entries = ("a", "b", None, "a")
    found = []
    for way in ("as they are", "compiled"):
        if way == "compiled":
            torch._dynamo.reset()
            for layer in model.model.layers:
                layer.compile(backend="eager")
        for entry in entries:
            tz.activate(model, entry)
            with ThreadPoolExecutor(1) as pool, torch.no_grad():
                found.append(pool.submit(lambda: model(**inputs).logits).result())
    for entry, want, got in zip(entries, found[:4], found[4:], strict=True):
        assert_close(got, want, at=str(entry))


@pytest.mark.parametrize("entries", [["a"], ["a", "b", None, "c"], ["a", None, "a", "b"]], ids=str)
def test_any_number_of_lora_is_one_graph(entries):
    """Routes and groups are Python's: nothing is read off a tensor."""
    model = bamboo(head="lm")
    for name in "abc":
        attached(model, "lora", as_=name)
    torch._dynamo.reset()
    with torch.no_grad(), tz.route(model, entries):
        found = torch._dynamo.explain(model)(input_ids=batch(model)["input_ids"])
    assert found.graph_break_count == 0, found.break_reasons


@pytest.mark.slow
@pytest.mark.product
@pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="inductor writes vectors that torch then has not"
)
def test_inductor():
    """torch's own compiler, forward and backward, over a mixed batch."""
    model = bamboo(head="lm")
    for name in "ab":
        attached(model, "lora", as_=name)
    ids = batch(model)["input_ids"]
    fast = compiled(model, "inductor")
    found = []
    with tz.route(model, ["a", "b", None, "a"]):
        for each in (model, fast):
            each(input_ids=ids).logits.square().sum().backward()
            found.append([p.grad.clone() for n in "ab" for _, p in manager_of(model).get(n).trained()])
            model.zero_grad()
    for want, got in zip(*found, strict=True):
        assert_close(got, want, GRADIENT)
    assert len(trained(fast)) == len(trained(model)) > 0


# -- routes that fail


def test_a_route_that_cannot_be_put_in_force_leaves_what_was_active():
    model = active("lora")
    attached(model, "full")
    before = compute(model)
    for wrong in (["nobody"], ["lora", "full"], "lora", [], [3]):
        with pytest.raises(tz.TanzakuError), tz.route(model, wrong):
            pass
        assert_close(compute(model), before)
    with pytest.raises(tz.TanzakuError):
        tz.activate(model, "nobody")
    assert_close(compute(model), before)
    assert trained(model)


def test_a_text_is_no_route():
    """It would be read letter by letter."""
    model = bamboo()
    for name in ("a", "b", "ab"):
        attached(model, "lora", as_=name)
    with pytest.raises(tz.TanzakuError, match=r"found 'ab', expected a list .* \['ab'\]"), tz.route(model, "ab"):
        pass


def test_a_pass_that_was_cut_short_leaves_the_base():
    """Ctrl-C in the middle of a pass with other weights: they are the base's own again."""
    model = active("full")
    expected = compute(bamboo())

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        compute(model)
    handle.remove()
    tz.activate(model, None)
    assert_close(compute(model), expected)


def test_guards_of_hooks_in_another_torch():
    """Where torch keeps its settings otherwise, the one of this thread is set, and importing does not fail."""
    other = SimpleNamespace()
    guard_hooks(other)
    assert other.skip_nnmodule_hook_guards is False
