# SPDX-License-Identifier: Apache-2.0
"""Everyday English that WordNet lacks: other names of COCO's words, their kinds and groups."""

from __future__ import annotations

SYNONYMS: dict[str, str] = {
    "aeroplane": "airplane", "plane": "airplane", "jet": "airplane", "automobile": "car", "bike": "bicycle",
    "motorbike": "motorcycle", "lorry": "truck", "human": "person", "pedestrian": "person", "fridge": "refrigerator",
    "telly": "tv", "television set": "tv", "tv set": "tv", "tv monitor": "tv", "computer monitor": "tv",
    "computer screen": "tv", "flat screen": "tv", "pc": "computer", "macbook": "laptop", "phone": "cell phone",
    "cellphone": "cell phone", "smartphone": "cell phone", "mobile": "cell phone", "hairdryer": "hair drier",
    "hair dryer": "hair drier", "blow dryer": "hair drier", "remote control": "remote", "sofa": "couch",
    "settee": "couch", "houseplant": "potted plant", "pot plant": "potted plant", "table": "dining table",
    "doughnut": "donut", "hydrant": "fire hydrant", "stoplight": "traffic light", "traffic signal": "traffic light",
    "computer mouse": "mouse", "computer keyboard": "keyboard", "notebook computer": "laptop",
    "wineglass": "wine glass", "goblet": "wine glass", "mug": "cup", "teacup": "cup", "rucksack": "backpack",
    "purse": "handbag", "stop light": "traffic light",
    "necktie": "tie", "ski": "skis", "football": "sports ball", "soccer ball": "sports ball", "ball": "sports ball",
    "basketball": "sports ball", "tennis ball": "sports ball", "baseball": "sports ball", "washbasin": "sink",
    "timepiece": "clock", "stuffed animal": "teddy bear", "teddy": "teddy bear", "parasol": "umbrella",
}  # fmt: skip
"""Another name -> the word."""

_FOOD = ("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake")
_SPORT = (
    "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket",
)  # fmt: skip
_TRAFFIC = ("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat")
_TABLE = ("wine glass", "cup", "fork", "knife", "spoon", "bowl")

COLLECTIVE: dict[str, str] = dict.fromkeys(("crowd", "audience", "team", "family"), "person")
"""Several in one noun -> the word that each of their boxes shows."""

