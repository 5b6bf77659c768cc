"""Runs DeepSeek models in FP4 that do not fit, without PyTorch.

Importing this package is cheap: everything heavier than the error types is loaded on first use.
"""

from typing import TYPE_CHECKING, Any

from dsfp4 import errors

if TYPE_CHECKING:
    from dsfp4.inference import DeepseekInference
    from dsfp4.model import Model

    __version__: str

__all__ = ["DeepseekInference", "Model", "__version__", "errors"]


def __getattr__(name: str) -> Any:
    value: Any
    if name == "DeepseekInference":
        from dsfp4.inference import DeepseekInference as value
    elif name == "Model":
        from dsfp4.model import Model as value
    elif name == "__version__":
        from importlib.metadata import version

        value = version("dsfp4")
    else:
        raise AttributeError(f"module 'dsfp4' has no attribute '{name}'")
    globals()[name] = value
    return value
