"""An activated adapter in transformers' Trainer, accelerate and Lightning; bases that are kept elsewhere."""

import copy

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from variants import all_kinds, attach, by_kind, method

import tanzaku as tz
from close import RUN, assert_close, close
from models import batch, tiny
from tanzaku.core.manager import manager_of

LABELS = [0, 1, 1, 0, 1, 0, 0, 1, 2, 0, 2, 1, 0, 1, 2, 2]
DATA = [
    {"input_ids": torch.randint(5, 99, (8,), generator=torch.Generator().manual_seed(i)), "labels": label}
    for i, label in enumerate(LABELS)
]


def model_with(name, seed=1):
    model = tiny("llama")
    attach(model, method(name), name, seed=seed)
    tz.activate(model, name)
    return model


def trainer(folder, name, **options):
    torch.manual_seed(0)
    settings = {
        "report_to": [],
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 0.05,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "metric_for_best_model": "eval_loss",
        **options,
    }
    return Trainer(
        model=model_with(name),
        args=TrainingArguments(str(folder), **settings),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
    )


def losses(trained):
    return [entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry]


@pytest.mark.slow
@all_kinds
def test_trainer_keeps_the_adapter(name, tmp_path):
    """Checkpoints hold it: training goes on from one as if it had not stopped, and the best one comes back."""
    whole = trainer(tmp_path / "whole", name)
    whole.train()
    again = trainer(tmp_path / "again", name)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert_close(losses(again)[-1], losses(whole)[-1], RUN)
    # The highest is called the best, so that it is not the last.
    best = trainer(tmp_path / "best", name, load_best_model_at_end=True, greater_is_better=True, learning_rate=0.01)
    best.train()
    found = losses(best)
    assert_close(best.evaluate()["eval_loss"], max(found), RUN)


@all_kinds
def test_what_trainer_saves_is_read_by_transformers_and_by_tanzaku(name, tmp_path):
    """`save_model` writes a directory that is the base to one and the base with its adapter to the other."""
    model = model_with(name)
    with torch.no_grad():
        for _, parameter in manager_of(model).get(name).trained():
            parameter.add_(0.1)
    one = Trainer(model=model, args=TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True))
    one.save_model(str(tmp_path / "out"))
    inputs = batch(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        tz.activate(model, None)
        base = model(**inputs).logits
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(plain(**inputs).logits, base)
        tz.load(plain, tmp_path / "out", "mine")
        tz.activate(plain, "mine")
        assert_close(plain(**inputs).logits, expected)


def test_trainer_decays_as_it_does_elsewhere(tmp_path):
    """Biases and norms of an adapter's own are spared, by their names."""
    model = tiny("llama")
    tz.attach(model, tz.LoRA(r=2, modules_to_save=["norm", "score"]), "a")
    tz.activate(model, "a")
    one = Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    own = [name for name in one.get_decay_parameter_names(model) if name.startswith("tanzaku.")]
    assert any("lora_A" in name for name in own) and any("lora_B" in name for name in own)
    assert any("score.weight" in name for name in own) and not any("norm" in name for name in own)


def two_adapters():
    model = model_with("lora")
    tz.attach(model, tz.LoRA(r=2), "other", seed=1)
    return model


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["q_proj"]}])
def test_a_module_that_took_another_ones_place_has_its_adapters(settings):
    model = tiny("llama")
    tz.attach(model, tz.LoRA(r=2, target_modules=["v_proj"] if settings else ["q_proj"], **settings), "a", seed=0)
    inputs = batch(model)
    with torch.no_grad():
        for _, parameter in manager_of(model).get("a").trained():
            parameter.add_(0.1)
        with tz.route(model, ["a"] * 4):
            expected = model(**inputs).logits
        for layer in model.model.layers:
            layer.self_attn.q_proj = copy_of_linear(layer.self_attn.q_proj)
        with tz.route(model, ["a"] * 4):
            assert_close(model(**inputs).logits, expected)


def copy_of_linear(old):
    new = torch.nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    return new


def test_adapters_that_come_within_inference_mode_train_afterwards(tmp_path):
    model = two_adapters()
    inputs = batch(model)
    tz.save(model, "lora", tmp_path / "a")
    with torch.inference_mode():
        tz.load(model, tmp_path / "a", "loaded")
        for name in ("loaded", "other", "loaded"):
            tz.activate(model, name)
            model(**inputs)
    model(**inputs).logits.sum().backward()
    assert all(p.grad is not None for _, p in manager_of(model).get("loaded").trained())


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_another_adapter_is_refused(strict):
    """An optimizer's state that stands beside it would go on with other parameters, as in Trainer."""
    model = two_adapters()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tz.activate(model, "other")
    with pytest.raises(
        RuntimeError, match=r"found adapter 'lora', and other is active: activate\(model, 'lora'\) first"
    ):
        model.load_state_dict(state, strict=strict)
    base = {key: tensor for key, tensor in state.items() if not key.startswith("tanzaku.")}
    assert model.load_state_dict(base, strict=False).missing_keys
    tz.activate(model, ("lora", "other"))
    assert model.load_state_dict(state, strict=False).missing_keys


