"""What the core has to say goes to the logger `dsfp4`."""

import logging

_logger = logging.getLogger("dsfp4")


def emit(level: str, message: str) -> None:
    """Called by the core, on any of its threads; `level` is the name of a level of logging."""
    _logger.log(getattr(logging, level), "%s", message)
