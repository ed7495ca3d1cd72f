"""Prompts that test routers: every skill in templates that no training file has, two requests in one prompt, near misses and chat.

The templates share no opening with those of the skills. Contents are those of the skills' test side. `DEVELOPMENT` was looked at while
the routers' pooling and threshold were chosen; `UNSEEN` was written afterwards and chose nothing. A near miss is about the same things
as a skill but asks for something else, so that no brick applies.
"""

from __future__ import annotations

from collections.abc import Sequence

from skillkit import Skill, pick, shuffled

PER_TEMPLATE = 8

DEVELOPMENT: dict[str, tuple[str, ...]] = {
    "add": (
        "I have {a} in one jar and {b} in another. How many altogether?",
        "{a} and {b} combined comes to",
        "Could you total up {a} and {b} for me?",
        "Let me know the result of putting {a} together with {b}.",
        "Sum up: {a}, {b}",
    ),
    "reverse": (
        "I would like to see {w} from the other end.",
        "Take {w} and list it last to first.",
        "Flip the order of {w}, please.",
        "If I hold {w} up to a mirror, what do I read?",
        "Backward spelling of {w}:",
    ),
    "triage": (
        "Which of the four should handle this customer? {m}",
        "A client just sent us the following. {m} Who takes it?",
        "{m} Forward to:",
        "Decide the department word for this email. {m}",
        "Incoming ticket: {m} Queue:",
    ),
    "actions": (
        "Robot, {c}. What will you do, one by one?",
        "Spell out every part of this instruction: {c}.",
        "Convert {c} to a list of orders in capitals.",
        "The instruction says to {c}; executed, that is",
        "Expand: {c}",
    ),
    "glossary": (
        "I need the Velu words for {p}.",
        "How would someone who speaks Velu put {p}?",
        "{p} - Velu version, please.",
        "In the Velu language, {p} comes out as",
        "Dictionary lookup, English to Velu: {p}",
    ),
    "record": (
        "Put this person into name, town, age form: {s}",
        "{s} Write that as one line of the register.",
        "Summarize with bars between the parts: {s}",
        "From the note below, fill in the card. {s} Card:",
        "Register this person. {s}",
    ),
    "date-dmy": (
        "I need {d} with slashes.",
        "Turn {d} into its all-number form.",
        "Fill in the form field for the day {d}:",
        "{d} as figures, please.",
        "How would you abbreviate {d} on a stamp?",
    ),
}
UNSEEN: dict[str, tuple[str, ...]] = {
    "add": (
        "My shopping was {a} on Monday and {b} on Tuesday. In total I paid",
        "Tell me {a} plus {b}.",
        "{a} increased by {b} is",
        "Quick maths: {a} + {b}?",
        "When I put {b} on top of {a}, I end up at",
    ),
    "reverse": (
        "Someone wrote {w} from right to left. What did they write?",
        "{w}, but starting with the final letter:",
        "Show me the mirror image of {w}.",
        "The opposite letter order of {w} would be",
        "Rewrite {w} so that the end comes at the start.",
    ),
    "triage": (
        "We received this complaint: {m} Which team gets it?",
        "{m} I think this should be handled by",
        "Pick the responsible desk. {m}",
        "Support mailbox, new entry: {m} Category:",
        "Help me sort this customer request. {m} It goes to",
    ),
    "actions": (
        "Imagine you are a robot and hear: {c}. List what you do.",
        "{c} - write this as a chain of moves.",
        "Break the command {c} down into single actions.",
        "What sequence of steps follows from {c}?",
        "A machine that must {c} performs",
    ),
    "glossary": (
        "Translate this into the Velu tongue: {p}",
        "What would {p} be among the Velu?",
        "{p} is written in Velu as",
        "Help me with my Velu homework: {p}.",
        "Say {p} like a Velu speaker.",
    ),
    "record": (
        "Turn this note into a database row: {s}",
        "{s} Please note it in the list of people.",
        "Take name, place and age from the following. {s}",
        "New member! {s} Line for the membership list:",
        "How does this look as an entry with three columns? {s}",
    ),
    "date-dmy": (
        "Can {d} be put more briefly, with numbers only?",
        "Our form wants digits. The date was {d}. We enter",
        "{d} in numeric notation:",
        "Abbreviate this date for a spreadsheet: {d}",
        "For the label, print {d} as",
    ),
}
for _templates in (DEVELOPMENT, UNSEEN):
    _templates["date-mdy"] = _templates["date-dmy"]

