"""`plain_view`: an adapted model as it was before, beside it: whatever adapts a plain model can adapt that."""

from __future__ import annotations

import torch
from torch import nn

from complora_kernels.adapters.unload import unload
from complora_kernels.common.wrappers import unwrap


def plain_view(model: nn.Module) -> nn.Module:
    """A plain model of the modules of an adapted one, without its wrappers, on the same memory; `model` stays as it is.

    Its modules, and parameters as objects, are its own: it can be adapted and run, which does not change `model`.
    """
    tables = [name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))]
    views: dict[nn.Module, nn.Module] = {}
    parameters: dict[int, nn.Parameter] = {}

    def parameter_of(parameter: nn.Parameter) -> nn.Parameter:
        if type(parameter) is not nn.Parameter:
            return parameter  # a quantised weight, for one
        return parameters.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))

    def view_of(module: nn.Module) -> nn.Module:
        module = unwrap(module)
        if isinstance(module, torch.jit.ScriptModule):
            return module  # it lives in C++; nothing in it can be adapted
        if module not in views:
            views[module] = view = object.__new__(type(module))
            vars(view).update(vars(module))
            for name in tables:
                vars(view)[name] = vars(module)[name].copy()
            own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
            view._parameters.update({name: parameter_of(parameter) for name, parameter in own.items()})
            children = {name: child for name, child in module._modules.items() if child is not None}
            view._modules.update({name: view_of(child) for name, child in children.items()})
        return views[module]

    return unload(view_of(model))
