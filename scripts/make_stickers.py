# SPDX-License-Identifier: Apache-2.0
"""Make the drawings, photos and split of `datasets/stickers` again from the packages that NOTICE.md names.

The tables `concepts.json`, `sources.json` and `extra_styles.json` are written by hand and are the input. Needed only
for this:

    npm install --ignore-scripts @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 @iconify-json/fxemoji@1.2.2 \
        @iconify-json/emojione@1.2.3 @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/noto-v1@1.2.5 \
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/streamline-emojis@1.2.4
    pip install resvg-py==0.5.0
    apt-get download lomiri-wallpapers-16.04     (unpack with dpkg -x; brick, grass and gravel are in skimage.data)
    apt-get download openclipart-svg             (unpack with dpkg -x; CLIPART is its usr/share/openclipart/svg)

    python scripts/make_stickers.py --node-modules node_modules --photos PHOTOS --clipart CLIPART --out /tmp/stickers
    python scripts/make_stickers.py --check      (only: does splits.json follow from the table?)

Another rasteriser or WebP version gives the same drawings with slightly other pixels. The shipped weights and the
frozen scenes belong to the shipped files, so compare, and do not replace them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.data.stickers import EXTRA_TABLE, content_hash, data_root
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json

TRAIN_STYLES = ("fluent-3d", "fxemoji", "noto", "twemoji")
VAL_STYLES = ("emojione",)
# Held out for validation: three landscapes without any thing of the vocabulary in front, and one texture.
VAL_BACKGROUNDS = (
    "aitzgorri_by_Aitzol_Berasategi.jpg",
    "life_by_Aitzol_Berasategi.jpg",
    "skimage_gravel.jpg",
    "sunset_by_Aitzol_Berasategi.jpg",
)
EXTRA_PACKAGES = {"noto-v1": "noto-v1", "fluent-flat": "fluent-emoji-flat", "streamline": "streamline-emojis"}
CLIPART = "openclipart"  # the one style that is drawn from loose files
SIDE, PHOTO_SIDE = 128, 1280
WEBP_QUALITY, JPEG_QUALITY = 90, 88


def make_splits(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The base/novel split: per supercategory, every fifth noun (starting at the third) is novel.

    Within a supercategory the nouns are ordered by (has no validation sprite, sha256 of the noun), so that
    the rule takes a fifth of those that can be validated and a fifth of the others.
    """
    supercategory: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: (-len(row["styles"]), row["hexcode"])):
        if row["labelled"]:
            supercategory.setdefault(row["noun"], row["supercategory"])
    nouns = sorted(supercategory)
    validated = {row["noun"] for row in rows if row["labelled"] and set(row["styles"]) & set(VAL_STYLES)}
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
    return {"sha256": content_hash(content), **content}


def icon_svg(icons: dict[str, Any], name: str) -> str:
    """The SVG of an icon of an Iconify collection; an alias is followed to what it stands for."""
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = {**{key: icons[key] for key in ("left", "top", "width", "height") if key in icons}, **icons["icons"][name]}
    box = " ".join(
        str(icon.get(key, default)) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{icon["body"]}</svg>'
    )


