"""Starts of LoRA that are read off what the base does with rows: HF PEFT's numbers, and what users meet."""

import copy

import peft
import pytest
import torch
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file

import tanzaku as tz
from close import GRADIENT, RUN, assert_close
from interop.oracle import logits, method, reopened, scatter
from models import batch, tiny
from tanzaku.core.calibration import OWN
from tanzaku.core.context import context
from tanzaku.core.manager import manager_of
from tanzaku.methods.lora_starts import Components, shared_out
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def rows():
    torch.manual_seed(0)
    ids = [torch.randint(0, 128, (1, 40)) for _ in range(6)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each} for each in ids]


def calibrated(model, rows, **settings):
    adapter = tz.attach(model, method("lora", {**LORA, **settings}), "a", seed=0)
    tz.calibrate(model, "a", rows)
    return adapter


def assert_same_start(adapter, theirs):
    """But for the signs of singular vectors."""
    for path, layer in adapter.at():
        there = theirs.get_submodule(f"base_model.model.{path}")
        for name in ("lora_A", "lora_B"):
            found, expected = (getattr(each, name) for each in (layer, there))
            assert_close(found.weight.abs(), expected["default"].weight.abs(), GRADIENT)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["ipm", "kpm"])
def test_corda_starts_as_in_peft(kind, how, rows):
    model = tiny(kind, "lm")
    more = {} if kind == "llama" else {"target_modules": ["c_attn"]}
    theirs = copy.deepcopy(model)
    config = peft.LoraConfig(
        **{**LORA, **more},
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=how),
        task_type="CAUSAL_LM",
    )
    preprocess_corda(theirs, config, lambda: [theirs(**row) for row in rows])
    wrapped = peft.get_peft_model(theirs, config)
    ours = calibrated(model, rows, init_lora_weights="corda", corda_config={"corda_method": how}, **more)
    assert_same_start(ours, wrapped)


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_lora_ga_starts_as_in_peft(direction, scale, rows, monkeypatch):
    """By an exact decomposition in place of PEFT's random one."""

    def exact(matrix, q=6, niter=2):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :q], s[:q], vh[:q].t()

    monkeypatch.setattr(torch, "svd_lowrank", exact)
    model = tiny("llama", "lm")
    theirs = copy.deepcopy(model)
    config = peft.LoraConfig(
        **LORA,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction=direction, scale=scale),
        task_type="CAUSAL_LM",
    )
    preprocess_loraga(theirs, config, lambda: [theirs(**row).loss.backward() for row in rows])
    wrapped = peft.get_peft_model(theirs, config)
    settings = {"direction": direction, "scale": scale}
    ours = calibrated(model, rows, init_lora_weights="lora_ga", lora_ga_config=settings)
    assert_same_start(ours, wrapped)


def test_eva_finds_the_components_of_what_modules_read():
    """Those of all rows, in as many passes as there are, when nothing is cut off."""
    torch.manual_seed(0)
    look = Components(6, 0.999999)
    seen = torch.randn(50, 6) @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0.5])) + 2
    for part in seen.split(10):
        look.add(part)
    _, values, basis = torch.linalg.svd(seen - seen.mean(0), full_matrices=False)
    assert_close(look.values, values)
    assert_close((look.basis @ basis.t()).abs(), torch.eye(6), GRADIENT)
    assert sum(look.explained) == pytest.approx(1)


