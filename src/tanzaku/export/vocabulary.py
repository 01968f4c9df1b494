"""A fast tokenizer as a GGUF carries it: byte-level BPE, SentencePiece's BPE, and SentencePiece's unigram model.

All is read off the tokenizer itself (the JSON of the `tokenizers` library), so it does not matter which files it came
from. llama.cpp has its own code for each way of splitting text, chosen by a name; a tokenizer that splits in a way that
llama.cpp has no name for here is an error, since it would cut texts at other places without a word.
"""

from __future__ import annotations

import base64
import json
import warnings
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from tanzaku.errors import TanzakuError

_CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# (expression that splits, whether whole words are looked up before merging) -> llama.cpp's name for it.
_SPLITS = {
    (None, False): "gpt-2",
    (_CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _LINES, True): "llama-bpe",
    (_CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _LINES, False): "smaug-bpe",
    (_CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _LINES, False): "qwen2",
    (_TEKKEN, True): "tekken",
}


@dataclass
class Vocabulary:
    """What a GGUF says of a tokenizer, but for its special tokens and its chat template."""

    model: str  # gpt2 (byte-level BPE), llama (SentencePiece's BPE) or t5 (SentencePiece's unigram model)
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None
    charsmap: bytes | None = None
    squeeze: bool | None = None  # several spaces become one


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up with unused tokens to `size`, the rows of the model's embedding.

    Raises:
        TanzakuError: llama.cpp has no tokenizer that does the same, or the model has fewer rows than tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(tokenizer, "is no fast tokenizer")
    spec = json.loads(backend.to_str())
    kind = spec["model"]["type"]
    steps = [step["type"] for step in _steps(spec, "pre_tokenizer")]
    if kind == "BPE" and "ByteLevel" in steps:
        made = _byte_level(tokenizer, spec)
    elif kind == "BPE" and spec["model"].get("byte_fallback"):
        made = _sentencepiece_bpe(spec)
    elif kind == "Unigram":
        made = _unigram(spec)
    else:
        raise _unknown(tokenizer, f"is a {kind} model with {', '.join(steps) or 'nothing'} before it")
    _add_special(made, spec)
    if len(made.tokens) > size:
        raise TanzakuError(
            f"the tokenizer has {len(made.tokens)} tokens and the model's embedding {size} rows; "
            "expected no more tokens than rows, so export with the tokenizer that the model was trained with"
        )
    for number in range(len(made.tokens), size):
        made.tokens.append(f"[PAD{number}]")
        made.types.append(TokenType.UNUSED)
        if made.scores is not None:
            made.scores.append(_NEVER)
    return made


