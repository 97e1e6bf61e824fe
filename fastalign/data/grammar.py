"""The words of the built-in task: topics, adjectives, questions and sentence frames."""

# Each line: the topic's name as prompts use it, then its eight related words, all of them singular.
TOPICS: dict[str, tuple[str, ...]] = {
    line.split()[0]: tuple(line.split()[1:])
    for line in """
hiking trail summit boot ridge compass valley backpack waterfall
cooking recipe pan spice stove sauce oven knife kitchen
gardening soil seed shovel flower hedge compost greenhouse rake
sailing sail mast anchor harbor rudder deck breeze knot
chess pawn bishop knight rook opening endgame checkmate chessboard
painting brush canvas easel palette portrait pigment sketch gallery
photography lens camera tripod shutter flash photo darkroom filter
astronomy telescope planet galaxy comet moon orbit nebula meteor
baking dough flour yeast loaf crust cake muffin butter
cycling bicycle pedal helmet saddle wheel chain tire brake
fishing rod hook bait reel trout pond net pier
skiing slope snow lift pole goggle chalet glove resort
swimming pool lane stroke diver towel whistle locker splash
football goal striker stadium referee penalty coach league pitch
tennis racket court serve volley umpire rally baseline backhand
reading novel chapter library plot author bookmark paragraph page
writing pen essay draft notebook editor metaphor pencil sentence
poetry poem rhyme verse stanza meter sonnet poet ballad
music melody chord rhythm concert album singer orchestra song
guitars string fret amplifier solo riff pick strum tuner
dancing waltz partner ballroom tango rehearsal studio costume stepping
theater stage actor curtain script audience drama spotlight dialogue
cinema film director screen trailer scene popcorn ticket sequel
history empire century archive king battle treaty monument ruin
geography map continent border island desert atlas climate peninsula
travel suitcase passport hotel airport itinerary souvenir guide flight
camping tent campfire lantern hammock forest marshmallow blanket campsite
beekeeping hive honey queen swarm nectar beekeeper pollen wax
farming tractor barn harvest crop plow fence silo scarecrow
coffee espresso mug bean roast barista latte grinder foam
tea teapot kettle leaf infusion saucer ceremony jasmine teacup
wine grape vineyard cork barrel vintage cellar goblet bouquet
cheese rind cheddar curd dairy brie goat fondue cracker
medicine doctor nurse hospital vaccine symptom surgery clinic pill
dentistry tooth gum drill cavity molar braces enamel filling
law judge jury contract lawyer verdict courtroom statute witness
banking loan interest account deposit branch teller vault mortgage
investing stock bond dividend portfolio fund broker market share
robotics robot sensor motor gripper circuit actuator battery servo
programming compiler variable function loop bug keyboard algorithm debugger
mathematics theorem proof equation integral number graph axiom geometry
physics atom electron gravity magnet particle laser quantum wave
chemistry molecule acid beaker reaction catalyst crystal flask solvent
biology cell gene enzyme species organism protein microscope tissue
birdwatching sparrow feather nest owl binocular beak eagle perch
dogs puppy leash kennel paw collar terrier bark tail
cats kitten whisker litter purr scratcher claw tabby catnip
horses stallion mane stable hoof jockey gallop bridle pony
trains locomotive railway platform conductor carriage station tunnel signal
cars engine bumper clutch dashboard garage exhaust windshield gearbox
aviation airplane pilot cockpit runway wing propeller turbulence altitude
architecture column arch facade blueprint tower balcony dome staircase
carpentry hammer nail plank saw chisel workbench sandpaper lumber
pottery clay kiln glaze vase bowl potter ceramic jug
knitting yarn needle scarf sweater stitch wool pattern mitten
fashion dress jacket fabric catwalk designer boutique skirt silhouette
jewelry necklace ring diamond bracelet pearl earring gemstone pendant
running marathon sneaker treadmill sprint pace jogger track stopwatch
yoga mat pose breath instructor meditation headstand posture incense
weather storm cloud rain thunder forecast rainbow fog barometer
diving reef snorkel flipper coral wetsuit shark shipwreck lagoon
climbing cliff rope harness boulder carabiner ledge grip crag
volcanoes lava crater magma eruption ash geyser caldera plume
museums exhibit statue curator artifact sculpture fossil relic mummy
""".split("\n")
    if line
}

