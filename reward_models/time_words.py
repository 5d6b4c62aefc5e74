"""The words of time in eight languages: units, numbers, joiners and cues.

English, German, French, Spanish, Russian, Arabic, Chinese, Japanese. Everything is matched against
`normalise(text)`: lower case, ASCII digits and dashes, character for character as long as the
original. All repetitions are bounded, so reading stays linear in the length of the text.
"""

from __future__ import annotations

import re

_ONE_TO_ONE = {
    **{chr(0x0660 + i): str(i) for i in range(10)},  # Arabic-Indic digits
    **{chr(0x06F0 + i): str(i) for i in range(10)},  # Persian
    **{chr(0xFF10 + i): str(i) for i in range(10)},  # full width
    **dict.fromkeys("‐‑‒–—―−－", "-"),
    **dict.fromkeys("～〜∼", "~"),
    **dict.fromkeys("\u00a0\u2007\u2009\u202f\u3000", " "),
    **dict.fromkeys("′’‘‛", "'"),
    **dict.fromkeys("″“”„", '"'),
    "：": ":", "，": ",", "．": ".", "٫": ".", "、": ",", "（": "(", "）": ")", "［": "[",
    "］": "]", "→": ">", "İ": "I",
}  # fmt: skip
_TABLE = str.maketrans(_ONE_TO_ONE)


def normalise(text: str) -> str:
    """Lower case with plain digits, dashes, quotes and spaces; as long as `text`."""
    return text.translate(_TABLE).lower()


LETTER = r"a-zà-öø-ÿœßа-яё\u0621-\u064a"
UNIT_SECONDS = {"ms": 0.001, "hour": 3600.0, "minute": 60.0, "second": 1.0}
_UNIT_WORDS = {
    "ms": r"milli-?se[ck](?:onds?|unden?|ondes?)?|milisegundos?|миллисекунд[аы]?|ms|мс",
    "hour": r"hours?|hrs?|h|stunden?|std|heures?|horas?|час(?:а|ов)?|ساعة|ساعات",
    "minute": r"minuten?|minutes?|mins?|m|minutos?|минут[аыеу]?|мин|(?:ال)?دقيقة|دقائق",
    "second": r"seconds?|secs?|s|sekunden?|sek|secondes?|segundos?|segs?|секунд[аыеу]?|сек|с|"
    r"(?:ال)?ثانية|ثوان[يٍ]?",
}
_UNIT_SIGNS = {
    "ms": "毫秒|ミリ秒",
    "hour": "小时|小時|時間",
    "minute": "分钟|分鐘|分(?!之)",
    "second": "秒钟|秒鐘|秒",
}
UNIT = "|".join(
    rf"(?P<{name}>(?:{words})(?![{LETTER}])|{_UNIT_SIGNS[name]})\.?"
    for name, words in _UNIT_WORDS.items()
)
UNIT_STEMS = (
    "sec", "sek", "seg", "minut", "hour", "stunde", "heure", "hora", "milli", "сек", "мин", "час",
    "ثاني", "ثوان", "دقيق", "دقائق", "ساع",
)  # fmt: skip
UNIT_BEFORE_NUMBER = (
    r"(?P<minute_n>minutes?|minuten|minutos?|минут[аеуы]|(?:ال)?دقيقة)|"
    r"(?P<second_n>seconds?|secs?|sekunden?|secondes?|segundos?|секунд[аеуы]|(?:ال)?ثانية)"
)

_EN_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_EN_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_OTHER_NUMBERS = {
    1: "ein eins eine einer une un uno una один одну одна одной واحد واحدة",
    2: "zwei deux dos две два двух اثنان اثنين",
    3: "drei trois tres три трёх трех ثلاث ثلاثة",
    4: "vier quatre cuatro четыре четырёх أربع أربعة",
    5: "fünf cinq cinco пять пяти خمس خمسة",
    6: "sechs seis шесть шести ست ستة",
    7: "sieben sept siete семь семи سبع سبعة",
    8: "acht huit ocho восемь восьми ثماني ثمانية",
    9: "neun neuf nueve девять девяти تسع تسعة",
    10: "zehn dix diez десять десяти عشر عشرة",
    11: "elf onze once одиннадцать", 12: "zwölf douze doce двенадцать",
    15: "fünfzehn quinze quince пятнадцать пятнадцати",
    20: "zwanzig vingt veinte двадцать двадцати عشرين عشرون",
    25: "fünfundzwanzig vingt-cinq veinticinco",
    30: "dreißig trente treinta тридцать тридцати ثلاثين ثلاثون",
    40: "vierzig quarante cuarenta сорок أربعين أربعون",
    45: "fünfundvierzig quarante-cinq", 50: "fünfzig cinquante cincuenta пятьдесят خمسين خمسون",
    60: "sechzig soixante sesenta шестьдесят ستين ستون",
    90: "neunzig quatre-vingt-dix noventa девяносто تسعين تسعون",
}  # fmt: skip


