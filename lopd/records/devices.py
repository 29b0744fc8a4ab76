"""What a device computes by itself, and what is given back of it."""

from collections.abc import Mapping
from gc import collect

import torch
from torch import Tensor
from torch.optim import Optimizer

from lopd.errors import ArgumentError, ModelError
from lopd.records.ranks import bare


def check_device(owner: str, device: torch.device) -> None:
    """Refuse a device without float64, in which lopd adds up: GPUs of Apple, and some of Intel.

    Raises:
        ModelError: it names the owner.
    """
    if device.type in ("cpu", "cuda"):
        return
    try:
        torch.ones(2, dtype=torch.float64, device=device).sum()
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"{owner}: its device is {str(device)!r}, which has no float64, expected a CPU or CUDA; move it there: `.to('cpu')`."
        ) from error


def check_beside(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Refuse an optimizer of torch that keeps state on another device than its parameter; those of others may mean to, as where they offload it.

    Raises:
        ArgumentError: it names the first of these parameters.
    """
    kind = type(bare(optimizer))
    if not kind.__module__.startswith("torch.optim"):
        return
    for name, parameter in parameters.items():
        for value in optimizer.state.get(parameter, {}).values():
            # the count of steps may be on the host; what is sharded, or wraps another, is left alone
            if type(value) is Tensor and value.ndim and value.shape == parameter.shape and value.device != parameter.device:
                raise ArgumentError(
                    f"Optimizer {kind.__name__}: its state of {name!r} is on {value.device} and the parameter on {parameter.device}; move "
                    "the student back, or move it before `load_checkpoint`."
                )


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has bfloat16 of its own: NVIDIA's have it from compute capability 8.0 on (A100), and torch emulates it on T4 and V100.

    Those before lack FlashAttention's kernel too.  What other makers' have is left to torch.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    # torch.compile knows this one for a constant, and would break its graph at get_device_capability
    return bool(torch.cuda.get_device_properties(device).major >= 8)


def has_flash_3(device: torch.device) -> bool:
    """Return whether a CUDA device runs FlashAttention-3: NVIDIA's of compute capability 8 and 9.

    Its kernels for others are not there, and it finds out by C's `exit`, so that it cannot be tried.
    """
    return torch.version.hip is None and torch.cuda.get_device_properties(device).major in (8, 9)


def give_back() -> None:
    """Give back what this process holds of CUDA devices and does not use, also for another process: that of vLLM.

    It may be called before vLLM starts: torch does nothing where it has not used CUDA, and does not ask whether there is any.
    """
    collect()
    torch.cuda.empty_cache()


def running_sums(values: torch.Tensor) -> torch.Tensor:
    """Return running sums over the last dimension: on the host where they are to be deterministic, as torch may refuse that on a card."""
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(-1).to(values.device)
    return values.cumsum(-1)