def write_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Write a tokenizer: its vocabulary, its special tokens and its chat template. See :func:`vocabulary_of`."""
    made = vocabulary_of(tokenizer, size)
    writer.add_tokenizer_model(made.model)
    writer.add_tokenizer_pre(made.pre)
    writer.add_token_list(made.tokens)
    writer.add_token_types(made.types)
    if made.scores is not None:
        writer.add_token_scores(made.scores)
    if made.merges is not None:
        writer.add_token_merges(made.merges)
    if made.space_prefix is not None:
        writer.add_add_space_prefix(made.space_prefix)
    if made.squeeze is not None:
        writer.add_remove_extra_whitespaces(made.squeeze)
    if made.charsmap:
        writer.add_precompiled_charsmap(made.charsmap)
    for kind in ("bos", "eos", "unk", "sep", "pad", "mask"):
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is not None and number < size:
            getattr(writer, f"add_{kind}_token_id")(number)
    # What the tokenizer does tells more surely than its settings, which several classes of tokenizers ignore.
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if template := chat_template_of(tokenizer):
        writer.add_chat_template(template)


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template, of several the default one."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


# -- the three kinds

_NEVER = -1e9  # the score of what is never the best merge


def _byte_level(tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any]) -> Vocabulary:
    model = spec["model"]
    splits: list[str | None] = []
    for step in _steps(spec, "pre_tokenizer"):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            splits.append(step["pattern"].get("Regex"))
        elif step["type"] != "ByteLevel":
            splits.append(step["type"])
        elif step["use_regex"]:
            splits.append(None)
        if step.get("add_prefix_space"):
            raise _unknown(tokenizer, "puts a space before each text (add_prefix_space)")
    name = _SPLITS.get((splits[0], bool(model.get("ignore_merges")))) if len(splits) == 1 else None
    if name is None:
        raise _unknown(tokenizer, f"splits text by {splits}")
    for step in _steps(spec, "normalizer"):
        if step["type"] != "NFC":  # texts are nearly always in that form already
            raise _unknown(tokenizer, f"normalises text by {step['type']}")
    tokens = _by_number(model["vocab"])
    return Vocabulary("gpt2", name, tokens, _plain(tokens), merges=[" ".join(_pair(m)) for m in model["merges"]])


def _sentencepiece_bpe(spec: dict[str, Any]) -> Vocabulary:
    model = spec["model"]
    tokens = _by_number(model["vocab"])
    # llama.cpp merges the pair whose piece has the best score, where `tokenizers` takes the pair's place in a list.
    place: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        place.setdefault("".join(_pair(pair)), rank)
    scores = [float(-place[token]) if token in place else _NEVER for token in tokens]
    return Vocabulary("llama", "default", tokens, _with_bytes(tokens), scores, space_prefix=_prefixed(spec))


def _unigram(spec: dict[str, Any]) -> Vocabulary:
    model = spec["model"]
    tokens, scores = [piece for piece, _ in model["vocab"]], [float(score) for _, score in model["vocab"]]
    types = _with_bytes(tokens)
    types[model["unk_id"]] = TokenType.UNKNOWN
    if model.get("byte_fallback"):
        warnings.warn(
            "llama.cpp's unigram tokenizer has no byte pieces: characters that have no piece of their own, which "
            "transformers writes in bytes, become the unknown token there",
            stacklevel=3,
        )
    charsmap, squeeze = None, False
    for step in _steps(spec, "normalizer"):
        if step["type"] == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"] or "")
        elif step["type"] == "Replace" and step["pattern"].get("Regex") == " {2,}":
            squeeze = True
    return Vocabulary(
        "t5", "default", tokens, types, scores, space_prefix=_prefixed(spec), charsmap=charsmap, squeeze=squeeze
    )


def _add_special(made: Vocabulary, spec: dict[str, Any]) -> None:
    """The tokens that are found before all else: control tokens, which a text never holds, and words of their own."""
    for added in spec["added_tokens"]:
        number = added["id"]
        while len(made.tokens) <= number:
            made.tokens.append(f"[PAD{len(made.tokens)}]")
            made.types.append(TokenType.UNUSED)
            if made.scores is not None:
                made.scores.append(_NEVER)
        made.tokens[number] = added["content"]
        unknown = added["content"] == spec["model"].get("unk_token") or made.types[number] == TokenType.UNKNOWN
        if unknown and made.model != "gpt2":
            made.types[number] = TokenType.UNKNOWN
        else:
            made.types[number] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED


def _steps(spec: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or of a pre-tokenizer, one or several."""
    step = spec.get(part)
    if step is None:
        return []
    inner = step.get("pretokenizers") or step.get("normalizers")
    return list(inner) if step["type"] == "Sequence" else [step]


def _prefixed(spec: dict[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    if any(step["type"] == "Prepend" for step in _steps(spec, "normalizer")):
        return True
    spaces = [step for step in _steps(spec, "pre_tokenizer") if step["type"] == "Metaspace"]
    return any(step.get("prepend_scheme", "always") != "never" for step in spaces)


def _by_number(vocab: dict[str, int]) -> list[str]:
    tokens = [f"[PAD{number}]" for number in range(max(vocab.values(), default=-1) + 1)]
    for token, number in vocab.items():
        tokens[number] = token
    return tokens


def _plain(tokens: list[str]) -> list[int]:
    return [TokenType.NORMAL] * len(tokens)


def _with_bytes(tokens: list[str]) -> list[int]:
    names = {f"<0x{byte:02X}>" for byte in range(256)}
    return [TokenType.BYTE if token in names else TokenType.NORMAL for token in tokens]


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _unknown(tokenizer: PreTrainedTokenizerBase, why: str) -> TanzakuError:
    return TanzakuError(
        f"{type(tokenizer).__name__} {why}, and llama.cpp has no such tokenizer; expected byte-level BPE as in GPT-2, "
        "Llama 3, Qwen 2 or Mistral Nemo, or SentencePiece's BPE or unigram model (an adapter alone needs none)"
    )
