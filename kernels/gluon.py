"""What kernels in Gluon have in common: what they import, and whether this Triton has it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from xfcompile.evaluate import Unsupported

log = logging.getLogger(__name__)

IMPORTS = """\
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
"""


def why_missing(load: Callable[[], object]) -> str | None:
    """Why a kernel cannot be imported; None if it can. What it computes may have no form in Triton; and this Triton may
    have no Gluon, or another one: it is experimental, and what it defines changes."""
    try:
        load()
    except Unsupported as error:
        return str(error)
    except Exception as error:
        log.debug("no kernel in Gluon: %s", error)
        return f"this version of Triton has no such Gluon ({type(error).__name__}: {error})"
    return None
