"""States of torch's random number generators, which dropout draws from."""

from collections.abc import Mapping

import torch
from torch import Tensor

from minimind.training.distributed import ProcessGroup


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """Return this process's generator states [bytes] by name, of the CPU and of the device."""
    states = {"rng/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng/cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["rng/mps"] = torch.mps.get_rng_state()
    return states


def set_rng_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore `rng_states`; states of other kinds of devices are ignored."""
    if "rng/cpu" in states:
        torch.set_rng_state(states["rng/cpu"])
    if "rng/cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["rng/cuda"], device)
    if "rng/mps" in states and device.type == "mps":
        torch.mps.set_rng_state(states["rng/mps"])


def gather_rng_states(group: ProcessGroup, device: torch.device) -> dict[str, Tensor]:
    """Return the generator states of all ranks, [ranks, bytes] each."""
    own = rng_states(device)
    return {name: torch.stack(group.all_gather(state)) for name, state in own.items()}


def scatter_rng_states(
    states: dict[str, Tensor], group: ProcessGroup, device: torch.device
) -> None:
    """Restore each rank's generators from the states [ranks, bytes] that rank 0 has loaded.

    A rank that did not exist when they were saved keeps the generators that it has.
    """
    num_saved = group.broadcast_object({name: len(saved) for name, saved in states.items()})
    for name, own in rng_states(device).items() if group.size > 1 else ():
        if name in num_saved:
            empty = torch.empty((num_saved[name], *own.shape), dtype=own.dtype)
            states.setdefault(name, empty)
            group.broadcast_([states[name]])
    # Cloned, since torch crashes on a state that is a view of a larger tensor.
    rank = group.rank
    own_states = {name: saved[rank].clone() for name, saved in states.items() if rank < len(saved)}
    set_rng_states(own_states, device)
