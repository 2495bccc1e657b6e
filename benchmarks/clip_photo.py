# SPDX-License-Identifier: Apache-2.0
"""What an encoder calls crops of true boxes, and photos of nouns it never saw.

python benchmarks/clip_photo.py ENCODER --boxes COCO.json --images FOLDER
    [--labels labels.json --photos FOLDER --annotations COCO.json --withheld nouns.json]

Boxes: mean over the classes of top-1 and top-5 among the file's categories, of true boxes whose shorter side is at
least 24 pixels, 25 a class, cut as squares of 1.2 times the longer side; the same with a synonym or a hypernym of each
category typed in its place (a hypernym is right for every category below it). Withheld nouns: top-1 among 20 of them
(the mean over five draws of groups), and among all nouns of the labels.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.coco import read_ground_truth
from pretrain.data.folder import read_image
from pretrain.data.lexicon import read_lexicon
from pretrain.data.photos import LabelledCrop, boxes_of, cut_square, parts_of, read_labels, square_around
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json
from pretrain.nets.conse import embed_words
from pretrain.nets.encoders import load_encoder
from pretrain.nets.towers import JointEncoder

SIDE, PER_WORD, SCALE = 24.0, 25, 1.2
GROUP, DRAWS = 20, 5


@torch.no_grad()
def embed_items(encoder: JointEncoder, items: Sequence[LabelledCrop], *, batch: int = 32) -> Tensor:
    """(N, D) unit rows of boxes cut as squares, and of the central squares of photos without a box."""
    found = []
    for start in range(0, len(items), batch):
        squares = []
        for item in items[start : start + batch]:
            picture = read_image(item.file)
            height, width = picture.shape[:2]
            side = min(height, width)
            window = ((width - side) / 2, (height - side) / 2, float(side), float(side))
            if item.box is not None:
                window = square_around(item.box, SCALE)
            square = cut_square(picture, window, encoder.image_size)
            squares.append(torch.tensor(square).permute(2, 0, 1))
        pixels = encoder.normalise(torch.stack(squares).float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(encoder.encode_image(pixels).float())
    return F.normalize(torch.cat(found), dim=1)


def mean_of_classes(right_N: Tensor, words: Sequence[str]) -> float:
    """Mean over the words of the share of their items that are right."""
    by_word: dict[str, list[float]] = defaultdict(list)
    for right, word in zip(right_N.tolist(), words, strict=True):
        by_word[word].append(float(right))
    return sum(sum(values) / len(values) for values in by_word.values()) / len(by_word)


def ranked(image_ND: Tensor, encoder: JointEncoder, names: Sequence[str], labels: Sequence[str]) -> Tensor:
    """(N, 5) bool: which of the five best names is the label."""
    best_N5 = (image_ND @ embed_words(encoder, list(names)).T).topk(5, dim=1).indices
    return best_N5 == torch.tensor([list(names).index(label) for label in labels])[:, None]


def measure_boxes(encoder: JointEncoder, path: Path, images: Path) -> None:
    """Print the rows of true boxes."""
    lexicon = read_lexicon()
    by_word: dict[str, list[LabelledCrop]] = defaultdict(list)
    for item in boxes_of(read_ground_truth(path), images, part="all", min_score=0.0, min_side=SIDE):
        by_word[item.word].append(item)
    rng = random.Random(0)
    items: list[LabelledCrop] = []
    for _, found in sorted(by_word.items()):
        rng.shuffle(found)
        items += found[:PER_WORD]
    names, labels = sorted(by_word), [item.word for item in items]
    image_ND = embed_items(encoder, items)
    hits_N5 = ranked(image_ND, encoder, names, labels)
    print(
        f"{len(items)} boxes of {len(names)} words: top-1 {mean_of_classes(hits_N5[:, 0], labels):.3f}, "
        f"top-5 {mean_of_classes(hits_N5.any(1), labels):.3f}"
    )
    typed = {name: next(iter(lexicon.synonyms(name)), "") for name in names}
    asked = sorted(name for name in names if typed[name])
    found_ND = image_ND @ embed_words(encoder, [typed[name] or name for name in names]).T
    right = found_ND.argmax(1) == torch.tensor([names.index(label) for label in labels])
    chosen = [i for i, label in enumerate(labels) if typed[label]]
    score = mean_of_classes(right[chosen], [labels[i] for i in chosen])
    print(f"a synonym typed for {len(asked)} of the words: top-1 {score:.3f} on their boxes")
    above = {name: lexicon.hypernyms(name)[:3] for name in names}
    shared = defaultdict(list)
    for name, words in above.items():
        for word in words:
            shared[word].append(name)
    groups = {word: members for word, members in shared.items() if 2 <= len(members) <= 20}
    kept = [i for i, label in enumerate(labels) if any(word in groups for word in above[label])]
    found_ND = image_ND[kept] @ embed_words(encoder, sorted(groups)).T
    best = [sorted(groups)[i] for i in found_ND.argmax(1).tolist()]
    own = [labels[i] for i in kept]
    score = mean_of_classes(torch.tensor([o in groups[b] for b, o in zip(best, own, strict=True)]), own)
    print(f"one of {len(groups)} hypernyms of several words typed: top-1 {score:.3f} on {len(set(own))} words")


def measure_nouns(encoder: JointEncoder, args: argparse.Namespace) -> None:
    """Print the rows of withheld nouns."""
    parts, scenes = parts_of([read_ground_truth(path) for path in args.annotations])
    items = read_labels(args.labels, args.photos, parts=parts, scenes=scenes, part="all")
    withheld = {str(noun) for noun in read_json(args.withheld)}
    chosen = [item for item in items if item.word in withheld]
    if not chosen:
        raise UserError(f"{args.labels}: no photo of one thing shows a noun of {args.withheld}")
    image_ND, labels = embed_items(encoder, chosen), [item.word for item in chosen]
    groups = []
    for seed in range(DRAWS):
        nouns = sorted(withheld)
        random.Random(seed).shuffle(nouns)
        for start in range(0, len(nouns) - GROUP + 1, GROUP):
            group = nouns[start : start + GROUP]
            inside = [i for i, label in enumerate(labels) if label in group]
            if inside:
                hits = ranked(image_ND[inside], encoder, group, [labels[i] for i in inside])
                groups.append(float(hits[:, 0].float().mean()))
    every = sorted({item.word for item in items})
    hits_N5 = ranked(image_ND, encoder, every, labels)
    print(
        f"{len(chosen)} photos of {len(set(labels))} withheld nouns: top-1 {sum(groups) / len(groups):.3f} of {GROUP}; "
        f"of all {len(every)} nouns {float(hits_N5[:, 0].float().mean()):.3f}, "
        f"top-5 {float(hits_N5.any(1).float().mean()):.3f}"
    )


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="folder of an encoder, or what load_encoder takes")
    parser.add_argument("--boxes", type=Path, help="COCO file with true boxes")
    parser.add_argument("--images", type=Path, help="folder of its photos")
    parser.add_argument("--labels", type=Path, help="table file name -> nouns")
    parser.add_argument("--photos", type=Path, help="folder of those photos")
    parser.add_argument("--annotations", type=Path, nargs="*", default=[], help="COCO files that tell which are scenes")
    parser.add_argument("--withheld", type=Path, help="list of nouns that the encoder was trained without")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if bool(args.boxes) != bool(args.images) or len({bool(args.labels), bool(args.photos), bool(args.withheld)}) > 1:
        raise UserError("give --boxes with --images, and --labels with --photos and --withheld")
    encoder = load_encoder(args.encoder)
    if args.boxes:
        measure_boxes(encoder, args.boxes, args.images)
    if args.labels:
        measure_nouns(encoder, args)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