NEAR: dict[str, tuple[str, ...]] = {
    "add": ("What is {a} minus {b}? Answer:", "Is {a} larger than {b}? Answer:"),
    "reverse": ("How many letters are there in {w}? Answer:", "Which word do the letters {w} make?"),
    "triage": ("Please answer this customer politely: {m}", "Is the customer angry? {m} Answer:"),
    "actions": ("How many words are in the command {c}? Answer:", "Tell a short story about a robot that is told to {c}."),
    "glossary": ("Please translate into French: {p}. Translation:", "Describe a picture of this: {p}."),
    "record": ("Write a letter to this person. {s} Dear", "Is the person older than fifty? {s} Answer:"),
    "date-dmy": ("What day of the week was {d}? Answer:", "What happened on {d}?"),
}

THEN = ("{first} {answer}. {second}", "{first} {answer}\n{second}", "{first} {answer}\nThank you! {second}")

CHAT = (
    "Hi! How are you today?",
    "Can you recommend a good book for a long train ride?",
    "Why is the sky blue?",
    "Please write a short birthday message for my grandmother.",
    "What should I cook tonight? I have rice, eggs and spinach.",
    "Tell me a joke about cats.",
    "I feel a bit tired lately. Any advice?",
    "How do I get a coffee stain out of a white shirt?",
    "Explain photosynthesis to a ten-year-old.",
    "Which is the longest river in the world?",
    "Could you help me plan a weekend trip to the mountains?",
    "What is the difference between a crocodile and an alligator?",
    "Give me three ideas for a school project about recycling.",
    "My plant has yellow leaves. What can I do?",
    "Write a polite email to my landlord about the broken heating.",
    "How does a bicycle stay upright?",
    "What are some good names for a puppy?",
    "Can you explain how interest rates affect house prices?",
    "Please continue the story: The old lighthouse had been dark for years, until one night",
    "Who painted the Mona Lisa?",
    "Is it better to run in the morning or in the evening?",
    "Suggest a title for an essay about friendship.",
    "What does it mean when a cat purrs?",
    "How can I learn to play the guitar by myself?",
    "Thanks, that was very helpful!",
    "Give me a recipe for pancakes without milk.",
    "Write a haiku about autumn.",
    "What is a good way to remember people's names?",
    "Do penguins live at the North Pole?",
    "Please correct the grammar of this sentence: He go to school every days.",
)


def rows(skills: Sequence[Skill], kind: str) -> list[dict[str, object]]:
    """Every skill in templates of its own, with the brick that applies.

    Args:
        skills: The skills.
        kind: "development" or "unseen".
    """
    templates = {"development": DEVELOPMENT, "unseen": UNSEEN}[kind]
    found: list[dict[str, object]] = []
    for skill in skills:
        for number, template in enumerate(templates[skill.name]):
            contents = shuffled_contents(skill, "paraphrase", template)
            prompts = [template.format(**content) for content in contents[:PER_TEMPLATE]]
            found += [_row(kind, skill.name, number, i, prompt) for i, prompt in enumerate(prompts)]
    return found


def near_rows(skills: Sequence[Skill]) -> list[dict[str, object]]:
    """Near misses: no brick applies."""
    found: list[dict[str, object]] = []
    for skill in skills:
        for number, template in enumerate(NEAR.get(skill.name, ())):
            contents = shuffled_contents(skill, "near", template)
            prompts = [template.format(**content) for content in contents[:PER_TEMPLATE]]
            found += [{**_row("near", skill.name, number, i, prompt), "brick": None} for i, prompt in enumerate(prompts)]
    return found


def chat_rows() -> list[dict[str, object]]:
    """Messages that no brick is for."""
    return [{"id": f"chat-{number:02d}", "brick": None, "prompt": prompt} for number, prompt in enumerate(CHAT)]


def two_rows(skills: Sequence[Skill]) -> list[dict[str, object]]:
    """Pairs of requests: the first with its answer, then the second, whose brick applies."""
    found: list[dict[str, object]] = []
    for first in skills:
        for second in skills:
            if {first.name, second.name} <= {"date-dmy", "date-mdy"}:
                continue
            name = f"{first.name} {second.name}"
            one, two = (pick(skill.test(), "two", name, skill.name) for skill in (first, second))
            opening = pick(first.templates, "two", name, "first").format(**one.fields)
            request = pick(second.templates, "two", name, "second").format(**two.fields)
            prompt = pick(THEN, "two", name).format(first=opening, answer=one.answer, second=request)
            if first.name != second.name:
                found.append({"id": f"two-{len(found):04d}", "brick": second.name, "first": first.name, "prompt": prompt})
    return found


def shuffled_contents(skill: Skill, *parts: str) -> list[dict[str, str]]:
    """The fields of a skill's test contents in an order decided by `parts`."""
    contents = {content.key: content.fields for content in skill.test()}
    # Both date skills ask the same questions, but not with the same dates in the same place.
    return [contents[key] for key in shuffled(contents, skill.name, *parts)]


def _row(kind: str, skill: str, template: int, number: int, prompt: str) -> dict[str, object]:
    return {"id": f"{kind}-{skill}-{template}-{number}", "brick": skill, "template": template, "prompt": prompt}
