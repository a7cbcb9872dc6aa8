"""RULER-style tasks (Hsieh et al., arXiv 2404.06654), made from a seed: the same arguments give the same sample.

The haystack is made here, too: nothing is downloaded. A sample ends with the beginning of its answer, so that models
without instruction tuning can be asked as well. To add a task, write a function that builds the sample for a number of
units of haystack, and decorate it.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Sample:
    """A question about a long context.

    Attributes:
        task: Name of the task.
        prompt: Context, question and the beginning of the answer.
        answers: What the completion must name, all of it.
        max_tokens: Tokens for the completion.
    """

    task: str
    prompt: str
    answers: tuple[str, ...]
    max_tokens: int


Build = Callable[[random.Random, int], tuple[str, tuple[str, ...]]]
"""From a fresh generator and the number of units of haystack: prompt and answers. More units, longer prompt."""


@dataclass(frozen=True)
class Task:
    """How samples of one kind are built, and how many tokens an answer may take."""

    build: Build
    max_tokens: int


TASKS: dict[str, Task] = {}


def _task(name: str, max_tokens: int) -> Callable[[Build], Build]:
    def decorate(build: Build) -> Build:
        TASKS[name] = Task(build, max_tokens)
        return build

    return decorate


def make_sample(task: str, length: int, seed: int, count: CountTokens) -> Sample:
    """The longest sample whose prompt and completion stay within `length` tokens.

    Args:
        task: One of `TASKS`.
        length: Tokens of the prompt and of its completion.
        seed: Different seeds give different samples.
        count: How many tokens a text has for the model.

    Raises:
        ValueError: Not even the smallest prompt fits.
    """
    kind = TASKS[task]

    def build(units: int) -> tuple[str, tuple[str, ...]]:
        return kind.build(random.Random(f"{task}/{seed}"), units)

    def fits(units: int) -> bool:
        return count(build(units)[0]) + kind.max_tokens <= length

    if not fits(1):
        least = count(build(1)[0]) + kind.max_tokens
        raise ValueError(f"task {task!r} needs at least {least} tokens, not {length}: give a larger --lengths")
    most = 2
    while fits(most):
        most *= 2
    least = most // 2  # fits, most does not
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    prompt, answers = build(least)
    return Sample(task, prompt, answers, kind.max_tokens)


def score(completion: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the completion, whatever their case."""
    text = completion.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


# Haystacks

_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


def _list(words: str) -> list[str]:
    return words.split()


_ADJECTIVES = _list(
    "amber brave calm clever cosmic curious dusty eager early faint fierce gentle golden happy hidden honest "
    "humble icy jolly keen lively lone loud lucky mellow mighty modern narrow noble odd pale patient plain polite "
    "proud quick quiet rapid rare round rusty secret sharp shy silent silver simple sleepy smooth solid spare "
    "steady stout sunny swift tender tiny vivid warm wild wise young "
)
_NOUNS = _list(
    "anchor apple arrow badge barn basket bell boat book bottle bridge brush bucket cabin candle canyon castle "
    "cedar chair cloud clock copper coral cradle crane crown desert dragon drum eagle falcon feather fern field "
    "flame forest fountain fox garden gate glove grove hammer harbor hill horn island ivory jacket jewel kettle "
    "kite ladder lake lamp lantern leaf lemon lion maple marble meadow mirror moon mountain needle oak ocean "
    "orchard otter paper pearl pepper pilot pine planet pocket pond quilt rabbit raven ribbon river rocket root "
    "sail salt shell ship shore spoon spring stone storm stream table temple tiger tower train tree tunnel valley "
    "violin wagon wave wheel willow window winter wolf wood "
)
_FIRST_NAMES = _list(
    "Ada Alma Amir Anton Berta Boris Carla Cyrus Dalia Dario Edith Elias Fatima Felix Gerda Goran Hanna Hugo Ines "
    "Ivan Jana Jonas Karin Kofi Lena Luca Mara Milan Nadia Nils Olga Omar Paula Pavel Rosa Ruben Selma Simon Tara "
    "Tomas Ula Viktor Wanda Yara Yusuf Zora "
)
_LAST_NAMES = _list(
    "Abbot Adler Bakker Barros Benson Brandt Castle Cortez Dahl Dorsey Eklund Farrow Fischer Garber Gomez Hale "
    "Holm Ibsen Jensen Kaplan Keller Lund Marsh Mendez Moreau Novak Okafor Olsen Park Petrov Quinn Ramos Ritter "
    "Santos Schmidt Silva Tanaka Thorne Ulrich Vance Vega Weber Winter Yilmaz Zeller "
)
_CITIES = _list(
    "Athens Bergen Cairo Dakar Dublin Florence Geneva Hanoi Havana Jakarta Kyoto Lagos Leipzig Lima Lisbon Madrid "
    "Manila Naples Nairobi Oslo Porto Prague Quito Riga Seoul Seville Sofia Tunis Vienna Warsaw "
)
_JOBS = _list(
    "baker carpenter dentist farmer gardener judge librarian mechanic nurse painter pilot "
    "plumber sailor tailor teacher violinist watchmaker welder "
)