def test_eva_shares_ranks_out_by_what_components_explain(rows, tmp_path):
    """Their sum stays, a module has one at least, and the scale of each is what it was; PEFT reads the file."""
    assert shared_out({"a": [0.9, 0.05, 0.01], "b": [0.3, 0.2, 0.1]}, 4) == {"a": 1, "b": 3}
    model = tiny("llama", "lm")
    adapter = calibrated(model, rows, init_lora_weights="eva")
    ranks = {path: len(layer.lora_A.weight) for path, layer in adapter.at()}
    assert sum(ranks.values()) == 12 and len(set(ranks.values())) > 1
    assert adapter.method.rank_pattern == {path: r for path, r in ranks.items() if r != 3}
    for _, layer in adapter.at():
        assert layer.scaling == pytest.approx(5 / 3)
        assert not layer.lora_B.weight.any()
        assert_close(layer.lora_A.weight @ layer.lora_A.weight.t(), torch.eye(layer.r))
    scatter([p for _, p in adapter.trained()])
    tz.activate(model, "a")
    given = batch(model)
    expected = logits(model, given)
    tz.save(model, "a", tmp_path)
    tz.load(model, tmp_path, "b")
    tz.activate(model, "b")
    assert_close(logits(model, given), expected)
    tz.detach(model)
    assert_close(logits(reopened(model, tmp_path), given), expected)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_starts_as_the_base_which_stays_as_it_is(init, rows, tmp_path):
    model = tiny("llama", "lm")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    given = batch(model)
    bare = logits(model, given)
    adapter = calibrated(model, rows, init_lora_weights=init, use_dora=True)
    tz.activate(model, "a")
    assert_close(logits(model, given), bare)
    scatter([p for _, p in adapter.trained()])
    expected = logits(model, given)
    tz.save(model, "a", tmp_path)
    tz.detach(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    tz.load(model, tmp_path, "b")
    tz.activate(model, "b")
    assert_close(logits(model, given), expected)


def test_nothing_trains_that_has_seen_no_rows(rows):
    model = tiny("llama", "lm")
    tz.attach(model, tz.LoRA(**LORA, init_lora_weights="eva"), "a", seed=0)
    tz.activate(model, "a")
    assert torch.isfinite(model(**rows[0]).loss)  # to look at it is no error
    with pytest.raises(tz.TanzakuError, match=r"has seen none; call tanzaku\.calibrate"):
        model.train()(**rows[0])
    with pytest.raises(tz.TanzakuError, match="has seen none"):  # whoever trains without dropout
        model.eval()(**rows[0]).loss.backward()
    model.train()
    tz.calibrate(model, "a", rows)
    assert model.training
    model(**rows[0]).loss.backward()


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_nothing_starts_twice(init, rows, tmp_path):
    """What it has learnt since would be lost, in a file as in memory."""
    model = tiny("llama", "lm")
    adapter = tz.attach(model, tz.LoRA(**LORA, init_lora_weights=init), "a", seed=0)
    tz.calibrate(model, "a", rows)
    scatter([p for _, p in adapter.trained()])
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    with pytest.raises(tz.TanzakuError, match="found 'a', which has started already, expected one that has not: "):
        tz.calibrate(model, "a", rows)
    assert all(torch.equal(p, before[name]) for name, p in adapter.named_parameters())
    tz.save(model, "a", tmp_path)
    tz.load(model, tmp_path, "b")
    with pytest.raises(tz.TanzakuError, match="started already" if init == "eva" else "starts from no rows"):
        tz.calibrate(model, "b", rows)


def test_what_cannot_be_calibrated_says_so(rows):
    model = tiny("llama", "lm")
    tz.attach(model, tz.LoRA(**LORA), "plain")
    with pytest.raises(tz.TanzakuError, match=r"'plain' \(lora\) starts from no rows"):
        tz.calibrate(model, "plain", rows)
    tz.attach(model, tz.LoRA(**LORA, init_lora_weights="lora_ga"), "ga")
    bare = [{key: t for key, t in row.items() if key != "labels"} for row in rows]
    with pytest.raises(tz.TanzakuError, match=r"rows without a loss .*expected one: with `labels`"):
        tz.calibrate(model, "ga", bare)
    with pytest.raises(tz.TanzakuError, match=r"no pass through .*, expected rows"):
        tz.calibrate(model, "ga", [])
    tz.attach(model, tz.LoRA(**LORA, init_lora_weights="eva"), "eva")
    short = [{"input_ids": torch.ones(1, 2, dtype=torch.long)}]
    with pytest.raises(tz.TanzakuError, match=r"fewer tokens .* expected at least 6 in a batch"):
        tz.calibrate(model, "eva", short)
    wrongs = {"eva_config": {"rho": 0.5}, "corda_config": {"corda_method": "x"}, "lora_ga_config": {"scale": 1}}
    for wrong in ({key: value} for key, value in wrongs.items()):
        with pytest.raises(tz.TanzakuError, match=f"found {next(iter(wrong))}="):
            tz.attach(model, tz.LoRA(**LORA, **wrong), "wrong")


def test_padding_is_not_looked_at(rows):
    """Whatever stands there, the start is the same."""
    starts = []
    for pad in (3, 77):
        padded = []
        for row in rows:
            ids = torch.cat([row["input_ids"], torch.full((1, 30), pad)], 1)
            padded.append({"input_ids": ids, "attention_mask": (torch.arange(70) < 40).long()[None]})
        adapter = calibrated(tiny("llama", "lm"), padded, init_lora_weights="corda")
        starts.append({name: p.detach() for name, p in adapter.trained()})
    assert_close(starts[0], starts[1], GRADIENT)


def test_layers_can_ask_which_tokens_are_a_row_s_own(rows):
    """Those of padding are not, nor those whose label is masked."""
    model = tiny("llama", "lm")
    seen = []

    class Asks(tz.LoRA):
        calibrates = True

        def calibrate(self, adapter, passes):
            layer = next(layer for _, layer in adapter.at())
            layer.watch = lambda module, x, y: seen.append(context(OWN, x)) or y
            next(iter(passes))()
            layer.watch = None

    adapter = tz.attach(model, Asks(r=1), "a")
    labels = rows[0]["labels"].clone()
    labels[:, :5] = -100
    mask = rows[0]["attention_mask"].clone()
    mask[:, 35:] = 0
    tz.calibrate(model, "a", [{**rows[0], "labels": labels, "attention_mask": mask}])
    assert seen[0].tolist() == [[5 <= at < 35 for at in range(40)]]
    assert adapter is manager_of(model).get("a")


def test_a_run_shows_training_rows_before_the_first_step(tmp_path):
    """Beside others as alone; the record has the ranks that were found."""
    settings = TrainSettings(epochs=1, learning_rate=0.02, adam_epsilon=1e-3, batch_size=2)
    jobs = [
        Job(init, method("lora", {"r": 2, "init_lora_weights": init}), settings) for init in ("eva", "corda", "lora_ga")
    ]
    data = task(train=6)
    together = train_jobs(tiny("llama", num_labels=2), data, jobs, out=tmp_path / "together")
    assert [(r.status, r.error) for r in together] == [("done", None)] * 3
    assert sum(together[0].method_settings["rank_pattern"].values() or [4]) > 0
    for job in jobs:
        (alone,) = train_jobs(tiny("llama", num_labels=2), data, [job], out=tmp_path / job.name)
        found = load_file(tmp_path / "together" / "adapters" / job.name / "adapter_model.safetensors")
        assert_close(found, load_file(tmp_path / job.name / alone.adapter / "adapter_model.safetensors"), RUN)


@pytest.mark.parametrize(("init", "r"), [("eva", 2), ("corda", 3), ("lora_ga", 3)])
def test_candidates_share_what_they_see_of_the_same_rows(init, r, tmp_path, monkeypatch):
    """Of another rate, or rank, also one that has to wait; another seed shuffles the rows, and looks anew.

    EVA looks for as many components as the rank says: of another rank it sees something else."""
    passes = []
    run = tz.LoRA._pass
    monkeypatch.setattr(tz.LoRA, "_pass", lambda self, *given: passes.append(given) or run(self, *given))
    settings = TrainSettings(epochs=1, learning_rate=0.02, adam_epsilon=1e-3, batch_size=2)
    jobs = [
        Job(name, method("lora", {"r": rank, "init_lora_weights": init}), settings.model_copy(update=more))
        for name, rank, more in (("first", 2, {}), ("like", r, {"learning_rate": 0.01}), ("shuffled", 2, {"seed": 1}))
    ]
    data = task(train=6)
    alone = []
    for job in jobs:
        train_jobs(tiny("llama", num_labels=2), data, [job], out=tmp_path / job.name)
        alone.append(len(passes))
        passes.clear()
    assert len(set(alone)) == 1
    for rows_per_step in (1, 16):
        there = tmp_path / str(rows_per_step)
        train_jobs(tiny("llama", num_labels=2), data, jobs, out=there, rows_per_step=rows_per_step)
        assert len(passes) == 2 * alone[0]
        passes.clear()
        for job in jobs:
            found, own = (
                load_file(each / "adapters" / job.name / "adapter_model.safetensors")
                for each in (there, tmp_path / job.name)
            )
            assert_close(found, own, RUN)
