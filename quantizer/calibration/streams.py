"""Activations of the teacher and of the partly ternary model side by side, before the next block, in mapped files."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import ranks
from ..files.atomic import check_space, in_bytes, reserve
from ..files.container import size_of
from ..model.flux import Flux, Part, Tier, Tokens, linear_of
from ..model.teacher import Teacher
from ..pictures.conditioning import Conditioning
from ..pictures.states import States
from .moments import Moments

TEACHER, STUDENT = 0, 1
TEXT_IMPORTANCE = 0.3  # of a text token beside an image token where both go through one Linear
_VECTORS = 8192  # inputs of modulation Linears cost no forward: they depend on time, prompt and guidance alone


@dataclass(frozen=True, eq=False)
class TokenFile:
    """States of one size. Image and text tokens of both models lie in files that are mapped into memory."""

    img: Tensor  # [2, S, I, hidden]: teacher, student
    txt: Tensor  # [2, S, T, hidden]
    vec: Tensor  # [S, hidden]
    grid: tuple[int, int]

    @classmethod
    def allocate(cls, path: Path, count: int, tokens: Tokens) -> "TokenFile":
        """Raises OSError, before anything is written, where the disk has no room: later that would end the process."""
        shapes = {"img": (2, count, *tokens.img.shape[1:]), "txt": (2, count, *tokens.txt.shape[1:])}
        need = sum(size_of(tokens.img.dtype, shape) for shape in shapes.values())
        check_space(path.parent, need, f"the activations of {count} states need")

        def mapped(suffix: str, like: Tensor) -> Tensor:
            shape, name = shapes[suffix], f"{path}-{suffix}"
            with open(name, "wb") as file:
                try:
                    reserve(file, size_of(like.dtype, shape))
                except OSError as error:
                    need_here = in_bytes(size_of(like.dtype, shape))
                    raise OSError(f"{name} needs {need_here}: {error.strerror}; fewer --states need less") from None
            size = torch.Size(shape).numel()
            return torch.from_file(name, shared=True, size=size, dtype=like.dtype).view(shape)

        vec = torch.empty(count, tokens.vec.shape[1], dtype=tokens.vec.dtype, device=tokens.vec.device)
        return cls(mapped("img", tokens.img), mapped("txt", tokens.txt), vec, tokens.grid)

    def rows(self, batch: int) -> Iterator[slice]:
        return slices(len(self.vec), batch)

    def tokens(self, stem: Flux, rows: slice, model: int) -> Tokens:
        vec = self.vec[rows]
        img, txt = (part[model, rows].to(vec.device) for part in (self.img, self.txt))
        return stem.tokens(img, txt, vec, self.grid)

    def put(self, rows: slice, model: int, tokens: Tokens) -> None:
        self.img[model, rows] = tokens.img.cpu()
        self.txt[model, rows] = tokens.txt.cpu()


class Streams:
    """Both models' tokens at this rank's share of the states; `advance` takes them through one more part of a block."""

    def __init__(
        self,
        teacher: Teacher,
        states: Sequence[States],
        conditioning: Conditioning,
        folder: str | os.PathLike,
        batch: int = 8,
    ):
        """`folder` is emptied; it needs 4 x states x tokens x hidden x (2 or 4) bytes. `batch` states run at a time.

        Ranks share whole batches: each is computed in the same bits whatever their number.
        """
        self.teacher, self.folder, self.batch = teacher, Path(folder) / str(ranks.rank()), batch
        self.teacher_ahead = False  # by the part of a block that the student has yet to go through
        ranks.once(lambda: shutil.rmtree(folder, ignore_errors=True))
        self.folder.mkdir(parents=True)
        try:
            mine = my_batches(states, batch)
            self.groups = [self._prepare(str(i), group, conditioning) for i, group in enumerate(mine)]
            self.vectors = many_vectors(teacher, states, conditioning) if teacher.arch.version == 1 else None
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def moments(
        self, dense: nn.Module, student: nn.Module, part: Part, tier: Tier, last: bool = False
    ) -> dict[str, Moments]:
        """Moments of the inputs of a tier's Linears, in this part of a block, over this rank's states.

        `dense` is the teacher's block, `last` whether only the final layer comes after this part of it. A tier that
        adds to the tokens takes the teacher's through the part.
        """
        linears = tier.linears
        device = self.teacher.device
        modules = {name: linear_of(student, name) for name in linears}
        moments = {name: Moments(m.out_features, m.in_features, device) for name, m in modules.items()}
        if tier.role == "modulate":
            for vectors in ranks.share(self.vectors.split(1024)):
                for name in linears:
                    moments[name].add(nn.functional.silu(vectors)[:, None])
            return moments
        for name, collected in moments.items():
            if tier.role == "add":
                collected.expect_residual()
                if last and not name.startswith("txt_"):
                    collected.expect_metric()
            else:
                collected.expect_drift()
        for group in self.groups:
            for rows in group.rows(self.batch):
                ours = group.tokens(self.teacher.stem, rows, STUDENT)
                importance = {name: token_importance(name, ours, last) for name in linears}
                if tier.role == "add":
                    wanted = self._teachers_after(dense, part, group, rows)
                    self._add_residuals(moments, student, part, wanted, ours, importance)
                else:
                    gates = student.gates(ours)
                    theirs = group.tokens(self.teacher.stem, rows, TEACHER)
                    teacher_inputs = inputs_of(dense, linears, theirs, part)
                    inputs = inputs_of(student, linears, ours, part)
                    for name in linears:
                        weight = _power(gates[name]) * importance[name]
                        moments[name].add(inputs[name], weight)
                        moments[name].add_drift(inputs[name], teacher_inputs[name], weight)
        self.teacher_ahead = tier.role == "add"
        mixed = self.teacher.stem.final_layer.linear.weight.double()
        for collected in moments.values():
            if collected.metric is not None:
                collected.metric *= mixed.t() @ mixed
        return moments

    def _teachers_after(self, dense: nn.Module, part: Part, group: TokenFile, rows: slice) -> Tokens:
        """The teacher's tokens after a part of its block, which is computed once."""
        tokens = group.tokens(self.teacher.stem, rows, TEACHER)
        if not self.teacher_ahead:
            tokens = part.of(dense)(tokens)
            group.put(rows, TEACHER, tokens)
        return tokens

    def _add_residuals(
        self,
        moments: Mapping[str, Moments],
        student: nn.Module,
        part: Part,
        wanted: Tokens,
        ours: Tokens,
        importance: Mapping[str, Tensor],
    ) -> None:
        """What the student's tokens miss of those that are wanted after these Linears, while they are still dense.

        Behind the last ones, the final layer mixes the channels of image tokens into few outputs: what it makes of the
        Linears' errors is what counts.
        """
        captured = {}
        handles = [
            student.get_submodule(name).register_forward_pre_hook(
                lambda _, arguments, name=name: captured.__setitem__(name, arguments[0])
            )
            for name in moments
        ]
        found = part.of(student)(ours)
        for handle in handles:
            handle.remove()
        gates = student.gates(ours)
        for name in moments:
            missing = student.stream(name, wanted).float() - student.stream(name, found).float()
            moments[name].add(captured[name], _power(gates[name]) * importance[name])
            moments[name].add_residual(captured[name], missing, gates[name], importance[name])
            if moments[name].metric is not None:
                moments[name].add_reach(gates[name].float() * self.teacher.stem.final_layer.reach(found.img, found.vec))

    def advance(self, dense: nn.Module, student: nn.Module, part: Part) -> tuple[float, float]:
        """Take both models through a part of their blocks; returns the relative drift of image and of text tokens."""
        device = self.teacher.device
        difference, power = (torch.zeros(2, dtype=torch.float64, device=device) for _ in range(2))
        for group in self.groups:
            for rows in group.rows(self.batch):
                theirs = self._teachers_after(dense, part, group, rows)
                ours = part.of(student)(group.tokens(self.teacher.stem, rows, STUDENT))
                for i, (a, b) in enumerate(((theirs.img, ours.img), (theirs.txt, ours.txt))):
                    difference[i] += (a.float() - b.float()).square().sum()
                    power[i] += a.float().square().sum()
                group.put(rows, STUDENT, ours)
        self.teacher_ahead = False
        ranks.add_up([difference, power])
        img, txt = (difference / power.clamp_min(1e-30)).sqrt().tolist()
        return img, txt

    def last_moments(self) -> Moments:
        """After the last block: of the final Linear's inputs, and of what its outputs miss of the teacher's."""
        final = self.teacher.stem.final_layer
        moments = Moments(final.linear.out_features, final.linear.in_features, self.teacher.device)
        moments.expect_residual()
        for group in self.groups:
            for rows in group.rows(self.batch):
                theirs, ours = (group.tokens(self.teacher.stem, rows, model) for model in (TEACHER, STUDENT))
                x = final.inputs(ours.img, ours.vec)
                missing = final(theirs.img, theirs.vec).float() - final.linear(x).float()
                moments.add(x)
                moments.add_residual(x, missing, torch.ones_like(missing[:, :1]))
        return moments

    def remove(self) -> None:
        """Delete the activations."""
        self.groups = []
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other ranks' are there
            self.folder.parent.rmdir()

    def _prepare(self, name: str, states: States, conditioning: Conditioning) -> TokenFile:
        group = None
        for rows in slices(len(states), self.batch):
            tokens = self.teacher.prepare(states.inputs(rows, conditioning))
            if group is None:
                group = TokenFile.allocate(self.folder / name, len(states), tokens)
            group.vec[rows] = tokens.vec
            group.put(rows, TEACHER, tokens)
            group.put(rows, STUDENT, tokens)
        return group


