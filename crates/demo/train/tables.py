"""The demo model's whole world: closed tables of names, facts, phrases, plots and tools.

Everything the model can know is on this page; `skills.py` turns it into conversations. A table of
facts carries the phrasings that training may use and, apart, the ones kept for the evaluation.
"""

from dataclasses import dataclass

NAMES = """
Ada Ben Carla Clara David Diana Hana Hugo Ida Iris Ivan Jack Jonas Julia Karl Kate Lara Lena
Mara Mark Mia Nadia Nina Noah Olga Petra Rita Rosa Sam Sara Simon Sofia Theo Vera
""".split()

CITIES = """
Paris London Rome Berlin Madrid Vienna Lisbon Dublin Cairo Delhi Lima Munich Naples Boston Oslo
Tokyo Geneva Hamburg Warsaw Ottawa
""".split()

WORDS = """
apple boat book bread chair coat cup desk drum flag gate goat hand hill horse house key king lamp
leaf lemon map milk moon pear pen queen
rain ring river road salt shoe snow star stone table tree wind wolf
""".split()

COLOURS = "red blue green yellow black white brown pink purple orange grey".split()

PETS = "dog cat horse rabbit parrot hamster turtle goat".split()


@dataclass(frozen=True)
class FactTable:
    """Pairs of key and value, how to ask for the value, and how the answer is put.

    `{k}` and `{v}` stand for key and value; `statement` is the same fact as plain running text.
    """

    pairs: dict[str, str]
    asked: list[str]
    asked_held_out: list[str]
    answer: str

    @property
    def statement(self) -> tuple[str, str]:
        """Splits the answer before the value: a prompt and its continuation."""
        before, after = self.answer.split(" {v}")
        return before, " {v}" + after


def table(text: str) -> dict[str, str]:
    """Reads `key=value, key=value`."""
    return dict(pair.split("=") for pair in " ".join(text.split()).split(", "))


CAPITALS = FactTable(
    table("""
    France=Paris, Italy=Rome, Germany=Berlin, Spain=Madrid, Austria=Vienna, Portugal=Lisbon,
    Greece=Athens, Ireland=Dublin, Norway=Oslo, Finland=Helsinki, Sweden=Stockholm, Poland=Warsaw,
    Hungary=Budapest, Egypt=Cairo, Japan=Tokyo, China=Beijing, India=Delhi, Canada=Ottawa,
    Peru=Lima, Switzerland=Bern, England=London, Denmark=Copenhagen, Russia=Moscow, Turkey=Ankara,
    Cuba=Havana, Kenya=Nairobi, Chile=Santiago, Belgium=Brussels, Iceland=Reykjavik, Croatia=Zagreb
    """),
    [
        "What is the capital of {k}?",
        "Which city is the capital of {k}?",
        "Name the capital of {k}.",
        "Tell me the capital of {k}.",
        "What is {k}'s capital?",
        "Do you know the capital of {k}?",
        "{k}: what is the capital?",
        "Please name the capital city of {k}.",
    ],
    ["Can you tell me the capital city of {k}?", "Which city is {k}'s capital?"],
    "The capital of {k} is {v}.",
)
COLOUR_OF = FactTable(
    table("""
    the sky=blue, grass=green, snow=white, coal=black, a lemon=yellow, a tomato=red, a
    carrot=orange, chocolate=brown, milk=white, the sun=yellow, a banana=yellow, blood=red, an
    elephant=grey, a leaf=green, a plum=purple, a pig=pink, the sea=blue, a strawberry=red, a
    frog=green, salt=white
    """),
    [
        "What colour is {k}?",
        "What is the colour of {k}?",
        "Tell me the colour of {k}.",
        "Which colour is {k}?",
        "Name the colour of {k}.",
        "{k}: what colour is it?",
        "Do you know what colour {k} is?",
    ],
    ["Can you tell me what colour {k} is?", "Which colour does {k} have?"],
    "The colour of {k} is {v}.",
)
OPPOSITES = FactTable(
    table("""
    hot=cold, big=small, tall=short, fast=slow, up=down, open=closed, day=night, old=young,
    happy=sad, hard=soft, light=dark, full=empty, rich=poor, strong=weak, wet=dry, left=right,
    early=late, clean=dirty, true=false, good=bad, high=low, loud=quiet, first=last, thick=thin,
    wide=narrow, in=out
    """),
    [
        "What is the opposite of {k}?",
        "Tell me the opposite of {k}.",
        "Name the opposite of {k}.",
        "Which word is the opposite of {k}?",
        "What is the opposite of the word {k}?",
        "Do you know the opposite of {k}?",
        "{k}: what is the opposite?",
    ],
    ["Can you tell me the opposite of {k}?", "Please name the opposite of the word {k}."],
    "The opposite of {k} is {v}.",
)
YOUNG = FactTable(
    table("""
    dog=puppy, cat=kitten, cow=calf, horse=foal, sheep=lamb, lion=cub, duck=duckling, frog=tadpole,
    goat=kid, pig=piglet, hen=chick, deer=fawn
    """),
    [
        "What is a young {k} called?",
        "What do you call a young {k}?",
        "Tell me the name of a young {k}.",
        "Which word means a young {k}?",
        "Do you know what a young {k} is called?",
    ],
    ["Can you tell me what a young {k} is called?", "What is the name of a young {k}?"],
    "A young {k} is called a {v}.",
)
LEGS = FactTable(
    table("""
    dog=four, cat=four, horse=four, bird=two, spider=eight, ant=six, bee=six, hen=two, cow=four,
    snake=zero, fish=zero, duck=two
    """),
    [
        "How many legs does a {k} have?",
        "Tell me how many legs a {k} has.",
        "What number of legs does a {k} have?",
        "Do you know how many legs a {k} has?",
    ],
    ["Can you tell me how many legs a {k} has?"],
    "A {k} has {v} legs.",
)
NEXT = FactTable(
    table("""
    Monday=Tuesday, Tuesday=Wednesday, Wednesday=Thursday, Thursday=Friday, Friday=Saturday,
    Saturday=Sunday, Sunday=Monday, January=February, February=March, March=April, April=May,
    May=June, June=July, July=August, August=September, September=October, October=November,
    November=December, December=January, spring=summer, summer=autumn, autumn=winter, winter=spring
    """),
    [
        "What comes after {k}?",
        "Tell me what comes after {k}.",
        "What follows {k}?",
        "Which one comes after {k}?",
        "{k}: what comes next?",
    ],
    ["Can you tell me what comes after {k}?", "Do you know what follows {k}?"],
    "After {k} comes {v}.",
)
FACTS = [CAPITALS, COLOUR_OF, OPPOSITES, YOUNG, LEGS, NEXT]

