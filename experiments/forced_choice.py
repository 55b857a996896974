"""A small test of what a model knows: of a few ways to end a sentence, is the right one the likeliest?

480 items of four kinds, generated from a fixed seed out of the lists below: sums with distractors near the result,
copying a list, agreement of a verb with a noun that does not stand beside it, and facts that a primary school teaches.
It is no benchmark that others use; it says whether a model of 135M parameters loses, by training, what it could do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.scorer import Scorer

SEED = 20260301
PER_KIND = 120


class Item(NamedTuple):
    """One question."""

    kind: str
    context: str
    options: tuple[str, ...]  # the right one first


def items() -> list[Item]:
    """All of them, the same in every call."""
    rng = random.Random(SEED)
    makers = {"sums": _sum, "copying": _copying, "agreement": _agreement}
    made: dict[Item, None] = {}  # each once
    for number, (kind, make) in enumerate(makers.items(), start=1):
        while len(made) < number * PER_KIND:
            made[Item(kind, *make(rng))] = None
    return [*made, *_facts(rng)]


def score(scorer: Scorer, tokenizer: Any, questions: Sequence[Item]) -> list[list[float]]:
    """Of each item the log-probs of its options, summed over their tokens; the right one's comes first."""
    sequences, places = [], []
    for item in questions:
        context = tokenizer(item.context)["input_ids"]
        places.append(len(sequences))
        # The options begin with a space, before which byte-pair tokenizers cut.
        sequences += [(context, tokenizer(option, add_special_tokens=False)["input_ids"]) for option in item.options]
    logps = scorer(sequences)
    if not bool(logps.isfinite().all()):
        raise FloatingPointError("the model has log-probs that are not finite")
    ends = [*places[1:], len(sequences)]
    return [logps[start:end].tolist() for start, end in zip(places, ends, strict=True)]


def is_right(logps: Sequence[float]) -> bool:
    """Whether the right option of an item is the likeliest."""
    return logps[0] > max(logps[1:])


def _sum(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    examples = [(x, y) for x, y in ((rng.randint(1, 9), rng.randint(1, 9)) for _ in range(3)) if (x, y) != (a, b)]
    shown = "".join(f"{x} + {y} = {x + y}\n" for x, y in examples)
    wrong = rng.sample([a + b + d for d in (-3, -2, -1, 1, 2, 3) if a + b + d > 0], 3)
    return f"{shown}{a} + {b} =", tuple(f" {value}" for value in (a + b, *wrong))


def _words(text: str) -> list[str]:
    return text.split()


WORDS = _words(
    "apple river stone garden window paper music winter market bridge forest island pencil castle orange silver doctor "
    "flower kitchen mountain ocean planet rabbit school summer ticket valley yellow candle desert engine farmer hammer "
    "jacket"
)


def _copying(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    words = rng.sample(WORDS, 8)
    listed, others = words[:5], words[5:]
    place = rng.randint(1, 4)
    said = ", ".join(listed[:place])
    wrong = listed[place + 1 :] + others
    context = f"List: {', '.join(listed)}.\nThe same list again: {said},"
    return context, tuple(f" {word}" for word in (listed[place], *rng.sample(wrong, 3)))


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(first, second) for first, second in (entry.strip().split(": ") for entry in text.split(","))]


NOUNS = _pairs(
    "key: keys, dog: dogs, teacher: teachers, book: books, car: cars, child: children, picture: pictures, "
    "student: students, letter: letters, doctor: doctors, bird: birds, woman: women, house: houses, friend: friends, "
    "story: stories, man: men"
)
LINKS = ("near", "behind", "of", "with", "next to")
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))


def _agreement(rng: random.Random) -> tuple[str, tuple[str, ...]]:
    subject, other = rng.sample(NOUNS, 2)
    plural = rng.random() < 0.5
    verbs = rng.choice(VERBS)
    right, wrong = verbs[plural], verbs[not plural]
    return f"The {subject[plural]} {rng.choice(LINKS)} the {other[not plural]}", (f" {right}", f" {wrong}")


# What is asked, of whom, and the answers; the wrong options are the answers of others.
FACTS = {
    "The capital of {} is": "France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Japan: Tokyo, China: Beijing, "
    "Russia: Moscow, Egypt: Cairo, Greece: Athens, Cuba: Havana, England: London, Ireland: Dublin, Portugal: Lisbon, "
    "Austria: Vienna, Poland: Warsaw, Norway: Oslo, Sweden: Stockholm, Canada: Ottawa, Peru: Lima, Iran: Tehran, "
    "Iraq: Baghdad, Kenya: Nairobi, Turkey: Ankara, Hungary: Budapest",
    "The opposite of {} is": "hot: cold, big: small, up: down, good: bad, rich: poor, open: closed, fast: slow, "
    "light: dark, old: young, hard: soft, happy: sad, full: empty, early: late, left: right, strong: weak, wet: dry, "
    "high: low, loud: quiet",
    "A young {} is called a": "dog: puppy, cat: kitten, cow: calf, horse: foal, sheep: lamb, bear: cub, goat: kid, "
    "deer: fawn, chicken: chick, frog: tadpole",
    "A person from {} speaks": "France: French, Germany: German, Italy: Italian, Spain: Spanish, Japan: Japanese, "
    "China: Chinese, Russia: Russian, Greece: Greek, Portugal: Portuguese, Poland: Polish",
    "The chemical symbol {} stands for": "O: oxygen, H: hydrogen, C: carbon, N: nitrogen, Fe: iron, Au: gold, "
    "Ag: silver, Na: sodium, Cu: copper, He: helium, K: potassium, Pb: lead",
    "The past tense of {} is": "go: went, see: saw, eat: ate, run: ran, take: took, give: gave, come: came, "
    "write: wrote, speak: spoke, drink: drank, know: knew, buy: bought, think: thought, teach: taught, fly: flew, "
    "sing: sang, swim: swam, drive: drove",
    "The color of {} is": "grass: green, snow: white, coal: black, blood: red, a lemon: yellow, a clear sky: blue, "
    "chocolate: brown, an elephant: gray, a carrot: orange",
    "The plural of {} is": "child: children, mouse: mice, foot: feet, tooth: teeth, man: men, goose: geese, "
    "woman: women, knife: knives, leaf: leaves, box: boxes, city: cities, wolf: wolves",
    "The day after {} is": "Monday: Tuesday, Tuesday: Wednesday, Wednesday: Thursday, Thursday: Friday, "
    "Friday: Saturday, Saturday: Sunday, Sunday: Monday",
}


def _facts(rng: random.Random) -> list[Item]:
    made = []
    for question, text in FACTS.items():
        pairs = _pairs(text)
        answers = [answer for _, answer in pairs]
        for asked, answer in pairs:
            wrong = rng.sample([other for other in answers if other != answer], 3)
            made.append(Item("facts", question.format(asked), tuple(f" {word}" for word in (answer, *wrong))))
    return made
