# SPDX-License-Identifier: Apache-2.0
"""Hints for words that an English text encoder does not know: the English name, the script, or the nearest words.

There is no language detection. A word that the weights do not know gets a hint if it is in a list of German, French and
Chinese names of common things, or written in another script.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

LANGUAGES = ("German", "French", "Chinese")

# English: German / French / Chinese; several names by commas.
_NAMES = """
person: Mensch, Leute, Menschen / personne, gens / 人, 人们
man: Mann / homme / 男人
woman: Frau / femme / 女人
child: Kind, Kinder / enfant, enfants / 孩子, 小孩
animal: Tier, Tiere / bête, animaux / 动物, 動物
vehicle: Fahrzeug, Fahrzeuge / véhicule, véhicules / 车辆, 交通工具
furniture: Möbel / meuble, meubles / 家具
food: Essen / nourriture / 食物
bicycle: Fahrrad, Fahrräder, Rad / vélo, vélos, bicyclette / 自行车, 单车, 自行車
car: Auto, Autos, Wagen / voiture, voitures / 汽车, 车, 汽車, 小汽车
motorcycle: Motorrad, Motorräder / moto, motos / 摩托车, 摩托車
airplane: Flugzeug, Flugzeuge / avion, avions / 飞机, 飛機
bus: Busse / autobus / 公交车, 巴士, 公共汽车
train: Zug, Züge, Bahn / trains / 火车, 火車
truck: Lastwagen, LKW, Laster / camion, camions / 卡车, 货车, 卡車
boat: Boot, Boote, Schiff / bateau, bateaux / 船, 小船
traffic light: Ampel, Ampeln / feu tricolore, feux / 红绿灯, 交通灯, 紅綠燈
fire hydrant: Hydrant, Hydranten / bouche d'incendie / 消防栓
stop sign: Stoppschild / panneau stop / 停车标志
parking meter: Parkuhr / parcmètre / 停车计时器
bench: Bank, Sitzbank, Parkbank / banc, bancs / 长椅, 长凳
bird: Vogel, Vögel / oiseau, oiseaux / 鸟, 鳥
cat: Katze, Katzen, Kater / chat, chats / 猫, 貓
dog: Hund, Hunde / chien, chiens / 狗, 犬
horse: Pferd, Pferde / cheval, chevaux / 马, 馬
sheep: Schaf, Schafe / mouton, moutons / 羊, 绵羊
cow: Kuh, Kühe / vache, vaches / 牛, 奶牛
elephant: Elefant, Elefanten / éléphant, éléphants / 大象
bear: Bär, Bären / ours / 熊
zebra: Zebras / zèbre, zèbres / 斑马, 斑馬
giraffe: Giraffen / girafe, girafes / 长颈鹿, 長頸鹿
backpack: Rucksack / sac à dos / 背包
umbrella: Regenschirm, Schirm / parapluie / 雨伞, 伞, 雨傘
handbag: Handtasche / sac à main / 手提包
tie: Krawatte, Schlips / cravate / 领带
suitcase: Koffer / valise, valises / 行李箱, 手提箱
skis: Skier / / 滑雪板
ball: Bälle / balle, ballon / 球
kite: Drachen / cerf-volant / 风筝, 風箏
skateboard: / planche à roulettes / 滑板
surfboard: Surfbrett / planche de surf / 冲浪板
tennis racket: Tennisschläger / raquette / 网球拍
bottle: Flasche, Flaschen / bouteille, bouteilles / 瓶子, 瓶
wine glass: Weinglas / verre à vin / 酒杯
cup: Tasse, Tassen, Becher / tasses / 杯子, 杯
fork: Gabel, Gabeln / fourchette / 叉子
knife: Messer / couteau, couteaux / 刀
spoon: Löffel / cuillère, cuillères / 勺子
bowl: Schüssel, Schale / saladier / 碗
banana: Banane, Bananen / banane, bananes / 香蕉
apple: Apfel, Äpfel / pomme, pommes / 苹果, 蘋果
orange: Orangen, Apfelsine / / 橙子, 橘子
broccoli: Brokkoli / brocoli / 西兰花
carrot: Karotte, Karotten, Möhre / carotte, carottes / 胡萝卜
bread: Brot / / 面包
pizza: / / 披萨, 比萨
cake: Kuchen, Torte / gâteau, gâteaux / 蛋糕
chair: Stuhl, Stühle / chaise, chaises / 椅子
couch: / canapé / 沙发, 沙發
potted plant: Topfpflanze, Pflanze / plante, plantes / 盆栽, 植物
bed: Bett, Betten / lit, lits / 床
table: Tisch, Tische / tables / 桌子
toilet: Toilette, Klo / toilettes / 马桶, 厕所
tv: Fernseher / télé, téléviseur, télévision / 电视, 電視
laptop: / ordinateur portable / 笔记本电脑
mouse: Maus, Mäuse / souris / 鼠标, 老鼠
keyboard: Tastatur / clavier / 键盘, 鍵盤
cell phone: Handy, Handys, Telefon / téléphone, téléphones / 手机, 电话, 手機
microwave: Mikrowelle / micro-ondes / 微波炉
oven: Ofen, Backofen, Herd / / 烤箱
toaster: / grille-pain / 烤面包机
sink: Waschbecken, Spüle / évier, lavabo / 水槽
refrigerator: Kühlschrank / réfrigérateur, frigo / 冰箱
book: Buch, Bücher / livre, livres / 书, 書
clock: Uhr, Uhren / horloge, horloges / 钟, 时钟
vase: Vasen / vases / 花瓶
scissors: Schere / ciseaux / 剪刀
teddy bear: Teddybär / ours en peluche, nounours / 泰迪熊
hair drier: Föhn, Haartrockner / sèche-cheveux / 吹风机
toothbrush: Zahnbürste / brosse à dents / 牙刷
lamp: Lampe, Lampen / lampes / 灯
tree: Baum, Bäume / arbre, arbres / 树, 樹
flower: Blume, Blumen / fleur, fleurs / 花
house: Haus, Häuser / maison, maisons / 房子
window: Fenster / fenêtre, fenêtres / 窗户
door: Tür, Türen / porte, portes / 门
fish: Fisch, Fische / poisson, poissons / 鱼, 魚
hat: Hut, Hüte, Mütze / chapeau, chapeaux / 帽子
shoe: Schuh, Schuhe / chaussure, chaussures / 鞋, 鞋子
guitar: Gitarre / guitare, guitares / 吉他
"""

_SCRIPTS = {
    "CJK": "Chinese characters",
    "HIRAGANA": "Japanese script",
    "KATAKANA": "Japanese script",
    "HANGUL": "Korean script",
    "CYRILLIC": "Cyrillic script",
    "GREEK": "Greek script",
    "ARABIC": "Arabic script",
    "HEBREW": "Hebrew script",
    "THAI": "Thai script",
    "DEVANAGARI": "Devanagari script",
    "BENGALI": "Bengali script",
    "TAMIL": "Tamil script",
}


@cache
def _english() -> dict[str, tuple[str, str]]:
    """Foreign name -> (English, language)."""
    english_names: dict[str, tuple[str, str]] = {}
    for line in _NAMES.strip().splitlines():
        english, _, translations = line.partition(":")
        for language, names in zip(LANGUAGES, translations.split("/"), strict=True):
            for name in filter(None, (part.strip().casefold() for part in names.split(","))):
                english_names.setdefault(name, (english, language))
    return english_names


def english_of(word: str) -> tuple[str, str] | None:
    """(English, language) of a common thing's name in German, French or Chinese."""
    return _english().get(unicodedata.normalize("NFC", word).strip().casefold())


