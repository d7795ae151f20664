"""Names of the solvers and precisions; imports no torch."""

from __future__ import annotations

from typing import Literal

Precision = Literal["fast", "exact"]
Orthogonalizer = Literal["procrustes", "whitening"]
