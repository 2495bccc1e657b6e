# SPDX-License-Identifier: Apache-2.0
"""`python -m pretrain.evaluate --encoder DIR [--zero-shot] [--synonyms] [--teacher FILE] [--out FILE]`.

Zero-shot: single stickers of the held-out style on held-out photos, all class names as vocabulary. Synonyms: words that
occur in no caption, and which class name they are nearest to; with `--teacher`, the teacher's own figures on the same
pairs. Without a choice both are done.

Shapes: `N` pictures, `C` classes, `D` embedding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.nouns import SynonymPair, WordNet, load_pairs, save_pairs, synonym_pairs
from pretrain.data.pairs import PairSource
from pretrain.data.phrases import read_phrases, read_targets
from pretrain.data.stickers import Stickers
from pretrain.engine.distributed import device_of, pick_device
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json, require_writable_file, write_atomically
from pretrain.engine.flags import integer
from pretrain.nets.encoders import load_encoder
from pretrain.nets.towers import JointEncoder

SYNONYMS = Path(__file__).parent / "data" / "synonyms.json"
TEMPLATES = ("{}", "a photo of a {}", "a sticker of a {}", "there is a {} in the scene")
EVERYDAY = (("puppy", "dog"), ("automobile", "car"), ("spectacles", "glasses"), ("aeroplane", "airplane"))


@torch.no_grad()
def embed_words(encoder: JointEncoder, words: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
    """(C, D) unit rows: the mean over templates of unit embeddings, normalised again (ViLD §3.2)."""
    total: Tensor | float = 0.0
    for template in templates:
        rows = []
        for i in range(0, len(words), 512):
            tokens = encoder.tokenize([template.format(w) for w in words[i : i + 512]]).to(device_of(encoder))
            rows.append(F.normalize(encoder.encode_text(tokens), dim=-1).cpu())
        total = total + torch.cat(rows)
    return F.normalize(torch.as_tensor(total), dim=-1)


@torch.no_grad()
def embed_crops(encoder: JointEncoder, source: PairSource, count: int, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Unit embeddings (N, D) and class ids (N,) of the first `count` pictures of a source."""
    images, labels = [], []
    for start in range(0, count, batch):
        samples = source.collate([source.sample(i, i) for i in range(start, min(start + batch, count))])
        pixels = encoder.prepare(samples["image"].to(device_of(encoder)))
        images.append(F.normalize(encoder.encode_image(pixels), dim=-1).cpu())
        labels.append(samples["class_id"])
    return torch.cat(images), torch.cat(labels)


def zero_shot(
    image_ND: Tensor,
    labels_N: Tensor,
    class_CD: Tensor,
    *,
    base: frozenset[int],
    near_synonyms: Sequence[frozenset[int]] = (),
) -> dict[str, float]:
    """Top-1 and top-5 accuracy over all C names, over pictures of all, base and novel classes.

    `…_merged` counts any name of a right class's near-synonym group as right (teacup and cup).
    """
    order_NC = (image_ND @ class_CD.T).topk(min(5, len(class_CD)), dim=1).indices
    groups = {i: group for group in near_synonyms for i in group}
    exact = order_NC == labels_N[:, None]
    merged = torch.tensor(
        [[int(p) in groups.get(int(y), (int(y),)) for p in row] for row, y in zip(order_NC, labels_N, strict=True)]
    ).reshape(exact.shape)
    is_base = torch.tensor([int(y) in base for y in labels_N], dtype=torch.bool)
    report: dict[str, float] = {}
    for name, chosen in (("all", torch.ones_like(is_base)), ("base", is_base), ("novel", ~is_base)):
        report[f"pictures_{name}"] = int(chosen.sum())
        if not chosen.any():
            continue
        for suffix, hits in (("", exact), ("_merged", merged)):
            report[f"top1_{name}{suffix}"] = hits[chosen][:, :1].any(1).float().mean().item()
            report[f"top5_{name}{suffix}"] = hits[chosen].any(1).float().mean().item()
    return report