def token_importance(linear: str, tokens: Tokens, last: bool) -> Tensor:
    """How much each token [L] counts of those that a Linear gets.

    Text matters by what image tokens read of it: less where a Linear is for both, and not at all at the end of the
    last block, behind which only image tokens are used.
    """
    img, txt = tokens.img, tokens.txt
    if linear.startswith(("img_", "txt_")):
        return torch.ones(img.shape[1] if linear.startswith("img_") else txt.shape[1], device=img.device)
    weight = torch.ones(txt.shape[1] + img.shape[1], device=img.device)
    weight[: txt.shape[1]] = 0.0 if last and linear == "linear2" else TEXT_IMPORTANCE
    return weight


def _power(gate: Tensor) -> Tensor:
    """Mean square [B, 1] of a gate [B, 1, hidden]."""
    return gate.float().square().mean(2)


def many_vectors(
    teacher: Teacher, states: Sequence[States], conditioning: Conditioning, count: int = _VECTORS
) -> Tensor:
    """Modulation vectors [count, hidden] of times as the states have them, with their prompts and guidance values."""
    t, prompt = (torch.cat([getattr(group, name) for group in states]) for name in ("t", "prompt"))
    t = t.sort().values
    guided = states[0].guidance is not None
    guidance = torch.cat([group.guidance for group in states]) if guided else None
    generator = torch.Generator().manual_seed(0)
    vectors, device = [], teacher.device
    for rows in slices(count, 1024):
        size = (rows.stop - rows.start,)
        after, between = torch.randint(len(t), size, generator=generator), torch.rand(size, generator=generator)
        times = torch.lerp(t[(after - 1).clamp_min(0)], t[after], between)
        pick, other = (torch.randint(len(t), size, generator=generator) for _ in range(2))
        pooled = None if conditioning.pooled is None else conditioning.pooled[prompt[pick]].to(device, teacher.dtype)
        values = guidance[other].to(device) if guided else None
        vectors.append(teacher.stem.vector(times.to(device), pooled, values, teacher.dtype))
    return torch.cat(vectors)


class _Captured(Exception):
    """Every wanted input has been seen: the rest of the part need not run."""


def inputs_of(block: nn.Module, linears: Sequence[str], tokens: Tokens, part: Part) -> dict[str, Tensor]:
    """The inputs [B, L, K] that some Linears in a part of a block get from the tokens before it."""
    captured: dict[str, Tensor] = {}

    def hook(name: str):
        def capture(_, arguments: tuple[Tensor, ...]) -> Tensor:
            captured[name] = arguments[0]
            if len(captured) == len(linears):
                raise _Captured
            return arguments[0][:, :1]  # what comes of it is not looked at

        return capture

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in linears]
    try:
        part.of(block)(tokens)
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return captured


def my_batches(states: Sequence[States], size: int) -> list[States]:
    """The states of this rank's share of the batches, by size."""
    batches = ranks.share([(number, rows) for number, group in enumerate(states) for rows in slices(len(group), size)])
    chosen: dict[int, list[Tensor]] = {}
    for number, rows in batches:
        chosen.setdefault(number, []).append(torch.arange(rows.start, rows.stop))
    return [states[number].rows(torch.cat(rows)) for number, rows in chosen.items()]


def slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