GROUPS: dict[str, tuple[str, ...]] = {
    **{noun: (member,) for noun, member in COLLECTIVE.items()},
    "vehicle": _TRAFFIC,
    "transport": _TRAFFIC,
    "motor vehicle": ("car", "motorcycle", "bus", "truck"),
    "ship": ("boat",),
    "food": _FOOD,
    "meal": ("sandwich", "hot dog", "pizza"),
    "snack": _FOOD,
    "fast food": ("sandwich", "hot dog", "pizza", "donut"),
    "dessert": ("donut", "cake"),
    "fruit": ("banana", "apple", "orange"),
    "vegetable": ("broccoli", "carrot"),
    "dish": _TABLE,
    "tableware": _TABLE,
    "crockery": ("cup", "bowl"),
    "drinkware": ("wine glass", "cup"),
    "glass": ("wine glass",),
    "cutlery": ("fork", "knife", "spoon"),
    "silverware": ("fork", "knife", "spoon"),
    "utensil": ("fork", "knife", "spoon"),
    "kitchenware": _TABLE,
    "appliance": ("microwave", "oven", "toaster", "refrigerator", "hair drier"),
    "electronics": ("tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    "electronic device": ("tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    "gadget": ("laptop", "remote", "cell phone"),
    "screen": ("tv", "laptop"),
    "display": ("tv", "laptop"),
    "monitor": ("tv",),  # COCO's boxes of *tv* are those of monitors too
    "bag": ("backpack", "handbag", "suitcase"),
    "luggage": ("backpack", "handbag", "suitcase"),
    "sports equipment": _SPORT,
    "sports gear": _SPORT,
    "glove": ("baseball glove",),
    "toy": ("teddy bear", "kite", "frisbee"),
    "plant": ("potted plant",),
    "pet": ("cat", "dog", "bird"),
    "livestock": ("cow", "sheep", "horse"),
    "farm animal": ("cow", "sheep", "horse"),
    "traffic sign": ("stop sign",),
    "sign": ("stop sign",),
    "accessory": ("backpack", "umbrella", "handbag", "tie", "suitcase"),
}
"""What people call several of the words -> those."""

_INDISTINCT = {
    "person": "adult athlete baby batter bicyclist biker boy bride businessman businesswoman catcher chef child cop "
    "customer cyclist dancer doctor driver farmer father firefighter fireman fisherman gentleman girl goalkeeper "
    "grandfather grandmother guy hiker infant jogger kid lady male man mother motorcyclist musician nurse officer "
    "passenger player policeman policewoman referee rider sailor shopper skateboarder skater skier snowboarder soldier "
    "spectator student surfer swimmer teacher teenager toddler tourist umpire waiter waitress woman worker female",
    "cat": "kitten kitty",
    "dog": "doggy pup puppy",
    "cow": "bull calf heifer ox steer",
    "sheep": "ewe lamb",
    "horse": "colt foal mare stallion",
    "car": "coupe hatchback sedan suv",
    "chair": "armchair recliner",
}
INDISTINCT: dict[str, str] = {word: general for general, words in _INDISTINCT.items() for word in words.split()}
"""Kinds that differ from a word by age, sex, occupation or build, which a small encoder cannot see -> the word."""

KINDS: dict[str, tuple[str, ...]] = {
    **{word: (general,) for word, general in INDISTINCT.items()},
    "van": ("car", "truck", "bus"), "minivan": ("car", "truck", "bus"), "pickup": ("car", "truck"),
    "pickup truck": ("car", "truck"), "camper": ("car", "truck", "bus"), "jeep": ("car", "truck"),
    "streetcar": ("train", "bus"), "tram": ("train", "bus"), "trolley": ("train", "bus"), "metro": ("train",),
    "subway": ("train",), "sailboat": ("boat",), "yacht": ("boat",), "catamaran": ("boat",), "houseboat": ("boat",),
    "stool": ("chair",), "beanbag": ("chair", "couch"),
    "desk": ("dining table",), "coffee table": ("dining table",), "stove": ("oven",), "watch": ("clock",),
    "wristwatch": ("clock",), "street sign": ("stop sign",),
    "jar": ("bottle",), "flask": ("bottle",), "pot": ("potted plant", "bowl"), "flowerpot": ("potted plant", "vase"),
}  # fmt: skip
"""A kind of one of several words, by COCO's use of them -> the words, which do not contradict it."""

OTHER_THINGS = frozenset(
    ("bullet", "cell", "charger", "chopper", "grip", "hack", "lumber", "mount", "painter", "patty",
     "plug", "sinker", "street sign", "volume", "wheel")
)  # fmt: skip
"""WordNet lists them as names of one of the words (*wheel* of bicycle, *plug* of fire hydrant); users mean others."""

ACTIVITIES = frozenset(("carrying", "eating", "holding", "playing", "riding", "walking", "wearing"))
"""What comes after the noun that a phrase is about (*man* of "man wearing a hat") or before it ("riding boot")."""

AFTER_HEADS = ACTIVITIES | frozenset(
    ("at", "behind", "beside", "by", "for", "from", "in", "inside", "near", "next", "of", "on", "over", "that", "under",
     "which", "who", "with", "without")
)  # fmt: skip
"""What comes after the noun that a phrase is about: *dog* of "dog with a ball"."""

STATES = frozenset(("full", "lying", "made", "running", "sitting", "sleeping", "standing"))
"""What may stand between that noun and these: *sitting* of "people sitting on a bench"."""

AMOUNTS = frozenset(
    (*COLLECTIVE, "bunch", "close-up", "couple", "flock", "group", "herd", "heap", "image", "kind", "lot", "number",
     "pack", "pair", "photo", "photograph", "picture", "piece", "pile", "row", "school", "set", "slice", "sort",
     "stack", "swarm", "type")
)  # fmt: skip
"""Nouns whose phrase is about what follows *of*: *skis* of "a pair of skis"."""

IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
    "teeth": "tooth", "feet": "foot", "knives": "knife", "shelves": "shelf", "leaves": "leaf", "loaves": "loaf",
    "scarves": "scarf", "wolves": "wolf", "calves": "calf", "oxen": "ox",
}  # fmt: skip
"""Irregular plurals."""