def _noise(units: int) -> list[str]:
    return list(itertools.islice(itertools.cycle(_NOISE), units))


def _hide(rng: random.Random, haystack: list[str], needles: Sequence[str]) -> str:
    """The sentences of the haystack with the needles between them, in random places and random order."""
    needles = list(needles)
    rng.shuffle(needles)
    # Where, as a share of the text: the same for every number of units.
    for place, needle in sorted(zip((rng.random() for _ in needles), needles, strict=True), reverse=True):
        haystack.insert(int(place * len(haystack)), needle)
    return " ".join(haystack)


def _keys(rng: random.Random, count: int) -> list[str]:
    pairs = rng.sample(range(len(_ADJECTIVES) * len(_NOUNS)), count)
    return [f"{_ADJECTIVES[i % len(_ADJECTIVES)]}-{_NOUNS[i // len(_ADJECTIVES)]}" for i in pairs]


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(n) for n in rng.sample(range(1_000_000, 10_000_000), count)]


def _needle(key: str, number: str) -> str:
    return f"One of the special magic numbers for {key} is: {number}."


def _needle_prompt(context: str, what: str, asked: str, verb: str) -> str:
    return (
        f"Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you "
        f"about them afterwards.\n{context}\nWhat {verb} {what} for {asked} mentioned in the provided text? "
        f"{what[0].upper()}{what[1:]} for {asked} mentioned in the provided text {verb}"
    )


# Tasks


@_task("single", 16)
def _single(rng: random.Random, units: int) -> tuple[str, tuple[str, ...]]:
    """One needle."""
    (key,), (number,) = _keys(rng, 1), _numbers(rng, 1)
    context = _hide(rng, _noise(units), [_needle(key, number)])
    return _needle_prompt(context, "the special magic number", key, "is"), (number,)


@_task("multikey", 16)
def _multikey(rng: random.Random, units: int) -> tuple[str, tuple[str, ...]]:
    """Eight needles, one of which is asked for."""
    keys, numbers = _keys(rng, 8), _numbers(rng, 8)
    context = _hide(rng, _noise(units), [_needle(k, n) for k, n in zip(keys, numbers, strict=True)])
    return _needle_prompt(context, "the special magic number", keys[0], "is"), (numbers[0],)


@_task("multivalue", 64)
def _multivalue(rng: random.Random, units: int) -> tuple[str, tuple[str, ...]]:
    """One key with four values, all asked for."""
    (key,), numbers = _keys(rng, 1), _numbers(rng, 4)
    context = _hide(rng, _noise(units), [_needle(key, n) for n in numbers])
    return _needle_prompt(context, "all the special magic numbers", key, "are"), tuple(numbers)


@_task("multiquery", 64)
def _multiquery(rng: random.Random, units: int) -> tuple[str, tuple[str, ...]]:
    """Four keys, all asked for at once."""
    keys, numbers = _keys(rng, 4), _numbers(rng, 4)
    context = _hide(rng, _noise(units), [_needle(k, n) for k, n in zip(keys, numbers, strict=True)])
    asked = ", ".join(keys[:-1]) + f", and {keys[-1]}"
    return _needle_prompt(context, "all the special magic numbers", asked, "are"), tuple(numbers)


