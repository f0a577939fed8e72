"""What vLLM's own Python code makes of a checkpoint, on a machine without a GPU.

usage: PYTHONPATH=DIR DIR/venv/bin/python bench/vllm_loader.py [options] CHECKPOINT...

vLLM's code, not its kernels: it parses the quantization configuration, takes a scheme for each
layer, chooses a kernel class, and loads every tensor into a parameter of the same shape. Nothing is
computed. With --capability it believes that it runs on such a GPU (8.0 Ampere, 8.9 Ada, 9.0 Hopper,
10.0 Blackwell); which kernel it then names is what it would choose if all its libraries were there
that need none to be asked: FlashInfer, DeepGEMM and others that are not installed are left out.
With --tensor-parallel N as many processes load a part each.

DIR is an environment with torch for CPUs, a transformers that vLLM 0.33 accepts, its pure Python
dependencies, and the Python files of its wheel unpacked into DIR/vllm (compiled parts are not
needed):

    python3 -m venv DIR/venv && DIR/venv/bin/pip install torch==2.13.0 "transformers<5.21" \
        compressed-tensors==0.17.0
    DIR/venv/bin/pip download --no-deps vllm==0.33.0, then unzip vllm/*.py into DIR

One table and one JSON line a checkpoint: ok, architecture, schemes and kernels (class -> layers),
missing parameters, error. Exit status 1 if any is not ok.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

import torch

# Without their compiled parts these are not there unless somebody asks for them.
_OPTIONAL = (".k_scale", ".v_scale", ".q_scale", ".prob_scale", "_zero_point")
_KERNEL_ATTRIBUTES = ("kernel", "linear_kernel", "fp8_linear", "w8a8_block_fp8_linear")


class Kernels:
    """Stands in for compiled operators: each exists by name and does nothing."""

    def __init__(self) -> None:
        self._lookup = torch._ops._OpNamespace.__getattr__

    @contextlib.contextmanager
    def pretended(self) -> Iterator[None]:
        """Within, operators of vLLM's extensions can be named."""
        lookup = self._lookup

        def find(namespace: Any, name: str) -> Any:
            try:
                return lookup(namespace, name)
            except AttributeError:
                if namespace.name.startswith("_C") or namespace.name.endswith("_C"):
                    return lambda *_, **__: None
                raise

        torch._ops._OpNamespace.__getattr__ = find  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch._ops._OpNamespace.__getattr__ = lookup  # type: ignore[method-assign]


def declare_operators() -> torch.library.Library:
    """Declare what torchvision's Python code describes and its absent library would define."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@functools.cache
def platform_of(capability: tuple[int, int] | None) -> Any:
    """The platform that vLLM is to believe in: a CPU, or a CPU that says it is a GPU.

    One a process: vLLM's modules keep the one that they found when they were imported.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    if capability is None:
        return CpuPlatform()
    major, minor = capability

    class PretendedGpu(CpuPlatform):  # type: ignore[misc]
        """Answers questions about the device as a GPU would; allocates as a CPU does."""

        _enum = PlatformEnum.CPU

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(major, minor) if cls._enum is PlatformEnum.CUDA else None

        @classmethod
        def supports_fp8(cls) -> bool:
            return (major, minor) >= (8, 9)

        @classmethod
        def is_device_capability_family(cls, value: int, device_id: int = 0) -> bool:
            return value // 10 == major

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 100

    return PretendedGpu()


@contextlib.contextmanager
def as_gpu(platform: Any, capability: tuple[int, int] | None) -> Iterator[None]:
    """Within, the platform calls itself CUDA. The engine is configured outside, as a CPU's."""
    from vllm.platforms.interface import PlatformEnum

    before = type(platform)._enum
    if capability is not None:
        type(platform)._enum = PlatformEnum.CUDA
    try:
        yield
    finally:
        type(platform)._enum = before


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within, new tensors have this dtype, as while vLLM loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def inspect(
    path: str, ranks: int, rank: int, capability: tuple[int, int] | None, port: int
) -> dict[str, Any]:
    """Build vLLM's model of a checkpoint and load the tensors into it."""
    import vllm.platforms as platforms

    platform = platform_of(capability)
    platforms._current_platform = platform
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=path,
        # Kernels for GPUs are chosen for 16-bit inputs; a CPU's arithmetic is float32 here.
        dtype="bfloat16" if capability else "float32",
        enforce_eager=True,
        max_model_len=512,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else None,
    ).create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
            ensure_model_parallel_initialized(ranks, 1)
        from vllm.model_executor.model_loader.utils import (
            get_model_architecture,
            initialize_model,
        )

        get_model_architecture(config.model_config)
        import vllm._custom_ops  # noqa: F401  before operators are pretended: it looks for some

        dtype = config.model_config.dtype
        with Kernels().pretended(), as_gpu(platform, capability), default_dtype(dtype):
            model = initialize_model(vllm_config=config)
            files = sorted(Path(path).glob("*.safetensors"))
            loaded = set(model.load_weights(pair for f in files for pair in load_file(f).items()))
    names = dict(model.named_parameters())
    section = getattr(config.model_config.hf_config, "quantization_config", None) or {}
    algorithm = str(section.get("quant_algo", ""))
    missing = sorted(n for n in names.keys() - loaded if not _is_optional(n, algorithm))
    return {
        "path": path,
        "ok": not missing,
        "architecture": config.model_config.architecture,
        "capability": ".".join(map(str, capability)) if capability else None,
        "tensor_parallel": ranks,
        "schemes": _counted(model, _scheme_of),
        "kernels": _counted(model, _kernel_of),
        "loaded": len(loaded),
        "missing": missing[:20],
    }


