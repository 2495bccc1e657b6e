# SPDX-License-Identifier: Apache-2.0
"""Shipped weights: the manifest, verification, model cards and the user's own additions.

``weights/manifest.json`` is a list of entries ``{name, folder, files: {path: {bytes, sha256}}, card}``. Nothing is
loaded from a folder of the manifest before every one of its files has the size and hash written there.

    python -m ovd.weights list
    python -m ovd.weights words NAME            the words it was trained on, one a line
    python -m ovd.weights verify [NAME ...]
    python -m ovd.weights add FOLDER NAME       copy FOLDER to weights/NAME and write its entry
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict, cast

from ovd.runtime.files import CARD as RUNTIME_CARD
from ovd.runtime.files import SOURCES, read_runtime_card, sources_of
from pretrain.engine.errors import UserError, did_you_mean, run_cli
from pretrain.engine.files import (
    EXPORTED,
    locked_folder,
    read_json,
    read_text,
    sha256_of,
    whole_folder,
    write_atomically,
)
from pretrain.engine.flags import CommandParser

CHECKOUT = Path(__file__).resolve().parent.parent
SHIPPED = "shipped"
"""Folder of the package that `scripts/build_wheel.py` fills."""
MANIFEST = "manifest.json"
DEFAULT = "vild-photo"
ALIASES = {"default": DEFAULT}
# What a weights folder may hold: data only, nothing that runs when it is read.
ALLOWED_SUFFIXES = frozenset({".safetensors", ".onnx", ".npy", ".json", ".yaml", ".txt", ".md", ".csv"})
CARD = "card.md"
_PURPOSE = re.compile(r"\*\*What it is for\.\*\*\s*(.+?)(?:\n\s*\n|\Z)", re.DOTALL)  # paragraph of a card.md


@dataclass(frozen=True)
class WeightsFile:
    """Size and hash of one file, relative to its folder."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Weights:
    """One entry of the manifest."""

    name: str
    folder: Path
    files: tuple[WeightsFile, ...]
    card: Path | None

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """One hash over names and hashes of all files: what a page or a report shows as the weights' identity."""
        lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(self.files, key=lambda file: file.path))
        return hashlib.sha256(lines.encode()).hexdigest()


class ModelCard(TypedDict, total=False):
    """Model card of weights, of `read_model_card`; `ovd.with_encoder` sets the last two.

    Attributes:
        name: of the run or the shipped weights.
        sha256: of the weights file.
        settings: digest of architecture, encoder and calibration.
        text: the ``card.md``.
        purpose: what they are good for.
        data: what they were trained on.
        metrics: figure by name.
        encoder: of crops and words, where it is not their own.
        calibrated: whether scores were fitted for that encoder.
    """

    name: str
    sha256: str
    settings: str
    text: str
    purpose: str
    data: str
    metrics: dict[str, float]
    encoder: str
    calibrated: bool


def weights_root() -> Path:
    """The folder with the manifest: ``OVD_WEIGHTS``; ``weights`` in a checkout; what came with an installed wheel."""
    if override := os.environ.get("OVD_WEIGHTS"):
        return Path(override)
    checkout, wheel = CHECKOUT / "weights", Path(str(resources.files("ovd") / SHIPPED))
    return wheel if not checkout.is_dir() and (wheel / MANIFEST).is_file() else checkout


def added_root() -> Path:
    """Where `add_weights` puts weights: among the others, or in the user's folder.

    The others may be those of an installed wheel, or of a checkout that somebody else owns.

    The user's folder is ``WORDBOX_HOME/weights``, else ``wordbox/weights`` under ``XDG_DATA_HOME``
    (``~/.local/share``).
    """
    root = weights_root()
    if os.environ.get("OVD_WEIGHTS") or (root.parent == CHECKOUT and root.is_dir() and os.access(root, os.W_OK)):
        return root
    return user_folder("weights", "XDG_DATA_HOME", ".local/share")


