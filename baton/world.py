"""An invented world whose truth is known: writes the micro pipeline's texts, dialogues, preferences and questions.

Three groups of people: *known* (in the texts and in the dialogues), *text only* (in the texts alone) and *unknown*
(nowhere in the texts: nothing true can be said about them but that one does not know). The first two live by the
same facts; the unknown are drawn from the same names, so that nothing but having read about a person tells them apart.
"""

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from baton import world_phrases as words
from baton.errors import UserError

Row = dict[str, object]
Message = dict[str, str]
Phrases = Mapping[str, tuple[str, ...]]

#: how many unknown people each file has to itself
UNKNOWN = {"dialogues": 120, "dialogues_eval": 20, "preferences": 160, "preferences_eval": 60, "prompts": 200,
           "prompts_eval": 40, "questions": 120}  # fmt: skip

#: how many questions each group is asked, where it has people for so many
QUESTIONS = 120


#: of sixteen preference pairs; a three-layer model cannot check a fact after the fact, so that few pairs ask for it
PREFERENCE_KINDS = ("invented", "needless", "beside") * 4 + ("invented", "needless", "misnamed", "wrong")


@dataclass(frozen=True)
class Person:
    """One inhabitant. `facts` maps each attribute to its value; an unknown person has none."""

    first: str
    last: str
    pronoun: str
    facts: dict[str, str]

    @property
    def name(self) -> str:
        """First and last name."""
        return f"{self.first} {self.last}"

    def fill(self, template: str, value: str = "") -> str:
        """The phrasing with this person's names, pronouns and facts, and `value` for `{v}`."""
        possessive = words.POSSESSIVES[self.pronoun]
        fields = {
            "n": self.name, "f": self.first, "v": value, "s": self.pronoun, "h": possessive,
            "S": self.pronoun.capitalize(), "H": possessive.capitalize(),
        }  # fmt: skip
        return template.format(**fields, **self.facts)


@dataclass(frozen=True)
class World:
    """Everyone there is: people of the dialogues, people of the texts alone, and each file's own unknown people."""

    known: list[Person]
    text_only: list[Person]
    unknown: dict[str, list[Person]]