def test_parallel_processes_share_what_is_trained(tmp_path):
    """DDP shares gradients of what was active when it was made; of another's every process would have its own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = two_adapters()
        inputs = batch(model)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped(**inputs).logits.sum().backward()
        tz.activate(model, "other")
        with torch.no_grad():
            wrapped(**inputs)
        with pytest.raises(tz.TanzakuError, match="made while other was not active"):
            wrapped(**inputs)
        with pytest.raises(tz.TanzakuError, match="made while other"), tz.route(model, ["lora", None, "other", "lora"]):
            wrapped(**inputs)
        torch.nn.parallel.DistributedDataParallel(model)(**inputs).logits.sum().backward()
        tz.activate(model, "lora")
        wrapped(**inputs).logits.sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["lora", "prefix_tuning", "prompt_tuning"])
def test_accelerate_keeps_the_state(name, tmp_path):
    """`save_state` and `load_state` of accelerate."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(model_with(name))
    optimizer = accelerator.prepare(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01))
    inputs = batch(model)
    accelerator.save_state(tmp_path / "state")
    before = model(**inputs).logits.detach()
    accelerator.backward(model(**inputs).logits.square().sum())
    optimizer.step()
    with torch.no_grad():
        assert not close(model(**inputs).logits, before)
        accelerator.load_state(tmp_path / "state")
        assert_close(model(**inputs).logits, before)


def test_lightning_trains_it_and_its_checkpoints_hold_it(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")  # seconds, for this test alone

    class Program(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = model_with("lora")

        def training_step(self, rows, _):
            return self.inner(**rows).loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    program = Program()
    before = [p.detach().clone() for p in program.parameters() if p.requires_grad]
    fit = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    fit.fit(program, torch.utils.data.DataLoader(DATA, batch_size=4))
    after = [p for p in program.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = Program()
    again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    for trained, read in zip(after, (p for p in again.parameters() if p.requires_grad), strict=True):
        assert torch.equal(trained, read)


# -- bases that are kept elsewhere


@pytest.fixture
def plain(request):
    model = tiny("llama", "lm")
    attach(model, method(request.param), "a", seed=1)
    with torch.no_grad():
        for _, parameter in manager_of(model).get("a").trained():
            parameter.add_(0.1)
    return model


OFFLOADERS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device=torch.device("cpu")),
    "map": lambda model, folder: dispatch_model(
        model,
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
         "model.rotary_emb": "cpu", "lm_head": "disk"},
        main_device="cpu",
        offload_dir=str(folder),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OFFLOADERS)
@pytest.mark.parametrize("plain", by_kind(), indirect=True)
def test_an_adapter_on_an_offloaded_base(plain, kind, tmp_path):
    """Attached after the base went elsewhere, it computes what it computes on one that is here. Own copies of modules
    cannot stand in for those that are brought for each pass."""
    inputs = batch(plain)
    shares = manager_of(plain).get("a").method.shares_batch
    rows = ["a", None, None, "a"] if shares else ["a"]
    with torch.no_grad(), tz.route(plain, rows):
        expected = plain(**inputs).logits
    tz.save(plain, "a", tmp_path / "a")
    away = OFFLOADERS[kind](copy.deepcopy(tiny("llama", "lm")), tmp_path / "offload")
    adapter = tz.load(away, tmp_path / "a", "a")
    assert not any(p.is_meta for _, p in adapter.named_parameters())
    with torch.no_grad(), tz.route(away, rows):
        if adapter.method.name in ("full", "head"):
            with pytest.raises(tz.TanzakuError, match="that is offloaded, and cannot be used"):
                away(**inputs)
        else:
            assert_close(away(**inputs).logits, expected)
    fresh = tz.attach(away, adapter.method, "b", seed=1)
    assert not any(p.is_meta for _, p in fresh.named_parameters())
    assert all(p.isfinite().all() for _, p in fresh.named_parameters())


@pytest.mark.parametrize("kind", OFFLOADERS)
def test_a_file_knows_an_offloaded_base(kind, tmp_path):
    """Its weights are read where they are kept: another base is an error, and so is one that the file was made on."""
    away, other = (OFFLOADERS[kind](tiny("llama", "lm", seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    tz.attach(away, tz.LoRA(r=2), "a")
    tz.save(away, "a", tmp_path / "a")
    tz.load(away, tmp_path / "a", "same")
    tz.load(tiny("llama", "lm"), tmp_path / "a", "same")
    for wrong in (other, tiny("llama", "lm", seed=1)):
        with pytest.raises(tz.TanzakuError, match="a base with other weights"):
            tz.load(wrong, tmp_path / "a", "a")


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("plain", by_kind(), indirect=True)
def test_a_base_that_is_offloaded_with_its_adapter(plain, kind, tmp_path):
    """It is right, or it says that the base goes first; never what memory happens to hold."""
    inputs = batch(plain)
    with torch.no_grad():
        tz.activate(plain, "a")
        expected = plain(**inputs).logits
        away = OFFLOADERS[kind](plain, tmp_path / "offload")
        try:
            found = away(**inputs).logits
        except tz.TanzakuError as error:
            assert "offload" in str(error)
        else:
            assert_close(found, expected)
        with pytest.raises(tz.TanzakuError, match="offload"), tz.route(away, ["a"]):
            away(**inputs)
