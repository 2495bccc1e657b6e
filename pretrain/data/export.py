# SPDX-License-Identifier: Apache-2.0
"""Write Sticker Scenes as a COCO data set.

Pictures go to DIR/SPLIT/000001.jpg and so on, labels to DIR/instances_SPLIT.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from pretrain.data.scenes import ObjectEntry, SceneSource, coco_objects
from pretrain.data.stickers import Stickers
from pretrain.engine.errors import UserError
from pretrain.engine.files import alone_in, write_json

JPEG_QUALITY = 95
LICENCES = (
    {"id": 1, "name": "Apache-2.0 (generator; noto, fxemoji), MIT (fluent-3d), CC-BY-4.0 (twemoji, emojione), "
                      "CC-BY-4.0 and CC0-1.0 (photos); see NOTICE.md of the data set"},
)  # fmt: skip


def coco_header(stickers: Stickers, source: SceneSource) -> dict[str, object]:
    """The `info`, `licenses` and `categories` of an export; category id = class id + 1."""
    return {
        "info": {
            "description": f"Sticker Scenes, split {source.split}, seed {source.seed}, labels {source.labels}",
            "split": source.split,
            "seed": source.seed,
            "size": list(source.size),
            "labels": source.labels,
            "split_sha256": stickers.split_hash,
            "category_id": "index into nouns plus 1",
            "licence": LICENCES[0]["name"],
        },
        "licenses": list(LICENCES),
        "categories": [
            {
                "id": index + 1,
                "name": noun,
                "supercategory": stickers.supercategory[index],
                "novel": index in stickers.novel,
            }
            for index, noun in enumerate(stickers.nouns)
        ],
    }


def export(source: SceneSource, out: Path, *, image_format: str = "jpg", overwrite: bool = False) -> Path:
    """Write every scene of `source` below `out`; returns the instances file, which is written last.

    Raises:
        UserError: `out` is not an empty folder and `overwrite` is false, or it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out needs a folder.")
    pictures, target = out / source.split, out / f"instances_{source.split}.json"
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is not empty; choose another folder, or --overwrite to replace the export in it.")
        _remove_export(out, target)
    images: list[dict[str, object]] = []
    annotations: list[ObjectEntry] = []
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for index in range(len(source)):
            scene = source.scene(index)
            entry, objects = coco_objects(scene, image_id=index + 1, first_annotation_id=len(annotations) + 1)
            path = pictures / f"{index + 1:06d}.{image_format}"
            picture = Image.fromarray(scene.image)
            if image_format == "jpg":
                picture.save(path, quality=JPEG_QUALITY, subsampling=0)
            else:
                picture.save(path)
            images.append({**entry, "file_name": path.relative_to(out).as_posix(), "license": 1})
            annotations += objects
        data = {**coco_header(source.stickers, source), "images": images, "annotations": annotations}
        write_json(target, data)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    return target


def _remove_export(out: Path, target: Path) -> None:
    """Delete the pictures that an earlier export lists, then its list; anything else in the folder stays."""
    try:
        listed = json.loads(target.read_text(encoding="utf-8"))["images"]
        names = [str(entry["file_name"]) for entry in listed]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{target} is not a list of an earlier export; delete it or choose another folder.") from error
    for name in names:
        path = (out / name).resolve()
        if path.is_relative_to(out.resolve()):
            path.unlink(missing_ok=True)
    target.unlink()


def main(argv: list[str]) -> int:
    """Command line of the export."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.data.stickers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--split", choices=("train", "val"), required=True, help="val: held-out style and photos")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="scenes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--size", type=int, default=320, help="side in pixels (default %(default)s)")
    parser.add_argument("--labels", choices=("all", "base"), default="all", help="base: novel objects have no label")
    parser.add_argument("--backgrounds", type=Path, metavar="FOLDER", action="append",
                        help="photos to use in place of the shipped ones; may be given more than once")  # fmt: skip
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg", help="default %(default)s; png is exact")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in DIR")
    args = parser.parse_args(argv)
    source = SceneSource(
        Stickers.load(), split=args.split, seed=args.seed, size=args.size, length=args.count, labels=args.labels,
        backgrounds=args.backgrounds,
    )  # fmt: skip
    with alone_in(args.out):
        target = export(source, args.out, image_format=args.format, overwrite=args.overwrite)
    print(f"{target}: {args.count} scenes, split {source.stickers.split_hash[:12]}")
    return 0
