"""Words that tasks draw from: three-letter keys, and adjectives and nouns that combine into many names."""

from __future__ import annotations

from collections.abc import Mapping

_SHORT = """
ace ale ant ape apt arc ark art ash asp auk awe awl axe bay bee beg bet bib bid bog bow boy bud bug bun bus buy cab
cam can cap cat caw cob cod cog cop cot cow coy cry cub cud cue cup cur dab dad dam day den dew dig din dip doe dog
dot dry dub due dye ear eat ebb eel egg ego elf elk elm emu era ewe eye fad fan far fax fee fen fez fib fig fin fir
fit fix flu fly foe fog fox fry fur gab gag gap gas gel gem gin gum gut guy gym hag hat hay hem hen hew hip hit hob
hoe hog hop hot hub hue hug hum hut ice icy ill ink inn ion ire irk ivy jab jam jar jaw jay jet jig job jog jot joy
jug jut keg kid kin kit koi lab lad lag lap law lay lea lee leg lid lip lit lob lot lug lye mad man mar mat maw may
mew mob mop mow mud mug nag nap nay net nib nip nit nod nut oaf oak oar oat odd ode oil old orb ore owe owl own pal
pan par paw pay pea peg pep per pet pew pie pig pin pit ply pop pot pox pro pry pub pug pun pup rag ram rap rat ray
red rib rid rig rim rip rod roe rot rub rue rug rum rut rye sad sag sap saw sax sea see sew shy sip sir sit six ski
sky sly sob sod son sow soy spa spy sty sue sun tab tan tap tar tax tea tee ten tic tie tin tip toe ton tow toy try
tub tug tux urn van vat vet vex vim vow wad wag war wax way web wed wet wig win wit woe wok yak yam yap yaw yea yew
zap zen zig zoo
"""

_ADJECTIVES = """
able agile amber ample ancient angular arctic bitter blunt bold brave brief bright brisk broad calm candid careful
cheerful civic clever coarse coastal cobalt copper coral crisp curious dainty daring deep dense dusty eager early
earnest elegant eternal faint famous fancy festive fierce floral fluent fond formal fragile frank fresh frosty gentle
giant gilded glassy golden graceful grand hardy hasty hidden hollow honest humble idle ivory jolly keen lavish lively
lofty lonely loyal lucid lunar mellow mighty misty modest mossy narrow neat nimble noble novel olive patient placid
polite proud quaint quick quiet rapid rare remote restless robust rosy rural rustic sandy scarlet serene sharp silent
silver sleepy slender smooth solar solid spare stable steady stern stormy subtle sturdy sudden sunny swift tender
thick thrifty tidy timid tranquil upright urban valiant vast velvet vivid warm weary whole wild windy wise witty young
"""

_NOUNS = """
acorn album anchor anvil apron arbor arrow aspen atlas badge bakery ballad bamboo banjo barley barrel basin basket
beacon beetle bell bench berry blanket blossom boulder branch bridge bronze bucket buckle button cabin candle canoe
canvas canyon carpet castle cedar cellar chapel cherry chimney cinder circle cliff clock clover coach cobbler compass
cottage cricket crown crystal curtain dagger daisy dancer desert dolphin dragon drum eagle easel ember engine falcon
feather fence ferry fiddle field flag flute forest fountain gallery garden garnet gate glacier glove goblet grove
guitar hammer harbor hazel heron hill honey horizon house island jacket jasmine jewel journal kernel kettle kitten
ladder lagoon lantern lemon lily lizard magnet maple marble market meadow melon mirror monk mountain museum needle
orchard otter oven owl oyster paddle palace parrot pebble pencil pepper piano pillow pilot planet plaza poplar prairie
puzzle quarry quilt rabbit raft raven reef ribbon river robin rocket saddle sailor sandal satchel sculptor shadow
shell shelter signal sketch sparrow spindle staircase statue stone summit swan table teapot temple thicket thistle
tiger timber tower trail trumpet tulip tunnel turtle valley vase village violin wagon walnut walrus weaver whistle
willow window winter wizard wreath yarrow zephyr
"""

_VERBS = """
admires answers borrows carries circles collects covers crosses describes draws fills finds follows greets guards
hides holds keeps leaves lifts measures mends names notices paints passes praises reaches remembers repairs returns
shares shelters studies touches trades visits watches
"""

KEYS: Mapping[str, tuple[str, ...]] = {
    "train": tuple(word for i, word in enumerate(_SHORT.split()) if i % 4 != 3),
    "heldout": tuple(word for i, word in enumerate(_SHORT.split()) if i % 4 == 3),
}
"""Three-letter keys, in two disjoint sets. Words that are common names of arguments (`end=`, `key=`) are not
among them: program text, the default haystack, would hold needles that nobody hid."""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
VERBS = tuple(_VERBS.split())