def _number_words() -> dict[str, float]:
    words: dict[str, float] = {word: i for i, word in enumerate(_EN_ONES)}
    for i, ten in enumerate(_EN_TENS, start=2):
        words[ten] = 10 * i
        for j in range(1, 10):
            words[f"{ten}-{_EN_ONES[j]}"] = words[f"{ten} {_EN_ONES[j]}"] = 10 * i + j
    words |= {"half a": 0.5, "a": 1}
    words |= {f"{word} and a half": i + 0.5 for i, word in enumerate(_EN_ONES[:10]) if i}
    hundreds: dict[str, float] = {"a hundred": 100, "one hundred": 100}
    for text, base in list(hundreds.items()):
        hundreds |= {f"{text} and {word}": base + n for word, n in words.items() if n >= 1}
    for value, several in _OTHER_NUMBERS.items():
        words |= {word: value for word in several.split() if word not in words}
    return words | hundreds


NUMBER_WORDS = _number_words()
_by_first: dict[str, list[str]] = {}
for _word in sorted(NUMBER_WORDS, key=len, reverse=True):
    _by_first.setdefault(_word[0], []).append(_word[1:])
WORD_NUMBER = "|".join(
    f"{re.escape(first)}(?:{'|'.join(map(re.escape, rest))})" for first, rest in _by_first.items()
)
HAN_NUMBER = "[〇零一二两兩三四五六七八九十百]{1,6}"
_HAN_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}


def number_value(text: str) -> float:
    """Value of a number in digits (decimal point or comma), English or other words, or Han signs.

    A comma before exactly three digits separates thousands, unless a zero stands before it.
    """
    if text in NUMBER_WORDS:
        return float(NUMBER_WORDS[text])
    if text[0] in _HAN_DIGITS or text[0] in "十百":
        return float(_han_value(text))
    whole, comma, fraction = text.partition(",")
    if comma and len(fraction) == 3 and whole != "0":
        return float(whole + fraction)
    return float(text.replace(",", "."))


def _han_value(text: str) -> int:
    total, digit = 0, 0
    for sign in text:
        if sign in "十百":
            total += (digit or 1) * (10 if sign == "十" else 100)
            digit = 0
        else:
            digit = 10 * digit + _HAN_DIGITS[sign]
    return total + digit


# between the two ends of a range
JOINER = (
    r"-->|->|>|-{1,2}|~|to|until|till|til|through|thru|bis|à|au|jusqu'(?:à|au)|a|hasta|al|до|по|"
    r"إلى|الى|حتى|到|至|から|まで"
)
AND = r"and|und|et|y|e|и|و|和|与|與|と|&"
FILLER = (
    r"(?:the|about|around|approximately|at|up|zum|zur|zu|la|le|les|el|los|las|l'|circa|ca\.?|etwa|environ|约|"
    r"約|大约|第)"
)
BETWEEN = re.compile(r"(?:\b(?:between|zwischen|entre|между)|بين|在|于)[\s\w]{0,12}$")