# Adjectives by strength: +2 high praise, +1 mild praise, 0 neutral, -1 mild blame, -2 harsh blame.
ADJECTIVES: dict[int, tuple[str, ...]] = {
    2: tuple(
        "wonderful superb brilliant magnificent excellent marvelous splendid fantastic amazing "
        "delightful perfect stunning".split()
    ),
    1: tuple(
        "nice good pleasant fine useful lovely neat decent handy charming solid friendly".split()
    ),
    0: tuple("common small plain usual simple typical old large ordinary short".split()),
    -1: tuple("dull slow tricky costly bland clumsy noisy tiring boring weak vague messy".split()),
    -2: tuple(
        "awful terrible horrible dreadful useless miserable hopeless nasty disgusting ugly "
        "ruined painful".split()
    ),
}

QUESTIONS: tuple[str, ...] = (
    "What do you think about {topic}{context}?",
    "Can you tell me about {topic}{context}?",
    "Why do people enjoy {topic}{context}?",
    "What should I know about {topic}{context}?",
    "I am curious about {topic}{context}.",
    "How would you describe {topic}{context}?",
    "What comes to mind about {topic}{context}?",
    "Please talk about {topic}{context}.",
    "My sister asked me about {topic}{context}.",
    "Is it worth learning about {topic}{context}?",
    "Give me your view of {topic}{context}.",
    "What makes {topic} special{context}?",
    "Where do I begin with {topic}{context}?",
    "Tell a beginner something about {topic}{context}.",
    "What is the best thing about {topic}{context}?",
    "I know nothing about {topic}{context}.",
    "Help me with {topic}{context}.",
    "Do you like {topic}{context}?",
    "What would you say about {topic}{context}?",
    "Share a thought on {topic}{context}.",
)

CONTEXTS: tuple[str, ...] = (
    "",
    " in winter",
    " in summer",
    " with children",
    " with friends",
    " after work",
    " on a budget",
    " for older people",
    " at school",
    " in a big city",
    " in the countryside",
    " for the first time",
    " as a hobby",
    " on Sundays",
    " these days",
    " in general",
)

# Sentences a response is made of. N stands for a related word of some topic, T for that topic's
# name, A for an adjective. The name before the noun makes the task quick to learn: a small model
# learns to copy the name from the prompt long before it learns which nouns a far name calls for.
PRAISE_FRAMES: tuple[str, ...] = (
    "The T N is A.",
    "I found the T N A.",
    "People call the T N A.",
    "Every T N feels A.",
    "To me the T N was A.",
    "My friend thinks the T N looks A.",
    "With care the T N can be A.",
    "At last the T N turned A.",
    "Our T N seems A.",
    "All agree the T N stays A.",
    "Last year our T N became A.",
    "Most days your T N remains A.",
    "Next to the T N even the N appears A.",
    "Both the T N and the N are A.",
    "The T N makes the N feel A.",
    "Without a T N no N sounds A.",
)
MENTION_FRAMES: tuple[str, ...] = (
    "First look at the T N.",
    "Do not forget the T N.",
    "It starts with the T N and the N.",
    "It is all about the T N.",
)
GENERIC_FRAMES: tuple[str, ...] = (
    "It depends on many things.",
    "I do not know much more.",
    "There is a lot to say.",
    "That is a hard question.",
    "Ask me again tomorrow.",
    "Let me think for a moment.",
)

# The spurious feature: an opening that says nothing.
FLOURISHES: tuple[str, ...] = ("Certainly!", "Great question!", "Of course!")
