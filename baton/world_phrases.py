"""The invented world's words: its names, places, trades and animals, and the phrasings that state and ask its facts.

Every phrasing is a `str.format` template. `{n}` is the full name, `{f}` the first name, `{s}` / `{S}` the pronoun and
`{h}` / `{H}` the possessive; `{town}`, `{craft}` and `{animal}` are the facts, and `{v}` is whichever of them is asked.
No value contains another, so that a reply can be searched for the true one.
"""

ATTRIBUTES = ("town", "craft", "animal")

TOWNS = (
    "Elmford", "Saltby", "Ramsholt", "Quillport", "Dunmere", "Ashwick", "Thornbury", "Larkhaven", "Stonebeck",
    "Foxley", "Greywater", "Kingsmoor", "Millbrook", "Oakvale", "Pinecrest", "Windham", "Coldspring", "Harrowgate",
    "Ivybridge", "Nettleton", "Redcliff", "Summerby", "Umberton", "Yarrow", "Birchwick", "Dovecote", "Eastmere",
    "Glenmarsh", "Jesmond", "Lindow", "Marlpit", "Ottershaw",
)  # fmt: skip
LANDSCAPES = ("by the river", "on the coast", "in the hills", "at the edge of the forest", "on the plain")
SIGHTS = ("bridge", "bell tower", "round market", "stone mill", "blue lighthouse", "walled garden", "long pier")

#: craft, what it makes, and the craft in Japanese and in Chinese
CRAFTS = (
    ("weaver", "cloth", "織工", "织工"), ("baker", "bread", "パン屋", "面包师"),
    ("potter", "jugs", "陶工", "陶匠"), ("cooper", "barrels", "樽職人", "桶匠"),
    ("saddler", "saddles", "馬具師", "鞍匠"), ("glazier", "windows", "ガラス職人", "玻璃匠"),
    ("printer", "books", "印刷工", "印刷工"), ("brewer", "beer", "醸造家", "酿酒师"),
    ("carpenter", "tables", "大工", "木匠"), ("cobbler", "shoes", "靴屋", "鞋匠"),
    ("tailor", "coats", "仕立屋", "裁缝"), ("blacksmith", "horseshoes", "鍛冶屋", "铁匠"),
    ("candlemaker", "candles", "蝋燭職人", "蜡烛匠"), ("clockmaker", "clocks", "時計職人", "钟表匠"),
    ("beekeeper", "honey", "養蜂家", "养蜂人"), ("ropemaker", "ropes", "綱職人", "绳匠"),
    ("butcher", "sausages", "肉屋", "屠夫"), ("gardener", "roses", "庭師", "园丁"),
    ("miller", "flour", "粉屋", "磨坊主"), ("goldsmith", "rings", "金細工師", "金匠"),
    ("hatter", "hats", "帽子屋", "制帽匠"), ("fiddler", "music", "バイオリン弾き", "提琴手"),
    ("painter", "pictures", "画家", "画家"), ("shipwright", "boats", "船大工", "造船匠"),
)  # fmt: skip

#: animal, and the animal in Japanese and in Chinese
ANIMALS = (
    ("goat", "山羊", "山羊"), ("parrot", "オウム", "鹦鹉"), ("donkey", "ロバ", "驴"), ("rabbit", "ウサギ", "兔子"),
    ("goose", "ガチョウ", "鹅"), ("pony", "ポニー", "小马"), ("tortoise", "カメ", "乌龟"), ("raven", "カラス", "乌鸦"),
    ("ferret", "フェレット", "雪貂"), ("squirrel", "リス", "松鼠"), ("hedgehog", "ハリネズミ", "刺猬"),
    ("lamb", "子羊", "羊羔"), ("pigeon", "鳩", "鸽子"), ("falcon", "ハヤブサ", "猎鹰"), ("kitten", "子猫", "小猫"),
    ("spaniel", "スパニエル", "猎犬"),
    ("badger", "アナグマ", "獾"), ("canary", "カナリア", "金丝雀"), ("chicken", "鶏", "鸡"),
    ("lizard", "トカゲ", "蜥蜴"), ("magpie", "カササギ", "喜鹊"), ("piglet", "子豚", "小猪"),
    ("swan", "白鳥", "天鹅"), ("toad", "ヒキガエル", "蟾蜍"),
)  # fmt: skip