def script_of(word: str) -> str | None:
    """The name of the script of the first letter that is not Latin; None if all are."""
    for letter in filter(str.isalpha, word):
        name = unicodedata.name(letter, "").split(" ")[0]
        if name in _SCRIPTS:
            return _SCRIPTS[name]
    return None


def hint_of(word: str) -> str | None:
    """The hint for a word that English weights do not know; None: there is none."""
    if (translation := english_of(word)) is not None:
        english, language = translation
        return f"{word!r} is {language} for {english!r}, but these weights know English only: type {english!r}"
    if (script := script_of(word)) is not None:
        return f"{word!r} is written in {script}, but these weights know English only: type its English name"
    return None


def unknown_word(word: str, nearest: Sequence[str], *, misspelt: Sequence[str] = (), english: bool) -> str:
    """The hint for a word that these weights were not trained on.

    Args:
        nearest: words that they know, the nearest in meaning first.
        misspelt: words that they know and that are spelt like it, the likeliest first.
        english: whether those are English.
    """
    if english and (hint := hint_of(word)) is not None:
        return hint
    unknown = f"{word!r} is not a word these weights were trained on"
    if misspelt:  # of a misspelt word the embedding is noise, and so are the words that are nearest to it
        return f"{unknown}; did you mean {' or '.join(misspelt)}?"
    return f"{unknown}; nearest known words: {', '.join(nearest)}"
