"""Common English words of four to seven letters, written for the `reverse` skill."""

# ruff: noqa: SIM905 - word lists read better as text

from __future__ import annotations

WORDS = tuple(
    """
    able acid actor again agent album alive amber angle ankle apple april apron arena armor arrow aspen atlas
    attic audio autumn award axis bacon badge baker banjo barrel basil basket beach beard beast berry bike
    birch bird blade blanket blaze blink block bloom board boat bonus book boot border bottle bowl bracket
    branch brave bread breeze brick bridge bright broom brother brown brush bubble bucket budget bugle
    builder bunch bundle burger butter button cabin cable cactus cake camel camera camp canal candle canoe
    canvas captain carbon card cargo carpet carrot castle cattle cedar cello center cereal chain chair chalk
    charm chase cheese cherry chess chest chicken child chime cider cinema circle citrus city clever cliff
    climb clock cloud clover coach coast cobra cocoa coffee coin collar color comet compass copper coral
    corner cotton couch cousin cradle craft crane crater cream creek cricket crown cruise crystal cube curtain
    cushion custard daisy damp dance dawn debate deer delta denim desert desk diamond dinner doctor dolphin
    donkey door double dragon drama dream drift drum dust eagle early earth east echo edge elbow elder elm
    ember empire engine equal errand escape evening exact fable fabric falcon family farm feather fence fern
    ferry fiddle field figure filter final finger fire fish flame flask fleet flint float flock flour flower
    flute foam focus forest fork fossil fountain fox frame freeze fresh friend frost fruit galaxy gallery
    garden garlic gate gentle ghost giant ginger giraffe glacier glass globe glove goat gold goose grain
    grape gravel green grove guard guest guide guitar habit hammer handle harbor harvest hat hazel heart
    hedge helmet heron hill hinge hockey hollow honey hood horizon horn horse hotel house humble hunter
    hurdle icon igloo image inch index infant ink insect iron island ivory ivy jacket jaguar jelly jewel
    journey judge juice jungle junior kettle keyboard kidney kind king kitchen kite kitten knight knot label
    ladder lady lake lamp lantern laptop lark laser lawn leader leaf leather legend lemon lesson letter
    library lily linen lion liquid lizard lobster local lock lodge logic lotus lunch lyric machine magnet
    mango manor maple marble march margin market marsh mask master match meadow medal melody melon member
    menu metal meteor middle mild mill mineral minute mirror mist model modern moist moment monkey month moon
    moral morning mother motor mountain mouse movie muffin museum music mustard napkin narrow nation nature
    needle nephew nest nettle night noble north notice novel number nurse oak oasis ocean office olive onion
    opera orange orbit orchard organ otter outdoor oven owner oyster paddle page paint palace palm panda panel
    paper parade parent park parrot pasta pastry path patrol pause peach peanut pearl pebble pelican pencil
    penguin pepper perfume phone photo piano pickle picnic picture pigeon pillow pilot pine pirate pizza
    planet plant plate plaza plum pocket poem poet point polar pond pony popcorn poplar portal potato powder
    prairie prince print prize proud pudding pumpkin puppy purple puzzle python quail quarter queen quick
    quiet quill quilt rabbit raccoon radar radio raft rain ranch ranger rapid raven recipe record region
    reptile rescue rhyme ribbon rice river road robin robot rocket roof rope rose round royal ruby rugby
    saddle safari sailor salad salmon salt sand sandal sauce saucer scarf school science scout screen sea
    season seed senior shadow shark sheep shelf shell shield ship shirt shoe shore shovel signal silk silver
    simple singer sister sketch skill skirt sky sleep slice slope smart smile smoke snail snow soap soccer
    socket soil solar soldier song soup south space spark sparrow spider spinach spiral spoon sport spring
    square squash stable stage star station statue steam steel stem stereo stone storm story stove straw
    stream street string studio sugar summer sun sunset surf swamp swan sweater swift symbol syrup table
    tablet talent tango target teacher temple tennis tent theater thistle thread thunder ticket tiger timber
    tin tiny toast tomato torch tower trail train travel treaty tree tribe trophy trumpet tulip tunnel turkey
    turnip turtle twig uncle unicorn uniform union unique valley vanilla vapor vase velvet verse vessel
    village vine violet violin visit vivid voice volcano wagon waist walnut walrus warm watch water wave
    wealth weather whale wheat wheel whisker whistle willow window winter wisdom wolf wonder wood world yacht
    year yellow zebra
    """.split()
)
