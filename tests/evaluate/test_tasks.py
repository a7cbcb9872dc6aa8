"""Generated tasks: what they claim is there, they are as long as asked for, and a seed makes them again."""

import itertools
import re

import pytest

from spla_backend.evaluate.tasks import TASKS, make_sample, score


def count(text: str) -> int:
    """A stand-in for a tokenizer: words, digits one by one, and punctuation."""
    return len(re.findall(r"\d|[A-Za-z]+|[^\w\s]", text))


def context(task: str, length: int = 2048, seed: int = 3):
    sample = make_sample(task, length, seed, count)
    return sample.prompt, sample.answers


@pytest.mark.parametrize("length", [1024, 4096, 20000])
@pytest.mark.parametrize("task", TASKS)
def test_length(task, length):
    sample = make_sample(task, length, 0, count)
    assert sample.max_tokens == TASKS[task].max_tokens
    assert 0.9 * length < count(sample.prompt) + sample.max_tokens <= length


@pytest.mark.parametrize("task", TASKS)
def test_seed(task):
    first, again, other = (make_sample(task, 2048, seed, count) for seed in (1, 1, 2))
    assert first == again
    assert other.prompt != first.prompt and other.answers != first.answers


@pytest.mark.parametrize("task", TASKS)
def test_length_changes_the_haystack_alone(task):
    assert context(task, 2048)[1] == context(task, 4096)[1]


@pytest.mark.parametrize("task", TASKS)
def test_prompt_ends_before_the_answer(task):
    prompt, answers = context(task)
    end = prompt[-50:]
    assert not prompt.endswith(" ")
    assert not any(answer in end for answer in answers)


def test_too_short():
    with pytest.raises(ValueError, match="'commonwords' needs at least"):
        make_sample("commonwords", 100, 0, count)


def needles(prompt: str) -> list[tuple[str, str]]:
    return re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", prompt)


def test_single():
    prompt, (number,) = context("single")
    ((key, value),) = needles(prompt)
    assert value == number and prompt.count(number) == 1
    assert prompt.endswith(f"The special magic number for {key} mentioned in the provided text is")


def test_multikey():
    prompt, (number,) = context("multikey")
    found = needles(prompt)
    assert len({key for key, _ in found}) == len({value for _, value in found}) == 8
    (key,) = [key for key, value in found if value == number]
    assert prompt.endswith(f"The special magic number for {key} mentioned in the provided text is")
    assert found[0][1] != context("multikey", seed=5)[1][0]


def test_multivalue():
    prompt, answers = context("multivalue")
    found = needles(prompt)
    assert len(found) == 4 and len({key for key, _ in found}) == 1
    assert {value for _, value in found} == set(answers)
    assert prompt.endswith(f"All the special magic numbers for {found[0][0]} mentioned in the provided text are")


def test_multiquery():
    prompt, answers = context("multiquery")
    found = dict(needles(prompt))
    question = prompt.rsplit("All the special", 1)[1]
    asked = re.findall(r"[a-z]+-[a-z]+", question)
    assert len(found) == 4 and tuple(found[key] for key in asked) == answers


def test_needles_lie_anywhere():
    places = []
    for seed in range(40):
        prompt, (number,) = context("single", seed=seed)
        places.append(prompt.index(number) / len(prompt))
    assert min(places) < 0.25 and max(places) > 0.75


def test_variables():
    prompt, answers = context("variables")
    example, text = prompt.split("\n\nMemorize")
    number = re.search(r"assigned the value (\d+) in", text).group(1)
    values: dict[str, str] = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
        values[name] = values.get(value, value)  # in order: what is named has been assigned
    assert values == dict.fromkeys(answers, number) and len(answers) == 5
    assert not any(name in example for name in answers)


def test_commonwords():
    prompt, answers = context("commonwords", 4096)
    listed = re.findall(r"\d+\. (\w+)", prompt.rsplit("Below is", 1)[1])
    counts = {word: listed.count(word) for word in set(listed)}
    ranked = sorted(counts, key=counts.get, reverse=True)
    assert set(ranked[:10]) == set(answers)
    assert min(counts[word] for word in answers) > 2 * max(counts[word] for word in ranked[10:])


def test_qa():
    prompt, (city,) = context("qa")
    name = re.search(r"In which city was (.+) born\?", prompt).group(1)
    assert prompt.count(f"{name} was born in {city} in") == 1
    names = re.findall(r"(\w+ \w\. \w+) was born in \w+ in \d{4} and", prompt)
    assert len(names) == len(set(names)) > 20
    assert re.findall(r"Document (\d+):", prompt) == [str(i + 1) for i in range(len(names))]


def test_qa_asks_anywhere():
    def place(seed: int) -> float:
        prompt, _ = context("qa", 1024, seed)
        name = re.search(r"In which city was (.+) born\?", prompt).group(1)
        return prompt.index(name) / len(prompt)

    places = [place(seed) for seed in range(40)]
    assert min(places) < 0.25 and max(places) > 0.7


def test_scores():
    assert score(" 1234567. There", ["1234567"]) == 1
    assert score("123456", ["1234567"]) == 0
    assert score("b, D; e", ["a", "b", "c", "d"]) == 0.5
    answers = ["1111111", "2222222", "3333333"]
    assert [score(" ".join(part), answers) for part in itertools.accumulate([[a] for a in answers])] == [
        pytest.approx(x / 3) for x in (1, 2, 3)
    ]
