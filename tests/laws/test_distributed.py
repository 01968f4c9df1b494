"""Law 9 over several processes: ranks that train an active adapter under DDP or FSDP2 hold the same one."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from variants import attached, bamboo, method

import tanzaku as tz
from models import batch
from tanzaku.compat.peft import get_peft_model
from tanzaku.compat.peft.config import CONFIGS
from tanzaku.methods import METHODS
from tanzaku.models import tree

WORLD = 2


def peft(model, name):
    kind = next(k for k in CONFIGS.values() if k.method.name == name)
    settings = {key: value for key, value in vars(method(name)).items() if value is not None}
    return get_peft_model(model, kind(**{**settings, "task_type": "SEQ_CLS"}))


def cases():
    for name in METHODS:
        model = bamboo()
        attached(model, name)
        tz.activate(model, name)
        yield name, model
    for name in ("lora", "prompt_tuning", "ia3"):
        torch.manual_seed(0)
        yield f"{name}, by HF PEFT's names", peft(bamboo(), name)


def steps(model, run, rank, world):
    """SGD on each rank's half of the rows; with one rank, on all of them."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.1)
    for seed in range(2):
        inputs = {key: value[rank::world] for key, value in batch(bamboo(), seed=seed).items()}
        run(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().detach().flatten() for p in own])


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = {}
    for name, model in cases():
        twin = copy.deepcopy(model)
        alone = steps(twin, twin, 0, 1)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        flat = steps(model, wrapped, rank, WORLD)
        both = [torch.empty_like(flat) for _ in range(WORLD)]
        dist.all_gather(both, flat)
        found[name] = (float((both[0] - both[1]).abs().max()), float((flat - alone).abs().max()))
    found["fsdp"] = sharded(rank)
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    dist.destroy_process_group()


def sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    out = {}
    for name in ("lora", "prompt_tuning", "prefix_tuning"):
        model = bamboo()
        attached(model, name)
        tz.activate(model, name)
        twin = copy.deepcopy(model)
        alone = steps(twin, twin, 0, 1)
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        before = [p.full_tensor().clone() for p in tree.parameters(model)]
        flat = steps(model, model, rank, WORLD)
        same = all(torch.equal(a, p.full_tensor()) for a, p in zip(before, tree.parameters(model), strict=True))
        out[name] = (float((flat - alone).abs().max()), same)
    return out


@pytest.fixture(scope="module")
def found():
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder,), nprocs=WORLD, start_method="spawn")
        return torch.load(Path(folder, "found.pt"), weights_only=False)


@pytest.mark.slow
def test_ranks_train_one_adapter(found):
    """Under DistributedDataParallel all ranks end with the same adapter: that of one process with all rows."""
    ddp = {name: value for name, value in found.items() if name != "fsdp"}
    assert len(ddp) == len(METHODS) + 3
    for name, (apart, from_alone) in ddp.items():
        assert apart == 0, name
        assert from_alone < 1e-4, name


@pytest.mark.slow
def test_shards_train_one_adapter(found):
    """Under FSDP2 the base and the adapter lie in shards; the adapter trains as whole, and the base stays."""
    for name, (from_alone, same) in found["fsdp"].items():
        assert from_alone < 1e-4, name
        assert same, name
