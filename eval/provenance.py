"""What produced a results file: sources with their hashes, versions, hardware, peak memory, commit."""

import hashlib
import platform
import resource
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from eval.loading import base_of_adapter, is_adapter
from eval.machine import cpu_name, git_commit

WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin", "adapter_model*")
LIBRARIES = ("trl", "transformers", "torch", "datasets", "peft", "scipy", "rouge-score", "matplotlib", "jinja2")
SETTINGS = (
    "n_prompts",
    "max_new_tokens",
    "temperature",
    "batch_size",
    "prompt_tokens",
    "shuffle",
    "max_prompt_tokens",
    "n_samples",
    "best_of",
)


def describe_run(args, argv: list[str], plan, schema_version: int) -> dict:
    """What produced the results: command, settings, sources with hashes, versions, hardware, commit."""
    prompts = {"source": args.prompts, "split": args.split, "column": args.prompt_column}
    prompts |= {"reference_column": args.reference_column, "n": len(plan.prompts.texts)}
    return {
        "schema_version": schema_version,
        **describe_origin("eval.compare", argv, args.seed),
        "settings": {name: getattr(args, name) for name in SETTINGS} | {"dtype": "float32"},
        "prompts": prompts | {"sha256": plan.prompts.sha256()},
        "models": {"base": plan.sources[args.base]},
        "rewards": describe_rewards(plan.specs),
        "pairs": None,
    }


def describe_origin(module: str, argv: list[str], seed: int) -> dict:
    """Command, time, seed, versions, hardware and commit of a result."""
    return {
        "command": f"python -m {module} {shlex.join(argv)}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": describe_versions(),
        "hardware": describe_hardware(),
        "git_commit": git_commit(),
    }


def describe_rewards(specs: dict) -> dict[str, dict]:
    """Each reward's path or function with the hash of its weights, and whether it is a judge."""
    return {
        name: describe_source(spec.path or spec.spec) | {"path": spec.spec, "judge": spec.judge}
        for name, spec in specs.items()
    }


def describe_model(path: str, config) -> dict:
    """`describe_source`, with the commit of a model from the Hub and the base model of an adapter."""
    described = describe_source(path)
    revision = getattr(config, "_commit_hash", None)
    if described["sha256"] is None and revision:
        described["revision"] = revision
    if is_adapter(path):
        described["adapter_of"] = describe_source(base_of_adapter(path))
    return described


def describe_source(path: str) -> dict:
    """A model's path and, if it is a local folder, the SHA-256 over the names and contents of its weight files."""
    folder = Path(path)
    files = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)}) if folder.is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return {"path": path, "sha256": digest.hexdigest() if files else None}


def describe_versions() -> dict[str, str]:
    """Python's version and that of every library that can change a figure or a picture."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def describe_hardware() -> dict:
    """The CPU's model, the threads torch uses, and the GPU's name or None."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_name(), "threads": torch.get_num_threads(), "gpu": gpu}


def peak_memory() -> dict[str, int | None]:
    """The most bytes this process has held so far: resident memory, and the GPU's by torch or None."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"process": resident, "gpu": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}
