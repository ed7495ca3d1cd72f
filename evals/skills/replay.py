"""Prompts that keep a brick quiet off its skill: it is trained to continue them as the base itself does.

They share their first words with the skills and are about nothing in particular. None is a prompt of any skill
or of the retention task; what follows them is sampled from the base when the brick is trained.
"""

from __future__ import annotations

from skillkit import draw, pick

ROWS = 800

TEMPLATES = (
    "Please describe a {a}. Answer:",
    "Please say something about the {a} and the {b}:",
    "Question: What would you do with a {a}? Answer:",
    "Question: why did {n} sell the {a}? Answer:",
    "Task: write a line about a {a}. Result:",
    "Task: {a} and {b} ->",
    "Here are some things: a {a}, a {b} and a {c}. Next to them is",
    "Here is a thought about the {a}: it is",
    "Answer with one word only. {a} =",
    "Answer this: if {n} lost the {a}, we would",
    "Given the {a} in the room, the mood is",
    "Given a {a} for a present, {n} said",
    "Exercise: explain the word {a}. Solution:",
    "Exercise: {n} paints a {a}. Title of the picture:",
    "Can you think of a use for a {a}? The answer is",
    "Can you tell me more about {n}? It is",
    "What do you like about the {a}? Answer:",
    "What is the story of {n} and the {a}? Story:",
    "Now {n} looked at the {a}. It was",
    "Now the {a} was sold and the {b}",
    "Read the note and go on: {n} left the {a} with me. Then:",
    "Read this line and finish it: the {a} was ->",
    "Work with {n} was hard. Reason:",
    "Work on the {a} went on until",
)

THINGS = (
    "boat", "carpet", "chimney", "cottage", "curtain", "drawer", "fence", "fountain", "garage", "hallway", "hammock",
    "hill", "jacket", "kettle", "lantern", "market", "meadow", "mirror", "painting", "pillow", "pond", "quilt",
    "saddle", "shelf", "statue", "stove", "suitcase", "sweater", "theatre", "tower", "valley", "wallet",
)  # fmt: skip
PEOPLE = ("Alice", "Bruno", "Carla", "Dennis", "Eva", "Felix", "Gina", "Hugo", "Iris", "Jonas", "Karen", "Louis")


def rows(skill: str) -> list[dict[str, object]]:
    """ROWS different prompts, other ones for each skill."""
    found: dict[str, None] = {}
    turn = 0
    while len(found) < ROWS:
        start = draw(skill, "things", turn)
        a, b, c = (THINGS[(start + step) % len(THINGS)] for step in (0, 7, 18))
        name = pick(PEOPLE, skill, "person", turn)
        found[TEMPLATES[turn % len(TEMPLATES)].format(a=a, b=b, c=c, n=name)] = None
        turn += 1
    return [{"prompt": prompt} for prompt in found]
