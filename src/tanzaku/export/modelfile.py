"""An Ollama Modelfile: which GGUF to run, with which adapter, how a chat is written out, and where it stops.

Ollama writes chats by templates of Go, tokenizers by templates of Jinja. No program translates one into the other, but
most chat templates only put fixed strings around what is said. Those strings are found by rendering a few chats, and
used where they render every one of them to the letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tanzaku.export.vocabulary import chat_template_of

Chat = Sequence[tuple[str, str]]  # (role, what is said), in turn


@dataclass(frozen=True)
class ChatPieces:
    """The strings around what is said: [before_system, system, after_system or before_user], user, after_user,
    before_reply, reply, after_reply, and so on. `before_system` is None where the template takes no system message."""

    before_user: str
    after_user: str
    before_reply: str
    after_reply: str
    before_system: str | None = None
    after_system: str = ""

    def write(self, chat: Chat) -> str:
        """A chat that ends with the user's turn, as the model is given it."""
        out = ""
        for place, (role, said) in enumerate(chat):
            if role == "system":
                out += f"{self.before_system}{said}{self.after_system}"
            elif role == "user":
                out += ("" if place and chat[place - 1][0] == "system" else self.before_user) + said + self.after_user
            else:
                out += f"{self.before_reply}{said}{self.after_reply}"
        return out + self.before_reply

    def template(self) -> str:
        """The same as a template of Ollama, which runs it once a turn and cuts it after the reply to come."""
        before = self.before_user
        if self.before_system is not None:
            system = f"{self.before_system}{{{{ .System }}}}{self.after_system}"
            before = f"{{{{ if .System }}}}{system}{{{{ else }}}}{before}{{{{ end }}}}"
        asked = f"{before}{{{{ .Prompt }}}}{self.after_user}"
        return f"{asked}{self.before_reply}{{{{ .Response }}}}{self.after_reply}"

    @property
    def strings(self) -> tuple[str, ...]:
        return (self.before_user, self.after_user, self.before_reply, self.after_reply, self.before_system or "")


def chat_pieces(tokenizer: PreTrainedTokenizerBase) -> ChatPieces | None:
    """The strings that a chat template puts around what is said; None where it does more than that, or is not there."""
    if chat_template_of(tokenizer) is None:
        return None
    try:
        return _find(tokenizer)
    except Exception:  # a template is a program, which fails in any way at all on chats that it does not take
        return None


def modelfile(
    tokenizer: PreTrainedTokenizerBase, base: str, *, adapter: str | None = None, note: str | None = None
) -> str:
    """The text of a Modelfile.

    Args:
        base: after FROM: a GGUF's path beside the Modelfile, or a model that Ollama knows.
        adapter: the path of an adapter's GGUF beside the Modelfile.
        note: a comment on top.
    """
    lines = [f"# {note}"] if note else []
    lines.append(f"FROM {base}")
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    pieces = chat_pieces(tokenizer)
    stops = []
    if pieces is not None:
        lines.append(f'TEMPLATE """{pieces.template()}"""')
        stops.append(pieces.after_reply.strip())
    elif chat_template_of(tokenizer) is None:
        lines += [
            "# The tokenizer has no chat template: the text goes to the model as it is.",
            "TEMPLATE {{ .Prompt }}",
        ]
    else:
        lines.append(
            "# No TEMPLATE: the chat template in the GGUF does more than Ollama's can; Ollama looks for its own."
        )
    stops.append(str(tokenizer.eos_token or ""))
    for stop in dict.fromkeys(stops):
        if stop and '"' not in stop and "\n" not in stop:
            lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join(lines) + "\n"


# Words that no template holds, and that no template would trim or change.
_S, _A, _B, _C, _D = "Saturn7", "Apollo1", "Boreas2", "Ceres3", "Demeter4"


def _find(tokenizer: PreTrainedTokenizerBase) -> ChatPieces | None:
    user, reply = [("user", _A)], [("user", _A), ("assistant", _B)]
    asked = _render(tokenizer, user)
    start, middle = asked.split(_A)
    after_user = _render(tokenizer, user, reply_to_come=False).split(_A)[1]
    if not middle.startswith(after_user):
        return None
    before_reply = middle.removeprefix(after_user)
    after_reply = _render(tokenizer, reply, reply_to_come=False).split(_B)[1]
    # The first turn may come after a text of the template's own, which Ollama would repeat at each turn.
    between = _render(tokenizer, [*reply, ("user", _C)]).split(_B)[1].split(_C)[0]
    before_user = between.removeprefix(after_reply)
    if start != before_user or not between.startswith(after_reply):
        return None
    pieces = ChatPieces(before_user, after_user, before_reply, after_reply)
    chats: list[Chat] = [user, [*reply, ("user", _C)], [*reply, ("user", _C), ("assistant", _D), ("user", _S)]]
    try:
        before, after = _render(tokenizer, [("system", _S), *user]).split(_A)[0].split(_S)
    except Exception:  # it takes no system message
        pass
    else:
        pieces = ChatPieces(before_user, after_user, before_reply, after_reply, before, after)
        chats += [[("system", _S), *chat] for chat in chats[:2]]
    if any(pieces.write(chat) != _render(tokenizer, chat) for chat in chats):
        return None
    plain = not any("{{" in text or '"""' in text for text in (*pieces.strings, pieces.after_system))
    return pieces if plain else None


def _render(tokenizer: PreTrainedTokenizerBase, chat: Chat, *, reply_to_come: bool = True) -> str:
    messages: list[Any] = [{"role": role, "content": said} for role, said in chat]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_to_come))
    # Ollama puts the first token there itself, as the tokenizer does.
    return text.removeprefix(str(tokenizer.bos_token)) if tokenizer.bos_token else text
