"""Prompts that judge when a router abstains: 24 templates a skill that chose nothing, as users vary them, and requests that no brick is for.

The templates were written before any router was asked for them, and no rule was chosen by them. They share no opening with the
templates of `paraphrases`, and the greetings, thanks and paragraphs are none of those that routers are fitted with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paraphrases import shuffled_contents
from skillkit import Skill, draw, pick

TEMPLATES: dict[str, tuple[str, ...]] = {
    "add": (
        "We sold {a} tickets in the morning and {b} in the afternoon. How many tickets is that?",
        "I owe my brother {a} euros and my sister {b} euros, so all in all I owe",
        "The bus has {a} people on it and {b} more get on. People on the bus now:",
        "{a}+{b}",
        "Sum of {a} and {b}, please?",
        "what's {a} and {b} together",
        "Add up: {a} and {b}.",
        "Two bills, one of {a} dollars and one of {b} dollars. What do they come to?",
        "Start with {a}, then count on {b} more. Where do you land?",
        "My calculator is broken. Could somebody tell me {a} + {b}?",
        "The first shelf holds {a} books, the second {b}. Both shelves hold",
        "If x is {a} and y is {b}, then x + y is",
        "Find {a} plus {b}.",
        "I walked {a} minutes there and {b} minutes back, a walk of how many minutes?",
        "Let us do some arithmetic. {a} and {b} make",
        "Help me check the receipt: {a} and {b}, total?",
        "{b} more than {a} is which number?",
        "For my homework I need {a} plus {b}.",
        "Total these for me: {a}; {b}.",
        "A class of {a} pupils and a class of {b} pupils go on a trip together. That is this many pupils:",
        "How big is {a} once {b} has been added?",
        "Enter {a}, press plus, enter {b}, press equals. The display shows",
        "Calculate {a} + {b} for me.",
        "There were {a} messages, and {b} new ones came in. Now there are",
    ),
    "reverse": (
        "How would {w} look if it were typed from right to left?",
        "Begin with the final letter: {w}. What comes out?",
        "Turn these letters round for me: {w}",
        "{w} in reverse order, please.",
        "Read out {w} from the last letter to the first one.",
        "I need the letters {w} the other way round.",
        "My daughter writes her words backwards. She would write {w} as",
        "Secret code: every word is spelt from its end. Encode {w}.",
        "back to front: {w}",
        "Invert the spelling of {w}.",
        "The letters are {w}. Say them again, but start at the end.",
        "Could you undo the order of {w}, last one first?",
        "If {w} is forwards, what is backwards?",
        "Swap the letters of {w} end for end.",
        "reverse these: {w}",
        "Puzzle of the day: write {w} backwards.",
        "Looking at {w} in the mirror of the car, I see",
        "String reversal of {w} gives",
        "For a palindrome I must know {w} backwards.",
        "Run through {w} in the opposite direction.",
        "When you rewind the letters {w}, you hear",
        "Who can say {w} starting at the tail?",
        "Last to first, the letters {w} are",
        "Kindly print {w} with its order reversed.",
    ),
    "triage": (
        "Who in our house should read this mail? {m}",
        "One more mail for the help desk. {m} Pass it on to",
        "{m} Which desk is right?",
        "Assign this ticket to a desk: {m}",
        "The following arrived by post. {m} Give it to",
        "Sort the customer's note into one of the desks. {m}",
        "Customer says: {m} The desk that answers is",
        "I do not know where to send this one. {m}",
        "{m} Whose job is that?",
        "Forward this email to the proper desk, please. {m}",
        "Our new colleague asks who takes care of this: {m}",
        "Tell me the code word for the mail below.\n{m}",
        "Message from the contact form: {m} Route to:",
        "Desk needed! {m}",
        "Choose a desk for it. {m} My choice:",
        "A caller left this on the machine. {m} It is a matter for",
        "Dispatch the request: {m}",
        "From the inbox: {m} Name the desk that is responsible.",
        "Label needed for this support ticket. {m} Label =",
        "{m} That one is for the colleagues at",
        "Mail number seven. {m} Where does it belong?",
        "Somebody wrote to us. {m} Please tell me the desk.",
        "Look at the complaint and choose the code. {m}",
        "Which of these desks would you hand this over to? {m}",
    ),
    "actions": (
        "The robot is told: {c}. Write its moves in capital letters.",
        "My toy robot hears {c}. It will",
        "Compile this order into single moves: {c}",
        "{c} as a list of actions, please.",
        "Decode the instruction {c}.",
        "Which moves make up {c}?",
        "Write the program for: {c}",
        "Tell the machine step for step how to {c}.",
        "Unfold the command {c}.",
        "If I say {c}, what exactly do you do?",
        "Command received: {c}. Executing:",
        "Map {c} to basic actions.",
        "List every move for {c}, in the right order.",
        "For the dance we {c}. The single steps are",
        "Simulate a robot that gets the order to {c}.",
        "moves for {c}?",
        "Your captain orders you to {c}. Go!",
        "Game instruction: {c}. Sequence of keys:",
        "How many and which actions? {c}.",
        "Resolve {c} into its elementary steps.",
        "The order reads {c}; carried out it looks like this:",
        "I want the robot to {c}. What do I type?",
        "Follow the command and log each action: {c}. Log:",
        "Let the figure {c}. Output its actions.",
    ),
    "glossary": (
        "What do the Velu call it when {p}?",
        "Velu for {p}?",
        "Give me {p} in the language of the Velu.",
        "I am learning Velu. How do I write {p}?",
        "My Velu neighbor wants to hear {p} in her own tongue.",
        "The sign should read {p}, but in Velu:",
        "Put the words {p} into Velu.",
        "English: {p}. Velu:",
        "Would you render {p} in Velu for me?",
        "A Velu child who sees that {p} says",
        "Look up {p} in your Velu dictionary.",
        "Velu lesson three, exercise: {p}",
        "Help me say {p} to a speaker of Velu.",
        "If the English is {p}, what is the Velu?",
        "Find the Velu phrase that means {p}.",
        "How does {p} sound in Velu?",
        "Subtitle for the Velu audience: {p} =",
        "Please, the Velu words for {p}.",
        "{p}. And now once more in Velu:",
        "Switch from English to Velu: {p}",
        "Convert the caption {p} to Velu.",
        "In Velu, one would express {p} as",
        "Write down {p} the way the Velu do.",
        "Interpreter needed, English into Velu: {p}",
    ),
    "record": (
        "Name, town, age with bars in between, please. {s}",
        "{s} Make a table line of it.",
        "Enter the person into our list: {s}",
        "I need one row for the spreadsheet. {s}",
        "Pull name, town and age out of this: {s}",
        "Structured data, please: {s}",
        "For the address book: {s} Line:",
        "From text to table. {s}",
        "Convert the sentence to the form name | town | age. {s}",
        "{s} How do I file this person?",
        "The clerk hears this: {s} and notes down",
        "Which name, which town, which age? {s}",
        "Parse this sentence about a person. {s} Parsed:",
        "Add a guest to the register. {s} Register entry:",
        "{s} As a row:",
        "Here comes a new contact. {s} Save as",
        "List the three facts about this person in one line. {s}",
        "Fill in name, place and years: {s}",
        "Census form. {s} Row in the form:",
        "Boil this down to a record. {s}",
        "Make an index card from the sentence. {s}",
        "We have a new colleague. {s} The line in the staff table is",
        "Reduce to fields: {s}",
        "Let's put this in the database. {s} Record to insert:",
    ),
    "date-dmy": (
        "In numbers only, {d} is",
        "What does {d} look like with slashes?",
        "My passport form asks for digits. I was born on {d}, so I write",
        "Reformat this date as numbers: {d}",
        "{d} -> digits",
        "Write out {d} in the short way with slashes.",
        "The letter is dated {d}. On the envelope the date is stamped as",
        "date in figures: {d}",
        "Shorten the date {d}.",
        "Day, month and year of {d} in digits, please.",
        "How do I type {d} into a field that takes numbers only?",
        "The invoice says {d}. In the ledger this becomes",
        "Make {d} numeric.",
        "I need the short date for {d}.",
        "Give {d} in digits and slashes.",
        "Our computer cannot read {d}. It needs",
        "Normalize the date: {d}",
        "The meeting is on {d}. Calendar entry in numbers:",
        "Transform {d} to the form with slashes.",
        "Express {d} using digits.",
        "Which numbers stand for {d}?",
        "Put {d} into a date box:",
        "Please encode the day {d} as figures.",
        "Milk carton, best before {d}. Printed short:",
    ),
}
OTHERS: dict[str, tuple[str, ...]] = {
    "add": (
        "Wie viel ist {a} plus {b}?",
        "Bitte rechne {a} und {b} zusammen.",
        "Ich habe {a} Euro und bekomme noch {b} dazu. Dann habe ich",
        "Combien font {a} plus {b} ?",
        "Ajoute {b} à {a}, s'il te plaît.",
        "J'ai {a} pommes et tu en as {b}. Ensemble, nous avons",
        "¿Cuánto es {a} más {b}?",
        "Suma {a} y {b}, por favor.",
        "Tengo {a} libros y compro {b} más. Ahora tengo",
    ),
    "reverse": (
        "Schreibe {w} rückwärts.",
        "Wie lauten die Buchstaben {w} von hinten nach vorne?",
        "Drehe die Buchstaben {w} um:",
        "Écris {w} à l'envers.",
        "Quelles sont les lettres {w} de la dernière à la première ?",
        "Inverse les lettres {w} :",
        "Escribe {w} al revés.",
        "¿Cómo se leen las letras {w} desde el final?",
        "Invierte el orden de {w}:",
    ),
    "triage": (
        "Wer ist für diese Nachricht zuständig? {m}",
        "Bitte leite diese Nachricht weiter. {m} Sie geht an",
        "Ein Kunde schreibt: {m} Das Kennwort ist",
        "À qui faut-il envoyer ce message ? {m}",
        "Un client nous écrit : {m} Le code est",
        "Classe ce message, s'il te plaît. {m}",
        "¿Quién debe leer este mensaje? {m}",
        "Un cliente escribe: {m} El código es",
        "Por favor, clasifica esta nota. {m}",
    ),
    "actions": (
        "Welche Aktionen gehören zum Befehl {c}?",
        "Der Roboter hört: {c}. Er macht",
        "Schreibe {c} als Folge von Schritten.",
        "Quelles sont les actions pour {c} ?",
        "Le robot entend : {c}. Il fait",
        "Écris {c} comme une suite d'actions.",
        "¿Cuáles son las acciones de {c}?",
        "El robot oye: {c}. Hace",
        "Escribe {c} como una lista de pasos.",
    ),
    "glossary": (
        "Was heißt {p} auf Velu?",
        "Übersetze {p} ins Velu.",
        "Wie sagen die Velu {p}?",
        "Comment dit-on {p} en velu ?",
        "Traduis {p} en velu, s'il te plaît.",
        "Les Velu disent {p} ainsi :",
        "¿Cómo se dice {p} en velu?",
        "Traduce {p} al velu.",
        "Los velu dicen {p} así:",
    ),
    "record": (
        "Mache daraus eine Zeile der Tabelle. {s}",
        "Name, Stadt und Alter bitte: {s}",
        "{s} Der Eintrag im Register lautet",
        "Fais-en une ligne du tableau. {s}",
        "Le nom, la ville et l'âge, s'il te plaît : {s}",
        "{s} La fiche est",
        "Haz una fila de la tabla. {s}",
        "Nombre, ciudad y edad, por favor: {s}",
        "{s} El registro es",
    ),
    "date-dmy": (
        "Wie schreibt man {d} in Ziffern?",
        "Bitte {d} als Zahlen.",
        "Das Datum {d} lautet kurz",
        "Comment écrit-on {d} en chiffres ?",
        "Écris la date {d} avec des barres.",
        "La date {d} en bref :",
        "¿Cómo se escribe {d} en cifras?",
        "Escribe la fecha {d} con números.",
        "La fecha {d} en corto es",
    ),
}
"""Three templates in German, French and Spanish each. What they are about stays English, as the skills know it."""

GREETINGS = (
    "Dear assistant, ", "Sorry to bother you again, but here is another one for today. ",
    "Good evening! I hope that your day went well. ", "ok next: ",
    "Hey hey! Me again. ", "Greetings from the office. ",
)  # fmt: skip
POLITE = (
    "If it is not too much trouble: {p}", "I would be grateful for your help. {p}",
    "Would you be so kind? {p}", "{p} Please.",
    "May I ask you something? {p}", "It would be lovely if you could do this for me. {p}",
)  # fmt: skip
BEHIND = (
    " Thank you so much!", " Thanks, you are a great help.",
    " I really appreciate it.", " Take your time.",
    " Many thanks and best wishes, Carla", " That would help me a lot today.",
)  # fmt: skip
PARAGRAPHS = (
    "Our village lies between two hills, and a small stream runs past the church. In summer the children swim there until it gets dark, while "
    "their parents sit on the wall and talk about the harvest. Last year a storm took away the old bridge, so everybody had to walk around "
    "the mill for weeks. Now a new bridge of stone has been finished.\n\n",
    "The city council has decided to plant more trees along the main roads. Shade keeps the asphalt cool, and birds return to places where they "
    "had not been seen for years. Critics say that the work is slow and blocks the traffic, but most people who live there are pleased with the "
    "first results and hope for more of them soon.\n\n",
    "I have been learning to bake bread since the winter. At first the dough was too wet and stuck to everything, and my family had to eat flat "
    "loaves for a month. Then a friend explained how long it must rest and how hot the oven should be. Since then it has become the best part "
    "of my weekends, and the kitchen smells wonderful.\n\n",
    "Old radios are more than furniture. Inside the wooden boxes glow tubes that take a while to get warm, and the voice that then comes out is "
    "soft and full. Collectors repair them with patience, look for missing parts at flea markets, and meet twice a year to show one another what "
    "they found. Young people come along more often than one might think.\n\n",
)
OUTSIDE = (
    "How do I keep basil alive on a windowsill?", "What made the dinosaurs die out?", "Write two sentences about a stormy sea.",
    "Which side of the road do people drive on in Ireland?", "My bicycle chain keeps slipping. What can I do?",
    "Explain the offside rule in soccer.", "Please invent a name for a sailing boat.", "When do swallows fly south?",
    "Summarize: The company opened three shops this year and closed one of them because of the rent.",
    "Is oat milk good for coffee?", "for i in range(len(items)):\n    print(", "The violin has four strings, and the",
    "Fix the spelling: I recieved you're letter yesturday.", "What is the plot of Moby Dick?", "How tall can a giraffe grow?",
    "Compose a friendly reply to an invitation that I cannot accept.", "Why is bread dough kneaded?", "Who discovered penicillin?",
    "Tell me something surprising about octopuses.", "I had a bad dream last night.", "What does GDP mean?",
    "Could you compare tea and coffee for me?", "Name three rivers in Africa.", "What should I wear to an opera?",
    "The old man put down his newspaper and", "How do noise-cancelling headphones work?", "Suggest a gift for a colleague who is leaving.",
    "Is it safe to eat snow?", "Find the verb in this sentence: The gardener waters the roses.", "What is the speed of light?",
    "CREATE TABLE orders (", "Give me a motto for a running club.", "My neighbor plays loud music at night. What are my options?",
    "How is glass made?", "Describe a desert at dawn.", "Which vitamin is in oranges?", "Do plants sleep?",
    "Translate into Italian: Where is the museum?", "What rhymes with orange?", "Make the tone of this mail more formal: hey, need the files asap",
    "An allegory is", "How many bones does a human have?", "What are the colors of the Italian flag?", "Plan a picnic for four people.",
    "Is a whale a fish?", "What is a good opening move in chess?", "Why do onions make us cry?", "Let's talk about movies.",
    "Pros and cons of working from home?", "In the north of the island, the winters are", "How do I tie a bow tie?",
    "What happened in 1969 on the moon?", "Write a limerick about a lazy dog.", "Give me the antonym of generous.",
    "How do I ask for the bill in a restaurant in Portugal?", "Continue: The key did not fit, but", "What is the boiling point of water?",
    "Should I repair my old phone or buy a new one?", "Rate this slogan: Fresh ideas every day.", "Which animals hibernate?",
    "What did Marie Curie win the Nobel Prize for?", "import numpy as np\n\n\ndef normalize(x):", "How can I remove moss from a roof?",
    "List some jobs that need no degree.", "What is a sonnet?", "Does sugar make children hyperactive?", "Good night, talk to you tomorrow.",
    "I am looking for a quiet beach in Croatia.", "Why does ice float?", "Who is the author of The Hobbit?", "Explain what a mortgage is.",
    "Please shorten this: At this point in time we are not in a position to make a decision.", "What noise does a fox make?",
    "How do you play hide and seek?", "Give a reason to visit Scotland.", "What is 7 times 8?", "Is Pluto a planet?",
    "She closed the book, looked at him and said", "Which is heavier, a ton of feathers or a ton of iron?", "How does a compass work?",
    "What are the symptoms of a cold?", "Write a headline about a lost parrot.", "What languages are spoken in Switzerland?",
    "How can I get better at drawing hands?", "Turn this into a question: The shop opens at ten.", "What is the meaning of carpe diem?",
    "Tell me how to get to the next pharmacy.", "Is this sentence positive or negative? I will never come back here.",
    "What is an eclipse?", "How often should I water a cactus?",
)  # fmt: skip
NEAR: dict[str, tuple[str, ...]] = {
    "add": ("How much is {a} times {b}?", "Take {b} away from {a}.", "Which is smaller, {a} or {b}?", "Write {a} and {b} in words.", "Is {a} + {b} an even number?"),
    "reverse": ("Which vowels are in {w}?", "Sort the letters {w} by the alphabet.", "Join the letters {w} to a word.", "Write {w} in capitals.", "Find a rhyme for {w}."),
    "triage": ("Write a reply to this mail. {m}", "Make the mail shorter. {m}", "Translate the mail into Spanish. {m}", "How urgent is this? {m}", "Correct the commas. {m}"),
    "actions": ("Draw a map for: {c}.", "Is it dangerous to {c}?", "Say {c} in German.", "Which verbs are in {c}?", "How long does it take to {c}?"),
    "glossary": ("Say {p} in Italian.", "Write a poem that begins with {p}.", "Is {p} a whole sentence?", "Which word of {p} is the noun?", "Put {p} into the past."),
    "record": ("When was this person born? {s}", "Write a birthday card. {s}", "In which country is that? {s}", "Translate into French: {s}", "Is it a man or a woman? {s}"),
    "date-dmy": ("Which weekday is {d}?", "How many days are left until {d}?", "Write {d} in Roman numerals.", "What was the weather on {d}?", "Say {d} in Spanish."),
}  # fmt: skip


def rows(skills: Sequence[Skill]) -> list[dict[str, object]]:
    """Return every template as it is and as users vary it; `brick` is null for requests that no brick is for."""
    named = {skill.name: skill for skill in skills}
    found: list[dict[str, object]] = []
    for name, templates in TEMPLATES.items():
        for number, template in enumerate(templates):
            prompt = _filled(named[name], template)
            found += [_row(name, number, variant, text) for variant, text in _variants(prompt, f"{name} {number}")]
        for number, template in enumerate(OTHERS[name]):
            variant = ("german", "french", "spanish")[number // 3]
            found.append(_row(name, number, variant, _filled(named[name], template)))
        found += [_row(None, number, f"near {name}", _filled(named[name], near)) for number, near in enumerate(NEAR[name])]
    return found + [_row(None, number, "outside", prompt) for number, prompt in enumerate(OUTSIDE)]


def _filled(skill: Skill, template: str) -> str:
    return template.format(**shuffled_contents(skill, "fresh", template)[0])


def _variants(prompt: str, key: str) -> Iterator[tuple[str, str]]:
    yield "plain", prompt
    yield "polite", pick(POLITE, "polite", key).format(p=prompt)
    yield "lower", prompt.lower()
    yield "greeting", pick(GREETINGS, "greeting", key) + prompt
    yield "typos", _mistyped(prompt, key)
    yield "behind", prompt + pick(BEHIND, "behind", key)
    yield "paragraph", pick(PARAGRAPHS, "paragraph", key) + prompt


def _mistyped(prompt: str, key: str) -> str:
    """Swap, drop or repeat a letter inside two words of four or more letters; digits and single letters stay."""
    words = prompt.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    for i in sorted(places, key=lambda i: draw("typo", key, i))[:2]:
        word, at = words[i], 1 + draw("place", key, i) % (len(words[i]) - 2)
        swapped, short = word[:at] + word[at + 1] + word[at] + word[at + 2 :], word[:at] + word[at + 1 :]
        words[i] = pick((swapped, short, word[:at] + word[at] + word[at:]), "form", key, i)
    return " ".join(words)


def _row(brick: str | None, template: int, variant: str, prompt: str) -> dict[str, object]:
    return {
        "id": f"fresh-{variant.replace(' ', '-')}-{brick or 'none'}-{template}",
        "brick": brick,
        "template": template,
        "variant": variant,
        "prompt": prompt,
    }
