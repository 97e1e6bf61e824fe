"""Compiles every Triton kernel for real GPUs, on a machine without one; prints a JSON report.

    python tests/aot_compile.py sm_80 sm_90 sm_100

Run in a process of its own, with Triton's interpreter off: see tests/test_aot.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Recorded = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]
recorded: list[Recorded] = []


def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Takes the place of JITFunction.run: remembers the launch instead of making it."""
    recorded.append((self, args, kwargs))


def specialisation(launch: Recorded, arch: int) -> tuple[Any, Any, Any]:
    """(backend, bound arguments, what Triton specialises on) of one launch."""
    kernel, args, kwargs = launch
    backend = make_backend(GPUTarget("cuda", arch, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, _ = binder(*args, debug=False, **kwargs)
    return backend, bound, special


def compiled(launch: Recorded, arch: int) -> dict[str, Any]:
    """Resource usage of one kernel on one architecture, by Triton's own ptxas and cuobjdump."""
    kernel, _, kwargs = launch
    backend, bound, special = specialisation(launch, arch)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, {"debug": False, **kwargs}, bound, special, None
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    binary = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": options.num_warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = binary.asm["ptx"]
    return {
        "kernel": kernel.fn.__name__,
        "arch": f"sm_{arch}",
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "local": numbers["LOCAL"],
        "shared": binary.metadata.shared,
        "warps": options.num_warps,
        "widest_load": max(
            [int(x) for x in re.findall(r"ld\.global[\w.:]*\.v(\d)\.b32", ptx)] + [1]
        ),
        # Pointers to which a 32-bit number is added that depends on the program.
        "narrow_offsets": re.findall(
            r"tt\.addptr %(\w+_ptr), .*: !tt\.ptr<\w+>, i32", binary.asm["ttir"]
        ),
        "atomics": len(re.findall(r"\b(atom|red)\.", ptx)),
    }


def launches_of(launch: Any) -> list[Recorded]:
    recorded.clear()
    launch()
    return list(recorded)


def distinct(launches: Iterable[Any]) -> int:
    """How many kernels Triton would compile for these launches."""
    keys = set()
    for launch in launches:
        for one in launches_of(launch):
            keys.add((one[0].fn.__name__, str(specialisation(one, 90)[2])))
    return len(keys)


def feature_sets(launches: Iterable[Any]) -> int:
    """How many sets of kernel, dtype of the logits and flags these launches ask for."""
    sets = set()
    for launch in launches:
        for kernel, args, kwargs in launches_of(launch):
            logits = args[kernel.arg_names.index("logits_ptr")]
            sets.add((kernel.fn.__name__, logits.dtype, *sorted(kwargs.items())))
    return len(sets)


def main() -> None:
    JITFunction.run = record
    import aot_launches

    archs = [int(name.removeprefix("sm_")) for name in sys.argv[1:]]
    report: dict[str, Any] = {"compiled": [], "kernels": []}
    for name, launch in aot_launches.LAUNCHES.items():
        for one in launches_of(launch):
            for arch in archs:
                report["compiled"].append({"launch": name, **compiled(one, arch)})
    report["rows of any shape"] = distinct(aot_launches.rows_of_any_shape())
    report["feature sets of rows"] = feature_sets(aot_launches.rows_of_any_shape())
    report["kl of any shape"] = distinct(aot_launches.kl_of_any_shape())
    report["feature sets of kl"] = feature_sets(aot_launches.kl_of_any_shape())
    report["gae of any shape"] = distinct(aot_launches.gae_of_any_shape())
    report["policy loss of any size"] = distinct(aot_launches.policy_loss_of_any_size())
    report["heads of any shape"] = distinct(aot_launches.heads_of_any_shape())
    report["bradley-terry of any shape"] = distinct(aot_launches.bradley_terry_of_any_shape())
    report["preference loss of any size"] = distinct(aot_launches.preference_loss_of_any_size())
    report["shaping of any shape"] = distinct(aot_launches.shaping_of_any_shape())
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
