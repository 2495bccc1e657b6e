# SPDX-License-Identifier: Apache-2.0
"""Downloading open_clip's published weights: file, host and size are printed first, and every wait has a timeout.

Files that are in the hub's cache are used without a word. `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME` and the other
variables of the hub mean what they mean to it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from torch import Tensor

from pretrain.engine.errors import UserError, first_line

T = TypeVar("T")

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""What a repository of open_clip's holds, the first that it has."""
PATIENCE = 30.0
"""Seconds for the first answer of the hub; of a network that swallows packets there is none."""


def fetch_weights(pretrained: Mapping[str, Any], *, name: str, instead: str) -> Path:
    """The file of a published model, from the cache or fetched.

    Args:
        pretrained: open_clip's own description; ``hf_hub`` is ``OWNER/REPOSITORY/FILE``, FILE may be empty.
        name: of the model and weights, for messages.
        instead: how a file of them is named, for messages.

    Raises:
        UserError: it is not there and cannot be fetched.
    """
    hub = str(pretrained.get("hf_hub") or "")
    if not hub:
        raise UserError(
            f"{name}: open_clip has no download address for it; download the file and give its path: {instead}"
        )
    repository, _, file = hub.rpartition("/")
    return fetch_file(repository, _names(file), name=name, instead=instead)


def _names(file: str) -> tuple[str, ...]:
    """The names that a file may have, tensors first: what is read as such runs no code."""
    if not file or file == WEIGHTS[1]:
        return WEIGHTS
    stem, suffix = os.path.splitext(file)
    return (f"{stem}.safetensors", file) if suffix in (".bin", ".pth") else (file,)


def fetch_file(repository: str, names: tuple[str, ...], *, name: str, instead: str) -> Path:
    """The first of some files that a repository of the hub has, from the cache or fetched.

    Raises:
        UserError: none is cached, and the hub is offline, silent, or has none.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for file in names:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    host = urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
    advice = f"Download the file on another machine and give its path: {instead}"
    if constants.is_offline_mode():
        raise UserError(f"{name} is not in the hub's cache, and the hub is set offline (HF_HUB_OFFLINE). {advice}")
    for file in names:
        try:
            file_info = _within(PATIENCE, partial(get_hf_file_metadata, hf_hub_url(repository, file), timeout=10))
            size = "of unknown size" if file_info.size is None else f"{file_info.size / 1e6:,.0f} MB"
            print(f"{name}: fetching {file} of {repository} from {host}, {size}, once", file=sys.stderr, flush=True)
            return Path(hf_hub_download(repository, file))
        except RemoteEntryNotFoundError:
            continue
        except Exception as error:  # of the hub, its HTTP library or the network: one line for all of them
            raise UserError(f"{name} could not be fetched from {host} ({first_line(error)}). {advice}") from error
    raise UserError(f"{name}: {repository} at {host} has none of {', '.join(names)}. {advice}")


def _within(seconds: float, work: Callable[[], T]) -> T:
    """The result of work that is given up after a while; its thread ends with the process.

    Raises:
        TimeoutError: no answer in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return results[0]


def hub_tokenizer(
    text: Mapping[str, Any], *, name: str, folder: Path | None, context_length: int
) -> Callable[..., Any]:
    """The tokenizer of a model whose words are not CLIP's: the files beside its weights, or the hub's.

    Args:
        text: open_clip's ``text_cfg``.
        name: of the model, for messages.
        folder: folder of the weights; used where it has a ``tokenizer_config.json``.
        context_length: tokens that the tower reads.

    Raises:
        UserError: the package that reads it is missing, or the files are, with what to do.
    """
    source = str(text.get("hf_tokenizer_name") or text.get("hf_model_name"))
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"open_clip:{name} has a tokenizer of Hugging Face's: pip install transformers sentencepiece")
    from open_clip.tokenizer import HFTokenizer

    if folder is not None and (folder / "tokenizer_config.json").is_file():
        source = str(folder)
    else:
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        print(f"open_clip:{name}: tokenizer {source}, of {host} where it is not cached", file=sys.stderr, flush=True)
    try:
        tokenizer: Callable[[Sequence[str]], Tensor] = HFTokenizer(
            source,
            context_length=context_length,
            tokenizer_mode=text.get("tokenizer_mode"),
            **dict(text.get("tokenizer_kwargs") or {}),
        )
        return tokenizer
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"open_clip:{name}: its tokenizer {source} could not be loaded ({first_line(error)}). Put tokenizer.json "
            "and tokenizer_config.json of that repository beside the weights file"
        ) from error