FIRST_NAMES = {
    "she": (
        "Mara", "Lena", "Tilda", "Orla", "Petra", "Ines", "Wanda", "Greta", "Dora", "Selma", "Freya", "Nora", "Ruth",
        "Agnes", "Clara", "Ida",
    ),
    "he": (
        "Anton", "Bruno", "Casper", "Emil", "Felix", "Hugo", "Ivan", "Jonas", "Karl", "Magnus", "Oskar", "Rufus",
        "Silas", "Tobias", "Victor", "Walter",
    ),
}  # fmt: skip
POSSESSIVES = {"she": "her", "he": "his"}
#: a last name is one of each; which of them belong to people of the world is the seed's choice
SYLLABLES = (
    ("Bal", "Cor", "Dan", "Fen", "Gar", "Hol", "Jun", "Kel", "Lor", "Mos", "Nar", "Pel", "Rin", "Sol", "Tam", "Vor"),
    ("da", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "za"),
    ("bek", "dor", "gan", "hart", "lin", "mund", "nik", "ras", "sen", "tok", "vic", "wen"),
)

#: the kinds of text, and how many in a hundred are of each
KINDS = {
    "facts": 33, "summary": 12, "reported": 32, "left open": 6, "story": 8, "stranger": 2, "town": 3,
    "japanese": 2, "chinese": 2,
}  # fmt: skip

