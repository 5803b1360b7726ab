"""What the training recipes share beside settings, timing and reports: processes, text, checkpoints.

Nothing here knows a framework or a model; the recipes do.
"""

from __future__ import annotations

import json
import os
import pickle
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sections import RecipeError
from torch import Tensor

from deepep_moe.tools.world import World

# --------------------------------------------------------------------------------------------- processes


PEAK_TERAFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "GH200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense BF16 of the SXM variants, by what the device name contains."""


def utilization(world: World, flops_per_second: float) -> float | None:
    """Percent of all GPUs' peak (dense BF16) that ``flops_per_second`` are; None where the peak is not known."""
    name = torch.cuda.get_device_name(world.device) if world.on_gpu else ""
    peak = next((peak for part, peak in PEAK_TERAFLOPS.items() if part in name), None)
    return None if peak is None else 100 * flops_per_second / (peak * 1e12 * world.size)


def start_processes(timeout_seconds: float = 600) -> World:
    """Join the process group: NCCL with a GPU for every process, gloo on a machine without GPUs.

    Without torchrun this is a world of one process.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in os.environ]
    if missing:
        raise RecipeError(f"RANK is set but not {', '.join(missing)}: start with torchrun, which sets all of them")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    if 0 < gpus < local_size:
        raise RecipeError(
            f"{local_size} processes but {gpus} GPUs on this machine: start one process per GPU "
            "(torchrun --nproc-per-node), or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if gpus else None,
    )
    return World(rank, size, device, "nccl" if gpus else "gloo")


# -------------------------------------------------------------------------------------------------- text


def read_text(source: str) -> bytes:
    """Text to learn from.

    ``python-docs``: the language reference that every CPython carries for ``help()``, about 0.5 MB of English.
    ``python-source``: the modules of the standard library, some 10 MB of code and comments. Anything else is a
    text file, or a directory whose ``*.txt`` and ``*.md`` files are read in order of name.
    """
    if source == "python-docs":
        return "\n\n".join(pydoc_data.topics.topics.values()).encode()
    if source == "python-source":
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(path for pattern in ("*.py", "[a-z]*/*.py") for path in library.glob(pattern))
        files = [path for path in files if path.parts[-2] not in ("site-packages", "test", "pydoc_data")]
    else:
        path = Path(source)
        if not path.exists():
            raise RecipeError(f"data.text = {source}: neither python-docs, python-source nor a file or directory")
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md")) if path.is_dir() else [path]
    return b"\n\n".join(path.read_bytes() for path in files)


class ByteText:
    """Text as bytes (256 tokens), every tenth block of it held out from training.

    Batches are a function of (seed, step, rank) alone, so a resumed run sees what an uninterrupted one sees.
    """

    BLOCK = 4096
    HELD_OUT_EVERY = 10

    def __init__(self, text: bytes, sequence_length: int, seed: int) -> None:
        blocks = torch.frombuffer(bytearray(text), dtype=torch.uint8).split(self.BLOCK) if text else ()
        held_out = blocks[:: self.HELD_OUT_EVERY]
        train = [block for i, block in enumerate(blocks) if i % self.HELD_OUT_EVERY]
        if any(sum(map(len, part)) <= sequence_length for part in (held_out, train)):
            raise RecipeError(f"{len(text)} bytes of text are too few for sequences of {sequence_length}")
        self.train, self.held_out = torch.cat(train), torch.cat(held_out)
        self.sequence_length, self.seed = sequence_length, seed

    def batch(self, step: int, rank: int, sequences: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-byte labels, each int64 ``[sequences, sequence_length]``, at random places."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 65_537 + rank)
        starts = torch.randint(len(self.train) - self.sequence_length, (sequences,), generator=generator)
        return self._windows(self.train, starts)

    def held_out_batches(self, world: World, windows: int, sequences: int) -> Iterable[tuple[Tensor, Tensor]]:
        """This rank's share of ``windows`` fixed places in the held-out text; every rank gets as many batches."""
        per_rank = max(1, windows // (world.size * sequences)) * sequences
        last = len(self.held_out) - self.sequence_length - 1
        starts = torch.linspace(0, last, per_rank * world.size).long()[world.rank :: world.size]
        return [self._windows(self.held_out, part) for part in starts.split(sequences)]

    def _windows(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = tokens[starts[:, None] + torch.arange(self.sequence_length + 1)].long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# -------------------------------------------------------------------------------------------- checkpoints


def read_json(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise RecipeError(f"--resume: cannot read {path} ({error}); start without --resume") from error


class Checkpoints:
    """``checkpoints/step-N/rank-R.pt``: each rank its own part. ``latest.json`` names the newest complete step.

    Files appear under their final name only when complete, and ``latest.json`` only changes when every rank has
    written: a run that is killed at any moment leaves a checkpoint that can be resumed.
    """

    KEEP = 2

    def __init__(self, folder: Path, world: World, layout: Mapping[str, Any]) -> None:
        self.folder, self.world = folder / "checkpoints", world
        self.layout = json.loads(json.dumps({"processes": world.size, **layout}))
        self.pointer = self.folder / "latest.json"

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Collective: every rank writes ``state``, then the checkpoint becomes the latest."""
        target = self.folder / f"step-{step:07d}" / f"rank-{self.world.rank}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        self._replace(target, lambda path: torch.save(dict(state), path))
        dist.barrier()
        if self.world.rank == 0:
            text = json.dumps({"step": step, "layout": self.layout})
            self._replace(self.pointer, lambda path: path.write_text(text, encoding="utf-8"))
            self._remove(sorted(self.folder.glob("step-*"))[: -self.KEEP])

    def load(self) -> tuple[int, dict[str, Any]]:
        """Step and state of the latest checkpoint, on the CPU. Raises RecipeError where it cannot be used here."""
        if not self.pointer.exists():
            raise RecipeError(f"--resume: no checkpoint in {self.folder}; start without --resume")
        latest = read_json(self.pointer)
        for key, value in self.layout.items():
            if latest["layout"].get(key) != value:
                raise RecipeError(
                    f"--resume: the checkpoint in {self.folder} was written with {key} = {latest['layout'].get(key)}, "
                    f"this run has {key} = {value}"
                )
        path = self.folder / f"step-{latest['step']:07d}" / f"rank-{self.world.rank}.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise RecipeError(
                f"--resume: cannot read {path} ({type(error).__name__}). The step in {self.pointer} may be changed to "
                "that of an earlier checkpoint in the same folder"
            ) from error
        return latest["step"], state

    def clear(self) -> None:
        """Collective: remove the checkpoints of an earlier run in this folder."""
        if self.world.rank == 0 and self.folder.exists():
            self.pointer.unlink(missing_ok=True)
            self._remove(sorted(self.folder.glob("step-*")))
        dist.barrier()

    @staticmethod
    def _replace(target: Path, write: Callable[[Path], object]) -> None:
        unfinished = target.with_suffix(".unfinished")
        write(unfinished)
        unfinished.replace(target)

    @staticmethod
    def _remove(folders: Iterable[Path]) -> None:
        for folder in folders:
            for file in folder.glob("rank-*"):
                file.unlink()
            folder.rmdir()
