# SPDX-License-Identifier: Apache-2.0
"""`python -m pretrain.probe --run DIR | --backbone FOLDER --data DATA`: evaluate a backbone's frozen features.

Three measures, all on the *online* backbone in eval mode: a weighted k-nearest-neighbour vote, a linear classifier
trained by the paper's protocol, and a classifier from a few labels per class. `torchrun` shares the work among
processes; the figures do not depend on their number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import require_writable_file, write_atomically
from pretrain.engine.flags import CommandParser, above_zero, integer


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser("wordbox probe", "Evaluate a backbone's frozen features.", details=__doc__)
    which = flags.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="FOLDER", help="folder of a run of pretrain.train")
    which.add_argument(
        "--backbone",
        type=Path,
        metavar="FOLDER",
        help="backbone folder (a run's exported/), or an encoder folder (CLIP)",
    )
    flags.add_argument(
        "--data", default="sticker_singles", help="sticker_singles, cifar:ROOT, or a folder with train/ and val/"
    )
    flags.add_argument(
        "--measures",
        nargs="+",
        metavar="MEASURE",
        choices=["knn", "linear", "linear_cached", "few"],
        default=["knn", "linear_cached"],
        help="knn, linear (fresh crops every epoch, as in the papers), linear_cached (features computed once), few "
        "(few-shot); default: knn linear_cached",
    )
    flags.add_argument("--k", type=integer(1), default=200, help="number of neighbours (default 200)")
    flags.add_argument("--temperature", type=above_zero, default=0.1, help="temperature of the kNN vote (default .1)")
    flags.add_argument(
        "--protocol",
        metavar="METHOD",
        help="linear protocol of this method (moco, simclr, ...); default: its own, a short one for few pictures",
    )
    flags.add_argument("--epochs", type=integer(1), help="epochs of the linear classifier (default: the protocol's)")
    flags.add_argument(
        "--shots", type=integer(1), nargs="+", default=[1, 5], help="few-shot labels per class (default 1 5)"
    )
    flags.add_argument("--size", type=integer(1), help="side of the input in pixels (default: as in training)")
    flags.add_argument("--limit", type=integer(1), help="maximum number of training and of test pictures")
    flags.add_argument("--seed", type=int, default=0, help="seed of few-shot labels and of fresh crops (default 0)")
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    flags.add_argument("--threads", type=integer(1), help="CPU threads (default: all cores)")
    flags.add_argument("--out", type=Path, help="write the report to this file (JSON)")
    flags.hide("temperature", "protocol", "epochs", "shots", "limit", "seed", "threads")
    return flags


def main(argv: list[str]) -> int:
    """Probe one backbone and print, or write, one JSON report."""
    args = parser().parse_args(argv)
    from pretrain.engine import distributed
    from pretrain.evaluation.data import Subset, open_data
    from pretrain.evaluation.linear import PROTOCOLS, protocol_for
    from pretrain.evaluation.probe import ProbeOptions, evaluate, open_backbone
    from pretrain.nets.backbones import problem_with

    if args.out:
        require_writable_file(args.out, flag="--out")
    if args.protocol is not None and args.protocol not in PROTOCOLS:
        raise UserError(f"--protocol {args.protocol}: expected one of {', '.join(sorted(PROTOCOLS))}")
    device = distributed.pick_device(args.device, threads=args.threads)
    with distributed.process_group():
        backbone, origin = open_backbone(args.run, args.backbone)
        backbone = backbone.to(device)
        train, test, side = open_data(args.data, size=args.size or origin.inputs.size)
        reason = problem_with(backbone, side)
        if reason is not None:
            raise UserError(
                f"--size {side}: the backbone of {args.run or args.backbone} cannot take such pictures ({reason}); it "
                f"was trained on {origin.inputs.size} pixels"
            )
        if args.limit:
            train, test = Subset(train, args.limit, args.seed), Subset(test, args.limit, args.seed)
        report = {
            "backbone": str(args.run or args.backbone),
            "method": origin.method,
            "step": origin.step,
            "data": args.data,
            "size": side,
            **evaluate(
                backbone,
                train,
                test,
                origin.inputs._replace(size=side),
                ProbeOptions(
                    measures=args.measures,
                    k=args.k,
                    temperature=args.temperature,
                    protocol=args.protocol or protocol_for(origin.method, pictures=len(train)),
                    epochs=args.epochs,
                    shots=args.shots,
                    seed=args.seed,
                ),
                log=lambda text: print(text, file=sys.stderr),
            ),
        }
    if distributed.is_main():
        text = json.dumps(report, indent=2)
        print(text)
        if args.out:
            write_atomically(args.out, (text + "\n").encode())
    return 0


if __name__ == "__main__":
    run_cli(main)
