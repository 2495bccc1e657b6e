# SPDX-License-Identifier: Apache-2.0
"""`python -m pretrain.train --config pretrain/clip.yaml [key=value …] [--check] [--resume] [--overwrite]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.config import ClipMethod, PretrainConfig, extended
from pretrain.config_ssl import SslMethod
from pretrain.engine.cli import command_line
from pretrain.engine.config import config_hash, free_keys, keys_at_default, plain
from pretrain.engine.errors import run_cli, warn
from pretrain.engine.files import EXPORTED
from pretrain.engine.stages import require_stages

if TYPE_CHECKING:
    from pretrain.data.images import Builders
    from pretrain.methods.build import Methods
    from pretrain.training.parts import PretrainingParts

DOC = (
    "Pretrain: a text tower from teacher embeddings, CLIP from captioned pictures, or a backbone\n"
    "from pictures alone (SimCLR, MoCo, BYOL, SwAV, SimSiam, Barlow Twins)."
)


def main(argv: list[str], *, methods: Methods | None = None, data: Builders | None = None) -> int:
    """Train, then write `exported/` (an encoder folder, or a backbone folder) into the run's folder.

    Args:
        argv: arguments after the program name.
        methods: further self-supervised methods that the configuration may name, by the class of their section.
        data: what opens further sets of pictures, by the class of their section.
    """
    model = extended(methods=list(methods or {}), data=list(data or {}))
    cfg, options = command_line(model, argv, prog="wordbox pretrain", doc=DOC)
    require_stages(cfg)

    from pretrain.engine import distributed
    from pretrain.engine.loop import fit
    from pretrain.engine.run_folder import exported_folder

    warning = smaller_comparison(cfg)
    if warning and distributed.is_main():
        warn(warning)
    distributed.seed_everything(cfg.loop.seed)  # the first weights; the loop seeds everything later
    parts = build_parts(cfg, methods=methods or {}, data=data or {})
    report = fit(
        parts.task,
        parts.source,
        loop=cfg.loop,
        optim=parts.optim,
        out=cfg.out,
        record=plain(cfg),
        free_keys=free_keys(model),
        at_default=keys_at_default(cfg),
        resume=options.resume,
        overwrite=options.overwrite,
        check=options.check,
    )
    if not options.check and distributed.is_main():
        with exported_folder(cfg.out) as folder:
            exported = parts.save(folder)
        print(f"{cfg.out / EXPORTED}: {exported} after {report.step} steps, config {config_hash(cfg)}")
    return 0


def build_parts(cfg: PretrainConfig, *, methods: Methods, data: Builders) -> PretrainingParts:
    """Task, samples and optimiser of the method that is configured.

    Raises:
        UserError: the data, or weights to begin with, are missing or do not fit.
    """
    if isinstance(cfg.method, SslMethod):
        from pretrain.training.self_supervised import build_self_supervised

        return build_self_supervised(cfg, methods=methods, data=data)
    from pretrain.training.image_text_encoder import build_clip, build_text_distillation

    if isinstance(cfg.method, ClipMethod):
        return build_clip(cfg, cfg.method)
    return build_text_distillation(cfg, cfg.method)


COMPARED_WITHIN_A_PASS = {
    "simclr": "negatives",
    "barlow_twins": "samples of the cross-correlation",
    "clip": "negatives",
}


def smaller_comparison(cfg: PretrainConfig) -> str | None:
    """The warning where `loop.accumulate` changes the loss: one that compares the samples of a pass."""
    what, parts = COMPARED_WITHIN_A_PASS.get(cfg.method.name), cfg.loop.accumulate
    if what is None or parts == 1:
        return None
    exact = (
        "; set method.chunk in place of it: the exact gradient of the whole batch" if cfg.method.name == "clip" else ""
    )
    return (
        f"loop.accumulate={parts}: the {what} of {cfg.method.name} are the {cfg.loop.batch_size // parts} samples of a "
        f"pass, not the {cfg.loop.batch_size} of a step, so this is another loss than that of the whole batch{exact}"
    )


if __name__ == "__main__":
    run_cli(main)
