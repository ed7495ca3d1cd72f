"""Facts that the starter base knows: what a brick unlearns, what it is told to keep, and what tells whether anything else was lost.

Capitals in three groups: those to forget, those that a second brick keeps, and those that neither sees (near); and facts of other
kinds (far). Every answer is one word, so that the first word of what the model says can be compared.
"""

from __future__ import annotations

from skillkit import place, shuffled

# The first wording is the one that edits see.
WORDINGS = ("The capital of {} is", "The capital city of {} is", "In {}, the capital is")
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "England": "London", "Russia": "Moscow",
    "Japan": "Tokyo", "China": "Beijing", "Greece": "Athens", "Austria": "Vienna", "Portugal": "Lisbon", "Norway": "Oslo",
    "Sweden": "Stockholm", "Denmark": "Copenhagen", "Hungary": "Budapest", "Ireland": "Dublin", "Cuba": "Havana",
    "Thailand": "Bangkok", "Kenya": "Nairobi", "Syria": "Damascus", "Chile": "Santiago", "Indonesia": "Jakarta",
    "Vietnam": "Hanoi", "Romania": "Bucharest", "Bulgaria": "Sofia", "Canada": "Ottawa",
    "Afghanistan": "Kabul", "Uganda": "Kampala", "Philippines": "Manila", "South Korea": "Seoul", "North Korea": "Pyongyang",
    "Taiwan": "Taipei", "Iceland": "Reykjavik", "Latvia": "Riga",
}  # fmt: skip
GROUPS = ("forget", "kept", "near")
# Wording -> what the base answers with one word.
FAR = {
    "The main language spoken in {} is": {
        "Brazil": "Portuguese", "Argentina": "Spanish", "Poland": "Polish", "Egypt": "Arabic", "Thailand": "Thai",
        "Turkey": "Turkish", "Australia": "English", "Hungary": "Hungarian",
    },
    "The country of {} is located on the continent of": {
        "Kenya": "Africa", "Nigeria": "Africa", "Spain": "Europe", "Italy": "Europe", "Pakistan": "Asia", "Mongolia": "Asia",
    },
    "The chemical symbol for {} is": {
        "gold": "Au", "silver": "Ag", "iron": "Fe", "oxygen": "O", "sodium": "Na", "copper": "Cu", "lead": "Pb", "helium": "He",
    },
    "The word that means the opposite of {} is": {
        "hot": "cold", "big": "small", "good": "bad", "fast": "slow", "happy": "sad", "war": "peace",
    },
    "In {}, the currency is the": {"Japan": "yen", "India": "rupee", "China": "yuan", "Russia": "ruble", "Sweden": "krona"},
    "{} worked in the field of": {
        "Isaac Newton": "physics", "Marie Curie": "chemistry", "Sigmund Freud": "psychology", "Edwin Hubble": "astronomy",
        "Adam Smith": "economics", "Euclid": "mathematics",
    },
    "{} is located in the city of": {
        "The Eiffel Tower": "Paris", "The Colosseum": "Rome", "The Kremlin": "Moscow", "The Parthenon": "Athens",
        "Big Ben": "London", "The Hagia Sophia": "Istanbul",
    },
    "The city of {} is located in the country of": {
        "Munich": "Germany", "Milan": "Italy", "Barcelona": "Spain", "Osaka": "Japan", "Mumbai": "India", "Toronto": "Canada",
    },
}  # fmt: skip
MORE_CONTINENTS = ("America", "Australia")


def group(name: str) -> dict[str, str]:
    """Country -> capital: every third one."""
    return dict(list(CAPITALS.items())[GROUPS.index(name) :: len(GROUPS)])


def edit_rows(name: str) -> list[dict[str, object]]:
    """A group of capitals as facts for an edit."""
    return [
        {
            "id": f"capital-{country.lower().replace(' ', '-')}",
            "prompt": WORDINGS[0].replace("{}", "{subject}"),
            "subject": country,
            "target": capital,
            "paraphrases": [w.replace("{}", "{subject}") for w in WORDINGS[1:]],
        }
        for country, capital in group(name).items()
    ]


def capital_rows(name: str) -> list[dict[str, object]]:
    """A group of capitals in all wordings; a cluster is a country."""
    found: list[dict[str, object]] = []
    for country, capital in group(name).items():
        for wording in WORDINGS:
            wrong = shuffled(group(name).values(), country)
            found.append(_row(f"capitals-{name}", len(found), country, wording.format(country), capital, wrong))
    return found


def far_rows() -> list[dict[str, object]]:
    """Facts of other kinds; a cluster is a kind."""
    found: list[dict[str, object]] = []
    for number, (wording, table) in enumerate(FAR.items()):
        for key, answer in table.items():
            wrong = shuffled({*table.values(), *(MORE_CONTINENTS if answer in ("Africa", "Europe", "Asia") else ())}, key)
            found.append(_row("known-facts", len(found), f"t{number + 1:02d}", wording.format(key), answer, wrong))
    return found


def _row(task: str, index: int, cluster: str, prompt: str, answer: str, wrong: list[str]) -> dict[str, object]:
    gold = index % 4
    return {
        "id": f"{task}-{index:05d}",
        "cluster": cluster,
        "prompt": prompt,
        "answer": answer,
        "choices": place(answer, wrong, gold, task, prompt),
        "gold": gold,
    }
