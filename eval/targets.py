"""Which tuned models are compared with the base, and where the results of each go."""

import os
from dataclasses import dataclass
from pathlib import Path

from eval.loading import is_adapter
from models_and_data import check_path
from trl_ppo.inputs import UserError


@dataclass
class Target:
    """A tuned model that is compared with the base; `step` is a checkpoint's."""

    name: str
    path: str
    step: int | None = None


def find_targets(args) -> list[Target]:
    """The tuned models that the options name, by names that differ; UserError if there is none."""
    if args.tuned:
        return [Target("tuned", args.tuned)]
    if args.sweep:
        found = checkpoints(args.sweep)
        if len(found) < 2:
            raise UserError(
                f"--sweep {args.sweep}: holds one model and nothing to compare it with; train with --save_steps, or "
                "give the model as --tuned"
            )
        return [Target("final" if step is None else f"step-{step}", str(folder), step) for step, folder in found]
    paths = [path for path in args.runs if not Path(path).is_file()]
    if not paths:
        raise UserError(f"--runs {' '.join(args.runs)}: no folder or Hub id among them")
    for path in paths:
        check_path("--runs", path)
        if Path(path).is_dir() and not holds_model(Path(path)):
            raise UserError(f"--runs {path}: no model in there")
    parts = [[part for part in Path(path).parts if part not in ("/", ".", "..")] for path in paths]
    depth = next((d for d in range(1, 9) if len({"-".join(part[-d:]) for part in parts}) == len(paths)), None)
    if depth is None:
        raise UserError(f"--runs {' '.join(paths)}: a run is named twice")
    return [Target("-".join(part[-depth:]), path) for part, path in zip(parts, paths, strict=True)]


def check_output(folder: Path, overwrite: bool, name: str = "results.json") -> None:
    """UserError if the results cannot be written to `folder`, or would replace others unasked."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output {folder}: {existing} is not a folder that can be written to")
    if (folder / name).exists() and not overwrite:
        raise UserError(f"--output {folder} already has a {name}; give another folder or --overwrite")


def holds_model(folder: Path) -> bool:
    """Whether a model, or an adapter of one, can be loaded from the folder."""
    return is_adapter(str(folder)) or (folder / "config.json").is_file()


def checkpoints(run: Path) -> list[tuple[int | None, Path]]:
    """(step, folder) of the run's checkpoints by step, then of the run itself with None, if it holds a final model.

    UserError if there is none.
    """
    found = []
    for folder in run.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and holds_model(folder):
            found.append((int(step), folder))
    found.sort()
    if run.is_dir() and holds_model(run):
        found.append((None, run))
    if not found:
        raise UserError(f"--sweep {run}: no such folder, or neither a model nor a checkpoint-* with one in it")
    return found
