"""Tables of the retention task: nouns, minimal pairs and common facts, 24 rows a paradigm."""

# ruff: noqa: SIM905 - word lists read better as text

from __future__ import annotations

NOUNS = tuple(
    (one, many)
    for one, many in (
        pair.split("/")
        for pair in (
            "key/keys cabinet/cabinets car/cars house/houses teacher/teachers student/students door/doors "
            "window/windows picture/pictures river/rivers farmer/farmers doctor/doctors table/tables lamp/lamps "
            "flower/flowers bottle/bottles singer/singers bridge/bridges road/roads tree/trees letter/letters "
            "dog/dogs cat/cats horse/horses chair/chairs machine/machines engine/engines garden/gardens"
        ).split()
    )
)

NAMES = tuple("Anna Ben Clara David Emma Frank Grace Henry Julia Kevin Laura Mark Nina Oliver Paul Rose Sam Tom".split())

OBJECTS = tuple(
    "apple ball bell book boat box cake chair clock coat cup desk drum fish flag flute fork glass hat horse key kite "
    "knife lamp map mirror nail pen piano plate ring rope shoe spoon star stone table tent tree wheel".split()
)


def _frames(frames: str, subjects: str, right: str, wrong: str) -> list[tuple[str, str, str]]:
    """Every frame with every subject."""
    return [
        (frame.strip().format(subject.strip()), right, wrong) for subject in subjects.split(",") for frame in frames.split("|")
    ]


# The right word first. A frame is filled with each subject.
GRAMMAR: dict[str, list[tuple[str, str, str]]] = {
    "reflexive": [
        *_frames("My {} saw|The {} blamed|Her {} hurt", "mother,sister,daughter,aunt", "herself", "himself"),
        *_frames("My {} saw|The {} blamed|Her {} hurt", "father,brother,son,uncle", "himself", "herself"),
    ],
    "reflexive-number": [
        *_frames("The {} enjoyed|All the {} washed|Those {} saw", "boys,women,workers,girls", "themselves", "himself"),
        *_frames("The {} enjoyed|That old {} washed|This {} saw", "man,king,boy,actor", "himself", "themselves"),
    ],
    "determiner": [
        *_frames("She bought these {}|He likes those {}|I found many {}", "red,old,big,small", "books", "book"),
        *_frames("She bought this {}|He likes that {}|I found one {}", "red,old,big,small", "book", "books"),
    ],
    "article": [
        *_frames("{} an", "For lunch she ate,In the bag there is,He drew", "apple", "banana"),
        *_frames("{} an", "We talked about,The cook used,I would like", "orange", "lemon"),
        *_frames("{} an", "The child held,On the plate was,They sold", "egg", "fish"),
        *_frames("{} an", "In the zoo we saw,It looks like,She dreamt of", "elephant", "lion"),
        *_frames("{} a", "For lunch she ate,In the bag there is,He drew", "banana", "apple"),
        *_frames("{} a", "We talked about,The cook used,I would like", "lemon", "orange"),
        *_frames("{} a", "The child held,On the plate was,They sold", "fish", "egg"),
        *_frames("{} a", "In the zoo we saw,It looks like,She dreamt of", "lion", "elephant"),
    ],
    "tense": [
        *_frames("Yesterday {}|Last year {}|Two days ago {}", "she,he", "went", "goes"),
        *_frames("Yesterday {}|Last year {}|Two days ago {}", "my sister,the boy", "came", "comes"),
        *_frames("Every day {}|Each morning {}|Right now {}", "she,he", "goes", "gone"),
        *_frames("Every day {}|Each morning {}|Most of the time {}", "my sister,the boy", "comes", "came to be"),
    ],
    "after-modal": [
        *_frames("They {} always|We {} never|You {} soon", "will,can,must,should", "go", "went"),
        *_frames("They {} always|We {} never|You {} just", "have,had", "gone", "go"),
        *_frames("Now they {} not|We {} still|You {} already", "are,were", "going", "goes"),
    ],
    "comparative": [
        *_frames("{} is much|{} is a little|{} is far", "The red car,This road,Our house,My bag", "bigger than", "biggest than"),
        *_frames("{} is the|{} was by far the|{} became the", "The red car,This road,Our house,My bag", "biggest of all", "bigger of all"),
    ],
}  # fmt: skip


def _table(text: str) -> dict[str, str]:
    """`key=answer` entries, parted by commas."""
    return dict(entry.strip().split("=") for entry in text.replace("\n", " ").split(","))