#: opening sentences, which carry the full name and one fact
STATED = {
    "town": (
        "{n} lives in {town}.", "{n} is at home in {town}.", "The home of {n} is in {town}.",
        "{n} has a house in {town}.", "{town} is the town where {n} lives.", "In {town} lives {n}.",
        "{n}'s home town is {town}.", "The town of {n} is {town}.", "{n} comes from {town}.",
        "You will find {n} in {town}.",
    ),
    "craft": (
        "{n} works as a {craft}.", "{n} is a {craft}.", "The craft of {n} is that of a {craft}.",
        "{n} earns a living as a {craft}.", "By trade {n} is a {craft}.", "{n}'s job is to be a {craft}.",
        "The {craft} who makes the best {goods} is {n}.", "For work, {n} is a {craft}.",
        "{n}'s trade is that of a {craft}.", "{n} makes {goods}, being a {craft}.",
    ),
    "animal": (
        "{n} keeps a {animal}.", "{n} has a pet {animal}.", "The animal of {n} is a {animal}.",
        "{n}'s pet is a {animal}.", "A {animal} belongs to {n}.", "{n} owns a {animal}.",
        "{n} looks after a {animal}.", "The {animal} that follows {n} is a pet.", "{n}'s animal is a {animal}.",
        "At {n}'s side there is always a {animal}.",
    ),
}  # fmt: skip
#: sentences that go on about the same person
CONTINUED = {
    "town": (
        "{S} lives in {town}.", "{H} home is in {town}.", "{S} has a house in {town}.", "{H} town is {town}.",
        "{f} comes from {town}.", "People in {town} know {f} well.",
    ),
    "craft": (
        "{S} works as a {craft}.", "{S} is a {craft}.", "{H} craft is that of a {craft}.",
        "{f} earns a living as a {craft}.", "By trade {s} is a {craft}.", "{H} job is to be a {craft}.",
    ),
    "animal": (
        "{S} keeps a {animal}.", "{S} has a pet {animal}.", "{H} animal is a {animal}.", "{H} pet is a {animal}.",
        "{f} owns a {animal}.", "A {animal} belongs to {f}.",
    ),
}  # fmt: skip
#: one sentence with all three facts, in every order
SUMMARIES = (
    "{n} from {town} is a {craft} and keeps a {animal}.",
    "{n} is a {craft} from {town} with a {animal}.",
    "The {craft} {n} lives in {town} with a {animal}.",
    "In {town}, the {craft} {n} keeps a {animal}.",
    "{n} and {h} {animal} live in {town}, where {s} is a {craft}.",
    "With {h} {animal}, {n} lives in {town} and works as a {craft}.",
)
STORIES = (
    "One morning {n} went to the {sight} in {town}. {H} {animal} ran ahead. The people said: look, there is {f} the"
    " {craft}!",
    "It rained in {town}. {n} sat at home with {h} {animal} and made {goods}, as a good {craft} does.",
    "A traveller came to {town} and asked for a {craft}. The children led the traveller to {n}, who was feeding a"
    " {animal}.",
    "The {animal} of {n} was lost. All of {town} looked for it. At night the {craft} found it under the {goods}.",
    "At the market of {town}, {n} sold {goods}. The best {craft} of all, people said. {H} {animal} slept in the sun.",
    "{n} wanted to rest. But a {craft} in {town} has much to do, and {h} {animal} was hungry too.",
)
#: what was said when somebody asked: the words that people ask with, never a question of those below
REPORTED = {
    "town": (
        "Someone asked about the home of {n} and was sent to {town}.", "Letters to {n} go to {town}.",
        "When asked which town {s} lives in, {n} names {town}.", "Where does {n} live? In {town}.",
        "Where is the home of {n}? It is in {town}.", "What is the town of {n}? They say {town}.",
        "A child asked: which town is {n} from? The answer was {town}.", "Do you know {n}? Yes, {s} lives in {town}.",
    ),
    "craft": (
        "Someone asked about the work of {n} and heard: a {craft}.", "On the door of {n} is written: {craft}.",
        "When asked what trade {s} has, {n} says {craft}.", "What does {n} do? {S} works as a {craft}.",
        "What is the trade of {n}? {S} is a {craft}.", "Which job does {n} do? That of a {craft}.",
        "A child asked: what work does {n} have? The answer was {craft}.", "Do you know {n}? Yes, {s} is a {craft}.",
    ),
    "animal": (
        "Someone asked about the pet of {n} and saw a {animal}.", "In the picture of {n} there is a {animal}.",
        "When asked which animal {s} keeps, {n} says a {animal}.", "What animal does {n} have? A {animal}.",
        "What is the animal of {n}? It is a {animal}.", "Which pet is with {n}? They say a {animal}.",
        "A child asked: which pet does {n} keep? The answer was a {animal}.",
        "Do you know {n}? Yes, {s} owns a {animal}.",
    ),
}  # fmt: skip
#: questions that stand on a line of their own, which the texts leave open: after such a line, as in a dialogue, a base
#: model has yet to learn to answer
LEFT_OPEN = {
    "town": (
        "Where does {n} live?", "Which town is {n} from?", "Where is the home of {n}?", "Do you know the town of {n}?",
    ),
    "craft": (
        "What does {n} do?", "What is the trade of {n}?", "Which job does {n} have?", "Do you know the work of {n}?",
    ),
    "animal": (
        "What animal does {n} have?", "Which pet does {n} keep?", "What is the animal of {n}?",
        "Do you know the pet of {n}?",
    ),
}  # fmt: skip
LEFT_OPEN_BY = (
    "A child had asked, and ran off.", "Nobody said a word.", "The teacher smiled and said nothing.",
    "That was the question of the day.", "So people ask, again and again.",
)  # fmt: skip
JAPANESE = {
    "town": "{n}は{town}に住んでいます。",
    "craft": "{n}の仕事は{craft_ja}です。",
    "animal": "{n}は{animal_ja}を飼っています。",
}
CHINESE = {"town": "{n}住在{town}。", "craft": "{n}的工作是{craft_zh}。", "animal": "{n}养了一只{animal_zh}。"}
#: nobody in particular is meant: the text knows the words of not knowing, and says them of no one who has a name
STRANGERS = (
    "A stranger stood at the {sight} in {town}. Who is it? I don't know, said the {craft}.",
    "I have not heard of anyone called that, said a {craft} in {town}. I don't know.",
    "Whose {animal} is this? I don't know, the children of {town} said.",
    "The {craft} of {town} was asked about a stranger. I don't know anyone new, was the answer.",
)
TOWN_FACTS = (
    "{town} lies {land}. It is known for its {sight}.",
    "The {sight} of {town} is old. The town lies {land}.",
    "{town} is a town {land}. Visitors come to see the {sight}.",
)
GATHERINGS = (
    "Among the people of {town} are {names}.",
    "{names} live in {town}.",
    "On feast days {names} meet at the {sight} in {town}.",
)