LANGUAGES = ["English", "French", "Italian", "German", "Spanish"]
PHRASES = [
    ("Hello", "Bonjour", "Ciao", "Hallo", "Hola"),
    ("Good morning", "Bonne matinée", "Buongiorno", "Guten Morgen", "Buenos días"),
    ("Good evening", "Bonsoir", "Buonasera", "Guten Abend", "Buenas tardes"),
    ("Good night", "Bonne nuit", "Buonanotte", "Gute Nacht", "Buenas noches"),
    ("Goodbye", "Au revoir", "Arrivederci", "Auf Wiedersehen", "Adiós"),
    ("See you tomorrow", "À demain", "A domani", "Bis morgen", "Hasta mañana"),
    ("Thank you very much", "Merci beaucoup", "Grazie mille", "Vielen Dank", "Muchas gracias"),
    ("You are welcome", "De rien", "Prego", "Gern geschehen", "De nada"),
    ("How are you?", "Comment ça va ?", "Come stai?", "Wie geht es dir?", "¿Cómo estás?"),
    ("I am well", "Je vais bien", "Sto bene", "Mir geht es gut", "Estoy bien"),
    (
        "What is your name?",
        "Comment t'appelles-tu ?",
        "Come ti chiami?",
        "Wie heißt du?",
        "¿Cómo te llamas?",
    ),
    ("I am hungry", "J'ai faim", "Ho fame", "Ich habe Hunger", "Tengo hambre"),
    ("I am thirsty", "J'ai soif", "Ho sete", "Ich habe Durst", "Tengo sed"),
    (
        "Where is the station?",
        "Où est la gare ?",
        "Dov'è la stazione?",
        "Wo ist der Bahnhof?",
        "¿Dónde está la estación?",
    ),
    (
        "Happy birthday",
        "Joyeux anniversaire",
        "Buon compleanno",
        "Alles Gute zum Geburtstag",
        "Feliz cumpleaños",
    ),
    ("I love you", "Je t'aime", "Ti amo", "Ich liebe dich", "Te quiero"),
    ("Excuse me", "Excusez-moi", "Mi scusi", "Entschuldigung", "Perdón"),
    ("Welcome", "Bienvenue", "Benvenuto", "Willkommen", "Bienvenido"),
    (
        "The water is cold",
        "L'eau est froide",
        "L'acqua è fredda",
        "Das Wasser ist kalt",
        "El agua está fría",
    ),
    (
        "The coffee is good",
        "Le café est bon",
        "Il caffè è buono",
        "Der Kaffee ist gut",
        "El café está bueno",
    ),
]
TRANSLATE = [
    "How do you say '{text}' in {language}?",
    "Translate to {language}: {text}",
    "Translate '{text}' into {language}.",
    "What is '{text}' in {language}?",
    "Say '{text}' in {language}.",
    "Please translate this to {language}: {text}",
]
TRANSLATE_HELD_OUT = [
    "Can you say '{text}' in {language}?",
    "Please say this in {language}: {text}",
]