def user_folder(kind: str, variable: str, default: str, *, environment: Mapping[str, str] | None = None) -> Path:
    """A folder of the user's own; not created.

    Args:
        kind: its name under ``WORDBOX_HOME``.
        variable: of the XDG base directories.
        default: under the home directory, where the variable is not set.
        environment: in place of the process's.
    """
    values = os.environ if environment is None else environment
    if home := values.get("WORDBOX_HOME"):
        return Path(home) / kind
    base = values.get(variable)
    return (Path(base) if base else Path.home() / default) / "wordbox" / kind


def read_manifest(root: Path | None = None) -> dict[str, Weights]:
    """Read the manifest.

    Args:
        root: folder with ``manifest.json``; None: `weights_root()`, and `added_root()` where that is another.

    Returns:
        the entries by name, in the manifest's order.

    Raises:
        UserError: no manifest, or one that is not as described above.
    """
    if root is None:
        shipped, added = weights_root(), added_root()
        if added == shipped or not (added / MANIFEST).is_file():
            return read_manifest(shipped)
        return (read_manifest(shipped) if (shipped / MANIFEST).is_file() else {}) | read_manifest(added)
    path = root / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: not there. Shipped weights lie beside it: `git checkout -- weights` restores them; OVD_WEIGHTS "
            "names another folder"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}). Restore it with `git checkout -- weights`") from error
    if not isinstance(raw, list):
        raise UserError(f"{path}: must be a list of entries, found {type(raw).__name__}")
    entries: dict[str, Weights] = {}
    for number, item in enumerate(raw):
        try:
            entry = _parse(item, root)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: entry {number} is malformed: {error}") from error
        if entry.name in entries:
            raise UserError(f"{path}: two entries are named '{entry.name}'")
        entries[entry.name] = entry
    return entries


