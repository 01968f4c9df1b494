"""Quality beside HF PEFT: same model, head, rows and settings, several seeds, on the bundled poems.

HF PEFT is trained here by transformers' Trainer, as its users do.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import warnings
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.subjects import ours, theirs
from tanzaku.models.loading import load_classifier, load_tokenizer
from tanzaku.tasks.classification import Classification, ClassificationSettings
from tanzaku.tasks.prepare import encode, read_tables
from tanzaku.tasks.task import Batch, Example, TaskData
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings

RATES = {"lora": 5e-4, "ia3": 2e-3, "prompt_tuning": 5e-3}


def poems(model: str = "embedded", **names: str) -> TaskData:
    """The bundled rows, as a model reads them.

    Args:
        names: of the file for each split; none is each split's own.
    """
    folder = Path(str(files("tanzaku") / "data" / "poems"))
    names = names or {name: name for name in ("train", "valid", "test")}
    where = {split: str(folder / f"{name}.tsv") for split, name in names.items()}
    settings = ClassificationSettings(**where, text="poem", label="label")
    return encode(read_tables(Classification, settings), load_tokenizer(model), 200)


def with_tanzaku(model: PreTrainedModel, method: str, data: TaskData, settings: TrainSettings) -> dict[str, float]:
    """Test figures. The model stays as it is."""
    [result] = train_jobs(model, data, [Job(method, ours(method), settings)])
    assert result.test is not None, result.error
    return result.test


def with_peft(base: PreTrainedModel, method: str, data: TaskData, settings: TrainSettings) -> dict[str, float]:
    """Test figures of HF PEFT and transformers' Trainer."""
    import peft
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(settings.seed)
    model = peft.get_peft_model(copy.deepcopy(base), theirs(method))

    def collate(rows: list[Example]) -> dict[str, Tensor]:
        batch = data.task.collate(rows, data.pad_token_id)
        return {**batch.inputs, "labels": batch.targets["target"]}

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                num_train_epochs=settings.epochs,
                learning_rate=settings.learning_rate,
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=1,
                weight_decay=settings.weight_decay,
                seed=settings.seed,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=_Rows(data.train.examples),
            data_collator=collate,
        )
        trainer.train()
        assert data.test is not None
        out: Any = trainer.predict(_Rows(data.test.examples))
    logits: Tensor = torch.as_tensor(out.predictions if not isinstance(out.predictions, tuple) else out.predictions[0])
    rows = Batch({}, {"target": torch.as_tensor(out.label_ids)}, data.test.examples)
    return data.task.figures(data.task.records(SimpleNamespace(logits=logits), rows))


class _Rows(torch.utils.data.Dataset[Example]):
    def __init__(self, examples: list[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> Example:
        return self.examples[row]


def table(seeds: tuple[int, ...] = (0, 1, 2), epochs: int = 1) -> None:
    """Print the Markdown table: each seed's test figures, and their means."""
    warnings.filterwarnings("ignore")
    data, model = poems(), load_classifier("embedded", 2)
    print("| method | library | test ROC-AUC by seed | mean | test accuracy by seed | mean |")
    print("|---|---|---|---|---|---|")
    for method, rate in RATES.items():
        for name, train in (("HF PEFT", with_peft), ("Tanzaku", with_tanzaku)):
            seen = [
                train(
                    model,
                    method,
                    data,
                    TrainSettings(epochs=epochs, learning_rate=rate, batch_size=1, weight_decay=0.0, seed=s),
                )
                for s in seeds
            ]
            cells = []
            for key in ("roc_auc", "accuracy"):
                values = [x[key] for x in seen]
                cells += [", ".join(f"{v:.3f}" for v in values), f"{statistics.mean(values):.3f}"]
            print(f"| {method} | {name} | {' | '.join(cells)} |", flush=True)
