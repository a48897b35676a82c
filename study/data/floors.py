"""What can be answered without looking, from the data alone: the floors that every score stands beside."""

from __future__ import annotations

from collections import Counter, defaultdict

from study.data.scenes import Scene
from study.data.tasks import TASKS, Example, make_examples


def most_frequent_answers(train: list[Example], examples: list[Example], *, with_question: bool) -> list[str]:
    """Answer with the most frequent training answer to the same question, or to any question of its task.

    Args:
        train: Training questions with their answers.
        examples: The questions to answer.
        with_question: Use the question; one that training never asked falls back to its task.
    """
    asked: dict[tuple[str, str], Counter] = defaultdict(Counter)
    of_task: dict[str, Counter] = defaultdict(Counter)
    for example in train:
        asked[example.task, example.question][example.answer] += 1
        of_task[example.task][example.answer] += 1
    found = []
    for example in examples:
        known = asked.get((example.task, example.question)) if with_question else None
        found.append((known or of_task[example.task]).most_common(1)[0][0])
    return found


def answers_without_question(scenes: list[Scene], examples: list[Example], draws: int = 24, seed: int = 1) -> list[str]:
    """Answer as one who knows the scene and its task but not the question: the most frequent answer of its questions.

    Args:
        scenes: The scenes.
        examples: The questions to answer.
        draws: Questions of each task that are drawn about each scene.
        seed: Seed of the first draw; others than that of `examples`.
    """
    of_scene: dict[tuple[str, int], Counter] = defaultdict(Counter)
    for draw in range(draws):
        for example in make_examples(scenes, seed=seed + draw):
            of_scene[example.task, example.scene][example.answer] += 1
    found = []
    for example in examples:
        counts = of_scene.get((example.task, example.scene))
        found.append(counts.most_common(1)[0][0] if counts else "")
    return found


def share_right(examples: list[Example], answers: list[str]) -> dict[str, float]:
    """Return the percentage of right answers of each task, of pairs the percentage of pairs with both right."""
    hits: dict[str, dict[int, bool]] = {}
    for position, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        of_task = hits.setdefault(example.task, {})
        key = position if example.pair is None else example.pair
        of_task[key] = of_task.get(key, True) and answer == example.answer
    return {task: 100 * sum(found.values()) / len(found) for task, found in hits.items()}


def data_floors(train: list[Example], examples: list[Example]) -> dict[str, dict[str, float]]:
    """Return the floors of each task, in percent of exact answers.

    Args:
        train: Training questions with their answers.
        examples: Held-out questions.

    Returns:
        `no_image`: the most frequent training answer to the same question; `no_question`: that to the task.
    """
    return {
        name: share_right(examples, most_frequent_answers(train, examples, with_question=known))
        for name, known in (("no_image", True), ("no_question", False))
    }


def floors_table(train: list[Example], scenes: list[Scene], examples: list[Example]) -> str:
    """Return a table of questions, answers and floors by task, as text.

    Its last column is the share of a reader who knows the scene and the task, but not the question.
    """
    floors = data_floors(train, examples)
    seen = share_right(examples, answers_without_question(scenes, examples))
    lines = [
        f"{'task':<14}{'training':>9}{'held out':>9}{'answers':>8}{'no image':>9}{'no question':>12}{'scene alone':>12}"
    ]
    for name in TASKS:
        own = [example for example in train if example.task == name]
        counts = (len(own), sum(example.task == name for example in examples), len({e.answer for e in own}))
        shares = (floors["no_image"][name], floors["no_question"][name], seen[name])
        lines.append(f"{name:<14}" + "".join(f"{n:12}" for n in counts) + "".join(f"{share:12.1f}" for share in shares))
    return "\n".join(lines)


def main() -> None:
    """Print the floors of the study's own scenes: `python -m study.data.floors`."""
    from study.data.scenes import make_scenes

    train = make_examples(make_scenes("train", 6000))
    scenes = make_scenes("test", 900)
    print(floors_table(train, scenes, make_examples(scenes)))


if __name__ == "__main__":
    main()