def _is_optional(name: str, algorithm: str) -> bool:
    # vLLM makes room for the scale of an input that older checkpoints of this kind had, and drops
    # it.
    if algorithm == "W4A16_NVFP4" and name.endswith(".input_scale"):
        return True
    return ".attn." in name and name.endswith(_OPTIONAL)


def _counted(
    model: torch.nn.Module, of: Callable[[torch.nn.Module], str | None]
) -> dict[str, list[Any]]:
    """Class -> number of layers, the first, the last."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        kind = of(module)
        if kind is not None:
            found.setdefault(kind, []).append(name)
    return {kind: [len(names), names[0], names[-1]] for kind, names in found.items()}


def _scheme_of(module: torch.nn.Module) -> str | None:
    scheme = getattr(module, "scheme", None) or getattr(module, "quant_method", None)
    return type(scheme).__name__ if scheme is not None else None


def _kernel_of(module: torch.nn.Module) -> str | None:
    for owner in (getattr(module, "scheme", None), getattr(module, "quant_method", None)):
        for attribute in _KERNEL_ATTRIBUTES:
            kernel = getattr(owner, attribute, None)
            if kernel is not None:
                return kernel.__name__ if isinstance(kernel, type) else type(kernel).__name__
    return None


def _guarded(
    path: str, ranks: int, rank: int, capability: tuple[int, int] | None, port: int
) -> dict[str, Any]:
    try:
        return inspect(path, ranks, rank, capability, port)
    except Exception as error:
        return {
            "path": path,
            "ok": False,
            "capability": ".".join(map(str, capability)) if capability else None,
            "tensor_parallel": ranks,
            "error": f"{type(error).__name__}: {error}"[:800],
            "where": traceback.format_exc().splitlines()[-3:-1],
        }


def _process(
    rank: int,
    ranks: int,
    paths: list[str],
    capability: tuple[int, int] | None,
    port: int,
    out: Any,
) -> None:
    library = declare_operators()
    for path in paths:
        result = _guarded(path, ranks, rank, capability, port)
        if rank == 0:
            out.put(result)
    del library


def run(
    paths: list[str], ranks: int, capability: tuple[int, int] | None
) -> Iterator[dict[str, Any]]:
    """The results, one a checkpoint, of as many processes as there are ranks."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = _free_port()
    workers = [
        context.Process(target=_process, args=(rank, ranks, paths, capability, port, queue))
        for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    try:
        for _ in paths:
            yield queue.get(timeout=600)
    finally:
        for worker in workers:
            worker.join(timeout=10)
            worker.terminate()


def _free_port() -> int:
    """A port on which the processes can meet; others may run at the same time."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        number: int = listener.getsockname()[1]
        return number


def table(result: dict[str, Any]) -> str:
    """A few aligned lines."""
    lines = [f"{result['path']}: {'accepted' if result['ok'] else 'REFUSED'}"]
    for title in ("schemes", "kernels"):
        for kind, (count, first, last) in result.get(title, {}).items():
            lines.append(f"  {title[:-1]:7} {kind:42} {count:4}  {first} .. {last}")
    lines += [f"  missing {name}" for name in result.get("missing", [])]
    if "error" in result:
        lines.append(f"  {result['error']}")
    return "\n".join(lines)


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


def main() -> int:
    """Parse the arguments, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N")
    parser.add_argument("--capability", type=_capability, metavar="M.N", help="e.g. 9.0")
    parser.add_argument("--json", action="store_true", help="leave the tables out")
    arguments = parser.parse_args()
    bad = 0
    for result in run(arguments.checkpoints, arguments.tensor_parallel, arguments.capability):
        bad += not result["ok"]
        if not arguments.json:
            print(table(result))
        print(json.dumps(result), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
