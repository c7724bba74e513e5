"""The demo's load: chats and questions on one document, over the English text that every Python brings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pydoc_data.topics import topics

from kvstore.demo.model import ASSISTANT, END, SYSTEM, USER

INSTRUCTION = "You answer questions about the Python language, briefly and from the text you are given."


@dataclass(slots=True)
class Conversation:
    """Token ids so far; what a turn adds is appended, so that every prompt begins with the last one."""

    name: str
    ids: list[int] = field(default_factory=list)

    def say(self, role: int, text: str) -> None:
        """Append one message. Mutates."""
        self.ids += [role, *text.encode(), END]

    def ask(self, text: str) -> list[int]:
        """The prompt for one more user message: a copy of all ids. Mutates."""
        self.say(USER, text)
        return [*self.ids, ASSISTANT]

    def answered(self, new_ids: list[int]) -> None:
        """The model's answer joins the history. Mutates."""
        self.ids += [ASSISTANT, *new_ids, END]


def passage(topic: str, start: int, nbytes: int) -> str:
    """About `nbytes` bytes of a help topic from a word boundary on; ASCII art and runs of blanks removed."""
    text = re.sub(r"[*=~^-]{3,}", " ", topics[topic])
    raw = re.sub(r"\s+", " ", text).encode()
    if start:
        start = raw.find(b" ", start) + 1
    cut = raw[start : start + nbytes].decode(errors="ignore")
    return cut[: cut.rfind(" ")].strip()


TOPICS = {
    "document": "import",
    "chat-1": "execmodel",
    "chat-2": "typesseq",
    "chat-3": "debugger",
    "chat-4": "customization",
}
QUESTIONS = (
    "What does the finder return when it knows where the module is?",
    "Which steps happen before the code of the module is executed?",
    "How does a relative import name the package it starts from?",
    "When is a name bound in the local namespace?",
    "What happens when the module is already in sys.modules?",
    "What may stand after the keyword from?",
)


@dataclass(frozen=True, slots=True)
class Script:
    """Which conversation goes on at which replica, phase by phase, written as "conversation:replica ...".

    Within each conversation the replicas alternate, so that a turn's prefix was computed by the other one.
    """

    share: str
    again: str
    outage: str
    after: str
    first_bytes: int  # of text in the first prompt of a conversation
    new_tokens: int  # greedy, per request

    def requests(self) -> int:
        return sum(len(steps) for steps in self.phases().values())

    def phases(self) -> dict[str, list[tuple[str, str]]]:
        """(conversation, replica) of each request, by phase."""
        named = {"share": self.share, "again": self.again, "outage": self.outage, "after": self.after}
        return {
            phase: [(name, replica) for name, _, replica in (step.partition(":") for step in steps.split())]
            for phase, steps in named.items()
        }


FULL = Script(
    share="document:A document:B chat-1:A chat-1:B chat-2:B chat-2:A document:A chat-1:A "
    "chat-3:A chat-3:B chat-2:B document:B chat-3:A",
    again="chat-1:B document:A chat-4:A chat-4:B",
    outage="document:B chat-2:A",
    after="chat-3:B chat-1:A document:A chat-2:B",
    first_bytes=1500,
    new_tokens=12,
)
QUICK = Script(
    share="document:A document:B chat-1:B chat-1:A chat-2:A chat-2:B chat-3:B chat-3:A",
    again="document:A chat-1:B",
    outage="document:B",
    after="chat-2:A chat-3:B chat-1:A document:A",
    first_bytes=900,
    new_tokens=6,
)


class Load:
    """The conversations of one run."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._conversations: dict[str, Conversation] = {}
        self._turns: dict[str, int] = {}

    def next(self, name: str) -> tuple[str, list[int]]:
        """The next request of a conversation: its name for people, and its prompt. Mutates."""
        turn = self._turns[name] = self._turns.get(name, 0) + 1
        conversation = self._conversations.get(name)
        if conversation is None:
            conversation = self._conversations[name] = Conversation(name)
            document = f"\n{passage(TOPICS[name], 0, self._script.first_bytes)}" if name == "document" else ""
            conversation.say(SYSTEM, INSTRUCTION + document)
        return f"{name} {turn}", conversation.ask(self._text(name, turn))

    def _text(self, name: str, turn: int) -> str:
        if name == "document":
            return QUESTIONS[(turn - 1) % len(QUESTIONS)]
        if turn == 1:
            return f"Please explain this to me: {passage(TOPICS[name], 0, self._script.first_bytes)}"
        return f"And what about this: {passage(TOPICS[name], 4000 + 300 * turn, 160)}"

    def answered(self, name: str, new_ids: list[int]) -> None:
        """The model's answer joins the conversation. Mutates."""
        self._conversations[name].answered(new_ids)
