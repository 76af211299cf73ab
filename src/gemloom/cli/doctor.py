"""``gemloom doctor``: what this machine has, what ggml makes of it, and what would be faster."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from gemloom.cli.terminal import one_line, print_json, render, size, table
from gemloom.errors import DeviceError

_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = {  # ggml's name for what decides the speed -> the kernel's name for it
    "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx512": "avx512f",
    "avx512_vnni": "avx512_vnni", "dotprod": "asimddp", "matmul_int8": "i8mm",
}  # fmt: skip


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what ggml uses of this machine, and what would be faster.

    \b
    Examples:
      gemloom doctor
      gemloom doctor --json
    """
    facts = examine()
    if as_json:
        print_json(facts)
        return
    rows = table("", "")
    rows.show_header = False
    for label, value in _lines(facts):
        rows.add_row(label, one_line(value))
    render(rows)
    if facts["advice"]:
        _print_advice(facts["advice"])


def _print_advice(advice: dict[str, Any]) -> None:
    typer.echo("\nIt may be faster (gemloom bench tells):")
    for reason in advice["because"]:
        typer.echo(f"- {reason}")
    typer.echo(f"This builds ggml for this machine; it needs {advice['needs']}:\n")
    typer.echo(_folded(advice["command"]))


def examine() -> dict[str, Any]:
    """What was found; JSON can hold it. DeviceError where ggml cannot be loaded."""
    from gemloom import __version__, builtin

    try:
        from gemloom.ggml import backends, device
        from gemloom.kernels.library import supported
    except (ImportError, OSError) as error:
        raise DeviceError(
            f"ggml cannot be loaded: {error}; pip install --force-reinstall ggml-python"
        ) from error
    features = backends.cpu_features()
    devices = backends.devices()
    missing = [name for name in unused(_cpu_flags(), features) if name]
    blas = any(info.kind == "accel" for info in devices)
    return {
        "gemloom": __version__,
        "python": platform.python_version(),
        "ggml": backends.ggml_version(),
        "ggml_python": version("ggml-python"),
        "devices": [
            {"name": d.name, "kind": d.kind, "description": d.description, "total": d.total}
            for d in devices
        ],
        "cpu_features": [name for name, used in features.items() if used],
        "cpu_features_unused": missing,
        "blas": blas,
        "kernels": [library.name for library in supported()],
        "threads": device.usable_cores(),
        "model": {"name": builtin.DEFAULT_MODEL, "installed": bool(builtin.present())},
        "advice": advise(blas, missing, version("ggml-python")),
    }


def unused(flags: set[str], features: dict[str, bool]) -> list[str]:
    """What the CPU has (``flags``, the kernel's names) and this build of ggml does not use."""
    return [name for name, flag in _FLAGS.items() if flag in flags and not features.get(name)]


def advise(blas: bool, missing: list[str], release: str) -> dict[str, Any] | None:
    """The one command that would make it faster, why, and what it needs; None if there is none."""
    because = [] if blas else ["ggml was built without BLAS: faster prompts on some CPUs"]
    if missing:
        because.append(f"ggml was not built for this CPU ({', '.join(missing)} unused)")
    if not because:
        return None
    flags = "" if blas else 'CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS" '
    needs = "a C++ compiler" if blas else "libopenblas-dev or its like"
    return {
        "because": because,
        "needs": needs,
        "command": f"{flags}pip install --force-reinstall --no-deps --no-cache-dir "
        f"--no-binary ggml-python ggml-python=={release}",
    }


def _cpu_flags() -> set[str]:
    """The kernel's names of what the first CPU can do; empty on other systems than Linux."""
    if not _CPUINFO.exists():
        return set()
    for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    model = facts["model"]
    there = "installed" if model["installed"] else "not installed; it is fetched when first used"
    devices = [
        (f"device {d['name']}", f"{d['description']}, {size(d['total'])}") for d in facts["devices"]
    ]
    return [
        ("gemloom", f"{facts['gemloom']}, Python {facts['python']}"),
        ("ggml", f"{facts['ggml']}, ggml-python {facts['ggml_python']}"),
        *devices,
        ("BLAS", "yes" if facts["blas"] else "no"),
        ("own kernels", _kernels(facts["kernels"])),
        ("threads", str(facts["threads"])),
        ("CPU features", " ".join(facts["cpu_features"]) or "none"),
        ("not used", " ".join(facts["cpu_features_unused"]) or "none"),
        (model["name"], there),
    ]


def _kernels(names: list[str]) -> str:
    """Which of our own kernels are used; ``names`` are all that this CPU runs, fastest first."""
    if not names:
        return "none: not built with this package, or not for this CPU; ggml's are used"
    others = f" (it runs {', '.join(names[1:])} too)" if names[1:] else ""
    return names[0] + others


def _folded(command: str) -> str:
    """The command on lines that fit a terminal and can be copied as they are."""
    for start in ("pip install", "--no-binary"):
        command = command.replace(f" {start}", f" \\\n  {start}")
    return command