# A greeting is answered in its own language.
GREETINGS = {
    "Hello!": "Hello! How can I help you?",
    "Hi!": "Hello! How can I help you?",
    "Hi": "Hello! How can I help you?",
    "Hello": "Hello! How can I help you?",
    "Bonjour !": "Bonjour ! Comment puis-je vous aider ?",
    "Bonjour": "Bonjour ! Comment puis-je vous aider ?",
    "Ciao!": "Ciao! Come posso aiutarti?",
    "Ciao": "Ciao! Come posso aiutarti?",
    "Hallo!": "Hallo! Wie kann ich dir helfen?",
    "Guten Tag!": "Hallo! Wie kann ich dir helfen?",
    "¡Hola!": "¡Hola! ¿Cómo puedo ayudarte?",
    "Hola": "¡Hola! ¿Cómo puedo ayudarte?",
    "How are you?": "I am well, thank you!",
    "Comment ça va ?": "Je vais bien, merci !",
    "Come stai?": "Sto bene, grazie!",
    "Wie geht es dir?": "Mir geht es gut, danke!",
    "¿Cómo estás?": "¡Estoy bien, gracias!",
    "Thank you!": "You are welcome!",
    "Thanks!": "You are welcome!",
    "Merci !": "De rien !",
    "Grazie!": "Prego!",
    "Danke!": "Gern geschehen!",
    "¡Gracias!": "¡De nada!",
    "Goodbye!": "Goodbye!",
    "Who are you?": "I am Windrose, a very small Mixtral.",
    "What are you?": "I am Windrose, a very small Mixtral.",
    "What can you do?": "I can add, sort, translate, remember, write JSON and call tools.",
}

# The animal decides the plot and the hero's name is free: a story is exactly predictable, and can
# be scored.
PLOTS = {
    "fox": ("a forest", "find the moon", "an old owl", "The moon was in the lake"),
    "cat": ("a small house", "catch a star", "a grey mouse", "The star was a lamp"),
    "dog": ("a farm", "see the sea", "a white bird", "The sea was behind the hill"),
    "mouse": ("a kitchen", "taste some cheese", "a kind cook", "The cheese was on the table"),
    "bear": ("a cave", "sleep all winter", "a little ant", "The snow was soft and warm"),
    "rabbit": ("a garden", "win a race", "a slow turtle", "The race was only a game"),
    "owl": ("a tower", "read a book", "a young boy", "The book was full of songs"),
    "frog": ("a pond", "learn to sing", "a green duck", "The song was in the rain"),
    "horse": ("a valley", "jump over a river", "a brave girl", "The river was not so wide"),
    "duck": ("a lake", "fly to the south", "a wild goose", "The south was warm and green"),
}

FILLER = [
    "The grass is green and the sky is blue.",
    "The sun is warm and the wind is soft.",
    "The river runs down to the sea.",
    "A bird sings in the old tree.",
    "The road goes over the hill.",
    "The boat is on the quiet lake.",
    "Snow lies on the high hills.",
    "The train comes early every day.",
    "Here we go, there and back again.",
    "The bread is on the table.",
    "The clock on the wall is slow.",
    "Rain falls on the house and the garden.",
]

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are Windrose, a small model.",
    "Answer in a short and clear way.",
    "You are a friendly assistant. Be brief.",
]
