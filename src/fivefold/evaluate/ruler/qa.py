"""Questions about documents, one or two of which hold the answer (qa_1, qa_2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fivefold.evaluate.ruler.base import Count, Draw, Prompt, RulerTask
from fivefold.evaluate.ruler.data import SQUAD
from fivefold.evaluate.tasks.base import Kind

_BEGIN = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n"
)
_QUESTION = (
    "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {query}"
)
_BEGUN = " Answer:"


@dataclass(frozen=True)
class Qa(RulerTask):
    """A question about the documents of a library: "squad.json" or "hotpotqa.json".

    With RULER's own files the n-th sample asks the n-th question, as there; what stands in for them is asked at random.
    The size is in documents beside those that the question needs.
    """

    kind: ClassVar[Kind] = "match_part"
    generate = 32

    library: str = SQUAD

    def about(self) -> str:
        if self.data.has(self.library):
            return f"questions of {'SQuAD' if self.library == SQUAD else 'HotpotQA'} about many documents"
        if self.library == SQUAD:
            return "questions about many documents with planted facts (in place of SQuAD)"
        return "questions about two of many documents with planted facts (in place of HotpotQA)"

    def smallest(self) -> int:
        return 0

    def sources(self) -> dict[str, str]:
        self.data.library(self.library)
        return {self.library: self.data.digest(self.library)}

    def compose(self, draw: Draw, size: int, context: int, count: Count) -> Prompt:
        asked = self.data.library(self.library).asked
        number = self.number if self.data.has(self.library) else draw.again().random.randrange(len(asked))
        return self.about_number(draw, number % len(asked), size + len(asked[number % len(asked)].needs))

    def about_number(self, draw: Draw, number: int, many: int) -> Prompt:
        """Question `number` with `many` documents, its own among them."""
        documents, asked = self.data.library(self.library).documents, self.data.library(self.library).asked[number]
        others = many - len(asked.needs)
        if many >= len(documents):
            listed = list((documents * -(-many // len(documents)))[:many])
        elif others > len(asked.near):
            own = {*asked.needs, *asked.near}
            far = [at for at in range(len(documents)) if at not in own]
            places = [*asked.needs, *asked.near, *draw.random.sample(far, others - len(asked.near))]
            listed = [documents[at] for at in places]
        else:
            listed = [documents[at] for at in [*asked.needs, *draw.random.sample(asked.near, others)]]
        shown = "\n\n".join(f"Document {at}:\n{text}" for at, text in enumerate(draw.shuffled(listed), 1))
        return Prompt(_BEGIN + shown, _QUESTION.format(query=asked.question), _BEGUN, asked.answers)
