"""Small files in the form of those that RULER's scripts download, always the same, and a tokenizer of words."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

_PARTS = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "zy")


def _words(pick: random.Random, many: int) -> list[str]:
    return ["".join(pick.choices(_PARTS, k=pick.randrange(1, 4))) for _ in range(many)]


def _sentence(pick: random.Random) -> str:
    return " ".join(_words(pick, pick.randrange(4, 16))).capitalize() + pick.choice((".", ".", "?", "!"))


def _text(pick: random.Random, sentences: int) -> str:
    return " ".join(_sentence(pick) for _ in range(sentences))


def essays() -> dict[str, str]:
    pick = random.Random("essays")
    return {"text": "\n\n".join(_text(pick, 6) for _ in range(60))}


def squad() -> dict[str, Any]:
    pick = random.Random("squad")
    articles = []
    for article in range(8):
        paragraphs = []
        for paragraph in range(7):
            name = f"{article}-{paragraph}"
            asked = [
                {
                    "question": f"Question {name}-{at}?",
                    "is_impossible": at == 1,
                    "answers": [{"text": f"answer {name}-{at}"}, {"text": f"also {at}"}],
                }
                for at in range(3)
            ]
            paragraphs.append({"context": f"{_text(pick, 5)} ({name})", "qas": asked})
        articles.append({"paragraphs": paragraphs})
    return {"data": articles}


def hotpotqa() -> list[dict[str, Any]]:
    pick = random.Random("hotpotqa")
    documents = [[f"Title {at}", [_sentence(pick), " " + _sentence(pick)]] for at in range(90)]
    return [
        {"question": f"Which {at}?", "answer": f"that {at}", "context": pick.sample(documents, 10)} for at in range(12)
    ]


def english() -> dict[str, str]:
    return {str(at): f"word{at:05}" for at in range(20_000)}


def write(folder: Path) -> Path:
    """All four files, by RULER's names."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "PaulGrahamEssays": essays(), "squad": squad(), "hotpotqa": hotpotqa(), "english_words": english(),
    }  # fmt: skip
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def tokens(text: str) -> list[str]:
    """Words and signs with the space before them, and white space that is left; together they are the text."""
    return re.findall(r" ?\w+| ?[^\w\s]|\s", text)


class Words:
    """A tokenizer of these; ids are given out as tokens are met."""

    eos_token_id = None
    chat_template = None

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=[self.known.setdefault(token, len(self.known)) for token in tokens(text)])

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        names = list(self.known)
        return "".join(names[at] if at < len(names) else " unknown" for at in ids)