# directly before a quantity: it is a length of time, not a place in it
ADVERB = (
    r"(?:about|around|just|only|roughly|approximately|almost|nearly|exactly|precisely|at least|"
    r"at most|up to|some|another|over|more than|less than|the next|the last|the past|the|"
    r"approx\.?|ca\.?|circa|etwa|ungefähr|rund|knapp|environ|presque|unos|casi|aproximadamente|"
    r"около|примерно|почти|حوالي|大约|大約|約|约|了)"
)
_LENGTH_BEFORE = (
    r"last(?:s|ed|ing)?|for|every|within|takes?|took|taking|been|spans?|spanning|"
    r"continu\w{1,3} for|"
    r"duration(?: of| is| was)?|length(?: of| is| was)?|total(?:ing| of)?|runtime(?: of| is)?|"
    r"runs?|per|another|additional|next|than|each|over|during|wait(?:s|ed|ing)?|holds?|"
    r"seit|dauert|dauerte|lang|für|während|alle|innerhalb von|"
    r"pendant|durant|dure|duré|durée(?: de)?|depuis|toutes les|"
    r"durante|dura|duró|duración(?: de)?|cada|por|desde hace|"
    r"в течение|длится|длилось|длился|длилась|каждые|длительностью|продолжительностью|за|"
    r"لمدة|مدتها|مدته|مدة|تستمر|يستمر|كل|منذ"
)
LENGTH_BEFORE = re.compile(
    rf"(?:(?<![{LETTER}])(?:{_LENGTH_BEFORE})|持续|持續|长达|長達|历时|歷時|每|長さ|长度|長度)"
    rf"[\s:=]{{0,3}}(?:{ADVERB}\s{{0,2}}){{0,2}}$"
)
LENGTH_AFTER = re.compile(
    r"^(?:[\s-]{0,3}(?:long(?:er)?\b|in (?:length|duration|total)\b|"
    r"of\b(?! the (?:clip|audio|recording|track|file|sound))|later\b|apart\b|earlier\b|ago\b|"
    r"each\b|per\b|worth\b|duration\b|clips?\b|audio\b|loops?\b|samples?\b|recordings?\b|"
    r"silences?\b|pauses?\b|gaps?\b|delays?\b|intervals?\b|bursts?\b|segments?\b|passages?\b|"
    r"(?:before|after)\b(?! the (?:very )?(?:start|beginning|onset|end|close)\b)|"
    r"langen?\b|später\b|dauer\b|pause\b|"
    r"de (?:long|durée|silence|duración|silencio|pausa)\b|plus tard\b|después\b|más tarde\b|"
    r"спустя|тому|назад|тишины|длительн|طويل|لاحق)|"
    r"\s?(?:ほど|くらい|ぐらい|程度)?(?:间|間(?!の)|长(?!度)|長(?!さ)|之?[后後]|以[后後]|ずつ|続))"
)

# directly before a quantity: it is a place in the clip
PLACE_BEFORE = re.compile(
    rf"(?:(?<![{LETTER}])(?:at|around|near|from|until|till|before|after|since|mark|start(?:s|ing)?|"
    r"begin(?:s|ning)?|end(?:s|ing)?|onset|offset|timestamp|time|t|second|"
    r"bei|beim|um|ab|von|vom|gegen|nach|zwischen|in der|zur|"
    r"à|vers|dès|à la|aux?|entre|autour de|"
    r"a los|al|en el|en la|hacia|desde|tras|a las|en los|"
    r"на|с|от|около|к|между|в|после)|[@~≈=+]|عند|في|من|بين|بعد|حوالي|إلى|الى|在|于|於|第|从|從|自|"
    r"到|至)"
    rf"[\s:=]{{0,3}}(?:(?:{ADVERB}|der|die|den|le|la|les|el|los|l')\s{{0,2}}){{0,2}}$"
)
PLACE_AFTER = re.compile(
    r"^(?:[\s-]{0,3}(?:marks?\b|points?\b|timestamps?\b|in\b(?! (?:length|duration|total|all)\b)|"
    r"into\b|onwards?\b|(?:from|after) the (?:very )?(?:start|beginning|onset)\b)|"
    r"\s?(?:处|處|時点|时(?!间)|時(?!間)|地点|目|左右|の時点|頃|ごろ|ころ|に|で|から|まで|以降|开始|開始))"
)
MARK_AFTER = re.compile(r"^[\s-]{0,3}(?:marks?|points?|timestamps?|stage|position)\b")

