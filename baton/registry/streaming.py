"""Compute in float32 with weights that stay as they are in their file: each layer's are widened while it runs.

A model of bfloat16 then takes one layer of extra memory instead of twice its file. The numbers are those of a model
loaded in float32: every layer sees float32 weights of the same values. What reads another layer's weights meets a
tensor without numbers (device "meta") and fails, so that the caller can load the model in full.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def stream(model: "torch.nn.Module") -> bool:
    """Make a model loaded in a 16-bit dtype compute in float32, layer by layer; False, and unchanged, if it cannot."""
    import torch

    narrow = (torch.bfloat16, torch.float16)
    for module in model.modules():
        # What __init__ computed in the narrow dtype has lost digits that a model loaded in float32 has.
        held = [*module._buffers.values(), *vars(module).values()]
        if any(value in narrow for value in held if isinstance(value, torch.dtype)):
            return False
        if any(value.dtype in narrow for value in held if isinstance(value, torch.Tensor)):
            return False
    scratch = _Scratch(model, narrow)
    for module in list(model.modules()):
        scratch.attach(module)
    config: Any = model.config
    config.dtype = torch.float32
    return True


class _Scratch:
    """The memory for the widened weights of the layers that run just now: a stack, as layers nest."""

    def __init__(self, model: "torch.nn.Module", narrow: tuple["torch.dtype", ...]) -> None:
        import torch

        self._narrow = narrow
        self._memory = torch.empty(self._needed(model), dtype=torch.float32)
        self._used = 0

    def _needed(self, module: "torch.nn.Module") -> int:
        own = sum(parameter.numel() for parameter in self._own(module).values())
        return own + max((self._needed(child) for child in module.children()), default=0)

    def _own(self, module: "torch.nn.Module") -> dict[str, Any]:
        return {name: p for name, p in module._parameters.items() if p is not None and p.dtype in self._narrow}

    def _is_shown_in(self, output: Any) -> bool:
        import torch

        if isinstance(output, torch.Tensor):
            return output.untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr()
        items = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
        return any(self._is_shown_in(item) for item in items)

    def attach(self, module: "torch.nn.Module") -> None:
        """Take a module's own narrow parameters out of it, but for the time that it runs."""
        import torch

        stored = self._own(module)
        if not stored:
            return
        absent = {
            name: torch.nn.Parameter(torch.empty(p.shape, dtype=torch.float32, device="meta"), requires_grad=False)
            for name, p in stored.items()
        }
        count = sum(parameter.numel() for parameter in stored.values())

        def widen(module: "torch.nn.Module", inputs: Any) -> None:
            for name, parameter in stored.items():
                wide = self._memory[self._used : self._used + parameter.numel()].view(parameter.shape)
                wide.copy_(parameter.detach())
                module._parameters[name] = torch.nn.Parameter(wide, requires_grad=False)
                self._used += parameter.numel()

        def put_back(module: "torch.nn.Module", inputs: Any, output: Any) -> None:
            if self._is_shown_in(output):
                # The next layer's weights would overwrite it; the caller then loads the model in full.
                raise RuntimeError(f"{type(module).__name__} gives a view of its own weights")
            module._parameters.update(absent)
            self._used -= count

        module._parameters.update(absent)
        module.register_forward_pre_hook(widen)
        module.register_forward_hook(put_back)
