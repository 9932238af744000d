"""Distilling a file: the last stage, from a ternary file to a better one."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import ranks
from ..distillation.blockwise import BlockResult, BlockSettings, block_run, train_blocks
from ..distillation.distill import Distiller, DistillSettings, distill
from ..files import metadata
from ..files.ternary import TernaryFile, open_ternary
from ..files.work_folder import keep_settings, open_kept
from ..model.student import add_low_rank, input_power, load_student, save_student, ternary_linears, train_codes
from ..pictures.pool import Pool
from ..pictures.quality import HeldOut
from ..rounding.one_term import METHODS
from .workspace import Workspace


def distill_file(
    work: Workspace,
    start: Path,
    target: Path,
    *,
    pool: Pool,
    held_out: HeldOut,
    settings: DistillSettings,
    rank: int = 0,
    codes: bool = False,
    packing: str | None = None,
    block_settings: BlockSettings | None = None,
    overwrite: bool = False,
    snapshot: Path | None = None,
    left: Callable[[], float] | None = None,
    clock: Callable[[], float] = time.monotonic,
    on_step: Callable[[dict], object] = lambda row: None,
    on_block: Callable[[BlockResult], object] = lambda result: None,
) -> Distiller:
    """Distill a ternary file into another one, from a `snapshot` (default: in the work folder) if there is one.

    The block-wise pass runs first if it has settings; `left` is asked for the seconds of what comes after it. Raises
    ValueError for a rank that the start cannot be given, and (Collapse) where the training went wrong.
    """
    work.check(target, overwrite, start)
    check_rank(open_ternary(start), rank)
    if block_settings is not None:
        block_file = work.folder / "blocks.safetensors"
        keep_settings(work.folder / "blocks", block_run(open_ternary(start), pool, block_settings))
        if ranks.agree(not block_file.exists()):
            train_blocks(
                open_ternary(start),
                work.teacher,
                pool,
                target=block_file,
                folder=work.folder / "blocks",
                settings=block_settings,
                device=work.device,
                on_block=on_block,
            )
        start = block_file
        open_kept(block_file)
    dense = work.teacher.checkpoint
    work.release_teacher()
    file = open_ternary(start)
    model = load_student(file, work.device, packed=not codes and settings.recompute)
    layers = ternary_linears(model)
    if rank:
        with torch.no_grad(), input_power(layers) as power:
            for index in range(4):
                model(*pool.draw(index, settings.batch, settings.seed, work.device).inputs)
        add_low_rank(layers, dense, rank, power)
    if codes:
        train_codes(layers, dense, torch.bfloat16 if settings.eight_bit else torch.float32)
    distiller = Distiller(model, file, pool, held_out, settings, clock)
    distill(distiller, snapshot or work.folder / "distill.safetensors", on_step, left)
    dense.check_unchanged()
    file.file.check_unchanged()
    best = min(distiller.log, key=lambda row: row["error"])
    done = {
        "steps": distiller.total,
        "batch": settings.batch * settings.accumulate,
        "rank": rank,
        "codes": codes,
        "freeze_dense": settings.freeze_dense,
        "states": len(pool),
        "velocity_error": round(best["error"], 5),
        "best_step": best["step"],
    }
    described = metadata.after_distillation(file.metadata, done)
    ranks.once(lambda: save_student(target, model, file, metadata=described, packing=packing, overwrite=overwrite))
    return distiller


def check_rank(start: TernaryFile, rank: int) -> None:
    """Raises ValueError for a calibrated start without factors.

    Factors from what the weights miss undo what the codes of one calibrated Linear make up for in others.
    """
    method, found = start.metadata.get("ternary.method"), {plan.rank for plan in start.layers.values()}
    if rank and method not in (None, *METHODS) and found == {0}:
        raise ValueError(f"{start.file.path}: {method} made it without low-rank factors; use `calibrate --rank {rank}`")
