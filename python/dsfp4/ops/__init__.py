"""The number formats and the single operations of the engine, on arrays.

For tests and experiments: inputs are NumPy arrays or anything with ``__dlpack__`` on the CPU,
results are NumPy arrays. Operations take ``backend="reference"`` (FP32 with FP64 sums, the
definition) or ``"cpu"`` (SIMD). ``dsfp4.ops.cuda`` has those for tensors on an NVIDIA GPU.
"""

from dsfp4.ops.formats import *  # noqa: F403
from dsfp4.ops.formats import __all__ as _formats
from dsfp4.ops.layers import *  # noqa: F403
from dsfp4.ops.layers import __all__ as _layers

__all__ = [*_formats, *_layers]