# a whole clause gives a place relative to the clip's ends
BEFORE_END = re.compile(
    r"^\s{0,2}(?:before|from|short of|vor|avant|antes d|قبل|before the|離|前に?)"
    r"?\s{0,2}(?:the|dem|la|le|el|the very)?\s{0,2}(?:very )?"
    r"(?:end|close|finish|ende|schluss|fin|final|конца|النهاية|نهاية)\b"
)
TO_END = re.compile(
    r"^\s{0,2}(?:-|to|until|till|through|bis(?: zum| zur)?|jusqu'à|à|hasta|al|до|到|至|まで)\s{0,2}"
    r"(?:the|la|le|el)?\s{0,2}(?:very )?"
    r"(?:end|ende|schluss|fin|final|конца|结束|結束|結尾|结尾|最後)"
)
FROM_START = re.compile(
    r"(?:from|between|von|vom|depuis|du|desde|с|от) (?:the |dem |le |el )?(?:very )?"
    r"(?:start|beginning|outset|anfang|beginn|début|principio|inicio|начала)"
    r"(?: of the \w{1,12})?\s{0,2}"
    r"(?:to|until|till|through|and|bis(?: zum)?|à|jusqu'à|hasta|до|-)\s{0,2}$"
)
FIRST_WORDS = (
    r"first|opening|initial|ersten|premi(?:ère|er)s|primer[oa]s|перв(?:ые|ых)|أول|最初の?|前|"
    r"开头|開頭"
)
LAST_WORDS = (
    r"last|final|closing|letzten|derni(?:ère|er)s|últim[oa]s|последни[ех]|последних|آخر|最[后後]の?"
)
BEFORE_THE_END = re.compile(
    r"(?:结束前|結束前|离结束还?有?|終了|終わりの|قبل النهاية ب(?:ـ)?|قبل النهاية)\s{0,2}$"
)
FIRST = re.compile(rf"(?:{FIRST_WORDS})\s{{0,2}}$")
LAST = re.compile(rf"(?:{LAST_WORDS})\s{{0,2}}$")
CLOCK_LENGTH_AFTER = re.compile(
    r"^\s{1,2}(?:long\b|in length\b|song\b|clip\b|video\b|film\b|version\b|recording\b|edit\b)"
)
CLIP = (
    r"(?:clip|audio|recording|track|file|piece|song|sound|excerpt|segment|aufnahme|"
    r"enregistrement|grabación|записи|录音|錄音|音频)"
)

# a clock or number that is something else
NOT_A_TIME_AFTER = re.compile(
    r"^\s{0,2}(?:a\.?\s?m\b|p\.?\s?m\b|o'?clock|uhr\b|h\b|hrs\b|gmt\b|utc\b|[ecmp][sd]t\b|cet\b|"
    r"in the (?:morning|afternoon|evening)|at night|tonight|heures\b|"
    r"du (?:matin|soir)|de la (?:mañana|tarde|noche)|утра|вечера|дня|часов|صباح|مساء|ظهر|点|點|"
    r"time signature|time\b|ratio\b|scale\b|aspect\b|odds\b|score\b|win\b|victory\b|lead\b|draw\b|"
    r"signature|compression\b|mix\b|train\b|flight\b|bus\b|news\b|show\b|appointment\b)"
)
NOT_A_TIME_BEFORE = re.compile(
    r"(?:\b(?:genesis|exodus|leviticus|numbers|deuteronomy|joshua|judges|ruth|samuel|kings|"
    r"chronicles|ezra|nehemiah|esther|job|psalms?|proverbs|ecclesiastes|isaiah|jeremiah|ezekiel|"
    r"daniel|hosea|joel|amos|jonah|micah|habakkuk|zechariah|malachi|matthew|mark|luke|john|acts|"
    r"romans|corinthians|galatians|ephesians|philippians|colossians|thessalonians|timothy|titus|"
    r"hebrews|james|peter|jude|revelation|qur'?an|surah?|verses?|chapters?)|"
    r"\b(?:ratio|score[sd]?|scale|odds|won|wins|win|beat|lead|leads|leading|aspect|resolution|"
    r"alarm|o'clock|clock|scheduled|meeting|appointment|train|flight|bus|departs?|departing|"
    r"arrives?|dinner|lunch|breakfast|wake|meet|meets)"
    r"(?: \w{1,10}){0,2}(?: (?:of|is|was|at|for|by|to|says|reads|shows|strikes|set))?|"
    r"\b(?:time is|it is|it's) (?:now |already |only )?|"
    r"上午|下午|早上|晚上|午前|午後|\d{4}-\d\d-\d\d[t ]?|[#$€£¥])\s{0,2}$"
)
TRAP_UNIT_AFTER = re.compile(
    r"^\s{0,2}(?:people|persons?|men|women|children|kids|voices?|speakers?|dogs?|cats?|cars?|times|"
    r"met(?:er|re)s?|m\b|km\b|cm\b|mm\b|feet|foot|ft\b|inch|miles?|mph|db\b|decibels?|k?hz\b|hertz|"
    r"bpm|beats?|bars?|measures?|semitones?|octaves?|notes?|chords?|%|percent|degrees?|°|"
    r"years?|months?|weeks?|days?|hours?|dollars?|euros?|usd|pages?|points?|lines?|steps?|items?|"
    r"kg\b|g\b|kbps|bits?\b|bytes?|surround|o'?clock|players?|words?|syllables?|instruments?)"
)
TRAP_BEFORE = re.compile(
    r"(?:\b(?:pages?|pp?\.|aged?|ages?|verses?|chapters?|segments?|steps?|lines?|channels?|tracks?|"
    r"call|dial|phone|telephone|takt|versions?|figures?|fig\.|tables?|tab\.|sections?|score[sd]?|lead|bars?|measures?|numbers?|"
    r"no\.|items?|grades?|rows?|seats?|rooms?|years?)(?: (?:is|was|of|at))?|[$€£¥#])\s{0,2}$"
)

