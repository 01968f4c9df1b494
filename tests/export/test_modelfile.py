"""Modelfiles: the strings around what is said are the tokenizer's own, or there is no TEMPLATE."""

from __future__ import annotations

import re

import pytest

from llama_cpp import by_ollama, byte_level
from tanzaku.export.modelfile import chat_pieces, modelfile

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% else %}"
    "{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
TURNS = "{% for m in messages %}{{ loop.index }}{{ m.content }};{% endfor %}"


@pytest.mark.parametrize(
    ("template", "stop", "takes_system"),
    [(CHATML, "<|im_end|>", True), (GEMMA, "<end_of_turn>", True), (MISTRAL, "</s>", False)],
    ids=["chatml", "gemma", "mistral"],
)
def test_the_template_writes_what_the_tokenizer_writes(template: str, stop: str, takes_system: bool) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    pieces = chat_pieces(tokenizer)
    assert pieces is not None
    assert (pieces.before_system is not None) == takes_system
    text = modelfile(tokenizer, "./m.gguf", adapter="./a.gguf")
    assert text.startswith("FROM ./m.gguf\nADAPTER ./a.gguf\nTEMPLATE ") and f'PARAMETER stop "{stop}"' in text
    [go] = re.findall('TEMPLATE """(.*?)"""', text, re.S)
    for system in ("", "Be brief.") if takes_system else ("",):
        messages = [{"role": "user", "content": "What is a frog?"}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert by_ollama(go, system, "What is a frog?") == expected.removeprefix("<s>")


@pytest.mark.parametrize("template", [DEFAULT_SYSTEM, TURNS, "{{ messages[0].content | upper }}", "{{ 1 / 0 }}"])
def test_a_template_that_does_more_is_left_to_ollama(template: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    assert chat_pieces(tokenizer) is None
    text = modelfile(tokenizer, "m")
    assert 'TEMPLATE "' not in text and "# No TEMPLATE" in text


def test_without_a_chat_template() -> None:
    text = modelfile(byte_level(), "org/base", note="the base")
    assert text.splitlines()[:2] == ["# the base", "FROM org/base"]
    assert "TEMPLATE {{ .Prompt }}" in text and text.endswith('PARAMETER stop "</s>"\n')
