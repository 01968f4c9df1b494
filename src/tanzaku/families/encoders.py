"""Encoders for text."""

from tanzaku.families import Family

BERT = Family(
    lora=("query", "value"),
    adalora=("query", "value"),
    ia3=("key", "value", "output.dense"),
    ia3_feedforward=("output.dense",),
    attention="attention.self",
    query="query",
    key="key",
    value="value",
)
ROBERTA = Family(**{**vars(BERT), "adalora": ("query", "key", "value", "dense"), "positions": "ids"})
DEBERTA = Family(
    lora=("in_proj",),
    adalora=("in_proj",),
    ia3=("in_proj", "output.dense"),
    ia3_feedforward=("output.dense",),
    attention="attention.self",
)
DEBERTA_V2 = Family(
    lora=("query_proj", "value_proj"),
    adalora=("query_proj", "key_proj", "value_proj", "dense"),
    ia3=("key_proj", "value_proj", "output.dense"),
    ia3_feedforward=("output.dense",),
    attention="attention.self",
    query="query_proj",
    key="key_proj",
    value="value_proj",
)

FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": Family(**{**vars(ROBERTA), "adalora": ("query", "value")}),
    "electra": BERT,
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA_V2,
}
