"""Distilling a file: the last stage, from a ternary file to a better one."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..distillation.blockwise import BlockResult, BlockSettings, train_blocks
from ..distillation.distill import Distiller, Settings, distill
from ..files.ternary import TernaryFile, open_ternary
from ..model.student import add_low_rank, input_moments, load_student, save_student, ternary_linears, train_codes
from ..rounding.one_plane import METHODS
from .workspace import Workshop


def distill_file(
    shop: Workshop,
    start: Path,
    target: Path,
    settings: Settings,
    rank: int = 0,
    codes: bool = False,
    packing: str | None = None,
    block_settings: BlockSettings | None = None,
    overwrite: bool = False,
    checkpoint: Path | None = None,
    on_step: Callable[[dict], object] = lambda row: None,
    on_block: Callable[[BlockResult], object] = lambda result: None,
) -> Distiller:
    """Distill a ternary file into another one, from a `checkpoint` (default: in the work folder) if there is one.

    The block-wise pass runs first if it has settings. Raises ValueError for a rank that the start cannot be given, and
    (Collapse) where the training went wrong.
    """
    shop.check(target, overwrite, start)
    _check_rank(open_ternary(start), rank)
    pool, holdout, swapped = shop.pool, shop.holdout, shop.swapped
    if block_settings is not None:
        block_file = shop.work / "blocks.safetensors"
        if not block_file.exists():
            folder = shop.work / "blocks"
            train_blocks(
                open_ternary(start), shop.teacher, pool, block_file, folder, block_settings, shop.device, on_block
            )
        start = block_file
    dense = shop.teacher.checkpoint
    shop.release_teacher()
    file = open_ternary(start)
    model = load_student(file, shop.device, packed=not codes and settings.checkpointing)
    layers = ternary_linears(model)
    if rank:
        with torch.no_grad(), input_moments(layers) as moments:
            for index in range(4):
                model(*pool.draw(index, settings.batch, settings.seed, shop.device).inputs)
        add_low_rank(layers, dense, rank, moments)
    if codes:
        train_codes(layers, dense, torch.bfloat16 if settings.eight_bit else torch.float32)
    distiller = Distiller(model, file, pool, holdout, swapped, settings)
    distill(distiller, checkpoint or shop.work / "distill.safetensors", on_step)
    save_student(target, model, file, described(file.metadata, distiller, rank, codes), packing, overwrite)
    return distiller


def _check_rank(start: TernaryFile, rank: int) -> None:
    """Factors from what the weights miss undo what the codes of one calibrated Linear make up for in others."""
    method, ranks = start.metadata.get("ternary.method"), {plan.rank for plan in start.layers.values()}
    if rank and method not in (None, *METHODS) and ranks == {0}:
        raise ValueError(f"{start.file.path}: {method} made it without low-rank factors; use `calibrate --rank {rank}`")


def described(metadata: dict[str, str], distiller: Distiller, rank: int, codes: bool) -> dict[str, str]:
    """The metadata of the start file, brought up to date."""
    best = min(distiller.log, key=lambda row: row["error"])
    stages = json.loads(metadata.get("ternary.settings", "{}"))
    stages["distill"] = {
        "steps": distiller.total,
        "batch": distiller.settings.batch * distiller.settings.accumulate,
        "rank": rank,
        "codes": codes,
        "states": len(distiller.pool),
        "velocity_error": round(best["error"], 5),
        "best_step": best["step"],
    }
    return dict(metadata) | {"ternary.method": "distill", "ternary.settings": json.dumps(stages)}