def synonym_accuracy(pairs: Sequence[SynonymPair], query_PD: Tensor, class_CD: Tensor) -> dict[str, float]:
    """Share of the pairs whose query is nearest to a right class.

    Returns:
        `top1`/`top5` over all pairs; `…_common` over queries whose sense WordNet's tagged texts hold; `…_synonym` and
        `…_hyponym` by relation; `…_per_class`: the mean over classes, so that *tree* with its hundreds of hyponyms
        counts once.
    """
    order = (query_PD @ class_CD.T).topk(min(5, len(class_CD)), dim=1).indices.tolist()
    first = np.array([row[0] in pair.answers for row, pair in zip(order, pairs, strict=True)], float)
    five = np.array([bool(set(row) & set(pair.answers)) for row, pair in zip(order, pairs, strict=True)], float)
    subsets: dict[str, list[bool]] = {
        "": [True] * len(pairs),
        "_common": [p.tagged for p in pairs],
        "_synonym": [p.relation == "synonym" for p in pairs],
        "_hyponym": [p.relation == "hyponym" for p in pairs],
    }
    report: dict[str, float] = {}
    for suffix, chosen in subsets.items():
        report[f"pairs{suffix}"] = sum(chosen)
        if any(chosen):
            report[f"top1{suffix}"] = float(first[chosen].mean())
            report[f"top5{suffix}"] = float(five[chosen].mean())
    by_class: dict[int, list[float]] = {}
    for pair, hit in zip(pairs, first, strict=True):
        for answer in pair.answers:
            by_class.setdefault(answer, []).append(hit)
    if by_class:
        report["classes"] = len(by_class)
        report["top1_per_class"] = float(np.mean([np.mean(hits) for hits in by_class.values()]))
    return report


def teacher_lookup(path: Path) -> Callable[[Sequence[str]], Tensor]:
    """The teacher's embeddings from a target file, by phrase.

    Raises:
        UserError: (from the returned function) a phrase was never embedded.
    """
    targets = read_targets(path)
    row = {phrase: i for i, phrase in enumerate(targets.phrases)}

    def embed(phrases: Sequence[str]) -> Tensor:
        missing = [p for p in phrases if p not in row]
        if missing:
            raise UserError(f"{path} lacks {len(missing)} phrases, such as {missing[0]!r}; add them to the phrase file")
        return F.normalize(targets.embeddings[[row[p] for p in phrases]].float(), dim=-1)

    return embed


def defined_teacher(path: Path, phrases: Path) -> Callable[[Sequence[str]], Tensor]:
    """Distillation target of the text tower: the teacher's embedding of a phrase plus that of its definition."""
    embed, meaning = teacher_lookup(path), {p.text: p.definition for p in read_phrases(phrases)}

    def with_definitions(words: Sequence[str]) -> Tensor:
        rows = embed(words)
        defined = [i for i, word in enumerate(words) if meaning.get(word)]
        if defined:
            rows[defined] = F.normalize(rows[defined] + embed([meaning[words[i]] for i in defined]), dim=-1)
        return rows

    return with_definitions


def keyword_pairs(stickers: Stickers) -> list[SynonymPair]:
    """Emoji keywords (Unicode CLDR; no work of WordNet's) that belong to one noun and share no word with any noun.

    They are associations ("ale": beer mug, "antarctica": penguin), harder than synonyms and by other hands.
    """
    index = {noun: i for i, noun in enumerate(stickers.nouns)}
    nouns_of: dict[str, set[int]] = {}
    for row in read_json(stickers.root / "concepts.json")["concepts"]:
        for keyword in row["keywords"] if row["noun"] in index else ():
            nouns_of.setdefault(keyword.lower(), set()).add(index[row["noun"]])
    words = {word for noun in stickers.nouns for word in noun.lower().split()}
    words |= {word + "s" for word in words}
    return [
        SynonymPair(keyword, tuple(answers), "synonym", True)
        for keyword, answers in sorted(nouns_of.items())
        if len(answers) == 1 and len(keyword) > 2 and not words & set(keyword.split())
    ]


def report_synonyms(
    encoder: JointEncoder,
    stickers: Stickers,
    pairs: Sequence[SynonymPair],
    teacher: Path | None = None,
    phrases: Path | None = None,
) -> dict[str, object]:
    """Synonym accuracy of the text tower, everyday examples; the teacher beside it, bare and with definitions."""
    nouns = list(stickers.nouns)
    embedders: dict[str, Callable[[Sequence[str]], Tensor]] = {"text": lambda words: embed_words(encoder, words)}
    if teacher is not None:
        embedders["teacher"] = teacher_lookup(teacher)
        if phrases is not None:
            embedders["teacher_with_definitions"] = defined_teacher(teacher, phrases)
    words = [w for w, _ in EVERYDAY]
    nearest = (embed_words(encoder, words) @ embed_words(encoder, nouns).T).argmax(1)
    report: dict[str, dict[str, float]] = {}
    keywords = keyword_pairs(stickers)
    if teacher is not None:  # the teacher is known by phrase only
        teacher_phrases = set(read_targets(teacher).phrases)
        keywords = [pair for pair in keywords if pair.query in teacher_phrases]
    for name, embed in embedders.items():
        class_CD = embed(nouns)
        report[name] = synonym_accuracy(pairs, embed([p.query for p in pairs]), class_CD)
        if keywords:
            figures = synonym_accuracy(keywords, embed([p.query for p in keywords]), class_CD)
            report[name] |= {f"{key}_keywords": figures[key] for key in ("pairs", "top1", "top5")}
        if name != "text":
            report[f"share_of_{name}"] = {
                key: report["text"][key] / value
                for key, value in report[name].items()
                if key.startswith("top1") and value
            }
    return {"everyday": {w: nouns[int(i)] for w, i in zip(words, nearest, strict=True)}, **report}


