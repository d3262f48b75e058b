"""tools/install_gpu.sh where there is no GPU: the steps it prints, and where it stops."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run(*args: str, tools: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "CUDA_HOME": "/nowhere"}
    return subprocess.run(
        [str(ROOT / "tools" / "install_gpu.sh"), *args], env=environment, capture_output=True, text=True, timeout=60
    )


def fake(tools: Path, name: str, line: str) -> None:
    tools.mkdir(exist_ok=True)
    (tools / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    (tools / name).chmod(0o755)


def test_a_dry_run_prints_every_step_and_does_none(tmp_path: Path) -> None:
    done = run("--dry-run", "--venv", str(tmp_path / "venv"), tools=tmp_path / "tools")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "venv").exists()
    commands = [line for line in done.stdout.splitlines() if line.startswith("   $ ")]
    pieces = (
        "-m venv", "torch torchvision", "MEGAEVA_BUILD=cuda", "nvidia-dali-cuda130",
        "uninstall --yes transformer-engine", "transformer-engine==2.20.2 transformer-engine-cu13==2.20.2",
        "nvdlfw-inspect",
        "--no-build-isolation --no-deps transformer-engine-torch==2.20.2", "megaeva doctor",
    )  # fmt: skip
    assert len(commands) == len(pieces)
    assert all(piece in command for piece, command in zip(pieces, commands, strict=True))


def test_headers_are_found_from_wherever_pip_compiles(tmp_path: Path) -> None:
    done = run("--dry-run", "--venv", "some/venv", tools=tmp_path / "tools")
    (line,) = (line for line in done.stdout.splitlines() if "CPATH=" in line)
    folders = line.split("CPATH=")[1].split(" ")[0].split(":")
    site = ROOT / "some/venv/lib/python3.11/site-packages"
    assert folders == ["/nowhere/include", *(f"{site}/nvidia/{name}/include" for name in ("nccl", "cudnn", "cu13"))]


def test_it_stops_at_the_first_thing_that_is_not_so(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    fake(tools, "nvidia-smi", "exit 9")
    done = run(tools=tools)
    assert done.returncode == 1 and "nvidia-smi lists a GPU; install the driver" in done.stderr
    fake(tools, "nvidia-smi", "echo 570.10")
    done = run(tools=tools)
    assert done.returncode == 1 and "580 or later" in done.stderr
    fake(tools, "nvidia-smi", "echo 590.44")
    done = run(tools=tools)
    assert done.returncode == 1 and "/nowhere/bin/nvcc is of CUDA 13" in done.stderr


def test_an_unknown_argument_shows_how_it_is_called(tmp_path: Path) -> None:
    done = run("--dryrun", tools=tmp_path)
    assert done.returncode == 2 and "--dry-run" in done.stderr