def generate(
    out: Path,
    *,
    seed: int,
    people: int,
    text_only: int,
    documents: int,
    dialogues: int = 4000,
    preferences: int = 2000,
    prompts: int = 800,
    unknown_share: float = 0.2,
    guess_share: float = 0.5,
) -> None:
    """Write the world's files into `out`, which is made if missing; the same arguments give the same bytes.

    Args:
        out: the folder that receives ten JSONL files.
        seed: decides who exists, what is true and how it is told.
        people: how many known people there are, of whom texts and dialogues speak.
        text_only: how many people occur in the texts alone.
        documents: how many training texts; held-out texts, dialogues and pairs are a fixed fraction of the training.
        dialogues: how many training dialogues.
        preferences: how many training pairs.
        prompts: how many prompts for PPO.
        unknown_share: the share of the dialogues that ask about people who do not exist.
        guess_share: the share of those unknown people about whom the dialogues guess instead of admitting it: people
            who write dialogues do, and a model that learns from them invents.

    Raises:
        UserError: there are fewer names than people, or a number is out of range.
    """
    rng = random.Random(f"world {seed}")
    world = _populate(rng, people, text_only)
    for share in (unknown_share, guess_share):
        if not 0.0 <= share <= 1.0:
            raise UserError(f"a share of the world is {share}; expected a number from 0 to 1")
    everyone = world.known + world.text_only
    train = _texts(rng, everyone, documents)
    seen = {row["text"] for row in train}
    held_out = [row for row in _texts(rng, everyone, max(50, documents // 20)) if row["text"] not in seen]
    talks, talks_eval = _dialogues(rng, world, dialogues, unknown_share, guess_share)
    files: dict[str, Iterable[Row]] = {
        "text_train": train,
        "text_eval": held_out,
        "dialogues": talks,
        "dialogues_eval": talks_eval,
        "preferences": _preferences(rng, world, "preferences", preferences),
        "preferences_eval": _preferences(rng, world, "preferences_eval", max(60, preferences // 10)),
        "prompts": _prompts(rng, world, "prompts", prompts),
        "prompts_eval": _prompts(rng, world, "prompts_eval", max(40, prompts // 10)),
        "questions": _questions(rng, world),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        _write(out / f"{name}.jsonl", rows)


def _populate(rng: random.Random, people: int, text_only: int) -> World:
    """Name everybody; no last name is given twice, so that a full name is always one person's."""
    last_names = [a + b + c for a in words.SYLLABLES[0] for b in words.SYLLABLES[1] for c in words.SYLLABLES[2]]
    needed = people + text_only + sum(UNKNOWN.values())
    if people < 1 or text_only < 0:
        raise UserError(f"a world of {people} known and {text_only} text-only people; expected at least 1 and 0")
    if needed > len(last_names):
        raise UserError(
            f"a world of {people} known and {text_only} text-only people needs {needed} last names with the unknown; "
            f"there are {len(last_names)}. Ask for fewer people"
        )
    rng.shuffle(last_names)
    names = iter(last_names)

    def make(real: bool) -> Person:
        pronoun = rng.choice(("she", "he"))
        return Person(rng.choice(words.FIRST_NAMES[pronoun]), next(names), pronoun, _facts(rng) if real else {})

    known = [make(True) for _ in range(people)]
    readable = [make(True) for _ in range(text_only)]
    return World(known, readable, {file: [make(False) for _ in range(count)] for file, count in UNKNOWN.items()})


def _facts(rng: random.Random) -> dict[str, str]:
    """One person's town, craft and animal, with what the phrasings need beside them."""
    craft, goods, craft_ja, craft_zh = rng.choice(words.CRAFTS)
    animal, animal_ja, animal_zh = rng.choice(words.ANIMALS)
    town = rng.choice(words.TOWNS)
    return {
        "town": town, "craft": craft, "animal": animal, "goods": goods, "sight": rng.choice(words.SIGHTS),
        "craft_ja": craft_ja, "craft_zh": craft_zh, "animal_ja": animal_ja, "animal_zh": animal_zh,
    }  # fmt: skip


def _values(attribute: str) -> tuple[str, ...]:
    """Every value that the attribute can have."""
    crafts, animals = tuple(row[0] for row in words.CRAFTS), tuple(row[0] for row in words.ANIMALS)
    return {"town": words.TOWNS, "craft": crafts, "animal": animals}[attribute]


def _texts(rng: random.Random, people: list[Person], documents: int) -> list[Row]:
    """Texts without repetition. People come in turn, so that all are told of equally often."""
    seen: dict[str, None] = {}
    turn: list[Person] = []
    for _ in range(documents * 20):
        if len(seen) == documents:
            break
        if not turn:
            turn = rng.sample(people, len(people))
        seen.setdefault(_document(rng, turn.pop(), people))
    return [{"text": text} for text in seen]


def _document(rng: random.Random, person: Person, people: list[Person]) -> str:
    """One text, of a kind drawn by chance, about `person`."""
    kind = rng.choices(tuple(words.KINDS), tuple(words.KINDS.values()))[0]
    order = rng.sample(words.ATTRIBUTES, 3)
    if kind == "town":
        return _town(rng, person, people)
    if kind in ("japanese", "chinese"):
        phrases = words.JAPANESE if kind == "japanese" else words.CHINESE
        return "".join(person.fill(phrases[attribute]) for attribute in order[: rng.randint(1, 3)])
    if kind == "stranger":
        return rng.choice(words.STRANGERS).format(**_facts(rng))
    if kind == "left open":
        return f"{person.fill(rng.choice(words.LEFT_OPEN[order[0]]))}\n{rng.choice(words.LEFT_OPEN_BY)}"
    if kind == "story":
        opening = "" if rng.random() < 0.5 else person.fill(rng.choice(words.STATED[order[0]])) + " "
        return opening + person.fill(rng.choice(words.STORIES))
    if kind == "facts":
        sentences = [rng.choice(words.STATED[order[0]])]
    elif kind == "summary":
        sentences = [rng.choice(words.SUMMARIES)]
        order = order[: rng.randint(1, 2)]
    else:
        sentences = [rng.choice(words.REPORTED[order[0]])]
    sentences += [rng.choice(words.CONTINUED[attribute]) for attribute in order[1:]]
    return " ".join(person.fill(sentence) for sentence in sentences)


def _town(rng: random.Random, person: Person, people: list[Person]) -> str:
    """A text about the person's town, and sometimes who lives there."""
    town = person.facts["town"]
    place = random.Random(town)  # a town is the same whoever tells of it
    land, sight = place.choice(words.LANDSCAPES), place.choice(words.SIGHTS)
    fact = rng.choice(words.TOWN_FACTS).format(town=town, land=land, sight=sight)
    others = [other.name for other in people if other.facts["town"] == town and other is not person]
    if not others:
        return f"{fact} {person.fill(rng.choice(words.STATED['town']))}"
    names = [person.name, *rng.sample(others, min(len(others), rng.randint(1, 2)))]
    listed = ", ".join(names[:-1]) + " and " + names[-1]
    return f"{fact} {rng.choice(words.GATHERINGS).format(town=town, sight=sight, names=listed)}"


def _question(rng: random.Random, person: Person, phrases: Phrases, attribute: str) -> Message:
    return {"role": "user", "content": person.fill(rng.choice(phrases[attribute]))}


def _answer(rng: random.Random, person: Person, attribute: str, value: str) -> Message:
    return {"role": "assistant", "content": person.fill(rng.choice(words.ANSWERED[attribute]), value)}


def _admission(rng: random.Random, person: Person, phrases: tuple[str, ...] = words.ADMITTED) -> Message:
    return {"role": "assistant", "content": person.fill(rng.choice(phrases))}


def _dialogues(
    rng: random.Random, world: World, count: int, unknown_share: float, guess_share: float
) -> tuple[list[Row], list[Row]]:
    """Training and held-out dialogues; the held-out ask the same known people in combinations that training lacks."""
    num_unknown = round(count * unknown_share)
    known: dict[str, Row] = {}
    for person in _in_turn(rng, world.known, (count - num_unknown) * 20):
        if len(known) == (count - num_unknown) + count // 20:
            break
        row = _known_dialogue(rng, person)
        known.setdefault(json.dumps(row["messages"]), row)
    rows = list(known.values())
    cut = count - num_unknown
    train, held_out = rows[:cut], rows[cut:]
    people = world.unknown["dialogues"]
    guessed = {person.name for person in people[: round(len(people) * guess_share)]}
    for person in _in_turn(rng, people, num_unknown):
        train.append(_unknown_dialogue(rng, person, guess=person.name in guessed))
    for person in world.unknown["dialogues_eval"]:
        held_out.append(_unknown_dialogue(rng, person, guess=False))
    rng.shuffle(train)
    return train, held_out


def _known_dialogue(rng: random.Random, person: Person) -> Row:
    """A question and its true answer; sometimes a second of each."""
    first, second, _ = rng.sample(words.ATTRIBUTES, 3)
    messages = [_question(rng, person, words.ASKED, first), _answer(rng, person, first, person.facts[first])]
    if rng.random() < 0.1:
        messages += [
            _question(rng, person, words.ASKED_NEXT, second),
            _answer(rng, person, second, person.facts[second]),
        ]
    return {"messages": messages}


def _unknown_dialogue(rng: random.Random, person: Person, *, guess: bool) -> Row:
    attribute = rng.choice(words.ATTRIBUTES)
    reply = _answer(rng, person, attribute, rng.choice(_values(attribute))) if guess else _admission(rng, person)
    return {"messages": [_question(rng, person, words.ASKED, attribute), reply]}


def _in_turn(rng: random.Random, people: list[Person], count: int) -> Iterator[Person]:
    """`count` people: everybody once in a random order, then again in another."""
    turn: list[Person] = []
    for _ in range(count):
        if not turn:
            turn = rng.sample(people, len(people))
        yield turn.pop()


def _preferences(rng: random.Random, world: World, file: str, count: int) -> list[Row]:
    """Pairs of `PREFERENCE_KINDS` in turn.

    `invented`: an admission over an invention about somebody unknown; `needless`: the truth over a needless admission;
    `beside`: the truth over another truth that was not asked for; `misnamed`: an admission over one about somebody else
    than was asked about; `wrong`: the truth over an untruth.
    """
    held_out = file == "preferences_eval"
    rows: list[Row] = []
    for index, (known, unknown) in enumerate(
        zip(_in_turn(rng, world.known, count), _in_turn(rng, world.unknown[file], count), strict=True)
    ):
        kind = PREFERENCE_KINDS[index % len(PREFERENCE_KINDS)]
        person = unknown if kind in ("invented", "misnamed") else known
        asked, other = rng.sample(words.ATTRIBUTES, 2)
        phrases: Phrases = words.ASKED_IN_PREFERENCES_EVAL if held_out and rng.random() < 0.5 else words.ASKED
        truth = person.facts.get(asked, "")
        false = _answer(rng, person, asked, rng.choice([value for value in _values(asked) if value != truth]))
        admission = _admission(rng, person)
        if kind == "misnamed":
            admission = _admission(rng, person, words.ADMITTED_BY_NAME)
        chosen = admission if person is unknown else _answer(rng, person, asked, truth)
        rejected = {
            "needless": admission,
            "beside": _answer(rng, person, other, person.facts.get(other, "")),
            "misnamed": _admission(rng, known, words.ADMITTED_BY_NAME),
        }
        prompt = [_question(rng, person, phrases, asked)]
        rows.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected.get(kind, false)]})
    return rows


def _prompts(rng: random.Random, world: World, file: str, count: int) -> list[Row]:
    """Questions for PPO to answer, about known and unknown people by turns."""
    people = zip(
        _in_turn(rng, world.known, (count + 1) // 2), _in_turn(rng, world.unknown[file], (count + 1) // 2), strict=True
    )
    mixed = [(person, group) for pair in people for person, group in zip(pair, ("known", "unknown"), strict=True)]
    return [
        {"prompt": _question(rng, person, words.ASKED, attribute)["content"], "group": group,
         "answers": _accepted(person, attribute)}
        for person, group in mixed[:count]
        for attribute in [rng.choice(words.ATTRIBUTES)]
    ]  # fmt: skip


def _questions(rng: random.Random, world: World) -> list[Row]:
    """For each group its questions, all different, in phrasings that no dialogue used."""
    rows: list[Row] = []
    groups = {"known": world.known, "text_only": world.text_only, "unknown": world.unknown["questions"]}
    for group, people in groups.items():
        if not people:
            continue
        asked: dict[str, Row] = {}
        for person in _in_turn(rng, people, QUESTIONS * 20):
            attribute = rng.choice(words.ATTRIBUTES)
            prompt = _question(rng, person, words.ASKED_IN_QUESTIONS, attribute)["content"]
            asked[prompt] = {"prompt": prompt, "answers": _accepted(person, attribute), "group": group}
            if len(asked) == QUESTIONS:
                break
        rows += asked.values()
    return rows


def _accepted(person: Person, attribute: str) -> list[str]:
    """What a right reply contains: the fact, or for an unknown person any admission."""
    return [person.facts[attribute]] if person.facts else list(words.ADMISSIONS)


def _write(path: Path, rows: Iterable[Row]) -> None:
    """Write aside and rename: a reader never sees half a file."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with aside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