def report_zero_shot(
    encoder: JointEncoder, stickers: Stickers, *, per_class: int, seed: int, pairs: Sequence[SynonymPair]
) -> dict[str, dict[str, float]]:
    """Zero-shot accuracy on the held-out style; and words without a picture asked of the same pictures.

    `synonyms_on_pictures`: a query is right when, among the mean embeddings of each class's pictures, the nearest is a
    right class; queries whose classes have no picture are left out.
    """
    source = PairSource(
        stickers, split="val", size=encoder.image_size, seed=seed, length=per_class * len(stickers.nouns)
    )
    count = min(per_class * len(source.classes), len(source))
    image_ND, labels_N = embed_crops(encoder, source, count)
    nouns = list(stickers.nouns)
    report: dict[str, dict[str, float]] = {}
    for name, templates in (("name", ("{}",)), ("templates", TEMPLATES)):
        report[name] = zero_shot(
            image_ND,
            labels_N,
            embed_words(encoder, nouns, templates),
            base=stickers.base,
            near_synonyms=stickers.near_synonyms,
        )
    present = sorted(set(labels_N.tolist()))
    column = {c: i for i, c in enumerate(present)}
    mean_CD = F.normalize(torch.stack([image_ND[labels_N == c].mean(0) for c in present]), dim=-1)
    indices = [
        SynonymPair(p.query, tuple(column[a] for a in p.answers if a in column), p.relation, p.tagged)
        for p in pairs
        if any(a in column for a in p.answers)
    ]
    if indices:
        report["synonyms_on_pictures"] = synonym_accuracy(
            indices, embed_words(encoder, [p.query for p in indices]), mean_CD
        )
    return report


def main(argv: list[str]) -> int:
    """Evaluate and print, or write, one JSON report."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.evaluate", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--encoder", required=True, help="encoder folder, or open_clip:MODEL:WEIGHTS")
    parser.add_argument("--zero-shot", action="store_true", help="single stickers of the held-out style")
    parser.add_argument("--synonyms", action="store_true", help="words that occur in no caption")
    parser.add_argument("--pairs", type=Path, default=SYNONYMS, help="synonym pairs (default: the shipped ones)")
    parser.add_argument(
        "--make-pairs", type=Path, metavar="WORDNET", help="write --pairs anew from WordNet's folder first"
    )
    parser.add_argument("--teacher", type=Path, help="target file: report the teacher on the same pairs")
    parser.add_argument("--phrases", type=Path, help="phrase file: report the teacher with its definitions, too")
    parser.add_argument("--per-class", type=int, default=4, help="pictures per class (default 4)")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--device", default="auto", help="where the encoder runs: auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=integer(1))
    parser.add_argument("--out", type=Path, help="write the report here as JSON")
    args = parser.parse_args(argv)
    if args.out:
        require_writable_file(args.out, flag="--out")
    device = pick_device(args.device, threads=args.threads)
    stickers = Stickers.load()
    if args.make_pairs:
        pairs = synonym_pairs(WordNet.load(args.make_pairs), stickers.nouns, stickers.supercategory)
        save_pairs(args.pairs, pairs, stickers.nouns)
    pairs = load_pairs(args.pairs, stickers.nouns)
    encoder = load_encoder(args.encoder).to(device)
    both = not (args.zero_shot or args.synonyms)
    report: dict[str, object] = {"encoder": encoder.fingerprint(), "classes": len(stickers.nouns)}
    if args.synonyms or both:
        report["synonyms"] = report_synonyms(encoder, stickers, pairs, args.teacher, args.phrases)
    if args.zero_shot or both:
        report["zero_shot"] = report_zero_shot(encoder, stickers, per_class=args.per_class, seed=args.seed, pairs=pairs)
    text = json.dumps(_rounded(report), indent=2)
    print(text)
    if args.out:
        write_atomically(args.out, (text + "\n").encode())
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    run_cli(main)
