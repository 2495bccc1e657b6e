# SPDX-License-Identifier: Apache-2.0
"""Build `datasets/stickers` from a folder of prepared material.

    python scripts/make_stickers.py --source MATERIAL --out datasets/stickers

MATERIAL holds `sprites/STYLE/HEXCODE.webp`, `concepts.json` and `backgrounds/ship/*.jpg`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

TRAIN_STYLES = ("fluent-3d", "fxemoji", "noto", "twemoji")
VAL_STYLES = ("emojione",)
# Held out for validation: three landscapes without any thing of the vocabulary in front, and one texture.
VAL_BACKGROUNDS = (
    "aitzgorri_by_Aitzol_Berasategi.jpg",
    "life_by_Aitzol_Berasategi.jpg",
    "skimage_gravel.jpg",
    "sunset_by_Aitzol_Berasategi.jpg",
)
MIN_STYLES = 4
# Too rare to be a class, and too like one (lemon, whale, trumpet) to be pasted without a label.
AMBIGUOUS = frozenset({"lime", "orca", "trombone"})


def read_rows(source: Path) -> list[dict]:
    """Rows of the concept table, without the styles that are not shipped, in a canonical order."""
    shipped = set(TRAIN_STYLES + VAL_STYLES)
    table = json.loads((source / "concepts.json").read_text(encoding="utf-8"))["concepts"]
    classes = {row["noun"] for row in table if len(row["styles"]) >= MIN_STYLES}
    rows = []
    for row in table:
        if row["noun"] not in AMBIGUOUS:
            styles = sorted(shipped & set(row["styles"]))
            rows.append({**row, "styles": styles, "labelled": row["noun"] in classes})
    return sorted(rows, key=lambda row: (row["noun"], row["hexcode"]))


def make_splits(rows: list[dict]) -> dict:
    """The base/novel split: per supercategory, every fifth noun (starting at the third) is novel.

    Within a supercategory the nouns are ordered by (has no validation sprite, sha256 of the noun), so that
    the rule takes a fifth of those that can be validated and a fifth of the others.
    """
    supercategory: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: (-len(row["styles"]), row["hexcode"])):
        if row["labelled"]:
            supercategory.setdefault(row["noun"], row["supercategory"])
    nouns = sorted(supercategory)
    validated = {r["noun"] for r in rows if r["labelled"] and set(r["styles"]) & set(VAL_STYLES)}
    novel: list[str] = []
    for group in sorted(set(supercategory.values())):
        members = [noun for noun in nouns if supercategory[noun] == group]
        members.sort(key=lambda noun: (noun not in validated, hashlib.sha256(noun.encode()).hexdigest()))
        novel += members[2::5]
    content = {
        "nouns": nouns,
        "supercategory": [supercategory[noun] for noun in nouns],
        "base": [noun for noun in nouns if noun not in set(novel)],
        "novel": sorted(novel),
        "validated": sorted(validated),
        "styles": {"train": list(TRAIN_STYLES), "val": list(VAL_STYLES)},
        "val_backgrounds": list(VAL_BACKGROUNDS),
    }
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return {"sha256": hashlib.sha256(canonical.encode("utf-8")).hexdigest(), **content}


def build(source: Path, out: Path) -> dict:
    """Copy the shipped sprites and photos and write the two tables; returns the split."""
    rows = read_rows(source)
    for row in rows:
        for style in row["styles"]:
            target = out / "sprites" / style / f"{row['hexcode']}.webp"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / "sprites" / style / target.name, target)
    for photo in sorted((source / "backgrounds" / "ship").glob("*.jpg")):
        target = out / "backgrounds" / ("val" if photo.name in VAL_BACKGROUNDS else "train") / photo.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, target)
    note = (
        "one row per drawing: noun is the class (rows that share a noun are one class); styles are the folders of "
        "sprites/ that hold HEXCODE.webp; labelled false: drawn only as an unlabelled distractor; keywords from "
        "emojibase-data 17.0.0 (MIT, Unicode CLDR)"
    )
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (out / "concepts.json").write_text(
        f'{{"note": {json.dumps(note)},\n"concepts": [\n{lines}\n]}}\n', encoding="utf-8"
    )
    splits = make_splits(rows)
    (out / "splits.json").write_text(json.dumps(splits, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return splits


def main(argv: list[str]) -> int:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of prepared material")
    parser.add_argument("--out", type=Path, required=True, help="data set folder to write")
    args = parser.parse_args(argv)
    splits = build(args.source, args.out)
    print(
        f"{len(splits['nouns'])} nouns, {len(splits['base'])} base, {len(splits['novel'])} novel, "
        f"{len(splits['validated'])} with a validation sprite, split {splits['sha256'][:12]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