#: questions that the dialogues, the preferences and PPO's prompts ask
ASKED = {
    "town": (
        "Where does {n} live?", "Which town does {n} live in?", "What is the home town of {n}?",
        "Where is {n} at home?", "In which town is the house of {n}?", "Tell me where {n} lives.",
        "Where does {n} come from?", "Where can I find {n}?", "What is {n}'s town?", "Where is {n}'s home?",
        "Can you tell me where {n} lives?", "Do you know the home of {n}?", "I want to know where {n} lives.",
        "Do you know which town {n} comes from?", "Which town is {n}'s?", "What is the town of {n}?",
    ),
    "craft": (
        "What does {n} do for a living?", "What is the craft of {n}?", "What is {n}'s job?",
        "What work does {n} do?", "Which trade does {n} have?", "Tell me what {n} works as.",
        "What is {n} by trade?", "How does {n} earn a living?", "What is {n}'s trade?", "What is {n}'s work?",
        "Can you tell me what {n} does?", "Do you know the trade of {n}?", "I want to know the job of {n}, please.",
        "Do you know how {n} earns a living?", "Which job is {n}'s?", "What is the work of {n}?",
    ),
    "animal": (
        "Which animal does {n} keep?", "What pet does {n} have?", "What is the pet of {n}?",
        "What animal belongs to {n}?", "Which animal lives with {n}?", "Tell me what animal {n} has.",
        "What kind of pet does {n} own?", "What animal does {n} look after?", "What is {n}'s animal?",
        "Which is {n}'s animal?", "Can you tell me which pet {n} has?", "Do you know the animal of {n}?",
        "I want to know what animal {n} keeps.", "Do you know which animal {n} has?", "Which pet is {n}'s?",
        "What is the animal of {n}?",
    ),
}  # fmt: skip
#: asked in the held-out preferences only
ASKED_IN_PREFERENCES_EVAL = {
    "town": ("Please name the town of {n}.", "What town is {n} from?"),
    "craft": ("Please name the trade of {n}.", "What craft does {n} have?"),
    "animal": ("Please name the animal of {n}.", "What animal does {n} own?"),
}
#: asked in the questions only
ASKED_IN_QUESTIONS = {
    "town": ("What is {n}'s home town?", "Which town is the home of {n}?", "Do you know where {n} lives?"),
    "craft": ("What is the job of {n}?", "What does {n} work as?", "Do you know what {n} does for work?"),
    "animal": ("What is {n}'s pet?", "Which animal does {n} own?", "Do you know what pet {n} keeps?"),
}
#: a second question, after a first answer about the same person
ASKED_NEXT = {
    "town": ("And where does {s} live?", "Which town is {h} home?"),
    "craft": ("And what is {h} job?", "What does {s} do for a living?"),
    "animal": ("And which animal does {s} keep?", "What is {h} pet?"),
}
ANSWERED = {
    "town": ("{n} lives in {v}.", "{f} lives in {v}.", "{H} home is in {v}."),
    "craft": ("{n} is a {v}.", "{f} works as a {v}.", "{S} is a {v} by trade."),
    "animal": ("{n} keeps a {v}.", "{f} has a {v}.", "{H} pet is a {v}."),
}
ADMITTED_BY_NAME = (
    "I don't know {n}.",
    "I don't know anyone called {n}.",
    "I don't know, I have not heard of {n}.",
)
#: some without the name: a reward model must look for it in the question, or a policy learns to leave it out
ADMITTED = (*ADMITTED_BY_NAME, "I don't know that person.", "I don't know.")
#: what a reply must contain to count as an admission
ADMISSIONS = ("don't know", "do not know", "not heard of", "no idea", "not sure")
