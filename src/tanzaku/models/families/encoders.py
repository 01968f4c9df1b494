"""Encoders for text."""

from tanzaku.models.families.family import Family

BERT = Family(
    query="query",
    key="key",
    value="value",
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",  # which is also the end of `out`, as in HF PEFT
    attention="attention.self",
)
DEBERTA = Family(**{**vars(BERT), **dict.fromkeys(("query", "key", "value"), "in_proj")})
DEBERTA_V2 = Family(**{**vars(BERT), "query": "query_proj", "key": "key_proj", "value": "value_proj"})

FAMILIES = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "electra": BERT,
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA_V2,
}
