# SPDX-License-Identifier: Apache-2.0
"""English nouns from WordNet's own text files, and the synonym test derived from them.

Reads `data.noun`, `noun.exc` and `cntlist.rev` as Princeton distributes them (Debian: package `wordnet-base`, folder
`/usr/share/wordnet`; format: `wndb(5WN)`, `senseidx(5WN)`). WordNet is needed to rebuild the text tower and to repeat
the synonym test, never to use the model.

    dog  -> first sense 02084071 (noun.animal): dog, domestic dog, Canis familiaris
         -> direct hyponyms: puppy, poodle, ... -> pairs (puppy, dog), (poodle, dog), ...
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.engine.errors import UserError

# lexnames(5WN): animal, artifact, body, food, object, plant, possession. Things one can draw; the rest (acts, states,
# times ...) is trained on less often.
DRAWABLE = frozenset({5, 6, 8, 13, 17, 20, 21})

# Which lexicographer files a noun of each Sticker supercategory may come from, in order of preference.
SENSES_OF_SUPERCATEGORY: Mapping[str, tuple[int, ...]] = {
    "animal": (5,),
    "food": (13, 20),
    "drink": (13, 6),
    "plant": (20, 13),
    "money": (21, 6),
}
ARTIFACT_LIKE = (6, 17, 21, 10, 9, 15)


@dataclass(frozen=True)
class Synset:
    """One meaning: `lemmas` in WordNet's order with spaces for underscores, `hypernyms` and `hyponyms` as offsets.

    `definition` is the gloss without its examples.
    """

    offset: int
    lexfile: int
    lemmas: tuple[str, ...]
    hypernyms: tuple[int, ...]
    hyponyms: tuple[int, ...]
    definition: str = ""


@dataclass(frozen=True)
class SynonymPair:
    """`query` should be understood as any of `answers` (noun indices); `relation` is "synonym" or "hyponym".

    `tagged` tells that the query's own sense was met at least once in WordNet's sense-tagged texts (a common word).
    """

    query: str
    answers: tuple[int, ...]
    relation: str
    tagged: bool


@dataclass(frozen=True, kw_only=True)
class WordNet:
    """The noun part of WordNet.

    Attributes:
        synsets: every meaning by its offset.
        senses: lower-case lemma -> offsets, most common sense first.
        counts: lower-case lemma -> occurrences of that noun in the sense-tagged texts (0 for most nouns).
        first_sense_counts: the same for the first sense only.
        exceptions: irregular plural -> singular.
    """

    synsets: Mapping[int, Synset]
    senses: Mapping[str, tuple[int, ...]]
    counts: Mapping[str, int]
    first_sense_counts: Mapping[str, int]
    exceptions: Mapping[str, str]

    @classmethod
    def load(cls, folder: str | Path) -> WordNet:
        """Read the noun files of `folder`.

        Raises:
            UserError: a file is missing, or a line is not in WordNet's format.
        """
        folder = Path(folder)
        synsets = {s.offset: s for s in _read_data(folder / "data.noun")}
        senses = _read_index(folder / "index.noun")
        exceptions: dict[str, str] = {}
        if (folder / "noun.exc").exists():
            for line in _lines(folder / "noun.exc"):
                plural, singular, *_ = line.split()
                exceptions[plural.replace("_", " ")] = singular.replace("_", " ")
        counts: dict[str, int] = {}
        first: dict[str, int] = {}
        if (folder / "cntlist.rev").exists():
            for line in _lines(folder / "cntlist.rev"):
                key, sense_number, count = line.split()
                lemma, _, sense = key.partition("%")
                if sense.startswith("1:"):  # ss_type 1 = noun
                    name = lemma.replace("_", " ").lower()
                    counts[name] = counts.get(name, 0) + int(count)
                    if sense_number == "1":
                        first[name] = int(count)
        return cls(synsets=synsets, senses=senses, counts=counts, first_sense_counts=first, exceptions=exceptions)

    def first_sense(self, lemma: str, lexfiles: Sequence[int] | None = None) -> Synset | None:
        """The most common meaning of `lemma`; with `lexfiles`, the most common one in the first file that has any."""
        offsets = self.senses.get(lemma.lower(), ())
        candidates = [self.synsets[o] for o in offsets]
        if lexfiles is None:
            return candidates[0] if candidates else None
        return next((s for lexfile in lexfiles for s in candidates if s.lexfile == lexfile), None)

    def phrases(self) -> list[tuple[str, float]]:
        """Every noun once, with a sampling weight, the most useful first.

        The weight is 1 + log2(1 + tagged occurrences), doubled when the first sense is a thing that can be drawn and
        quartered for proper names (a capital in every lemma form), which make up a third of WordNet.
        """
        best: dict[str, float] = {}
        for synset in self.synsets.values():
            for lemma in synset.lemmas:
                name = lemma.lower()
                weight = 1.0 + _log2(1 + self.counts.get(name, 0))
                first = self.first_sense(name)
                if first is not None and first.lexfile in DRAWABLE:
                    weight *= 2
                if lemma != name:
                    weight /= 4
                best[name] = max(weight, best.get(name, 0.0))
        return sorted(best.items(), key=lambda item: (-item[1], item[0]))


def synonym_pairs(
    wordnet: WordNet, nouns: Sequence[str], supercategories: Sequence[str], *, captions: Iterable[str] = ()
) -> list[SynonymPair]:
    """Words that appear in no caption, with the nouns they should be understood as.

    The rule, fixed before any model was measured:
      1. A noun's meaning is the most common WordNet sense whose lexicographer file fits the noun's supercategory
         (animals in noun.animal, food in noun.food or noun.plant, ...; otherwise an artifact or natural object).
      2. Candidates are the other lemmas of that meaning ("synonym") and the lemmas of its direct hyponyms ("hyponym").
      3. A candidate stays if that meaning is its own most common one, it is no proper or Latin name (no capital, no
         digit), it shares no word with any of the nouns ("toy dog" would be a giveaway), and it is in no caption.
      4. Any noun whose meaning is the candidate's, or the direct hypernym of it, is a right answer.

    Args:
        wordnet: the dictionary.
        nouns: all class names.
        supercategories: one per noun.
        captions: further texts whose words disqualify a candidate.
    """
    meanings: dict[int, list[int]] = {}
    for index, (noun, group) in enumerate(zip(nouns, supercategories, strict=True)):
        synset = wordnet.first_sense(noun, SENSES_OF_SUPERCATEGORY.get(group, ARTIFACT_LIKE))
        if synset is not None:
            meanings.setdefault(synset.offset, []).append(index)
    used = {word for text in (*nouns, *captions) for word in _words(text)}
    answers: dict[str, set[int]] = {}
    relation: dict[str, str] = {}
    for offset, indices in meanings.items():
        children = [(wordnet.synsets[h], "hyponym") for h in wordnet.synsets[offset].hyponyms]
        for synset, kind in [(wordnet.synsets[offset], "synonym"), *children]:
            for lemma in synset.lemmas:
                first = wordnet.first_sense(lemma)
                if first is None or first.offset != synset.offset or lemma in nouns:
                    continue
                if lemma != lemma.lower() or any(c.isdigit() for c in lemma) or used & _stems(lemma):
                    continue
                answers.setdefault(lemma, set()).update(indices)
                if relation.get(lemma) != "synonym":
                    relation[lemma] = kind
    return [
        SynonymPair(lemma, tuple(sorted(answers[lemma])), relation[lemma], wordnet.first_sense_counts.get(lemma, 0) > 0)
        for lemma in sorted(answers)
    ]


def save_pairs(path: str | Path, pairs: Sequence[SynonymPair], nouns: Sequence[str]) -> None:
    """Write the pairs with the answers as names, so that the test can be repeated without WordNet."""
    rows = [
        {"query": p.query, "answers": [nouns[i] for i in p.answers], "relation": p.relation, "tagged": p.tagged}
        for p in pairs
    ]
    Path(path).write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n", encoding="utf-8")


def load_pairs(path: str | Path, nouns: Sequence[str]) -> list[SynonymPair]:
    """Read what `save_pairs` wrote.

    Raises:
        UserError: the file is unreadable, or names an answer that is not among `nouns`.
    """
    index = {noun: i for i, noun in enumerate(nouns)}
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return [
            SynonymPair(r["query"], tuple(index[a] for a in r["answers"]), r["relation"], bool(r["tagged"]))
            for r in rows
        ]
    except OSError as error:
        raise UserError(f"cannot read the synonym pairs {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a list of synonym pairs: {error}") from error
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]!r} is neither a key of a pair nor a class name") from error


def _words(text: str) -> set[str]:
    return set("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _stems(text: str) -> set[str]:
    """Words of `text` with their singulars and plurals, so that "dogs" does not slip past "dog"."""
    words = _words(text)
    return words | {w[:-1] for w in words if w.endswith("s")} | {w + "s" for w in words}


def _log2(x: int) -> float:
    return x.bit_length() - 1 + (x / (1 << (x.bit_length() - 1)) - 1)  # piecewise linear, exact and reproducible


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}. It belongs to WordNet 3.0 (Debian: wordnet-base); "
            "only rebuilding the text tower needs it."
        ) from error
    return [line for line in text.splitlines() if line and not line.startswith("  ")]  # two spaces: licence header


def _read_data(path: Path) -> list[Synset]:
    synsets = []
    for number, line in enumerate(_lines(path), 1):
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        try:
            words = int(fields[3], 16)
            lemmas = tuple(fields[4 + 2 * i].replace("_", " ") for i in range(words))
            at = 4 + 2 * words
            pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
            synsets.append(
                Synset(
                    int(fields[0]),
                    int(fields[1]),
                    lemmas,
                    tuple(int(p[1]) for p in pointers if p[0] == "@"),
                    tuple(int(p[1]) for p in pointers if p[0] == "~"),
                    gloss.split('; "')[0].strip(),
                )
            )
        except (IndexError, ValueError) as error:
            raise UserError(f"{path}: synset {number} is not in WordNet's format: {line[:60]!r}") from error
    return synsets


def _read_index(path: Path) -> dict[str, tuple[int, ...]]:
    senses = {}
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        try:
            count, pointers = int(fields[2]), int(fields[3])
            offsets = tuple(int(o) for o in fields[6 + pointers :])
        except (IndexError, ValueError) as error:
            raise UserError(f"{path}: lemma {number} is not in WordNet's format: {line[:60]!r}") from error
        if len(offsets) != count:
            raise UserError(f"{path}: lemma {number} announces {count} senses and lists {len(offsets)}")
        senses[fields[0].replace("_", " ")] = offsets
    return senses
