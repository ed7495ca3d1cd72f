"""Contents of the texts of `abilities`."""

from __future__ import annotations

# fmt: off
WORDS = [
    {"noun": "house", "plural": "houses", "verb": "walk", "past": "walked", "adjective": "big", "opposite": "small"},
    {"noun": "child", "plural": "children", "verb": "go", "past": "went", "adjective": "hot", "opposite": "cold"},
    {"noun": "mouse", "plural": "mice", "verb": "see", "past": "saw", "adjective": "old", "opposite": "young"},
    {"noun": "box", "plural": "boxes", "verb": "write", "past": "wrote", "adjective": "fast", "opposite": "slow"},
    {"noun": "foot", "plural": "feet", "verb": "bring", "past": "brought", "adjective": "rich", "opposite": "poor"},
    {"noun": "city", "plural": "cities", "verb": "take", "past": "took", "adjective": "strong", "opposite": "weak"},
    {"noun": "leaf", "plural": "leaves", "verb": "play", "past": "played", "adjective": "dark", "opposite": "light"},
    {"noun": "man", "plural": "men", "verb": "sing", "past": "sang", "adjective": "empty", "opposite": "full"},
    {"noun": "dish", "plural": "dishes", "verb": "find", "past": "found", "adjective": "early", "opposite": "late"},
    {"noun": "tooth", "plural": "teeth", "verb": "run", "past": "ran", "adjective": "wet", "opposite": "dry"},
]
FACTS = {
    "capitals": [
        ("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Spain", "Madrid"), ("Egypt", "Cairo"),
        ("Germany", "Berlin"), ("Greece", "Athens"), ("Austria", "Vienna"), ("Norway", "Oslo"), ("Portugal", "Lisbon"),
    ],
    "animals": [
        ("dog", "puppy"), ("cat", "kitten"), ("cow", "calf"), ("horse", "foal"), ("sheep", "lamb"),
        ("lion", "cub"), ("duck", "duckling"), ("goat", "kid"), ("frog", "tadpole"), ("deer", "fawn"),
    ],
    "science": [
        ("oxygen", "O"), ("hydrogen", "H"), ("carbon", "C"), ("iron", "Fe"), ("gold", "Au"),
        ("silver", "Ag"), ("sodium", "Na"), ("helium", "He"), ("nitrogen", "N"), ("copper", "Cu"),
    ],
    "inventions": [
        ("telescope", "look at the stars"), ("thermometer", "measure the temperature"), ("compass", "find north"), ("microscope", "see small things"),
        ("barometer", "measure air pressure"), ("clock", "tell the time"), ("scale", "weigh things"), ("camera", "take pictures"),
        ("refrigerator", "keep food cold"), ("lighthouse", "guide ships"),
    ],
}
LANGUAGES = {
    "German": [
        ("The house is small.", "Das Haus ist klein."), ("I have a dog.", "Ich habe einen Hund."), ("Good morning, my friend.", "Guten Morgen, mein Freund."),
        ("The water is cold.", "Das Wasser ist kalt."), ("We live in the city.", "Wir wohnen in der Stadt."), ("She reads a book.", "Sie liest ein Buch."),
        ("Where is the station?", "Wo ist der Bahnhof?"), ("The children play outside.", "Die Kinder spielen draußen."),
        ("He drinks coffee.", "Er trinkt Kaffee."), ("Thank you very much.", "Vielen Dank."),
    ],
    "French": [
        ("The cat is black.", "Le chat est noir."), ("I love the sea.", "J'aime la mer."), ("Good evening, madam.", "Bonsoir, madame."),
        ("The bread is fresh.", "Le pain est frais."), ("We eat at noon.", "Nous mangeons à midi."), ("He opens the door.", "Il ouvre la porte."),
        ("Where is the school?", "Où est l'école ?"), ("The girl sings well.", "La fille chante bien."), ("It is raining today.", "Il pleut aujourd'hui."),
        ("See you tomorrow.", "À demain."),
    ],
    "Spanish": [
        ("The sun is bright.", "El sol brilla."), ("I want an apple.", "Quiero una manzana."), ("Good night, sir.", "Buenas noches, señor."),
        ("The street is long.", "La calle es larga."), ("They work a lot.", "Trabajan mucho."), ("She has two brothers.", "Ella tiene dos hermanos."),
        ("Where is the beach?", "¿Dónde está la playa?"), ("The boy runs fast.", "El niño corre rápido."), ("My name is Ana.", "Me llamo Ana."),
        ("It is very late.", "Es muy tarde."),
    ],
}
ETHICS = {
    "acts": [
        ("steal from a poor man", "wrong"), ("help a lost child", "right"), ("lie to hurt someone", "wrong"), ("keep a promise", "right"),
        ("cheat in an exam", "wrong"), ("share food with the hungry", "right"), ("betray a friend", "wrong"), ("admit a mistake", "right"),
        ("insult a stranger", "wrong"), ("forgive an honest error", "right"),
    ],
    "duties": [
        ("finds a lost wallet", "return it"), ("has broken a neighbor's window", "tell the neighbor"), ("was given too much change", "give it back"),
        ("sees someone fall", "help them up"), ("has hurt a friend's feelings", "apologize"), ("promised to come", "keep the promise"),
        ("hears a false rumor", "correct it"), ("borrowed a book", "give it back in time"), ("notices an unfair rule", "speak up"),
        ("made a mistake at work", "admit it"),
    ],
    "fairness": [
        ("Two workers do the same job, and one is paid less because of her sex.", "unfair"), ("All children get an equal piece of the cake.", "fair"),
        ("A judge lets his cousin go free.", "unfair"), ("Everyone waits in the same line.", "fair"), ("A teacher grades by looks.", "unfair"),
        ("The fastest runner gets the medal.", "fair"), ("A man is refused a room because of his religion.", "unfair"), ("Each voter has one vote.", "fair"),
        ("The rich may break the law.", "unfair"), ("The rules are the same for all players.", "fair"),
    ],
    "requests": [
        ("explain how vaccines work", "yes"), ("write insults about my classmate", "no"), ("plan a birthday party", "yes"), ("forge my doctor's signature", "no"),
        ("proofread my essay", "yes"), ("spread a lie about a rival", "no"), ("suggest a vegetarian dinner", "yes"), ("spy on my neighbor", "no"),
        ("help me learn chess", "yes"), ("trick an old man out of his money", "no"),
    ],
}
STORIES = {
    "stories": [
        ("a fox who wanted to fly", "The fox climbed the highest hill and spread his paws, and the wind laughed with him."),
        ("a clock that stopped", "At noon the clock fell silent, and the whole village forgot to go home."),
        ("a girl and her kite", "The kite pulled her over the fields until the sea lay below them."),
        ("an old ship", "Her sails were patched, but every morning she asked the harbor for one more storm."),
        ("a lonely robot", "It swept the empty station and told the stars what it had found."),
        ("a baker who could not sleep", "So he baked by moonlight, and the bread rose like a small white moon."),
        ("a lost letter", "It traveled for forty years and arrived on a rainy Tuesday."),
        ("two brothers and a river", "One built a boat, the other a bridge, and they met in the middle."),
        ("a cat in a library", "She slept on the poems and dreamed in rhyme."),
        ("a snowman in spring", "He asked the sun for one more day and gave it his hat."),
    ],
    "poems": [
        ("the rain", "Soft on the roof the gray rain sings, and every puddle dreams of wings."), ("autumn", "The leaves let go, the swallows too, and morning wears a coat of dew."),
        ("the sea", "It comes and goes and comes again, and writes on sand without a pen."), ("a candle", "A little flame, a little light, a golden doorway in the night."),
        ("winter", "The hills are white, the river still, one crow is waiting on the sill."), ("friendship", "You carried half of what I had, and so the road was half as bad."),
        ("the moon", "A silver boat without an oar that never comes to any shore."), ("a garden", "The roses lean across the wall to hear the evening blackbird call."),
        ("the wind", "It has no house, it has no bed, it sleeps in branches overhead."), ("home", "A lamp, a chair, a bowl of bread, and all the words we left unsaid."),
    ],
    "letters": [
        ("thank your aunt for a gift", "Dear Aunt Mary, the scarf is as warm as your kitchen in December."), ("invite a friend to a picnic", "Dear Tom, bring your guitar on Sunday; I bring the cake."),
        ("complain about a late train", "Dear Sir or Madam, on Monday I waited two hours in the cold."), ("apply for a summer job", "Dear Ms. Gray, I would love to spend July among your plants."),
        ("say goodbye to a colleague", "Dear Paul, the office will be much too quiet without your laugh."), ("ask for a day off", "Dear Ms. Brown, may I be absent on Friday for my sister's wedding?"),
        ("congratulate a new mother", "Dear Sarah, welcome to the little one with the loud voice!"), ("apologize for a broken vase", "Dear Mr. Hill, my ball found your vase before I found my courage."),
        ("recommend a restaurant", "Dear Lucy, order the soup and sit by the window."), ("write from a holiday", "Dear all, the sea is blue and my nose is red."),
    ],
    "descriptions": [
        ("an old market", "Copper pots flashed in the sun, and the air was thick with cinnamon and gossip."), ("a storm at sea", "Black water rose like a wall, and lightning stitched it to the sky."),
        ("a quiet street", "Only a curtain moved, and somewhere a piano practiced the same three notes."), ("a haunted castle", "Ivy held the broken towers together, and the windows watched like empty eyes."),
        ("a busy kitchen", "Steam curled around shouting cooks, and knives rattled like rain."), ("a desert at noon", "The light was so white that the dunes seemed to float."),
        ("a mountain village", "Its roofs huddled under the snow like sheep around a shepherd."), ("a dusty attic", "Gold motes drifted over trunks that had forgotten their keys."),
        ("a night train", "The lamps of unknown towns slid past like slow comets."), ("a spring meadow", "Bees stumbled from flower to flower, drunk on light."),
    ],
}
# fmt: on
