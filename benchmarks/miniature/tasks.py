"""The tasks: their prompts and right answers, from word lists, rules and the corpora.

A *task* has items, each a prompt and the one right answer, which greedy decoding has to write exactly. An
item's *focus* is what it is about; no focus is in two splits, and the bootstrap draws focuses. (The area of a
medical question, which is answered by the likeliest of a few options, is in `data.py`.)

The rules and the lists are written for this benchmark. No model reaches this file, and no file is written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Item = dict[str, str]
Rows = Callable[[str, str], list[dict[str, Any]]]
"""The rows of a corpus and a split; each has at least a `text`."""

WORDS_DIR = Path(__file__).parent / "words"
NUM_VALID, NUM_TEST = 150, 500
SEED = 7


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: Its name in stages and files.
        title: Its name in tables.
        description: What is asked, and where items and answers come from.
        items: Returns the items that may be in any split, given the corpora; none is of a corpus's own
            validation or test rows.
        num_train: Number of training items.
        held_out: Returns items that are for testing alone, and so is whatever has their focus.
    """

    name: str
    title: str
    description: str
    items: Callable[[Rows], Iterable[Item]]
    num_train: int
    num_valid: int = NUM_VALID
    held_out: Callable[[Rows], Iterable[Item]] = lambda rows: ()


def split_items(
    items: Iterable[Item],
    held_out: Iterable[Item] = (),
    *,
    num_train: int,
    num_valid: int,
    num_test: int = NUM_TEST,
) -> dict[str, list[Item]]:
    """Return items by split: random focuses, test first, each prompt once.

    Test items come first, so that another amount of training rows leaves them as they are. Among them those
    with the focus of a held-out item come first, and are in no other split.
    """
    rng = random.Random(SEED)
    by_focus: dict[str, list[Item]] = {}
    seen = set()
    held_out = list(held_out)
    for item in [*held_out, *items]:
        if item["prompt"] not in seen:
            seen.add(item["prompt"])
            by_focus.setdefault(item["focus"], []).append(item)
    splits: dict[str, list[Item]] = {"test": [], "valid": [], "train": []}
    wanted = {"test": num_test, "valid": num_valid, "train": num_train}
    only_test = {item["focus"] for item in held_out}
    order = rng.sample(sorted(by_focus), len(by_focus))
    for focus in sorted(order, key=lambda each: each not in only_test):
        part = next((n for n in splits if len(splits[n]) < wanted[n]), None)
        if part is not None and (part == "test" or focus not in only_test):
            splits[part] += by_focus[focus]
    return {name: rng.sample(part, len(part)) for name, part in splits.items()}


def _words(name: str) -> dict[str, list[str]]:
    """Return the words of a list by kind."""
    words: dict[str, list[str]] = {}
    for word, kind in word_list(name):
        words.setdefault(kind, []).append(word)
    return words


def _item(prompt: str, completion: str, focus: str | None = None) -> Item:
    # A line's end is what the base itself would write there; the token that ends a text it hardly ever gives.
    return {"prompt": prompt, "completion": f"{completion}\n", "focus": focus or prompt}


def word_list(name: str) -> Iterator[tuple[str, str]]:
    """Yield the words of a list, each with its kind."""
    for line in (WORDS_DIR / f"{name}.txt").read_text("utf-8").splitlines():
        kind, _, words = line.partition(": ")
        for word in words.split(", "):
            yield word, kind


# A fact in a fixed sentence -----------------------------------------------------------------------


def _kinds(rows: Rows) -> Iterator[Item]:
    for word, kind in word_list("kinds"):
        kind = "musical instrument" if kind == "instrument" else kind
        yield _item(f"Word: {word}\nEntry: {word}", f" is a kind of {kind}.", word)


def _entries(rows: Rows) -> Iterator[Item]:
    for place, continent in word_list("places"):
        yield _item(f"Place: {place}\nEntry: {place}", f" is a place in {continent}.", place)
    for person, calling in word_list("people"):
        yield _item(f"Person: {person}\nEntry: {person}", f" was a famous {calling}.", person)


# Fields from a sentence ---------------------------------------------------------------------------

NOTES = (
    "On {date}, {name} paid {amount} at the {shop}.",
    "{name} spent {amount} at the {shop} on {date}.",
    "{amount} was paid by {name} to the {shop} on {date}.",
    "At the {shop}, {name} was charged {amount} on {date}.",
    "The {shop} received {amount} from {name} on {date}.",
)
NUM_GENERATED = 3_000


def _records(rows: Rows) -> Iterator[Item]:
    rng = random.Random(SEED)
    words = _words("notes")
    for _ in range(NUM_GENERATED):
        amount = f"${rng.choice([rng.randint(2, 99), rng.randint(100, 999)])}"
        if rng.random() < 0.5:
            amount += f".{rng.randint(5, 99):02}"
        fields = {
            "name": f"{rng.choice(words['first name'])} {rng.choice(words['last name'])}",
            "amount": amount,
            "date": f"{rng.choice(words['month'])} {rng.randint(1, 28)}",
        }
        note = rng.choice(NOTES).format(shop=rng.choice(words["shop"]), **fields)
        record = "; ".join(f"{key}: {value}" for key, value in fields.items())
        yield _item(f"Note: {note}\nRecord:", f" {record}", fields["name"])