NONE_STATED = re.compile(
    r"(?:none|never|no such|nothing (?:like|of)|does(?: not|n't) (?:occur|appear|happen)|"
    r"did(?: not|n't) (?:occur|appear|happen)|"
    r"(?:isn't|aren't|wasn't|weren't)(?: \w+)? (?:heard|present|audible|there|any|in the)|"
    r"not (?:heard|present|audible|there|detected|found|in the)|is absent|absent|"
    r"can(?:not|'t| not) (?:be heard|hear)|(?:do|does|did)(?: not|n't) (?:hear|contain|include)|"
    r"no evidence of|(?:contains|contained) no|is missing|nothing$|nothing\.|"
    r"no (?:\w+ ){0,4}(?:is|are|was|were|can be) "
    r"(?:heard|audible|present|detected|found)|there (?:is|are|was|were) no|no \w+ events?|n/a|"
    r"kein(?:e|en|er|es)?|nicht zu hören|kommt nicht vor|niemals|nirgends|"
    r"aucune?|n'est pas|n'apparaît pas|jamais|pas d[eu']|"
    r"ningun[oa]?|ningún|no se (?:oye|escucha)|no hay|no aparece|nunca|"
    r"не (?:слышно|слышен|слышна|звучит|встречается)|отсутствует|нет\b|никогда)|"
    r"لا يوجد|لا توجد|غير موجود|لا يسمع|ليس هناك|没有|沒有|并无|不存在|听不到|聽不到|"
    r"ありません|聞こえません|聞こえない|存在しない|無い|ない(?:です)?$"
)
_NOT_DENIED = re.compile(
    r"\s{1,2}(?:\w{1,12} )?(?:stops?|stopped|ends?|ended|ceases?|pauses?|fades?|breaks?|silent|"
    r"other|doubt|idea|interruption|change)\b"
)
_AFFIRMED = re.compile(
    r"\b(?:throughout|from start to end|from start to finish|"
    r"the (?:whole|entire) (?:clip|time|file|recording|audio)|all the time|"
    r"continuously|constantly)\b"
)
_BEGINS_WITH_NO = re.compile(
    r"[^\w]{0,3}no(?! (?:idea|doubt|problem|one))(?:\.|,|$| [\w']{1,20}(?: [\w']{1,20})?[.!]?$)"
)
_ALPHABETIC = re.compile(rf"[{LETTER}]")


def states_none(text: str) -> bool:
    """Whether normalised `text` says that there is no such event."""
    if _AFFIRMED.search(text):
        return False
    if _BEGINS_WITH_NO.match(text):
        return True
    for match in NONE_STATED.finditer(text):
        before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
        whole = not _ALPHABETIC.match(before) and not _ALPHABETIC.match(after)
        if whole and not _NOT_DENIED.match(text, match.end()):
            return True
    return False


QUOTED_SPEECH = re.compile(
    r"\b(?:sa(?:ys?|id|ying)|asks?|asked|shouts?|shouted|announces?|announced|whispers?|tells?|"
    r"told|sings?|sang|states?|replies|replied|reads?)[\s,:]{1,3}(?:that )?\"[^\"]{1,400}\""
)