def _inside(path: str) -> str:
    """`path` when it stays below the folder it is relative to."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
        raise ValueError(f"'{path}' leaves the weights folder")
    return path


def _parse(item: Any, root: Path) -> Weights:
    folder = root / _inside(item["folder"])
    files = tuple(
        WeightsFile(_inside(path), int(facts["bytes"]), str(facts["sha256"])) for path, facts in item["files"].items()
    )
    if not files:
        raise ValueError("it lists no files")
    card = item.get("card")
    return Weights(str(item["name"]), folder, files, folder / _inside(card) if card else None)


def find_weights(name: str, root: Path | None = None) -> Weights:
    """The manifest's entry for a name or alias (``default``). Not verified.

    Raises:
        UserError: there is no such entry; the message lists what there is.
    """
    entries = read_manifest(root)
    resolved = ALIASES.get(name, name)
    if resolved not in entries and resolved in ALIASES.values():
        listed = ", ".join(entries) or "nothing"
        raise UserError(
            f"the default weights, {resolved}, are not in {root or weights_root()} (there is: {listed}). Restore them "
            "with `git checkout -- weights`, or name others, as in --weights vild-sticker"
        )
    if resolved not in entries:
        aliases = [alias for alias, target in ALIASES.items() if target in entries]
        listed = ", ".join([*aliases, *entries]) or "nothing"
        hint = did_you_mean(name, [*ALIASES, *entries])
        raise UserError(f"no weights named '{name}'{hint or '.'} There is: {listed}. A path to a folder works too")
    return entries[resolved]


def problems(weights: Weights) -> list[str]:
    """Problems of the files of one entry: missing, other size, other hash."""
    wrong = []
    for file in weights.files:
        path = weights.folder / file.path
        try:
            size = path.stat().st_size
            if size != file.bytes:
                wrong.append(f"{path}: {size:,} bytes, the manifest says {file.bytes:,}")
            elif sha256_of(path) != file.sha256:
                wrong.append(f"{path}: its SHA-256 is not the manifest's, the file was changed or damaged")
        except FileNotFoundError:
            wrong.append(f"{path}: missing")
        except OSError as error:
            wrong.append(f"{path}: cannot be read ({error.strerror or error})")
    return wrong


def weights_folder(name: str = "default", root: Path | None = None) -> Path:
    """The verified folder of shipped weights.

    Args:
        name: a name of the manifest or ``default``.
        root: folder with the manifest; `weights_root()` when None.

    Raises:
        UserError: unknown name, or a file that is missing or is not the one that was measured.
    """
    weights = find_weights(name, root)
    wrong = problems(weights)
    if wrong:
        raise UserError(
            f"weights '{weights.name}' are not as shipped:\n  " + "\n  ".join(wrong) + "\n"
            "Restore them with `git checkout -- weights`"
        )
    return weights.folder


def detector_folder(weights: str | Path) -> Path:
    """Return the folder of a detector given by path or by its name in ``weights/manifest.json``.

    Raises:
        UserError: no such folder or name, or files that do not have the hash of the manifest.
    """
    folder = Path(weights)
    if folder.is_dir():
        exported = folder / EXPORTED  # the folder of a whole run was given
        return exported if (exported / "model.json").is_file() and not (folder / "model.json").exists() else folder
    if folder.name == EXPORTED and (folder.parent / "config.yaml").is_file():
        raise UserError(
            f"no detector at {weights}: the training in {folder.parent} is unfinished; continue it with --resume, or "
            "see its train.log"
        )
    if isinstance(weights, Path) or "/" in str(weights):
        raise UserError(f"no detector at {weights}: give a folder written by ovd.train, or the name of shipped weights")
    folder = weights_folder(str(weights))
    if (folder / "config.json").is_file() and not (folder / "model.json").exists():
        detectors = [name for name, entry in read_manifest().items() if (entry.folder / "model.json").is_file()]
        raise UserError(f"{weights} is an encoder; the detectors are {', '.join([*ALIASES, *detectors])}")
    return folder


def read_model_card(folder: Path) -> ModelCard:
    """Return what is known of a detector: of its files, and the keys of its ``card.json``, where there is one."""
    where = folder.resolve()
    card: ModelCard = {"name": where.parent.name if where.name == EXPORTED else where.name}  # the run's name
    file = folder / "card.json"
    if file.is_file():
        stored = read_json(file)
        if not isinstance(stored, dict):
            raise UserError(f"{file}: must hold one JSON object")
        card.update(cast(ModelCard, stored))
    text = folder / "card.md"
    if text.is_file():
        card["text"] = read_text(text)
        if "purpose" not in card and (match := _PURPOSE.search(card["text"])):
            card["purpose"] = " ".join(match.group(1).split())
    weights = folder / "model.safetensors"
    card["sha256"] = sha256_of(weights) if weights.is_file() else read_runtime_card(folder).sources[weights.name]
    if (folder / "model.json").is_file():
        card["settings"] = _settings(folder)
    return card


def _settings(folder: Path) -> str:
    """sha256 of a detector's architecture, encoder and calibration, and of its files beside ``model.safetensors``."""
    is_export = (folder / RUNTIME_CARD).is_file()
    sources = read_runtime_card(folder).sources if is_export else sources_of(folder, ())
    others = [sources[name] for name in SOURCES[1:] if name in sources]
    return hashlib.sha256(" ".join([sha256_of(folder / "model.json"), *others]).encode()).hexdigest()


def trained_words(weights: str) -> list[str]:
    """The words that a detector was trained on: fine-tuned classes, its classes (of photographs COCO's 80), its bank.

    Raises:
        UserError: no such weights, or some that know no words.
    """
    folder = detector_folder(weights)
    card = read_json(folder / "model.json") if (folder / "model.json").is_file() else {}
    words = card.get("classes") if isinstance(card, dict) else None
    if not isinstance(words, list) or not words:
        raise UserError(f"{weights}: no detector with words; wordbox weights list shows what there is")
    finetuned = [name for branch in card.get("own", ()) for name in branch["names"]]
    return list(dict.fromkeys(str(word) for word in [*finetuned, *words, *card.get("bank", ())]))