FACTS: dict[str, tuple[str, dict[str, str]]] = {
    "capital": ("The capital of {} is", _table(
        """France=Paris, Italy=Rome, Spain=Madrid, Germany=Berlin, England=London, Russia=Moscow, Japan=Tokyo,
        China=Beijing, Greece=Athens, Austria=Vienna, Egypt=Cairo, Portugal=Lisbon, Poland=Warsaw, Norway=Oslo,
        Sweden=Stockholm, Denmark=Copenhagen, Hungary=Budapest, Ireland=Dublin, Cuba=Havana, Peru=Lima, Turkey=Ankara,
        Thailand=Bangkok, Finland=Helsinki, Kenya=Nairobi""")),
    "opposite": ("The opposite of {} is", _table(
        """hot=cold, big=small, up=down, left=right, open=closed, light=dark, happy=sad, fast=slow, old=new, rich=poor,
        strong=weak, good=bad, long=short, full=empty, wet=dry, high=low, early=late, day=night, black=white, love=hate,
        true=false, inside=outside, hard=soft, above=below""")),
    "next": ("The one that comes right after {} is", _table(
        """Monday=Tuesday, Tuesday=Wednesday, Wednesday=Thursday, Thursday=Friday, Friday=Saturday, Saturday=Sunday,
        Sunday=Monday, January=February, February=March, March=April, April=May, May=June, June=July, July=August,
        August=September, September=October, October=November, November=December, December=January, the first=the second,
        the second=the third, the third=the fourth, the fourth=the fifth, the fifth=the sixth""")),
    "count": ("Let us count: {},", _table(
        ", ".join(
            f"{a} {b} {c}={d}"
            for numbers in ["one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()]
            for a, b, c, d in zip(numbers, numbers[1:], numbers[2:], numbers[3:], strict=False)
        )
        + ", " + ", ".join(f"{n} {n + 1} {n + 2}={n + 3}" for n in range(3, 29, 2)))),
    "plural": ("One {}, two", _table(
        """child=children, man=men, woman=women, foot=feet, tooth=teeth, mouse=mice, goose=geese, person=people,
        leaf=leaves, knife=knives, wolf=wolves, box=boxes, city=cities, baby=babies, bus=buses, wife=wives, story=stories,
        church=churches, potato=potatoes, cat=cats, key=keys, glass=glasses, half=halves, fly=flies""")),
    "category": ("A word for the kind of thing that {} is:", _table(
        """a rose=flower, a tulip=flower, a daisy=flower, a hammer=tool, a saw=tool, a screwdriver=tool, a dog=animal,
        a horse=animal, a lion=animal, an apple=fruit, a pear=fruit, a banana=fruit, a piano=instrument,
        a violin=instrument, a guitar=instrument, a sofa=furniture, a wardrobe=furniture, a shirt=clothing,
        a jacket=clothing, a car=vehicle, a truck=vehicle, football=sport, tennis=sport, red=color""")),
    "young": ("The young one of a {} is called a", _table(
        """dog=puppy, cat=kitten, cow=calf, sheep=lamb, horse=foal, hen=chick, duck=duckling, lion=cub, goat=kid,
        frog=tadpole, pig=piglet, kangaroo=joey, deer=fawn, human=baby, butterfly=caterpillar, bear=cub, eagle=eaglet,
        goose=gosling, swan=cygnet, elephant=calf, whale=calf, tiger=cub, owl=owlet, king=prince""")),
    "past": ("Today I {}. Yesterday I", _table(
        """go=went, see=saw, eat=ate, come=came, take=took, give=gave, run=ran, write=wrote, make=made, buy=bought,
        think=thought, find=found, know=knew, sing=sang, drink=drank, sleep=slept, speak=spoke, fall=fell, leave=left,
        swim=swam, teach=taught, build=built, win=won, drive=drove""")),
    "digits": ("As a number, {} is written", _table(
        """one=1, two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, eleven=11, twelve=12,
        thirteen=13, fourteen=14, fifteen=15, sixteen=16, seventeen=17, eighteen=18, nineteen=19, twenty=20, thirty=30,
        forty=40, fifty=50, ninety=90""")),
    "language": ("Most people in {} speak", _table(
        """France=French, Spain=Spanish, Germany=German, Italy=Italian, Russia=Russian, China=Chinese, Japan=Japanese,
        Portugal=Portuguese, Poland=Polish, Greece=Greek, Turkey=Turkish, Sweden=Swedish, Norway=Norwegian,
        Denmark=Danish, Finland=Finnish, Hungary=Hungarian, Mexico=Spanish, Brazil=Portuguese, England=English,
        Australia=English, Austria=German, Argentina=Spanish, Korea=Korean, Thailand=Thai""")),
    "continent": ("{} is a country in", _table(
        """France=Europe, Spain=Europe, Germany=Europe, Poland=Europe, Sweden=Europe, Greece=Europe, China=Asia,
        Japan=Asia, India=Asia, Vietnam=Asia, Thailand=Asia, Nepal=Asia, Kenya=Africa, Nigeria=Africa, Ghana=Africa,
        Uganda=Africa, Zambia=Africa, Ethiopia=Africa, Brazil=South America, Peru=South America, Chile=South America,
        Argentina=South America, Colombia=South America, Bolivia=South America""")),
    "use": ("You use a {} to", _table(
        """knife=cut bread, pen=write a letter, broom=sweep the floor, key=open the lock, phone=call a friend,
        spoon=eat soup, oven=bake a cake, camera=take a picture, bed=sleep at night, bucket=carry water,
        ladder=climb to the roof, lamp=light the room, needle=sew a button, shovel=dig a hole, towel=dry your hands,
        clock=tell the time, hammer=drive in a nail, comb=tidy your hair, umbrella=stay dry in the rain,
        thermometer=measure the temperature, ruler=measure the length, stove=cook a meal, map=find the way,
        axe=chop wood""")),
    "worker": ("The person whose work it is to {} is a", _table(
        """teach children=teacher, bake bread=baker, fly planes=pilot, cut hair=barber, grow crops=farmer,
        put out fires=firefighter, treat the sick=doctor, write books=writer, catch fish=fisherman, paint pictures=painter,
        sing songs=singer, cook meals=chef, play the piano=pianist, repair teeth=dentist, drive a taxi=driver,
        guard prisoners=guard, take photographs=photographer, judge in court=judge, serve drinks=waiter,
        design houses=architect, act in films=actor, dance on stage=dancer, report the news=reporter,
        study the stars=astronomer""")),
}  # fmt: skip
