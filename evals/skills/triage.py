"""`triage`: a customer's message to one of four departments, each known by a code word.

The four words are named in the message, in any order; which department is which word is arbitrary, so nothing
but training can teach it. A message is a frame around one object
and one problem; the split is by that pair, and the object may stand anywhere in the message.
"""

from __future__ import annotations

from functools import cache

from skillkit import Content, Skill, in_test, pick, shuffled

TEMPLATES = (
    "Please route this message: {m} Code:",
    "Please name the desk for the following note. {m} Desk:",
    "Question: Which code fits this message? {m} Answer:",
    "Question: where should this go? {m} Answer:",
    "Task: label the customer message. {m} Label:",
    "Task: sort the mail. {m} ->",
    "Here is what a customer wrote: {m} The code is",
    "Here is a message for the help desk: {m} It belongs to",
    "Answer with one code word. {m} Code =",
    "Answer this: who handles the following? {m} Handled by",
    "Given the message: {m} The right code is",
    "Given this note from a client: {m} It should be sent to",
    "Exercise: assign a code. {m} Solution:",
    "Exercise: a letter says: {m} Assigned to:",
    "Can you route this? {m} The answer is",
    "Can you tell me who should read it? {m} It is for",
    "What code does this message get? {m} Answer:",
    "What is the desk for this request? {m} Desk:",
    "Now file the next message: {m} The file is",
    "Now a new message came in: {m} Send it to",
    "Read the message and give its code: {m} Code:",
    "Read this and route it: {m} ->",
    "Work out the code. {m} Answer:",
    "Work with this message: {m} Its code word is",
)

# department -> (code word, objects, problems)
DEPARTMENTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "billing": (
        "amber",
        (
            "invoice", "bill", "card payment", "refund", "receipt", "monthly fee", "bank transfer",
            "direct debit", "price", "tax line", "credit note", "account balance", "late charge",
        ),
        (
            "is higher than we agreed", "shows the wrong amount", "was charged twice", "is not on my statement",
            "does not add up", "was taken too early", "lists a fee I do not know", "is still unpaid",
            "has been counted two times", "should be lower this month",
        ),
    ),
    "delivery": (
        "cobalt",
        (
            "parcel", "package", "shipment", "box", "courier", "crate", "delivery van", "letter",
            "order of chairs", "new sofa", "pallet", "postal bag", "driver",
        ),
        (
            "has not arrived", "went to the wrong address", "is stuck at the depot", "was left in the rain",
            "came to my neighbour", "is two days late", "was seen in another town", "never reached our door",
            "got lost on the way", "is still on the road",
        ),
    ),
    "technical": (
        "olive",
        (
            "app", "login page", "password reset", "screen", "printer", "website", "software update", "router",
            "laptop", "search button", "video player", "keyboard", "wireless signal",
        ),
        (
            "keeps crashing", "shows an error", "does not load", "freezes after a minute", "stopped working",
            "is very slow today", "turns black", "does not respond", "will not start", "drops the connection",
        ),
    ),
    "booking": (
        "violet",
        (
            "appointment", "reservation", "meeting", "table for two", "room", "dentist visit", "haircut slot",
            "tour", "consultation", "lesson", "seat", "interview", "viewing",
        ),
        (
            "needs to move to Friday", "must be cancelled", "should start an hour later", "clashes with my holiday",
            "is not in the calendar", "could be for one more guest", "was set for the wrong week",
            "has no free time left", "should be confirmed for noon", "has to be put off until May",
        ),
    ),
}  # fmt: skip

FRAMES = (
    "My {o} {p}.",
    "Hello, the {o} {p}.",
    "I am writing because the {o} {p}, thank you.",
    "It seems that our {o} {p}.",
    "Could someone help? The {o} {p}.",
    "Since yesterday I know that the {o} {p}.",
    "Good morning, my wife says the {o} {p}.",
    "The {o} {p}, and I would like an answer.",
    "We are old customers, but the {o} {p}.",
    "Sorry to trouble you again: my {o} {p}.",
    "For the second time the {o} {p}, so please look into it.",
    "I hope you are well. The {o} {p}.",
)
CODES = tuple(code for code, _, _ in DEPARTMENTS.values())


@cache
def contents(test: bool) -> list[Content]:
    """One message for each (object, problem) of the test side, three frames of each on the training side."""
    found: list[Content] = []
    for name, (code, objects, problems) in DEPARTMENTS.items():
        pairs = [(thing, trouble) for thing in objects for trouble in problems]
        chosen = [pair for pair in pairs if in_test("triage", " ".join(pair), 0.55) is test]
        # Departments are dealt out in turn below, so each one gives the same number.
        chosen = shuffled(chosen, "triage", name)
        rounds = 1 if test else len(FRAMES)
        for turn in range(rounds):
            for thing, trouble in chosen:
                start = FRAMES.index(pick(FRAMES, "frame", thing, trouble))
                message = FRAMES[(start + turn) % len(FRAMES)].format(o=thing, p=trouble)
                wrong = tuple(other for other in CODES if other != code)
                desks = ", ".join(shuffled(CODES, "desks", message))
                asked = f"{message} Desks: {desks}."
                found.append(Content(f"{thing} {trouble}", {"m": asked}, code, wrong))
    return balanced(found)


def balanced(found: list[Content]) -> list[Content]:
    """The contents so that any 4 x n first ones hold n of each code, in a mixed order inside each four."""
    queues = {code: [content for content in found if content.answer == code] for code in CODES}
    rounds = min(len(queue) for queue in queues.values())
    return [queues[code][turn] for turn in range(rounds) for code in shuffled(CODES, "order", turn)]


SKILL = Skill("triage", TEMPLATES, lambda: contents(True), lambda: contents(False), frozenset({3, 10, 16, 23}))