def draw(svg: str) -> Image.Image:
    """An SVG, at most SIDE pixels wide and high, as RGBA."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("drawing needs the package resvg-py: pip install resvg-py==0.5.0") from error
    image = Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, skip_system_fonts=True)))
    ).convert("RGBA")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def build_sprites(rows: list[dict[str, Any]], sources: dict[str, dict[str, str]], modules: Path, out: Path) -> int:
    """Draw every sprite of the table; returns how many."""
    collections = {style: read_json(modules / "@iconify-json" / style / "icons.json") for style in sources}
    count = 0
    for row in rows:
        for style in row["styles"]:
            code = row["hexcode"]
            if style in sources:
                image = draw(icon_svg(collections[style], sources[style][code]))
            else:
                image = read_fluent(modules / "@lobehub" / "fluent-emoji-3d" / "assets", code)
            save_sprite(image, out, style, code)
            count += 1
    return count


def save_sprite(image: Image.Image, out: Path, style: str, name: str) -> None:
    """Write a drawing to its place below the folder `out`."""
    target = out / "sprites" / style / f"{name}.webp"
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, quality=WEBP_QUALITY, method=6)


def build_extra(styles: dict[str, dict[str, dict[str, str]]], modules: Path, clipart: Path, out: Path) -> int:
    """Draw every sprite of the further training styles; returns how many."""
    for style, table in styles.items():
        icons = {}
        if style != CLIPART:
            icons = read_json(modules / "@iconify-json" / EXTRA_PACKAGES[style] / "icons.json")
        for name, entry in table.items():
            if style == CLIPART:
                image = read_clipart(clipart / entry["icon"])
            else:
                image = draw(icon_svg(icons, entry["icon"]))
            save_sprite(image, out, style, name)
    return sum(map(len, styles.values()))


def read_clipart(path: Path) -> Image.Image:
    """A drawing of the Open Clip Art Library, without the empty page around it."""
    if not path.exists():
        raise UserError(f"{path} is missing; is --clipart usr/share/openclipart/svg of the package?")
    image = draw(path.read_text(encoding="utf-8", errors="ignore"))
    return image.crop(image.getchannel("A").getbbox())


def read_fluent(assets: Path, code: str) -> Image.Image:
    """A drawing of Fluent Emoji 3D, whose file name may or may not hold the variation selector."""
    for name in (code.lower(), f"{code.lower()}-fe0f", code.lower().replace("-fe0f", "")):
        path = assets / f"{name}.webp"
        if path.exists():
            with Image.open(path) as image:
                return image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    raise UserError(f"{assets} has no drawing {code}; is the package's version 1.1.0?")


def build_photos(photos: Path, names: list[tuple[str, str]], out: Path) -> None:
    """Reduce the photos named (split, file name), found anywhere below `photos`, to PHOTO_SIDE."""
    for split, name in names:
        stem = name.removeprefix("skimage_").removesuffix(".jpg")
        found = [path for path in sorted(photos.rglob(f"{stem}.*")) if path.suffix.lower() in (".jpg", ".png")]
        if not found:
            raise UserError(f"{photos} holds no {stem}.jpg or {stem}.png")
        with Image.open(found[0]) as image:
            small = image.convert("RGB")
        small.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
        target = out / "backgrounds" / split / name
        target.parent.mkdir(parents=True, exist_ok=True)
        small.save(target, quality=JPEG_QUALITY)


def main(argv: list[str]) -> int:
    """Parse the command line, then check or build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare splits.json with its rule")
    parser.add_argument("--node-modules", type=Path, metavar="DIR", help="where npm installed the drawings")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="folder of the photos and textures, any depth")
    parser.add_argument("--clipart", type=Path, metavar="DIR", help="the clip art package's svg folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="empty folder to write")
    args = parser.parse_args(argv)
    tables = data_root()
    rows = read_json(tables / "concepts.json")["concepts"]
    splits = make_splits(rows)
    if args.check:
        if read_json(tables / "splits.json") != splits:
            raise UserError(f"{tables / 'splits.json'} does not follow from concepts.json")
        print(f"split {splits['sha256'][:12]} follows from the table")
        return 0
    if not (args.node_modules and args.photos and args.clipart and args.out):
        raise UserError("give --node-modules, --photos, --clipart and --out, or --check")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} is not an empty folder")
    shipped = [(path.parent.name, path.name) for path in sorted((tables / "backgrounds").glob("*/*.jpg"))]
    build_photos(args.photos, shipped, args.out)
    count = build_sprites(rows, read_json(tables / "sources.json")["icons"], args.node_modules, args.out)
    count += build_extra(read_json(tables / EXTRA_TABLE)["styles"], args.node_modules, args.clipart, args.out)
    for name in ("concepts.json", "sources.json", EXTRA_TABLE, "near_synonyms.json", "NOTICE.md"):
        (args.out / name).write_bytes((tables / name).read_bytes())
    (args.out / "splits.json").write_text(json.dumps(splits, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{args.out}: {count} drawings, {len(shipped)} photos, split {splits['sha256'][:12]}")
    return 0


if __name__ == "__main__":
    run_cli(main)
