"""``gemloom doctor``: what this machine has, what ggml makes of it, and what would be faster."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemloom.cli.device_options import plan_facts, plan_table
from gemloom.cli.load import open_file
from gemloom.cli.options import LoadOptions, with_options
from gemloom.cli.terminal import one_line, print_json, render, size, table
from gemloom.errors import DeviceError

if TYPE_CHECKING:
    from gemloom.ggml.backends import DeviceInfo

_FLAGS = {  # ggml's name for what decides the speed -> the kernel's name for it
    "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx512": "avx512f",
    "avx512_vnni": "avx512_vnni", "dotprod": "asimddp", "matmul_int8": "i8mm",
}  # fmt: skip
_KERNELS_NEED = ({"avx2", "fma", "f16c"}, {"asimddp"})  # one of these sets, by the kernel's names


@with_options
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Show where this model would go, and what devices lack."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    *,
    load: LoadOptions,
) -> None:
    """Show what ggml has here, and what would be faster.

    With a model also where it would go, in bytes by device, and which of its operations each
    device lacks. Nothing is loaded.

    \b
    Examples:
      gemloom doctor
      gemloom doctor --json
      gemloom doctor gemma.gguf --device vulkan0 --context 32768
    """
    facts = examine()
    if model is not None:
        facts |= _examine_model(model, load)
    if as_json:
        facts.pop("placement", None)
        print_json(facts)
        return
    rows = table("", "")
    rows.show_header = False
    for label, value in _lines(facts):
        rows.add_row(label, one_line(value))
    render(rows)
    for advice in facts["advice"]:
        typer.echo(f"\nIt may be faster (gemloom bench tells): {advice['because']}.")
        typer.echo(f"This builds it for this machine; it needs {advice['needs']}:\n")
        typer.echo(_folded(advice["command"]))
    if model is not None:
        _print_model(facts)


def _examine_model(name: str, load: LoadOptions) -> dict[str, Any]:
    """What each device lacks for a model, and where it would go."""
    from gemloom.compute.fitting import propose
    from gemloom.compute.survey import survey
    from gemloom.options import Options

    options, file = Options(**load.given()), open_file(name, load.key_file)
    lacking = {device: asdict(told) for device, told in survey(file, options).items()}
    placement = propose(file, options)
    workers = [use.name for use in placement.table if use.name.startswith("rpc:")]
    return {
        "lacking": lacking,
        "workers": workers,
        "placement": placement,
        "plan": plan_facts(placement),
    }


def _print_model(facts: dict[str, Any]) -> None:
    typer.echo("")
    for name, told in facts["lacking"].items():
        each = ", ".join(f"{op} ({n:,})" for op, n in sorted(told["lacking"].items()))
        typer.echo(f"{name} lacks of the {told['nodes']:,} operations of a step: {each or 'none'}")
        if each:
            typer.echo(
                f"so a worker cannot lend {name} for it: what its device lacks ends a worker"
            )
    for name in facts["workers"]:
        typer.echo(f"what {name} lacks cannot be asked from here: gemloom doctor there tells")
    render(plan_table(facts["placement"]))


def examine() -> dict[str, Any]:
    """What was found; JSON can hold it. DeviceError where ggml cannot be loaded."""
    from gemloom import __version__
    from gemloom.files import builtin
    from gemloom.system import limits

    try:
        from gemloom.ggml import backends, processor, trust
        from gemloom.kernels.library import supported
    except (ImportError, OSError) as error:
        raise DeviceError(
            f"ggml cannot be loaded: {error}; pip install --force-reinstall ggml-python"
        ) from error
    features = backends.cpu_features()
    devices = backends.devices()
    flags, kernels = processor.flags(), [library.name for library in supported()]
    verdicts = trust.verdicts(again=True)
    missing = unused(flags, features)
    blas, gpu = (any(info.kind == kind for info in devices) for kind in ("accel", "gpu"))
    advice = [] if gpu else advise(kernels, flags, missing, blas)  # all of it is for the CPU
    return {
        "gemloom": __version__,
        "python": platform.python_version(),
        "ggml": backends.ggml_version(),
        "ggml_python": version("ggml-python"),
        "devices": [
            {
                "name": d.name,
                "kind": d.kind,
                "description": d.description,
                **_space(d),
            }
            for d in devices
        ],
        "cpu_features": [name for name, used in features.items() if used],
        "cpu_features_unused": missing,
        "blas": blas,
        "kernels": kernels,
        "left_out": verdicts.left_out,
        "proof": {"file": verdicts.file or None, "problem": verdicts.problem or None},
        "threads": limits.usable_cores(),
        "model": {"name": builtin.DEFAULT_MODEL, "installed": bool(builtin.present())},
        "advice": [asdict(one) for one in advice],
    }


def _space(info: "DeviceInfo") -> dict[str, int]:
    """Bytes in all and free; of the host those that this process may have."""
    from gemloom.system import limits

    host = limits.memory() if info.kind == "cpu" else None
    if host is None:
        return {"total": info.total, "free": info.free}
    return {"total": host.limit, "free": host.free}


def unused(flags: set[str], features: dict[str, bool]) -> list[str]:
    """What the CPU has (``flags``, the kernel's names) and this build of ggml does not use."""
    return [name for name, flag in _FLAGS.items() if flag in flags and not features.get(name)]


@dataclass(frozen=True, slots=True)
class Advice:
    """One command that would make it faster, why, and what it needs."""

    because: str
    needs: str
    command: str


def advise(
    kernels: Sequence[str], flags: set[str], missing: Sequence[str], blas: bool
) -> list[Advice]:
    """What would help: nothing where our own kernels do what it would be for.

    ``kernels`` are ours that run here, ``flags`` the kernel's names of what the CPU has,
    ``missing`` what of it ggml does not use.
    """
    if not kernels and any(needed <= flags for needed in _KERNELS_NEED):
        because = "our own kernels were not built: faster prompts and answers"
        return [Advice(because, "a C++ compiler", "python -m gemloom.kernels.build")]
    unused = f"ggml was not built for this CPU ({', '.join(missing)} unused)"
    if kernels:
        others = f"{unused}: faster where weights are of types that our own kernels do not take"
        return [Advice(others, "a C++ compiler", _rebuild())] if missing else []
    if not blas:
        because = "ggml was built without BLAS, and no kernels of our own run here: faster prompts"
        options = "-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS"
        return [Advice(because, "libopenblas-dev or its like", _rebuild(options))]
    return [Advice(unused, "a C++ compiler", _rebuild())] if missing else []


def _rebuild(options: str = "") -> str:
    """The command that builds ggml for this machine, as it always is from its source."""
    options = f"{options} -DGGML_RPC=ON".lstrip()
    return (
        f'CMAKE_ARGS="{options}" pip install --force-reinstall --no-deps --no-cache-dir '
        f"--no-binary ggml-python ggml-python=={version('ggml-python')}"
    )


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    model = facts["model"]
    there = "installed" if model["installed"] else "not installed; it is fetched when first used"
    devices = [
        (f"device {d['name'].lower()}", f"{d['description']}, {_memory(d)}")
        for d in facts["devices"]
    ]
    return [
        ("gemloom", f"{facts['gemloom']}, Python {facts['python']}"),
        ("ggml", f"{facts['ggml']}, ggml-python {facts['ggml_python']}"),
        *devices,
        ("BLAS", "yes" if facts["blas"] else "no"),
        ("own kernels", _kernels(facts["kernels"], facts["left_out"])),
        *(("left out", f"{kernel}: {wrong}") for kernel, wrong in facts["left_out"].items()),
        *_unproven(facts["proof"]),
        ("threads", str(facts["threads"])),
        ("CPU features", " ".join(facts["cpu_features"]) or "none"),
        ("not used", " ".join(facts["cpu_features_unused"]) or "none"),
        (model["name"], there),
    ]


def _memory(device: dict[str, Any]) -> str:
    if not device["total"]:
        return "memory unknown"
    return f"{size(device['free'])} of {size(device['total'])} free"


def _kernels(names: list[str], left_out: dict[str, str]) -> str:
    """Which of our own kernels are used; ``names`` are all that this CPU runs, fastest first."""
    wrong = {kernel.partition(" ")[0] for kernel in left_out}
    if names and wrong.issuperset(names):
        return "none: all that this CPU runs are left out; ggml's are used"
    names = [name for name in names if name not in wrong]
    if not names:
        return "none: not built with this package, or not for this CPU; ggml's are used"
    others = f" (it runs {', '.join(names[1:])} too)" if names[1:] else ""
    return names[0] + others


def _unproven(proof: dict[str, str | None]) -> list[tuple[str, str]]:
    """What there is to say of the proof itself, if it could not be done or kept."""
    if proof["problem"]:
        return [("not proven", f"{proof['problem']}; of ggml's kernels only plain ones are used")]
    if not proof["file"]:
        return [("not kept", "each start proves the kernels again; set XDG_CACHE_HOME")]
    return []


def _folded(command: str) -> str:
    """The command on lines that fit a terminal and can be copied as they are."""
    for start in ("pip install", "--no-binary"):
        command = command.replace(f" {start}", f" \\\n  {start}")
    return command