def _variable_text(rng: random.Random, units: int) -> tuple[str, str, list[str]]:
    """A context with a chain of five assignments in it, the number at its head, and the names in it."""
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
        if name not in names:
            names.append(name)
    number = str(rng.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {number}."]
    chain += [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(names)]
    haystack = _noise(units)
    # In the order of the chain: an assignment comes after what it names.
    places = sorted(int(rng.random() * len(haystack)) for _ in chain)
    for place, line in reversed(list(zip(places, chain, strict=True))):
        haystack.insert(place, line)
    return " ".join(haystack), number, names


def _variable_question(context: str, number: str) -> str:
    return (
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        f"Question: Find all variables that are assigned the value {number} in the text above. Answer: According to "
        f"the chain(s) of variable assignment in the text above, 5 variables are assigned the value {number}, they are:"
    )


@_task("variables", 40)
def _variables(rng: random.Random, units: int) -> tuple[str, tuple[str, ...]]:
    """Variable tracking: a chain of five assignments; one solved example goes first."""
    text, number, names = _variable_text(rng, 10)
    example = f"{_variable_question(text, number)} {' '.join(names)}"
    while True:
        text, number, names = _variable_text(rng, units)
        if number not in example and not any(name in example for name in names):
            break
    return f"{example}\n\n{_variable_question(text, number)}", tuple(names)


def _word_question(rng: random.Random, words: list[str], common: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """The question about a shuffled, numbered list, and the answer: the first `common` of the words."""
    listed = words[:common] * often + words[common:] * seldom
    rng.shuffle(listed)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{numbered}\nQuestion: What are the {common} most common words in the above list? Answer: "
        f"The top {common} words that appear most often in the list are:"
    ), words[:common]


@_task("commonwords", 72)
def _commonwords(rng: random.Random, units: int) -> tuple[str, tuple[str, ...]]:
    """Common words: ten words that are listed up to ten times as often as the others; one solved example goes first.

    A unit is one of the other words, which are listed three times.
    """
    limit = len(_NOUNS) * (len(_NOUNS) - 1)
    if units + 10 > limit:
        raise ValueError(f"task 'commonwords' knows {limit} words, too few for this length: give a smaller --lengths")
    example_words = rng.sample(_ADJECTIVES, 13)
    example, answer = _word_question(rng, example_words, 3, 6, 1)
    example += " " + " ".join(f"{i}. {word}" for i, word in enumerate(answer, 1))
    order = list(range(limit))
    rng.shuffle(order)
    words = []  # compounds, of which there are enough
    for i in order[: units + 10]:
        first, second = divmod(i, len(_NOUNS) - 1)
        words.append(_NOUNS[first] + _NOUNS[second + (second >= first)])
    often = max(6, min(30, units // 4))  # less in short lists, so that they hold more than the ten
    question, common = _word_question(rng, words, 10, often, 3)
    return f"{example}\n\n{question}", tuple(common)


@_task("qa", 16)
def _qa(rng: random.Random, units: int) -> tuple[str, tuple[str, ...]]:
    """Question answering over distractors: one of many documents about people says where its person was born.

    A unit is one person.
    """
    names = len(_FIRST_NAMES) * len(_LAST_NAMES) * 26
    limit = names // 2  # different ones are found by trying
    if units > limit:
        raise ValueError(f"task 'qa' knows {limit} people, too few for this length: give a smaller --lengths")
    asked_place = rng.random()
    people: dict[int, tuple[str, str, str, str, int]] = {}
    while len(people) < units:
        person = rng.randrange(names)
        last, first = divmod(person // 26, len(_FIRST_NAMES))
        name = f"{_FIRST_NAMES[first]} {chr(ord('A') + person % 26)}. {_LAST_NAMES[last]}"
        born, home, job, year = rng.choice(_CITIES), rng.choice(_CITIES), rng.choice(_JOBS), rng.randrange(1920, 2000)
        people.setdefault(person, (name, born, home, job, year))
    facts = list(people.values())
    # The first that was drawn is asked for: the same one however many there are.
    asked = facts.pop(0)
    facts.insert(int(asked_place * units), asked)
    name, birthplace, *_ = asked
    documents = "\n\n".join(
        f"Document {i}:\n{name} is a {job} by trade. {name} was born in {born} in {year} and now lives in {home}."
        for i, (name, born, home, job, year) in enumerate(facts, 1)
    )
    prompt = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        f"\n\nThe following are given documents.\n\n{documents}\n\nQuestion: In which city was {name} born?\n"
        f"Answer: {name} was born in"
    )
    return prompt, (birthplace,)
