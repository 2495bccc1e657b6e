# SPDX-License-Identifier: Apache-2.0
"""Everyday English that WordNet lacks or files elsewhere: other names of COCO's words, and what they are grouped as."""

from __future__ import annotations

SYNONYMS: dict[str, str] = {
    "aeroplane": "airplane", "plane": "airplane", "jet": "airplane", "automobile": "car", "bike": "bicycle",
    "motorbike": "motorcycle", "lorry": "truck", "human": "person", "pedestrian": "person", "fridge": "refrigerator",
    "telly": "tv", "television set": "tv", "tv set": "tv", "tv monitor": "tv", "phone": "cell phone",
    "cellphone": "cell phone", "smartphone": "cell phone", "mobile": "cell phone", "hairdryer": "hair drier",
    "hair dryer": "hair drier", "blow dryer": "hair drier", "remote control": "remote", "sofa": "couch",
    "settee": "couch", "houseplant": "potted plant", "pot plant": "potted plant", "table": "dining table",
    "doughnut": "donut", "hydrant": "fire hydrant", "stoplight": "traffic light", "traffic signal": "traffic light",
    "computer mouse": "mouse", "computer keyboard": "keyboard", "notebook computer": "laptop",
    "wineglass": "wine glass", "goblet": "wine glass", "mug": "cup", "teacup": "cup", "rucksack": "backpack",
    "purse": "handbag",
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

GROUPS: dict[str, tuple[str, ...]] = {
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
    "bag": ("backpack", "handbag", "suitcase"),
    "luggage": ("backpack", "handbag", "suitcase"),
    "sports equipment": _SPORT,
    "sports gear": _SPORT,
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

PERSONS = frozenset(
    ("man", "woman", "child", "boy", "girl", "lady", "kid", "baby", "guy", "adult", "toddler", "teenager", "gentleman",
     "player", "driver", "rider", "worker", "tourist", "student")
)  # fmt: skip
"""Kinds of person; the lexicon's meaning of *person* is the body that is seen."""

IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
    "teeth": "tooth", "feet": "foot", "knives": "knife", "shelves": "shelf", "leaves": "leaf", "loaves": "loaf",
    "scarves": "scarf", "wolves": "wolf", "calves": "calf", "oxen": "ox",
}  # fmt: skip
"""Irregular plurals."""