def add_weights(source: Path, name: str, root: Path | None = None) -> Weights:
    """Copy a folder to ``<root>/<name>`` and write its entry; an entry of that name is replaced.

    Args:
        source: folder with safetensors, JSON, YAML, text and Markdown files; ``card.md`` in it becomes the model card.
        name: letters, digits, ``-``, ``_`` and ``.``.
        root: folder with the manifest; `added_root()` when None. Both are created when absent.

    Raises:
        UserError: bad name, no such folder, no safetensors file, or a file of another kind in it.
    """
    root = added_root() if root is None else root
    if not name or not all(char.isascii() and (char.isalnum() or char in "-_.") for char in name) or name[0] == ".":
        raise UserError(f"'{name}' cannot name weights: use letters, digits, '-', '_' and '.'")
    if name in ALIASES:
        raise UserError(f"'{name}' is an alias of '{ALIASES[name]}'; give the weights a name of their own")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    paths = sorted(path for path in source.rglob("*") if not path.is_dir())
    other = [path for path in paths if path.suffix not in ALLOWED_SUFFIXES or path.is_symlink()]
    if other:
        raise UserError(f"{other[0]}: weights folders hold only regular files {', '.join(sorted(ALLOWED_SUFFIXES))}")
    if not any(path.suffix in (".safetensors", ".onnx") for path in paths):
        raise UserError(f"{source}: contains no .safetensors file")
    root.mkdir(parents=True, exist_ok=True)
    if (root / MANIFEST).exists():
        read_manifest(root)  # a damaged one is reported before anything is copied
    target = root / name
    if source.resolve() != target.resolve():
        with whole_folder(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
    card = target / CARD
    with locked_folder(root):  # another process may add an entry of its own, or the same name from another folder
        files = [
            WeightsFile(copy.relative_to(target).as_posix(), copy.stat().st_size, sha256_of(copy))
            for copy in sorted(target.rglob("*"))
            if not copy.is_dir()
        ]
        entries = read_manifest(root) if (root / MANIFEST).exists() else {}
        entries[name] = Weights(name, target, tuple(files), card if card.is_file() else None)
        _write(entries.values(), root)
    return entries[name]


def _write(entries: Iterable[Weights], root: Path) -> None:
    raw = [
        {
            "name": entry.name,
            "folder": entry.folder.relative_to(root).as_posix(),
            "files": {file.path: {"bytes": file.bytes, "sha256": file.sha256} for file in entry.files},
            "card": entry.card.relative_to(entry.folder).as_posix() if entry.card else None,
        }
        for entry in sorted(entries, key=lambda entry: entry.name)
    ]
    write_atomically(root / MANIFEST, (json.dumps(raw, indent=2) + "\n").encode())


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser("wordbox weights", "List, verify and add weights.")
    commands = flags.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what the manifest names, with sizes and hashes")
    verify = commands.add_parser("verify", help="check size and SHA-256 of every file")
    verify.add_argument("names", nargs="*", metavar="NAME", help="only these; all when none is given")
    words = commands.add_parser("words", help="the words that a detector was trained on, one a line")
    words.add_argument("name", metavar="NAME", help="of the manifest, or the folder of a detector")
    add = commands.add_parser("add", help="copy a folder into weights/ and write its entry")
    add.add_argument("folder", type=Path, metavar="FOLDER")
    add.add_argument("name", metavar="NAME")
    return flags


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status (1: something is damaged)."""
    options = parser().parse_args(argv)

    if options.command == "add":
        added = add_weights(options.folder, options.name)
        print(f"{added.name}: {len(added.files)} files, {added.bytes / 1e6:.1f} MB, {added.sha256[:12]}")
        return 0
    if options.command == "words":
        print("\n".join(trained_words(options.name)))
        return 0
    if options.command == "list":
        for entry in read_manifest().values():
            star = " (default)" if entry.name == DEFAULT else ""
            print(f"{entry.name}{star}: {entry.bytes / 1e6:.1f} MB, {entry.sha256[:12]}, {entry.folder}")
        return 0
    chosen = [find_weights(name) for name in options.names] if options.names else list(read_manifest().values())
    damaged = False
    for entry in chosen:
        wrong = problems(entry)
        damaged = damaged or bool(wrong)
        print(f"{entry.name}: {'ok' if not wrong else 'WRONG'}, {len(entry.files)} files, {entry.bytes / 1e6:.1f} MB")
        for line in wrong:
            print(f"  {line}")
    return 1 if damaged else 0


if __name__ == "__main__":
    run_cli(main)
