"""Invented documents with facts, and questions about them: what stands in for SQuAD and HotpotQA where they are not.

They have the form of those data sets (paragraphs of an article; a title with a paragraph, two of which are needed), and
are always the same. Every answer is a name that one document alone gives, so that neither what a model has learned
nor another document helps. They are easier than the real ones: a sentence nearly repeats the question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from fivefold.evaluate.ruler import words

ARTICLES = 500
"""Towns in `single` with four documents each, and people in `bridges` with one each."""


@dataclass(frozen=True)
class Asked:
    """A question, each answer that counts as right, and by number the documents that it needs and those near them."""

    question: str
    answers: tuple[str, ...]
    needs: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True)
class Library:
    """Documents, and questions about them."""

    documents: tuple[str, ...]
    asked: tuple[Asked, ...]


_FIRST = (
    "Ada", "Agnes", "Albin", "Alma", "Anselm", "Astrid", "Barnaby", "Beatrix", "Bruno", "Cecily", "Clement", "Cordelia",
    "Dagmar", "Desmond", "Dora", "Edwin", "Elspeth", "Emil", "Esther", "Felix", "Flora", "Gideon", "Greta", "Hector",
    "Hilda", "Hugo", "Ingrid", "Isidor", "Ivy", "Jasper", "Judith", "Konrad", "Lavinia", "Linus", "Magda", "Mortimer",
    "Nora", "Oswald", "Ottilie", "Phineas", "Rufus", "Selma", "Silas", "Tabitha", "Theodor", "Ursula", "Wilfred",
    "Zelda",
)  # fmt: skip
_LAST = (
    "Abernathy", "Ashdown", "Birkett", "Blackwood", "Bramhall", "Calloway", "Chetwynd", "Cobbold", "Danforth",
    "Dunmore", "Eastlake", "Ellery", "Fairburn", "Finsbury", "Garrick", "Goodspeed", "Halloran", "Hartnell", "Ibsworth",
    "Jellicoe", "Kettering", "Langtry", "Lockwood", "Marchbank", "Merriweather", "Northcote", "Oakeshott", "Pemberton",
    "Quillfeather", "Ravensworth", "Rookwood", "Sackville", "Standish", "Thackeray", "Tollemache", "Underhill",
    "Vandermeer", "Wainwright", "Wetherby", "Yardley",
)  # fmt: skip
_TOWN = (
    ("Alder", "Bram", "Carn", "Dun", "Elm", "Farn", "Glen", "Hols", "Ister", "Jarn", "Kel", "Lund", "Mar", "Nether",
     "Orm", "Pen", "Quern", "Ros", "Stav", "Thorn", "Uld", "Vir", "Wes", "Yar"),
    ("bach", "bridge", "burg", "by", "dale", "feld", "ford", "gate", "haven", "holm", "hurst", "kirk", "mere",
     "minster", "mouth", "ness", "port", "stead", "stow", "thorpe", "vale", "wick", "worth", "wold"),
)  # fmt: skip
_RIVER = (
    ("Ab", "Brae", "Cor", "Dov", "Es", "Fal", "Gar", "Hum", "Il", "Jor", "Kyl", "Lis", "Mol", "Nev", "Ois", "Pru",
     "Rhy", "Sev", "Tav", "Umb", "Vel", "Wyl", "Yev", "Zan"),
    ("adra", "alune", "amance", "andel", "arno", "asque", "atrix", "avona", "eddle", "elbra", "emmer", "endine",
     "erwen", "essa", "ettle", "imbra", "indus", "irrel", "issol", "odune", "olmar", "onwy", "orrin", "ullin"),
)  # fmt: skip
_CRAFTS = (
    "baker", "bell founder", "bookbinder", "botanist", "carpenter", "clockmaker", "gilder", "glassblower", "locksmith",
    "mapmaker", "physician", "printer", "sailmaker", "shipwright", "stonemason", "surveyor", "tanner", "weaver",
)  # fmt: skip
_GOODS = ("amber", "copper", "hops", "linen", "marble", "salt", "slate", "timber", "tin", "wool")
_REASONS = (
    "after a fire", "after a flood", "after a long quarrel with a neighbouring town", "in a dry summer",
    "in the year of the great frost", "when the old road was moved", "with money from a lottery",
)  # fmt: skip


def _product(pick: random.Random, one: Sequence[str], two: Sequence[str], many: int, between: str = "") -> list[str]:
    """`many` different names, each a first part and a second one."""
    return [
        f"{one[at % len(one)]}{between}{two[at // len(one)]}" for at in pick.sample(range(len(one) * len(two)), many)
    ]


def _titles(pick: random.Random, many: int) -> list[str]:
    """`many` different names of works, "The Amused Lighthouse"."""
    plain = [
        [word.capitalize() for word in words.words_of(part) if word.isascii() and word.isalpha() and len(word) > 3]
        for part in ("adjective", "noun")
    ]
    return [f"The {title}" for title in _product(pick, plain[0], plain[1], many, " ")]


@cache
def single() -> Library:
    """Paragraphs about invented towns, four of each; a question needs one of them."""
    pick = random.Random("fivefold/ruler/single")
    towns = _product(pick, *_TOWN, ARTICLES)
    rivers = _product(pick, *_RIVER, ARTICLES)
    people = _product(pick, _FIRST, _LAST, 3 * ARTICLES, " ")
    titles = _titles(pick, 2 * ARTICLES)
    documents: list[str] = []
    asked: list[Asked] = []
    for at, town in enumerate(towns):
        founder, builder, painter = people[3 * at : 3 * at + 3]
        painting, play = titles[2 * at : 2 * at + 2]
        river, goods = rivers[at], pick.sample(_GOODS, 2)
        year, other = pick.randrange(1100, 1700), towns[at - 1]
        texts = (
            (
                f"{town} was founded in {year} by {founder}, a {pick.choice(_CRAFTS)} who had come on foot from "
                f"{other}. In its first century the town lived on {goods[0]} and {goods[1]}, which were sold at a "
                f"market that took place every {pick.choice(('spring', 'summer', 'autumn'))}. Its walls were pulled "
                f"down {pick.choice(_REASONS)}, and about {pick.randrange(2, 90)},000 people live there today.",
                [(f"Who founded {town}?", founder)],
            ),
            (
                f"The river that flows through {town} is the {river}. It is crossed by a stone bridge with "
                f"{pick.randrange(3, 20)} arches, which was designed by {builder} and rebuilt {pick.choice(_REASONS)}. "
                f"A toll of {pick.randrange(2, 12)} pennies had to be paid for every cart until {year + 150}.",
                [
                    (f"What is the name of the river that flows through {town}?", river),
                    (f"Who designed the stone bridge of {town}?", builder),
                ],
            ),
            (
                f"The museum of {town} has {pick.randrange(4, 40)} rooms and a collection of tools for working "
                f"{goods[0]}. Its best known painting is {painting} by {painter}, which hung in the town hall "
                f"until it was given away {pick.choice(_REASONS)}. The museum is closed on Mondays.",
                [
                    (f"What is the best known painting in the museum of {town}?", painting),
                    (f"Who painted the best known painting in the museum of {town}?", painter),
                ],
            ),
            (
                f"Every year {pick.randrange(2, 30)} days after midsummer the people of {town} perform a play called "
                f"{play} in the market square. It has been played since {year + 120}, when it was first put on "
                f"{pick.choice(_REASONS)}. Visitors are given bread, and a wagon of {goods[1]} is drawn around it.",
                [(f"Which play do the people of {town} perform in the market square?", play)],
            ),
        )
        first = len(documents)
        near = range(first, first + len(texts))
        for own, (text, questions) in zip(near, texts):
            documents.append(text)
            beside = tuple(number for number in near if number != own)
            asked += [Asked(question, (answer,), (own,), beside) for question, answer in questions]
    return Library(tuple(documents), tuple(asked))


@cache
def bridges() -> Library:
    """A person's document names a town, the town's document what is asked for: a question needs both."""
    pick = random.Random("fivefold/ruler/bridges")
    towns = _product(pick, *_TOWN, ARTICLES)
    rivers = _product(pick, *_RIVER, ARTICLES)
    people = _product(pick, _FIRST, _LAST, 2 * ARTICLES, " ")
    titles = _titles(pick, 2 * ARTICLES)
    documents: list[str] = []
    asked: list[Asked] = []
    for at, town in enumerate(towns):
        person, mayor = people[2 * at : 2 * at + 2]
        book, paper = titles[2 * at : 2 * at + 2]
        craft, year, goods = pick.choice(_CRAFTS), pick.randrange(1600, 1900), pick.choice(_GOODS)
        age = pick.randrange(15, 40)
        documents += [
            f"{person}\n{person} was a {craft} who was born in {town} in {year}. At the age of {age} "
            f"{person} began to write {book}, which was printed {pick.choice(_REASONS)} and is still read.",
            f"{town}\n{town} is a town on the river {rivers[at]}, known for its {goods}. Its mayor is {mayor}, and its "
            f"newspaper is called {paper}. The town hall was finished in {pick.randrange(1400, 1900)} "
            f"{pick.choice(_REASONS)}.",
        ]
        needs = (2 * at, 2 * at + 1)
        asked += [
            Asked(question, (answer,), needs, ())
            for question, answer in (
                (f"On which river is the town where {person} was born?", rivers[at]),
                (f"Who is the mayor of the town where the author of {book} was born?", mayor),
                (f"What is the newspaper of the town where {person} was born called?", paper),
            )
        ]
    return Library(tuple(documents), tuple(asked))
