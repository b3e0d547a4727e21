"""Triton reads TRITON_INTERPRET when a kernel is defined: interpreted tests have their process."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
