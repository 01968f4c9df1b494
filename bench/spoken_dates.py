"""The bundled rows of `tanzaku demo --task generation`: a day and a time as people say them in Japanese, and the same
in ISO 8601, without the year.

`python -m bench spoken_dates` looks whether the files are what this writes, `--write` writes them. Training and
validation rows are said in one set of phrases, test rows in another, and no moment is in two rows.
"""

from __future__ import annotations

import csv
import io
import random
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "src" / "tanzaku" / "data" / "dates"
ROWS = {"train": 200, "valid": 60, "test": 60}
Phrase = tuple[str, int, int]
ASKED = " ISO:"

# What is said around a day (D) and a time (T), and the first and the last hour it is said of: in training and
# validation rows ...
KNOWN = (
    ("会議はDのTからです。", 9, 17),
    ("D、Tに駅の改札で待ち合わせましょう。", 8, 19),
    ("歯医者の予約はDのTに取れました。", 9, 18),
    ("DのTに、荷物が届きます。", 9, 20),
    ("次の練習はDのT、体育館です。", 9, 19),
    ("Tに開演です。日にちはD、お忘れなく。", 13, 19),
    ("DのTまでに原稿を送ってください。", 9, 22),
    ("面接はD、Tにお越しください。", 9, 17),
    ("飛行機は、DのT発に変わりました。", 6, 21),
    ("同窓会はDにします。Tに始めます。", 11, 19),
    ("Dは、Tからお茶の稽古があります。", 10, 17),
    ("夏祭りの寄り合い、DのTでどうでしょう。", 17, 20),
    ("母がTに着きます。Dです。", 7, 21),
    ("図書館での読み聞かせは、D、T開始。", 10, 16),
    ("DのTに電話をください。", 8, 21),
    ("健康診断はDです。受付はTまで。", 8, 16),
    ("引っ越しの車はDのTに来るそうです。", 8, 15),
    ("Tの新幹線を予約しました、Dの。", 6, 21),
    ("D。T集合。雨なら中止。", 6, 14),
    ("花火はDのTに上がり始めます。", 19, 20),
    ("申し込みはDのTで締め切ります。", 9, 22),
    ("美容院、DのTに空きがあるそうです。", 10, 19),
    ("写真館にはDのTに行きます。", 10, 17),
    ("保護者会はD、T、音楽室にて。", 10, 18),
)
# ... and in test rows.
HELD_OUT = (
    ("ええと、たしかDの、Tだったと思う。", 7, 21),
    ("短冊を飾るのはDにしよう、Tには暗くなるから。", 17, 19),
    ("もしもし、Dですが、Tに二人で席はありますか。", 11, 20),
    ("「DのTに、河原で」と手紙にあった。", 6, 21),
    ("Tの船に乗るから、Dは早起きだよ。", 6, 8),
    ("猫を預けるのはD。動物病院が開くTがいいな。", 8, 10),
    ("あのう、DのTって、まだ間に合いますか。", 9, 20),
    ("流星群の見頃、Dで、しかもTごろなんだって。", 19, 22),
    ("D、パン教室。T。エプロンを忘れずに。", 9, 14),
    ("じゃあDで決まりね。時間はTでいい？", 8, 21),
    ("約束したでしょう、DのTに迎えに来るって。", 7, 20),
    ("Tに鐘が鳴ったら、Dの市が始まる。", 6, 10),
)

DIGITS = "〇一二三四五六七八九"
DAYS = {
    (1, 1): "元日",
    (2, 14): "バレンタインデー",
    (3, 3): "ひな祭り",
    (4, 1): "エイプリルフール",
    (5, 5): "こどもの日",
    (7, 7): "七夕",
    (8, 11): "山の日",
    (11, 3): "文化の日",
    (12, 24): "クリスマスイブ",
    (12, 25): "クリスマス",
    (12, 31): "大晦日",
}
BEGIN = datetime(2026, 1, 1)  # of any year that is no leap year


def in_kanji(number: int) -> str:
    """A number below 100 in Chinese numerals."""
    tens, ones = divmod(number, 10)
    return ("" if tens < 2 else DIGITS[tens]) + ("十" if tens else "") + (DIGITS[ones] if ones or not tens else "")


def day_said(at: datetime, written: Callable[[int], str]) -> str:
    """The day by its name, if it has one, or by its numbers."""
    return DAYS.get((at.month, at.day)) or f"{written(at.month)}月{written(at.day)}日"


def time_said(at: datetime, rng: random.Random, written: Callable[[int], str]) -> str:
    """The time: with a part of the day and twelve hours, or with twenty-four."""
    minute = {0: "", 30: "半"}.get(at.minute, f"{written(at.minute)}分")
    if at.hour == 12 and not at.minute:
        return "正午"
    if rng.random() < 0.25:
        return f"{written(at.hour)}時{minute}"
    hour = at.hour % 12 or 12
    if at.hour < 12:
        part = rng.choice(["朝の", "朝", "午前"]) if at.hour < 10 else "午前"
    elif at.hour == 12:
        part = "お昼の"
    elif at.hour < 16:
        part = "午後"
    elif at.hour < 19:
        part = rng.choice(["夕方の", "夕方", "午後"])
    else:
        part = rng.choice(["夜の", "夜", "午後"])
    return f"{part}{written(hour)}時{minute}"


def moment(rng: random.Random, first: int, last: int) -> datetime:
    """A moment between two hours of a day; one in six is on a day that has a name."""
    day = BEGIN + timedelta(days=rng.randrange(365))
    if rng.random() < 1 / 6:
        month, number = rng.choice(list(DAYS))
        day = datetime(day.year, month, number)
    minute = rng.choice([0, 0, 30, 30, 15, 45, 10, 20, 40, 50])
    return day + timedelta(hours=rng.randrange(first, last + 1), minutes=minute)


def rows() -> dict[str, list[tuple[str, str]]]:
    """By split, prompts and completions."""
    rng, seen = random.Random(7), set[datetime]()
    return {split: _split(HELD_OUT if split == "test" else KNOWN, count, seen, rng) for split, count in ROWS.items()}


def _split(phrases: Sequence[Phrase], count: int, seen: set[datetime], rng: random.Random) -> list[tuple[str, str]]:
    """Rows of which each phrase has as many, at moments that no row was of before."""
    order = [phrase for _ in range(-(-count // len(phrases))) for phrase in rng.sample(phrases, len(phrases))]
    found = []
    for phrase, first, last in order[:count]:
        while (at := moment(rng, first, last)) in seen:
            pass
        seen.add(at)
        written = rng.choice([str, in_kanji])
        said = phrase.replace("D", day_said(at, written)).replace("T", time_said(at, rng, written))
        found.append((said + ASKED, f"{at:%m-%dT%H:%M}"))
    return found


def text_of(split: Sequence[tuple[str, str]]) -> str:
    file = io.StringIO()
    csv.writer(file, delimiter="\t", lineterminator="\n").writerows([("prompt", "completion"), *split])
    return file.getvalue()


def table(arguments: Sequence[str]) -> None:
    for name, split in rows().items():
        path = FOLDER / f"{name}.tsv"
        if "--write" in arguments:
            path.write_text(text_of(split), encoding="utf-8", newline="\n")
        elif path.read_text(encoding="utf-8") != text_of(split):
            sys.exit(f"bench: {path} is not what is written here; python -m bench spoken_dates --write")
