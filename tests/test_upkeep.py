"""What a project's visitors and its robots rely on: workflows, versions, and the installation of `make`."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FAKE_PYTHON = """#!/bin/sh
echo "python $*" >> {log}
case "$*" in "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;; esac
"""


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_exists_and_may_do_no_more_than_it_needs(path):
    workflow = yaml.safe_load(path.read_text())
    targets = set(re.findall(r"^([\w.\-/]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    runs = [line.strip() for step in steps(workflow) for line in step.get("run", "").splitlines()]
    for line in runs:
        if line.startswith("make "):
            assert line.split()[1] in targets
        if line.startswith(".ci/"):
            assert os.access(ROOT / line.split()[0], os.X_OK)
    assert runs
    assert workflow["permissions"]["contents"] == "read"


def test_the_weekly_workflow_upgrades_what_is_overridden_and_tells_somebody():
    weekly = yaml.safe_load((ROOT / ".github" / "workflows" / "newest.yml").read_text())
    runs = "\n".join(step.get("run", "") for step in steps(weekly))
    assert re.search(r"install --upgrade trl transformers accelerate peft$", runs, re.MULTILINE)
    (report,) = [step for step in steps(weekly) if step.get("if") == "failure()"]
    assert "gh issue create" in report["run"]
    assert weekly["permissions"]["issues"] == "write"


def test_every_place_that_names_the_version_names_the_same():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def programs(folder: Path, log: Path, **scripts: str) -> str:
    """A PATH on which these programs come first."""
    folder.mkdir()
    for name, text in {"python3": FAKE_PYTHON.format(log=log), **scripts}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("scripts", "wanted"),
    [
        ({"curl": "#!/bin/sh\n"}, True),
        ({"curl": "#!/bin/sh\nexit 7\n"}, False),
        ({"curl": "#!/bin/sh\n", "nvidia-smi": "#!/bin/sh\n"}, False),
        ({"curl": "#!/bin/sh\n", "uname": "#!/bin/sh\necho Darwin\n"}, False),
    ],
    ids=["no driver", "index out of reach", "a driver", "no Linux"],
)
def test_make_takes_the_cpu_build_of_torch_where_there_is_no_driver_and_it_can_be_had(tmp_path, scripts, wanted):
    if "nvidia-smi" not in scripts and any(Path(p, "nvidia-smi").exists() for p in os.environ["PATH"].split(":")):
        pytest.skip("this machine has an NVIDIA driver")
    for name in ("Makefile", "requirements.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    log = tmp_path / "log"
    scripts = {"uname": "#!/bin/sh\necho Linux\n"} | scripts
    path = programs(tmp_path / "programs", log, **scripts)
    environment = {"PATH": path, "HOME": str(tmp_path)}
    subprocess.run(["make", ".venv/.installed"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    installed = [line for line in log.read_text().splitlines() if "pip install" in line]
    assert installed[-1] == "python -m pip install -r requirements.txt"
    (pin,) = re.findall(r"^torch==.*$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    cpu = [f"python -m pip install {pin} --index-url https://download.pytorch.org/whl/cpu"]
    assert installed[:-1] == (cpu if wanted else [])