PROFILES = (
    "{name}, {age}, is a {job} from {town}.",
    "A {job} named {name}, aged {age}, lives in {town}.",
    "{name} of {town} works as a {job} and is {age} years old.",
    "At {age}, {name} moved to {town} to become a {job}.",
    "In {town} we met {name}, a {job} of {age}.",
)


def _profiles(rows: Rows) -> Iterator[Item]:
    rng = random.Random(SEED)
    words = _words("notes")
    jobs, towns = _words("kinds")["profession"], _words("places")["Europe"]
    # The sentences have no "an".
    jobs = [job for job in jobs if job[0] not in "aeio"]
    for _ in range(NUM_GENERATED):
        fields = {
            "name": f"{rng.choice(words['first name'])} {rng.choice(words['last name'])}",
            "age": str(rng.randint(18, 89)),
            "job": rng.choice(jobs),
        }
        sentence = rng.choice(PROFILES).format(town=rng.choice(towns), **fields)
        written = "; ".join(f"{key}: {value}" for key, value in fields.items())
        yield _item(f"Text: {sentence}\nCard:", f" {written}", fields["name"])


ASKED = {
    "information": "definition",
    "treatment": "treatment",
    "research": "research",
    "symptoms": "symptoms",
    "exams and tests": "diagnosis",
    "outlook": "outlook",
    "susceptibility": "risk",
    "causes": "cause",
    "prevention": "prevention",
}
"""What the types of MedQuAD's questions ask for, in a word of this benchmark."""
LONGEST_FOCUS = 40


def _diseases(rows: Rows, splits: Iterable[str] = ("train",)) -> Iterator[Item]:
    for row in (row for split in splits for row in rows("medical_medquad", split)):
        question = row["text"].partition("\n")[0].removeprefix("Question: ").strip()
        focus = row["focus"].strip()
        if row["qtype"] in ASKED and focus in question and 0 < len(focus) <= LONGEST_FOCUS:
            fields = f" disease: {focus}; asks for: {ASKED[row['qtype']]}"
            yield _item(
                f"Question: {question}\nFields:", fields, " ".join(focus.casefold().split())
            )


def _held_out_diseases(rows: Rows) -> Iterator[Item]:
    return _diseases(rows, ("valid", "test"))


# A sum with its answer marked ---------------------------------------------------------------------

NUM_SUMS = 1_000
"""Several stories have one equation, and no equation is in two splits."""
STORIES = (
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", 1),
    ("{name} has {a} {things} and gives {b} away. How many {things} are left?", -1),
    ("There are {a} {things} in one box and {b} in another. How many {things} are there?", 1),
    ("{name} had {a} {things} and lost {b}. How many {things} does {name} still have?", -1),
)


def _sums(rows: Rows) -> Iterator[Item]:
    rng = random.Random(SEED)
    words = _words("notes")
    for _ in range(NUM_SUMS):
        a, b = sorted((rng.randint(2, 15), rng.randint(2, 9)), reverse=True)
        story, sign = rng.choice(STORIES)
        names = {"name": rng.choice(words["first name"]), "things": rng.choice(words["thing"])}
        question = story.format(a=a, b=b, **names)
        equation = f"{a} {'+' if sign > 0 else '-'} {b} ="
        result = a + sign * b
        yield _item(
            f"Question: {question}\nAnswer: {equation}", f" {result}\n#### {result}", equation
        )


TASKS = (
    Task(
        name="record",
        title="record of a payment",
        description="A note says who paid how much where and when, in one of five forms; the answer is "
        "`name: ...; amount: ...; date: ...`. Notes are generated; no name is in two splits.",
        items=_records,
        num_train=240,
    ),
    Task(
        name="profile",
        title="card of a person",
        description="A sentence says who somebody is, in one of five forms; the answer is "
        "`name: ...; age: ...; job: ...`. Sentences are generated; no name is in two splits.",
        items=_profiles,
        num_train=260,
    ),
    Task(
        name="disease",
        title="disease and concern of a question",
        description="Given a question of MedQuAD, write `disease: ...; asks for: ...`: the page's disease, "
        "and one of nine words for the question's type. Training questions are of its training rows.",
        items=_diseases,
        num_train=360,
        held_out=_held_out_diseases,
    ),
    Task(
        name="kind",
        title="kind of a thing",
        description="Go on from a word with `is a kind of ...`, one of fourteen kinds. The 779 words are a "
        "list written for this benchmark.",
        items=_kinds,
        num_train=200,
        num_valid=70,
    ),
    Task(
        name="entry",
        title="entry for a place or person",
        description="Go on from a place or a person with `is a place in ...`, one of six continents, or `was "
        "a famous ...`, one of seven callings. The 942 names are lists written for this page.",
        items=_entries,
        num_train=290,
    ),
    Task(
        name="sum",
        title="sum with a marked answer",
        description="A story about two numbers, in one of four forms, and its equation, `23 - 12 =`; the "
        "answer is `11` and, on a line of its own, `#### 11`. Stories are generated.",
        items=_sums,
        num_train=280,
    ),
)
